"""Drawing by flow: encode the prompt, take the solver's steps, decode. The way of families that bring no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from PIL import Image

from inkstream.engine.drawing.batch import Alone, Ask, Drawing, tokens_of
from inkstream.engine.drawing.complete import Complete
from inkstream.engine.drawing.larger import evaluations_of, second_pass
from inkstream.engine.drawing.model import Model, Original, Run
from inkstream.engine.drawing.upscaling import Upscalers, enlarge, missing, weights_of, work_of
from inkstream.engine.drawing.writing import notes, writes_out
from inkstream.engine.files.controls import uses_of
from inkstream.engine.pictures.inputs import to_image
from inkstream.families import Family, Way
from inkstream.types import Conditioning, Done, Event, Loading, LoraUse, Step, singles


class Others(Protocol):
    """The other processes that draw the same request."""

    @property
    def own(self) -> slice:
        """This process's pictures among those of the request."""
        ...

    def others(self, done: Done, pictures: Sequence[Any]) -> Iterator[Done]:
        """Yield the pictures that the others have drawn meanwhile."""
        ...


@dataclass(frozen=True)
class Job:
    """A request, and the loaded model that draws it."""

    model: Model
    request: Complete
    drawn: list[Done]  # finished pictures; a way appends to it, and starts behind it
    previews: bool = False
    crew: Others | None = None
    end_phase: Callable[[], None] = lambda: None  # gives freed memory back where memory is short


class Flow:
    """Draws with a flow-matching model."""

    def draw(self, job: Job) -> Drawing:
        uses = [LoraUse.read(lora) for lora in job.request.loras]
        nets, controls = uses_of(job.request), job.model.controls
        if uses:
            yield Loading("lora")
        with job.model.adapters.use(uses) if uses else nullcontext([]) as lines:
            for line in lines:
                yield Loading("lora", note=line)
            if nets:
                yield Loading("control net")
            with controls.use(nets) if controls else nullcontext():
                yield from self._draw(job)

    def _draw(self, job: Job) -> Drawing:
        model, request = job.model, job.request
        by_grammar = writes_out(request, model.spec)
        yield Loading("prompt")
        for line in notes(request, model.spec, model.loras):
            yield Loading("prompt", note=line)
        cond = model.encode(request)
        request = yield from enlarging_start(model, request)
        original = None if request.keeps_start else model.open_original(request)
        job.end_phase()
        own = job.crew.own if job.crew else slice(None)
        pictures = list(singles(request))
        for index, one in list(enumerate(pictures))[own][len(job.drawn) :]:
            began, told = time.perf_counter(), ""
            if by_grammar:  # each picture has the words of its own seed; `cond` has those of picture 0
                cond, told = model.encode(one) if index else cond, model.told(one)
                yield Loading("prompt", text=told)
            again = second_pass(one, model.spec)
            more = evaluations_of(again, model.spec) if again else 0
            if one.keeps_start and one.start is not None:
                image, before = one.start, 0
            else:
                run = model.start(one, cond, original)
                before = run.evaluations
                image = yield from self._steps(job, run, cond, index, 0, more)
            if one.upscale is not None:
                size = one.final_size(model.spec.multiple)
                image = yield from enlarging(model.upscalers, image, size, one.upscaler)
            if again is not None:
                again = again.starting_from(image)
                seen = model.encode(again)
                run = model.start(again, seen, model.open_original(again))
                image = yield from self._steps(job, run, seen, index, before, 0)
            seconds = time.perf_counter() - began
            job.drawn.append(Done(image, one.plain(), index, request.count, seconds, told))
            yield job.drawn[-1]
            if job.crew:
                for other in job.crew.others(job.drawn[-1], pictures):
                    yield replace(other, told=model.told(pictures[other.index])) if by_grammar else other

    def _steps(
        self, job: Job, run: Run, cond: Conditioning, index: int, before: int, after: int
    ) -> Generator[Event | Ask | Alone, None, Image.Image]:
        """Draw one pass of a picture. before, after: the evaluations of its other passes."""
        model, request = job.model, run.request
        try:
            ask = Ask(model.family, run, tokens_of(run, cond, model.spec.multiple))
            for step in range(1, run.evaluations + 1):
                asked, t = time.perf_counter(), run.query.t  # type: ignore[union-attr]
                yield ask
                if step == 1 and not torch.isfinite(run.estimate).all():  # later ones show in the result
                    if model.controls:
                        model.controls.check_numbers(uses_of(request))
                    raise model.overflow()
                seconds = time.perf_counter() - asked
                preview = model.preview(run.estimate) if job.previews else None
                total = before + run.evaluations + after
                yield Step(before + step, total, index, job.request.count, t, seconds, preview)
            job.end_phase()
            drawn = to_image(model.finish(run))
            return drawn if request.edit is None else request.edit.paste(drawn)
        finally:
            run.close()

    def phases(self, model: Model, request: Complete) -> Mapping[str, Callable[[], object]]:
        if model.controls:
            for use in uses_of(request):
                model.controls.get(use)  # its weights are counted apart
        passes = [] if request.keeps_start else [request]
        if again := second_pass(request, model.spec):
            passes.append(again.starting_from(Image.new("RGB", (again.width, again.height))))
        loaded = model.upscalers.get(request.upscaler) if request.upscaler else None
        told: list[tuple[Conditioning, Original | None]] = []

        def encode() -> None:
            told[:] = [(model.encode(one), model.open_original(one)) for one in passes]

        def step() -> None:
            beside = weights_of(loaded)
            for one, (cond, original) in zip(passes, told):
                run = model.start(one, cond, original)
                samples = run.samples()  # of one window; all are alike, and the answers of all are held
                others = [[torch.empty_like(sample.x) for sample in samples] for _ in range(run.forwards - 1)]
                run.answer([model.family.answer(samples), *others])
            del beside

        def decode() -> None:
            beside = weights_of(loaded)
            for one in passes:
                model.decode(torch.empty(1, *model.family.latent_shape(one.width, one.height), device="meta"))
            if loaded is not None:
                work_of(loaded, request.width)
            del beside

        return {"prompt": encode, "steps": step, "picture": decode}


FLOW = Flow()


def way_of(family: Family | type[Family]) -> Way:
    """How an engine draws with a family."""
    return family.way or FLOW


def enlarging(
    upscalers: Upscalers, image: Image.Image, size: tuple[int, int], upscaler: str | None
) -> Generator[Event | Ask | Alone, None, Image.Image]:
    """Enlarge a picture (RGB), by an upscaling model if one is named."""
    steps = enlarge(image, size, upscalers.get(upscaler) if upscaler else None)
    while True:
        try:
            done, total = next(steps)
        except StopIteration as end:
            return end.value
        yield Loading(f"tile {done} of {total}")


def enlarging_start(model: Model, request: Complete) -> Generator[Event | Ask | Alone, None, Complete]:
    """Enlarge the start picture by the request's upscaling model, if it is smaller than what is drawn of it."""
    if request.upscaler is None:
        model.upscalers.forget()
    if request.upscaler is None or request.start is None or request.edit is not None or request.keeps_start:
        return request
    size = request.width, request.height
    if missing(request.start.size, size) <= 1:
        return request
    return request.starting_from((yield from enlarging(model.upscalers, request.start, size, request.upscaler)))


def expand(model: Model, request: Complete) -> Iterator[Loading]:
    """Let the model's language model write the prompt out. The last event's text is the prompt to draw."""
    yield Loading("language model")
    for text in model.upsample(request):
        yield Loading("prompt", text=text)
