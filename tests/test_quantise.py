"""`convert --quant`: files that load at once and draw nearly the same picture, written a few weights at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inkstream
from inkstream.engine.files import quantise
from inkstream.engine.files.convert import convert
from inkstream.engine.files.parts import locate_part
from inkstream.engine.files.quantise import QUANTS
from inkstream.engine.machine.install import Placement
from inkstream.engine.machine.loader import read
from inkstream.families import CARD
from inkstream.families.zimage.family import ZImage
from inkstream.families.zimage.keys import DIFFUSERS, PACKS
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.quant import PackedEmbedding, PackedLinear
from inkstream.quant.packed import Packed, unpack
from inkstream.types import InputError, Loading
from inkstream.weights.files import list_weights, read_header, read_state
from inkstream.weights.keymap import matches, split

NEAR = {"fp8": 28, "w8a8": 36, "nf4": 18, "q4_k": 19}
"""PSNR in dB that a picture has at least, with random weights, of which every one matters alike."""


@pytest.fixture(scope="module")
def wide(make_folder, tmp_path_factory) -> Path:
    """A Z-Image whose rows fill the blocks of most formats."""
    tiny = TURBO.tiny
    transformer = replace(tiny.transformer, dim=256, n_heads=4, axes_dims=(16, 24, 24), cap_feat_dim=256)
    encoder = replace(tiny.text_encoder, hidden_size=256, head_dim=64, intermediate_size=512)
    spec = replace(tiny, transformer=transformer, text_encoder=encoder)
    folder = make_folder(tmp_path_factory.mktemp("models") / "wide-turbo", spec)
    (folder / CARD).write_text('{"licence": "apache-2.0"}')
    return folder


class Drawer:
    """Draws with one model, whose parts are exchanged."""

    def __init__(self, folder: Path):
        self.model = inkstream.load(folder, inkstream.Machine("cpu"))
        self.request = inkstream.Request(prompt="a red ball", seed=1, steps=1)
        self.original = self.draw()

    def draw(self) -> torch.Tensor:
        self.model.family._encode_once.cache_clear()
        return self.model.decode(self.model.sample(self.request, self.model.encode(self.request)))

    def distance(self, folder: Path) -> float:
        """PSNR in dB of what the transformer and text encoder of another folder draw."""
        (transformer,) = list_weights(folder)
        for part, path in (("transformer", transformer), ("text_encoder", folder / "text_encoder")):
            found = locate_part(ZImage, part, path)
            module = read(found, Placement(torch.device("cpu"), torch.float32, rules=found.rules))
            setattr(self.model.family, part, module)
        return -10 * (self.draw() - self.original).square().mean().log10().item()


@pytest.fixture(scope="module")
def drawer(wide) -> Drawer:
    return Drawer(wide)


@pytest.mark.parametrize("quant", NEAR)
def test_a_packed_model_draws_nearly_the_same_picture(wide, drawer, tmp_path, quant):
    folder = convert(wide, tmp_path / "m", quant=quant)
    assert drawer.distance(folder) > NEAR[quant]
    (file,) = list_weights(folder)
    assert file.suffix == (".gguf" if QUANTS[quant].gguf else ".safetensors")
    header = read_header(file)
    assert header.metadata["licence"] == "apache-2.0"
    assert header.metadata["origin"] == "wide-turbo"
    qkv = drawer.model.family.transformer.layers[1].attention.qkv
    embedding = drawer.model.family.text_encoder.embed_tokens
    assert isinstance(qkv, PackedLinear)
    assert isinstance(embedding, PackedEmbedding)
    assert (qkv.packed.format, qkv.packed.dynamic) == (QUANTS[quant].formats[0], QUANTS[quant].dynamic)


def test_only_what_the_family_names_is_packed(wide, tmp_path):
    folder = convert(wide, tmp_path / "m", quant="q8_0")
    (file,) = list_weights(folder)
    before, after = read_state(wide / "transformer"), read_state(file)
    packed = {name for name, weight in after.items() if isinstance(weight, Packed)}
    assert packed == {
        name for name, w in after.items() if w.ndim == 2 and any(matches(p, name) for p in PACKS) and "w2" not in name
    }  # w2's rows are 682 numbers long
    assert isinstance(after["layers.0.feed_forward.w2.weight"], torch.Tensor)
    for name in ("cap_embedder.1.weight", "layers.0.adaLN_modulation.0.weight", "t_embedder.mlp.0.bias"):
        assert torch.equal(after[name], before[name])
    assert all(weight.dtype == torch.float32 for weight in after.values() if weight.ndim < 2)
    assert "model-Q8_0.gguf" in {path.name for path in (folder / "text_encoder").iterdir()}
    assert read_header(folder / "text_encoder" / "model-Q8_0.gguf").metadata["general.architecture"] == "qwen3"
    assert read_header(file).metadata["general.architecture"] == "lumina2"
    assert json.loads(read_header(file).metadata["config"])["dim"] == 256


def test_what_is_packed_can_be_packed_anew_and_written_in_the_other_layout(wide, tmp_path):
    fp8 = convert(wide, tmp_path / "fp8", "native", quant="fp8")
    diffusers = convert(fp8, tmp_path / "diffusers")
    split, fused = read_state(diffusers / "transformer"), read_state(list_weights(fp8)[0])
    assert "layers.0.attention.to_q.weight" in split
    rows = torch.cat([unpack(split[f"layers.0.attention.to_{x}.weight"]) for x in "qkv"])
    assert torch.equal(rows, unpack(fused["layers.0.attention.qkv.weight"]))
    direct, again = convert(wide, tmp_path / "a", quant="q8_0"), convert(diffusers, tmp_path / "b", quant="q8_0")
    one, other = (unpack(read_state(list_weights(f)[0])["layers.0.attention.qkv.weight"]) for f in (direct, again))
    assert 0 < (one - other).abs().max() < 0.03
    with pytest.raises(InputError, match="packed as q8_0, which is not written to safetensors: add --quant"):
        convert(direct, tmp_path / "c", "native")
    back = read_state(list_weights(convert(direct, tmp_path / "d", quant="bf16"))[0])
    assert torch.equal(back["layers.0.attention.qkv.weight"], one.bfloat16())


def test_weights_are_read_a_few_at_a_time_and_none_twice(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "BATCH", 1_000_000)
    sizes, names = [], []

    def watched(path, only):
        state = read_state(path, only)
        sizes.append(sum(weight.nbytes for weight in state.values()))
        names.extend((path, name) for name in only)
        return state

    monkeypatch.setattr(quantise, "read_state", watched)
    events: list[Loading] = []
    folder = convert(wide, tmp_path / "m", "native", events.append, "q4_k")
    largest = max(weight.nbytes for weight in read_header(wide / "transformer").tensors.values())
    assert max(sizes) <= max(largest, 1_000_000)
    assert len(names) == len(set(names))
    parts = [wide / part for part in ("transformer", "text_encoder", "vae")]
    assert set(names) == {(part, name) for part in parts for name in read_state(part)}
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[-1] == events[-1].total_bytes
    assert folder.is_dir()


def test_names_that_are_fused_on_either_side_stay_together():
    names = [f"layers.0.attention.to_{x}.weight" for x in "qkv"]
    groups = quantise._groups([names[0], "x_pad_token", *names[1:]], DIFFUSERS, ())
    assert sorted(groups) == [names, ["x_pad_token"]]
    halves = ["a.weight", "b.weight"]
    assert quantise._groups([*halves, "c"], (), [split("ab", ours=("a", "b"))]) == [halves, ["c"]]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"quant": "q3"}, "quant q3 is not known: take fp8, int8"),
        ({"quant": "q4_k", "to": "diffusers"}, "quant q4_k is a GGUF precision, and diffusers reads no GGUF"),
    ],
)
def test_what_cannot_be_written_is_named(wide, tmp_path, asked, said):
    with pytest.raises(InputError, match=said):
        convert(wide, tmp_path / "m", **asked)
    assert not list(tmp_path.iterdir())
