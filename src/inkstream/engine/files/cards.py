"""Cards: inkstream.json, the file with facts about a model that its other files do not hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, StrictBool, ValidationError

from inkstream.engine.files.licences import FREE
from inkstream.types import GuidanceKind, InputError, Request, Spec


def write_card(spec: Spec) -> dict[str, Any]:
    """The fields of a Spec that the folder's other files do not hold, as JSON. `read_card` is the inverse."""
    return {
        "title": spec.title,
        "licence": spec.licence,
        "commercial": spec.commercial,
        "steps": spec.steps,
        "guides": spec.guides,
        "guidance": spec.guidance,
        "size": list(spec.size),
        "solver": spec.solver,
        "schedule": spec.schedule,
        "abilities": sorted(spec.abilities),
        **({"writer": spec.writer} if spec.writer else {}),
    }


class _Card(BaseModel):
    """The fields of a card that a Request does not have. For a missing field, the family's value holds."""

    title: str | None = None
    licence: str | None = None
    commercial: StrictBool | None = None
    guides: GuidanceKind | None = None
    size: tuple[int, int] | None = None
    abilities: frozenset[str] | None = None
    writer: Literal["", "scenes", "edits"] | None = None


def read_card(card: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A card's fields as fields of a Spec. InputError if a value is invalid.

    A licence in FREE implies `commercial`, unless the card says otherwise.
    """
    drawn = {name: card[name] for name in ("steps", "guidance", "solver", "schedule") if name in card}
    try:
        said = _Card.model_validate(card).model_dump(exclude_none=True)
        width, height = said.get("size", (None, None))
        request = Request(width=width, height=height, **drawn)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{first['loc'][0]} is {first['input']!r}"
        raise InputError(f"{path} is not a valid model card ({problem}): correct or remove it") from error
    if said.get("licence", "").lower() in FREE:
        said.setdefault("commercial", True)
    return {**said, **request.model_dump(include=set(drawn))}
