"""The training loop: it follows a recipe, yields messages, writes checkpoints and at the end exports a model folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from inkstream.engine.drawing.model import Model
from inkstream.engine.machine.loader import choose_device
from inkstream.train.adapterfile import adapter_name, write_adapter
from inkstream.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from inkstream.train.controls import part_of, write_net
from inkstream.train.few_steps import check_transfer, is_distilled, softened, unlearning
from inkstream.train.kinds import TASKS
from inkstream.train.metrics import Metrics
from inkstream.train.models import DTYPES, Start, export, start
from inkstream.train.parallel import Team, join_team, own_device
from inkstream.train.recipe import Recipe, as_tables, as_toml, completed, differences
from inkstream.train.rewards import Reward
from inkstream.train.signs import signs_in
from inkstream.train.speed import count_flops, cpu_seconds, measure_peak
from inkstream.train.tasks import Preparing, Task
from inkstream.types import InputError
from inkstream.weights.files import read_tensors, write_state


@dataclass(frozen=True)
class Resumed:
    """The run resumes from a checkpoint. changed: recipe keys whose values differ from the checkpoint's."""

    step: int
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` is done. Values are means since the last Progress.

    Time for measuring, drawing and saving is not counted. loss, norm, lr: of the task's first learner; others: the same
    values of the other learners, by name. notes: what the task noted besides.
    """

    step: int
    steps: int
    loss: float
    norm: float  # gradient norm before clipping
    lr: float  # learning rate
    others: Mapping[str, Mapping[str, float]]
    notes: Mapping[str, float]
    images_per_second: float
    gflops: float  # GFLOP/s of all processes: see count_flops
    peak: float  # gflops as a share of the measured speed of large matrix products
    cpu_seconds: float  # CPU time of the run, including the time before a resume
    seconds_left: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Preview:
    """A preview sheet, drawn with the averaged weights, is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class HeldOut:
    """Errors of the averaged weights on held-out samples, by the name of the measurement."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Graded:
    """Grades of pictures drawn with the averaged weights: the share of requests that are met, by question."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Warned:
    """Something that the user should know before the result is used."""

    step: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The run ends. model: the exported folder, or an adapter's file, if all steps are done; why: of an earlier end."""

    step: int
    model: Path | None
    why: str = ""


Message = Preparing | Resumed | Progress | Saved | Preview | HeldOut | Graded | Warned | Finished
Grade = Callable[[Model], Mapping[str, float]]
"""Draws with a model and returns the share of requests that the pictures meet, by question."""

MEASURED = ("images_per_second", "gflops", "peak", "cpu_seconds")
TELL_EVERY = 10.0
"""Longest time in seconds between two Progress messages, if no step takes longer."""


def train(
    recipe: Recipe, folder: Path | str, resume: bool = False, stop: Callable[[], bool] = lambda: False,
    grade: Grade | None = None, reward: Reward | None = None,
) -> Iterator[Message]:  # fmt: skip
    """Train a recipe in the run's own folder and yield messages.

    The folder gets recipe.toml, checkpoints/, metrics.jsonl, loss.png, previews/ and at the end model/. A run of an
    adapter writes adapters/ and at the end NAME.safetensors instead. The run saves and ends when the iterator is
    closed, or when `stop()`, called after each step, returns true. Under torchrun all processes call this function and
    only the first yields messages. `grade` is the grader that [run] graded uses, `reward` is what
    reinforcement learns from. Raises InputError before the first
    step if the recipe is not valid or the folder holds another run.
    """
    folder = Path(folder).expanduser()
    if not resume and list_checkpoints(folder / "checkpoints"):
        raise InputError(f"{folder} holds a run already: add --resume to continue it, or name another folder")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    device = choose_device(own_device(recipe.run.device) or None)
    with join_team(device) as team:
        messages = _run(recipe, folder, resume, stop, grade, reward, device, team)
        if team.leads:
            yield from messages
        else:
            for _ in messages:
                pass


def export_last(recipe: Recipe, folder: Path | str) -> tuple[int, Path]:
    """Write the averaged weights of a run's last checkpoint as folder/model, or an adapter's as its file.

    Returns the step of the checkpoint and the path. Raises InputError where there is no checkpoint, or
    where the recipe trains an autoencoder: its latents are measured at the end of the run.
    """
    folder = Path(folder).expanduser()
    if recipe.objective.kind == "autoencoder":
        raise InputError("an autoencoder is exported at the end of its run: lower run.steps to end it sooner")
    saved = load_checkpoint(folder / "checkpoints")
    if recipe.adapter.kind != "none":
        still = replace(recipe.adapter, stream=True)  # nothing computes with the base here: it stays in its files
        frozen = replace(recipe, adapter=still, run=replace(recipe.run, compile=False))
        path = folder / f"{adapter_name(recipe, folder)}.safetensors"
        return saved.step, write_adapter(path, recipe, start(frozen), saved.ema or saved.weights, saved.step)
    begun = start(recipe)
    if "control" in recipe.model.train:
        path = folder / f"{adapter_name(recipe, folder)}.safetensors"
        return saved.step, write_net(path, part_of(recipe, begun), saved.ema or saved.weights, recipe)
    states = by_part(begun, {**saved.weights, **saved.ema})
    spec = TASKS[recipe.objective.kind].spec_of(begun.spec, recipe)
    return saved.step, export(begun, spec, states, folder / "model", recipe.run.export)


def _run(
    recipe: Recipe, folder: Path, resume: bool, stop: Callable[[], bool], grade: Grade | None, reward: Reward | None,
    device: torch.device, team: Team,
) -> Iterator[Message]:  # fmt: skip
    run = recipe.run
    begun_at = time.monotonic()
    yield Preparing("building the model")
    begun = start(recipe, device)
    task = TASKS[recipe.objective.kind](recipe, begun, device, team, reward)
    if run.graded and (grade is None or task.model() is None):
        why = "needs a grader: give `train` one, or" if grade is None else f"cannot grade {recipe.objective.kind}:"
        raise InputError(f"[run] graded = {run.graded} {why} set it to 0")
    training = Training(recipe, begun, task, device, team)
    yield from task.prepare()
    changed: tuple[str, ...] = ()
    if resume:
        changed = training.resume(folder)
        yield Resumed(training.step, changed)
    if team.leads and (changed or not resume):
        keep_recipe(recipe, folder, training.step)
    metrics = Metrics(folder if team.leads else None, training.step)
    if begun.adapter is not None and training.step == 0:
        if is_distilled(begun.spec) and not recipe.adapter.assistant:
            yield Warned(0, unlearning(begun.spec))
        yield from _look(training, metrics, folder, grade)
    flops, peak = 0.0, 1.0
    if training.step < run.steps:
        yield Preparing("measuring speed")
        flops, peak = count_flops(task, training.step), measure_peak(device, DTYPES[run.dtype]) * team.count

    def save() -> Saved:
        path = training.save(folder)
        metrics.draw()
        return Saved(training.step, path)

    why = ""
    saved_at = started_at = training.step
    started = mark = time.monotonic()
    turns: list[Turn] = []
    count = 0
    warned: set[str] = set()
    training.task.notes()  # those of measuring speed
    try:
        while training.step < run.steps and not why:
            count += task.samples(training.step)
            turns += training.advance()
            step = training.step
            if step % run.log == 0 or step == run.steps or time.monotonic() - mark > TELL_EVERY:
                found = means(turns, step)  # waits for the device
                now = time.monotonic()
                speed = count / max(now - mark, 1e-9)
                told = Progress(
                    step, run.steps, **found[task.learners[0].name],
                    others={name: numbers for name, numbers in found.items() if name != task.learners[0].name},
                    images_per_second=speed, gflops=speed * flops / 1e9, peak=speed * flops / peak,
                    notes=task.notes(), cpu_seconds=training.cpu_seconds,
                    seconds_left=(now - started) / (step - started_at) * (run.steps - step),
                )  # fmt: skip
                line = asdict(told)
                line |= {name: round(line[name], 4) for name in MEASURED}
                metrics.add({k: v for k, v in line.items() if k not in ("steps", "seconds_left") and v != {}})
                mark, turns, count = now, [], 0
                yield told
                signs = signs_in(told.notes)
                yield from (Warned(step, text) for sign, text in signs.items() if sign not in warned)
                warned = set(signs)
            aside = time.monotonic()
            yield from _look(training, metrics, folder, grade)
            if run.patience and metrics.since_best() >= run.patience:
                why = f"{run.patience} gradings in a row were not better"
            elif team.any(stop(), device):
                why = "stopped"
            elif run.minutes and team.any(time.monotonic() - begun_at > run.minutes * 60, device):
                why = f"{run.minutes:g} minutes are over"
            elif step == run.until:
                why = f"step {step} is reached"
            elif step % run.save == 0 and step < run.steps:
                saved_at = step
                yield save()
            mark += time.monotonic() - aside
    except GeneratorExit:
        if training.step > saved_at and team.count == 1:
            save()
        raise
    if training.step > saved_at or not list_checkpoints(folder / "checkpoints"):
        yield save()
    stale = run.patience and metrics.since_best() >= run.patience
    if training.step < run.steps and not stale:
        yield Finished(training.step, None, why)
        return
    step, path = training.step, training.export(folder)
    if recipe.adapter.transfer and team.leads:
        del training, task, begun, save  # the model's memory is for the distilled one
        yield Preparing(f"drawing with {recipe.adapter.transfer}")
        warnings = check_transfer(recipe, path, folder / "previews" / "transfer.png", device)
        yield Preview(step, folder / "previews" / "transfer.png")
        yield from (Warned(step, warning) for warning in warnings)
    yield Finished(step, path, why)


def _look(training: Training, metrics: Metrics, folder: Path, grade: Grade | None) -> Iterator[Message]:
    """Measure, grade and preview the averaged weights at the steps where each is due."""
    run, step, task = training.recipe.run, training.step, training.task

    def due(every: int) -> bool:
        return bool(every) and (step % every == 0 or step == run.steps)

    if not any(map(due, (run.held_out, run.preview, run.graded))):
        return
    told: list[HeldOut | Preview | Graded | Warned] = []
    with training.averaged():
        if due(run.held_out):
            told.append(HeldOut(step, task.measure()))
        if due(run.graded):
            model = task.model()
            assert model is not None
            assert grade is not None
            told.append(Graded(step, grade(model)))
        if due(run.preview):
            sheet = task.sheet()
            path = folder / "previews" / f"step-{step:08d}.png"
            if training.team.leads:
                path.parent.mkdir(parents=True, exist_ok=True)
                sheet.save(path)
            told.append(Preview(step, path))
            first = path.with_name("step-00000000.png")
            if step and training.begun.adapter is not None and is_distilled(training.begun.spec) and first.is_file():
                with Image.open(first) as before:
                    if warning := softened(sheet, before):
                        told.append(Warned(step, warning))
    for message in told:
        if isinstance(message, HeldOut):
            metrics.add({"step": step, "held_out": message.values})
        elif isinstance(message, Graded):
            metrics.add({"step": step, "graded": message.values})
            if run.best and metrics.since_best() == 0:
                training.keep_best(folder)
        yield message


@dataclass(frozen=True)
class Turn:
    """The result of one learner's step. loss, norm: scalars, still on the device."""

    learner: str
    loss: Tensor
    norm: Tensor
    lr: float


def means(turns: Sequence[Turn], step: int) -> dict[str, dict[str, float]]:
    """Return mean loss, mean norm and last learning rate of each learner. Raises InputError if a loss is not finite."""
    found = {}
    for name in dict.fromkeys(turn.learner for turn in turns):
        own = [turn for turn in turns if turn.learner == name]
        loss, norm = (torch.stack(values).mean().item() for values in zip(*((t.loss, t.norm) for t in own)))
        if not math.isfinite(loss):
            raise InputError(f"the loss at step {step} is {loss}: resume with a lower lr, or in fp32")
        found[name] = {"loss": loss, "norm": norm, "lr": own[-1].lr}
    return found


def keep_recipe(recipe: Recipe, folder: Path, step: int) -> None:
    """Write all recipe keys to recipe.toml at step 0, or to recipe-N.toml if the recipe changed at step N."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"recipe-{step}.toml" if step else "recipe.toml")
    head = f"# The recipe of this run from step {step} on, with torch {torch.__version__}.\n\n"
    path.write_text(head + as_toml(as_tables(recipe)) + "\n", "utf-8")


class Training:
    """The state of a run: a task with its learners, and the number of steps done."""

    def __init__(self, recipe: Recipe, begun: Start, task: Task, device: torch.device, team: Team):
        self.recipe = recipe
        self.begun = begun
        self.task = task
        self.device = device
        self.team = team
        self.step = 0
        self._cpu_before = -cpu_seconds() * team.count

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the run in seconds. With several processes: the first process's time times their number."""
        return self._cpu_before + cpu_seconds() * self.team.count

    def advance(self) -> list[Turn]:
        """Do one step: the turns of the learners, in the task's order."""
        turns = []
        for learner, loss in self.task.turns(self.step):
            seen = learner.advance(self.step, loss)
            turns.append(Turn(learner.name, *seen, learner.settings.lr * learner.rate(self.step)))
        self.step += 1
        return turns

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager: modules use their averaged weights, if they have any."""
        with ExitStack() as stack:
            for learner in self.task.learners:
                stack.enter_context(learner.weights.using(learner.ema))
            yield

    def save(self, folder: Path) -> Path:
        """Save a checkpoint. All processes give their shards, and the first process writes."""
        whole: tuple[dict[str, Tensor], ...] = {}, {}, {}  # weights, their averages, optimisers' states
        for learner in self.task.learners:
            for tensors, own in zip(whole, learner.state()):
                tensors.update(own)
        path = folder / "checkpoints"
        if self.team.leads:
            saved = Checkpoint(self.step, *whole, as_tables(self.recipe), self.cpu_seconds)
            path = save_checkpoint(path, saved, self.recipe.run.keep)
            if self.begun.adapter is not None:
                self._keep_adapter(folder, saved.ema or saved.weights)
        self.team.wait()
        return path

    def _keep_adapter(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the adapter as it is now, and remove all such files but the last `keep`."""
        path = folder / "adapters" / f"{adapter_name(self.recipe, folder)}-{self.step:08d}.safetensors"
        write_adapter(path, self.recipe, self.begun, tensors, self.step)
        for old in sorted(path.parent.glob("*.safetensors"))[: -self.recipe.run.keep]:
            old.unlink()

    def resume(self, folder: Path) -> tuple[str, ...]:
        """Restore the last checkpoint. Returns the recipe keys that changed. Raises InputError if the model differs."""
        saved = load_checkpoint(folder / "checkpoints")
        if saved.weights.keys() != {name for learner in self.task.learners for name in learner.weights.masters}:
            raise InputError("the checkpoint's model is not the recipe's model: name another folder")
        for learner in self.task.learners:
            learner.load(saved)
        self.step = saved.step
        self._cpu_before += saved.cpu_seconds
        for path in best_of(folder) if self.team.leads else ():
            if int(path.stem.partition("-")[2]) > self.step:
                path.unlink()  # the steps after the checkpoint come again
        return differences(as_tables(self.recipe), completed(saved.recipe))

    def keep_best(self, folder: Path) -> None:
        """Keep the averaged weights: those with the best grades so far."""
        found = self._averages()
        if self.team.leads:
            older = best_of(folder)
            write_state(folder / f"best-{self.step:08d}.safetensors", found)
            for path in older:
                path.unlink()
        self.team.wait()

    def _averages(self) -> dict[str, Tensor]:
        """Return the averaged weights of all learners, unsharded, by name. All processes must call it."""
        found: dict[str, Tensor] = {}
        for learner in self.task.learners:
            found |= learner.weights.whole(learner.ema or learner.weights.masters)
        return found

    def export(self, folder: Path) -> Path:
        """Export the averaged weights, the last or the best ones. Returns the path.

        The result is a folder that `inkstream.load` reads, or the file of an adapter or a control net.
        """
        found = self._averages()
        if self.recipe.run.best and (best := best_of(folder)):
            found = read_tensors(best[-1])
        path = folder / f"{adapter_name(self.recipe, folder)}.safetensors"
        if self.begun.adapter is not None:
            if self.team.leads:
                write_adapter(path, self.recipe, self.begun, found, self.step)
        elif "control" in self.recipe.model.train:
            if self.team.leads:
                write_net(path, part_of(self.recipe, self.begun), found, self.recipe)
        else:
            with self.averaged():
                spec = self.task.finish()
            path = folder / "model"
            if self.team.leads:
                export(self.begun, spec, by_part(self.begun, found), path, self.recipe.run.export)
        self.team.wait()
        return path


def best_of(folder: Path) -> list[Path]:
    """Return the file with the averaged weights of the best grades, if there is one."""
    return sorted(folder.glob("best-*.safetensors"))


def by_part(begun: Start, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the model's parts. Those of learners that are not part of the model are left out."""
    states: dict[str, dict[str, Tensor]] = {name: {} for name in begun.modules}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part in states:
            states[part][name] = tensor
    return states
