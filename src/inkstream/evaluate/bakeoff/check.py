"""Checks the pictures of a bake-off: texts, colours, things, what the graders see, and what went wrong."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from inkstream.engine.pictures.asked import Asked, asked_in
from inkstream.engine.pictures.ocr import open_reader
from inkstream.evaluate.bakeoff.run import PICTURES
from inkstream.evaluate.grades import Marks, grade
from inkstream.evaluate.report import Judged
from inkstream.evaluate.run import open_picture
from inkstream.evaluate.suites import Case
from inkstream.evaluate.verify import LAYOUT, verify
from inkstream.types import InputError

CHECKS = "checks.jsonl"


def can_read() -> bool:
    """Whether texts can be read: the extra `ocr` is installed."""
    try:
        open_reader()
    except InputError:
        return False
    return True


def asked_of(case: Case) -> Asked:
    """What a prompt asks for: the text that the suite says, else those that the prompt quotes, and its hex colours."""
    found = asked_in(case.prompt)
    texts = (
        tuple(" ".join(line.split()) for line in case.text.split("\n") if line.strip()) if case.text else found.texts
    )
    return Asked(texts, found.colours)


def check(picture: Image.Image, case: Case, reads: bool) -> dict[str, Any]:
    """Check a picture (RGB). Returns flat facts; None for what was not asked for, or cannot be told."""
    asked = asked_of(case)
    if not reads:
        asked = Asked((), asked.colours)
    found = verify(picture, asked, case.prompt)
    texts, colours = found.checks.texts, found.checks.colours
    marks = None if case.scene is None else grade(picture, case.scene, case.stated, case.open_colour)
    right = found.passed if not found.empty else None
    if marks is not None:
        right = Judged(Path(), 0, 0, case.group, marks).right
    return {
        "right": None if right is None else bool(right),
        "texts": [{"exact": t.exact, "ned": round(t.ned, 4), "errors": t.errors, "length": t.length,
                   "script": t.script, "found": t.found} for t in texts],
        "colours": [colour.right for colour in colours],
        "things": [thing.right for thing in found.things],
        "marks": None if marks is None else {name: _plain(value) for name, value in asdict(marks).items()},
        "quality": asdict(found.quality),
        "layout": base64.b64encode(picture.resize((LAYOUT, LAYOUT), Image.Resampling.BOX).tobytes()).decode(),
    }  # fmt: skip


def check_all(folder: Path, lines: Sequence[Mapping[str, Any]], cases: Mapping[int, Case]) -> Iterator[int]:
    """Check the pictures that are not checked yet, and note each in the folder. Yields the number of those checked.

    lines: of the manifest, of pictures that are there.
    """
    path, reads = folder / CHECKS, can_read()
    known = read_checks(folder)
    todo = [line for line in lines if "file" in line and known.get(line["file"], {}).get("sha256") != line["sha256"]]
    with path.open("ab", buffering=0) as log:
        log.write(b"\n" if log.tell() else b"")  # ends a line that a killed process left incomplete
        for number, line in enumerate(todo, 1):
            facts = check(open_picture(folder / PICTURES / line["file"]), cases[line["row"]], reads)
            log.write(json.dumps({"file": line["file"], "sha256": line["sha256"], **facts}).encode() + b"\n")
            os.fsync(log.fileno())
            yield number


def read_checks(folder: Path) -> dict[str, dict[str, Any]]:
    """The noted checks by file. Lines that a killed process left incomplete are left out."""
    found = {}
    path = folder / CHECKS
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            line = json.loads(text)
            found[line["file"]] = line
    return found


def marks_of(checks: Mapping[str, Any]) -> Marks | None:
    """The graders' marks of noted checks."""
    return None if checks["marks"] is None else Marks(**checks["marks"])


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | str | int) else round(float(value), 4)
