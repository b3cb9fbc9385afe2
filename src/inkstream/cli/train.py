"""`inkstream train`: shows the messages of a run. Imports torch late."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inkstream.cli.terminal import Terminal

EVERY = 10.0
"""Seconds between lines of preparation without a terminal."""


@dataclass(frozen=True)
class Wish:
    """The arguments of the command."""

    recipe: str
    photos: str | None
    trigger: str | None
    model: str | None
    output: str | None
    resume: bool
    export: bool
    preset: int | None
    dry_run: bool
    card: str | None
    changes: list[str]
    yes: bool
    json: bool


def train(wish: Wish) -> int:
    """Train from a recipe. Returns the exit code: 130 if the run was interrupted, after saving."""
    from inkstream.cli.download import agree_to_download
    from inkstream.cli.lines import print_json
    from inkstream.train.loop import Finished, Graded, HeldOut, Preview, Progress, Resumed, Saved, Warned, export_last
    from inkstream.train.loop import train as run

    resume, json = wish.resume, wish.json
    wanted, folder = recipe_of(wish)
    if wish.dry_run:
        from inkstream.cli.train_plan import dry_run

        return dry_run(wanted, wish.card, json)
    again = continuing(wish, folder)
    stopped = _Stop()
    last: Any = None
    told = 0.0
    if wanted.model.from_:
        with Terminal() as terminal:
            agree_to_download(wanted.model.from_, wish.yes, terminal, commercial_only=False)
    if wish.export:
        step, model = export_last(wanted, folder)
        print_json({"folder": str(folder), "step": step, "model": str(model)}) if json else print(model)
        return 0
    with Terminal() as terminal, stopped:
        for message in run(wanted, folder, resume, lambda: stopped.asked, _grader(wanted.run), _reward(wanted)):
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
                terminal.say(f"stopped before the first step: start again with: {command_of(wish)}")
                return 130
            else:
                told = _prepare(terminal, message, told)
        if last is None:  # one of several processes: process 0 prints
            return 130 if stopped.asked else 0
        if last.model is None:
            terminal.say(f"{last.why}: saved at step {last.step}; resume with: {again}")
        elif last.step < wanted.run.steps:
            terminal.say(f"{last.why}: ended at step {last.step}")
    document = {"folder": str(folder), "step": last.step, "model": None if last.model is None else str(last.model)}
    print_json(document) if json else print(last.model or folder)
    return 130 if stopped.asked and last.model is None else 0


def recipe_of(wish: Wish) -> tuple[Any, Path]:
    """Return the recipe and the run's folder. Raises InputError for arguments that do not go together."""
    from inkstream.train.presets import SMALL, name_of, preset_for, quick_recipe, with_preset
    from inkstream.train.reading import as_recipe, change_table, read_tables
    from inkstream.types import InputError

    if wish.card and not wish.dry_run:
        raise InputError(f"--for {wish.card} is for --dry-run: add it, or leave --for out")
    if wish.recipe != "quick":
        for name, value in (("PHOTOS", wish.photos), ("--trigger", wish.trigger), ("--model", wish.model)):
            if value is not None:
                raise InputError(f"{name} {value} is for `inkstream train quick`: a recipe names its own")
        tables = read_tables(wish.recipe)
        tables = tables if wish.preset is None else with_preset(tables, wish.preset)
        for change in wish.changes:
            change_table(tables, change)
        return as_recipe(tables), Path(wish.output) if wish.output else Path("runs") / Path(wish.recipe).stem
    if wish.photos is None or wish.trigger is None or not wish.trigger.strip():
        raise InputError('quick needs pictures and words for them: inkstream train quick PHOTOS --trigger "sks mug"')
    from inkstream.cli.train_plan import model_of
    from inkstream.engine.machine.cards import find_card
    from inkstream.engine.machine.loader import choose_device
    from inkstream.engine.machine.memory import count_weights, free_memory

    name = wish.model or "pocket"
    spec, _ = model_of(name)
    numbers, preset = count_weights(spec)["transformer"], wish.preset
    if preset is None and numbers >= SMALL:
        card = find_card(wish.card) if wish.card else free_memory(choose_device())[1] or 0
        preset = preset_for(card if isinstance(card, int) else card.memory_bytes)
    photos, trigger = Path(wish.photos).expanduser(), wish.trigger.strip()
    recipe = quick_recipe(photos, trigger, name, spec, numbers, preset, wish.changes)
    return recipe, Path(wish.output) if wish.output else Path("runs") / name_of(trigger)


def command_of(wish: Wish) -> str:
    """Return the command that was given."""
    options = {"--trigger": wish.trigger, "-m": wish.model, "--output": wish.output, "--preset": wish.preset}
    words = ["inkstream", "train", wish.recipe, *([wish.photos] if wish.photos else [])]
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    words += [word for change in wish.changes for word in ("--set", change)]
    return shlex.join([*words, *(["--resume"] if wish.resume else [])])


def continuing(wish: Wish, folder: Path) -> str:
    """Return the command that continues the run. The folder of a quick run has its recipe."""
    if wish.recipe == "quick":
        return shlex.join(["inkstream", "train", str(folder / "recipe.toml"), "-o", str(folder), "--resume"])
    return command_of(replace(wish, resume=True))


def _grader(run: Any) -> Any:
    """Return the function that grades pictures, or None if the recipe does not grade."""
    if not run.graded:
        return None
    from inkstream.evaluate.judge import grade_drawings
    from inkstream.evaluate.suites import open_suite, thin

    cases = thin(open_suite(run.graded_suite), run.graded_count)
    return lambda model: grade_drawings(model, cases)


def _reward(recipe: Any) -> Any:
    """Return the function that values pictures, or None if the recipe learns from no rewards."""
    if recipe.objective.kind != "reinforce" and not (recipe.objective.kind == "distil" and recipe.own["distil"].reward):
        return None
    from inkstream.evaluate.rewards import rewards_of
    from inkstream.train.rewards import weights_of

    return rewards_of(list(weights_of(recipe.own["reinforce"].rewards)))


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
    notes = "".join(f", {name} {value:.3g}" for name, value in message.notes.items())
    note = f"loss {message.loss:.4f}{others}{notes}, {speed}, {left} left"
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
