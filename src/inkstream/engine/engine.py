"""`Engine.submit(Request) -> Iterator[Event]`: the Drawer that draws in this process."""

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

from inkstream.engine.drawing.batch import Alone, Batch, Drawing
from inkstream.engine.drawing.complete import Complete, complete
from inkstream.engine.drawing.enhancer import able
from inkstream.engine.drawing.flow import Job, expand, way_of
from inkstream.engine.drawing.model import Model
from inkstream.engine.drawing.options import options
from inkstream.engine.drawing.templates import filled, has_template, wildcard_folder
from inkstream.engine.drawing.upscaling import Upscalers, enlarge, with_alpha
from inkstream.engine.drawing.verifying import draw_until_verified
from inkstream.engine.drawing.writing import writes_out
from inkstream.engine.files.sources import locate
from inkstream.engine.files.upscalers import upscaler_folder
from inkstream.engine.machine.fit import seconds_of
from inkstream.engine.machine.loader import ANY, Opened, check_machine, open_model, read_model
from inkstream.engine.machine.memory import Placing, typical
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.engine.pictures.inputs import open_layers
from inkstream.families import SPECS
from inkstream.nn.heap import give_back_freed_memory, keep_freed_memory
from inkstream.types import (
    Done,
    Event,
    Failed,
    InputError,
    Loading,
    Machine,
    Queued,
    Region,
    Request,
    Result,
    Spec,
    Step,
    in_time,
    singles,
)

if TYPE_CHECKING:
    from inkstream.engine.machine.parallel import Crew


LONG = 60
"""Seconds. A picture that takes longer is announced with its time."""


