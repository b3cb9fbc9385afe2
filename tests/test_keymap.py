"""Key tables: what a rule names, what it makes of it, and that every table works both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inkstream.types import InputError
from inkstream.weights.keymap import drop, fuse, rename, split, translate


def keys(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((6, 2), float(i)) for i, name in enumerate(names)}


def test_a_pattern_names_whole_segments_from_the_keys_start():
    others = ["all_x_embedder.weight", "x_embedder2.weight", "a.x_embedder.weight"]
    out = translate([rename("x_embedder", "img_in")], keys("x_embedder.weight", *others, "x_embedder"))
    assert list(out) == ["img_in.weight", *others, "img_in"]


def test_a_dot_in_a_pattern_is_a_dot():
    assert list(translate([rename("a.b", "c")], keys("axb.weight", "a.b.weight"))) == ["axb.weight", "c.weight"]


def test_braces_stand_for_exactly_one_segment_and_are_carried():
    rules = [rename("layers.{}.to_out.0", "layers.{}.out")]
    state = keys("layers.7.to_out.0.weight", "layers.7.x.to_out.0.weight", "layers.to_out.0.weight")
    assert list(translate(rules, state)) == ["layers.7.out.weight", *list(state)[1:]]


def test_several_braces_keep_their_order():
    rules = [rename("down.{}.block.{}", "down_blocks.{}.resnets.{}")]
    assert list(translate(rules, keys("down.1.block.2.conv1.bias"))) == ["down_blocks.1.resnets.2.conv1.bias"]


def test_the_first_rule_that_names_a_key_takes_it():
    rules = [rename("a.b", "first"), rename("a", "second")]
    assert list(translate(rules, keys("a.b.weight", "a.c.weight"))) == ["first.weight", "second.c.weight"]


def test_keys_that_no_rule_names_pass_unchanged():
    state = keys("a.weight", "b.weight")
    out = translate([rename("c", "d"), drop("e")], state)
    assert all(out[name] is state[name] for name in state)


def test_fused_parts_stand_in_the_rules_order_whatever_the_files_order():
    q, k, v = (torch.full((2, 3), float(i)) for i in range(3))
    rules = [fuse("b.{}.q", "b.{}.k", "b.{}.v", ours="b.{}.qkv")]
    out = translate(rules, {"b.0.v.weight": v, "z": q, "b.0.q.weight": q, "b.0.k.weight": k})
    assert list(out) == ["b.0.qkv.weight", "z"]
    assert out["b.0.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_weights_and_biases_of_several_blocks_are_fused_apart():
    rules = [fuse("b.{}.q", "b.{}.k", ours="b.{}.qk")]
    kinds = [(i, kind) for i in (0, 1) for kind in ("weight", "bias")]
    out = translate(rules, {f"b.{i}.{part}.{kind}": torch.full((1,), i) for i, kind in kinds for part in "qk"})
    assert {name: t.tolist() for name, t in out.items()} == {f"b.{i}.qk.{kind}": [i, i] for i, kind in kinds}


def test_back_from_fused_are_views_of_equal_parts():
    qkv = torch.arange(12.0).reshape(6, 2)
    out = translate([fuse("q", "k", "v", ours="qkv")], {"qkv.weight": qkv}, back=True)
    assert [tensor.tolist() for tensor in out.values()] == [qkv[i : i + 2].tolist() for i in (0, 2, 4)]
    assert all(tensor.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for tensor in out.values())


def test_parts_of_other_proportions_are_fused_and_cut_where_the_rule_says():
    rules = [fuse("b.{}.q", "b.{}.k", "b.{}.mlp", ours="b.{}.linear1", heights=(1, 1, 4))]
    q, k, mlp = torch.zeros(2, 3), torch.ones(2, 3), torch.full((8, 3), 2.0)
    state = {"b.0.mlp.weight": mlp, "b.0.q.weight": q, "b.0.k.weight": k}
    fused = translate(rules, state)
    assert fused["b.0.linear1.weight"][:, 0].tolist() == [0, 0, 1, 1, *[2] * 8]
    back = translate(rules, fused, back=True)
    assert {name: (tuple(t.shape), float(t.mean())) for name, t in back.items()} == {
        name: (tuple(t.shape), float(t.mean())) for name, t in state.items()
    }


@pytest.mark.parametrize("shapes", [((2, 3), (7, 3)), ((2, 3), (2, 3)), ((2, 3), (8, 4)), ((), (8, 3))])
def test_parts_that_miss_the_rules_proportions_are_named(shapes):
    q, mlp = (torch.ones(shape) for shape in shapes)
    with pytest.raises(InputError, match=r"linear1.* parts that are not of heights 1:4: q"):
        translate([fuse("q", "mlp", ours="linear1", heights=(1, 4))], {"q.weight": q, "mlp.weight": mlp})


def test_rows_that_miss_the_rules_proportions_are_not_cut():
    rules = [fuse("q", "mlp", ours="linear1", heights=(1, 4))]
    with pytest.raises(InputError, match=r"linear1\.bias is \(12,\): 2 parts of heights 1:4 were expected"):
        translate(rules, {"linear1.bias": torch.ones(12)}, back=True)


def test_renaming_copies_nothing():
    state = {"a.weight": torch.ones(4), "flat": torch.ones(4), "conv.weight": torch.ones(3, 4, 1, 1)}
    out = translate([rename("a", "b"), rename("flat", "row", row=True), rename("conv", "linear", conv1x1=True)], state)
    assert [tuple(t.shape) for t in out.values()] == [(4,), (1, 4), (3, 4)]
    for ours, theirs in zip(out.values(), state.values()):
        assert ours.data_ptr() == theirs.data_ptr()


def test_a_missing_part_of_a_fused_tensor_is_named():
    with pytest.raises(InputError, match=r"b\.3\.qkv\.weight is made of 3 parts and b\.3\.k\.weight is missing"):
        translate([fuse("b.{}.q", "b.{}.k", "b.{}.v", ours="b.{}.qkv")], keys("b.3.q.weight", "b.3.v.weight"))


def test_parts_of_different_shape_are_not_fused():
    with pytest.raises(InputError, match=r"q\.weight \(4, 2\), k\.weight \(2, 2\)"):
        translate([fuse("q", "k", ours="qk")], {"q.weight": torch.ones(4, 2), "k.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)])
def test_rows_that_cannot_be_cut_evenly_are_named(shape):
    with pytest.raises(InputError, match=r"qkv.*3 parts of equal height"):
        translate([split("qkv", ours=("q", "k", "v"))], {"qkv": torch.ones(shape)})


@pytest.mark.parametrize("shape", [(), (5,)])
def test_halves_that_are_not_equal_are_not_swapped(shape):
    with pytest.raises(InputError, match=r"a\.bias.*2 parts of equal height"):
        translate([rename("a", "b", swap=True)], {"a.bias": torch.ones(shape)})


@pytest.mark.parametrize("names", [("a.weight", "b.weight"), ("b.weight", "a.weight")])
def test_two_keys_that_become_one_are_both_named(names):
    with pytest.raises(InputError, match=f"{names[0]} and {names[1]} are both b.weight"):
        translate([rename("a", "b")], keys(*names))


def test_a_fused_tensor_beside_its_parts_is_refused():
    with pytest.raises(InputError, match=r"qkv\.weight"):
        translate([fuse("q", "k", ours="qkv")], keys("q.weight", "k.weight", "qkv.weight"))


def test_dropped_keys_vanish_and_are_not_written_back():
    rules = [drop("norm_final")]
    out = translate(rules, keys("norm_final.weight", "norm_final2.weight"))
    assert list(out) == ["norm_final2.weight"]
    assert list(translate(rules, out, back=True)) == ["norm_final2.weight"]


def test_swapping_changes_the_row_halves_and_back():
    rules = [rename("linear", "ada", swap=True)]
    out = translate(rules, {"linear.weight": torch.tensor([[1], [2], [3], [4]])})
    assert out["ada.weight"].flatten().tolist() == [3, 4, 1, 2]
    assert translate(rules, out, back=True)["linear.weight"].flatten().tolist() == [1, 2, 3, 4]


def test_shapes_are_translated_on_meta_as_they_are_in_memory():
    rules = [
        fuse("q", "k", ours="qk"),
        rename("conv", "linear", conv1x1=True),
        rename("scale", "ada", swap=True),
        rename("pad", "pad", row=True),
    ]
    shapes = {"q": (2, 3), "k": (2, 3), "conv": (2, 3, 1, 1), "scale": (4,), "pad": (5,)}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    real = translate(rules, state)
    meta = translate(rules, {name: tensor.to("meta") for name, tensor in state.items()})
    assert {k: v.shape for k, v in meta.items()} == {k: v.shape for k, v in real.items()}
    assert all(v.is_meta for v in meta.values())


def test_a_larger_kernel_is_not_taken_for_a_linear_layer():
    state = {"conv.weight": torch.ones(3, 4, 3, 3), "conv.bias": torch.ones(3)}
    out = translate([rename("conv", "linear", conv1x1=True)], state)
    assert out["linear.weight"].shape == (3, 4, 3, 3)
    assert out["linear.bias"].shape == (3,)


KINDS = ("rename", "swap", "row", "conv1x1", "fuse", "split", "pass")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3), st.integers(2, 3)), max_size=6), st.booleans())
def test_any_table_works_both_ways(entries, braces):
    """A table of random rules, a state dict it names, in random sizes: in and back is the identity."""
    rules, theirs, ours = [], {}, set()
    for i, (kind, rows, parts) in enumerate(entries):
        a, b = (f"{side}{i}.{{}}.x" if braces else f"{side}{i}" for side in ("theirs", "ours"))
        shape = {"swap": (2 * rows, 3), "row": (1, rows), "conv1x1": (rows, 3, 1, 1), "split": (parts * rows, 2)}
        tensor = torch.randn(shape.get(kind, (rows, 2)))
        if kind == "fuse":
            rules.append(fuse(*(f"{a}.{j}" for j in range(parts)), ours=b))
            made = {f"{a}.{j}": torch.randn(rows, 2) for j in range(parts)}
            ours.add(b)
        elif kind == "split":
            rules.append(split(a, ours=[f"{b}.{j}" for j in range(parts)]))
            made = {a: tensor}
            ours.update(f"{b}.{j}" for j in range(parts))
        else:
            options = {} if kind == "rename" else {kind: True}
            if kind != "pass":
                rules.append(rename(a, b, **options))
            made = {a: tensor}
            ours.add(a if kind == "pass" else b)
        theirs.update({f"{name.format(7)}.weight": t for name, t in made.items()})
    out = translate(rules, theirs)
    assert out.keys() == {f"{name.format(7)}.weight" for name in ours}
    back = translate(rules, out, back=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
