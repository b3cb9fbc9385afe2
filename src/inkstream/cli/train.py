"""`inkstream train`: shows the messages of a run. Imports torch late."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from inkstream.cli.terminal import Terminal

EVERY = 10.0
"""Seconds between lines of preparation without a terminal."""


def train(recipe: str, output: str | None, resume: bool, only_export: bool, changes: list[str], json: bool) -> int:
    """Train from a recipe. Returns the exit code: 130 if the run was interrupted, after saving."""
    from inkstream.cli.lines import print_json
    from inkstream.train.loop import Finished, Graded, HeldOut, Preview, Progress, Resumed, Saved, Warned, export_last
    from inkstream.train.loop import train as run
    from inkstream.train.reading import read_recipe

    folder = Path(output) if output else Path("runs") / Path(recipe).stem
    words = ["inkstream", "train", recipe, *(["--output", output] if output else [])]
    again = shlex.join([*words, *(word for change in changes for word in ("--set", change)), "--resume"])
    stopped = _Stop()
    last: Any = None
    told = 0.0
    wanted = read_recipe(recipe, changes)
    if only_export:
        step, model = export_last(wanted, folder)
        print_json({"folder": str(folder), "step": step, "model": str(model)}) if json else print(model)
        return 0
    with Terminal() as terminal, stopped:
        for message in run(wanted, folder, resume, lambda: stopped.asked, _grader(wanted.run)):
            if isinstance(message, Progress):
                _progress(terminal, message)
            elif isinstance(message, Saved):
                terminal.say(f"saved {message.path}")
            elif isinstance(message, HeldOut):
                values = ", ".join(f"{name} {value:.4f}" for name, value in message.values.items())
                terminal.say(f"step {message.step} held out: {values}")
            elif isinstance(message, Graded):
                values = ", ".join(f"{name} {value:.0%}" for name, value in message.values.items())
                terminal.say(f"step {message.step} graded: {values}")
            elif isinstance(message, Warned):
                terminal.say(f"warning: {message.text}")
            elif isinstance(message, Preview):
                terminal.say(f"drew {message.path}")
            elif isinstance(message, Resumed):
                changed = f"; changed: {', '.join(message.changed)}" if message.changed else ""
                terminal.say(f"resuming from step {message.step}{changed}")
            elif isinstance(message, Finished):
                last = message
            elif stopped.asked:
                words = again if resume else again.removesuffix(" --resume")
                terminal.say(f"stopped before the first step: start again with: {words}")
                return 130
            else:
                told = _prepare(terminal, message, told)
        if last is None:  # one of several processes: process 0 prints
            return 130 if stopped.asked else 0
        if last.model is None:
            terminal.say(f"{last.why}: saved at step {last.step}; resume with: {again}")
    document = {"folder": str(folder), "step": last.step, "model": None if last.model is None else str(last.model)}
    print_json(document) if json else print(last.model or folder)
    return 130 if stopped.asked and last.model is None else 0


def _grader(run: Any) -> Any:
    """Return the function that grades pictures, or None if the recipe does not grade."""
    if not run.graded:
        return None
    from inkstream.evaluate.judge import grade_drawings
    from inkstream.evaluate.suites import open_suite, thin

    cases = thin(open_suite(run.graded_suite), run.graded_count)
    return lambda model: grade_drawings(model, cases)


def _prepare(terminal: Terminal, message: Any, told: float) -> float:
    """Show preparation: a bar on a terminal, else a line every EVERY seconds. told: time of the last line."""
    now = time.monotonic()
    if sys.stderr.isatty():
        terminal.wait(message.what, message.done, message.total)
    elif now - told > EVERY:
        terminal.say(f"{message.what}: {message.done} of {message.total}" if message.total else message.what)
        return now
    return told


def _progress(terminal: Terminal, message: Any) -> None:
    minutes, seconds = divmod(round(message.seconds_left), 60)
    left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    speed = f"{message.images_per_second:.1f} images/s, {message.gflops:.0f} GFLOP/s ({message.peak:.0%} of the peak)"
    others = "".join(f", {name} {numbers['loss']:.4f}" for name, numbers in message.others.items())
    note = f"loss {message.loss:.4f}{others}, {speed}, {left} left"
    if sys.stderr.isatty():
        terminal.wait(f"step {message.step} of {message.steps}", message.step, message.steps, note)
    else:
        terminal.say(f"step {message.step} of {message.steps}: {note}")


class _Stop:
    """The first Ctrl-C or SIGTERM ends the run after the present step and a save. The second one ends it at once."""

    asked = False

    def __enter__(self) -> _Stop:
        self._before = {s: signal.signal(s, self._hear) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; repeat to stop at once without saving", file=sys.stderr)
