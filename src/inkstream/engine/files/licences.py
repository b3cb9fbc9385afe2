"""Licences of models: what they are in words, and the setting under which only those for commercial use draw."""

from __future__ import annotations

import os
from pathlib import Path

from inkstream.families import CARD, SPECS
from inkstream.types import InputError, Spec

SETTING = "INKSTREAM_COMMERCIAL_ONLY"
"""The environment variable that turns it on for every command and program; empty, 0, no, off and false leave it off."""

FREE = frozenset({"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0"})
"""Licences, as the hub writes them, that allow commercial use of a model. Of any other its card has to say so."""


UNKNOWN = Spec.licence


def known_as(name: str) -> Spec | None:
    """The known model of that name, or of that repository; a path that is there is none."""
    if name in SPECS or Path(name).expanduser().exists():
        return SPECS.get(name)
    return next((spec for spec in SPECS.values() if spec.repo == name), None)


def in_words(licence: str, commercial: bool) -> str:
    """apache-2.0, commercial use allowed."""
    return f"{licence}, {'commercial use allowed' if commercial else 'no commercial use'}"


def is_commercial_only(asked: bool | None = None) -> bool:
    """Whether only models for commercial use may draw: what was asked, or else the setting."""
    if asked is not None:
        return asked
    return os.environ.get(SETTING, "").strip().lower() not in ("", "0", "no", "off", "false")


def check_licence(name: str, spec: Spec | None) -> None:
    """InputError where a model's licence does not allow commercial use, or is not known. spec: None is not known."""
    if spec is not None and spec.commercial:
        return
    needed = frozenset() if spec is None else spec.abilities & {"image", "mask", "references"}
    others = [s.name for s in SPECS.values() if s.commercial and (s.repo or s.folder) and needed <= s.abilities]
    instead = f"take {', '.join(others)} (--commercial-only or {SETTING} is on)"
    if spec is None or spec.licence == UNKNOWN:
        stated = '{"licence": "apache-2.0", "commercial": true}'
        raise InputError(
            f"the licence of {name} is not known, so it is not taken for commercial use: "
            f"state it in {CARD} beside a local copy, as in {stated}, or {instead}"
        )
    raise InputError(f"{name} is not for commercial use, says its licence, {spec.licence}: {instead}")
