"""Refining: builds the request that draws a draft picture again, with another model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from inkstream.engine.drawing.complete import shift_for
from inkstream.engine.drawing.options import options
from inkstream.engine.pictures.inputs import fit_size, open_picture, read_source, short_name
from inkstream.families import SPECS
from inkstream.sampling.schedules import shifted
from inkstream.types import REPAINTING, InputError, Request, Spec

Way = Literal["strength", "reference"]
"""How the draft is given to the model: as the start picture, with noise added, or as a reference picture."""

LEVEL = 0.65
"""The default noise level of the start: the layout of the draft is kept, the details are drawn again."""

HOW = (
    "steps", "guidance", "solver", "schedule", "shift", "cfg_normalization", "cfg_truncation", "guidance_from",
    "guidance_until", "cache", "cache_threshold",
)  # fmt: skip
"""Fields that depend on the model. The draft's values are never taken over, since they do not fit another model."""

DEFAULTS = {name: field.default for name, field in Request.model_fields.items()}


@dataclass(frozen=True)
class Refinement:
    """The request that refines a draft, its way, and lines of information for the user."""

    request: Request
    way: Way
    lines: tuple[str, ...]


def refined(wish: Request, draft: Request, picture: str, spec: Spec, way: Way | None = None) -> Refinement:
    """The request that refines `picture` with the model that `wish` names.

    wish: the user's request. Its set fields take precedence; a strength chooses the way "strength". draft: the known
    fields of the request that drew the picture; its prompt, negative prompt, seed and references are taken over if the
    model honours them. picture: a path or a `data:` URL; its size, floored to the model's multiple, is the request's.
    spec: of the model.

    A draft read from a file is untrusted: its references may name any file of this machine, and a server must clear
    them. InputError if there is no prompt, or the model cannot refine in this way.
    """
    way = way_for(spec, "strength" if wish.strength is not None else way)
    taken: dict[str, Any] = {}
    lines = [""]
    for name in ("prompt", "negative_prompt", "seed"):
        if name in draft.model_fields_set:
            taken[name] = getattr(draft, name)
    taken |= wish.model_dump(include=wish.model_fields_set - {"image", *REPAINTING, "reference", "count"})
    if not taken.get("prompt", "").strip() and not draft.reference:
        raise InputError(f"{short_name(picture)} carries no prompt: give one with --prompt")
    taken["width"], taken["height"] = _size(wish, picture, spec.multiple)
    shown = draft.reference if "references" in spec.abilities else ()
    if way == "reference":
        taken["reference"] = (*shown, picture)  # last, so that 'image 1' in the prompt still means the same picture
    else:
        taken |= {"image": picture, "reference": shown}
        taken.setdefault("strength", _strength(wish, spec, taken["width"], taken["height"]))
    for name, option in options(spec, Request.model_validate(taken)).items():
        if option.effect == "ignores" and taken.get(name, DEFAULTS[name]) != DEFAULTS[name]:
            lines.append(f"{name.replace('_', ' ')} {_quoted(taken.pop(name))} is left out: {option.why}")
    lines += _left_out(draft, wish, spec)
    request = Request.model_validate(taken)
    if way == "reference":
        lines[0] = f"{spec.name} takes {short_name(picture)} as a reference (--strength starts from it instead)"
    else:
        other = " (--reference takes it as a reference)" if "references" in spec.abilities else ""
        lines[0] = f"{spec.name} starts from {short_name(picture)}, at strength {request.strength:g}{other}"
    return Refinement(request, way, tuple(lines))


def way_for(spec: Spec, way: Way | None = None) -> Way:
    """The given way, or the model's better one. InputError if the model cannot refine, or not in the given way.

    "reference" is better in general: a model with references is trained to keep their content. If the model encodes
    references like text (it has an image encoder), they carry no layout, and "strength" is better.
    """
    able = spec.abilities
    has: dict[Way, bool] = {"reference": "references" in able, "strength": "image" in able}
    order: list[Way] = ["reference", "strength"] if spec.image_encoder is None else ["strength", "reference"]
    takes_drafts = not able & {"map", "fill"}  # these models need another kind of picture
    ways: list[Way] = [name for name in order if has[name] and takes_drafts]
    if not ways:
        raise InputError(f"{spec.name} cannot refine pictures: take a model with a start picture or references")
    if way is None:
        return ways[0]
    if way not in ways:
        raise InputError(f"{spec.name} cannot refine by {way}: leave --{way} out to refine by {ways[0]}")
    return way


def origin(picture: str, draft: Request) -> dict[str, Any]:
    """The draft's entry in a refined picture's metadata, as JSON: its file name, sha256, model and seed."""
    known = {name: getattr(draft, name) for name in ("model", "seed") if name in draft.model_fields_set}
    return {"picture": short_name(picture), "sha256": hashlib.sha256(read_source(picture)).hexdigest(), **known}


def _size(wish: Request, picture: str, multiple: int) -> tuple[int, int]:
    """Width and height: the wish's, else the picture's. If the wish has only one, the aspect ratio gives the other."""
    image = open_picture(picture)
    width, height = fit_size(image, multiple)
    if wish.width is not None:
        width, height = wish.width, max(multiple, round(wish.width * image.height / image.width / multiple) * multiple)
    if wish.height is not None:
        scaled = round(wish.height * image.width / image.height / multiple) * multiple
        width, height = wish.width or max(multiple, scaled), wish.height
    return width, height


def _strength(wish: Request, spec: Spec, width: int, height: int) -> float:
    """The strength that starts at the noise level LEVEL. It depends on the schedule's shift."""
    shift = wish.shift or shift_for(spec, width, height, wish.steps or spec.steps)
    return round(shifted(LEVEL, 1 / shift), 2)


def _left_out(draft: Request, wish: Request, spec: Spec) -> Iterator[str]:
    """A line for each kind of field that was set for the draft and is not taken over."""
    pictures = [name for name in ("image", "mask", "mask_from", "extend") if getattr(draft, name) is not None]
    if pictures:
        yield f"the draft's own {' and '.join(pictures)} is left out: the draft was drawn from it"
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
        yield f"left out, as set for {draft.model} and not for {spec.name}: {', '.join(chosen)}"


def _usual(spec: Spec, draft: Request) -> dict[str, Any]:
    """A model's default values of the fields HOW."""
    size = draft.width or spec.size[0], draft.height or spec.size[1]
    own = {name: getattr(spec, name) for name in ("steps", "guidance", "solver", "schedule")}
    own["shift"] = shift_for(spec, *size, draft.steps or spec.steps)
    return {name: DEFAULTS[name] for name in HOW} | own


def _quoted(value: Any) -> str:
    return repr(short_name(value)) if isinstance(value, str) else str(value)
