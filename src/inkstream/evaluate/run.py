"""Draw a suite: every prompt with every seed, many pictures in one packed batch; what is on disk is not drawn again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from inkstream.engine.inputs import to_image
from inkstream.engine.metadata import save_picture
from inkstream.engine.model import Model, Run, advance, complete
from inkstream.engine.options import guided
from inkstream.evaluate.suites import Case, digest
from inkstream.types import InputError, Request, Spec, Step

T = TypeVar("T")

ROOM = 8192
"""Tokens of 16 x 16 pixels in one packed batch, both prompts of guidance counted."""
MOST = 32
"""Pictures in one packed batch."""


@dataclass(frozen=True)
class Settings:
    """How a suite is drawn. A field left None takes the model's own."""

    seeds: int = 2
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None

    def fields(self) -> dict[str, Any]:
        """Those fields of a Request that are set."""
        return {name: value for name, value in asdict(self).items() if name != "seeds" and value is not None}


@dataclass(frozen=True)
class Job:
    """One picture to draw: of case number `case`, the `seed`th; `request` is complete."""

    case: int
    seed: int
    request: Request

    def path(self, folder: Path) -> Path:
        return folder / "pictures" / f"{self.case:04d}-{self.seed}.png"


def plan(model: Model, cases: Mapping[int, Case], settings: Settings) -> list[Job]:
    """The pictures of these numbered cases, in order; each has a seed of its own, the same in every run."""
    jobs = []
    for number, case in cases.items():
        own: dict[str, Any] = {
            side: value for side, value in (("width", case.width), ("height", case.height)) if value is not None
        }
        for seed in range(settings.seeds):
            request = Request(prompt=case.prompt, seed=1000 * number + seed, **(settings.fields() | own))
            jobs.append(Job(number, seed, complete(request, model.spec)))
    return jobs


def draw(model: Model, jobs: Sequence[Job], folder: Path) -> Iterator[Step]:
    """Draw the jobs that are not in the folder yet; a Step is told after each step of a batch.

    A batch's pictures are written, each whole, as soon as it is done; closing the iterator loses only the batch under
    way. In a Step, `index` is the batch's last picture and `count` all of them, those drawn before included.
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
                save_picture(to_image(model.finish(run, None)), job.path(folder), job.request, model.spec)
        finally:
            for run in runs:
                run.close()


def pack(items: Iterable[T], need: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in their order, as many together as ROOM and MOST allow; one that needs more than ROOM goes alone."""
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


def tokens(request: Request, spec: Spec) -> int:
    """How much of ROOM a complete request takes."""
    assert request.width is not None
    assert request.height is not None
    return (request.width // 16) * (request.height // 16) * (2 if guided(request, spec) else 1)


def open_picture(path: Path) -> Image.Image:
    """A picture that was drawn, RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def claim(folder: Path, name: str, model: str, cases: Sequence[Case], settings: Settings) -> None:
    """Mark a folder as holding this evaluation. InputError where it holds another, whose pictures would be mixed in."""
    ours = {"suite": name, "cases": digest(cases), "model": model, "weights": weights_of(model), **asdict(settings)}
    path = folder / "run.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}): give another --output, or remove the folder") from error
        for key, value in ours.items():
            # more seeds only add pictures, so they may differ
            if key != "seeds" and theirs.get(key) != value:
                raise InputError(
                    f"{folder} holds an evaluation with {key} {theirs.get(key)}, not {value}: "
                    "give another --output, or remove the folder"
                )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours, indent=2, ensure_ascii=False) + "\n", "utf-8")


def weights_of(model: str) -> str | None:
    """A hash of a local model's files' names, sizes and times; None for one that is known by name."""
    path = Path(model).expanduser()
    if not path.exists():
        return None
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    facts: list[Any] = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _start(model: Model, request: Request) -> Run:
    return model.start(request, model.encode(request), None)
