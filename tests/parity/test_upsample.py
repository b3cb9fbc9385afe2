"""The language models that write prompts out, ours against transformers' at random tiny weights."""

from __future__ import annotations

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from tokenizers import Tokenizer
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

import inkstream
from inkstream.families.flux2 import upsample
from inkstream.families.flux2.specs import DEV, KLEIN_4B
from inkstream.families.flux2.upsample import dev_task, klein_task, write
from inkstream.families.references import cap_area, join_references
from inkstream.nn.config import Qwen3Config
from rounding import agree, roundings

VISION = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": 8, "image_size": 256, "patch_size": 8,
}  # fmt: skip


TEMPERATURE = upsample.TEMPERATURE


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        is_norm = weight.ndim == 1 and ("norm" in name or "ln" in name)
        torch.nn.init.normal_(weight, mean=1.0 if is_norm else 0.0, std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


def with_language_model(folder, theirs):
    """The folder with that language model as its text encoder, saved by itself."""
    shutil.rmtree(folder / "text_encoder")
    theirs.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "with a head"])
def klein(request, tmp_path_factory, make_folder):
    """Ours, loaded, and theirs."""
    folder = make_folder(tmp_path_factory.mktemp("klein") / "flux2-klein", KLEIN_4B.tiny)
    sizes = json.loads((folder / "text_encoder" / "config.json").read_text())
    theirs = randomised(
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**sizes, "tie_word_embeddings": request.param}))
    )
    return inkstream.load(with_language_model(folder, theirs), inkstream.Machine("cpu", "fp32")), theirs


@pytest.fixture(scope="module")
def dev(tmp_path_factory, make_folder):
    folder = make_folder(tmp_path_factory.mktemp("dev") / "flux2-dev", DEV.tiny)
    words = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    language = json.loads((folder / "text_encoder" / "config.json").read_text())["text_config"]
    config = transformers.Mistral3Config(
        text_config={**language, "pad_token_id": None}, vision_config=VISION,
        image_token_index=words.token_to_id("[IMG]"), tie_word_embeddings=False,
    )  # fmt: skip
    theirs = randomised(transformers.Mistral3ForConditionalGeneration(config))
    return inkstream.load(with_language_model(folder, theirs), inkstream.Machine("cpu", "fp32")), theirs


def expected_text(theirs, tokenizer, task: str, ends, seed: int, **pictures) -> str:
    """What transformers' model writes, read anew at every token, drawn as ours draws."""
    ids = tokenizer.encode(task, add_special_tokens=False).ids

    def ask(*tokens):
        ids.extend(tokens)
        return theirs(input_ids=torch.tensor([ids]), **pictures).logits[0, -1]

    return list(write(ask(), ask, tokenizer, ends, seed))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(upsample, "OUTPUT_TOKENS", 12)
    monkeypatch.setattr(upsample, "TEMPERATURE", 1.0)


@pytest.mark.parametrize("prompt", ["a red cat", "写着“春”字的红色海报"])
def test_klein_writes_what_the_whole_qwen3_writes(klein, prompt):
    model, theirs = klein
    tokenizer = model.family.tokenizer
    for seed in (0, 7):
        got = list(model.writer.write(prompt, [], seed))
        assert got == expected_text(theirs, tokenizer, klein_task(prompt), upsample.KLEIN_ENDS, seed)
        assert len(got) > 3
    assert list(model.writer.write(prompt, [], 0)) != list(model.writer.write(prompt, [], 7))


def test_the_text_encoder_is_the_writers_first_part_and_is_not_read_twice(klein):
    model, _ = klein
    own = {name for name, _ in model.writer.named_parameters() if not name.startswith("encoder.")}
    assert {name.split(".")[1] for name in own if name.startswith("layers.")} == {"3"}
    assert model.writer.encoder is model.family.text_encoder


def test_dev_writes_what_the_whole_mistral_writes(dev):
    model, theirs = dev
    for seed in (0, 7):
        got = list(model.writer.write("a red cat", [], seed))
        assert got == expected_text(theirs, model.family.tokenizer, dev_task("a red cat"), upsample.DEV_ENDS, seed)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("sizes", [((120, 88),), ((64, 64), (160, 72))], ids=str)
def test_dev_sees_the_references_as_the_whole_mistral_does(dev, sizes):
    model, theirs = dev
    shown = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    page = shown[0] if len(shown) == 1 else Flux2ImageProcessor.concatenate_images(shown)
    cell = VISION["patch_size"] * 2
    processor = PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size={"height": cell, "width": cell})
    seen = processor(page, return_tensors="pt")
    rows, columns = (side // cell for side in seen["image_sizes"][0].tolist())
    task = dev_task("make it red", (rows, columns))
    pictures = {"pixel_values": seen["pixel_values"], "image_sizes": seen["image_sizes"]}
    expected = expected_text(theirs, model.family.tokenizer, task, upsample.DEV_ENDS, 3, **pictures)
    assert list(model.writer.write("make it red", shown, 3)) == expected
    own, grid = model.writer.look(shown)
    assert grid == (rows, columns)
    features = theirs.model.get_image_features(**pictures, vision_feature_layer=-1).pooler_output[0]
    agree(own, features, roundings(theirs.model.vision_tower, theirs.model.multi_modal_projector))
    assert own.std() > 0.01


def test_a_large_page_of_references_is_scaled_as_the_pipeline_scales_it():
    shown = [picture(1600, 800), picture(800, 1600)]
    ours = cap_area(join_references(shown), upsample.AREA)
    theirs = Flux2ImageProcessor._resize_if_exceeds_area(Flux2ImageProcessor.concatenate_images(shown), 768**2)
    assert ours.size == theirs.size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert inspect.signature(Flux2Pipeline.upsample_prompt).parameters["temperature"].default == TEMPERATURE


def test_sizes_of_the_published_language_models_are_told_from_their_shapes():
    from inkstream.families.flux2.writers import WRITER, WholeMistral, WholeQwen3, infer

    assert infer({
        "embed_tokens.weight": (151_936, 2560), "norm.weight": (2560,), "layers.0.self_attn.q_norm.weight": (128,),
        **{f"layers.{i}.self_attn.q_proj.weight": (4096, 2560) for i in range(36)},
        "layers.0.self_attn.k_proj.weight": (1024, 2560), "layers.0.mlp.gate_proj.weight": (9728, 2560),
    }) == WholeQwen3(**vars(Qwen3Config()))  # fmt: skip
    with torch.device("meta"):
        tail = WRITER.build(WholeMistral(vision_config={"model_type": "pixtral"}))
    counts: dict[str, int] = {}
    for name, weight in tail.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + weight.numel()
    layer = 5120 * 128 * (32 + 8 + 8) + 32 * 128 * 5120 + 3 * 5120 * 32_768 + 2 * 5120
    assert counts["model"] == 10 * layer + 5120
    assert counts["lm_head"] == 131_072 * 5120