class Engine:
    """Draws requests in this process, those submitted at once together. It keeps the last model loaded.

    machine: what models run on. previews: attach a small picture to each Step. crew: the processes that draw together,
    if there are several. All of them submit one request after the other; the first process's request is drawn, whatever
    the others submit. Raises InputError if the machine has no such device, dtype, memory size or attention.
    """

    def __init__(self, machine: Machine = ANY, previews: bool = False, crew: Crew | None = None):
        check_machine(machine)
        if machine.compile and crew is not None:
            raise InputError("compiled blocks are for one process: leave out --compile, or torchrun")
        self.machine = machine
        self.previews = previews
        self.crew = crew
        self._name: str | None = None
        self._model: Model | None = None
        self._placing: Placing | None = None
        self._least = ("", 0)  # a model, and its first placement to try: memory ran out under those before
        self._told: tuple[object, ...] = ()  # the last request whose time was told
        self._batch = Batch()
        self._turn = threading.Lock()  # held while a model is loaded, by the thread that loads it

    def submit(self, request: Request) -> Iterator[Event]:
        """Yield the events of a request, and a Done for each picture. Closing the iterator cancels at the next step.

        A request that cannot be drawn ends with Failed; nothing is raised for it. If memory runs out, the remaining
        pictures are drawn under the next placement, which needs less. Several threads may submit, and one thread may
        read several iterators in turn: their pictures share the model's forwards.
        """
        yield Queued(request, self._batch.ahead(shares=self._name == request.model))
        try:
            if request.until_verified and not request.only_enlarges:
                if self.crew:
                    raise InputError("until_verified is for one process: leave it out, or torchrun")
                yield from draw_until_verified(self._draw_in_batch, request)
            else:
                yield from self._draw_in_batch(request)
        except InputError as error:
            yield Failed(str(error), "input")
        except RuntimeError as error:
            if self.crew is None:
                raise
            raise self.crew.explain(error, is_out_of_memory(error)) from error

    def generate(self, request: Request) -> Result:
        """Return all pictures of a request. Raises InputError if it cannot be drawn."""
        return Result.of(self.submit(request))

    def models(self) -> list[Spec]:
        """Return the known models."""
        return list(SPECS.values())

    def spec(self, name: str) -> Spec:
        """Return the Spec of a model. Raises InputError if there is no such model.

        No weights are read, but a model on the hub is downloaded, unless it is a known one.
        """
        if self._name == name and self._model is not None:
            return self._model.spec
        spec = SPECS[name] if name in SPECS else locate(name, chosen=self.machine.chosen).spec
        return able(spec, self.machine)

    def remarks(self, request: Request) -> list[str]:
        """Return one line for each option of the request that has no effect on the loaded model, or a poor one."""
        return [] if request.only_enlarges else advice(request, self.model)

    def ran_on(self, name: str) -> dict[str, str]:
        """Return the device, and of a loaded model the dtype and the adapters that are merged into it."""
        if self._model is None:  # only an upscaling model has drawn
            return {"device": str(check_machine(self.machine)[0])}
        merged = {"merged_loras": ", ".join(self.machine.merge_lora)} if self.machine.merge_lora else {}
        return {"device": str(self.model.device), "dtype": str(self.model.dtype).removeprefix("torch."), **merged}

    def load(self, name: str, request: Request | None = None) -> Generator[Loading, None, Complete]:
        """Load a model, unless it is loaded already. Afterwards `self.model` is this model.

        request: what the model will draw first; the placement suits it. None: a picture of the model's own size.
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
        self._placing = Placing(opened, self.machine.memory_bytes, self.machine.placement, least)
        whole = complete(request or typical(opened.source.spec), opened.source.spec)
        self._model = read_model(opened, self._placing.choose(whole), tell)
        if self._model.device.type == "cpu":
            keep_freed_memory()
        self._name = name
        return whole

    def _open(self, name: str, request: Request | None, tell: Callable[[Loading], None] | None) -> Opened:
        """Find and check the model's files. No weights are read."""
        if self.crew is None:
            return open_model(name, self.machine, tell)
        with self.crew.in_turn():
            opened = open_model(name, self.machine, tell)
        note = self.crew.settle(request or Request.model_validate({"model": name}), opened.source.spec)
        if tell:
            tell(note)
        return replace(opened, crew=self.crew)

    def _ready(self, name: str, request: Request | None) -> Complete | None:
        """Return the completed request if its model is loaded under a placement that suits it, else None."""
        model, placing = self._model, self._placing
        if self._name != name or model is None:
            return None
        whole = complete(request or typical(model.spec), model.spec)
        # With several processes, some may have room where others have not.
        if request is None or placing is None or self.crew:
            return whole
        taken = model.adapters.taken(whole.loras)  # without room beside them, the request waits for their end
        return whole if model.placement in placing.suiting(whole, taken) else None

    def _forget(self) -> None:
        self._model = self._name = self._placing = None  # which holds the modules too
        gc.collect()
        give_back_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fall(self, request: Request) -> Loading:
        """Give up the placement that memory ran out under, and take the next. Raises InputError if it was the last."""
        assert self._placing is not None  # weights are being read or used under it
        names = list(PLACEMENTS)
        ran_out = names.index(self._placing.placement)
        self._least = (request.model, ran_out + 1)
        size = f"{request.width}x{request.height}" if request.width else "this size"
        self._forget()
        if ran_out + 1 == len(names):
            raise InputError(f"the device ran out of memory at {size}: take a smaller size or --device cpu")
        line = f"out of memory at {size} with placement {names[ran_out]}: trying placement {names[ran_out + 1]}"
        return Loading("memory", note=line)

    def placing(self, request: Request) -> Placing:
        """Return what the request's model needs under each placement. Its files are looked at; no weights are read."""
        return Placing(self._open(request.model, request, None), self.machine.memory_bytes, self.machine.placement)

    @property
    def model(self) -> Model:
        """The model that was loaded last."""
        assert self._model is not None, "load a model first"
        return self._model

    def _draw_in_batch(self, request: Request) -> Generator[Event, None, None]:
        """Draw all pictures of a request once. Their forwards are shared with those of other requests."""
        yield from self._batch.join(self._draw_all(request))

    def _draw_all(self, request: Request) -> Drawing:
        """Draw all pictures. If the prompt is a template, each picture has its own prompt."""
        if request.seed is None:
            request = request.model_copy(update={"seed": secrets.randbelow(2**32)})
        if request.only_enlarges:
            yield from self._enlarge(request)
            return
        if not has_template(request):
            yield from self._draw_under_placements(request)
            return
        folder = wildcard_folder(self.machine)
        for index, one in enumerate([filled(one, folder) for one in singles(request)]):
            yield Loading("prompt", text=one.prompt)
            yield from numbered(self._draw_under_placements(one), index, request.count)

    def _enlarge(self, request: Request) -> Drawing:
        """Enlarge the start picture. No model is loaded but the request's upscaling model. Transparency stays."""
        assert request.image is not None  # or it would not only enlarge
        whole = complete(request, self.spec(request.model))
        upscalers, began = self._upscalers, time.perf_counter()
        colour, alpha = open_layers(request.image)
        loaded = upscalers.get(request.upscaler) if request.upscaler else None
        steps = enlarge(colour, whole.final_size(1), loaded)
        image, at = None, began
        while image is None:
            try:
                done, total = next(steps)
            except StopIteration as end:
                image = with_alpha(end.value, alpha)
            else:
                now = time.perf_counter()
                if done:
                    yield Step(done, total, 0, whole.count, 0.0, now - at)
                at = now
        for index, one in enumerate(singles(whole)):
            yield Done(image.copy(), one.plain(), index, whole.count, time.perf_counter() - began)

    @property
    def _upscalers(self) -> Upscalers:
        """The loaded model's upscaling models, or those of the machine."""
        if self._model is not None:
            return self._model.upscalers
        return Upscalers(upscaler_folder(self.machine), check_machine(self.machine)[0])

    def _draw_under_placements(self, request: Request) -> Drawing:
        """Draw all pictures of a request, under one placement or, if memory runs out, several."""
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
        """Draw the pictures that are not drawn yet."""
        whole = self._ready(request.model, request)
        if whole is None:
            yield Alone()
            whole = yield from self.load(request.model, request)
        model = self.model
        if self.crew:
            self.crew.check(whole, model.spec)
        if whole.upsample and not writes_out(whole, model.spec):
            prompt = whole.prompt
            for event in expand(model, whole):
                prompt = event.text or prompt
                yield event
            whole = whole.model_copy(update={"prompt": prompt, "upsample": False})
            whole = self.crew.same(whole) if self.crew else whole
        if line := self._foretell(whole):
            yield Loading("time", note=line)
        job = Job(model, whole, drawn, self.previews, self.crew, self._end_phase)
        yield from way_of(model.family).draw(job)

    def _foretell(self, request: Complete) -> str | None:
        """Return a line with the time of a picture that takes over a minute, or None. The same is not told twice."""
        size = "x".join(map(str, request.final_size(self.model.spec.multiple)))
        told = (request.model, size, request.steps, request.tile, request.upscale_strength, request.control_nets)
        if told == self._told or self.crew or self._placing is None:
            return None
        self._told = told
        seconds = seconds_of(request, self.model, self._placing.opened.source.parts["transformer"].tensors.values())
        if seconds is None or seconds < LONG:
            return None
        return f"a picture of {size} in {request.steps} steps takes about {in_time(seconds)} here"

    def _end_phase(self) -> None:
        """Where memory is short, give freed memory back, so that the next phase starts with what its plan foresees."""
        if self.model.device.type == "cpu" and self.model.placement != "resident":
            give_back_freed_memory()


