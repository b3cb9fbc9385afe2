"""Runs: starts, follows and stops the work of the engine, and reports the results to the queue.

A run is one attempt to draw the remaining pictures of a job. Each finished picture is stored at once. If the engine or
the server dies, the next run starts after the stored pictures.
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

from inkstream.engine.drawing.templates import is_template
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.serve import schema
from inkstream.serve.engines.models import Offered, choose
from inkstream.serve.engines.pace import Pace
from inkstream.serve.engines.process import EngineProcess, MakeEngine
from inkstream.serve.engines.worker import read_sizes, read_spec
from inkstream.serve.errors import Refused, reason_of
from inkstream.serve.limits import Settings
from inkstream.serve.metrics import Metrics
from inkstream.serve.queue.feed import Feed
from inkstream.serve.queue.inputs import PREFIX, pictures_in
from inkstream.serve.queue.records import part_at, parts_of, tell_picture
from inkstream.serve.queue.store import Job, Store
from inkstream.types import Request, singles

SWITCH = 5.0
"""Assumed seconds to load another model, until a load was measured."""
GRACE = 60.0
"""Seconds that a cancelled run may take to stop. After that, the engine is killed."""
log = logging.getLogger("inkstream.serve")


class Queue(Protocol):
    """The receiver of the results of runs. `job` is a job's id."""

    def finished(self, job: str) -> None:
        """The job has all its pictures."""
        ...

    def failed(self, job: str, message: str, status: int) -> None:
        """The job cannot be drawn. status: 400 if the client can correct the request, else 500."""
        ...

    def lost(self, job: str, died: bool) -> None:
        """The job's run has ended too early. died: the engine has died."""
        ...

    def unsaved(self, job: str, reason: str) -> None:
        """A picture of the job could not be stored: the disk is full or not writable."""
        ...

    def changed(self) -> None:
        """A slot is free, or the engine is ready, or the engine has died."""
        ...


@dataclass
class Run:
    """One attempt to draw a job. Each run has its own id, so late messages of an earlier run are ignored."""

    id: str
    job: Job
    model: str  # model of this part of the job
    before: int  # number of pictures of the job before the first picture of this run
    began: float  # monotonic time
    last: tuple[str, dict[str, Any]] = ("loading", {"what": "model", "done": None, "total": None})
    progress: schema.Progress | None = None
    picture_began: float | None = None
    steps: int = 0  # steps of this picture so far
    shared: int = 0  # sum over these steps of the number of runs at that step
    stopped: float | None = None  # monotonic time at which it was cancelled
    unsaved: str = ""  # why its last picture could not be stored


