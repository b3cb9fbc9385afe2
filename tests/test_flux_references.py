"""Reference pictures: what is refused before any work, and the sizes that the others are seen at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inkstream.families import Pictures
from inkstream.families.flux1.kontext import SIZES, kontext_size, prepare_reference
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.references import (
    MULTIPLE,
    ONE_AREA,
    SEVERAL_AREA,
    TOKENS,
    area_for,
    cap_area,
    check_references,
    crop_to_multiple,
    default_size,
    fitted_size,
    join_references,
    prepare_references,
    tokens_of,
)
from inkstream.types import Conditioning, InputError

SIDES = st.integers(64, 6000)


def columns(width: int, height: int) -> Image.Image:
    """Each pixel says where it is: red its column, green its row, up to 255."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, x * 0], axis=-1).clip(0, 255).astype(np.uint8))


# FLUX.2 ---------------------------------------------------------------------------------------------------------------


@given(width=SIDES, height=SIDES)
def test_a_reference_is_seen_at_whole_tokens_within_its_area_and_never_enlarged(width, height):
    if max(width, height) > 8 * min(width, height):
        return
    for area in (ONE_AREA, SEVERAL_AREA):
        seen = fitted_size((width, height), area)
        assert all(side % MULTIPLE == 0 and side >= 64 for side in seen)
        assert seen[0] * seen[1] <= area
        assert seen[0] <= width
        assert seen[1] <= height
        if width * height <= area:
            assert (width - seen[0], height - seen[1]) == (width % 16, height % 16)


def test_one_reference_is_seen_larger_than_each_of_several():
    image = Image.new("RGB", (3000, 3000))
    assert [i.size for i in prepare_references([image])] == [(2016, 2016)]
    assert [i.size for i in prepare_references([image, image])] == [(1024, 1024)] * 2
    assert [i.size for i in prepare_references([image], SEVERAL_AREA)] == [(1024, 1024)]
    assert (area_for(1), area_for(2)) == (2024**2, 1024**2)


def test_what_does_not_fill_a_token_is_cut_from_both_edges():
    image = columns(83, 70)
    cut = crop_to_multiple(image)
    assert cut.size == (80, 64)
    assert cut.getpixel((0, 0)) == (1, 3, 0)
    assert cap_area(image, 83 * 70) is image


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_references_come_out_as_rgb(mode):
    (image,) = prepare_references([Image.new(mode, (64, 64))])
    assert image.mode == "RGB"


def test_a_picture_is_drawn_at_the_first_references_size_in_one_megapixel():
    assert default_size((3000, 1500)) == (1440, 720)
    assert default_size((800, 605)) == (800, 592)


@pytest.mark.parametrize(
    ("sizes", "output", "most", "said"),
    [
        ([(512, 512)] * 5, (512, 512), 4, r"5 references were given and the model takes at most 4: leave some out"),
        ([(512, 512), (63, 200)], (512, 512), 4, r"reference 2 is 63 by 200 pixels: both sides need 64 or more"),
        ([(100, 801)], (512, 512), 4, r"reference 1 is 100 by 801 pixels: crop it to 8 to 1 or less"),
        ([(4000, 4000)], (2560, 2560), 4, r"takes 25600 tokens and the references take 15876, but at most 36864"),
        ([(1024, 1024)] * 6, (2048, 2048), 6, r"takes 16384 tokens and the references take 24576, but"),
    ],
)
def test_what_cannot_be_taken_is_named_before_any_work(sizes, output, most, said):
    with pytest.raises(InputError, match=said) as caught:
        check_references(sizes, output, most)
    assert "\n" not in str(caught.value)


def test_the_start_picture_of_an_inpainting_counts_as_a_reference():
    with pytest.raises(
        InputError, match=r"10 references and a start picture were given and the model takes at most 10"
    ):
        check_references([(512, 512)] * 10, (512, 512), 10, sources=1)
    with pytest.raises(InputError, match=r"takes 18496 tokens and the references take 18496, but at most 36864"):
        check_references([], (2176, 2176), 10, sources=1)
    check_references([(512, 512)] * 9, (512, 512), 10, sources=1)


def test_a_drawing_without_pictures_may_have_any_size(build):
    cond = Conditioning(torch.zeros(1, 4), (1,))
    assert build(KLEIN_4B.tiny).family.look(cond, Pictures(4096, 4096)) is cond


def test_what_just_fits_is_taken():
    check_references([], (2048, 2048), 4)
    check_references([(64, 512)], (1024, 1024), 1)
    check_references([(1024, 1024)] * 5, (2048, 2048), 6)
    check_references([(9000, 9000)] * 4, (1024, 1024), 4, tokens=5 * 4096)
    assert tokens_of((1024, 1024)) * 9 == TOKENS


def test_several_pictures_become_one_from_left_to_right_each_half_way_up():
    page = join_references([Image.new("RGB", (4, 10), "red"), Image.new("L", (6, 5))])
    assert page.size == (10, 10)
    assert page.getpixel((3, 0)) == (255, 0, 0)
    assert [page.getpixel((4, y)) for y in (1, 2, 6, 7)] == [(255,) * 3, (0,) * 3, (0,) * 3, (255,) * 3]


# Kontext --------------------------------------------------------------------------------------------------------------


def test_kontexts_sizes_are_seventeen_mirrored_whole_and_of_about_a_megapixel():
    assert len(set(SIZES)) == 17
    assert [(h, w) for w, h in reversed(SIZES)] == list(SIZES)
    assert all(side % 16 == 0 for size in SIZES for side in size)
    assert all(abs(w * h / 1024**2 - 1) < 0.025 for w, h in SIZES)
    assert sorted(SIZES, key=lambda size: size[0] / size[1]) == list(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_of_a_trained_shape_keeps_it_at_any_size(size):
    assert kontext_size(size[0] * 3, size[1] * 3) == size


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 9), (672, 1568)), ((4000, 100), (1568, 672)), ((1600, 900), (1392, 752)),
                           ((640, 480), (1184, 880)), ((100, 101), (1024, 1024))]
)  # fmt: skip
def test_another_picture_takes_the_nearest_shape_by_width_over_height(size, expected):
    assert kontext_size(*size) == expected
    ratio = size[0] / size[1]
    assert all(abs(ratio - w / h) >= abs(ratio - expected[0] / expected[1]) for w, h in SIZES)


def test_kontexts_reference_is_stretched_onto_its_size_and_loses_no_edge():
    image = columns(200, 150)
    seen = prepare_reference(image.convert("RGBA"))
    assert (seen.size, seen.mode) == ((1184, 880), "RGB")
    assert seen.getpixel((0, 0))[0] <= 1
    assert seen.getpixel((1183, 879))[0] >= 198
