"""`Engine.submit(Request) -> Iterator[Event]`: the one way in, in process."""

from __future__ import annotations

import gc
import queue
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from inkstream.engine.drawing.batch import Alone, Ask, Batch, Drawing, tokens_of
from inkstream.engine.drawing.model import Complete, Model, complete
from inkstream.engine.drawing.options import options
from inkstream.engine.drawing.writing import notes, writes_out, written_out
from inkstream.engine.machine.loader import Opened, open_model, read_model
from inkstream.engine.machine.memory import Placing, typical
from inkstream.engine.machine.placement import PLANS
from inkstream.engine.pictures.inputs import to_image
from inkstream.nn.heap import give_back_freed_memory, keep_freed_memory
from inkstream.types import Done, Event, Failed, InputError, Loading, Queued, Request, Result, Spec, Step, singles

if TYPE_CHECKING:
    from inkstream.engine.machine.parallel import Crew


class Engine:
    """Draws requests, those that are submitted at once together, and keeps the last model warm.

    device: "cpu", "cuda", "mps" or None for the best there is; dtype: as in `load`, None for the device's own.
    commercial_only: refuse models whose licence does not allow commercial use; None follows the setting. memory: bytes
    of the device that models may take, on the CPU those of the whole process; None is what is free. plan: a key of
    `placement.PLANS`; None is the fastest that keeps within the memory. crew: the processes that draw together, where
    there are several: all submit requests one after the other, those of the first process, whatever theirs are.
    compiled: compile the transformer's blocks when they first draw.
    """

    def __init__(
        self,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        previews: bool = False,
        commercial_only: bool | None = None,
        memory: int | None = None,
        plan: str | None = None,
        crew: Crew | None = None,
        compiled: bool = False,
    ):
        if plan is not None and plan not in PLANS:
            raise InputError(f"plan {plan} is not known: take {', '.join(PLANS)}")
        if compiled and crew is not None:
            raise InputError("compiled blocks are for one process: leave out --compile, or torchrun")
        self.device = device
        self.dtype = dtype
        self.previews = previews
        self.commercial_only = commercial_only
        self.memory = memory
        self.plan = plan
        self.crew = crew
        self.compiled = compiled
        self._name: str | None = None
        self._model: Model | None = None
        self._placing: Placing | None = None
        self._least = ("", 0)  # a model, and the first plan to think of for it: those before ran out of memory
        self._batch = Batch()
        self._turn = threading.Lock()  # held while a model is loaded, by the thread that loads it

    def submit(self, request: Request) -> Iterator[Event]:
        """The events of one request; Done comes once for each picture. Closing the iterator cancels at the next step.

        Nothing is raised for a request that cannot be drawn: the last event is Failed. Where memory runs out, what is
        not drawn yet is drawn under the next plan, which takes less. Many threads may submit, and several iterators be
        read in turn: their pictures share the model's forwards.
        """
        yield Queued(request, self._batch.ahead(shares=self._name == request.model))
        try:
            yield from self._batch.join(self._draw_all(request))
        except InputError as error:
            yield Failed(str(error), "input")
        except RuntimeError as error:
            if self.crew is None:
                raise
            raise self.crew.explain(error, is_out_of_memory(error)) from error

    def generate(self, request: Request) -> Result:
        """All pictures of a request. InputError if it cannot be drawn."""
        return Result.of(self.submit(request))

    def load(self, name: str, request: Request | None = None) -> Generator[Loading, None, Complete]:
        """Make a model ready; does nothing if it is already. Ends when `self.model` is it.

        request: what the model will draw first, so that it is placed to suit that; None: a picture of its own size.
        Returns the request, completed for the model.
        """
        events: queue.SimpleQueue[Loading | BaseException | Complete] = queue.SimpleQueue()

        def work() -> None:
            try:
                with self._turn:
                    events.put(self._ready(name, request) or self._load(name, request, events.put))
            except BaseException as error:  # carried to the caller's thread
                events.put(error)

        if ready := self._ready(name, request):
            return ready
        threading.Thread(target=work, name="inkstream-load", daemon=True).start()
        while isinstance(event := events.get(), Loading):
            yield event
        if isinstance(event, BaseException):
            raise event
        return event

    def _load(self, name: str, request: Request | None, tell: Callable[[Loading], None]) -> Complete:
        self._forget()
        opened = self._open(name, request, tell)
        least = self._least[1] if self._least[0] == name else 0
        self._placing = Placing(opened, self.memory, self.plan, least)
        whole = complete(request or typical(opened.source.spec), opened.source.spec)
        plan = self._placing.choose(whole)
        self._model = read_model(opened, plan, tell, self.compiled)
        if self._model.device.type == "cpu":
            keep_freed_memory()
        self._name = name
        return whole

    def _open(self, name: str, request: Request | None, tell: Callable[[Loading], None] | None) -> Opened:
        """The model, of which nothing is read yet."""
        if self.crew is None:
            return open_model(name, self.device, self.dtype, tell, self.commercial_only)
        with self.crew.in_turn():
            opened = open_model(name, self.device, self.dtype, tell, self.commercial_only)
        note = self.crew.settle(request or Request.model_validate({"model": name}), opened.source.spec)
        if tell:
            tell(note)
        return replace(opened, crew=self.crew)

    def _ready(self, name: str, request: Request | None) -> Complete | None:
        """The completed request, if that model is loaded and placed so that the request can be drawn."""
        model, placing = self._model, self._placing
        if self._name != name or model is None:
            return None
        whole = complete(request or typical(model.spec), model.spec)
        # Of several processes some may have room where others have not.
        if request is None or placing is None or self.crew:
            return whole
        return whole if model.plan in placing.suiting(whole) else None

    def _forget(self) -> None:
        self._model = self._name = self._placing = None  # which knows the modules, too
        gc.collect()
        give_back_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fall(self, request: Request) -> Loading:
        """Leave the plan that memory ran out under, for the next. InputError where there is none."""
        assert self._placing is not None  # for weights are read where it says
        names = list(PLANS)
        ran_out = names.index(self._placing.plan)
        self._least = (request.model, ran_out + 1)
        size = f"{request.width}x{request.height}" if request.width else "this size"
        if ran_out + 1 == len(names):
            self._forget()
            raise InputError(f"the device ran out of memory at {size}: take a smaller size or --device cpu")
        line = f"memory ran out at {size} under the plan {names[ran_out]}: going on with {names[ran_out + 1]}"
        self._forget()
        return Loading("memory", note=line)

    def placing(self, request: Request) -> Placing:
        """What the request's model takes under each plan. Its files are looked at, and no weights are read."""
        return Placing(self._open(request.model, request, None), self.memory, self.plan)

    @property
    def model(self) -> Model:
        """The model loaded last."""
        assert self._model is not None, "load a model first"
        return self._model

    def _draw_all(self, request: Request) -> Drawing:
        """Everything, under one plan or, where memory runs out, several."""
        if request.seed is None:
            request = request.model_copy(update={"seed": secrets.randbelow(2**32)})
        if self.crew:
            request = self.crew.same(request)
        drawn: list[Done] = []
        while True:
            try:
                yield from self._draw(request, drawn)
                if self.crew:
                    self.crew.wait()
                return
            except RuntimeError as error:
                if self.crew or not is_out_of_memory(error):
                    raise
            yield Alone()
            yield self._fall(request)

    def _draw(self, request: Request, drawn: list[Done]) -> Drawing:
        """What is not drawn yet."""
        whole = self._ready(request.model, request)
        if whole is None:
            yield Alone()
            whole = yield from self.load(request.model, request)
        model = self.model
        if self.crew:
            self.crew.check(whole, model.spec)
        by_grammar = writes_out(whole, model.spec)
        if whole.upsample and not by_grammar:
            whole = yield from self._upsample(model, whole)
            whole = self.crew.same(whole) if self.crew else whole
        yield Loading("prompt")
        for line in notes(whole, model.spec):
            yield Loading("prompt", note=line)
        cond = model.encode(whole)
        original = model.open_original(whole)
        self._end_phase()
        own = self.crew.own if self.crew else slice(None)
        pictures = list(singles(whole))
        for index, one in list(enumerate(pictures))[own][len(drawn) :]:
            began = time.perf_counter()
            if by_grammar:  # each picture has the words of its own seed; `cond` has those of picture 0
                cond = model.encode(one) if index else cond
                yield Loading("prompt", text=written_out(one, model.spec))
            run = model.start(one, cond, original)
            try:
                ask = Ask(model.family, run, tokens_of(run, cond))
                for step in range(1, run.evaluations + 1):
                    asked, t = time.perf_counter(), run.query.t  # type: ignore[union-attr]
                    yield ask
                    if step == 1 and not torch.isfinite(run.estimate).all():  # later ones show in the result
                        raise model.overflow()
                    seconds = time.perf_counter() - asked
                    preview = model.preview(run.estimate) if self.previews else None
                    yield Step(step, run.evaluations, index, whole.count, t, seconds, preview)
                self._end_phase()
                image = to_image(model.finish(run, original))
            finally:
                run.close()
            drawn.append(Done(image, one.plain(), index, whole.count, time.perf_counter() - began))
            yield drawn[-1]
            if self.crew:
                yield from self.crew.others(drawn[-1], pictures)

    def _end_phase(self) -> None:
        """Where memory is short, other parts of the model begin with what their plan foresees."""
        if self.model.device.type == "cpu" and self.model.plan != "resident":
            give_back_freed_memory()

    def _upsample(self, model: Model, request: Complete) -> Generator[Event, None, Complete]:
        """The request with its prompt written out; it draws the same without that model."""
        yield Loading("language model")
        text = ""
        for text in model.upsample(request):
            yield Loading("prompt", text=text)
        return request.model_copy(update={"prompt": text or request.prompt, "upsample": False})


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device has no room; but for CUDA, torch has no kind of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def advice(request: Request, model: Model) -> list[str]:
    """What in a request has no effect on this model, or not a good one, a line each. request: as it was given."""
    lines = []
    if model.plan != "resident":
        lines.append(f"plan {model.plan}: weights come to the device when they are used, to save memory")
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
