"""Adapters' files: what is written in each dialect is read as the same change, and what is bound adds the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inkstream.families import SPECS, WIDTHS, adapter_names
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import DEV as FLUX2_DEV
from inkstream.families.flux2.specs import KLEIN_4B, KLEIN_9B
from inkstream.families.zimage.specs import TURBO
from inkstream.types import InputError
from inkstream.weights.files import read_header
from inkstream.weights.lora.changes import Change, Full, LayerChange, Lora, LowRank, Part, Replacement
from inkstream.weights.lora.cuts import Reordered, reorder
from inkstream.weights.lora.factors import IA3, Dora, GLoRA, LoHa, LoKr
from inkstream.weights.lora.names import Names
from inkstream.weights.lora.read import read_lora
from inkstream.weights.lora.rotations import InputRotation, OutputRotation, peft_boft, peft_oft
from inkstream.weights.lora.write import DIALECTS, write_lora

NAMES = {spec.family: adapter_names(spec) for spec in (TURBO.tiny, DEV.tiny, KLEIN_4B.tiny)}


def noise(*shape: int, seed: int = 0, size: float = 0.3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def low_rank(height: int, width: int, seed: int = 0, rank: int = 4, scale: float = 0.7) -> LowRank:
    return LowRank(noise(rank, width, seed=seed), noise(height, rank, seed=seed + 1), scale)


def lokr(height: int, width: int, rows: int) -> LoKr:
    """rows: of its first factor."""
    return LoKr(noise(rows, 8), (noise(height // rows, 2, seed=1), noise(2, width // 8, seed=2)), 0.7)


def thirds(height: int) -> int:
    """Rows of a first factor such that the product can be cut in three, or else in halves."""
    return 12 if height % 12 == 0 else 4


CHANGES: dict[str, Callable[[int, int], Change]] = {
    "LoRA": low_rank,
    "LoHa": lambda o, i: LoHa(noise(o, 2), noise(2, i, seed=1), noise(o, 2, seed=2), noise(2, i, seed=3), 0.7),
    "LoKr": lambda o, i: lokr(o, i, thirds(o)),
    "LoKr of two products": lambda o, i: LoKr(
        (noise(4, 2), noise(2, 8)), (noise(o // 4, 2, seed=1), noise(2, i // 8, seed=2)), 0.7
    ),
    "LoKr of full factors": lambda o, i: LoKr(noise(o // 2, i // 4), noise(2, 4, seed=1), 0.7),
    "DoRA": lambda o, i: Dora(low_rank(o, i), 1 + noise(o, 1)),
    "DoRA of columns": lambda o, i: Dora(low_rank(o, i), 1 + noise(1, i)),
    "DoRA of LoKr": lambda o, i: Dora(CHANGES["LoKr"](o, i), 1 + noise(o, 1)),
    "DoRA of LoHa": lambda o, i: Dora(CHANGES["LoHa"](o, i), 1 + noise(o, 1)),
    "GLoRA": lambda o, i: GLoRA(noise(i, 2), noise(2, i, seed=1), noise(o, 2, seed=2), noise(2, i, seed=3), 0.7),
    "IA3": lambda o, i: IA3(noise(o, 1), (o, i)),
    "IA3 of inputs": lambda o, i: IA3(noise(1, i), (o, i)),
    "OFT": lambda o, i: OutputRotation(noise(o // 8, 8, 8), (o, i)),
    "OFT with a limit and scales": lambda o, i: OutputRotation(noise(o // 8, 8, 8), (o, i), 0.5, 1 + noise(o, 1)),
    "BOFT": lambda o, i: OutputRotation(noise(2, o // 8, 8, 8), (o, i), 0.0, 1 + noise(o, 1)),
    "full": lambda o, i: Full(noise(o, i)),
}
UNWRITTEN: dict[str, Callable[[int, int], Change]] = {
    "replacement": lambda o, i: Replacement(noise(o, i)),
    "OFT of inputs": lambda o, i: InputRotation(peft_oft(noise(i // 8, 28), i, 5, None), (o, i)),
    "BOFT of inputs": lambda o, i: InputRotation(peft_boft(noise(2, i // 8, 8, 8)), (o, i), 1 + noise(o, 1)),
    "DoRA of LoKr of four": lambda o, i: Dora(lokr(o, i, 4), 1 + noise(o, 1)),
    "other order": lambda o, i: Reordered(CHANGES["LoKr"](o, i), torch.arange(o).flip(0)),
    "other order of an OFT": lambda o, i: Reordered(CHANGES["OFT"](o, i), torch.arange(o).flip(0)),
}


def dense(lora: Lora, names: Names) -> dict[str, Tensor]:
    """What an adapter adds to every weight, at layers whose weights are noise; and to biases, as PATH.bias."""
    found = {f"+ {name}": value for name, value in lora.vectors.items()}
    found |= {f"= {name}": value for name, value in lora.replaced.items()}
    for i, (path, shape) in enumerate(names.layers.items()):
        if path not in lora.layers:
            continue
        weight, total = noise(*shape, seed=i), torch.zeros(shape)
        for part in lora.layers[path].parts:
            total[part.rows] += part.change.delta(weight[part.rows] if part.change.reads else None)
        found[path] = total
        if (bias := lora.layers[path].bias) is not None:
            found[f"{path}.bias"] = bias
    return found


def agree(a: Mapping[str, Tensor], b: Mapping[str, Tensor], within: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= within, name


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path


# What is bound adds what is merged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHANGES | UNWRITTEN)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_bound_change_adds_what_the_dense_change_would(kind, has_bias):
    o, i = 48, 64
    change = (CHANGES | UNWRITTEN)[kind](o, i)
    weight, bias, x = noise(o, i, seed=7), noise(o, seed=8) if has_bias else None, noise(5, i, seed=9, size=1.0)
    assert change.shape == (o, i)
    plain = torch.nn.functional.linear(x, weight, bias)
    expected = plain + 0.5 * x @ change.delta(weight).T
    bound = change.bind(weight, bias, lambda tensor: tensor)
    alone = plain.clone()
    bound.add(x, alone, alone, 0.5)
    assert (alone - expected).abs().max() < 1e-5
    second = 2 * plain
    bound.add(x, plain, second, 0.5)  # behind another adapter
    assert (second - plain - expected).abs().max() < 1e-5
    assert bound.bytes > 0
    half = change.bind(weight, bias, lambda tensor: tensor.bfloat16())
    rounded = plain.bfloat16()
    half.add(x.bfloat16(), rounded, rounded, 0.5)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "DoRA of LoKr", "LoKr", "LoKr of two products"])
def test_a_bound_change_learns(kind):
    """The gradients of what is bound are those of the dense change."""
    o, i = 48, 64
    weight, x = noise(o, i, seed=7), noise(5, i, seed=9, size=1.0)
    change = CHANGES[kind](o, i)
    leaves = [tensor.requires_grad_() for tensor in tensors_of(change)]
    out = (x @ weight.T).clone()
    change.bind(weight, None, lambda tensor: tensor).add(x, out, out, 0.5)
    ours = torch.autograd.grad(out.square().sum(), leaves)
    theirs = torch.autograd.grad((x @ (weight + 0.5 * change.delta(weight)).T).square().sum(), leaves)
    assert len(leaves) >= 2
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
        assert b.abs().max() > 0


def tensors_of(change: object) -> list[Tensor]:
    if isinstance(change, Tensor):
        return [change]
    parts = change if isinstance(change, tuple) else vars(change).values() if hasattr(change, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_the_gradient_of_dora_does_not_pass_through_its_norm():
    change = CHANGES["DoRA"](48, 64)
    assert isinstance(change, Dora)
    assert isinstance(change.change, LowRank)
    weight, up = noise(48, 64, seed=7), change.change.up.requires_grad_()
    (ours,) = torch.autograd.grad(change.delta(weight).sum(), up)
    gain = change.magnitude / (weight + change.change.delta()).detach().norm(dim=1, keepdim=True)
    (expected,) = torch.autograd.grad((gain * change.change.delta()).sum(), up)
    assert torch.allclose(ours, expected, rtol=1e-4)


# Dialects -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", NAMES)
def test_what_is_written_is_read_as_the_same_change(family, dialect, tmp_path):
    names = NAMES[family]
    layers = {
        path: LayerChange((Part(low_rank(*size, seed=i)),)) for i, (path, size) in enumerate(names.layers.items())
    }
    lora = Lora(layers)
    again = read_lora(write_lora(tmp_path / "a.safetensors", lora, names, dialect), names)
    assert again.report.dialects == (dialect,)
    assert again.report.ranks == (4,)
    assert not again.report.unmatched
    agree(dense(again, names), dense(lora, names))


@pytest.mark.parametrize("dialect", ["kohya", "comfyui", "lycoris"])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("family", NAMES)
def test_every_algebra_is_written_and_read(family, kind, dialect, tmp_path):
    names = NAMES[family]
    whole = {
        "BOFT": ("qkv", "linear1", "adaLN"),
        "DoRA of columns": ("qkv", "linear1"),
        "DoRA of LoKr": ("linear1",),
    }.get(kind, ())  # some dialects have parts of these layers, or other orders, which this change cannot be cut into
    layers = {
        path: LayerChange((Part(CHANGES[kind](*size)),))
        for path, size in names.layers.items()
        if size[0] % 16 == size[1] % 16 == 0 and not any(word in path for word in whole)
    }
    lora = Lora(layers)
    again = read_lora(write_lora(tmp_path / "a.safetensors", lora, names, dialect), names)
    agree(dense(again, names), dense(lora, names), within=3e-6)
    assert len(layers) > 8


@pytest.mark.parametrize("family", NAMES)
def test_biases_norms_and_replaced_norms_are_written_and_read(family, tmp_path):
    names = NAMES[family]
    biases = {path: LayerChange((), noise(height)) for path, (height, _) in names.layers.items()}
    first, second = [name for name in names.vectors if "norm" in name][:2]
    added, replaced = {first: noise(*names.vectors[first])}, {second: noise(*names.vectors[second])}
    lora = Lora(biases, added, {}, replaced)
    for dialect in ("kohya", "comfyui", "lycoris"):
        again = read_lora(write_lora(tmp_path / "a.safetensors", lora, names, dialect), names)
        agree(dense(again, names), dense(lora, names))


def test_parts_of_qkv_come_back_with_their_ranks(tmp_path):
    """Three LoRAs of rank 4 become one of rank 12, whose zeros tell them apart again."""
    names, path = NAMES["flux1"], "double_blocks.0.img_attn.qkv"
    height, width = names.layers[path]
    third = height // 3
    parts = [
        Part(low_rank(third, width, seed=10 * i, scale=i + 1.0), slice(i * third, (i + 1) * third)) for i in range(3)
    ]
    lora = Lora({path: LayerChange(parts)})
    whole = read_lora(write_lora(tmp_path / "a.safetensors", lora, names, "kohya"), names)
    assert whole.report.ranks == (12,)
    split = read_lora(write_lora(tmp_path / "b.safetensors", whole, names, "diffusers"), names)
    assert split.report.ranks == (4,)
    assert len(split.layers[path].parts) == 3
    for other in (whole, split):
        agree(dense(other, names), dense(lora, names))


def test_a_whole_lora_that_is_cut_and_joined_keeps_its_rank(tmp_path):
    names, path = NAMES["flux1"], "single_blocks.0.linear1"
    lora = Lora({path: LayerChange((Part(low_rank(*names.layers[path])),))})
    split = read_lora(write_lora(tmp_path / "a.safetensors", lora, names, "diffusers"), names)
    assert len(split.layers[path].parts) == 4
    whole = read_lora(write_lora(tmp_path / "b.safetensors", split, names, "comfyui"), names)
    assert whole.report.ranks == (4,)
    agree(dense(whole, names), dense(lora, names))


def test_a_lora_that_has_learned_nothing_yet_is_written_whole(tmp_path):
    names, path = NAMES["zimage"], "layers.0.attention.qkv"
    height, width = names.layers[path]
    lora = Lora({path: LayerChange((Part(LowRank(noise(4, width), torch.zeros(height, 4))),))})
    again = read_lora(write_lora(tmp_path / "a.safetensors", lora, names, "diffusers"), names)
    assert again.report.matched == 6
    assert all(torch.equal(part.change.down, noise(4, width)) for part in again.layers[path].parts)  # type: ignore[attr-defined]


def test_a_lora_of_the_queries_alone_writes_no_others(tmp_path):
    names, path = NAMES["zimage"], "layers.0.attention.qkv"
    height, width = names.layers[path]
    lora = Lora({path: LayerChange((Part(low_rank(height // 3, width), slice(0, height // 3)),))})
    file = write_lora(tmp_path / "a.safetensors", lora, names, "diffusers")
    start = "transformer.layers.0.attention.to_q"
    assert load_file(file).keys() == {f"{start}.lora_A.weight", f"{start}.lora_B.weight"}


def test_two_reorderings_are_one():
    order = torch.tensor([2, 0, 1])
    change = OutputRotation(noise(1, 3, 3), (3, 2))  # one block, whose rows change places
    once = reorder(change, order)
    assert isinstance(once, Reordered)
    assert reorder(once, order.argsort()) is change


@pytest.mark.parametrize(
    ("kind", "dialect", "said"),
    [
        ("LoKr", "diffusers", "the LoKr of .*qkv cannot be written in the dialect diffusers: take comfyui, kohya"),
        ("BOFT", "comfyui", "the BOFT of layers.0.attention.qkv cannot be cut into parts: take another dialect"),
        ("DoRA of columns", "kohya", "the DoRA of layers.0.attention.qkv cannot be cut into parts"),
        ("DoRA of LoKr of four", "lycoris", "the DoRA of full of .*to_q has no form in files"),
        ("replacement", "lycoris", "the replacement of layers.0.attention.qkv cannot be cut"),
        ("LoRA", "a1111", "the dialect a1111 is unknown: take kohya, comfyui, diffusers, peft, lycoris"),
    ],
)
def test_what_a_dialect_cannot_hold_is_refused(kind, dialect, said, tmp_path):
    names, path = NAMES["zimage"], "layers.0.attention.qkv"
    lora = Lora({path: LayerChange((Part((CHANGES | UNWRITTEN)[kind](*names.layers[path])),))})
    with pytest.raises(InputError, match=said):
        write_lora(tmp_path / "a.safetensors", lora, names, dialect)


def test_a_change_of_a_layer_that_the_model_lacks_is_not_written(tmp_path):
    lora = Lora({"layers.99.attention.out": LayerChange((Part(low_rank(64, 64)),))})
    with pytest.raises(InputError, match=r"changes layers.99.attention.out, which is not a layer of this model"):
        write_lora(tmp_path / "a.safetensors", lora, NAMES["zimage"], "kohya")
    with pytest.raises(InputError, match=r"changes nothing, so there is nothing to write"):
        write_lora(tmp_path / "a", Lora({}), NAMES["zimage"], "peft")
    assert list(tmp_path.iterdir()) == []


def test_a_converted_file_does_not_name_the_dialect_that_it_came_from(tmp_path):
    names, path = NAMES["zimage"], "layers.0.attention.out"
    lora = Lora({path: LayerChange((Part(Dora(low_rank(64, 64, scale=0.5), 1 + noise(64, 1))),))})
    first = write_lora(tmp_path / "a.safetensors", lora, names, "kohya", {"ss_seed": "3"})
    assert read_header(first).metadata["ss_network_module"] == "networks.lora"
    assert read_header(first).metadata["ss_network_alpha"] == "2"
    second = write_lora(tmp_path / "b.safetensors", read_lora(first, names), names, "diffusers")
    metadata = read_header(second).metadata
    assert "ss_network_module" not in metadata
    assert (metadata["ss_network_alpha"], metadata["ss_seed"]) == ("4", "3")
    third = write_lora(tmp_path / "c.safetensors", read_lora(second, names), names, "lycoris")
    assert "lora_adapter_metadata" not in read_header(third).metadata
    agree(dense(read_lora(third, names), names), dense(lora, names))


def test_metadata_say_what_was_trained_and_hash_the_tensors(tmp_path):
    names, path = NAMES["zimage"], "layers.0.attention.out"
    lora = Lora({path: LayerChange((Part(low_rank(*names.layers[path], scale=0.5)),))}, metadata={"ss_seed": "3"})
    said = {"modelspec.trigger_phrase": "in the style of Ada", "ss_base_model_version": "zimage"}
    file = write_lora(tmp_path / "a.safetensors", lora, names, "kohya", said, dtype=torch.bfloat16)
    metadata = read_header(file).metadata
    raw = file.read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_seed"]) == ("4", "2", "3")
    report = read_lora(file, names).report
    assert (report.trigger, report.base, report.ranks) == ("in the style of Ada", "zimage", (4,))
    assert (report.algebras, report.matched) == (("LoRA",), 3)


def test_diffusers_metadata_hold_pefts_configuration(tmp_path):
    names = NAMES["zimage"]
    ranks = {"layers.0.attention.out": 4, "layers.1.attention.out": 4, "layers.0.feed_forward.w2": 2}
    lora = Lora({path: LayerChange((Part(low_rank(*names.layers[path], rank=r)),)) for path, r in ranks.items()})
    file = write_lora(tmp_path / "a.safetensors", lora, names, "diffusers")
    config = json.loads(read_header(file).metadata["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 4
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == {"layers.0.feed_forward.w2": 2}
    agree(dense(read_lora(file, names), names), dense(lora, names))


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SPECS if name != "pocket"])
def test_no_two_layers_of_a_model_have_one_name_with_underscores(name):
    names = adapter_names(SPECS[name])
    found: dict[str, tuple[str, slice]] = {}
    for layout in names.layouts:
        for path, place in names.places(layout).items():
            known = found.setdefault(path.replace(".", "_"), (place.layer, place.rows))
            assert known == (place.layer, place.rows)
    assert len(found) > len(names.layers)


def test_the_widths_of_models_are_those_of_their_specs():
    widths = {}
    for spec in SPECS.values():
        config = spec.transformer
        width = config.dim if spec.family == "zimage" else config.num_attention_heads * config.attention_head_dim
        widths.setdefault(width, set()).add(spec.name)
    widths.pop(SPECS["pocket"].transformer.dim, None)
    assert widths.keys() == WIDTHS.keys()
    assert all(name.startswith("z-image") for name in widths[3840])
    assert widths[3072] >= {"flux1-dev", "flux2-klein-4b"}
    assert all(("klein" in name and "9b" in name) or name.startswith("qwen") for name in widths[4096])
    assert widths[6144] == {"flux2-dev"}


# Refusals -------------------------------------------------------------------------------------------------------------

OUT = "diffusion_model.layers.0.attention.to_out.0"
A, B = f"{OUT}.lora_A.weight", f"{OUT}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A: noise(2, 64)}, "lora_A.weight is there, but layers.0.attention.to_out.0 lacks up: download"),
        ({B: noise(64, 2)}, "lora_B.weight is there, but layers.0.attention.to_out.0 lacks down: download"),
        ({A: noise(2, 64), B: noise(64, 3)}, "lora_B.weight is 64x3, but .*lora_A.weight is 2x64: download"),
        ({A: noise(2, 64), B: noise(48, 2)}, "to_out.0 is 48x64 there, but 64x64 in this model: use an adapter made"),
        ({A: noise(2, 64) / 0, B: noise(64, 2)}, "lora_A.weight holds NaN or infinity: download the file again"),
        (
            {A: noise(100, 64), B: noise(64, 100)},
            "lora_A.weight has rank 100, but its layer is 64x64: take another file",
        ),
        (
            {f"{OUT}.lora_C.weight": noise(2, 64)},
            "lora_C.weight is an unknown kind of change: use an adapter of a kind",
        ),
        ({f"{OUT}.alpha": noise(1)}, "alpha is there, but layers.0.attention.to_out.0 lacks up or hada_w1_a"),
        ({f"{OUT}.lokr_w1": noise(2, 2)}, "lokr_w1 is there, but .* lacks lokr_w2 or lokr_w2_a: download"),
        (
            {f"{OUT}.lora_mid.weight": noise(2, 2)},
            "lora_mid.weight is a factor of a convolution, which is not supported",
        ),
        ({f"{OUT}.oft_diag": noise(8, 8, 8)}, "oft_diag is OFT of an early LyCORIS, which is not supported"),
        ({f"{OUT}.oft_blocks": noise(8, 4, 4)}, "oft_blocks is 8x4x4, which does not fit 64: use another adapter"),
        ({f"{OUT}.weight": noise(64, 64)}, "to_out.0.weight is a whole weight, as a model has it: give an adapter"),
        ({f"{OUT}.w_norm": noise(64)}, "w_norm is a change of a norm, but .* is a linear layer"),
        (
            {"diffusion_model.layers.0.attention_norm1.w_norm": noise(3)},
            "w_norm has 3 numbers, but this model's has 64",
        ),
        ({"blocks.0.attn.lora_A.weight": noise(2, 9)}, r"none of its 1 keys has a layer in this model \(blocks.0.attn"),
        ({"lora_te1_x.lora_down.weight": noise(2, 9)}, "all of its 1 keys are of text encoders, which adapters do not"),
        ({}, "it is empty: download it again"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tensors, said, tmp_path):
    with pytest.raises(InputError, match=said) as error:
        read_lora(save(tmp_path / "a.safetensors", tensors), NAMES["zimage"])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("made_for", "layer", "given_to", "said"),
    [
        (TURBO, "layers.0.attention.out", DEV, "none of its 2 keys .*: it was made for Z-Image, use one made for this"),
        (
            DEV,
            "double_blocks.0.img_attn.proj",
            TURBO,
            "it was made for FLUX.1, FLUX.2 klein 4B or FLUX.3 klein, use one made for this",
        ),
        (KLEIN_9B, "double_blocks.0.img_attn.proj", KLEIN_4B, "4096x4096 there, but 3072x3072 .* for FLUX.2 klein 9B"),
        (FLUX2_DEV, "double_blocks.0.img_attn.qkv", DEV, "18432x6144 there, but 9216x3072 .* for FLUX.2 dev, use one"),
        (DEV, "single_blocks.0.linear1", KLEIN_4B, "21504x3072 there, but 27648x3072 .*: use an adapter made for this"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_the_models_name(made_for, layer, given_to, said, tmp_path):
    height, width = adapter_names(made_for).layers[layer]
    start = f"diffusion_model.{layer}"
    tensors = {f"{start}.lora_A.weight": torch.zeros(2, width), f"{start}.lora_B.weight": torch.zeros(height, 2)}
    with pytest.raises(InputError, match=said):
        read_lora(save(tmp_path / "a.safetensors", tensors), adapter_names(given_to))


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda tensor: tensor.mT if tensor.ndim > 1 else tensor[None],
    "flat": lambda tensor: tensor.flatten(),
    "a row short": lambda tensor: tensor[1:] if tensor.ndim else tensor.expand(2),
    "a column short": lambda tensor: tensor[..., 1:] if tensor.ndim else tensor.expand(2, 2),
    "one number": lambda tensor: tensor.flatten()[0],
    "empty": lambda tensor: tensor.flatten()[:0],
    "one more axis": lambda tensor: tensor[None],
    "zero": torch.zeros_like,
}
RAW = {
    "oft_R.weight": lambda o, i: noise(i // 8, 28),
    "boft_R": lambda o, i: noise(2, i // 8, 8, 8),
    "boft_s": lambda o, i: noise(o, 1),
    "ia3_l": lambda o, i: noise(1, i),
    "diff_b": lambda o, i: noise(o),
}


@pytest.mark.parametrize("kind", [*CHANGES, "PEFT"])
def test_a_damaged_tensor_or_a_missing_one_is_refused_or_read_whole(kind, tmp_path):
    """Whatever is wrong with the shape of one tensor, it is told in one line, or the file can be used."""
    names = NAMES["zimage"]
    refused, read = [], 0
    for path in ("layers.0.attention.out", "layers.0.feed_forward.w1"):
        size = names.layers[path]
        if kind == "PEFT":
            whole = {f"base_model.model.{path}.{name}": make(*size) for name, make in RAW.items()}
        else:
            lora = Lora({path: LayerChange((Part(CHANGES[kind](*size)),))})
            whole = load_file(write_lora(tmp_path / "a.safetensors", lora, names, "lycoris"))
        for key, tensor in whole.items():
            for damage in (None, *DAMAGES.values()):
                damaged = {other: value for other, value in whole.items() if other != key}
                damaged |= {} if damage is None else {key: damage(tensor).clone()}
                try:
                    adapter = read_lora(save(tmp_path / "b.safetensors", damaged), names)
                except InputError as error:
                    refused.append(str(error))
                else:
                    assert all(delta.isfinite().all() for delta in dense(adapter, names).values())
                    read += 1
    assert refused
    assert read
    assert [message for message in refused if "\n" in message] == []


def test_pickles_ggufs_and_folders_without_an_adapter_are_refused(tmp_path):
    names = NAMES["zimage"]
    for name, data, said in (
        ("a.pt", b"x", "is a pickle, which can run code"),
        ("a.ckpt", b"x", "pickle"),
        ("new.safetensors", b"PK\x03\x04 of torch.save", "is a pickle, which can run code"),
        ("old.safetensors", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j", "is a pickle, which can run code"),
        ("a.gguf", b"x", "is a GGUF file"),
        ("notes.txt", b"x", "is not a .safetensors file: take the adapter's safetensors file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=said):
            read_lora(tmp_path / name, names)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="holds no adapter: give a safetensors file"):
        read_lora(folder, names)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds only pickles \(adapter_model.bin\): convert them"):
        read_lora(folder, names)
    with pytest.raises(InputError, match="is missing: check the path"):
        read_lora(tmp_path / "none.safetensors", names)
    for name in ("a.safetensors", "b.safetensors"):
        save(folder / name, {A: noise(2, 64), B: noise(64, 2)})
    with pytest.raises(InputError, match=r"holds 2 files \(a.safetensors, b.safetensors\): give one of them"):
        read_lora(folder, names)
    save(folder / "pytorch_lora_weights.safetensors", {A: noise(2, 64), B: noise(64, 2)})
    assert read_lora(folder, names).report.matched == 2


def test_two_changes_of_the_same_rows_are_refused_unless_they_are_equal(tmp_path):
    names = NAMES["zimage"]
    again = OUT.replace("diffusion_model.", "transformer.")
    file = {A: noise(2, 64), B: noise(64, 2), f"{again}.lora_A.weight": noise(2, 64)}
    with pytest.raises(InputError, match="are of the same layer: remove one of the two"):
        read_lora(save(tmp_path / "a.safetensors", file), names)
    native = "diffusion_model.layers.0.attention.out"
    copy = {f"{native}.lora_A.weight": file[A].clone(), f"{native}.lora_B.weight": file[B].clone()}
    lora = read_lora(save(tmp_path / "b.safetensors", {A: file[A], B: file[B], **copy}), names)
    (path,) = lora.report.repeated
    assert lora.report.remarks() == [f"{path}: these layers are there twice, and one copy is ignored"]
    assert (dense(lora, names)["layers.0.attention.out"] - file[B] @ file[A]).abs().max() < 1e-6
    copy[f"{native}.lora_B.weight"] += 1
    with pytest.raises(
        InputError, match=r"changes rows of layers.0.attention.out that another key changes: remove one"
    ):
        read_lora(save(tmp_path / "c.safetensors", {A: file[A], B: file[B], **copy}), names)


def test_keys_without_a_layer_are_reported_and_those_of_text_encoders_apart(tmp_path):
    file = {
        A: noise(2, 64),
        B: noise(64, 2),
        "diffusion_model.layers.99.attention.to_q.lora_A.weight": noise(2, 64),
        "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.lora_A.weight": noise(2, 64),
    }
    report = read_lora(save(tmp_path / "a.safetensors", file, trigger_word="ada"), NAMES["zimage"]).report
    assert report.unmatched == ("diffusion_model.layers.99.attention.to_q.lora_A.weight",)
    assert report.text == ("text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.lora_A.weight",)
    assert (report.matched, report.trigger, report.dialects) == (2, "ada", ("comfyui",))
    assert report.remarks() == [
        f"1 of 4 keys have no layer in this model: {report.unmatched[0]}",
        "1 of 4 keys are of text encoders, which adapters do not change",
    ]


def test_pefts_configuration_that_cannot_be_read_is_refused(tmp_path):
    save(tmp_path / "adapter_model.safetensors", {A: noise(2, 64), B: noise(64, 2)})
    for config in (
        '{"r": 4, "lora_alpha": "much"}',
        '{"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": "much"}}',
        '{"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 1}}',
        '{"r": 4, "lora_alpha": 4, "alpha_pattern": 3}',
        '{"eps": "small"}',
        "[1]",
        "x",
    ):
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(InputError, match=r"adapter_config.json is not PEFT's configuration of an adapter"):
            read_lora(tmp_path, NAMES["zimage"])
