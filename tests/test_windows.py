"""Large pictures in overlapping windows: the windows cover and blend, and a picture in windows is drawn in few."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import advance, part_of, windows_of
from inkstream.engine.drawing.options import options
from inkstream.families import SPECS
from inkstream.sampling.windows import OVERLAP, Windows
from inkstream.types import Conditioning, Encoded, InputError, Request

WISH = {"prompt": "a fox", "steps": 2, "seed": 3, "width": 160, "height": 96}


@pytest.mark.parametrize(
    ("h", "w", "side"),
    [(64, 64, 64), (256, 256, 128), (33, 65, 32), (129, 128, 128), (90, 7, 20), (1, 9, 2)],
)
def test_windows_cover_latents_and_their_blend_is_the_whole(h, w, side):
    windows = Windows.over(h, w, side)
    assert (windows is None) == (max(h, w) <= side)
    if windows is None:
        return
    x = torch.randn(2, h, w, generator=torch.Generator().manual_seed(h * 100 + w))
    pieces = [windows.cut(x, corner) for corner in windows.corners]
    assert len(pieces) == len(windows)
    assert {piece.shape for piece in pieces} == {(2, min(h, side), min(w, side))}
    assert torch.allclose(windows.blend(pieces), x, atol=1e-5)
    for firsts, length in ((windows.rows, windows.side[0]), (windows.columns, windows.side[1])):
        steps = [b - a for a, b in pairwise(firsts)]
        assert all(step <= max(1, length * (1 - OVERLAP)) for step in steps)


def test_neighbours_fade_into_each_other_in_small_steps():
    windows = Windows.over(8, 100, 40)
    assert windows is not None
    ones = [torch.full((1, *windows.side), float(number)) for number in range(len(windows))]
    row = windows.blend(ones)[0, 0]
    overlap = windows.columns[0] + 40 - windows.columns[1]
    assert row.diff().abs().max() <= 1.5 / overlap
    assert (row[0], row[-1]) == (0, len(windows) - 1)


def test_windows_move_from_step_to_step_and_always_cover():
    windows = Windows.over(100, 64, 32)
    assert windows is not None
    moved = [windows.moved(turn) for turn in range(5)]
    assert moved[0] == windows == windows.moved(5)
    assert len({one.rows for one in moved}) == 5
    x = torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0))
    for one in moved:
        assert (one.rows[0], one.rows[-1], len(one)) == (0, 68, len(windows))
        assert torch.allclose(one.blend([one.cut(x, corner) for corner in one.corners]), x, atol=1e-5)
        assert all(b - a < 32 for a, b in pairwise(one.rows))
    inside = [set(one.rows[1:-1]) for one in moved]
    assert not set.intersection(*inside)


@torch.no_grad()
@pytest.mark.parametrize("name", ["z-image-turbo", "flux1-schnell", "flux2-klein-4b"])
def test_a_picture_that_fits_into_a_window_does_not_change(name, build):
    model = build(SPECS[name].tiny)
    small = {**WISH, "width": 64, "height": 64}
    drawn = [model.sample(Request(**small, **more), model.encode(Request(**small))) for more in ({}, {"tile": 64})]
    assert torch.equal(*drawn)


@torch.no_grad()
@pytest.mark.parametrize("name", ["z-image-turbo", "flux1-schnell", "flux2-klein-4b"])
def test_every_family_draws_in_windows_and_a_run_in_windows_shares_forwards(name, build):
    model = build(SPECS[name].tiny)
    wish = complete(Request(**WISH, tile=64), model.spec)
    shape = model.family.latent_shape(160, 96)
    windows = windows_of(wish, shape)
    assert windows is not None
    assert windows.side[0] * 160 // shape[2] == 64
    alone = model.sample(wish, model.encode(wish))
    assert alone.shape[1:] == shape
    assert not torch.equal(alone, model.sample(Request(**WISH), model.encode(Request(**WISH))))
    other = complete(Request(**{**WISH, "width": 64, "height": 64, "seed": 9}), model.spec)
    runs = [model.start(one, model.encode(one), None) for one in (wish, other)]
    while pending := [run for run in runs if run.query is not None]:
        advance(model.family, pending)
    assert torch.allclose(runs[0].result, alone[0], atol=1e-4)
    assert torch.allclose(runs[1].result, model.sample(other, model.encode(other))[0], atol=1e-4)


@torch.no_grad()
def test_the_largest_forward_is_that_of_a_window(build, monkeypatch):
    model = build(SPECS["z-image-turbo"].tiny)
    seen: list[int] = []
    answer = model.family.answer
    monkeypatch.setattr(
        model.family, "answer", lambda samples: seen.append(sum(s.x.numel() for s in samples)) or answer(samples)
    )
    wish = Request(**WISH, tile=64)
    model.sample(wish, model.encode(wish))
    window = model.family.latent_shape(64, 64)
    assert set(seen) == {window[0] * window[1] * window[2]}
    assert len(seen) == 2 * 3 * 2  # steps, columns, rows


def test_models_that_see_whole_pictures_refuse_windows():
    for name in ("flux1-fill-dev", "flux1-canny-dev"):
        assert options(SPECS[name])["tile"].effect == "rejects"
    with pytest.raises(InputError, match="leave tile out"):
        complete(Request(prompt="x", model="flux2-klein-4b", reference=("a.png",), tile=512), SPECS["flux2-klein-4b"])
    with pytest.raises(InputError, match="tile 100 is not a multiple of 16: take 96 or 112"):
        complete(Request(**WISH, tile=100), SPECS["z-image-turbo"])


def test_a_window_has_its_part_of_maps_and_the_regions_in_it():
    windows = Windows.over(8, 16, 8)
    assert windows is not None
    assert windows.columns == (0, 4, 8)
    rows = torch.arange(16.0).expand(1, 8, 16)
    vector = torch.zeros(2, 7)
    regions = [Encoded(torch.zeros(number + 1, 3), box) for number, box in enumerate([(0, 0, 3, 2), (6, 0, 8, 4)])]
    cond = Conditioning(torch.zeros(1, 3), (1,), controls=(rows, vector), regions=tuple(regions))
    left, middle, right = (part_of(cond, windows, corner, token=2) for corner in windows.corners)
    assert [part.controls[0][0, 0, 0].item() for part in (left, middle, right)] == [0, 4, 8]
    assert all(part.controls[0].shape == (1, 8, 8) and part.controls[1] is vector for part in (left, middle, right))
    assert [[region.box for region in part.regions] for part in (left, middle, right)] == [
        [(0, 0, 3, 2)],
        [(0, 0, 1, 2)],
        [(2, 0, 4, 4)],
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", ["z-image-turbo", "flux1-dev", "flux2-klein-4b"])
def test_a_region_changes_the_windows_that_it_is_in_and_no_other(name, build):
    model = build(SPECS[name].tiny)
    wishes = [Request(**{**WISH, "steps": 1}, tile=64, regions=regions) for regions in ((), ("0,0,32x96:a long text",))]
    plain, ours = (model.sample(one, model.encode(one))[0] for one in wishes)
    cells = plain.shape[2] * 64 // 160
    assert torch.equal(plain[:, :, cells:], ours[:, :, cells:])
    assert not torch.allclose(plain[:, :, : cells // 2], ours[:, :, : cells // 2])
