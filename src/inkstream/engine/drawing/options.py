"""The effect of each option of a Request on each model. Lists, errors and advice all come from this table. No torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from inkstream.engine.files.controls import uses_of
from inkstream.engine.pictures.asked import asked_in
from inkstream.families import SPECS
from inkstream.types import REPAINTING, InputError, Request, Spec

Effect = Literal["honours", "ignores", "rejects"]

GUIDED = ("cfg_normalization", "cfg_truncation", "guidance_from", "guidance_until")
"""Options that say how, and at which times, the two predictions of guidance are combined."""
FEW = 8
"""A model with at most so many steps was distilled to few: its steps differ too much for a step cache."""
UNSHIFTED = ("linear_quadratic", "bong_tangent")
"""Schedules that use no shift."""


class Option(NamedTuple):
    """A model's effect for one option."""

    effect: Effect
    why: str = ""  # the reason and the remedy; of an option that is honoured, a remark
    needed: bool = False  # a request without the option is refused


HONOURED = Option("honours")


def options(spec: Spec, request: Request | None = None) -> dict[str, Option]:
    """Every field of a Request -> its effect on the model, in general, or together with the other fields of `request`.

    For fields that `request` leaves open, the model's own values count.
    """
    if spec.takes is not None:
        return _remote(spec, spec.takes)
    table = {
        **dict.fromkeys(Request.model_fields, HONOURED),
        **_guidance(spec, request),
        **_pictures(spec, request),
        **_prompt(spec, request),
        **_regions(spec, request),
        **_cache(spec, request),
        **_enlarging(spec, request),
    }
    if request is not None and (schedule := request.schedule or spec.schedule) in UNSHIFTED:
        table["shift"] = Option("ignores", f"schedule {schedule} uses no shift")
    if request is not None and (why := _nothing_to_verify(request, spec)):
        table["until_verified"] = Option("ignores", why)
    return table


def refuse(request: Request, spec: Spec) -> None:
    """InputError if a request has a field that the model rejects, or lacks a field that the model needs."""
    for name, option in options(spec, request).items():
        given = getattr(request, name) != Request.model_fields[name].default
        if (given and option.effect == "rejects") or (option.needed and not given):
            raise InputError(option.why)
    uses_of(request)
    if "map" in spec.abilities and len(request.reference) > 1:
        raise InputError(f"{len(request.reference)} references were given, {spec.name} follows one map: give one")


def guided(request: Request, spec: Spec) -> bool:
    """Whether a request uses classifier-free guidance, which evaluates the negative prompt too."""
    guidance = spec.guidance if request.guidance is None else request.guidance
    return spec.guides == "twice" and guidance > 1


def cached(request: Request, spec: Spec) -> bool:
    """Whether a request uses a step cache, in which a step reuses results of earlier steps."""
    return request.cache != "none" and spec.steps > FEW


def _nothing_to_verify(request: Request, spec: Spec) -> str:
    """Why no picture of a request is drawn again to be verified; empty if one may be."""
    if request.only_enlarges:
        return "nothing is drawn"
    if spec.writer or asked_in(request.prompt):  # a grammar finds texts without quotes too
        return ""
    return "the prompt asks for nothing to check: quote the text, or give colours as hex codes"


def _remote(spec: Spec, takes: frozenset[str]) -> dict[str, Option]:
    """The options of a remote model. It draws without a seed too, but never the same picture again."""
    no_seed = Option("ignores", f"{spec.name} takes no seed and draws another picture each time")
    return {
        name: HONOURED
        if name in takes
        else no_seed
        if name == "seed"
        else Option("rejects", f"{spec.name} takes no {name}: leave {name} out, or draw with a local model")
        for name in Request.model_fields
    }


def _cache(spec: Spec, request: Request | None) -> dict[str, Option]:
    """The options of the step cache."""
    if spec.steps <= FEW:
        why = f"{spec.name} draws in {spec.steps} steps, which differ too much for a cache"
        return dict.fromkeys(("cache", "cache_threshold"), Option("ignores", why))
    if request is None:
        return {"cache_threshold": Option("honours", "only with a cache")}
    if request.tile is not None:
        why = "windows have no step cache: leave tile out, or the cache"
        return dict.fromkeys(("cache", "cache_threshold"), Option("ignores", why))
    if request.cache == "none":
        return {"cache_threshold": Option("ignores", "cache is none: set it, for example to first-block")}
    return {}


def _prompt(spec: Spec, request: Request | None) -> dict[str, Option]:
    """The options of the prompt."""
    table: dict[str, Option] = {}
    if request is not None and request.prompt.lstrip().startswith('{"') and "json" not in spec.abilities:
        table["prompt"] = Option("honours", f"it is JSON, which {spec.name} reads as plain text")
    if "upsample" not in spec.abilities and (request is None or request.upsample):
        why = f"{spec.name} cannot upsample a prompt: leave upsample out, or take {_one_with('upsample')}"
        table["upsample"] = Option("rejects", why)
    elif request is not None and request.upsample and request.reference and "upsample_references" not in spec.abilities:
        other = _one_with("upsample_references")
        why = f"{spec.name} cannot upsample a prompt with references: leave upsample out, or take {other}"
        table["upsample"] = Option("rejects", why)
    elif request is not None and request.upsample and not request.reference and spec.writer == "edits":
        why = f"{spec.name} writes out instructions about a picture: give it as reference, or leave upsample out"
        table["upsample"] = Option("rejects", why)
    return table


