"""Pictures in: whatever file a user has becomes RGB in sRGB, upright, opaque, of a size the models take."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from inkstream.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 64 * 1024 * 1024
"""A picture with more pixels is refused from its header, before it is decoded."""
MAX_SIDE = 16_384
MAX_BYTES = 512 * 1024 * 1024
"""A larger file is not read at all."""
MAX_AREA = 2048 * 2048
"""A start picture larger than this many pixels is worked on at a smaller size, unless a size is asked for."""
LONGEST = 8192
"""The longest side a Request may ask for."""

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
"""What is read, as Pillow names it. Formats that run other programs (EPS) stay out."""


def open_picture(source: str) -> Image.Image:
    """The picture at a path or in a `data:` URL, as RGB.

    Turned upright by its EXIF orientation, transparency laid on white, colours taken to sRGB from the profile it
    carries, more than 8 bits scaled down; the first frame if it moves. InputError where that cannot be done.
    """
    image = _decode(source)
    colour, alpha = _split(image)
    colour = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        page = Image.new("RGB", colour.size, "white")
        page.paste(colour, mask=alpha)
        colour = page
    colour.info = {}  # or a profile would be written again with a picture that no longer needs it
    return colour


def open_mask(source: str, size: tuple[int, int]) -> Tensor:
    """(H, W) float32 in [0, 1], 1 repaints and 0 keeps, at size (width, height).

    A mask with any transparency in it is read as OpenAI's images API does: clear is repainted, opaque is kept, colours
    mean nothing. Any other is read by its brightness: white is repainted, black kept, grey in between.
    """
    import torch

    colour, alpha = _split(_decode(source))
    grey = colour.convert("RGB").convert("L") if alpha is None else ImageOps.invert(alpha)
    # Bilinear: the overshoot of a sharper filter would reach into what must be kept.
    grey = ImageOps.fit(grey, size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey, np.float32) / 255)


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """(3, height, width) float32 in [0, 1]; a picture of another size is scaled to cover it, then cropped centrally."""
    import torch

    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_image(pixels: Tensor) -> Image.Image:
    """The picture of pixels (3, H, W) in [0, 1]; what lies outside is clipped, halves round to even."""
    values = pixels.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((values * 255).round().astype(np.uint8))


def fit_size(image: Image.Image, multiple: int, max_area: int = MAX_AREA) -> tuple[int, int]:
    """(width, height) to work on a picture at: its own, scaled down into max_area pixels, floored to the multiple."""
    width, height = image.size
    scale = min(1.0, math.sqrt(max_area / (width * height)), LONGEST / max(width, height))

    def floor(side: int) -> int:
        return max(multiple, int(side * scale + 1e-6) // multiple * multiple)

    return floor(width), floor(height)


def open_header(source: str) -> Image.Image:
    """The picture at a path or in a `data:` URL with its header read and its size checked, not yet decoded."""
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
    """The bytes of a file or a `data:` URL. InputError if there are none, or too many."""
    name = short_name(source)
    if source[:5].lower() == "data:":
        head, comma, body = source.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InputError(f"{name} is not base64: write data:image/png;base64,... or give a path")
        try:
            body = "".join(body.split()).rstrip("=")
            data = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{name} is not valid base64: encode the whole file again, or give a path") from None
        size = len(data)
    elif re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        raise InputError(f"{name} is an address, and pictures are not fetched: download it and give the file's path")
    else:
        path = Path(source)
        try:
            if not source or not path.exists():
                raise InputError(f"there is no picture {name}: check the path")
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
        raise InputError(f"{name} has {size >> 20} MiB, and at most {MAX_BYTES >> 20} are read: scale it down first")
    return data


def short_name(source: str) -> str:
    """A source as messages name it: one line, and of a `data:` URL only the beginning."""
    source = str(source)
    if source[:5].lower() == "data:" and len(source) > 40:
        source = source[:40] + "..."
    elif len(source) > 200:
        source = "..." + source[-200:]
    return "".join(c if c.isprintable() else "?" for c in source) or "''"


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Around calls into Pillow: its warnings are kept quiet, and whatever its decoders raise becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(_too_large(name, "claims to be enormous")) from None
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, WebP, AVIF, GIF, TIFF, BMP"
        raise InputError(f"{name} is not a picture of a kind that is read ({kinds}): convert it to PNG") from None
    except MemoryError:
        raise InputError(f"{name} needs more memory than there is: scale it down first") from None
    except Exception as error:  # decoders raise whatever their C code meets
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is broken ({reason[:120]}): get or export the picture again") from None


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored picture upright."""


def _too_large(name: str, what: str) -> str:
    return f"{name} {what}; at most {MAX_PIXELS >> 20} megapixels and {MAX_SIDE} a side are read: scale it down first"


def _decode(source: str) -> Image.Image:
    """The picture's pixels, upright, in whatever mode they are stored."""
    image = open_header(source)
    with decoding(short_name(source)):
        image.load()
        turn = None
        with suppress(Exception):  # a broken EXIF block is no reason to refuse the picture
            turn = _TURNS.get(image.getexif().get(0x0112, 1))
        return image if turn is None else image.transpose(turn)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(L, RGB or CMYK picture, its alpha as L or None if it is opaque)."""
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
    """Grey of more than 8 bits, scaled: white is 65535 (in floats 1.0), or the largest value where that is larger."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
    white = max(1.0 if image.mode == "F" else 65535.0, values.max())
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB or CMYK -> RGB, by the profile the file carries if that is a sound one for such a picture."""
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")
