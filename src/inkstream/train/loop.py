"""The one loop: a recipe becomes messages, checkpoints, and in the end a model's folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from inkstream.engine.loader import choose_device
from inkstream.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from inkstream.train.metrics import Metrics
from inkstream.train.models import DTYPES, Start, export, start
from inkstream.train.optim import (
    ema_decay,
    load_optimiser_state,
    make_optimiser,
    optimiser_state,
    rate,
    set_rate,
    update_ema,
)
from inkstream.train.parallel import Team, checkpoint_blocks, compile_blocks, join_team, own_device, share_out
from inkstream.train.recipe import Recipe, as_tables, differences
from inkstream.train.tasks import Autoencoding, Flow, Preparing, Task
from inkstream.train.weights import Weights
from inkstream.types import InputError


@dataclass(frozen=True)
class Resumed:
    """The run goes on from a checkpoint. changed: keys of the recipe that are not as they were."""

    step: int
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` is done. loss, norm: means since the last such message."""

    step: int
    steps: int
    loss: float
    norm: float  # of the gradients, before clipping
    lr: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Preview:
    """A sheet of pictures drawn with the averaged weights is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class HeldOut:
    """Errors of the averaged weights on samples that are not trained on, by what is measured."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Finished:
    """The run stops. model: the exported folder, once all steps are done; `why` it stops before."""

    step: int
    model: Path | None
    why: str = ""


Message = Preparing | Resumed | Progress | Saved | Preview | HeldOut | Finished

TELL_EVERY = 10.0
"""Seconds without a message at most, where steps are slow."""


def train(
    recipe: Recipe, folder: Path | str, resume: bool = False, stop: Callable[[], bool] = lambda: False
) -> Iterator[Message]:
    """Train as the recipe says, in a folder of the run's own.

    The folder gets checkpoints/, metrics.jsonl, loss.png, previews/ and in the end model/. Closing the iterator saves
    and ends; so does `stop`, asked after every step. Under torchrun all processes run this and the first one speaks.
    InputError before the first step where the recipe cannot be followed or the folder holds another run.
    """
    folder = Path(folder).expanduser()
    if not resume and list_checkpoints(folder / "checkpoints"):
        raise InputError(f"{folder} holds a run already: add --resume to go on, or name another folder")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    device = choose_device(own_device(recipe.run.device) or None)
    with join_team(device) as team:
        messages = _run(recipe, folder, resume, stop, device, team)
        if team.leads:
            yield from messages
        else:
            for _ in messages:
                pass


def _run(
    recipe: Recipe, folder: Path, resume: bool, stop: Callable[[], bool], device: torch.device, team: Team
) -> Iterator[Message]:
    run, settings = recipe.run, recipe.optimiser
    begun_at = time.monotonic()
    yield Preparing("building the model")
    begun = start(recipe)
    task = (Autoencoding if recipe.objective.kind == "autoencoder" else Flow)(recipe, begun, device, team)
    yield from task.prepare()
    learner = Learner(recipe, begun, task, device, team)
    if resume:
        yield Resumed(learner.resume(folder), learner.changed)
    metrics = Metrics(folder if team.leads else None, learner.step)

    def save() -> Saved:
        path = learner.save(folder)
        metrics.draw()
        return Saved(learner.step, path)

    why = ""
    saved_at = started_at = learner.step
    started = mark = time.monotonic()
    losses, norms, count = [], [], 0
    try:
        while learner.step < run.steps and not why:
            loss, norm, samples = learner.advance()
            losses, norms, count = [*losses, loss], [*norms, norm], count + samples
            step, now = learner.step, time.monotonic()
            if step % run.log == 0 or step == run.steps or now - mark > TELL_EVERY:
                told = Progress(
                    step=step,
                    steps=run.steps,
                    loss=torch.stack(losses).mean().item(),
                    norm=torch.stack(norms).mean().item(),
                    lr=settings.lr * rate(step - 1, settings, run),
                    images_per_second=count / max(time.monotonic() - mark, 1e-9),
                    seconds_left=(now - started) / (step - started_at) * (run.steps - step),
                )
                if told.loss != told.loss or told.loss in (float("inf"), -float("inf")):
                    raise InputError(f"the loss at step {step} is {told.loss}: resume with a lower lr, or in fp32")
                metrics.add({"step": step, "loss": told.loss, "norm": told.norm, "lr": told.lr,
                             "images_per_second": round(told.images_per_second, 2)})  # fmt: skip
                mark, losses, norms, count = now, [], [], 0
                yield told
            yield from _look(learner, metrics, folder, team)
            if team.any(stop(), device):
                why = "stopped"
            elif run.minutes and team.any(time.monotonic() - begun_at > run.minutes * 60, device):
                why = f"{run.minutes:g} minutes are over"
            elif step % run.save == 0 and step < run.steps:
                saved_at = step
                yield save()
    except GeneratorExit:
        if learner.step > saved_at and team.count == 1:
            save()
        raise
    if learner.step > saved_at or not list_checkpoints(folder / "checkpoints"):
        yield save()
    if learner.step < run.steps:
        yield Finished(learner.step, None, why)
        return
    yield Finished(learner.step, learner.export(folder))


