"""Repainting a part of a picture: what is drawn of it, at which size, and which bytes of it stay."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pydantic import ValidationError

import inkstream
from inkstream.engine.drawing.complete import complete
from inkstream.engine.pictures.edits import Edit, bounds, canvas_of, filled, spread, surroundings, window_of
from inkstream.engine.pictures.inputs import open_picture
from inkstream.engine.pictures.regions import depth_of, fade, grow, region_of
from inkstream.families import SPECS
from inkstream.types import ANCHORS, Context, Extension, InputError, MaskSource, Request

SPEC = SPECS["z-image-turbo"]
TURNS = {1: 0, 3: 2, 6: 3, 8: 1}
"""EXIF orientation -> quarter turns against the clock that turn the stored picture upright."""


def url(picture: Image.Image, kind: str = "PNG", **how) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def noise(seed: int, width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(seed, width, height))


def block(width: int, height: int, box: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(value, box)
    return mask


def edit_of(**fields) -> Edit:
    edit = complete(Request(prompt="a fox", **fields), SPEC).edit
    assert edit is not None
    return edit


def tried(fields: dict) -> Edit | list[str] | None:
    """The edit of some fields, or the lines of their refusal."""
    try:
        return complete(Request(prompt="a fox", **fields), SPEC).edit
    except ValidationError as error:
        return [one["msg"] for one in error.errors()]
    except InputError as error:
        return [str(error)]


# Bytes outside -------------------------------------------------------------------------------------------------------


def source(kind: str, seed: int, width: int, height: int) -> tuple[str, np.ndarray, np.ndarray]:
    """A stored picture, its upright pixels (H, W, 3), and where they are known exactly."""
    pixels, known = noise(seed, width, height), np.ones((height, width), bool)
    if kind == "grey16":
        deep = np.random.default_rng(seed).integers(0, 65536, (height, width), np.uint16)
        deep[0, 0] = 65535
        grey = np.rint(deep.astype(np.float64) / 257).astype(np.uint8)
        return url(Image.fromarray(deep)), grey[..., None].repeat(3, 2), known
    if kind == "alpha":
        stored = noise(seed, width, height, 4)
        stored[0, 0, 3] = 255
        return url(Image.fromarray(stored)), stored[..., :3], stored[..., 3] == 255
    if kind == "cmyk":
        stored = Image.fromarray(noise(seed, width, height, 4), "CMYK")
        return url(stored, "TIFF"), np.asarray(stored.convert("RGB")), known
    if kind == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        return url(Image.fromarray(pixels), "JPEG"), np.asarray(Image.open(buffer)), known
    if kind.startswith("turned"):
        orientation = int(kind[-1])
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright, known = (np.rot90(values, TURNS[orientation]) for values in (pixels, known))
        return url(Image.fromarray(pixels), exif=exif), upright, known
    return url(Image.fromarray(pixels)), pixels, known


KINDS = ["rgb", "grey16", "alpha", "cmyk", "jpeg", "turned3", "turned6", "turned8"]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 999), width=st.integers(1, 70), height=st.integers(1, 70),
    grow_by=st.integers(-3, 9), blur=st.integers(0, 12), soft=st.booleans(), invert=st.booleans(),
    fill=st.sampled_from(["original", "blur", "noise", "telea"]), crop=st.sampled_from([None, "1", "1.5", "7px"]),
    sides=st.tuples(*[st.integers(0, 20)] * 4), size=st.sampled_from([None, (64, 32), (16, 112), (48, 48)]),
    data=st.data(),
)  # fmt: skip
def test_outside_the_grown_mask_every_byte_is_the_sources_at_its_own_size(
    kind, seed, width, height, grow_by, blur, soft, invert, fill, crop, sides, size, data
):
    stored, upright, known = source(kind, seed, width, height)
    high, wide = upright.shape[:2]
    grey = data.draw(st.sampled_from(["block", "noise", "none" if any(sides) else "block"]))
    fields = {"mask_grow": grow_by, "mask_blur": blur, "mask_soft": soft, "mask_fill": fill, "crop": crop}
    white = np.zeros((high, wide), np.uint8)
    if grey == "block":
        left, top = data.draw(st.integers(0, wide - 1)), data.draw(st.integers(0, high - 1))
        white[top : top + data.draw(st.integers(1, 40)), left : left + data.draw(st.integers(1, 40))] = 255
    elif grey == "noise":
        white = noise(seed + 1, wide, high, 1)[..., 0] // 2 * 2
    if grey != "none":
        fields |= {"mask": url(Image.fromarray(white)), "mask_invert": invert}
        white = 255 - white if invert else white
    if any(sides):
        fields["extend"] = ",".join(f"{n}={s}" for n, s in zip(("left", "top", "right", "bottom"), sides))
    if size:
        fields |= {"width": size[0], "height": size[1]}
    edit = tried({"image": stored, **fields})
    if isinstance(edit, list):
        assert "black everywhere" in edit[0] or "leaves nothing of the mask" in edit[0]
        return
    assert edit is not None
    assert (np.array(edit.size) % 16 == 0).all()
    assert edit.start.size == edit.shown.size == edit.mask.size == edit.size
    drawn = Image.fromarray(noise(seed + 2, *edit.size))
    result = np.asarray(edit.paste(drawn))
    left, top, right, bottom = sides
    assert result.shape == (high + top + bottom, wide + left + right, 3)
    painted = np.pad(white > 0 if soft else white >= 128, ((top, bottom), (left, right)), constant_values=True)
    if grow_by > 0:
        page = np.pad(painted, 10).astype(np.uint8) * 255
        painted = np.asarray(Image.fromarray(page).filter(ImageFilter.MaxFilter(2 * grow_by + 1)))[10:-10, 10:-10] > 0
    painted = painted[top : top + high, left : left + wide]
    ours = result[top : top + high, left : left + wide]
    assert np.array_equal(ours[~painted & known], upright[~painted & known])
    assert np.array_equal(ours[~painted], np.asarray(open_picture(stored))[~painted])


def test_without_a_fade_all_of_the_mask_is_the_drawn_picture_and_a_whole_size_is_not_resampled():
    edit = edit_of(image=picture(120, 104), mask=block(120, 104, (10, 8, 30, 24)), mask_blur=0)
    assert edit.size == (128, 112)  # rounded up to the multiple
    drawn = picture(128, 112, seed=1)
    left, top, right, bottom = edit.window
    assert (right - left, bottom - top) == edit.size
    expected = np.array(edit.canvas.picture)
    expected[8:24, 10:30] = np.asarray(drawn)[8 - top : 24 - top, 10 - left : 30 - left]
    assert np.array_equal(np.asarray(edit.paste(drawn)), expected)


def test_what_the_model_sees_beyond_the_picture_repeats_its_edge():
    edit = edit_of(image=picture(114, 104), mask=block(114, 104, (10, 8, 30, 24)))
    seen, own = np.asarray(edit.start), np.asarray(edit.canvas.picture)
    left, top, _, _ = edit.window
    assert (left, top) == (-7, -4)
    assert np.array_equal(seen[4:108, 7:121], own)
    assert np.array_equal(seen[4:108, 0], own[:, 0])
    assert np.array_equal(seen[111], seen[107])


def test_the_engine_keeps_the_pictures_size_and_bytes_and_the_metadata_draws_it_again(build):
    from inkstream.engine.drawing.batch import Ask
    from inkstream.engine.drawing.flow import FLOW, Job
    from inkstream.engine.drawing.model import advance
    from inkstream.types import Done

    model = build(SPEC.tiny)

    def draw(request: Request) -> Done:
        for event in FLOW.draw(Job(model, complete(request, model.spec), [])):
            if isinstance(event, Ask):
                advance(model.family, [event.run])
            elif isinstance(event, Done):
                return event
        raise AssertionError

    photo, mask = picture(101, 75), block(101, 75, (40, 20, 70, 60))
    done = draw(Request(prompt="x", image=photo, mask=mask, crop="1.5", mask_grow=3, extend="left=9", steps=2, seed=1))
    before, after = np.asarray(photo), np.asarray(done.image)[:, 9:]
    assert after.shape == before.shape
    outside = np.ones((75, 101), bool)
    outside[17:63, 37:73] = outside[:, :3] = False
    assert np.array_equal(after[outside], before[outside])
    assert (after[~outside] != before[~outside]).any()
    assert np.array_equal(np.asarray(draw(done.request).image), np.asarray(done.image))


# Where the mask comes from -------------------------------------------------------------------------------------------


def region(start: Image.Image, **fields) -> list[list[int]]:
    return region_of(Request(image=start, **fields), open_picture(url(start))).tolist()


def test_a_colour_is_repainted_within_its_tolerance():
    start = Image.new("RGB", (4, 1), "white")
    for x, colour in enumerate([(0, 255, 0), (24, 231, 24), (25, 255, 0)]):
        start.putpixel((x, 0), colour)
    assert region(start, mask_from="colour:#00ff00") == [[255, 255, 0, 0]]
    assert region(start, mask_from="colour:#0f0~25") == [[255, 255, 255, 0]]
    assert region(start, mask_from="colour:#0f0~0", mask_invert=True) == [[0, 255, 255, 255]]


def test_transparent_pixels_are_repainted():
    start = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    start.putpixel((1, 0), (0, 0, 0, 0))
    start.putpixel((2, 0), (0, 0, 0, 204))
    assert region(start, mask_from="alpha") == [[0, 255, 0]]
    assert region(start, mask_from="alpha", mask_soft=True) == [[0, 255, 51]]


@pytest.mark.filterwarnings("ignore")
def test_the_words_that_hold_a_text_are_repainted():
    start = Image.new("RGB", (420, 200), "white")
    draw = ImageDraw.Draw(start)
    draw.text((20, 20), "BIG SALE TODAY", fill="black", font=ImageFont.load_default(40))
    draw.text((20, 120), "only five left", fill="red", font=ImageFont.load_default(40))
    ink = np.asarray(start).min(-1) < 128
    mask = np.array(region(start, mask_from="text:sale", mask_grow=0)) > 0
    left, _, right, bottom = bounds(mask.astype(np.uint8))
    assert 90 < left < 140
    assert right < 260
    assert bottom < 90
    assert (np.array(region(start, mask_from="text")) > 0)[ink].mean() > 0.98
    with pytest.raises(InputError, match="text 'RENT' is not found, the picture reads 'BIG SALE TODAY'"):
        region(start, mask_from="text:RENT")


def test_a_mask_grows_and_shrinks_in_a_square_and_the_border_is_no_edge():
    mask = np.asarray(block(20, 12, (0, 4, 8, 8)))
    assert bounds(grow(mask, 3)) == (0, 1, 11, 11)
    start = picture(20, 12)
    shrunk = canvas_of(Request(image=start, mask=Image.fromarray(mask), mask_grow=-1), start).mask
    assert bounds(shrunk) == (0, 5, 7, 7)


@settings(deadline=None)
@given(seed=st.integers(0, 999), pixels=st.integers(0, 6))
def test_growing_is_the_maximum_filter(seed, pixels):
    mask = noise(seed, 17, 13, 1)[..., 0]
    page = Image.fromarray(np.pad(mask, 6)).filter(ImageFilter.MaxFilter(2 * pixels + 1))
    assert np.array_equal(grow(mask, pixels), np.asarray(page)[6:-6, 6:-6])


@settings(deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0.02, 0.6), most=st.integers(1, 9))
def test_the_depth_of_a_pixel_is_its_chebyshev_distance_to_the_nearest_one_outside(seed, share, most):
    inside = np.random.default_rng(seed).random((11, 14)) > share
    rows, columns = np.nonzero(~inside)
    expected = [
        [min((max(abs(rows - y).tolist()[i], abs(columns - x).tolist()[i]) for i in range(len(rows))), default=most)
         for x in range(14)] for y in range(11)
    ]  # fmt: skip
    assert np.array_equal(depth_of(inside, most), np.minimum(expected, most))


def test_the_fade_rises_linearly_inside_the_mask_and_over_its_depth_if_that_is_less():
    line = np.zeros((1, 20), np.uint8)
    line[:, 5:] = 255
    assert fade(line, 4)[0].tolist() == pytest.approx([0] * 5 + [0.2, 0.4, 0.6, 0.8] + [1] * 11)
    line[:, 8:] = 0
    assert fade(line, 8)[0, 4:9].tolist() == [0, 0.5, 1, 0.5, 0]
    assert fade(np.full((4, 4), 255, np.uint8), 3).min() == 1


def test_a_soft_mask_keeps_its_greys_and_fades_its_strengths():
    mask = block(64, 64, (0, 0, 64, 64), 100)
    with pytest.raises(InputError, match="black everywhere"):
        edit_of(image=picture(64, 64), mask=mask)
    assert edit_of(image=picture(64, 64), mask=mask, mask_soft=True).mask.getextrema() == (100, 100)
    soft = edit_of(image=picture(64, 64), mask=block(64, 64, (32, 0, 64, 64)), mask_soft=True, mask_blur=15)
    assert np.asarray(soft.mask)[5, 31:50].tolist() == [round(255 * min(i, 16) / 16) for i in range(19)]


# Sizes and windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "fields", "size"),
    [
        ((64, 48), {}, (64, 48)),
        ((65, 47), {}, (80, 48)),
        ((3000, 2000), {}, (2512, 1680)),  # scaled down to four megapixels
        ((3000, 2000), {"crop": "1.5"}, (1024, 1024)),
        ((3000, 2000), {"crop": "30"}, (1808, 1200)),
        ((3000, 2000), {"crop": "1.5", "width": 512}, (512, 1024)),
        ((100, 50), {"extend": "left=28,bottom=14"}, (128, 64)),
    ],
)
def test_the_size_to_draw_at(image, fields, size):
    mask = block(*image, (20, 20, 80, 60))
    assert edit_of(image=Image.new("RGB", image), mask=mask, **fields).size == size


def test_a_crop_is_centred_on_the_mask_and_stays_inside_the_picture():
    assert surroundings((100, 100, 200, 152), Context(1.5), (400, 300)) == (75, 87, 225, 165)
    assert surroundings((100, 100, 200, 150), Context(pixels=10), (400, 300)) == (90, 90, 210, 160)
    assert surroundings((0, 290, 10, 300), Context(3), (400, 300)) == (0, 268, 32, 300)
    assert surroundings((0, 0, 9, 9), Context(3), (20, 12)) == (0, 0, 20, 12)


def test_a_window_has_the_shape_of_the_drawn_size_and_holds_its_box():
    assert window_of((75, 87, 225, 162), (64, 64), (400, 300)) == (75, 50, 225, 200)
    assert window_of((0, 0, 400, 300), (64, 64), (400, 300)) == (0, -50, 400, 350)


# Extending -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ANCHORS)
def test_an_anchor_says_where_the_picture_lies(anchor):
    left, top, right, bottom = Extension.read(f"100x80@{anchor}").around(60, 60)
    assert (left + right, top + bottom) == (40, 20)
    assert left == {"left": 0, "right": 40}.get(anchor.rpartition("-")[2], 20)
    assert top == {"top": 0, "bottom": 20}.get(anchor.partition("-")[0], 10)


def test_new_space_repeats_the_edge_to_start_from_and_is_grey_to_look_at():
    start = picture(64, 64)
    edit = edit_of(image=start, extend="right=64")
    own = np.asarray(start)
    assert np.array_equal(np.asarray(edit.start)[:, 64:], own[:, -1:].repeat(64, 1))
    shown = np.asarray(edit.shown)
    assert np.array_equal(shown[:, :64], own)
    assert (shown[:, 64:] == 128).all()
    assert (np.asarray(edit.mask)[:, 64:] == 255).all()
    assert (np.asarray(edit.mask)[:, :64] == 0).all()


def test_growing_an_extension_repaints_the_seam_and_shrinking_leaves_no_new_pixel_out():
    start = picture(64, 64)
    assert bounds(edit_of(image=start, extend="right=64", mask_grow=10).canvas.mask) == (54, 0, 128, 64)
    both = edit_of(image=start, mask=block(64, 64, (8, 8, 24, 24)), extend="right=64", mask_grow=-4).canvas.mask
    assert (both[:, 64:] == 255).all()
    assert bounds(both[:, :64]) == (12, 12, 20, 20)


@torch.no_grad()
def test_a_model_with_the_start_picture_as_reference_sees_new_space_in_grey(build):
    model = build(SPECS["flux2-klein-4b"].tiny)
    start = picture(64, 64)
    request = Request(prompt="x", image=start, extend="right=64", steps=1, seed=0)
    grey = Image.new("RGB", (128, 64), (128, 128, 128))
    grey.paste(start)
    expected = model.family.encode_image(torch.from_numpy(np.array(grey)).permute(2, 0, 1)[None] / 255)[0]
    assert torch.equal(model.encode(request).references[0], expected)


@torch.no_grad()
def test_a_fill_model_extends_a_picture(build):
    model = build(SPECS["flux1-fill-dev"].tiny)
    request = Request(prompt="x", image=picture(64, 64), extend="bottom=32", steps=1, seed=0, guidance=3)
    beside = model.encode(request).beside
    assert beside.shape[1:] == (12, 8)
    assert beside[16:, 8:].min() == 1
    assert beside[16:, :8].max() == 0


# Fills ---------------------------------------------------------------------------------------------------------------


def test_fills_change_the_hole_alone_and_all_but_noise_continue_what_is_around():
    ramp = Image.fromarray(np.tile(np.linspace(40, 200, 64).round().astype(np.uint8)[None, :, None], (64, 1, 3)))
    hole = np.zeros((64, 64), bool)
    hole[24:40, 24:40] = True
    spoilt = np.array(ramp)
    spoilt[hole] = 255
    for fill in ("blur", "noise", "telea"):
        found = np.asarray(filled(Image.fromarray(spoilt), hole, fill))
        assert np.array_equal(found[~hole], spoilt[~hole])
        apart = np.abs(found[hole].astype(int) - np.asarray(ramp)[hole]).mean()
        assert (apart > 40) == (fill == "noise")
        assert np.array_equal(found, np.asarray(filled(Image.fromarray(spoilt), hole, fill)))


def test_spreading_keeps_a_flat_colour_and_is_grey_where_nothing_is_known():
    flat = np.full((13, 9, 3), 77, np.float32)
    known = np.zeros((13, 9), bool)
    assert (spread(flat, known) == 128).all()
    known[3, 4] = True
    assert np.allclose(spread(flat, known), 77)


def test_telea_without_opencv_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install 'inkstream\[ocr\]', or take blur"):
        filled(picture(8, 8), np.ones((8, 8), bool), "telea")


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mask_from": "alpha"}, "has no transparent pixels"),
        ({"mask_from": "colour:#123456~0"}, "no pixel is within 0 of #123456"),
        ({"mask": Image.new("L", (9, 9))}, "is black everywhere: paint white"),
        ({"mask": Image.new("L", (9, 9), 255), "mask_invert": True}, "leave mask_invert out"),
        ({"mask": block(40, 40, (3, 3, 7, 7)), "mask_grow": -2}, "mask_grow -2 leaves nothing of the mask"),
        ({"mask": block(40, 40, (3, 3, 7, 7)), "mask_from": "alpha"}, "were both given: leave one"),
        ({"extend": "40x40"}, "leaves no room around a picture of 40x40"),
        ({"extend": "32x64"}, "leaves no room"),
        ({"image": None, "extend": "left=4"}, "extend needs a start picture"),
        ({"image": None, "mask_from": "alpha"}, "mask_from needs a start picture"),
    ],
)
def test_what_cannot_be_repainted_is_refused_in_one_line(fields, words):
    with pytest.raises(InputError) as caught:
        complete(Request(**{"prompt": "x", "image": Image.new("RGB", (40, 40), "red"), **fields}), SPEC)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_canvas_has_the_limits_of_a_picture():
    with pytest.raises(InputError, match="makes 16385x1 pixels, more than the limit of 64 megapixels"):
        canvas_of(Request(image="x", extend="left=4096,right=1"), Image.new("RGB", (12288, 1)))


ODD = st.text(alphabet="alphcour:#0f~9textleigb=,@x-. \n٣", max_size=30) | st.text(max_size=12)
LIKELY = st.sampled_from(["left=3", "top=0,right=9", "99x88@top", "64x64", "1.2", "5px", "colour:#f00", "alpha"])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mask_from=st.none() | ODD | LIKELY, extend=st.none() | ODD | LIKELY, crop=st.none() | ODD | LIKELY | st.floats(),
    mask=st.none() | st.binary(max_size=40) | st.tuples(st.integers(1, 300), st.integers(1, 3)),
    grow_by=st.integers(-2000, 2000), blur=st.integers(-1, 1100), width=st.none() | st.integers(0, 9000),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)), soft=st.booleans(),
)  # fmt: skip
def test_absurd_fields_are_drawn_or_refused_in_one_line(
    mask_from, extend, crop, mask, grow_by, blur, width, size, soft
):
    if isinstance(mask, tuple):
        mask = Image.new("L", mask, 255)
    fields = {"mask_from": mask_from, "extend": extend, "crop": crop, "mask": mask, "mask_soft": soft}
    fields |= {"mask_grow": grow_by, "mask_blur": blur, "image": picture(*size), "width": width, "height": width and 16}
    if str(mask_from).partition(":")[0].strip() == "text":  # reading text takes a second
        fields["mask_from"] = None
    edit = tried(fields)
    if isinstance(edit, list):
        assert all("\n" not in line for line in edit)
    elif edit is not None:
        assert edit.paste(Image.new("RGB", edit.size)).size == edit.canvas.picture.size


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("alpha", MaskSource("alpha")),
        (" colour:#0F0~7 ", MaskSource("colour", "#00FF00", 7)),
        ("text: two words ", MaskSource("text", "two words")),
        ("text", MaskSource("text")),
    ],
)
def test_a_source_of_a_mask_is_read(text, source):
    assert MaskSource.read(text) == source


def test_a_crop_is_a_number_or_text():
    assert Request(crop=1.25).crop == "1.25"
    assert Request(crop="32px").crop == "32px"
    for wrong in ("0.5", "nan", "inf", "1e9", "-1", "99999px", "px", True):
        with pytest.raises(ValidationError):
            Request(crop=wrong)


def test_the_fields_of_repainting_are_known_to_the_package():
    assert inkstream.Request(image="a.png", extend="left=1").repaints
    assert not inkstream.Request(image="a.png", crop="2").repaints
