"""Drawing by flow: encode the prompt, take the solver's steps, decode. The way of families that bring no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from inkstream.engine.drawing.batch import Ask, Drawing, tokens_of
from inkstream.engine.drawing.complete import Complete
from inkstream.engine.drawing.model import Model, Run, advance
from inkstream.engine.drawing.writing import kept_words, notes, writes_out
from inkstream.engine.files.controls import uses_of
from inkstream.engine.pictures.inputs import to_image
from inkstream.families import Family, Way
from inkstream.types import Done, Loading, LoraUse, Step, singles


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
        for line in notes(request, model.spec, kept_words(request, model.loras)):
            yield Loading("prompt", note=line)
        cond = model.encode(request)
        original = model.open_original(request)
        job.end_phase()
        own = job.crew.own if job.crew else slice(None)
        pictures = list(singles(request))
        for index, one in list(enumerate(pictures))[own][len(job.drawn) :]:
            began, told = time.perf_counter(), ""
            if by_grammar:  # each picture has the words of its own seed; `cond` has those of picture 0
                cond, told = model.encode(one) if index else cond, model.told(one)
                yield Loading("prompt", text=told)
            run = model.start(one, cond, original)
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
                    yield Step(step, run.evaluations, index, request.count, t, seconds, preview)
                job.end_phase()
                drawn = to_image(model.finish(run))
                image = drawn if one.edit is None else one.edit.paste(drawn)
            finally:
                run.close()
            seconds = time.perf_counter() - began
            job.drawn.append(Done(image, one.plain(), index, request.count, seconds, told))
            yield job.drawn[-1]
            if job.crew:
                for other in job.crew.others(job.drawn[-1], pictures):
                    yield replace(other, told=model.told(pictures[other.index])) if by_grammar else other

    def phases(self, model: Model, request: Complete) -> Mapping[str, Callable[[], object]]:
        told: list[Any] = []
        if model.controls:
            for use in uses_of(request):
                model.controls.get(use)  # its weights are counted apart

        def encode() -> None:
            told[:] = model.encode(request), model.open_original(request)

        def step() -> Run:
            run = model.start(request, *told)
            advance(model.family, [run])
            return run

        shape = model.family.latent_shape(request.width, request.height)
        return {
            "prompt": encode,
            "steps": step,
            "picture": lambda: model.decode(torch.empty(1, *shape, device="meta")),
        }


FLOW = Flow()


def way_of(family: Family | type[Family]) -> Way:
    """How an engine draws with a family."""
    return family.way or FLOW


def expand(model: Model, request: Complete) -> Iterator[Loading]:
    """Let the model's language model write the prompt out. The last event's text is the prompt to draw."""
    yield Loading("language model")
    for text in model.upsample(request):
        yield Loading("prompt", text=text)
