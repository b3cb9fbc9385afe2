"""Readers of other programs' metadata. All of it is untrusted.

`a1111` reads the parameters text, `flat` the JSON of one object, `comfyui` graphs; `READERS` is their table. What they
share, and the names of solvers, schedules and models, is in `reading`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from inkstream.engine.pictures.foreign.comfyui import read_comfyui
from inkstream.engine.pictures.foreign.flat import (
    read_civitai,
    read_draw_things,
    read_fooocus,
    read_invokeai,
    read_makers_tags,
    read_mflux,
    read_ruined_fooocus,
    read_swarmui,
    read_texts_of_settings,
)
from inkstream.engine.pictures.foreign.reading import Reading

Program = Literal[
    "swarmui", "mflux", "invokeai", "drawthings", "ruinedfooocus", "fooocus", "comfyui", "civitai",
    "easydiffusion", "blackforestlabs",
]  # fmt: skip
READERS: Mapping[Program, Callable[[Mapping[str, Any]], Reading | None]] = {
    "swarmui": read_swarmui,
    "mflux": read_mflux,
    "invokeai": read_invokeai,
    "drawthings": read_draw_things,
    "ruinedfooocus": read_ruined_fooocus,
    "fooocus": read_fooocus,
    "comfyui": read_comfyui,
    "civitai": read_civitai,
}
"""Program -> the reader of its JSON, which returns None for another program's. They are tried in this order."""

SEVERAL: Mapping[Program, Callable[[Mapping[str, str]], Reading | None]] = {
    "easydiffusion": read_texts_of_settings,
    "blackforestlabs": read_makers_tags,
}
"""Program -> the reader of all texts of a picture, for programs that keep each setting in a text of its own."""
