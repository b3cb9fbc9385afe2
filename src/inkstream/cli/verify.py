"""`inkstream verify`: whether pictures show what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from inkstream.cli.lines import print_json
from inkstream.cli.terminal import Terminal
from inkstream.types import InputError


def verify(
    pictures: tuple[Path, ...],
    *,
    text: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    colour: Annotated[tuple[str, ...], Parameter(negative=())] = (),
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
    json
        Print one JSON document on stdout.
    """
    from inkstream.engine.pictures.asked import Asked, asked_in, read_colour
    from inkstream.engine.pictures.inputs import open_picture
    from inkstream.engine.pictures.metadata import prompt_in
    from inkstream.evaluate.verify import compare_layouts, layout_of, verify

    if not pictures:
        raise InputError("there is no picture: give one, as in inkstream verify poster.png --text SALE")
    if "" in (words.strip() for words in text):
        raise InputError("--text is empty: give the text that the picture must show")
    given = Asked(text, tuple(map(read_colour, colour)))
    found, layouts = {}, {}
    with Terminal() as terminal:
        for number, path in enumerate(dict.fromkeys(map(str, pictures))):
            terminal.wait("verifying", number, len(pictures))
            picture, prompt = open_picture(path), "" if given else prompt_in(path)
            found[path] = verify(picture, given or asked_in(prompt), prompt)
            layouts[path] = layout_of(picture)
    duplicates, diversity = compare_layouts(layouts)
    passed = all(verified.passed for verified in found.values())
    if json:
        each = [{"picture": path, **verified.to_json()} for path, verified in found.items()]
        print_json({"passed": passed, "pictures": each, "duplicates": duplicates, "diversity": diversity})
        return 0 if passed else 1
    for path, verified in found.items():
        nothing = "nothing was asked for: give --text or --colour"
        lines = [check.line for check in (*verified.checks.texts, *verified.checks.colours)]
        lines += [
            f"things: {thing.found}" + ("" if thing.right else f", not {thing.wanted}") for thing in verified.things
        ]
        lines += ["blank: all pixels have one colour"] if verified.quality.blank else []
        verdict = "wrong" if not verified.passed else "right" if not verified.empty else nothing
        print(f"{path}: {verdict}")
        quality = verified.quality
        clipped = f"{quality.dark:.1%} black, {quality.bright:.1%} white"
        seams = f", lines across the picture at {', '.join(quality.seams)}" if quality.seams else ""
        for line in (*lines, *verified.notes, f"sharpness {quality.sharpness:g}, {clipped}{seams}"):
            print(f"  {line}")
    for a, b in duplicates:
        print(f"{a} and {b} are duplicates")
    if diversity is not None:
        print(f"diversity: {diversity} (mean deltaE2000 of colour layouts; 0 if all pictures are equal)")
    return 0 if passed else 1
