"""diffusers as a contender of `inkstream bench`. It exits with LEFT_OUT if diffusers is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from torch import Tensor

import inkstream
from inkstream.bench.child import Draw, Order, Setup, Stages, attend, to_bytes
from inkstream.bench.turns import LEFT_OUT

PIPELINES = {"zimage": "ZImagePipeline", "flux2": "Flux2KleinPipeline"}


def open_diffusers(setup: Setup) -> tuple[Draw, dict[str, str]]:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    family = setup.case.spec.family
    kind = getattr(diffusers, PIPELINES[family])
    pipeline = random_pipeline(kind, setup) if setup.case.weights == "memory" else read_pipeline(kind, setup)
    pipeline.set_progress_bar_config(disable=True)
    if "compiled" in setup.how:
        torch._dynamo.config.recompile_limit = 64
        backend = "inductor" if setup.device.type == "cuda" else "eager"  # the CPU is used only to rehearse
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    draw = {"zimage": draw_zimage, "flux2": draw_klein}[family]
    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    return lambda order, stages: draw(pipeline, order, stages), versions


def read_pipeline(kind: type, setup: Setup) -> object:
    folder = setup.folder
    if setup.case.weights == "package":
        folder = Path(inkstream.__file__).parent / str(setup.case.spec.folder)
    pipeline = kind.from_pretrained(folder, tokenizer=tokenizer_in(folder), dtype=setup.dtype)
    return pipeline.to(setup.device)


def random_pipeline(kind: type, setup: Setup) -> object:
    """Build the pipeline on its device, with the initial weights of its classes. Speed does not depend on them."""
    import diffusers
    import transformers

    def config(part: str) -> dict:
        return json.loads((setup.folder / part / "config.json").read_text())

    index = json.loads((setup.folder / "model_index.json").read_text())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(setup.folder / "scheduler")
    torch.set_default_dtype(setup.dtype)
    with setup.device:
        transformer = getattr(diffusers, index["transformer"][1]).from_config(config("transformer"))
        text_config = transformers.Qwen3Config(**config("text_encoder"))
        text_encoder = getattr(transformers, index["text_encoder"][1])(text_config)
        vae = getattr(diffusers, index["vae"][1]).from_config(config("vae"))
    torch.set_default_dtype(torch.float32)
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    return kind(scheduler=scheduler, tokenizer=tokenizer_in(setup.folder), **{n: p.eval() for n, p in parts.items()})


def tokenizer_in(folder: Path) -> object:
    """Return Pocket's tokenizer, which is used for all pipelines."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def draw_zimage(pipeline, order: Order, stages: Stages) -> Tensor:
    case = order.case
    guided = case.guidance > 1
    texts, negatives = pipeline.encode_prompt(
        order.prompt, do_classifier_free_guidance=guided, negative_prompt=order.negative
    )
    stages.done("prompt")
    latents = pipeline(
        prompt_embeds=texts * case.count, negative_prompt_embeds=negatives * case.count, width=case.width,
        height=case.height, num_inference_steps=order.steps, guidance_scale=case.guidance - 1,
        latents=order.noise((16, case.height // 8, case.width // 8)).to(pipeline.device), output_type="latent",
    ).images  # fmt: skip
    stages.done("steps")
    config = pipeline.vae.config
    latents = latents.to(pipeline.vae.dtype) / config.scaling_factor + config.shift_factor
    pixels = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pt")
    pixels = to_bytes(pixels)
    stages.done("pixels")
    return pixels


def draw_klein(pipeline, order: Order, stages: Stages) -> Tensor:
    case = order.case
    layers = pipeline.text_encoder.config.num_hidden_layers
    read = tuple(layers // 4 * n for n in (1, 2, 3))
    texts, _ = pipeline.encode_prompt(order.prompt, text_encoder_out_layers=read)
    stages.done("prompt")
    latents = pipeline(
        prompt_embeds=texts, width=case.width, height=case.height, num_inference_steps=order.steps,
        guidance_scale=case.guidance, num_images_per_prompt=case.count, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    stages.done("steps")
    pixels = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pt")
    pixels = to_bytes(pixels)
    stages.done("pixels")
    return pixels


if __name__ == "__main__":
    for package in ("diffusers", "transformers"):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed", file=sys.stderr)
            sys.exit(LEFT_OUT)
    attend(open_diffusers)
