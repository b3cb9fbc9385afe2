"""Time a prompt's way to pixels, inkstream beside diffusers: same random weights, prompts and noise, one process.

    python scripts/bench_zimage.py --date 2026-11-21 [--model tiny --model medium] [--repeats 5] [--record NAME]

Both run in float32 on the CPU and take turns. Their pictures must agree within 1/255 before anything is timed. Every
run has a prompt of its own, so nothing is answered from a cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers

import inkstream
from inkstream import Request
from inkstream.bench.records import write_record
from inkstream.bench.run import Comparison, compare

SIZES = {
    "tiny": {
        "transformer": {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
                        "cap_feat_dim": 32, "axes_dims": [8, 12, 12]},
        "text_encoder": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                         "head_dim": 16, "intermediate_size": 64},
        "vae": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    },
    "medium": {
        "transformer": {"dim": 1024, "n_layers": 12, "n_refiner_layers": 2, "n_heads": 8, "n_kv_heads": 8,
                        "cap_feat_dim": 512, "axes_dims": [32, 48, 48]},
        "text_encoder": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
                         "head_dim": 64, "intermediate_size": 1536},
        "vae": {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8},
    },
}  # fmt: skip
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GUIDANCE = {"turbo": 1.0, "guided": 5.0}  # in the standard scale; diffusers' is one less
NUMBERS = itertools.count(1)  # of prompts not used yet


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    diffusers.utils.logging.disable_progress_bar()
    rows = []
    for size in options.model or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            pipeline = build_pipeline(size, Path(folder) / "tokenizer")
            pipeline.save_pretrained(Path(folder) / f"{size}-turbo")
            model = inkstream.load(Path(folder) / f"{size}-turbo", device="cpu", dtype=torch.float32)
        rows += [row for case in GUIDANCE for row in time_case(pipeline, model, size, case, options)]
    peers = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    if options.record:
        command = shlex.join(["python", *sys.argv])
        print(write_record(options.record, options.date, command, peers, rows), file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="the day, for the record")
    parser.add_argument("--model", action="append", choices=SIZES, help="which sizes; all of them when left out")
    parser.add_argument("--pixels", type=int, default=256, help="side of the picture")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    return parser.parse_args()


def time_case(
    pipeline: diffusers.ZImagePipeline, model: inkstream.Model, size: str, case: str, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Check that both draw the same picture, then time the whole way and each stage of it."""
    scale, pixels, steps = GUIDANCE[case], options.pixels, options.steps
    noise = torch.randn(1, 16, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(0))
    settings = {"width": pixels, "height": pixels, "num_inference_steps": steps, "guidance_scale": scale - 1}

    def request(prompts: tuple[str, str]) -> Request:
        prompt, negative = prompts
        return Request(
            prompt=prompt, negative_prompt=negative, width=pixels, height=pixels, steps=steps, guidance=scale, seed=0
        )

    def our_picture(prompts: tuple[str, str]) -> torch.Tensor:
        wish = request(prompts)
        return model.decode(model.sample(wish, model.encode(wish), noise))

    def their_picture(prompts: tuple[str, str]) -> torch.Tensor:
        prompt, negative = prompts
        return pipeline(prompt, negative_prompt=negative, latents=noise.clone(), output_type="pt", **settings).images

    ours, theirs = our_picture(prompt_number(0)), their_picture(prompt_number(0))
    apart = (ours - theirs).abs().max().item() * 255
    if not (apart <= 1 and theirs.std() > 0.02):
        raise SystemExit(f"{size} {case}: pictures are {apart:.3g}/255 apart, deviation {theirs.std():.3g}")

    wish = request(prompt_number(0))
    cond, latents = model.encode(wish), torch.randn_like(noise)
    texts, negatives = their_states(pipeline, prompt_number(0), scale)

    def their_decode() -> torch.Tensor:
        with torch.no_grad():
            scaled = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
            return pipeline.image_processor.postprocess(pipeline.vae.decode(scaled).sample, output_type="pt")

    stages = {
        "prompt to pixels": (with_fresh_prompts(our_picture), with_fresh_prompts(their_picture)),
        "prompt": (
            with_fresh_prompts(lambda prompts: model.encode(request(prompts))),
            with_fresh_prompts(lambda prompts: their_states(pipeline, prompts, scale)),
        ),
        f"{steps} steps": (
            lambda: model.sample(wish, cond, noise),
            lambda: pipeline(
                prompt_embeds=texts, negative_prompt_embeds=negatives, latents=noise.clone(), output_type="latent",
                **settings,
            ),
        ),
        "pixels": (lambda: model.decode(latents), their_decode),
    }  # fmt: skip
    rows = []
    for stage, (a, b) in stages.items():
        result = compare(a, b, options.repeats)
        rows.append(as_row(size, case, stage, result, apart))
        print(describe(rows[-1]), flush=True)
    return rows


def their_states(pipeline: diffusers.ZImagePipeline, prompts: tuple[str, str], scale: float) -> tuple[list, list]:
    prompt, negative = prompts
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, do_classifier_free_guidance=scale > 1, negative_prompt=negative)


def prompt_number(i: int) -> tuple[str, str]:
    """A prompt and a negative one of its own, always of the same length."""
    return f"a red fox by the river at dawn, mist over the reeds, take {i:05d}", f"blurry, take {i:05d}"


def with_fresh_prompts(draw: Callable[[tuple[str, str]], object]) -> Callable[[], object]:
    """The same, each call with a prompt that no call before it had."""
    return lambda: draw(prompt_number(next(NUMBERS)))


def as_row(size: str, case: str, stage: str, result: Comparison, apart: float) -> dict[str, object]:
    return {
        "model": size,
        "case": case,
        "stage": stage,
        "ratio": round(result.ratio, 4),
        "ours_median": round(result.ours.median, 5),
        "ours_least": round(result.ours.least, 5),
        "ours_most": round(result.ours.most, 5),
        "theirs_median": round(result.theirs.median, 5),
        "theirs_least": round(result.theirs.least, 5),
        "theirs_most": round(result.theirs.most, 5),
        "pixels_apart_255": round(apart, 4),
    }


def describe(row: dict[str, object]) -> str:
    return (
        f"ratio {row['ratio']:.3f}  {row['model']:<6} {row['case']:<6} {row['stage']:<16}"
        f"  ours {row['ours_median']:.4f} s ({row['ours_least']:.4f} to {row['ours_most']:.4f})"
        f"  diffusers {row['theirs_median']:.4f} s ({row['theirs_least']:.4f} to {row['theirs_most']:.4f})"
    )


def build_pipeline(size: str, scratch: Path) -> diffusers.ZImagePipeline:
    """A Z-Image pipeline as diffusers makes it, at random weights lively enough that the picture is no flat field."""
    config = SIZES[size]
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(axes_lens=[1536, 512, 512], **config["transformer"])
    width = config["transformer"]["dim"]
    for name, weight in transformer.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=0.8 / width**0.5)
    text_encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(vocab_size=512, initializer_range=0.05, **config["text_encoder"])
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, **config["vae"],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    pipeline = diffusers.ZImagePipeline(
        scheduler, vae.eval(), text_encoder.eval(), byte_tokenizer(scratch), transformer.eval()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def byte_tokenizer(scratch: Path) -> transformers.Qwen2Tokenizer:
    """Qwen's kind of tokenizer with one token a byte."""
    scratch.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (scratch / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*alphabet, "re"])}))
    (scratch / "merges.txt").write_text("r e\n")
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=str(scratch / "vocab.json"), merges=str(scratch / "merges.txt"), pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


if __name__ == "__main__":
    main()