def _regions(spec: Spec, request: Request | None) -> dict[str, Option]:
    """The option of boxes with texts of their own."""
    if "regions" not in spec.abilities:
        return {"regions": Option("rejects", f"{spec.name} takes no regions: leave them out")}
    if request is None or not request.regions:
        return {}
    if request.crop is not None:
        return {"regions": Option("rejects", "regions are boxes of the whole picture: leave out crop")}
    return {}


def _one_with(ability: str) -> str:
    """The name of the first known model with an ability."""
    return next(spec.name for spec in SPECS.values() if ability in spec.abilities and spec.repo)


def _guidance(spec: Spec, request: Request | None) -> dict[str, Option]:
    """The options of guidance."""
    for_two = ("negative_prompt", *GUIDED)  # options of guidance by two predictions
    if spec.guides != "twice":
        read = f"{spec.name} reads its guidance as a number and uses no negative prompt"
        why = read if spec.guides == "read" else f"{spec.name} was distilled without guidance"
        table: dict[str, Option] = dict.fromkeys(for_two, Option("ignores", why))
        table["negative_prompt"] = Option("ignores", f"{why}: say in the prompt what you want instead")
        return table if spec.guides == "read" else {"guidance": Option("ignores", why), **table}
    made_for_it = "guidance" in spec.abilities
    if request is not None and not guided(request, spec):
        remedy = "set it above 1" if made_for_it else "say it in the prompt, or take a model with guidance"
        return dict.fromkeys(for_two, Option("ignores", f"guidance is off: {remedy}"))
    if made_for_it:
        return {}
    why = f"{spec.name} was distilled without guidance; above 1 it doubles the time and may harm the picture"
    note = "" if request is not None else "only with guidance above 1"
    return {"guidance": Option("honours", why), **dict.fromkeys(for_two, Option("honours", note))}


def _repainting(request: Request) -> dict[str, Option]:
    """The options of repainting that have no effect beside the other fields of a request."""
    if not request.repaints:
        why = "it is for a part of a picture: give mask, mask_from or extend"
        how = [name for name in REPAINTING if name not in ("mask", "mask_from", "extend")]
        return dict.fromkeys(how, Option("ignores", why))
    if request.mask is None and request.mask_from is None:
        return {"mask_invert": Option("ignores", "there is no mask: give mask or mask_from")}
    return {}


def _enlarging(spec: Spec, request: Request | None) -> dict[str, Option]:
    """The options of enlarging a finished picture."""
    able, table = spec.abilities, dict[str, Option]()
    if request is None or request.upscale is None:
        if request is not None:
            why = "nothing is enlarged: give upscale"
            table["upscale_strength"] = Option("ignores", why)
            if request.image is None:
                table["upscaler"] = Option("ignores", f"{why}, or a start picture")
        return table
    if request.upscale_strength > 0 and ("image" not in able or able & {"fill", "map"}):
        why = f"{spec.name} does not draw a picture again: take upscale_strength 0, or leave upscale out"
        table["upscale"] = Option("rejects", why)
    elif request.upscale_strength > 0 and request.repaints:
        why = "a second pass changes what the mask keeps: take upscale_strength 0, or leave upscale out"
        table["upscale"] = Option("rejects", why)
    return table


def _pictures(spec: Spec, request: Request | None) -> dict[str, Option]:
    """The options of input pictures."""
    able, name = spec.abilities, spec.name
    table = {} if request is None else _repainting(request)
    if request is not None and request.image is None:
        for field in ("mask", "mask_from", "extend", "strength"):
            why = f"{field} needs a start picture: give image as well, or leave {field} out"
            table[field] = Option("rejects", why)
    if request is not None and request.mask is not None and request.mask_from is not None:
        table["mask_from"] = Option("rejects", "mask and mask_from were both given: leave one of them out")
    for field in ("image", "mask"):
        if field not in able:
            table[field] = Option("rejects", f"{name} takes no {field}: leave it out, or take a model that does")
    if "image" not in able:
        table["strength"] = table["image"]
    if "mask" not in able:
        table |= dict.fromkeys(REPAINTING, table["mask"])
    if "fill" in able:
        needed = Option("honours", f"{name} repaints part of a picture: give image and mask", needed=True)
        drawn = Option("ignores", f"{name} draws the masked region from noise alone")
        table |= {"image": needed, "strength": drawn, "mask_fill": drawn}
        hard = f"{name} repaints all of a masked region alike: leave mask_soft out"
        table["mask_soft"] = Option("rejects", hard)
        if request is None or not request.repaints:
            table["mask"] = needed
    if able & {"fill", "map"} or (request is not None and request.reference):
        why = "draws whole pictures" if able & {"fill", "map"} else "sees its references whole"
        table["tile"] = Option("rejects", f"{name} {why}, not windows: leave tile out")
    elif request is not None and "source" in able and request.repaints:
        why = f"{name} sees the picture that it repaints whole, not in windows: leave tile out"
        table["tile"] = Option("rejects", why)
    if "map" in able:
        table["reference"] = Option("honours", f"{name} follows one map: give it as reference", needed=True)
    elif "references" not in able:
        why = f"{name} takes no references: leave them out, or take a model that does"
        table["reference"] = Option("rejects", why)
    if "control" not in able:
        why = f"{name} takes no control nets: leave them out, or take {_one_with('control')}"
        table |= dict.fromkeys(("control", "control_nets"), Option("rejects", why))
    return table
