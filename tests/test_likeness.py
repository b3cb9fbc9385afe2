"""CLIP-like metrics equal those of their models' authors, at random tiny weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import write_flux1_tokenizers
from inkstream.cli import main
from inkstream.evaluate.likeness import Metric
from inkstream.types import InputError

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def write(folder: Path, kind: str) -> Path:
    """Write a tiny model as transformers saves it."""
    write_flux1_tokenizers(folder / "words")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words" / "tokenizer", model_max_length=8)
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 8, "pad_token_id": len(tokenizer) - 1,
            "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}  # fmt: skip
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model: Any = transformers.CLIPModel(config)
        pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor: Any = transformers.CLIPProcessor(pictures, tokenizer)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        pictures = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
        processor = transformers.SiglipProcessor(pictures, tokenizer)
    model.save_pretrained(folder / kind)
    processor.save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip"), "clip")


PICTURE = Image.radial_gradient("L").resize((40, 30)).convert("RGB")


@pytest.mark.parametrize("kind", ["clip", "pickscore"])
def test_the_metrics_of_clip_are_the_cosine_of_its_two_embeddings(clip, kind):
    model = transformers.CLIPModel.from_pretrained(clip)
    inputs = transformers.CLIPProcessor.from_pretrained(clip)(text=["b c"], images=[PICTURE], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds).item()
    wanted = 100 * max(cosine, 0) if kind == "clip" else model.logit_scale.exp().item() * cosine
    assert Metric(f"{kind}:{clip}")(PICTURE, "b c") == pytest.approx(wanted, abs=1e-4)


def test_the_metric_of_siglip_is_a_probability(tmp_path):
    folder = write(tmp_path, "siglip")
    model, processor = (one.from_pretrained(folder) for one in (transformers.SiglipModel, transformers.AutoProcessor))
    inputs = processor(text=["b c"], images=[PICTURE], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    wanted = (cosine * model.logit_scale.exp() + model.logit_bias).sigmoid().item()
    assert Metric(f"siglip:{folder}")(PICTURE, "b c") == pytest.approx(wanted, abs=1e-5)


def test_a_long_prompt_is_cut_to_what_the_model_reads(clip):
    metric = Metric(f"clip:{clip}")
    assert metric(PICTURE, "b c " * 50) == pytest.approx(metric(PICTURE, "b c " * 60), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip", "write clip:FOLDER, pickscore:FOLDER, siglip:FOLDER"),
        ("beauty:x", "metric 'beauty:x' is not known"),
        ("clip:/nowhere", "/nowhere is no folder of a model"),
        ("siglip:{clip}", "is of the kind clip, and siglip needs siglip or siglip2"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_in_a_line(clip, name, says):
    with pytest.raises(InputError) as error:
        Metric(name.format(clip=clip))
    assert says in str(error.value)


def test_verify_tells_metrics_beside_the_checks(clip, tmp_path, capsys):
    PICTURE.save(tmp_path / "a.png")
    words = ["verify", str(tmp_path / "a.png"), "--metric", f"clip:{clip}", "--prompt", "b c"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pictures"][0]["metrics"]
    assert told == {"clip:clip": round(Metric(f"clip:{clip}")(PICTURE, "b c"), 4)}
    assert main(words) == 0
    assert f"clip:clip: {told['clip:clip']:g}" in capsys.readouterr().out
    assert main(words[:4]) == 2
    assert "has no prompt in its metadata: give one with --prompt" in capsys.readouterr().err
