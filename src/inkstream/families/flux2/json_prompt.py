"""FLUX.2's JSON prompts: checks the documented fields and writes them as one line of text for the model.

Source: the prompting guide at docs.bfl.ai (JSON structured prompting, hex colours). The model reads JSON as plain text,
and was trained on these fields.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from inkstream.types import InputError

FIELDS = (
    "scene", "subjects", "style", "color_palette", "lighting", "mood", "background", "composition", "camera",
)  # fmt: skip
"""The fields, in the order of the output."""

SUBJECT_FIELDS = ("description", "position", "action", "pose", "color_palette")

CAMERA_FIELDS = ("angle", "distance", "lens", "focus", "depth_of_field", "lens-mm", "f-number", "ISO")

COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")


def json_prompt(source: str | Mapping[str, Any]) -> str:
    """The canonical text of a JSON prompt: fields in documented order, one line, hex colours in capitals.

    source: JSON text or its object. Canonical text is returned unchanged. Raises InputError with the field and the
    remedy for: text that is not JSON, an unknown or empty field, a value of the wrong type, an invalid colour.
    """
    fields = _object("the prompt", _read(source), FIELDS)
    if not fields:
        raise InputError("the JSON prompt is empty: give it a scene or subjects")
    checked: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "subjects":
            checked[name] = _subjects(value)
        elif name == "color_palette":
            checked[name] = _palette(name, value)
        elif name == "camera":
            camera = _object(name, value, CAMERA_FIELDS)
            checked[name] = {key: _setting(f"camera.{key}", item) for key, item in camera.items()}
        else:
            checked[name] = _text(name, value)
    return json.dumps(checked, ensure_ascii=False)


def _read(source: str | Mapping[str, Any]) -> Any:
    if not isinstance(source, str):
        return source
    try:
        return json.loads(source, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise InputError(
            f"the JSON prompt cannot be read at line {error.lineno}, column {error.colno} ({error.msg}): correct it"
        ) from None
    except RecursionError:
        raise InputError("the JSON prompt nests too deep: use two levels at most") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the JSON prompt has the field {double} twice: keep one")
    return fields


def _object(where: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """The object's fields, in the order of `known`. Raises InputError for any other field."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {_short(value)}: write an object like {{{_quoted(known[0])}: ...}}")
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name).lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"take {', '.join(known)}"
            raise InputError(f"{where} has a field {_short(name)}, which FLUX.2 does not know: {hint}")
    return {name: value[name] for name in known if name in value}


def _subjects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f'subjects is {_short(value)}: write a list like [{{"description": "a red cat"}}]')
    subjects = []
    for number, subject in enumerate(value, start=1):
        where = f"subject {number}"
        fields = _object(where, subject, SUBJECT_FIELDS)
        if "description" not in fields:
            raise InputError(f"{where} has no description: say what it is")
        subjects.append(
            {
                name: (_palette if name == "color_palette" else _text)(f"{where}'s {name}", item)
                for name, item in fields.items()
            }
        )
    return subjects


def _palette(where: str, value: Any) -> list[str]:
    """Colours as #RRGGBB or in words, checked."""
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f'{where} is {_short(value)}: write a list like ["#FF8800", "matte black"]')
    colours = [_text(where, colour) for colour in value]
    for colour in colours:
        if colour.startswith("#"):
            _check_colour(where, colour)
        elif re.fullmatch(r"(?=.*\d)[0-9A-Fa-f]{6}", colour):
            raise InputError(f"{where} has the colour {colour}: write #{colour.upper()}")
    return colours


def _setting(where: str, value: Any) -> str | int | float:
    """Text, or a number such as a focal length, checked."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        return value
    return _text(where, value)


def _text(where: str, value: Any) -> str:
    """The text with hex colours in capitals. The guide ties a colour to an object by `color #...` or `hex #...`."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} is {_short(value)}: write some text, or leave the field out")
    for match in re.finditer(r"\b(?:colou?r|hex)\s+(#\w*)", value, re.IGNORECASE):
        _check_colour(where, match[1])
    return re.sub(COLOUR.pattern + r"(?!\w)", lambda match: match[0].upper(), value.strip())


def _check_colour(where: str, colour: str) -> None:
    if COLOUR.fullmatch(colour):
        return
    short = re.fullmatch(r"#([0-9A-Fa-f]{3})", colour)
    remedy = "#" + "".join(digit * 2 for digit in short[1]).upper() if short else "six hex digits like #FF8800"
    raise InputError(f"{where} has the colour {_short(colour)}: write {remedy}")


def _quoted(name: str) -> str:
    return json.dumps(name)


def _short(value: Any) -> str:
    """A value for messages: one line, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
