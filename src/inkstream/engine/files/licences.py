"""Licences of models, and the setting that allows only models for commercial use."""

from __future__ import annotations

import os
from pathlib import Path

from inkstream.families import CARD, SPECS
from inkstream.types import InputError, Spec

SETTING = "INKSTREAM_COMMERCIAL_ONLY"
"""The environment variable that turns the setting on for every command; empty, 0, no, off and false leave it off."""

FREE = frozenset({"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0"})
"""Licences that allow commercial use of a model, by their names on the hub. For others, the model's card decides."""

UNKNOWN = Spec.licence


def known_as(name: str) -> Spec | None:
    """The known model of that name or repository; None for an existing path and for unknown names."""
    if name in SPECS or Path(name).expanduser().exists():
        return SPECS.get(name)
    return next((spec for spec in SPECS.values() if spec.repo == name), None)


def in_words(licence: str, commercial: bool) -> str:
    """A licence in words, such as: apache-2.0, commercial use allowed."""
    return f"{licence}, {'commercial use allowed' if commercial else 'no commercial use'}"


def is_commercial_only(asked: bool | None = None) -> bool:
    """Whether only models for commercial use are allowed. asked: the caller's choice; None takes the setting."""
    if asked is not None:
        return asked
    return os.environ.get(SETTING, "").strip().lower() not in ("", "0", "no", "off", "false")


def check_licence(name: str, spec: Spec | None) -> None:
    """InputError if a model's licence forbids commercial use or is unknown. spec: None for an unknown model."""
    if spec is not None and spec.commercial:
        return
    needed: frozenset[str] = frozenset() if spec is None else spec.abilities & {"image", "mask", "references"}
    others = [s.name for s in SPECS.values() if s.commercial and (s.repo or s.folder) and needed <= s.abilities]
    instead = f"take {', '.join(others)} (--commercial-only or {SETTING} is on)"
    if spec is None or spec.licence == UNKNOWN:
        stated = '{"licence": "apache-2.0", "commercial": true}'
        raise InputError(
            f"the licence of {name} is unknown, so commercial use is not allowed: "
            f"state it in {CARD} beside a local copy, as in {stated}, or {instead}"
        )
    raise InputError(f"the licence of {name}, {spec.licence}, does not allow commercial use: {instead}")
