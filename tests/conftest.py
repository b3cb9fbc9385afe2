"""Tiny models with random weights, as folders on disk: what the tests load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from inkstream.families import family_of
from inkstream.families.zimage.specs import BASE, TURBO
from inkstream.nn.qwen3 import Qwen3
from inkstream.types import Spec
from inkstream.weights.files import write_state
from inkstream.weights.keymap import translate

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
"""What the published folders call their weights."""


def write_folder(folder: Path, spec: Spec, seed: int = 0) -> Path:
    """A diffusers folder of random weights, in float32, with a byte-level tokenizer."""
    family = family_of(spec.family)
    for name, content in family.documents(spec).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    for name, state in random_states(spec, seed).items():
        rules = family.parts[name].layouts.get("diffusers", ())
        write_state(folder / name / WEIGHTS[name], translate(rules, state, back=True))
    write_tokenizer(folder / "tokenizer")
    return folder


def random_states(spec: Spec, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of every part, in our names; norms near one, so that activations stay in range.

    The text encoder has its last layers and norm too, as published ones do.
    """
    parts = family_of(spec.family).parts
    modules = {name: part.build(getattr(spec, name)) for name, part in parts.items() if name != "text_encoder"}
    depth = spec.text_encoder.num_hidden_layers
    modules["text_encoder"] = Qwen3(spec.text_encoder, depths=(depth,))
    states = {name: modules[name].state_dict() for name in parts}
    states["text_encoder"]["norm.weight"] = torch.empty(spec.text_encoder.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    for state in states.values():
        for name, weight in state.items():
            is_norm = weight.ndim == 1 and "norm" in name and name.endswith(("weight", "scale", "running_var"))
            weight.normal_(mean=1.0 if is_norm or "running_var" in name else 0.0, std=0.1, generator=generator)
    return states


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and Qwen's specials behind them: 261 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """`make_folder(folder, spec, seed=0)` writes a diffusers folder of random weights at the sizes of any spec."""
    return write_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Z-Image Turbo as a diffusers folder. Not to be written to."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-turbo", TURBO.tiny)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory) -> Path:
    """A tiny undistilled Z-Image as a diffusers folder. Not to be written to."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-base", BASE.tiny, seed=1)
