"""`inkstream control`: draws maps of pictures (edges, lines, depth, poses), and lists them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from inkstream.cli.generate import find_place
from inkstream.cli.lines import print_facts, print_json
from inkstream.types import InputError


def control(
    name: Annotated[str | None, Parameter(show_default=False)] = None,
    source: Annotated[str | None, Parameter(show_default=False)] = None,
    *,
    width: Annotated[int | None, Parameter(alias="-W", show_default=False)] = None,
    height: Annotated[int | None, Parameter(alias="-H", show_default=False)] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=(), show_default=False)] = None,
    output: Annotated[str | None, Parameter(alias="-o", show_default=False)] = None,
    json: Annotated[bool, Parameter(show_default=False)] = False,
) -> None:
    """Draw a map of a picture for models that follow one, or list the maps.

    Parameters
    ----------
    name
        A map, such as canny. Without one, the maps are listed.
    source
        A picture; for a pose, a JSON file of keypoints as OpenPose writes it.
    width
        Width of the map in pixels; default: the picture's.
    height
        Height of the map in pixels; default: the picture's.
    set_
        Change a setting of the map, such as low=0.2; repeat for more. The list of maps shows them.
    output
        Output file (.png, .webp, .jpg) or folder; default: the current folder. Existing files are not overwritten.
    json
        Print one JSON document on stdout.
    """
    from inkstream.engine.pictures.maps import check_settings, known, map_of
    from inkstream.engine.pictures.metadata import picture_format, write_new

    if name is None:
        list_maps(json)
        return
    name = known(name)
    if source is None:
        raise InputError(f"there is no picture: inkstream control {name} PICTURE draws its map")
    settings = read_settings(set_ or [])
    check_settings(name, settings)
    if (width is None) != (height is None):
        raise InputError("--width and --height are given together: give both, or leave both out")
    for side in (width, height):
        if side is not None and not 16 <= side <= 8192:
            raise InputError(f"a side of {side} pixels is out of range: take 16 to 8192")
    size = (width, height) if width is not None and height is not None else None
    place = find_place(output, 1, lambda request, index: f"{Path(source).stem[:80] or 'map'}-{name}")
    drawn = map_of(name, source, size, **settings)
    path = place(None, 0)  # type: ignore[arg-type]  # the name does not depend on a request
    buffer = io.BytesIO()
    drawn.save(buffer, picture_format(path), quality=95, lossless=True)
    write_new(path, buffer.getvalue())
    facts = {"path": str(path), "map": name, "width": drawn.width, "height": drawn.height}
    print_json(facts) if json else print(path)


def read_settings(given: list[str]) -> dict[str, str]:
    """Read settings written as key=value."""
    settings: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {text} is not KEY=VALUE: write it like --set low=0.2")
        settings[key.strip()] = value.strip()
    return settings


def list_maps(as_json: bool) -> None:
    """Print each map with a line, its settings, and what it lacks on this machine."""
    from inkstream.engine.pictures.maps import ALIASES, MAPS, missing

    if as_json:
        print_json([describe(name) for name in MAPS])
        return
    facts: dict[str, Any] = {}
    for name, kind in MAPS.items():
        other = [alias for alias, own in ALIASES.items() if own == name]
        facts[name] = kind.line + (f" Also called {', '.join(other)}." if other else "")
    print_facts(facts)
    print("settings, for --set:")
    print_facts(
        {
            f"{name} {key}": setting.line + ("" if setting.default is None else f" Default: {setting.default:g}.")
            for name, kind in MAPS.items()
            for key, setting in kind.settings.items()
        },
        "  ",
    )
    lines = [line for name in MAPS if (line := missing(name))]
    print("not installed:" if lines else "everything is installed")
    for line in lines:
        print(f"  {line}")


def describe(name: str) -> dict[str, Any]:
    """Return what is known of a map, as JSON."""
    from inkstream.engine.pictures.maps import ALIASES, MAPS, missing

    return {
        "name": name,
        "other_names": [alias for alias, own in ALIASES.items() if own == name],
        "meaning": MAPS[name].line,
        "settings": {
            key: {"meaning": setting.line, "default": setting.default, "least": setting.least, "most": setting.most}
            if setting.default is not None
            else {"meaning": setting.line}
            for key, setting in MAPS[name].settings.items()
        },
        "missing": missing(name),
    }
