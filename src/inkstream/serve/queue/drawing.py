"""What is in the engine's hands: runs are begun, followed and stopped; what becomes of them is told to the queue.

A run is one try at what is left of a job. What it has finished is in the store at once, so that the next try, after a
death of the engine or of the server, goes on behind it.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.serve import schema
from inkstream.serve.engines.models import Offered, choose
from inkstream.serve.engines.pace import Pace
from inkstream.serve.engines.process import EngineProcess, MakeEngine
from inkstream.serve.engines.worker import read_spec
from inkstream.serve.errors import Refused, reason_of
from inkstream.serve.limits import Settings
from inkstream.serve.metrics import Metrics
from inkstream.serve.queue.feed import Feed
from inkstream.serve.queue.inputs import PREFIX, pictures_in
from inkstream.serve.queue.records import part_at, parts_of, tell_picture
from inkstream.serve.queue.store import Job, Store
from inkstream.types import Request, singles

SWITCH = 5.0
"""Seconds that loading another model is thought to take until it was measured."""
GRACE = 60.0
"""Seconds that a run may go on after it was stopped, before its engine is ended."""
log = logging.getLogger("inkstream.serve")


class Queue(Protocol):
    """Who is told of runs."""

    def finished(self, job: str) -> None:
        """All its pictures are there."""
        ...

    def failed(self, job: str, message: str, status: int) -> None:
        """It cannot be drawn: 400 where who asked can mend it, else 500."""
        ...

    def lost(self, job: str, died: bool) -> None:
        """Its run has ended before it was done. died: with the engine."""
        ...

    def unsaved(self, job: str, reason: str) -> None:
        """Its picture could not be kept: the disk is full, or must not be written to."""
        ...

    def changed(self) -> None:
        """A slot is free, or the engine is there, or gone."""
        ...


@dataclass
class Run:
    """One try at a job. What an earlier one still says is void, since it has another id."""

    id: str
    job: Job
    model: str  # of this part of the job
    before: int  # pictures of the job that come before this run's
    began: float  # monotonic time
    last: tuple[str, dict[str, Any]] = ("loading", {"what": "model", "done": None, "total": None})
    progress: schema.Progress | None = None
    picture_began: float | None = None
    steps: int = 0  # of this picture, and the runs that shared them, added up
    shared: int = 0
    stopped: float | None = None  # when it was told to stop
    unsaved: str = ""  # why its last picture could not be kept


class Drawing:
    """The engine's process and the runs it has in hand. Lives in one event loop."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        models: dict[str, Offered],
        metrics: Metrics,
        feed: Feed,
        queue: Queue,
        make: MakeEngine = EngineProcess,
    ):
        self.settings = settings
        self.store = store
        self.models = models
        self.metrics = metrics
        self.feed = feed
        self.queue = queue
        self.pace = Pace(models)
        first = {"machine": asdict(settings.machine), "parts": str(store.parts.resolve())}
        self.engine = make(first, self._told, self._died)
        self.ready = False
        self.unusable = ""  # why no engine can be made as the server was started
        self.give_up: Callable[[], None] = lambda: None  # called then
        self.loaded: str | None = None  # the model in the engine's memory
        self.device: str | None = None
        self.switch = SWITCH  # seconds it takes to load another
        self.runs: dict[str, Run] = {}

    def has_room(self, model: str) -> bool:
        """Whether a job of a model can be begun. Models take turns: those at once are of one."""
        same = all(run.model == model for run in self.runs.values())
        return self.ready and same and len(self.runs) < self.settings.slots

    def run_of(self, job: str) -> Run | None:
        """The run of a job that still wants it."""
        return next((run for run in self.runs.values() if run.job.id == job and run.stopped is None), None)

    def begin(self, job: Job) -> None:
        """Hand the engine what is left to draw of a job: of its first part that is not done, the pictures not drawn."""
        drawn = {picture.place: picture for picture in self.store.pictures_of(job.id)}
        first = next((place for place in range(job.total) if place not in drawn), None)
        if first is None:
            self.queue.finished(job.id)
            return
        try:
            request, start = part_at(job, first)
            request, model = choose(self.models, request)
            skip = first - start
            update: dict[str, Any] = {"seed": next(singles(request, skip)).seed, "count": request.count - skip}
            given = request.prompt if request.upsample else ""
            if skip and request.upsample and not drawn[start].request["upsample"]:  # words chosen with the first seed
                update |= {"upsample": False, "prompt": drawn[start].request["prompt"]}
            request = request.model_copy(update=update)
            fields = request.model_dump(mode="json", exclude_unset=True) | self._paths(request)
        except Refused as refusal:  # what was accepted has gone since: a model that is offered no more, an upload
            self.queue.failed(job.id, refusal.message, 400)
            return
        run = Run(secrets.token_hex(8), job, model.name, first, time.monotonic())
        self.runs[run.id] = run
        self._tell(run, *run.last)
        fields["model"] = model.source
        self.engine.send({"draw": run.id, "name": model.name, "request": fields, "upsampled_from": given})

    def stop(self, job: str) -> None:
        """Stop a job's run within one step. It keeps its slot until the engine says that it has stopped."""
        run = self.run_of(job)
        if run is not None:
            run.stopped = time.monotonic()
            self.engine.send({"cancel": run.id})

    def check_time(self) -> None:
        """End what takes too long; the engine too, where it does not stop."""
        now, most = time.monotonic(), self.settings.limits.seconds
        for run in list(self.runs.values()):
            if run.stopped is None and now - run.began > most:
                self.queue.failed(run.job.id, f"it took more than {most:g} s, which is all a job has here", 400)
            elif run.stopped is not None and now - run.stopped > GRACE:
                log.error("engine does not stop a run, and is ended", extra={"job": run.job.id})
                self.engine.kill()
                return

    def left(self, run: Run) -> float:
        """Seconds of drawing alone until a run's job ends."""
        works = [self.pace.work(part) for part in parts_of(run.job) for _ in range(part.count)]
        at = run.progress
        done = run.before if at is None else at.picture
        share = 0.0 if at is None else at.step / at.steps
        return self.pace.seconds(run.model, sum(works[done:]) - share * works[done])

    # What the engine says ---------------------------------------------------------------------------------------------

    def _told(self, message: dict[str, Any]) -> None:
        """One message of the engine."""
        for kind, size in message.get("memory", {}).items():
            self.metrics.memory.labels(kind).set(size)
        event = message["event"]
        if "run" not in message:
            self._told_of_itself(event, message)
            return
        run = self.runs.get(message["run"])
        if run is None:
            return
        handlers: dict[str, Callable[[Run, dict[str, Any]], None]] = {
            "loading": self._loading,
            "remarks": self._remarks,
            "step": self._step,
            "picture": self._picture,
        }
        if event in handlers:
            try:
                handlers[event](run, message)
            except (sqlite3.Error, OSError) as error:
                log.error("a picture cannot be kept", extra={"job": run.job.id, "error": str(error)})
                run.unsaved, run.stopped = reason_of(error), time.monotonic()
                self.engine.send({"cancel": run.id})
                if "file" in message:
                    with suppress(OSError):
                        (self.store.parts / message["file"]).unlink(missing_ok=True)
            return
        del self.runs[run.id]
        if event == "unsaved" or run.unsaved:
            self.queue.unsaved(run.job.id, run.unsaved or message["error"])
        elif event == "failed":
            self.queue.failed(run.job.id, message["error"], 400 if message["kind"] == "input" else 500)
        elif event in ("cancelled", "lost"):  # lost: with the one engine of several that drew it
            self.metrics.deaths.inc(event == "lost")
            self.queue.lost(run.job.id, died=event == "lost")
        elif (job := self.store.job(run.job.id)) is not None and job.state == "running":
            self.begin(job)  # its next part, or its end
        self.queue.changed()

    def _told_of_itself(self, event: str, message: dict[str, Any]) -> None:
        if event == "ready":
            self.ready = True
            self.metrics.ready.set(1)
            log.info("engine ready", extra={"seconds": message["seconds"]})
            for model in self.models.values():
                if model.spec is None:
                    self.engine.send({"describe": model.name, "source": model.source})
            self.queue.changed()
            if self.settings.preload and not self.runs:
                first = next(iter(self.models.values()))
                self.engine.send({"load": first.name, "source": first.source})
        elif event == "loaded":
            self.loaded, self.device = message["model"], message["device"]
        elif event == "described":
            self.models[message["model"]].spec = read_spec(message["spec"])
        elif event == "unusable":
            self.unusable = message["error"]
            log.error("engine cannot be made", extra={"error": self.unusable})
            self.give_up()
        elif event == "unloadable":
            self.models[message["model"]].error = message["error"]
            log.error("model cannot be used", extra={"model": message["model"], "error": message["error"]})

    def _loading(self, run: Run, message: dict[str, Any]) -> None:
        run.last = "loading", {name: message[name] for name in ("what", "done", "total")}
        self._tell(run, *run.last)

    def _remarks(self, run: Run, message: dict[str, Any]) -> None:
        """The model is there, and the first step is done."""
        seconds = time.monotonic() - run.began
        self.metrics.stage.labels("prepare").observe(seconds)
        self.device = message["device"]
        if self.loaded not in (None, run.model):
            self.switch = (self.switch + seconds) / 2
        self.loaded = run.model
        known = self.store.job(run.job.id)
        if message["remarks"] and known is not None:
            self.store.remark(run.job.id, list(dict.fromkeys([*known.remarks, *message["remarks"]])))

    def _step(self, run: Run, message: dict[str, Any]) -> None:
        seconds = message["seconds"]
        if run.picture_began is None:
            run.picture_began = time.monotonic() - seconds
        run.steps += 1
        run.shared += len(self.runs)
        run.progress = schema.Progress(
            picture=run.before + message["picture"], of=run.job.total, step=message["step"], steps=message["steps"]
        )
        if not self.pace.knows(run.model):  # a first guess, from a first step
            self.pace.learn(part_at(run.job, run.progress.picture)[0], seconds * message["steps"], len(self.runs))
        self.metrics.step.labels(run.model).observe(seconds)
        self.metrics.batch.observe(len(self.runs))
        eta = round(self.left(run) * len(self.runs), 2)
        data = {"t": message["t"], "seconds": seconds, "eta": eta, "preview": message["preview"]}
        run.last = "step", run.progress.model_dump() | data
        self._tell(run, *run.last)

    def _picture(self, run: Run, message: dict[str, Any]) -> None:
        """Take a finished picture in, if its job still wants it."""
        asked = run.job.request
        given = {name: asked[name] for name in PICTURE_FIELDS if asked.get(name)}
        facts = message | {"request": message["request"] | given}
        part = self.store.parts / message["file"]
        picture = self.store.add_picture(run.job, run.before + message["index"], time.time(), part, facts)
        if picture is None:
            return
        drawn = Request.model_validate(message["request"])
        self.pace.learn(drawn, message["seconds"], run.shared / run.steps if run.steps else 1.0)
        if run.picture_began is not None:
            self.metrics.stage.labels("draw").observe(time.monotonic() - run.picture_began)
        run.picture_began, run.steps, run.shared = None, 0, 0
        self.metrics.pictures.labels(run.job.key, run.model).inc()
        self._tell(run, "picture", tell_picture(picture, run.job).model_dump(mode="json"), lasting=True)

    def _died(self) -> None:
        """The engine is gone, and with it all runs."""
        self.ready, self.loaded = False, None
        self.metrics.ready.set(0)
        self.metrics.deaths.inc()
        runs, self.runs = list(self.runs.values()), {}
        with suppress(OSError):
            for part in self.store.parts.iterdir():
                part.unlink(missing_ok=True)
        for run in runs:
            self.queue.lost(run.job.id, died=True)
        self.queue.changed()

    # The rest ---------------------------------------------------------------------------------------------------------

    def _paths(self, request: Request) -> dict[str, Any]:
        """The files of a request's pictures. Refused where one is not there."""
        paths: dict[str, Any] = {}
        for name, place, given in pictures_in(request):
            upload = self.store.upload(given.removeprefix(PREFIX))
            file = None if upload is None else self.store.uploads / upload.file
            if file is None or not file.exists():
                raise Refused(400, f"{given} is no longer kept: upload it again")
            paths[name] = str(file.resolve()) if place is None else [*paths.get(name, ()), str(file.resolve())]
        return paths

    def _tell(self, run: Run, name: str, data: dict[str, Any], lasting: bool = False) -> None:
        if run.stopped is None:
            self.feed.tell(run.job.id, run.job.key, name, data, lasting)