class Drawing:
    """The engine and its runs. All methods run in one event loop."""

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
        remote = [model.source for model in models.values() if model.remote]
        first = {"machine": asdict(settings.machine), "parts": str(store.parts.resolve()), "remote": remote}
        self.engine = make(first, self._receive, self._died)
        self.ready = False
        self.unusable = ""  # why no engine can be made with the server's options
        self.give_up: Callable[[], None] = lambda: None  # called when no engine can be made
        self.loaded: str | None = None  # the model in the engine's memory
        self.device: str | None = None
        self.switch = SWITCH  # seconds to load another model
        self.runs: dict[str, Run] = {}

    def has_room(self, model: str) -> bool:
        """Whether a job with this model can start now. All runs at one time have the same model."""
        same = all(run.model == model for run in self.runs.values())
        return self.ready and same and len(self.runs) < self.settings.slots

    def run_of(self, job: str) -> Run | None:
        """The job's run, or None if it has none or its run was cancelled."""
        return next((run for run in self.runs.values() if run.job.id == job and run.stopped is None), None)

    def begin(self, job: Job) -> None:
        """Start a run for the job's first incomplete part: it draws the missing pictures of that part."""
        drawn = {picture.place: picture for picture in self.store.pictures_of(job.id)}
        first = next((place for place in range(job.total) if place not in drawn), None)
        if first is None:
            self.queue.finished(job.id)
            return
        try:
            request, start = part_at(job, first)
            request, model = choose(self.models, request)
            skip = first - start
            first_one = next(singles(request, skip))
            update: dict[str, Any] = {
                "seed": first_one.seed, "variation": first_one.variation, "count": request.count - skip
            }  # fmt: skip
            given = request.prompt if request.upsample is not False and not is_template(request.prompt) else ""
            # The first seed chose the written-out prompt, so a run that starts later must reuse that prompt.
            if skip and given and not drawn[start].request["upsample"]:
                update |= {"upsample": False, "prompt": drawn[start].request["prompt"]}
            request = request.model_copy(update=update)
            fields = request.model_dump(mode="json", exclude_unset=True) | self._paths(request)
        except Refused as refusal:  # a model or an upload that the job needs is no longer there
            self.queue.failed(job.id, refusal.message, 400)
            return
        run = Run(secrets.token_hex(8), job, model.name, first, time.monotonic())
        self.runs[run.id] = run
        self._tell(run, *run.last)
        fields["model"] = model.source
        marks = self.settings.provenance
        self.engine.send(
            {"draw": run.id, "name": model.name, "request": fields, "upsampled_from": given, "provenance": marks}
        )

    def stop(self, job: str) -> None:
        """Cancel a job's run; it stops within one step. Its slot is free when the engine confirms the stop."""
        run = self.run_of(job)
        if run is not None:
            run.stopped = time.monotonic()
            self.engine.send({"cancel": run.id})

    def check_time(self) -> None:
        """Fail jobs that exceed the time limit, and kill the engine if a cancelled run does not stop."""
        now, most = time.monotonic(), self.settings.limits.seconds
        for run in list(self.runs.values()):
            if run.stopped is None and now - run.began > most:
                line = f"the job took more than {most:g} s: ask for less work, or raise --time-limit"
                self.queue.failed(run.job.id, line, 400)
            elif run.stopped is not None and now - run.stopped > GRACE:
                log.error("the engine does not stop a cancelled run and is killed", extra={"job": run.job.id})
                self.engine.kill()
                return

    def left(self, run: Run) -> float:
        """Estimated seconds until the run's job ends, if it were drawn alone."""
        works = [self.pace.work(part) for part in parts_of(run.job) for _ in range(part.count)]
        at = run.progress
        done = run.before if at is None else at.picture
        share = 0.0 if at is None else at.step / at.steps
        return self.pace.seconds(run.model, sum(works[done:]) - share * works[done])

    # Messages of the engine -------------------------------------------------------------------------------------------

    def _receive(self, message: dict[str, Any]) -> None:
        """Handle one message of the engine."""
        for kind, size in message.get("memory", {}).items():
            self.metrics.memory.labels(kind).set(size)
        event = message["event"]
        if "run" not in message:
            self._receive_state(event, message)
            return
        run = self.runs.get(message["run"])
        if run is None:
            return
        handlers: dict[str, Callable[[Run, dict[str, Any]], None]] = {
            "loading": self._loading,
            "remarks": self._remarks,
            "noted": lambda run, message: self._remark(run, [message["remark"]]),
            "step": self._step,
            "picture": self._picture,
        }
        if event in handlers:
            try:
                handlers[event](run, message)
            except (sqlite3.Error, OSError) as error:
                log.error("a picture cannot be stored", extra={"job": run.job.id, "error": str(error)})
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
        elif event in ("cancelled", "lost"):  # lost: one of several engines has died
            self.metrics.deaths.inc(event == "lost")
            self.queue.lost(run.job.id, died=event == "lost")
        elif (job := self.store.job(run.job.id)) is not None and job.state == "running":
            self.begin(job)  # starts the next part, or finishes the job
        self.queue.changed()

    def _receive_state(self, event: str, message: dict[str, Any]) -> None:
        """Handle a message about the engine or a model, not about a run."""
        if event == "ready":
            self.ready = True
            self.metrics.ready.set(1)
            log.info("engine ready", extra={"seconds": message["seconds"]})
            for model in self.models.values():
                if model.spec is None:
                    self.engine.send({"describe": model.name, "source": model.source})
            self.queue.changed()
            if self.settings.preload and not self.runs:
                first = next((model for model in self.models.values() if not model.remote), None)
                if first is not None:
                    self.engine.send({"load": first.name, "source": first.source})
        elif event == "loaded":
            self.loaded, self.device = message["model"], message["device"]
        elif event == "described":
            model = self.models[message["model"]]
            model.spec, model.sizes = read_spec(message["spec"]), read_sizes(message["sizes"])
        elif event == "unusable":
            self.unusable = message["error"]
            log.error("the engine cannot be made", extra={"error": self.unusable})
            self.give_up()
        elif event == "unloadable":
            self.models[message["model"]].error = message["error"]
            log.error("the model cannot be used", extra={"model": message["model"], "error": message["error"]})

    def _loading(self, run: Run, message: dict[str, Any]) -> None:
        run.last = "loading", {name: message[name] for name in ("what", "done", "total")}
        self._tell(run, *run.last)

    def _remarks(self, run: Run, message: dict[str, Any]) -> None:
        """Handle the first step of a job: the model is loaded."""
        seconds = time.monotonic() - run.began
        self.metrics.stage.labels("prepare").observe(seconds)
        self.device = message["device"]
        if self.loaded not in (None, run.model):
            self.switch = (self.switch + seconds) / 2
        self.loaded = run.model
        self._remark(run, message["remarks"])

    def _remark(self, run: Run, lines: list[str]) -> None:
        """Add lines to the job's remarks."""
        known = self.store.job(run.job.id)
        if lines and known is not None:
            self.store.remark(run.job.id, list(dict.fromkeys([*known.remarks, *lines])))

    def _step(self, run: Run, message: dict[str, Any]) -> None:
        seconds = message["seconds"]
        if run.picture_began is None:
            run.picture_began = time.monotonic() - seconds
        run.steps += 1
        run.shared += len(self.runs)
        run.progress = schema.Progress(
            picture=run.before + message["picture"], of=run.job.total, step=message["step"], steps=message["steps"]
        )
        if not self.pace.knows(run.model):  # a first estimate from the first step
            self.pace.learn(part_at(run.job, run.progress.picture)[0], seconds * message["steps"], len(self.runs))
        self.metrics.step.labels(run.model).observe(seconds)
        self.metrics.batch.observe(len(self.runs))
        eta = round(self.left(run) * len(self.runs), 2)
        data = {"t": message["t"], "seconds": seconds, "eta": eta, "preview": message["preview"]}
        run.last = "step", run.progress.model_dump() | data
        self._tell(run, *run.last)

    def _picture(self, run: Run, message: dict[str, Any]) -> None:
        """Store a finished picture, if its job is still running."""
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
        """Handle the death of the engine: all runs are lost."""
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
        """Picture field -> path of its upload, or list of paths. Raises Refused if an upload does not exist."""
        paths: dict[str, Any] = {}
        for name, place, given in pictures_in(request):
            upload = self.store.upload(given.removeprefix(PREFIX))
            file = None if upload is None else self.store.uploads / upload.file
            if file is None or not file.exists():
                raise Refused(400, f"{given} was removed: upload it again")
            paths[name] = str(file.resolve()) if place is None else [*paths.get(name, ()), str(file.resolve())]
        return paths

    def _tell(self, run: Run, name: str, data: dict[str, Any], lasting: bool = False) -> None:
        if run.stopped is None:
            self.feed.tell(run.job.id, run.job.key, name, data, lasting)
