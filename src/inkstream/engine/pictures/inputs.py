"""Input pictures: a user's file becomes an upright, opaque sRGB picture of a size that the models take."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from inkstream.types import LONGEST, InputError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 64 * 1024 * 1024
"""A picture with more pixels is refused before it is decoded: its header gives the size."""
MAX_SIDE = 16_384
MAX_BYTES = 512 * 1024 * 1024
"""A larger file is refused without being read."""
MAX_AREA = 2048 * 2048
"""A start picture with more pixels is scaled down, unless the request sets a size."""

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
"""The formats that are read, by their Pillow names. Formats that run other programs (EPS) are left out."""


def open_picture(source: str) -> Image.Image:
    """The picture at a path or in a `data:` URL, as 8-bit RGB.

    The picture is turned upright by its EXIF orientation and converted to sRGB by its colour profile. Transparent
    pixels are blended with white. Of an animation the first frame is taken. InputError if the picture cannot be read.
    """
    colour, alpha = open_layers(source)
    if alpha is None:
        return colour
    page = Image.new("RGB", colour.size, "white")
    page.paste(colour, mask=alpha)
    return page


def open_layers(source: str) -> tuple[Image.Image, Image.Image | None]:
    """The colours of a picture as for `open_picture`, and its alpha as mode L; None if the picture is opaque."""
    image = _decode(source)
    colour, alpha = _split(image)
    colour = _to_srgb(colour, image.info.get("icc_profile"))
    colour.info = {}  # otherwise Pillow writes the old colour profile when the picture is saved
    return colour, alpha


def is_deep(source: str) -> bool:
    """Whether a picture has more than 8 bits a channel, of which `open_picture` keeps 8. Only the header is read."""
    image: Any = open_header(source)  # `tile` says how a file's bytes are read, such as RGB;16B
    return image.mode.startswith(("I", "F")) or any("16" in str(tile[3]) for tile in image.tile[:1])


def open_mask(source: str, size: tuple[int, int]) -> Image.Image:
    """A mask as a picture of mode L, at size (width, height): white is repainted, black is kept.

    A mask that has transparent pixels is read by its alpha alone, as in OpenAI's images API: transparent is repainted,
    opaque is kept. Any other mask is read by its brightness: white is repainted, black is kept.
    """
    colour, alpha = _split(_decode(source))
    return _fitted(colour.convert("RGB").convert("L") if alpha is None else ImageOps.invert(alpha), size)


def open_alpha(source: str, size: tuple[int, int]) -> Image.Image:
    """A picture's transparency as a mask of mode L, at size (width, height). An opaque picture is black."""
    _, alpha = _split(_decode(source))
    return Image.new("L", size) if alpha is None else _fitted(ImageOps.invert(alpha), size)


