"""Draws a suite: each prompt with each seed, in packed batches. Pictures that are on disk are not drawn again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from inkstream.engine.drawing.complete import Complete, complete
from inkstream.engine.drawing.model import Model, Run, advance
from inkstream.engine.drawing.options import guided
from inkstream.engine.pictures.inputs import to_image
from inkstream.engine.pictures.metadata import save_picture
from inkstream.evaluate.suites import Case, digest
from inkstream.pocket.draw import render
from inkstream.types import InputError, LoraUse, Request, Spec, Step, singles

T = TypeVar("T")

ROOM = 8192
"""Most tokens (16 x 16 pixels) in one packed batch. A picture with guidance counts twice."""
MOST = 32
"""Most pictures in one packed batch."""


@dataclass(frozen=True)
class Settings:
    """How a suite is drawn. None: the model's default."""

    seeds: int = 2
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    upsample: bool | None = None  # false: the model's own grammar does not rewrite prompts
    loras: tuple[str, ...] = ()  # as in a Request

    def fields(self) -> dict[str, Any]:
        """Return the fields that are set, as fields of a Request."""
        return {name: value for name, value in asdict(self).items() if name != "seeds" and value not in (None, ())}


@dataclass(frozen=True)
class Job:
    """A picture to draw: picture number `seed` of case number `case`."""

    case: int
    seed: int
    request: Complete

    def path(self, folder: Path) -> Path:
        return folder / "pictures" / f"{self.case:04d}-{self.seed}.png"


def plan(model: Model, cases: Mapping[int, Case], settings: Settings) -> list[Job]:
    """Return the jobs of cases, in order. Each job has its own seed, equal in every run."""
    jobs = []
    for number, case in cases.items():
        own: dict[str, Any] = {
            side: value for side, value in (("width", case.width), ("height", case.height)) if value is not None
        }
        if case.edit is not None:
            own["reference"] = (render(case.edit.before, *model.spec.size),)
        asked = settings.fields() | own
        request = Request(prompt=case.prompt, seed=1000 * number, count=settings.seeds, **asked)
        jobs += [Job(number, seed, one) for seed, one in enumerate(singles(complete(request, model.spec)))]
    return jobs


def draw(model: Model, jobs: Sequence[Job], folder: Path) -> Iterator[Step]:
    """Draw the jobs that are not in the folder. Yields a Step after each step of a batch.

    Pictures are written, each atomically, when their batch is done. Closing the iterator loses only the current batch.
    In a Step, `index` is the batch's last picture and `count` is the number of all jobs, including earlier pictures.
    """
    todo = [job for job in jobs if not job.path(folder).exists()]
    drawn = len(jobs) - len(todo)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for batch in pack(todo, lambda job: tokens(job.request, model.spec)):
        drawn += len(batch)
        runs = [_start(model, job.request) for job in batch]
        try:
            steps, step = max(run.evaluations for run in runs), 0
            while pending := [run for run in runs if run.query is not None]:
                began, t = time.perf_counter(), pending[0].query.t  # type: ignore[union-attr]
                advance(model.family, pending)
                step += 1
                yield Step(step, steps, drawn - 1, len(jobs), t, time.perf_counter() - began)
            for job, run in zip(batch, runs):
                save_picture(to_image(model.finish(run)), job.path(folder), job.request.plain(), model.spec)
        finally:
            for run in runs:
                run.close()


def pack(items: Iterable[T], need: Callable[[T], int]) -> Iterator[list[T]]:
    """Pack items, in order, into batches within ROOM and MOST. An item that needs more than ROOM is a batch alone."""
    batch: list[T] = []
    taken = 0
    for item in items:
        if batch and (taken + need(item) > ROOM or len(batch) == MOST):
            yield batch
            batch, taken = [], 0
        batch.append(item)
        taken += need(item)
    if batch:
        yield batch


def tokens(request: Complete, spec: Spec) -> int:
    """Return the tokens of a request, as counted by ROOM."""
    return (request.width // spec.multiple) * (request.height // spec.multiple) * (2 if guided(request, spec) else 1)


def open_picture(path: Path) -> Image.Image:
    """Open a picture as RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def claim(folder: Path, name: str, model: str, cases: Sequence[Case], settings: Settings) -> None:
    """Mark a folder as the folder of this evaluation. Raises InputError if it holds pictures of another one."""
    ours = {"suite": name, "cases": digest(cases), "model": model, "weights": weights_of(model), **asdict(settings)}
    ours["loras"] = [[lora, weights_of(LoraUse.read(lora).path)] for lora in settings.loras]
    path = folder / "run.json"
    if path.exists():
        try:
            theirs = {"loras": [], **json.loads(path.read_text("utf-8"))}
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}): give another --output, or remove the folder") from error
        for key, value in ours.items():
            # `seeds` may differ: more seeds only add pictures
            if key != "seeds" and theirs.get(key) != value:
                raise InputError(
                    f"{folder} holds an evaluation with {key} {theirs.get(key)}, not {value}: "
                    "give another --output, or remove the folder"
                )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours, indent=2, ensure_ascii=False) + "\n", "utf-8")


def weights_of(model: str) -> str | None:
    """Return a hash of a local model's file names, sizes and times; None for a model that is not local."""
    path = Path(model).expanduser()
    if not path.exists():
        return None
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    facts: list[Any] = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _start(model: Model, request: Complete) -> Run:
    return model.start(request, model.encode(request), None)
