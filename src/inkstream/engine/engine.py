"""`Engine.submit(Request) -> Iterator[Event]`: the one way in, in process."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Generator, Iterator

import torch

from inkstream.engine.inputs import to_image
from inkstream.engine.loader import load
from inkstream.engine.model import Model, Run, advance, complete, singles
from inkstream.engine.options import options
from inkstream.types import Done, Event, Failed, InputError, Loading, Queued, Request, Result, Spec, Step


class Engine:
    """Draws requests one after the other and keeps the last model warm.

    device: "cpu", "cuda", "mps" or None for the best there is; dtype: as in `load`, None for the device's own.
    commercial_only: refuse models whose licence does not allow commercial use; None follows the setting.
    """

    def __init__(
        self,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        previews: bool = False,
        commercial_only: bool | None = None,
    ):
        self.device = device
        self.dtype = dtype
        self.previews = previews
        self.commercial_only = commercial_only
        self._name: str | None = None
        self._model: Model | None = None
        self._turn = threading.Lock()  # held while a model is loaded, by the thread that loads it

    def submit(self, request: Request) -> Iterator[Event]:
        """The events of one request; Done comes once for each picture. Closing the iterator cancels at the next step.

        Nothing is raised for a request that cannot be drawn: the last event is Failed.
        """
        yield Queued(request)
        try:
            yield from self._draw(request)
        except InputError as error:
            yield Failed(str(error), "input")
        except torch.OutOfMemoryError:
            size = f"{request.width}x{request.height}" if request.width else "this size"
            yield Failed(f"the device ran out of memory at {size}: take a smaller size or --device cpu", "input")

    def generate(self, request: Request) -> Result:
        """All pictures of a request. InputError if it cannot be drawn."""
        result = Result([], [])
        for event in self.submit(request):
            if isinstance(event, Done):
                result.images.append(event.image)
                result.requests.append(event.request)
            elif isinstance(event, Failed):
                raise InputError(event.error)
        return result

    def load(self, name: str) -> Iterator[Loading]:
        """Make a model ready; does nothing if it is already. Ends when `self.model` is it."""
        events: queue.SimpleQueue[Loading | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._turn:
                    if self._name != name:
                        self._model = self._name = None
                        gc.collect()
                        self._model = load(name, self.device, self.dtype, events.put, self.commercial_only)
                        self._name = name
                events.put(None)
            except BaseException as error:  # carried to the caller's thread
                events.put(error)

        if self._name == name:
            return
        threading.Thread(target=work, name="inkstream-load", daemon=True).start()
        while isinstance(event := events.get(), Loading):
            yield event
        if event is not None:
            raise event

    @property
    def model(self) -> Model:
        """The model loaded last."""
        assert self._model is not None, "load a model first"
        return self._model

    def _draw(self, request: Request) -> Iterator[Event]:
        yield from self.load(request.model)
        model = self.model
        request = complete(request, model.spec)
        if request.upsample:
            request = yield from self._upsample(model, request)
        yield Loading("prompt")
        cond = model.encode(request)
        original = model.open_original(request)
        for index, one in enumerate(singles(request, request.count)):
            began = time.perf_counter()
            run = model.start(one, cond, original)
            try:
                for step, t, seconds in self._steps(model, run):
                    preview = model.preview(run.estimate) if self.previews else None
                    yield Step(step, run.evaluations, index, request.count, t, seconds, preview)
                image = to_image(model.finish(run, original))
            finally:
                run.close()
            yield Done(image, one, index, request.count, time.perf_counter() - began)

    def _upsample(self, model: Model, request: Request) -> Generator[Event, None, Request]:
        """The request with its prompt written out; it draws the same without that model."""
        yield Loading("language model")
        text = ""
        for text in model.upsample(request):
            yield Loading("prompt", text=text)
        return request.model_copy(update={"prompt": text or request.prompt, "upsample": False})

    def _steps(self, model: Model, run: Run) -> Iterator[tuple[int, float, float]]:
        """Drive one run to its end; after each evaluation its number, time and seconds."""
        for step in range(1, run.evaluations + 1):
            began, t = time.perf_counter(), run.query.t  # type: ignore[union-attr]
            advance(model.family, [run])
            if step == 1 and not torch.isfinite(run.estimate).all():  # later ones show in the result
                raise model.overflow()
            yield step, t, time.perf_counter() - began


def advice(request: Request, model: Model) -> list[str]:
    """What in a request has no effect on this model, or not a good one, a line each. request: as it was given."""
    lines = []
    for name in ("prompt", "negative_prompt"):
        if most := model.family.cut_at(getattr(request, name)):
            lines.append(f"the {name.replace('_', ' ')} is longer than {most} tokens: its end is not read")
    return lines + remarks(request, model.spec)


def remarks(request: Request, spec: Spec) -> list[str]:
    """The same, as far as it follows from the model's Spec. What was given as it is anyway is passed over."""
    lines = []
    for name, option in options(spec, request).items():
        if not option.why or option.needed or name not in request.model_fields_set:
            continue
        value, default = getattr(request, name), Request.model_fields[name].default
        left_out = complete(request.model_copy(update={name: default}), spec)
        if value not in (default, getattr(left_out, name)):
            shown = name.replace("_", " ") + ("" if isinstance(value, str) else f" {value:g}")
            lines.append(f"{shown}{' has no effect' if option.effect == 'ignores' else ''}: {option.why}")
    return lines
