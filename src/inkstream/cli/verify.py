"""`inkstream verify`: whether pictures show what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from inkstream.cli.lines import print_json
from inkstream.cli.terminal import Terminal
from inkstream.types import InputError

if TYPE_CHECKING:
    from inkstream.evaluate.likeness import Metric


def verify(
    pictures: tuple[Path, ...],
    *,
    text: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    colour: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    metric: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    prompt: Annotated[str | None, Parameter(show_default=False)] = None,
    json: Annotated[bool, Parameter(show_default=False)] = False,
) -> int:
    """Verify that pictures show what was asked for.

    Parameters
    ----------
    pictures
        Picture files. Several are also compared: duplicates, and how much they differ.
    text
        A text that must be written in each picture; repeat the option for more. Needs the extra "ocr".
    colour
        A colour that an area of each picture must have, as a hex code such as #ff8000; repeat the option for more.
    metric
        Also tell how well each picture fits its prompt: clip:FOLDER, siglip:FOLDER or pickscore:FOLDER, with such a
        model as transformers saves it. Repeat the option for more. Needs the extra "flux".
    prompt
        The prompt for --metric; default: the one in the picture's metadata.
    json
        Print one JSON document on stdout.
    """
    from inkstream.engine.pictures.asked import Asked, asked_in, read_colour
    from inkstream.engine.pictures.inputs import open_picture
    from inkstream.engine.pictures.metadata import prompts_in
    from inkstream.evaluate.verify import compare_layouts, layout_of, verify

    if prompt is not None and not metric:
        raise InputError("--prompt is for --metric: name a metric, or leave --prompt out")
    if not pictures:
        raise InputError("there is no picture: give one, as in inkstream verify poster.png --text SALE")
    if "" in (words.strip() for words in text):
        raise InputError("--text is empty: give the text that the picture must show")
    given = Asked(text, tuple(map(read_colour, colour)))
    found, layouts = {}, {}
    values: dict[str, dict[str, float]] = {}
    with Terminal() as terminal:
        metrics = open_metrics(metric)
        for number, path in enumerate(dict.fromkeys(map(str, pictures))):
            terminal.wait("verifying", number, len(pictures))
            picture, (prompt_of, own) = open_picture(path), ("", "") if given else prompts_in(path)
            found[path] = verify(picture, given or asked_in(prompt_of, own), own)
            layouts[path] = layout_of(picture)
            words = prompts_in(path)[1] if metrics and prompt is None else prompt or ""
            if metrics and not words:
                raise InputError(f"{path} has no prompt in its metadata: give one with --prompt")
            values[path] = {one.name: round(one(picture, words), 4) for one in metrics}
    duplicates, diversity = compare_layouts(layouts)
    passed = all(verified.passed for verified in found.values())
    if json:
        each = [{"picture": path, **verified.to_json(), "metrics": values[path]} for path, verified in found.items()]
        print_json({"passed": passed, "pictures": each, "duplicates": duplicates, "diversity": diversity})
        return 0 if passed else 1
    for path, verified in found.items():
        nothing = "nothing was asked for: give --text or --colour"
        lines = [check.line for check in (*verified.checks.texts, *verified.checks.colours, *verified.things)]
        lines += ["blank: all pixels have one colour"] if verified.quality.blank else []
        verdict = "wrong" if not verified.passed else "right" if not verified.empty else nothing
        print(f"{path}: {verdict}")
        quality = verified.quality
        clipped = f"{quality.dark:.1%} black, {quality.bright:.1%} white"
        seams = f", lines across the picture at {', '.join(quality.seams)}" if quality.seams else ""
        lines += [f"{name}: {value:g}" for name, value in values[path].items()]
        for line in (*lines, *verified.notes, f"sharpness {quality.sharpness:g}, {clipped}{seams}"):
            print(f"  {line}")
    for a, b in duplicates:
        print(f"{a} and {b} are duplicates")
    if diversity is not None:
        print(f"diversity: {diversity} (mean deltaE2000 of colour layouts; 0 if all pictures are equal)")
    return 0 if passed else 1


def open_metrics(names: Sequence[str]) -> list[Metric]:
    """Read the metrics of some names. Only metrics import torch. Raises InputError."""
    if not names:
        return []
    from inkstream.evaluate.likeness import Metric

    return [Metric(name) for name in names]
