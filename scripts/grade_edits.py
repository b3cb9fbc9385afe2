"""Grade a model's edits of held-out scenes: the change that was asked for, and all that should stay.

    python scripts/grade_edits.py --date 2026-11-30 --model runs/edit/model [--each 10] [--record pocket-edit-cpu]

The suite is `inkstream.evaluate.edits`: `--each` edits of each kind, of scenes that no training run sees, in words that
no training instruction has; one in three is Chinese. Picture i has seed i, and none is chosen. Beside the model, the
start pictures themselves are graded ("nothing done"), and the wanted pictures after encoding and decoding ("at best").
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from PIL import Image

import inkstream
from inkstream import Request
from inkstream.bench.records import write_record
from inkstream.engine.pictures.inputs import to_image, to_pixels
from inkstream.evaluate.edits import EditCase, EditMarks, edit_cases, grade_edit
from inkstream.families import Family
from inkstream.pocket.draw import render
from inkstream.pocket.edits import EDIT_KINDS

COMMAND = "python scripts/grade_edits.py --date {} --model {} --each {} --record {}"
SIDE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--model", required=True, help="a name or a folder, such as runs/edit/model")
    parser.add_argument("--name", help="the model's name in the record; default: --model")
    parser.add_argument("--each", type=int, default=10, help="edits of each kind")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--sheet", help="save the first two edits of each kind to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    family = inkstream.load(options.model, inkstream.Machine("cpu")).family
    cases = list(edit_cases(options.each))
    drawn = [edited(engine, options.model, case, number) for number, case in enumerate(cases)]
    found = {
        "model": [grade_edit(picture, case.edit) for picture, case in zip(drawn, cases)],
        "nothing done": [grade_edit(render(case.edit.before, SIDE), case.edit) for case in cases],
        "at best": [grade_edit(through(family, case), case.edit) for case in cases],
    }
    rows = [
        row(name, kind, [mark for mark, case in zip(marks, cases) if kind in ("all", case.edit.kind)])
        for name, marks in found.items()
        for kind in ((*EDIT_KINDS, "all") if name == "model" else ("all",))
    ]
    for one in rows:
        print(one)
    if options.sheet:
        sheet_of(cases, drawn, options.each).save(options.sheet, optimize=True)
    if options.record:
        named = options.name or options.model
        command = COMMAND.format(options.date, named, options.each, options.record)
        print(write_record(options.record, options.date, command, {}, rows))


def edited(engine: inkstream.Engine, model: str, case: EditCase, seed: int) -> Image.Image:
    """Edit the scene's picture as `inkstream edit` does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "before.png"
        render(case.edit.before, SIDE).save(path)
        request = Request(model=model, prompt=case.instruction, reference=(str(path),), seed=seed)
        picture = engine.generate(request).images[0]
    marks = grade_edit(picture, case.edit)
    print(seed, case.edit.kind, case.instruction, marks, file=sys.stderr, flush=True)
    return picture


def through(family: Family, case: EditCase) -> Image.Image:
    """Return the wanted picture after the autoencoder, which limits what a model can draw."""
    pixels = to_pixels(render(case.edit.after, SIDE), SIDE, SIDE)
    with torch.inference_mode():
        return to_image(family.decode(family.encode_image(pixels[None]))[0].float())


def row(name: str, kind: str, marks: list[EditMarks]) -> dict[str, Any]:
    return {
        "graded": name,
        "kind": kind,
        "pictures": len(marks),
        "asked": round(mean(mark.asked for mark in marks), 4),
        "facts": round(mean(mark.facts for mark in marks), 4),
        "kept": round(mean(mark.kept for mark in marks), 4),
        "both": round(mean(mark.asked and mark.kept for mark in marks), 4),
    }


def sheet_of(cases: list[EditCase], drawn: list[Image.Image], each: int) -> Image.Image:
    """Return the first two edits of each kind: above the start picture, below the result."""
    gap, shown = 4, [kind * each + number for kind in range(len(EDIT_KINDS)) for number in range(min(each, 2))]
    sheet = Image.new("RGB", (len(shown) * (SIDE + gap) - gap, 2 * SIDE + gap), "white")
    for column, index in enumerate(shown):
        for line, picture in enumerate((render(cases[index].edit.before, SIDE), drawn[index])):
            sheet.paste(picture, (column * (SIDE + gap), line * (SIDE + gap)))
    return sheet


if __name__ == "__main__":
    main()
