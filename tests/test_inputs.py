"""Input pictures: every file becomes an upright sRGB picture or an error of one line."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from inkstream.engine.pictures import inputs
from inkstream.engine.pictures.inputs import fit_size, open_alpha, open_mask, open_picture, to_image, to_pixels
from inkstream.types import InputError, Request


@pytest.fixture
def saved(tmp_path):
    """A function that saves a picture or bytes and returns the path."""

    def save(image, name="picture.png", **options):
        path = tmp_path / name
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, **options)
        return str(path)

    return save


def png(ihdr: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, so that it can hold what Pillow does not write."""
    whole = [(b"IHDR", ihdr), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in whole
    )


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def pixel(image, at=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(at)


def refusal(source: str, call=open_picture) -> str:
    """The one-line error for a source. Fails if there is any other output, such as a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            call(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("RGB", (10, 20, 30), "a.png", (10, 20, 30)),
        ("L", 77, "a.png", (77, 77, 77)),
        ("1", 1, "a.png", (255, 255, 255)),
        ("1", 0, "a.tiff", (0, 0, 0)),
        ("LA", (100, 255), "a.png", (100, 100, 100)),
        ("LA", (100, 0), "a.png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 0), "a.png", (255, 255, 255)),
        ("RGBA", (0, 0, 255, 51), "a.png", (204, 204, 255)),
        ("RGBA", (0, 0, 255, 51), "a.tiff", (204, 204, 255)),
        ("I;16", 65535, "a.png", (255, 255, 255)),
        ("I;16", 32896, "a.png", (128, 128, 128)),
        ("I;16", 300, "a.png", (1, 1, 1)),
        ("I;16B", 32896, "a.tiff", (128, 128, 128)),
        ("I", 32896, "a.tiff", (128, 128, 128)),
        ("F", 0.5, "a.tiff", (128, 128, 128)),
        ("CMYK", (255, 0, 0, 0), "a.tiff", (0, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(saved, mode, colour, name, expected):
    assert pixel(open_picture(saved(Image.new(mode, (3, 2), colour), name))) == expected


def test_values_above_16_bits_are_scaled_not_clipped(saved):
    values = np.array([[0, 100_000, 200_000]], np.int32)
    picture = open_picture(saved(Image.fromarray(values), "deep.tiff"))
    assert [pixel(picture, (x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_a_float_picture_with_nan_values_is_read(saved):
    values = np.array([[np.nan, np.inf, -1.0, 1.0]], np.float32)
    picture = open_picture(saved(Image.fromarray(values), "float.tiff"))
    assert [pixel(picture, (x, 0))[0] for x in range(4)] == [0, 0, 0, 255]


def test_a_float_picture_with_a_signalling_nan_is_read_without_a_warning(saved):
    values = np.array([[0.5, 0], [1, 1]], np.float32)
    values.view(np.uint32)[0, 1] = 0x7FA00000
    image = open_picture(saved(Image.fromarray(values), "a.tiff"))
    assert (pixel(image), pixel(image, (1, 0))) == ((128, 128, 128), (0, 0, 0))


def test_a_16_bit_rgb_png_is_read(saved):
    rows = b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257)
    path = saved(png(header(2, 1, 16), (b"IDAT", zlib.compress(rows))))
    assert pixel(open_picture(path)) == (255, 0, 128)
    assert pixel(open_picture(path), (1, 0)) == (0, 255, 1)


def test_transparent_palette_entries_become_white(saved):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    for name, transparency in (("index.png", 1), ("bytes.png", b"\xff\x00"), ("index.gif", 1)):
        read = open_picture(saved(picture, name, transparency=transparency))
        assert pixel(read) == (255, 0, 0)
        assert pixel(read, (1, 0)) == (255, 255, 255)


def test_a_transparent_colour_of_an_rgb_png_becomes_white(saved):
    rows = b"\0" + bytes([9, 9, 9, 1, 2, 3])
    data = png(header(2, 1), (b"tRNS", struct.pack(">3H", 9, 9, 9)), (b"IDAT", zlib.compress(rows)))
    read = open_picture(saved(data))
    assert (pixel(read), pixel(read, (1, 0))) == ((255, 255, 255), (1, 2, 3))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation_is_taken(saved, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = saved(frames[0], name, save_all=True, append_images=frames[1:], duration=100)
    red, _, blue = pixel(open_picture(path))
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(saved, orientation, name):
    upright = Image.effect_noise((4, 3), 100).convert("RGB")
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if name == "a.webp" else {}
    assert open_picture(saved(stored, name, exif=exif, **lossless)).tobytes() == upright.tobytes()


def test_a_picture_with_a_damaged_exif_block_is_read(saved):
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0%\0\0\0\x08", b"Exif\0\0"):
        assert pixel(open_picture(saved(Image.new("RGB", (4, 4), "red"), exif=exif))) == (255, 0, 0)


# Colour --------------------------------------------------------------------------------------------------------------


def icc(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2, written by hand."""
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    start = struct.pack(">I4sI4s4s4s", at + len(body), b"", 0x02400000, kind, space, connection)
    start += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return start + bytes(128 - len(start)) + table + body


def test_an_rgb_profile_is_converted_to_srgb(saved):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    path = saved(Image.new("RGB", (4, 4), (255, 0, 0)), icc_profile=swapped)
    assert pixel(open_picture(path)) == pytest.approx((0, 255, 0), abs=2)
    assert "icc_profile" not in open_picture(path).info


def test_a_picture_in_srgb_keeps_every_value(saved):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_picture(saved(noise, icc_profile=profile)).tobytes() == noise.tobytes()


def test_a_grey_profile_is_converted_to_srgb(saved):
    linear = b"curv" + bytes(4) + struct.pack(">I", 0)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    profile = icc(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": linear, b"wtpt": white})
    path = saved(Image.new("L", (4, 4), 55), icc_profile=profile)
    assert pixel(open_picture(path)) == pytest.approx((128,) * 3, abs=2)


def test_a_cmyk_picture_is_read_by_its_own_profile(saved):
    identity = bytes(range(256))
    corners = product((0, 1), repeat=4)  # of ink; here cyan prints as grey
    grid = b"".join(bytes([0 if black else 128 if cyan else 255, 128, 128]) for cyan, _, _, black in corners)
    matrix = struct.pack(">9i", *(0x10000 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + grid + identity * 3
    picture = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    profile = icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})
    assert pixel(open_picture(saved(picture, "a.tiff", icc_profile=profile))) == pytest.approx((119,) * 3, abs=3)


def test_deep_grey_is_turned_upright_too(saved):
    deep = Image.fromarray(np.array([[0, 65535], [0, 0]], np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert [pixel(open_picture(saved(deep, exif=exif)), at)[0] for at in ((0, 0), (1, 1))] == [0, 255]


# The profile holds the time at which it was made. Without names of their own, the cases would differ between workers.
@pytest.mark.parametrize(
    "profile", [b"junk", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()], ids=["junk", "of colours"]
)
def test_a_profile_that_does_not_fit_is_ignored(saved, profile):
    cyan = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "a.jpg", icc_profile=profile, quality=100)
    assert pixel(open_picture(cyan)) == pytest.approx((0, 255, 255), abs=3)


# Sources -------------------------------------------------------------------------------------------------------------


def test_a_data_url_reads_like_the_file(saved):
    picture = Image.effect_noise((8, 8), 90).convert("RGB")
    request = Request(image=picture, mask=Path(saved(picture)).read_bytes())  # type: ignore[arg-type]
    assert request.image.startswith("data:image/png;base64,")
    assert open_picture(request.image).tobytes() == open_picture(request.mask).tobytes() == picture.tobytes()
    head, _, body = request.image.partition(",")
    wrapped = head.upper().replace("DATA", "data") + "," + "\n".join(body[i : i + 70] for i in range(0, len(body), 70))
    assert open_picture(wrapped.rstrip("=")).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere/cat.png", "picture nowhere/cat.png does not exist: check the path"),
        ("", "picture '' does not exist: check the path"),
        ("nul\0byte.png", "picture nul?byte.png does not exist"),
        ("line\nbreak.png", "picture line?break.png does not exist"),
        ("x" * 5000, "check the path"),
        ("https://example.org/cat.png", "download the picture and give its path"),
        ("HTTP://example.org/cat.png", "download the picture"),
        ("file:///tmp/cat.png", "give its path"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,not base64!", "is not valid base64"),
        ("data:image/png;base64,gr\u00fcn", "is not valid base64"),
        ("data:image/png,rawbytes", "is not a base64 URL: write data:image/png;base64,... or give a path"),
        ("data:image/png;base64", "is not a base64 URL"),
    ],
)
def test_a_source_without_a_picture_is_refused_with_the_reason(source, says):
    assert says in refusal(source)


def test_a_path_that_is_not_a_file_is_refused(tmp_path):
    assert "is a folder: name one picture in it" in refusal(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.png")
    assert "is not a file" in refusal(str(tmp_path / "pipe.png"))


def test_a_long_data_url_is_shortened_in_messages():
    message = refusal("data:image/png;base64," + base64.b64encode(b"no picture" * 1000).decode())
    assert message.startswith("data:image/png;base64,bm8gcGljdHVyZW5vIH... is not a picture")
    assert len(message) < 200


# Damaged and hostile files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty: save or copy the picture again"),
        (b"once upon a time", "is not a picture in a supported format (PNG, JPEG, WebP,"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "convert it to PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not a picture in"),
        (b"\x89PNG\r\n\x1a\n", "is not a picture"),
        (png(header(30_000, 30_000)), "the limit of 64 megapixels or 16384 pixels a side: scale it down first"),
        (png(header(10_000, 7_000)), "is 10000x7000 pixels, more than the limit of 64 megapixels"),
        (png(header(10_000, 9_000)), "is too large to decode, more than the limit of 64 megapixels"),
        (png(header(20_000, 1)), "is 20000x1 pixels"),
        (png(header(2**31 - 1, 2**31 - 1)), "is too large to decode"),
        (png(header(0, 5)), "is not a picture"),
        (png(header(4, 4), (b"zTXt", b"bomb\0\0" + zlib.compress(bytes(20_000_000)))), "is damaged (Decompressed"),
        (png(header(4, 4), (b"iCCP", b"bomb\0\0" + zlib.compress(bytes(20_000_000)))), "is damaged"),
        (png(header(4, 4), (b"IDAT", zlib.compress(b"\0" * 13)[:9])), "is damaged"),
        (png(header(4, 4), (b"IDAT", b"not zlib at all")), "is damaged"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_in_one_line(saved, data, says):
    message = refusal(saved(data, "trouble.png"))
    assert says in message
    assert "trouble.png" in message
    assert refusal(saved(data, "trouble.png"), lambda source: open_mask(source, (4, 4))) == message


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tiff", "a.bmp", "a.avif"])
def test_a_truncated_picture_is_read_or_refused_in_one_line(saved, name):
    path = saved(Image.effect_noise((32, 32), 90).convert("RGB"), name)
    whole = Path(path).read_bytes()
    refused = 0
    for length in range(1, len(whole), max(1, len(whole) // 40)):
        cut = saved(whole[:length], name)
        try:
            open_picture(cut)
        except InputError:
            refusal(cut)
            refused += 1
    assert refused > 30


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"]))
def test_a_damaged_picture_never_raises_anything_but_an_input_error(junk, at, kind):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(buffer, kind)
    data = bytearray(buffer.getvalue())
    data[at % len(data) : at % len(data) + len(junk)] = junk
    source = "data:image/png;base64," + base64.b64encode(bytes(data)).decode()
    with suppress(InputError):
        open_picture(source)


@pytest.mark.slow
def test_broken_and_absurd_inputs_of_every_kind_are_taken_or_refused_in_one_line():
    """60 of the 5,000 cases in benchmarks/records/fuzz-inputs.json."""
    words = [sys.executable, str(Path(__file__).parent.parent / "scripts" / "fuzz_inputs.py"), "--cases", "60"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(row["cases"] for row in rows) == 60
    assert len(rows) == 6
    assert all(row["faults"] == 0 < row["refused"] for row in rows)


def test_the_limits_leave_pillows_own_settings_alone(saved):
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    refusal(saved(png(header(10_000, 9_000))))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_a_file_too_large_is_refused_before_it_is_read(saved, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 3 << 20)
    assert "has 4 MiB, more than the limit of 3" in refusal(saved(bytes(4 << 20)))


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "RGBA", "CMYK", "I;16"])
def test_white_repaints_and_black_keeps_in_every_mode(saved, mode):
    ramp = Image.new("L", (4, 2))
    ramp.paste(255, (2, 0, 4, 2))
    deep = Image.fromarray(np.asarray(ramp, np.uint16) * 257)
    picture = deep if mode == "I;16" else ramp.convert("RGB").convert(mode)
    mask = open_mask(saved(picture, "mask.tiff"), (4, 2))
    assert mask.mode == "L"
    assert np.asarray(mask).tolist() == [[0, 0, 255, 255]] * 2


def test_grey_in_a_mask_is_kept(saved):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    assert np.asarray(open_mask(saved(ramp), (256, 1)))[0].tolist() == list(range(256))
    assert np.asarray(open_mask(saved(ramp.convert("RGB")), (256, 1)))[0].tolist() == list(range(256))


def test_a_mask_with_transparency_repaints_its_transparent_pixels_of_any_colour(saved):
    picture = Image.new("RGBA", (3, 1), (255, 255, 255, 255))
    picture.putpixel((1, 0), (255, 255, 255, 0))
    picture.putpixel((2, 0), (0, 0, 0, 51))
    assert np.asarray(open_mask(saved(picture), (3, 1))).tolist() == [[0, 255, 204]]
    assert np.asarray(open_alpha(saved(picture), (3, 1))).tolist() == [[0, 255, 204]]


def test_an_opaque_picture_has_no_transparency_to_repaint(saved):
    assert open_alpha(saved(Image.new("RGB", (4, 4), "white")), (4, 4)).getextrema() == (0, 0)


def test_a_mask_is_fitted_like_its_picture_and_without_ringing(saved):
    picture = Image.new("L", (64, 32))
    picture.paste(255, (32, 0, 64, 32))
    mask = np.asarray(open_mask(saved(picture), (16, 16)))
    assert mask.shape == (16, 16)
    assert mask[:, :7].max() == 0
    assert mask[:, 9:].min() == 255


# Pixels --------------------------------------------------------------------------------------------------------------


def test_pixels_and_pictures_convert_both_ways_without_loss():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8))
    pixels = to_pixels(picture, 7, 5)
    assert pixels.shape == (3, 5, 7)
    assert pixels.dtype == torch.float32
    assert pixels[:, 2, 3].mul(255).round().tolist() == list(picture.getpixel((3, 2)))
    assert to_image(pixels).tobytes() == picture.tobytes()


def test_values_are_rounded_and_clipped():
    values = torch.tensor([-1.0, 0.5 / 255 + 1e-4, 1.4 / 255, 254.6 / 255, 7.0]).view(1, 1, 5).expand(3, 1, 5)
    assert [to_image(values).getpixel((x, 0))[0] for x in range(5)] == [0, 1, 1, 255, 255]


def test_half_precision_pixels_become_a_picture_too():
    assert to_image(torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16)).getpixel((0, 0)) == (128, 128, 128)


def test_a_wider_picture_is_cropped_at_its_centre_not_squeezed():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste((0, 0, 255), (100, 0, 200, 100))
    pixels = to_pixels(picture, 64, 64)
    assert pixels[:, 32, 32].tolist() == [0, 0, 1]
    assert pixels[2, :, 4:-4].min() == 1


@given(
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    st.sampled_from([8, 16, 32]),
    st.sampled_from([512**2, 1024**2, 2048**2]),
)
def test_a_fitted_size_is_a_multiple_within_the_area_and_close_to_the_pictures_shape(size, multiple, area):
    class Sized:
        pass

    picture = Sized()
    picture.size = size
    width, height = fit_size(picture, multiple, area)  # type: ignore[arg-type]
    assert width % multiple == height % multiple == 0
    assert min(width, height) >= multiple
    assert width * height <= area or min(width, height) == multiple
    scale = min(1.0, math.sqrt(area / (size[0] * size[1])), 8192 / max(size))
    for got, own in zip((width, height), size):
        assert got == multiple or 0 <= own * scale + 1e-3 - got < multiple + 1e-2


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 768), (1024, 768)), ((1000, 600), (992, 592)), ((5, 40), (16, 32)), ((4000, 3000), (2352, 1760)),
     ((4096, 4096), (2048, 2048)), ((16384, 64), (8192, 32))],
)  # fmt: skip
def test_a_picture_keeps_its_size_if_none_is_given(size, expected):
    assert fit_size(Image.new("1", size), 16) == expected
