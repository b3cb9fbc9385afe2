"""What a model does with each option of a Request: the one table that lists, refuses and advises. No torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from inkstream.families import SPECS
from inkstream.types import InputError, Request, Spec

Effect = Literal["honours", "ignores", "rejects"]

GUIDED = ("cfg_normalization", "cfg_truncation", "guidance_from", "guidance_until")
"""Options that say how two predictions become one, and when."""
FEW = 8
"""Steps of a model that was distilled to few: each does so much that none is like the one before."""
UNSHIFTED = ("linear_quadratic", "bong_tangent")
"""Schedules that use no shift."""


class Option(NamedTuple):
    """What a model does with an option, and why; where it honours it, what to know before giving it."""

    effect: Effect
    why: str = ""
    needed: bool = False  # nothing is drawn without it


HONOURED = Option("honours")


def options(spec: Spec, request: Request | None = None) -> dict[str, Option]:
    """Every field of a Request -> what the model does with it, whatever else is asked; or beside what `request` asks.

    Fields that `request` leaves open count as the model's own.
    """
    table = {
        **dict.fromkeys(Request.model_fields, HONOURED),
        **_guidance(spec, request),
        **_pictures(spec, request),
        **_prompt(spec, request),
        **_cache(spec, request),
    }
    if request is not None and (schedule := request.schedule or spec.schedule) in UNSHIFTED:
        table["shift"] = Option("ignores", f"schedule {schedule} uses none")
    return table


def refuse(request: Request, spec: Spec) -> None:
    """InputError where a request asks for what the model cannot do, or leaves out what it cannot do without."""
    for name, option in options(spec, request).items():
        given = getattr(request, name) != Request.model_fields[name].default
        if (given and option.effect == "rejects") or (option.needed and not given):
            raise InputError(option.why)
    if "map" in spec.abilities and len(request.reference) > 1:
        raise InputError(f"{spec.name} follows one map, and {len(request.reference)} references were given: give one")


def guided(request: Request, spec: Spec) -> bool:
    """Whether a request asks for the negative prompt at all."""
    guidance = spec.guidance if request.guidance is None else request.guidance
    return spec.guides == "twice" and guidance > 1


def cached(request: Request, spec: Spec) -> bool:
    """Whether a request's steps take over from each other."""
    return request.cache != "none" and spec.steps > FEW


def _cache(spec: Spec, request: Request | None) -> dict[str, Option]:
    if spec.steps <= FEW:
        why = f"{spec.name} draws in {spec.steps} steps, too unlike for one to take over from another"
        return dict.fromkeys(("cache", "cache_threshold"), Option("ignores", why))
    if request is None:
        return {"cache_threshold": Option("honours", "only with a cache")}
    if request.cache == "none":
        return {"cache_threshold": Option("ignores", "there is no cache: give one, such as first-block")}
    return {}


def _prompt(spec: Spec, request: Request | None) -> dict[str, Option]:
    table: dict[str, Option] = {}
    if request is not None and request.prompt.lstrip().startswith('{"') and "json" not in spec.abilities:
        table["prompt"] = Option("honours", f"it is JSON, which {spec.name} was not made for and reads as plain text")
    if "upsample" not in spec.abilities and (request is None or request.upsample):
        why = f"{spec.name} cannot upsample a prompt: leave upsample out, or take {_one_with('upsample')}"
        table["upsample"] = Option("rejects", why)
    elif request is not None and request.upsample and request.reference and "upsample_references" not in spec.abilities:
        other = _one_with("upsample_references")
        why = f"the language model of {spec.name} sees no references: leave upsample out, or take {other}"
        table["upsample"] = Option("rejects", why)
    return table


def _one_with(ability: str) -> str:
    """A known model that has it."""
    return next(spec.name for spec in SPECS.values() if ability in spec.abilities and spec.repo)


def _guidance(spec: Spec, request: Request | None) -> dict[str, Option]:
    asked_twice = ("negative_prompt", *GUIDED)  # what matters only then
    if spec.guides != "twice":
        read = f"{spec.name} reads its guidance as a number and is asked with the prompt alone"
        why = read if spec.guides == "read" else f"{spec.name} was distilled without guidance"
        table: dict[str, Option] = dict.fromkeys(asked_twice, Option("ignores", why))
        table["negative_prompt"] = Option("ignores", f"{why}: say in the prompt what you want instead")
        return table if spec.guides == "read" else {"guidance": Option("ignores", why), **table}
    made_for_it = "guidance" in spec.abilities
    if request is not None and not guided(request, spec):
        remedy = "raise it above 1" if made_for_it else "say it in the prompt, or take a model that guides"
        return dict.fromkeys(asked_twice, Option("ignores", f"guidance is off: {remedy}"))
    if made_for_it:
        return {}
    why = f"{spec.name} was distilled without it; above 1 it doubles the time and may harm the picture"
    note = "" if request is not None else "only with guidance above 1"
    return {"guidance": Option("honours", why), **dict.fromkeys(asked_twice, Option("honours", note))}


def _pictures(spec: Spec, request: Request | None) -> dict[str, Option]:
    able, name = spec.abilities, spec.name
    table: dict[str, Option] = {}
    if request is not None and request.image is None:
        for field in ("mask", "strength"):
            why = f"{field} needs a picture to start from: give image as well, or leave {field} out"
            table[field] = Option("rejects", why)
    for field in ("image", "mask"):
        if field not in able:
            table[field] = Option("rejects", f"{name} takes no {field}: leave it out, or take a model that does")
    if "image" not in able:
        table["strength"] = table["image"]
    if "fill" in able:
        needed = Option("honours", f"{name} repaints part of a picture: give image and mask", needed=True)
        drawn = Option("ignores", f"{name} paints what is masked anew, from noise alone")
        table |= {"image": needed, "mask": needed, "strength": drawn}
    if "map" in able:
        table["reference"] = Option("honours", f"{name} follows one map: give it as reference", needed=True)
    elif "references" not in able:
        why = f"{name} takes no references: leave them out, or take a model that does"
        table["reference"] = Option("rejects", why)
    return table
