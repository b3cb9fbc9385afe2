"""Tiny models with random weights, as folders on disk: what the tests load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from inkstream.families import family_of, parts_of
from inkstream.families.zimage.specs import BASE, TURBO
from inkstream.nn.config import MistralConfig, Qwen3Config
from inkstream.nn.qwen3 import Qwen3
from inkstream.types import Spec
from inkstream.weights.files import write_state
from inkstream.weights.keymap import translate

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "image_encoder": "model.safetensors",
    "image_embedder": "diffusion_pytorch_model.safetensors",
}
"""What the published folders call their weights."""


def write_folder(folder: Path, spec: Spec, seed: int = 0) -> Path:
    """A diffusers folder of random weights, in float32, with the family's tokenizers of one token a letter."""
    family = family_of(spec.family)
    for name, content in family.documents(spec).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    for name, state in random_states(spec, seed).items():
        rules = family.parts[name].layouts.get("diffusers", ())
        write_state(folder / name / WEIGHTS[name], translate(rules, state, back=True))
    if spec.family == "flux1":
        write_flux1_tokenizers(folder)
    elif isinstance(spec.text_encoder, MistralConfig):
        write_tokenizer(folder / "tokenizer", MISTRALS)
    else:
        write_tokenizer(folder / "tokenizer")
    return folder


def random_states(spec: Spec, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of every part, in our names; norms near one, so that activations stay in range.

    The text encoder has its last layers and norm too, as published ones do.
    """
    parts = parts_of(spec)
    modules = {name: part.build(getattr(spec, name)) for name, part in parts.items() if name != "text_encoder"}
    is_qwen = isinstance(spec.text_encoder, Qwen3Config)
    modules["text_encoder"] = (
        Qwen3(spec.text_encoder, depths=(spec.text_encoder.num_hidden_layers,))
        if is_qwen
        else parts["text_encoder"].build(spec.text_encoder)
    )
    states = {name: modules[name].state_dict() for name in parts}
    if is_qwen:
        states["text_encoder"]["norm.weight"] = torch.empty(spec.text_encoder.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    for state in states.values():
        for name, weight in state.items():
            is_norm = weight.ndim == 1 and "norm" in name and name.endswith(("weight", "scale", "running_var"))
            weight.normal_(mean=1.0 if is_norm or "running_var" in name else 0.0, std=0.1, generator=generator)
    return states


QWENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MISTRALS = ("<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]",
            "[IMG_END]")  # fmt: skip


def write_tokenizer(folder: Path, specials: Sequence[str] = QWENS) -> None:
    """One token a byte, and the specials behind them: with Qwen's 261 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_flux1_tokenizers(folder: Path) -> None:
    """CLIP's and T5's, of one token a letter."""
    import transformers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder / "tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(chr(i), -2.0) for i in range(33, 127)]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_2")


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
