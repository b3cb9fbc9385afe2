"""What request draws a draft anew with another model: the same wish, told to that model beside the draft."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from inkstream.engine.drawing.model import shift_for
from inkstream.engine.drawing.options import options
from inkstream.engine.pictures.inputs import fit_size, open_picture, read_source, short_name
from inkstream.families import SPECS
from inkstream.sampling.schedules import shifted
from inkstream.types import InputError, Request, Spec

Way = Literal["strength", "reference"]
"""A draft is either what drawing starts from, noised, or a picture that the model looks at."""

LEVEL = 0.65
"""The noise level that drawing starts from where no strength is asked for: the layout stays, what fills it is new."""

HOW = (
    "steps", "guidance", "solver", "schedule", "shift", "cfg_normalization", "cfg_truncation", "guidance_from",
    "guidance_until", "cache", "cache_threshold",
)  # fmt: skip
"""Fields that say how a model is run. One model's numbers mean nothing to another: the draft's are never taken over."""

DEFAULTS = {name: field.default for name, field in Request.model_fields.items()}


@dataclass(frozen=True)
class Refinement:
    """The request that draws a draft anew, the way it does, and a line for each thing the user should know of it."""

    request: Request
    way: Way
    lines: tuple[str, ...]


def refined(wish: Request, draft: Request, picture: str, spec: Spec, way: Way | None = None) -> Refinement:
    """The request that draws `picture` anew with the model that `wish` names, whose Spec is `spec`.

    wish: fields that are set win; a strength asks for that way. draft: what the picture was drawn by, as far as it is
    known: its prompt, negative prompt, seed and references are taken over where the model honours them. The size is the
    picture's own, floored to the model's multiple. picture: a path or a `data:` URL, which the request will hold.

    A draft read from a file is untrusted, and its references may name any file of this machine: a server empties them.
    InputError where there is no prompt, or the model cannot do it.
    """
    way = way_for(spec, "strength" if wish.strength is not None else way)
    taken: dict[str, Any] = {}
    lines = [""]
    for name in ("prompt", "negative_prompt", "seed"):
        if name in draft.model_fields_set:
            taken[name] = getattr(draft, name)
    taken |= wish.model_dump(include=wish.model_fields_set - {"image", "mask", "reference", "count"})
    if not taken.get("prompt", "").strip() and not draft.reference:
        raise InputError(f"{short_name(picture)} carries no prompt: say with --prompt what it shows")
    taken["width"], taken["height"] = _size(wish, picture, spec.multiple)
    shown = draft.reference if "references" in spec.abilities else ()
    if way == "reference":
        taken["reference"] = (*shown, picture)  # last, so that 'image 1' of the prompt stays what it was
    else:
        taken |= {"image": picture, "reference": shown}
        taken.setdefault("strength", _strength(wish, spec, taken["width"], taken["height"]))
    for name, option in options(spec, Request.model_validate(taken)).items():
        if option.effect == "ignores" and taken.get(name, DEFAULTS[name]) != DEFAULTS[name]:
            lines.append(f"{name.replace('_', ' ')} {_quoted(taken.pop(name))} is left out: {option.why}")
    lines += _left(draft, wish, spec)
    request = Request.model_validate(taken)
    if way == "reference":
        lines[0] = f"{spec.name} looks at {short_name(picture)} as a reference (--strength starts from it instead)"
    else:
        other = " (--reference looks at it instead)" if "references" in spec.abilities else ""
        lines[0] = f"{spec.name} starts from {short_name(picture)}, at strength {request.strength:g}{other}"
    return Refinement(request, way, tuple(lines))


def way_for(spec: Spec, way: Way | None = None) -> Way:
    """The way asked for, else the better one of those the model has. InputError where it has none, or not that one.

    A model that looks at references was taught to keep what they show; one that starts from a noised picture was not.
    Where a reference is read as words are, it tells what is shown and not where, and starting from it is better.
    """
    able = spec.abilities
    has: dict[Way, bool] = {"reference": "references" in able, "strength": "image" in able}
    order: list[Way] = ["reference", "strength"] if spec.image_encoder is None else ["strength", "reference"]
    drafts = not able & {"map", "fill"}  # these need other pictures than a draft
    ways: list[Way] = [name for name in order if has[name] and drafts]
    if not ways:
        raise InputError(f"{spec.name} refines no pictures: take a model that draws from a picture or from references")
    if way is None:
        return ways[0]
    if way not in ways:
        raise InputError(f"{spec.name} cannot refine by {way}: leave --{way} out, and it refines by {ways[0]}")
    return way


def origin(picture: str, draft: Request) -> dict[str, Any]:
    """What a refined picture's metadata says of the draft, as JSON: its name, its digest, its model and seed."""
    known = {name: getattr(draft, name) for name in ("model", "seed") if name in draft.model_fields_set}
    return {"picture": short_name(picture), "sha256": hashlib.sha256(read_source(picture)).hexdigest(), **known}


def _size(wish: Request, picture: str, multiple: int) -> tuple[int, int]:
    """Width and height: those asked for; where one is, the other keeps the picture's shape."""
    image = open_picture(picture)
    width, height = fit_size(image, multiple)
    if wish.width is not None:
        width, height = wish.width, max(multiple, round(wish.width * image.height / image.width / multiple) * multiple)
    if wish.height is not None:
        scaled = round(wish.height * image.width / image.height / multiple) * multiple
        width, height = wish.width or max(multiple, scaled), wish.height
    return width, height


def _strength(wish: Request, spec: Spec, width: int, height: int) -> float:
    """The share of the steps that leads there from LEVEL: less where the shift keeps the noise up for longer."""
    shift = wish.shift or shift_for(spec, width, height, wish.steps or spec.steps)
    return round(shifted(LEVEL, 1 / shift), 2)


def _left(draft: Request, wish: Request, spec: Spec) -> Iterator[str]:
    """A line for what somebody chose for the draft and is not taken over."""
    pictures = [name for name in ("image", "mask") if getattr(draft, name) is not None]
    if pictures:
        yield f"left out: the draft's own {' and '.join(pictures)}, as it shows what came of them"
    if draft.reference and "references" not in spec.abilities:
        yield f"the draft's references are left out: {spec.name} takes none"
    if draft.model not in SPECS or "model" not in draft.model_fields_set:
        return
    usual = _usual(SPECS[draft.model], draft)
    chosen = [
        f"{name.replace('_', ' ')} {getattr(draft, name)}"
        for name in HOW
        if name in draft.model_fields_set - wish.model_fields_set and getattr(draft, name) not in (None, usual[name])
    ]
    if chosen:
        yield f"chosen for {draft.model} and not for {spec.name}, so left out: {', '.join(chosen)}"


def _usual(spec: Spec, draft: Request) -> dict[str, Any]:
    """How a model runs where nobody chooses."""
    size = draft.width or spec.size[0], draft.height or spec.size[1]
    own = {name: getattr(spec, name) for name in ("steps", "guidance", "solver", "schedule")}
    own["shift"] = shift_for(spec, *size, draft.steps or spec.steps)
    return {name: DEFAULTS[name] for name in HOW} | own


def _quoted(value: Any) -> str:
    return repr(short_name(value)) if isinstance(value, str) else str(value)