def _look(learner: Learner, metrics: Metrics, folder: Path, team: Team) -> Iterator[Message]:
    """Measure and draw with the averaged weights, where it is time to."""
    run, step = learner.recipe.run, learner.step
    measure = run.held_out and (step % run.held_out == 0 or step == run.steps)
    draw = run.preview and (step % run.preview == 0 or step == run.steps)
    if not measure and not draw:
        return
    found = path = None
    with learner.weights.using(learner.ema):
        if measure:
            found = learner.task.measure()
        if draw:
            sheet = learner.task.sheet()
            path = folder / "previews" / f"step-{step:08d}.png"
            if team.leads:
                path.parent.mkdir(parents=True, exist_ok=True)
                sheet.save(path)
    if found is not None:
        metrics.add({"step": step, "held_out": found})
        yield HeldOut(step, found)
    if path is not None:
        yield Preview(step, path)


class Learner:
    """The state of a run: weights, their average, optimisers, and the number of steps done."""

    def __init__(self, recipe: Recipe, begun: Start, task: Task, device: torch.device, team: Team):
        self.recipe = recipe
        self.begun = begun
        self.task = task
        self.team = team
        self.device = device
        self.step = 0
        self.changed: tuple[str, ...] = ()
        dtype = DTYPES[recipe.run.dtype]
        modules = {name: nn.ModuleDict(begun.modules).get_submodule(name).train() for name in task.learning}
        for module in modules.values():
            if recipe.run.compile:
                compile_blocks(module)
            if recipe.run.checkpointing:
                checkpoint_blocks(module)
            if team.count > 1 and recipe.run.parallel == "fsdp":
                share_out(module, device, team, dtype)
        self.weights = Weights(modules, dtype, team)
        kept = self.weights.masters.items() if recipe.optimiser.ema else ()
        self.ema = {name: w.clone() for name, w in kept}
        self.optimisers = make_optimiser(self.weights, recipe.optimiser)

    def advance(self) -> tuple[Tensor, Tensor, int]:
        """One step. The mean loss, the gradients' norm, how many samples there were."""
        settings = self.recipe.optimiser
        set_rate(self.optimisers, rate(self.step, settings, self.recipe.run), settings)
        place = self.task.data.place(self.step)
        pieces = self.recipe.run.accumulate * self.team.count
        total = torch.zeros((), device=self.device)
        for piece in range(self.team.rank, pieces, self.team.count):
            loss = self.task.loss(self.step, place, slice(piece, None, pieces)) / self.recipe.run.accumulate
            loss.backward()
            total += loss.detach()
        norm = self.weights.collect(settings.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.weights.publish()
        if self.ema:
            update_ema(list(self.ema.values()), list(self.weights.masters.values()), ema_decay(self.step, settings))
        self.step += 1
        return self.team.sum(total) / self.team.count, norm, len(place.rows)

    def save(self, folder: Path) -> Path:
        """A checkpoint, by the first process of what all hold."""
        saved = Checkpoint(
            self.step, self.weights.whole(self.weights.masters), self.weights.whole(self.ema),
            optimiser_state(self.optimisers, self.weights), as_tables(self.recipe),
        )  # fmt: skip
        path = folder / "checkpoints"
        if self.team.leads:
            path = save_checkpoint(path, saved, self.recipe.run.keep)
        self.team.wait()
        return path

    def resume(self, folder: Path) -> int:
        """Go on from the last checkpoint. The steps that are done."""
        saved = load_checkpoint(folder / "checkpoints")
        self.weights.load(saved.weights)
        if bool(saved.ema) != bool(self.ema):
            raise InputError("[optimiser] ema is on in one of recipe and checkpoint alone: put it back")
        self.weights.fill(self.ema, saved.ema)
        load_optimiser_state(self.optimisers, self.weights, saved.optimiser)
        self.step = saved.step
        self.changed = differences(as_tables(self.recipe), saved.recipe)
        return self.step

    def export(self, folder: Path) -> Path:
        """The averaged weights as a folder that `inkstream.load` takes."""
        with self.weights.using(self.ema):
            spec = self.task.finish()
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.weights.whole(self.ema or self.weights.masters).items():
            part, _, name = key.partition(".")
            states.setdefault(part, {})[name] = tensor
        path = folder / "model"
        if self.team.leads:
            export(self.begun, spec, states, path, self.recipe.run.export)
        self.team.wait()
        return path
