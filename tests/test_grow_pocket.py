"""A grown Pocket draws what the one before drew, and its embeddings follow their tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import inkstream
from inkstream.pocket.tokenizer import build_tokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "grow_pocket.py"
OLD = Path(inkstream.__file__).parent / "pocket" / "weights"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def grow(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


def test_new_layers_change_no_pixel_and_learn(tmp_path):
    done = grow(OLD, tmp_path / "grown", "--layers", 19)
    assert done.returncode == 0, done.stderr
    old, grown = load_file(OLD / WEIGHTS), load_file(tmp_path / "grown" / WEIGHTS)
    assert {key.split(".")[1] for key in grown if key.startswith("layers.")} == {str(i) for i in range(19)}
    assert sum(t.numel() for t in grown.values()) > sum(t.numel() for t in old.values())
    request = inkstream.Request(prompt="a red circle", steps=2, seed=1, upsample=False)
    models = [inkstream.load(folder, inkstream.Machine("cpu", "fp32")) for folder in (OLD, tmp_path / "grown")]
    latents = [model.sample(request, model.encode(request)) for model in models]
    assert torch.equal(*latents)
    with torch.no_grad():  # a new layer that is opened counts
        for name, weight in models[1].family.transformer.layers.named_parameters():
            if name.endswith(("attention_norm2.weight", "ffn_norm2.weight")):
                weight.add_(0.1)
    assert not torch.equal(latents[1], models[1].sample(request, models[1].encode(request)))


def test_rows_of_the_embedding_follow_their_tokens(tmp_path):
    assert grow(OLD, tmp_path / "grown", "--tokenizer", "pocket").returncode == 0
    name = Path("text_encoder") / "model.safetensors"
    old, new = (load_file(folder / name)["embed_tokens.weight"] for folder in (OLD, tmp_path / "grown"))
    known = build_tokenizer().get_vocab_size()
    assert torch.equal(old[:known], new[:known])  # the tokenizer in the package is that of this code


def test_what_cannot_be_grown_is_refused_by_its_value(tmp_path):
    assert "--layers 3: the model already has 16 layers" in grow(OLD, tmp_path / "grown", "--layers", 3).stderr
    assert not (tmp_path / "grown").exists()
    (tmp_path / "there").mkdir()
    assert "already" in grow(OLD, tmp_path / "there", "--layers", 20).stderr