def numbered(drawing: Drawing, index: int, count: int) -> Drawing:
    """The drawing of a request's only picture, as picture `index` of `count`. Errors are thrown into it."""
    failure: BaseException | None = None
    try:
        while True:
            item = next(drawing) if failure is None else drawing.throw(failure)
            failure = None
            try:
                yield replace(item, index=index, count=count) if isinstance(item, Step | Done) else item
            except Exception as error:
                failure = error
    except StopIteration:
        return
    finally:
        drawing.close()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device is out of memory. torch has a class for it on CUDA only."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def advice(request: Request, model: Model) -> list[str]:
    """Return one line for each option that has no effect on this model, or a poor one. request: as it was given."""
    lines: list[str] = []
    if model.placement != "resident":
        lines.append(f"placement {model.placement}: weights come to the device when they are used, to save memory")
    for name in ("prompt", "negative_prompt"):
        if most := model.family.cut_at(getattr(request, name)):
            lines.append(f"the {name.replace('_', ' ')} is longer than {most} tokens: the model does not read its end")
    for region in map(Region.read, request.regions):
        if most := model.family.cut_at(region.text):
            lines.append(f"the text of region {region.place} is longer than {most} tokens: its end is not read")
    return lines + remarks(request, model.spec)


def remarks(request: Request, spec: Spec) -> list[str]:
    """Return the lines of `advice` that follow from the model's Spec. Values that equal the default are left out."""
    lines: list[str] = []
    whole = complete(request, spec)
    sized = request.model_copy(update={"width": whole.width, "height": whole.height})
    for name, option in options(spec, request).items():
        if not option.why or option.needed or name not in request.model_fields_set:
            continue
        value, default = getattr(request, name), Request.model_fields[name].default
        left_out = complete(sized.model_copy(update={name: default}), spec)
        if value not in (default, getattr(left_out, name)):
            shown = name.replace("_", " ") + ("" if isinstance(value, str) else f" {value:g}")
            lines.append(f"{shown}{' has no effect' if option.effect == 'ignores' else ''}: {option.why}")
    return lines
