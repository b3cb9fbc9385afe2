"""Picture files and their metadata: the Request that draws the picture, and the mark that a model made it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast
from xml.sax.saxutils import escape

from PIL import Image, PngImagePlugin
from pydantic import ValidationError

from inkstream import __version__
from inkstream.disk import temporary
from inkstream.engine.pictures.foreign import READERS, SEVERAL, Program
from inkstream.engine.pictures.foreign.a1111 import read_a1111, write_a1111
from inkstream.engine.pictures.foreign.reading import Reading, is_number, parse_json
from inkstream.engine.pictures.inputs import open_header, read_source, short_name
from inkstream.engine.pictures.provenance import aigc_of, check_saving, mark_pixels
from inkstream.engine.pictures.signing import COMPOSITE, sign
from inkstream.engine.pictures.texts import NAMESPACES, read_texts
from inkstream.types import SAVING, InputError, Request, Saving, Spec, as_object

SOFTWARE = f"inkstream {__version__}"
VERSION = 1
"""The version of our JSON. A reader of a newer version takes the fields that it knows and lists the others."""
SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
PICTURE_FIELDS = ("image", "mask", "reference", "control")
JPEG_ROOM = 65_000
"""The most bytes of one metadata block in a JPEG."""
PNG_EFFORT = 4
"""zlib's level. The default of 6 takes up to ten times as long, and the files are at most a few percent smaller."""
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

Source = Literal["inkstream", "a1111"] | Program


@dataclass(frozen=True)
class Found:
    """The request in a picture's metadata. Untrusted: its PICTURE_FIELDS may name any file of this machine."""

    request: Request  # only the fields in request.model_fields_set were found
    source: Source  # the program whose format was read
    ignored: dict[str, Any] = field(
        default_factory=dict[str, Any]
    )  # settings that have no field here, by their original name
    raw: str = ""  # the text that was read


@dataclass(frozen=True)
class Texts:
    """The metadata to write: our JSON, other programs' texts by their keys, IPTC's DigitalSourceType, and AIGC."""

    record: str | None = None
    others: Mapping[str, str] = field(default_factory=dict[str, str])
    mark: str | None = MADE_BY_A_MODEL
    aigc: str | None = None


# Writing ------------------------------------------------------------------------------------------------------------


