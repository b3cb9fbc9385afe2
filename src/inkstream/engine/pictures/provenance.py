"""The marks that tell that a model made a picture, by profile: in its pixels, in its metadata, and signed.

none: no marks. basic: IPTC's digital source type. eu: also an invisible mark and a signed C2PA manifest. cn: also an
invisible mark, a visible label, and the AIGC metadata of GB 45438-2025.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any, Literal

from PIL import Image

from inkstream.engine.pictures.foreign.reading import parse_json
from inkstream.engine.pictures.inputs import open_header, open_picture, read_source
from inkstream.engine.pictures.signing import check_signing, producer, verify_signature
from inkstream.engine.pictures.texts import read_texts
from inkstream.engine.pictures.watermark import BITS, add_mark, read_mark
from inkstream.pocket.draw import render
from inkstream.pocket.scenes import Background, Scene, Writing, line_width
from inkstream.types import InputError, ProvenanceName, Saving, as_object

LABEL = "AI生成"
HEIGHT = 0.066
"""Font size of the label, as a share of the shorter side: its characters are then at least 0.05 of it high."""
FACE: Literal["bold"] = "bold"
AIGC = ("Label", "ContentProducer", "ProduceID", "ReservedCode1", "ContentPropagator", "PropagateID", "ReservedCode2")
LEAST = 96
"""Shorter side in pixels of a picture that can carry an invisible mark."""


def check_saving(saving: Saving) -> None:
    """Raise InputError if pictures cannot be saved so."""
    if saving.metadata == "none" and saving.provenance not in ("none", "basic"):
        raise InputError(
            f"metadata none leaves out the marks of provenance {saving.provenance}: take metadata minimal, or "
            "provenance none"
        )
    if saving.provenance == "eu":
        check_signing()


def mark_of(identity: str) -> int:
    """The invisible mark of a picture that is told apart by this text: the first bits of its sha256."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[: BITS // 8], "big")


def mark_pixels(image: Image.Image, provenance: ProvenanceName, identity: str) -> Image.Image:
    """Return a picture with the profile's label and invisible mark. A picture below LEAST gets no invisible mark."""
    if provenance == "cn":
        image = add_label(image)
    if provenance in ("eu", "cn") and min(image.size) >= LEAST:
        image = add_mark(image if image.mode == "RGBA" else image.convert("RGB"), mark_of(identity))
    return image


def aigc_of(provenance: ProvenanceName, identity: str) -> str | None:
    """The JSON of the property AIGC; None if the profile has none. Label 1: a model has made the content."""
    if provenance != "cn":
        return None
    known = {"Label": "1", "ContentProducer": producer(), "ProduceID": f"{mark_of(identity):06x}"}
    return json.dumps({name: known.get(name, "") for name in AIGC}, ensure_ascii=False, separators=(",", ":"))


def add_label(image: Image.Image) -> Image.Image:
    """Return a picture with the visible label in its lower right corner: white letters on a dark plate."""
    em = max(round(HEIGHT * min(image.size)), 8)
    mask = _letters(em)
    width, height = mask.width + em, mask.height + em // 2
    if width > image.width or height > image.height:
        size = f"{image.width}x{image.height}"
        raise InputError(f"a picture of {size} has no room for the label of provenance cn: draw a larger one")
    left, top = image.width - width, image.height - height
    done = image.copy()
    dark = done.crop((left, top, image.width, image.height)).point(lambda value: value * 0.25)
    done.paste(dark if image.mode != "RGBA" else _opaque(dark), (left, top))
    done.paste("white", (left + em // 2, top + em // 4), mask)
    return done


def _opaque(image: Image.Image) -> Image.Image:
    image.putalpha(255)
    return image


@lru_cache(maxsize=8)
def _letters(em: int) -> Image.Image:
    """The label as a mask (L), cropped to its ink."""
    width = round((line_width(LABEL, FACE) + 1) * em)
    writing = Writing(LABEL, FACE, "white", 0.5, 0.5, em / min(width, 2 * em))
    drawn = render(Scene("text", Background("flat", ("black",)), (), (writing,)), width, 2 * em).convert("L")
    mask = drawn.point([min(max(value - 20, 0) * 255 // 232, 255) for value in range(256)])
    return mask.crop(mask.getbbox())


def verify_provenance(source: str) -> dict[str, Any]:
    """What tells that a model made a picture, as JSON: each mark that is there. Untrusted: anybody can write these."""
    image = open_header(source)
    texts, source_type = read_texts(image)
    facts: dict[str, Any] = {}
    if source_type:
        facts["digital_source_type"] = source_type.rpartition("/")[2][:100]
    if (aigc := as_object(parse_json(texts.get("AIGC", "")))) is not None:
        aigc = as_object(aigc.get("AIGC")) or aigc
        facts["aigc"] = {name: str(aigc[name])[:100] for name in AIGC if aigc.get(name)}
    mark = read_mark(open_picture(source)) if min(image.size) >= LEAST else None
    if mark is not None:
        facts["invisible_mark"] = f"{mark:06x}"
    if signature := verify_signature(read_source(source), image.format):
        facts["c2pa"] = dict(signature)
    return facts
