"""What `convert` writes is loaded by diffusers with nothing missing or left over, and draws the same picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Model

import inkstream
from inkstream import Request
from inkstream.engine.files import convert as convert_module
from inkstream.engine.files.convert import convert
from inkstream.weights.files import read_state

PARTS = {"transformer": ZImageTransformer2DModel, "text_encoder": Qwen3Model, "vae": AutoencoderKL}


@pytest.fixture(scope="module")
def native_folder(reference_folder, tmp_path_factory) -> Path:
    return convert(reference_folder, tmp_path_factory.mktemp("converted") / "native", "native")


@pytest.fixture(scope="module")
def diffusers_folder(native_folder, tmp_path_factory) -> Path:
    """Back from the native folder, where no diffusers config of the transformer is left to copy."""
    return convert(native_folder, tmp_path_factory.mktemp("converted") / "diffusers", "diffusers")


def same(ours: Path, theirs: Path) -> None:
    ours_state, theirs_state = read_state(ours), read_state(theirs)
    assert ours_state.keys() == theirs_state.keys()
    assert all(torch.equal(ours_state[k], theirs_state[k]) for k in theirs_state)


@pytest.mark.parametrize("part", PARTS)
def test_a_converted_part_is_the_original_to_the_bit_and_whole(reference_folder, diffusers_folder, part):
    same(diffusers_folder / part, reference_folder / part)
    _, report = PARTS[part].from_pretrained(diffusers_folder / part, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_a_converted_config_says_what_the_original_said(reference_folder, diffusers_folder):
    for part in ("transformer", "vae", "scheduler"):
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        ours, theirs = (json.loads((f / part / name).read_text()) for f in (diffusers_folder, reference_folder))
        for key, value in ours.items():
            assert theirs[key] == value or key == "_diffusers_version", key


def test_the_pipeline_draws_the_same_picture_from_the_converted_folder(reference, diffusers_folder):
    pipeline = ZImagePipeline.from_pretrained(diffusers_folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    wish = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "pt"}
    ours, theirs = (p("a tree", latents=noise.clone(), **wish).images for p in (pipeline, reference))
    assert torch.equal(ours, theirs)


def test_load_draws_the_same_picture_from_each_layout(reference_folder, native_folder, diffusers_folder):
    request = Request(prompt="a tree", width=64, height=64, steps=2, seed=1)
    pictures = []
    for folder in (reference_folder, native_folder, diffusers_folder):
        model = inkstream.load(folder)
        pictures.append(model.decode(model.sample(request, model.encode(request))))
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_a_sharded_folder_is_read_by_diffusers_and_by_us(reference_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 400_000)
    folder = convert(reference_folder, tmp_path / "sharded")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 3
    assert (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for part, kind in PARTS.items():
        _, report = kind.from_pretrained(folder / part, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        same(folder / part, reference_folder / part)
    assert inkstream.load(folder).spec.name == "sharded"
