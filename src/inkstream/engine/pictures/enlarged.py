"""Files of enlarged pictures: the metadata of the smaller picture stay, and a line says what was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from PIL import Image

from inkstream.engine.pictures.foreign.reading import parse_json
from inkstream.engine.pictures.inputs import open_header, short_name
from inkstream.engine.pictures.metadata import KEYS, SOFTWARE, VERSION, Texts, encode_with
from inkstream.engine.pictures.texts import read_texts
from inkstream.types import InputError, as_object

ENHANCED = "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicallyEnhanced"
"""IPTC's DigitalSourceType of a picture that a person made and a model enlarged."""


def encode_enlarged(image: Image.Image, kind: str, source: str, line: str, by_model: bool) -> bytes:
    """The bytes of an enlarged picture. kind: as `picture_format` returns; source: the smaller picture.

    line: what was done. by_model: whether a model enlarged it. The request in the source's metadata stays. Raises
    InputError if a JPEG would lose the transparency, or cannot hold the metadata.
    """
    if kind == "JPEG" and image.mode == "RGBA":
        raise InputError(
            f"{short_name(source)} has transparent pixels, which a JPEG cannot hold: save it as .png or .webp"
        )
    texts, mark = read_texts(open_header(source))
    record: dict[str, Any] = dict(as_object(parse_json(texts.get("inkstream", ""))) or {})
    record = {"version": VERSION, "software": SOFTWARE} | record
    record["enlarged"] = [*enlargements(record), line]
    others = {key: text for key, text in texts.items() if key in KEYS and key != "inkstream"}
    mark = mark or (ENHANCED if by_model else None)
    return encode_with(image, kind, Texts(json.dumps(record), others, mark), quality=95, lossless=True)


def enlargements(record: dict[str, Any]) -> list[str]:
    """What was done to a picture after it was drawn, by our JSON."""
    given = record.get("enlarged")
    lines = cast("list[Any]", given) if isinstance(given, list) else []
    return [line[:500] for line in lines if isinstance(line, str)][:20]


def line_of(source: tuple[int, int], result: tuple[int, int], by: str) -> str:
    """What was done, in words. by: of a model or a filter."""
    before, after = ("x".join(map(str, size)) for size in (source, result))
    return f"{before} to {after} by {by}"


def name_for(source: str, result: tuple[int, int]) -> str:
    """The file name of an enlarged picture, without a suffix."""
    stem = "picture" if source[:5].lower() == "data:" else Path(source).stem[:80] or "picture"
    return f"{stem}-{result[0]}x{result[1]}"