def _fitted(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask scaled to cover a size, then cropped. Bilinear: a sharper filter overshoots and changes what is kept."""
    return mask if mask.size == size else ImageOps.fit(mask, size, Image.Resampling.BILINEAR)


def open_numbers(source: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The brightness of a picture as (H, W) numbers with all their bits: a depth map may have 16, or floats."""
    image = _decode(source)
    if image.mode.startswith(("I", "F")):
        return np.nan_to_num(np.asarray(image, np.float32), posinf=0.0, neginf=0.0)
    return np.asarray(_split(image)[0].convert("RGB").convert("L"), np.float32)


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture as (3, height, width) float32 in [0, 1]. Another size is scaled to cover, then cropped."""
    import torch

    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [0, 1] as a picture. Values outside are clipped; halves round to even."""
    values = pixels.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((values * 255).round().astype(np.uint8))


def fit_size(image: Image.Image, multiple: int, max_area: int = MAX_AREA) -> tuple[int, int]:
    """The (width, height) to draw a picture at: its own size, scaled down to max_area, floored to the multiple."""
    width, height = image.size
    scale = min(1.0, math.sqrt(max_area / (width * height)), LONGEST / max(width, height))

    def floor(side: int) -> int:
        return max(multiple, int(side * scale + 1e-6) // multiple * multiple)

    return floor(width), floor(height)


def open_header(source: str) -> Image.Image:
    """The picture at a path or in a `data:` URL, not yet decoded: the header is read and the size is checked."""
    name = short_name(source)
    data = read_source(source)
    with decoding(name):
        Image.init()
        image = Image.open(io.BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN])
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(_too_large(name, f"is {width}x{height} pixels"))
    return image


def read_source(source: str) -> bytes:
    """The bytes of a file or a `data:` URL. InputError if it cannot be read, is empty or exceeds MAX_BYTES."""
    name = short_name(source)
    if source[:5].lower() == "data:":
        head, comma, body = source.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InputError(f"{name} is not a base64 URL: write data:image/png;base64,... or give a path")
        try:
            body = "".join(body.split()).rstrip("=")
            data = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{name} is not valid base64: encode the whole file again, or give a path") from None
        size = len(data)
    elif re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        raise InputError(f"{name} is a web address, which is not fetched: download the picture and give its path")
    else:
        path = Path(source)
        try:
            if not source or not path.exists():
                raise InputError(f"picture {name} does not exist: check the path")
            if path.is_dir():
                raise InputError(f"{name} is a folder: name one picture in it")
            if not path.is_file():
                raise InputError(f"{name} is not a file: give the path of a picture")
            size = path.stat().st_size
            data = path.read_bytes() if size <= MAX_BYTES else b""
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror}): check the path and its permissions") from None
    if size == 0:
        raise InputError(f"{name} is empty: save or copy the picture again")
    if size > MAX_BYTES:
        raise InputError(f"{name} has {size >> 20} MiB, more than the limit of {MAX_BYTES >> 20}: scale it down first")
    return data


def short_name(source: str) -> str:
    """A source's name for messages: one printable line. A `data:` URL is cut to 40 characters."""
    source = str(source)
    if source[:5].lower() == "data:" and len(source) > 40:
        source = source[:40] + "..."
    elif len(source) > 200:
        source = "..." + source[-200:]
    return "".join(c if c.isprintable() else "?" for c in source) or "''"


@contextmanager
def decoding(name: str) -> Generator[None]:
    """A context for calls into Pillow: suppresses its warnings and turns every error into an InputError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(_too_large(name, "is too large to decode")) from None
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, WebP, AVIF, GIF, TIFF, BMP"
        raise InputError(f"{name} is not a picture in a supported format ({kinds}): convert it to PNG") from None
    except MemoryError:
        raise InputError(f"{name} needs more memory than is free: scale it down first") from None
    except Exception as error:  # decoders raise errors of many types on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is damaged ({reason[:120]}): download or export the picture again") from None


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that turns the stored picture upright."""


def _too_large(name: str, what: str) -> str:
    limit = f"{MAX_PIXELS >> 20} megapixels or {MAX_SIDE} pixels a side"
    return f"{name} {what}, more than the limit of {limit}: scale it down first"


def _decode(source: str) -> Image.Image:
    """The decoded picture, upright, in its stored mode."""
    image = open_header(source)
    with decoding(short_name(source)):
        image.load()
        turn = None
        with suppress(Exception):  # a picture with a damaged EXIF block is still read
            turn = _TURNS.get(image.getexif().get(0x0112, 1))
        return image if turn is None else image.transpose(turn)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Splits a picture into its colours (mode L, RGB or CMYK) and its alpha (mode L; None if the picture is opaque)."""
    if image.mode.startswith(("I", "F")):
        return _to_8_bits(image), None
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        return image.convert("RGB"), alpha if alpha.getextrema()[0] < 255 else None  # type: ignore[operator]
    if image.mode == "1":
        return image.convert("L"), None
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB"), None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales grey of more than 8 bits to 8. White is 65535 (1.0 for floats), or the largest value if that is larger."""
    with np.errstate(invalid="ignore"):  # numpy warns of a signalling NaN
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
    white = max(1.0 if image.mode == "F" else 65535.0, values.max())
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts L, RGB or CMYK to RGB in sRGB by the file's colour profile. A profile that does not fit is ignored."""
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = cast("Any", ImageCms.createProfile("sRGB"))  # pyright: ignore[reportUnknownMemberType]
            converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")
