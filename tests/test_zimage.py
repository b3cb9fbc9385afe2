"""Facts of the Z-Image model that need no reference: counts, keys, positions, packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inkstream.families.zimage.keys import DIFFUSERS, NATIVE
from inkstream.families.zimage.model import ZImageTransformer, line, patchify, plane, unpatchify, with_pads
from inkstream.families.zimage.specs import BASE, OMNI, TURBO
from inkstream.nn.forward import Sample
from inkstream.weights.keymap import translate


@pytest.mark.parametrize(("spec", "parameters"), [(TURBO, 6_154_908_736), (BASE, 6_154_908_736), (OMNI, 6_513_266_880)])
def test_the_full_model_has_the_published_number_of_parameters(spec, parameters):
    with torch.device("meta"):
        model = ZImageTransformer(spec.transformer)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_full_model_has_453_native_and_521_diffusers_keys():
    with torch.device("meta"):
        state = ZImageTransformer(TURBO.transformer).state_dict()
    assert len(translate(NATIVE, state, back=True)) == 453
    theirs = translate(DIFFUSERS, state, back=True)
    assert len(theirs) == 521
    assert theirs["layers.29.attention.to_v.weight"].shape == (3840, 3840)
    assert theirs["all_final_layer.2-1.adaLN_modulation.1.weight"].shape == (3840, 256)


@pytest.mark.parametrize("rules", [NATIVE, DIFFUSERS], ids=["native", "diffusers"])
@pytest.mark.parametrize("spec", [TURBO.tiny, OMNI.tiny], ids=["turbo", "omni"])
def test_each_layout_round_trips_to_the_identity(rules, spec):
    state = ZImageTransformer(spec.transformer).state_dict()
    back = translate(rules, translate(rules, state, back=True))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_a_pad_token_stored_flat_is_read_as_a_row():
    state = ZImageTransformer(TURBO.tiny.transformer).state_dict()
    flat = {**state, "x_pad_token": state["x_pad_token"][0], "norm_final.weight": torch.ones(64)}
    read = translate(NATIVE, flat)
    assert read["x_pad_token"].shape == (1, 64)
    assert "norm_final.weight" not in read


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_unpatchify_inverts_patchify(rows, columns, channels):
    x = torch.randn(channels, rows * 2, columns * 2)
    assert torch.equal(unpatchify(patchify(x, 2), rows, columns, 2), x)


def test_inside_a_patch_the_channel_runs_fastest():
    x = torch.arange(2 * 2 * 2).reshape(2, 2, 2)  # channel, row, column
    assert patchify(x, 2).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_positions_follow_the_published_rule():
    assert line(1, 3).tolist() == [[1, 0, 0], [2, 0, 0], [3, 0, 0]]
    picture = with_pads(plane(33, 2, 3))
    assert picture[:6].tolist() == [[33, r, c] for r in range(2) for c in range(3)]
    assert picture.shape == (32, 3)
    assert not picture[6:].any()


def test_a_caption_is_padded_by_its_own_length_whoever_shares_the_batch():
    """The picture stands one past the padded caption, so the answer depends on a caption's own padding alone."""
    torch.manual_seed(0)
    model = ZImageTransformer(TURBO.tiny.transformer).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    short, long = torch.randn(3, 32), torch.randn(50, 32)
    x = torch.randn(16, 4, 4)
    with torch.no_grad():
        prepared = [model.prepare(c, 4, 4) for c in (short, long)]
        alone = model([Sample(x, 0.5, prepared[0])])[0]
        together = model([Sample(x, 0.5, one) for one in prepared])[0]
    assert torch.allclose(alone, together, atol=1e-5)
    assert [len(p.context) for p in prepared] == [32, 64]


def test_what_guidance_asks_twice_is_refined_once():
    """Until captions join them, the tokens of one picture at one time are the same under both prompts."""
    torch.manual_seed(0)
    model = ZImageTransformer(TURBO.tiny.transformer).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    captions = [torch.randn(n, 32) for n in (40, 3)]
    x, other = torch.randn(2, 16, 16, 16)  # 64 patches: no pads
    tokens = []
    model.noise_refiner[0].register_forward_hook(lambda _, args, out: tokens.append(len(out)))
    with torch.no_grad():
        prepared = [model.prepare(caption, 16, 16) for caption in captions]
        alone = [model([Sample(x, 0.5, one)])[0] for one in prepared]
        once = model([Sample(*each) for each in zip([x, x, other, x], [0.5, 0.5, 0.5, 0.2], prepared * 2)])
        twice = model([Sample(point, 0.5, one) for point, one in zip((x, x.clone()), prepared)])
    assert tokens == [64, 64, 3 * 64, 2 * 64]
    for found in (once[:2], twice):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, alone))
    assert not torch.allclose(once[2], once[0], atol=1e-2)
    assert not torch.allclose(once[3], once[1], atol=1e-2)
    small = torch.randn(16, 4, 4)  # 4 patches and 28 pads, which stand elsewhere
    with torch.no_grad():
        padded = [model.prepare(caption, 4, 4) for caption in captions]
        model([Sample(small, 0.5, one) for one in padded])
    assert tokens[-1] == 64
