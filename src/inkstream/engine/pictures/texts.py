"""The texts in a picture file's metadata: in PNG's chunks, EXIF, XMP and a JPEG's comment. All of it is untrusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from xml.etree import ElementTree

from PIL import Image, PngImagePlugin

from inkstream.engine.pictures.inputs import decoding
from inkstream.types import InputError

MAX_TEXT = 4 * 1024 * 1024
"""Longer texts are not read. In characters."""
NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "inkstream": "urn:inkstream:xmp:1/",
    "TC260": "http://www.tc260.org.cn/ns/AIGC/1.0/",
}
"""Of the XMP that is written."""
_EXIF_TEXTS = {0x010E: "ImageDescription", 0x010F: "Make", 0x0110: "Model", 0x010D: "", 0x010C: "", 0x010B: ""}
"""Tags that hold texts, and their names. ComfyUI counts down from Make."""
_SUB_IFD, _USER_COMMENT, _WINDOWS_COMMENT = 0x8769, 0x9286, 0x9C9C
_XMP_TEXTS = {
    f"{{{NAMESPACES['inkstream']}}}Record": "inkstream",
    "{https://github.com/leejet/stable-diffusion.cpp/ns/1.0/}parameters": "parameters",
    "{http://ns.adobe.com/exif/1.0/}UserComment": "comment",
    f"{{{NAMESPACES['TC260']}}}AIGC": "AIGC",
}
"""Property of XMP -> the key of its text."""


def read_texts(image: Image.Image) -> tuple[dict[str, str], str | None]:
    """The metadata texts of a picture by key, and its DigitalSourceType.

    A key is a chunk's name, `comment`, or an EXIF tag's name.
    """
    with suppress(InputError), decoding(""):  # of a damaged picture or EXIF block, the texts found so far are used
        if image.format == "PNG":
            image.load()  # a PNG may hold texts behind the pixels
    info = image.info
    texts = {key: _recode(value) for key, value in info.items() if isinstance(key, str) and isinstance(value, str)}
    xmp = texts.pop("XML:com.adobe.xmp", None) or info.get("xmp")
    with suppress(InputError), decoding(""):
        for key, text in _exif_texts(image.getexif()):
            texts.setdefault(key, text)
    if isinstance(comment := info.get("comment"), bytes):  # a JPEG's; stable-diffusion.cpp names it
        name, _, text = comment.decode("utf-8", "replace").partition("\0")
        texts.setdefault("parameters" if name == "parameters" else "comment", (text or name).rstrip("\0"))
    properties = _read_xmp(xmp)
    for name, key in _XMP_TEXTS.items():
        if name in properties:
            texts.setdefault(key, properties[name])
    source_type = properties.get(f"{{{NAMESPACES['Iptc4xmpExt']}}}DigitalSourceType")
    return {key: value for key, value in texts.items() if value.strip() and len(value) <= MAX_TEXT}, source_type


def _recode(text: str) -> str:
    """Decodes a tEXt chunk that holds UTF-8 instead of PNG's Latin-1, as stable-diffusion.cpp writes it."""
    if isinstance(text, PngImagePlugin.iTXt):
        return text
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _exif_texts(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    """The texts of EXIF: the comment, and texts that begin with their key, as `prompt:{...}`, or are JSON."""
    for value in (exif.get_ifd(_SUB_IFD).get(_USER_COMMENT), exif.get(_USER_COMMENT)):  # Fooocus: beside the IFD
        if comment := _comment(value):
            yield "comment", comment
    if isinstance(windows := exif.get(_WINDOWS_COMMENT), bytes):
        yield "comment", windows.decode("utf-16-le", "replace").rstrip("\0")
    for tag, name in _EXIF_TEXTS.items():
        text = str(exif.get(tag, "")).rstrip("\0")
        key, _, value = text.partition(":")
        if key.lower() in ("prompt", "workflow", "parameters"):
            yield key.lower(), value
        elif text.startswith("{"):
            yield "comment", text
        elif name and text:
            yield name, text


def _comment(value: Any) -> str:
    """The text of an EXIF UserComment; empty if it is none. The first 8 bytes name the encoding."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return ""
    code, body = value[:8], value[8:]
    if code == b"UNICODE\0":  # UTF-16 in either byte order, mostly without a byte order mark
        order = "utf-16" if body[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-16-be"
        if order == "utf-16-be" and body[1::2].count(0) > body[0::2].count(0):
            order = "utf-16-le"
        return body.decode(order, "replace")
    if code.rstrip(b"\0") not in (b"ASCII", b""):
        body = value
    return body.decode("utf-8", "replace")


def _read_xmp(xmp: Any) -> Mapping[str, str]:
    """The properties of an XMP packet, by `{namespace}name`. Of a property with several values, the first counts."""
    text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else xmp
    if not isinstance(text, str) or len(text) > MAX_TEXT or "<!" in text:  # a DTD could expand entities
        return {}
    try:
        root = ElementTree.fromstring(text.strip("\0\ufeff \n"))
    except (ElementTree.ParseError, ValueError):
        return {}
    item = f"{{{NAMESPACES['rdf']}}}li"
    values: dict[str, str] = {}
    for element in root.iter():
        values |= element.attrib  # a property may be written as an attribute of its Description
        inner = next(element.iter(item), None) if len(element) == 1 else None
        value = element.get(f"{{{NAMESPACES['rdf']}}}resource") or (inner if inner is not None else element).text
        values.setdefault(element.tag, value or "")
    return values
