"""Measure how much `--until-verified` raises the share of exact texts of a model.

    python scripts/measure_until_verified.py --date 2026-11-30 [--prompts 40] [--times 3] [--record NAME]

The prompts are of the suite `text`: held-out strings, English and Chinese. Of each prompt, the first drawing and the
kept one are judged twice: by rapidocr, which chose the kept one, and by inkstream's own reader, which did not.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch

import inkstream
from inkstream import Request
from inkstream.bench.records import write_record
from inkstream.engine.drawing.verifying import draw_until_verified
from inkstream.engine.engine import Engine
from inkstream.evaluate.grades import grade
from inkstream.evaluate.suites import open_suite, thin
from inkstream.types import Done, Event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--resume", type=Path, help="lines of an earlier run: those are not drawn again")
    parser.add_argument("--limit", type=int, help="most prompts, with those of --resume")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(inkstream.Machine("cpu"))
    drawn: list[Done] = []

    def draw(request: Request) -> Generator[Event, None, None]:
        for event in engine.submit(request):
            if isinstance(event, Done):
                drawn.append(event)
            yield event

    earlier = read_lines(options.resume) if options.resume else {}
    found: dict[str, list[Any]] = {
        name: [] for name in ("first", "kept", "own_first", "own_kept", "drawings", "seconds")
    }
    for number, case in thin(open_suite("text"), options.prompts).items():
        assert case.scene is not None
        if options.limit is not None and len(found["first"]) == options.limit:
            break
        if number in earlier:
            for name, value in zip(found, earlier[number]):
                found[name].append(value)
            continue
        drawn.clear()
        request = Request(prompt=case.prompt, seed=number, until_verified=options.times)
        (kept,) = (event for event in draw_until_verified(draw, request) if isinstance(event, Done))
        passed = all(part.endswith(" exact") for part in kept.checked.split("; "))
        for name, one, right in (("first", drawn[0], passed and len(drawn) == 1), ("kept", kept, passed)):
            found[name].append(right)
            found[f"own_{name}"].append(grade(one.image, case.scene).text_exact)
        found["drawings"].append(len(drawn))
        print(number, case.text, len(drawn), *(found[name][-1] for name in list(found)[:4]), flush=True)
    count = len(found["first"])
    rows = [
        {
            "drawings": label,
            "prompts": count,
            "exact": round(sum(found[name]) / count, 4),
            "exact_by_own_reader": round(sum(map(bool, found[f"own_{name}"])) / count, 4),
            "drawings_a_picture": round(mean, 2),
        }
        for label, name, mean in (("once", "first", 1), ("until verified", "kept", sum(found["drawings"]) / count))
    ]
    for row in rows:
        row["redraws_at_most"] = 0 if row["drawings"] == "once" else options.times
        print(row)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def read_lines(path: Path) -> dict[int, list[Any]]:
    """Prompt's number -> its values in the order of `found`, from what `main` prints."""
    lines = [line.rsplit(None, 5) for line in path.read_text("utf-8").splitlines() if line[:1].isdigit()]
    return {int(head.split()[0]): [*(mark == "True" for mark in marks), int(drawn)] for head, drawn, *marks in lines}


if __name__ == "__main__":
    main()
