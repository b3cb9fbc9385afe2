"""Our Z-Image against the reference implementation on its own random tiny weights, loaded through our key table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from inkstream.families.zimage.keys import DIFFUSERS
from inkstream.families.zimage.model import ZImageTransformer
from inkstream.families.zimage.specs import ZImageConfig
from inkstream.nn.config import read_config
from inkstream.nn.forward import Sample
from inkstream.weights.keymap import translate
from rounding import agree, roundings

SMALL = {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 32, "axes_dims": [8, 12, 12]}
UNEVEN = {"dim": 96, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 6, "cap_feat_dim": 48, "axes_dims": [4, 6, 6]}
WIDE = {"dim": 320, "n_layers": 1, "n_refiner_layers": 2, "n_heads": 5, "cap_feat_dim": 16, "axes_dims": [16, 24, 24]}


def pair(sizes: dict, seed: int = 0, std: float = 0.1) -> tuple[ZImageTransformer2DModel, ZImageTransformer]:
    """The reference with weights far from their neutral start, and ours with the same ones."""
    torch.manual_seed(seed)
    sizes = {**sizes, "n_kv_heads": sizes["n_heads"], "axes_lens": [1536, 512, 512]}
    theirs = ZImageTransformer2DModel(**sizes).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=std)
    ours = ZImageTransformer(read_config(ZImageConfig, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(DIFFUSERS, theirs.state_dict()))
    return theirs, ours


@pytest.mark.parametrize(
    ("sizes", "std"),
    [(SMALL, 0.1), (UNEVEN, 0.1), (WIDE, 0.1), (SMALL, 0.01)],
    ids=["small", "uneven", "wide", "faint"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_transformer_equals_the_reference_on_mixed_prompts_and_sizes(sizes, std, seed):
    """Faint weights make activations so small that the norms' epsilon is seen."""
    theirs, ours = pair(sizes, seed, std)
    shapes, lengths = [(8, 12), (16, 16), (10, 6), (2, 2)], [5, 40, 64, 1]
    xs = [torch.randn(16, *shape) for shape in shapes]
    captions = [torch.randn(n, sizes["cap_feat_dim"]) for n in lengths]
    t = torch.rand(len(xs))
    expected = theirs([x.unsqueeze(1) for x in xs], t, captions, return_dict=False)[0]
    prepared = [ours.prepare(c, *shape) for c, shape in zip(captions, shapes)]
    got = ours([Sample(*each) for each in zip(xs, t.tolist(), prepared)])
    assert max(float(y.abs().max()) for y in got) > 10 * std  # the weights do something
    for i, (y, reference) in enumerate(zip(got, expected, strict=True)):
        agree(y, reference.squeeze(1), roundings(theirs))
        (alone,) = ours([Sample(xs[i], t[i].item(), prepared[i])])
        agree(alone, y, roundings(theirs))


def test_omni_equals_the_reference_with_references_and_siglip_features():
    """Segments of whole multiples of 32, where the reference's padded positions and aligned ones agree."""
    theirs, ours = pair({**SMALL, "siglip_feat_dim": 24})
    captions = [torch.randn(n, 32) for n in (32, 64, 32, 32)]
    references = [torch.randn(16, 8, 12), torch.randn(16, 10, 10)]
    siglip = [torch.randn(3, 5, 24), torch.randn(4, 4, 24)]
    x = torch.randn(16, 12, 8)
    for features in (siglip, []):
        expected = theirs(
            [[*(r.unsqueeze(1) for r in references), x.unsqueeze(1)]],
            torch.tensor([0.3]),
            [captions],
            siglip_feats=[[*features, None] if features else None],
            image_noise_mask=[[0, 0, 1]],
            return_dict=False,
        )[0]
        (got,) = ours([Sample(x, 0.3, ours.prepare_omni(captions, references, features, 12, 8))])
        agree(got, expected[0].squeeze(1), roundings(theirs))


def test_scales_prepared_ahead_equal_those_computed_in_the_step():
    _, ours = pair(SMALL)
    x, caption, times = torch.randn(16, 8, 8), torch.randn(7, 32), [0.0, 0.25, 0.9]
    plain = ours.prepare(caption, 8, 8)
    ahead = replace(plain, scales=ours.scales(times))
    for t in times:
        agree(ours([Sample(x, t, ahead)])[0], ours([Sample(x, t, plain)])[0], roundings(ours))


def test_the_rows_left_out_of_the_last_block_are_the_ones_nobody_reads():
    _, ours = pair(SMALL)
    calls = []
    ours.layers[-1].feed_forward.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    ours([Sample(torch.randn(16, 8, 16), 0.5, ours.prepare(torch.randn(70, 32), 8, 16))])
    assert calls == [32]  # 4 x 8 patches, and none of the 96 caption tokens