def save_picture(
    image: Image.Image,
    target: str | Path | BinaryIO,
    request: Request,
    spec: Spec | None = None,
    *,
    format: str | None = None,
    quality: int = 95,
    lossless: bool = False,
    saving: Saving = SAVING,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a picture with the complete Request that draws it. A file is written whole or not at all.

    target: a path that does not exist yet, or a binary stream. format: png, webp or jpeg; the default is the path's
    ending, or png for a stream. lossless: for WebP. extra: JSON to keep beside the Request.
    InputError if the path exists or cannot be written, or the metadata is too large for the format.
    """
    path = Path(target) if isinstance(target, str | Path) else None
    kind = picture_format(format if format else path if path else "png")
    data = encode_picture(image, kind, request, spec, quality, lossless, saving, extra)
    if isinstance(target, str | Path):
        write_new(Path(target), data)
    else:
        target.write(data)


def picture_format(name: str | Path) -> str:
    """PNG, WEBP or JPEG, from a format's name or a path's ending. InputError for any other."""
    suffix = (name.suffix if isinstance(name, Path) else Path(name).suffix or f".{name}").lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{short_name(str(name))} is not a format for saving: take .png, .webp or .jpg")
    return SUFFIXES[suffix]


def free_name(folder: str | Path, stem: str, suffix: str) -> Path:
    """The first path that does not exist yet, of stem.png, stem-2.png, stem-3.png and so on."""
    path, number = Path(folder) / f"{stem}{suffix}", 1
    while path.exists() or path.is_symlink():
        number += 1
        path = path.with_name(f"{stem}-{number}{suffix}")
    return path


def encode_picture(
    image: Image.Image,
    kind: str,
    request: Request,
    spec: Spec | None = None,
    quality: int = 95,
    lossless: bool = False,
    saving: Saving = SAVING,
    extra: Mapping[str, Any] | None = None,
    marked: bool = False,
) -> bytes:
    """The bytes of a picture file. kind: as `picture_format` returns; other arguments: as in `save_picture`.

    marked: whether the pixels have the profile's marks already, because they come from a file of ours.
    """
    if not 1 <= quality <= 100:
        raise InputError(f"quality {quality} is not between 1 and 100: take 95")
    check_saving(saving)
    profile = "none" if saving.metadata == "none" else saving.provenance
    record = _record(request, spec, extra)
    texts = Texts(mark=None if profile == "none" else MADE_BY_A_MODEL, aigc=aigc_of(profile, record))
    if saving.metadata == "full":
        texts = replace(texts, record=record, others={"parameters": write_a1111(request, SOFTWARE)})
    if not marked:
        image = mark_pixels(image, profile, record)
    data = encode_with(image, kind, texts, quality, lossless)
    if profile == "eu":  # the last write: whatever is written later breaks the signature
        data = sign(data, kind, COMPOSITE if request.image else MADE_BY_A_MODEL, "picture")
    return data


def encode_with(image: Image.Image, kind: str, texts: Texts, quality: int, lossless: bool) -> bytes:
    """The bytes of a picture file with these texts. kind, quality, lossless: as in `encode_picture`."""
    buffer = io.BytesIO()
    image = image.copy()
    image.info = {}  # otherwise Pillow writes the metadata of the input file too
    xmp = _xmp(texts.mark, None if kind == "PNG" else texts.record, texts.aigc)
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, text in texts.others.items():
            chunks.add_text(key, text)  # tEXt where Latin-1 holds it, else iTXt
        if texts.record is not None:
            chunks.add_text("inkstream", texts.record)
        if xmp:
            chunks.add_itxt("XML:com.adobe.xmp", xmp)
        image.save(buffer, "PNG", pnginfo=chunks, compress_level=PNG_EFFORT)
        return buffer.getvalue()
    comment = next((texts.others[key] for key in ("parameters", "comment") if key in texts.others), None)
    exif = _exif(comment) if comment is not None else b""
    if kind == "JPEG":
        if (size := max(len(xmp.encode()), len(exif))) > JPEG_ROOM:
            raise InputError(
                f"the request has {size} bytes of metadata, a JPEG holds {JPEG_ROOM}: save it as .png or .webp"
            )
        if image.mode == "RGBA":  # a JPEG has no transparency
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image.save(buffer, "JPEG", quality=quality, subsampling=0, exif=exif, xmp=xmp.encode())
    else:
        image.save(buffer, "WEBP", quality=quality, lossless=lossless, exif=exif, xmp=xmp.encode())
    return buffer.getvalue()


def _record(request: Request, spec: Spec | None, extra: Mapping[str, Any] | None) -> str:
    """Our JSON, in ASCII. An input picture given as a `data:` URL is replaced by its sha256."""
    fields = request.model_dump(mode="json", exclude_none=True)
    left_out: dict[str, str] = {}
    for name in PICTURE_FIELDS:
        given: str | list[str] = fields.get(name) or []
        pictures = [given] if isinstance(given, str) else given
        if any(picture.startswith("data:") for picture in pictures):
            kept = [hashlib.sha256(read_source(p)).hexdigest() if p.startswith("data:") else p for p in pictures]
            left_out[name] = f"was given as data, only its sha256 is kept: {', '.join(kept)}"
            del fields[name]
    record: dict[str, Any] = {"version": VERSION, "software": SOFTWARE, "request": fields}
    if spec is not None:
        record |= {"model": spec.title or spec.name, "licence": spec.licence, "commercial": spec.commercial}
    if left_out:
        record["left_out"] = left_out
    if extra:
        record["extra"] = dict(extra)
    return json.dumps(record)


def _xmp(mark: str | None, record: str | None, aigc: str | None) -> str:
    """An XMP packet of IPTC's DigitalSourceType, our JSON and China's AIGC; empty without all."""
    properties: dict[str, str] = {}
    if mark is not None:
        properties["Iptc4xmpExt:DigitalSourceType"] = mark
    if record is not None:
        properties |= {"xmp:CreatorTool": SOFTWARE, "inkstream:Record": record}
    if aigc is not None:
        properties["TC260:AIGC"] = aigc
    if not properties:
        return ""
    used = {prefix: uri for prefix, uri in NAMESPACES.items() if prefix != "TC260" or aigc is not None}
    spaces = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in used.items())
    body = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in properties.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF {spaces}><rdf:Description rdf:about="">{body}</rdf:Description></rdf:RDF></x:xmpmeta>'
        '<?xpacket end="w"?>'
    )


def _exif(parameters: str) -> bytes:
    """An EXIF block whose UserComment is the text in UTF-16. Big-endian is the byte order that all readers know."""
    exif = Image.Exif()
    exif[0x0131] = SOFTWARE
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + parameters.encode("utf-16-be")
    return exif.tobytes()


def write_new(path: Path, data: bytes) -> None:
    """Writes a new file, whole or not at all. InputError if the path exists or cannot be written."""
    name = short_name(str(path))
    part = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            try:
                os.link(part, path)  # a link fails if the path exists; a rename would overwrite the file
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                if path.exists():
                    raise FileExistsError from None
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError:
        raise InputError(f"{name} already exists and is not overwritten: give another name") from None
    except OSError as error:
        raise InputError(f"{name} cannot be written ({error.strerror}): give another path") from None


# Reading ------------------------------------------------------------------------------------------------------------


def read_request(source: str | Path, spec: Spec | None = None, loras: Collection[str] = ()) -> Found:
    """The Request in a picture's metadata. InputError if there is none.

    Reads our own JSON, and the formats of `foreign`. spec: of the model that will draw, if it is not the picture's; the
    settings of other programs are read as that model means them. loras: the names of those that are here; the request
    has those of another program's that are among them.
    """
    name = short_name(str(source))
    texts, _ = read_texts(open_header(str(source)))
    found = _find_request(texts, spec, loras)
    if found is None:
        raise InputError(f"{name} carries no request: give a prompt, or a picture saved with its metadata")
    return found


def told_in(image: Image.Image) -> str:
    """The prompt that a grammar told the model, in the metadata of a PNG of ours; empty if there is none."""
    return _told(str(image.info.get("inkstream", "")))


def prompts_in(source: str | Path) -> tuple[str, str]:
    """The prompt in a picture's metadata, and the one that the model was told. Both are empty if there is none."""
    texts, _ = read_texts(open_header(str(source)))
    found = _find_request(texts)
    prompt = "" if found is None else found.request.prompt
    return prompt, _told(texts.get("inkstream", "")) or prompt


def _told(record: str) -> str:
    told = (as_object((as_object(parse_json(record)) or {}).get("extra")) or {}).get("told")
    return told if isinstance(told, str) else ""


def describe(source: str | Path) -> dict[str, Any]:
    """A picture's format, size and metadata as JSON. Facts that are missing have no key."""
    image = open_header(str(source))
    size = len(read_source(str(source)))
    texts, source_type = read_texts(image)
    found = _find_request(texts)
    facts: dict[str, Any] = {
        "picture": short_name(str(source)),
        "format": image.format,
        "width": image.width,
        "height": image.height,
        "mode": image.mode,
        "bytes": size,
        "digital_source_type": source_type,
    }
    if found is not None:
        facts["source"] = found.source
        facts["request"] = found.request.model_dump(mode="json", include=found.request.model_fields_set)
        facts["ignored"] = found.ignored
        if found.source == "inkstream" and (record := as_object(parse_json(found.raw))):
            known = ("model", "licence", "commercial", "software")
            facts |= {key: _short(record[key]) for key in known if key in record}
            extra = as_object(record.get("extra")) or {}
            for name in ("template", "upsampled_from", "told", "checked", "merged_loras"):
                if isinstance(given := extra.get(name), str):
                    facts[name] = _short(given)
            if is_number(cost := extra.get("cost_usd")):
                facts["cost_usd"] = cost
            if origin := as_object(extra.get("refined_from")):
                facts["refined_from"] = {_short(key): _short(value) for key, value in islice(origin.items(), 10)}
    if enlarged := (as_object(parse_json(texts.get("inkstream", ""))) or {}).get("enlarged"):
        facts["enlarged"] = _short(enlarged)
    return {key: value for key, value in facts.items() if value not in (None, {})}


KEYS = ("inkstream", "parameters", "comment", "ImageDescription", "invokeai_metadata", "prompt", "workflow")
"""The keys of texts that may hold a request. The first that does counts."""


def _find_request(texts: Mapping[str, str], spec: Spec | None = None, loras: Collection[str] = ()) -> Found | None:
    """The request of the first text in a known format; None if there is none."""
    readings = _all_readings(texts)
    first = next(readings, None)
    if first is None:
        return None
    raw, source, reading = first
    if source == "a1111":  # nodes of ComfyUI write both: their text has no room for what a model reads beside it
        for _, other, graph in readings:
            if other == "comfyui":
                reading.fill(graph)
                break
    if source != "inkstream":
        reading.settle(spec)
        reading.use_loras(loras)
    return Found(*_validate(source, reading), raw=raw)


def _all_readings(texts: Mapping[str, str]) -> Iterator[tuple[str, Source, Reading]]:
    """Every text that is in a known format, the format's name, and what it says."""
    for key in KEYS:
        raw = texts.get(key, "").strip()
        for source, reading in _readings(key, raw):
            yield raw, source, reading
    for source, read in SEVERAL.items():
        if (reading := read(texts)) is not None:
            yield json.dumps(dict(texts)), source, reading


def _readings(key: str, raw: str) -> Iterator[tuple[Source, Reading]]:
    """What a text says in every format that it is in and that its key may hold."""
    data = parse_json(raw)
    if key == "inkstream":
        if (reading := _read_record(data)) is not None:
            yield "inkstream", reading
    elif (found := as_object(data)) is not None:
        for source, read in READERS.items():
            if (reading := read(found)) is not None:
                yield source, reading
    elif key in ("parameters", "comment", "ImageDescription"):
        reading = read_a1111(raw)
        if reading is not None and (key == "parameters" or reading.fields["steps"] is not None):  # else a camera's
            yield "a1111", reading
        elif key == "parameters" and raw:
            yield "a1111", Reading({"prompt": raw})


def _read_record(data: Any) -> Reading | None:
    """Reads our own JSON, of this version or a newer one."""
    record = as_object(data) or {}
    request = as_object(record.get("request"))
    left_out = dict(as_object(record.get("left_out")) or {})
    if merged := (as_object(record.get("extra")) or {}).get("merged_loras"):
        left_out["--merge-lora"] = merged
    if enlarged := record.get("enlarged"):
        left_out["enlarged"] = enlarged
    return None if request is None else Reading(dict(request), left_out)


FLAGS = frozenset(name for name, field in Request.model_fields.items() if field.annotation is bool)
"""The boolean fields. For every other field a boolean is not a valid value."""


def _validate(source: Source, reading: Reading) -> tuple[Request, Source, dict[str, Any]]:
    """A Request of the valid fields, the source, and the ignored settings with the invalid fields added."""
    ignored = dict(reading.ignored)
    fields: dict[str, Any] = {}
    for name, value in reading.fields.items():
        if isinstance(value, bool) and name not in FLAGS:
            ignored[name] = value
        elif value is not None:
            fields[name] = value
    while True:
        try:
            request = Request.model_validate(fields)
        except ValidationError as error:
            for problem in error.errors(include_url=False, include_context=False):
                name = str(problem["loc"][0])
                if name in fields:
                    ignored[name] = fields.pop(name)
        else:
            return request, source, {_short(name): _short(value) for name, value in islice(ignored.items(), 100)}


def _short(value: Any) -> Any:
    """A value for display: numbers stay, short lists of texts stay, anything else becomes one printable line."""
    items = cast("list[Any]", value) if isinstance(value, list) else None
    if items is not None and len(items) <= 20 and all(isinstance(item, str) for item in items):
        return [_short(item) for item in items]
    number = cast("Any", value)
    if value is None or isinstance(value, bool) or (is_number(number) and abs(number) < 2**64):  # no NaN
        return number
    try:
        text = value if isinstance(value, str) else json.dumps(number, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        text = type(number).__name__
    line = "".join(c if c.isprintable() else " " for c in text[:200])
    return line if len(text) <= 200 else line + "..."
