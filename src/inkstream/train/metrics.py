"""The metrics files of a run: metrics.jsonl, one line for each message, and loss.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from inkstream.train.plot import plot


class Metrics:
    """Appends lines to metrics.jsonl. A resume at step N removes the lines after N. folder None: nothing is written."""

    def __init__(self, folder: Path | None, step: int):
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.lines: list[dict[str, Any]] = []
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step and self.path.is_file():
            for line in self.path.read_text("utf-8").splitlines():
                with suppress(ValueError):  # a line cut off by a kill
                    self.lines.append(json.loads(line))
        self.lines = [line for line in self.lines if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), "utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def since_best(self) -> int:
        """Return the number of gradings after the best one, by the mean over its questions."""
        means = [sum(line["graded"].values()) / len(line["graded"]) for line in self.lines if line.get("graded")]
        return len(means) - 1 - max(range(len(means)), key=means.__getitem__) if means else 0

    def draw(self) -> None:
        """Draw the curves of training losses, held-out losses and grades into loss.png."""
        if self.path is None:
            return
        losses: dict[str, list[tuple[int, float]]] = {}
        shares: dict[str, list[tuple[int, float]]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name == "loss":
                    losses.setdefault(name, []).append((line["step"], value))
                elif name == "held_out":
                    losses.setdefault("held out", []).append((line["step"], next(iter(value.values()))))
                elif name == "graded":
                    for question, share in value.items():
                        shares.setdefault(question, []).append((line["step"], share))
                elif name == "notes":
                    for note, number in value.items():
                        losses.setdefault(note, []).append((line["step"], number))
                elif name == "others":
                    for learner, numbers in value.items():
                        losses.setdefault(f"loss of {learner}", []).append((line["step"], numbers["loss"]))
        plot(losses, shares, self.path.with_name("loss.png"))
