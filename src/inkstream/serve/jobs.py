"""The queue: jobs are accepted, put in order, drawn by the engine, and end exactly once, whatever dies in between.

The store is the truth; what is kept here beside it (how far a run is, how fast models draw, who listens) can be lost.
All of it happens in one event loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HTTPRequest

from inkstream.engine.metadata import PICTURE_FIELDS
from inkstream.serve import schema
from inkstream.serve.errors import KINDS, Refused
from inkstream.serve.feed import Feed, Happening
from inkstream.serve.grids import check_parts, split
from inkstream.serve.inputs import PREFIX, pictures_in
from inkstream.serve.keys import Caller, Keys, sign
from inkstream.serve.limits import Settings
from inkstream.serve.metrics import Metrics
from inkstream.serve.models import Offered, choose
from inkstream.serve.pace import Pace, ends
from inkstream.serve.process import COMMAND, EngineProcess
from inkstream.serve.schedule import Waiting, in_order
from inkstream.serve.schema import ENDED, Grid
from inkstream.serve.store import Job, Picture, Store
from inkstream.serve.worker import read_spec
from inkstream.types import Request

DEATHS = 6
"""Engines that may die over one picture before its job is given up."""
SWITCH = 5.0
"""Seconds that loading another model is thought to take until it was measured."""
GRACE = 60.0
"""Seconds that a run may go on after it was stopped, before its engine is ended."""
PING = 15.0
"""Seconds of silence after which a stream says that it is still there."""
log = logging.getLogger("inkstream.serve")


@dataclass
class Run:
    """A job in the engine's hands. A job that starts again has another run, and what the old one still says is void."""

    id: str
    job: Job
    model: str  # of this part of the job
    before: int  # pictures of the job that come before this run's
    began: float  # monotonic time
    last: tuple[str, dict[str, Any]] = ("loading", {"what": "model", "done": None, "total": None})
    progress: schema.Progress | None = None
    step_seconds: float = 0.0
    picture_began: float | None = None
    stopped: float | None = None  # when it was told to stop


@dataclass
class Clocks:
    """Turns of the keys: seconds of work each was given, and where the job begun last stood."""

    keys: dict[str, float] = field(default_factory=dict)
    now: float = 0.0

    def enter(self, key: str) -> None:
        """A key that asked for nothing has saved nothing up."""
        self.keys[key] = max(self.keys.get(key, 0.0), self.now)

    def spend(self, key: str, seconds: float) -> None:
        self.now = self.keys.get(key, 0.0)
        self.keys[key] = self.now + seconds


class Jobs:
    """The queue of one server. `start` and `stop` frame its life; everything else is called in its event loop."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        models: dict[str, Offered],
        keys: Keys,
        metrics: Metrics,
        command: Sequence[str] = COMMAND,
    ):
        self.settings = settings
        self.store = store
        self.models = models
        self.keys = keys
        self.metrics = metrics
        self.feed = Feed()
        self.pace = Pace(models)
        first = {
            "device": settings.device,
            "dtype": settings.dtype,
            "commercial_only": settings.commercial_only,
            "parts": str(store.parts.resolve()),
        }
        self.engine = EngineProcess(first, self._told, self._died, command)
        self.ready = False
        self.loaded: str | None = None  # the model in the engine's memory
        self.device: str | None = None
        self.paused = store.setting("paused") == "1"
        self.secret = store.setting("secret") or secrets.token_hex(32)
        store.put_setting("secret", self.secret)
        self._runs: dict[str, Run] = {}
        self._waiting: dict[str, Job] = {}
        self._work: dict[str, float] = {}  # of each that waits
        self._order: list[str] | None = None
        self._clocks = Clocks()
        self._switch = SWITCH
        self._waiters: dict[str, int] = {}  # clients that wait for a job's answer
        self._watch: asyncio.Task[None] | None = None

    # Life -----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the last server left, and start an engine."""
        for job in self.store.recover(time.time()):
            self._wait(job)
        for picture in self.store.recent(50):
            self.pace.learn(Request.model_validate(picture.request), picture.seconds)
        if self._waiting:
            log.info("queue taken up", extra={"jobs": len(self._waiting)})
        self.engine.start()
        self._watch = asyncio.create_task(self._watching())

    async def stop(self) -> None:
        """End the engine. What is running will start again with the next server."""
        self.feed.close()
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self.engine.stop()

    # Asking ---------------------------------------------------------------------------------------------------------

    def submit(
        self,
        caller: Caller,
        request: Request,
        *,
        note: str = "",
        priority: int = 0,
        grid: Grid | None = None,
        token: str | None = None,
        waited: bool = False,
    ) -> Job:
        """Accept a request; when this returns it is on the disk. Its pictures are uploads.

        token: the client's idempotency key; the same one with the same request gives the same job again. waited: of no
        use once the client is gone. Refused where it asks for too much, or the queue, quota or rate is spent.
        """
        request, _ = choose(self.models, request)
        digest = _digest(request, grid, priority, note)
        if token is not None and (job := self.store.repeated(caller.name, token)) is not None:
            if job.digest != digest:
                raise Refused(409, "this idempotency key was used for another body: take a new one", code="idempotency")
            return job
        parts = split(request, grid)
        total = check_parts(parts, self.models, self.settings.limits)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        if seed + request.count > 2**63:
            raise Refused(400, f"seed {seed} leaves no room for {request.count} pictures: lower it", param="seed")
        self._admit(caller, priority, total)
        if not self._of_key(caller.name):
            self._clocks.enter(caller.name)
        job = self.store.add_job(
            key=caller.name,
            now=time.time(),
            request=request.model_dump(mode="json", exclude_unset=True) | {"model": request.model, "seed": seed},
            total=total,
            priority=priority,
            note=note,
            grid=None if grid is None else grid.model_dump(mode="json"),
            token=token,
            digest=digest,
            waited=waited,
            uploads={given.removeprefix(PREFIX) for part in parts for _, _, given in pictures_in(part)},
        )
        self._wait(job)
        extra = {"prompt": request.prompt} if self.settings.log_prompts else {}
        log.info("job accepted", extra={"job": job.id, "key": job.key, "model": job.model, "pictures": total, **extra})
        self._changed()
        return self.store.job(job.id) or job

    async def draw(self, job: Job) -> AsyncGenerator[Happening, None]:
        """Everything that happens to a job, from its present state to its end. Leaving it early cancels the job.

        The server's own `submit(Request) -> Iterator[Event]`: for routes whose client waits for the answer.
        """
        self._waiters[job.id] = self._waiters.get(job.id, 0) + 1
        try:
            async with aclosing(self.follow(job.id)) as happenings:
                async for happening in happenings:
                    yield happening
        finally:
            self._waiters[job.id] -= 1
            if not self._waiters[job.id]:
                del self._waiters[job.id]
                if not self.feed.closed:  # a server that stops has not been left by its client
                    self.cancel(job.id)

    async def run(self, http: HTTPRequest, job: Job) -> schema.Job:
        """Wait until a job has ended, and return it. A client that leaves meanwhile cancels it, within one step.

        Refused with 503 where the server stops first; CancelledError where the client is gone.
        """
        drawing = asyncio.create_task(self._last(job))
        leaving = asyncio.create_task(_left(http))
        try:
            await asyncio.wait([drawing, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise asyncio.CancelledError("the client is gone")
            return drawing.result()
        finally:
            for task in (drawing, leaving):
                task.cancel()
            await asyncio.gather(drawing, leaving, return_exceptions=True)

    async def follow(
        self, identity: str, last: str | None = None, ping: float = PING
    ) -> AsyncGenerator[Happening, None]:
        """A job's present state, or what was missed since `last`, then all that happens to it, to its end.

        Every `ping` seconds of silence a happening named `ping` is given.
        """
        with self.feed.listen(job=identity) as listener:
            missed = self.feed.missed(last, listener)
            if missed is None or not (missed or self._is_active(identity)):
                missed = self._state(identity)
            for happening in missed:
                yield happening
                if happening.name in ENDED:
                    return
            async for happening in listener.all(ping):
                yield happening
                if happening.name in ENDED:
                    return

    async def follow_all(
        self, caller: Caller, last: str | None = None, ping: float = PING
    ) -> AsyncGenerator[Happening, None]:
        """The same of all jobs that a caller may see; it has no end."""
        with self.feed.listen(key=caller.scope) as listener:
            missed = self.feed.missed(last, listener)
            if missed is None:
                jobs = [job for job in self._active() if caller.scope in (None, job.key)]
                missed = [happening for job in jobs for happening in self._state(job.id)]
            for happening in missed:
                yield happening
            async for happening in listener.all(ping):
                yield happening

    # Changing -------------------------------------------------------------------------------------------------------

    def cancel(self, identity: str) -> None:
        """End a job that has not ended; its run stops within one step."""
        self._end(identity, "cancelled")

    def move(self, job: Job, caller: Caller, patch: schema.JobPatch) -> None:
        """Another place in the queue. Refused where the job does not wait, or may not stand there."""
        if job.id not in self._waiting:
            raise Refused(409, f"job {job.id} is {job.state}: only one that waits can be moved", code="not_queued")
        priority = job.priority if patch.priority is None else patch.priority
        place = job.place
        if "before" in patch.model_fields_set:
            others = [other for other in self._waiting.values() if other.key == job.key and other.id != job.id]
            others.sort(key=lambda other: other.place)
            index = next((i for i, other in enumerate(others) if other.id == patch.before), None)
            if patch.before is None:
                place = max((other.place for other in others), default=0.0) + 1
            elif index is None:
                raise Refused(400, f"{patch.before} is no job of the same key that waits", param="before")
            else:
                priority = others[index].priority if patch.priority is None else priority
                place = (others[index].place + (others[index - 1].place if index else others[0].place - 2)) / 2
        _check_priority(caller, priority)
        self.store.move(job.id, priority, place)
        self._wait_again(job.id)
        self._changed()

    def pause(self, paused: bool) -> None:
        """Begin no more jobs, or go on. What is being drawn is finished."""
        self.paused = paused
        self.store.put_setting("paused", str(int(paused)))
        self.feed.tell("", "", "queue", {"paused": paused})
        self._changed()

    # Telling --------------------------------------------------------------------------------------------------------

    def order(self) -> list[str]:
        """The jobs that wait, in the order they will be begun."""
        if self._order is None:
            waiting = [
                Waiting(job.id, job.key, job.priority, job.place, job.model, self._cost(job))
                for job in self._waiting.values()
            ]
            self._order = [job.id for job in in_order(waiting, self._clocks.keys, self.loaded, self._switch)]
        return self._order

    def etas(self) -> dict[str, float | None]:
        """Seconds until each job that has not ended does, where that can be foreseen."""
        running = {run.job.id: self._left(run) for run in self._runs.values()}
        waiting = [self._waiting[identity] for identity in self.order()]
        timed = [self._cost(job) if self.pace.knows(job.model) and not self.paused else None for job in waiting]
        foreseen = ends(list(running.values()), timed, self.settings.slots)
        return running | {job.id: eta for job, eta in zip(waiting, foreseen)}

    def tell(self, job: Job) -> schema.Job:
        """A job as the API has it."""
        return self.tell_all([job])[0]

    def tell_all(self, jobs: Sequence[Job]) -> list[schema.Job]:
        """The same of several."""
        waits = any(job.state in ("queued", "running") for job in jobs)
        etas = self.etas() if waits else {}
        positions = {identity: place for place, identity in enumerate(self.order())} if waits else {}
        progress = {run.job.id: run.progress for run in self._runs.values() if run.stopped is None}
        return [
            schema.Job(
                id=job.id,
                state=job.state,  # type: ignore[arg-type]
                created=job.created,
                started=job.started,
                ended=job.ended,
                priority=job.priority,
                note=job.note,
                key=job.key,
                position=positions.get(job.id),
                eta=_rounded(etas.get(job.id)),
                progress=progress.get(job.id),
                request=job.request,
                grid=_grid(job),
                pictures=[tell_picture(picture, job) for picture in self.store.pictures_of(job.id)],
                error=None if job.error is None else schema.Error.model_validate(job.error),
                remarks=job.remarks,
            )
            for job in jobs
        ]

    def signed(self, path: str, seconds: int = 3600) -> str:
        """The same path, readable without a key for a while."""
        until = int(time.time()) + seconds
        return f"{path}?until={until}&signature={sign(self.secret, path, until)}"

    # Inside: accepting ----------------------------------------------------------------------------------------------

    def _admit(self, caller: Caller, priority: int, pictures: int) -> None:
        """Refused where the queue, the key's share of it, its day or its minute is spent."""
        _check_priority(caller, priority)
        limits, key, now = self.settings.limits, caller.key, time.time()
        if len(self._waiting) >= limits.queue:
            raise self._full(f"the queue is full ({limits.queue} jobs)")
        if key is None:
            return
        mine = self._of_key(key.name)
        if key.queued is not None and sum(job.id in self._waiting for job in mine) >= key.queued:
            raise self._full(f"{key.queued} jobs of this key wait already")
        if key.pictures_per_day is not None:
            left = key.pictures_per_day - self.store.drawn_today(key.name, now) - sum(job.total for job in mine)
            if pictures > left:
                raise Refused(
                    429,
                    f"this key has {key.pictures_per_day} pictures a day, of which {max(0, left)} are left",
                    code="insufficient_quota",
                    retry_after=math.ceil(86_400 - now % 86_400),
                )
        self.keys.spend(key, now)

    def _full(self, why: str) -> Refused:
        """A place is free again when the next job ends."""
        wait = max(1, math.ceil(min([eta for eta in self.etas().values() if eta is not None], default=5.0)))
        return Refused(429, f"{why}: try again in {wait} s", code="queue_full", retry_after=wait)

    # Inside: drawing ------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Something about the queue has: begin what can be begun, and tell who waits where it stands."""
        self._order = None
        while self._next():
            self._order = None
        self.metrics.queued.set(len(self._waiting))
        self.metrics.running.set(len(self._runs))
        if self.feed.listened_to():
            etas = self.etas()
            for position, identity in enumerate(self.order()):
                data = {"position": position, "eta": _rounded(etas[identity])}
                self.feed.tell(identity, self._waiting[identity].key, "queued", data, lasting=False)

    def _next(self) -> bool:
        """Begin the next job, if there is one and a slot is free."""
        if not self.ready or self.paused or len(self._runs) >= self.settings.slots or not self._waiting:
            return False
        job = self._waiting[self.order()[0]]
        if any(run.model != job.model for run in self._runs.values()):
            return False  # one model at a time
        self._clocks.spend(job.key, self._cost(job))
        del self._waiting[job.id], self._work[job.id]
        if self.store.start(job.id, time.time()):
            log.info("job begun", extra={"job": job.id, "key": job.key, "model": job.model})
            self.metrics.stage.labels("wait").observe(time.time() - job.created)
            self._begin(self._stored(job.id))
        return True

    def _begin(self, job: Job) -> None:
        """Hand the engine what is left to draw of a job: of its first part that is not done, the pictures not drawn."""
        drawn = {picture.place: picture for picture in self.store.pictures_of(job.id)}
        first = next((place for place in range(job.total) if place not in drawn), None)
        if first is None:
            self._end(job.id, "succeeded")
            return
        try:
            request, start = _part(job, first)
            request, model = choose(self.models, request)
            skip = first - start
            update: dict[str, Any] = {"seed": (request.seed or 0) + skip, "count": request.count - skip}
            given = request.prompt if request.upsample else ""
            if skip and request.upsample:  # the words were chosen with the first seed
                update |= {"upsample": False, "prompt": drawn[start].request["prompt"]}
            request = request.model_copy(update=update)
            fields = request.model_dump(mode="json", exclude_unset=True) | self._paths(request)
        except Refused as refusal:  # what was accepted has gone since: a model that is offered no more, an upload
            self._fail(job.id, refusal.message, 400)
            return
        run = Run(secrets.token_hex(8), job, model.name, first, time.monotonic())
        self._runs[run.id] = run
        self.feed.tell(job.id, job.key, *run.last, lasting=False)
        fields["model"] = model.source
        self.engine.send({"draw": run.id, "name": model.name, "request": fields, "upsampled_from": given})

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

    def _end(self, identity: str, state: str, error: dict[str, Any] | None = None) -> None:
        """A job ends, once: what comes later changes nothing."""
        if not self.store.end(identity, state, time.time(), error):
            return
        waited = self._waiting.pop(identity, None) is not None
        self._work.pop(identity, None)
        for run in self._runs.values():
            if run.job.id == identity and run.stopped is None:
                run.stopped = time.monotonic()  # it keeps its slot until the engine says that it has stopped
                self.engine.send({"cancel": run.id})
        job = self._stored(identity)
        self.metrics.jobs.labels(state).inc()
        seconds = None if job.started is None else round((job.ended or 0) - job.started, 3)
        log.info("job ended", extra={"job": identity, "key": job.key, "state": state, "seconds": seconds})
        self.feed.tell(identity, job.key, state, self.tell(job).model_dump(mode="json"))
        if waited:
            self._changed()

    def _fail(self, identity: str, message: str, status: int) -> None:
        """A job fails as a request would be refused: 400 can be mended by who asked, 500 by us."""
        code = "drawing_failed" if status == 500 else None
        self._end(identity, "failed", {"message": message, "type": KINDS[status], "param": None, "code": code})

    # Inside: what the engine says -----------------------------------------------------------------------------------

    def _told(self, message: dict[str, Any]) -> None:
        """One message of the engine."""
        for kind, size in message.get("memory", {}).items():
            self.metrics.memory.labels(kind).set(size)
        event = message["event"]
        if "run" not in message:
            self._told_of_itself(event, message)
            return
        run = self._runs.get(message["run"])
        if run is None:
            return
        handlers: dict[str, Callable[[Run, dict[str, Any]], None]] = {
            "loading": self._loading,
            "remarks": self._remarks,
            "step": self._step,
            "picture": self._picture,
        }
        if event in handlers:
            handlers[event](run, message)
            return
        del self._runs[run.id]
        if event == "failed":
            self._fail(run.job.id, message["error"], 400 if message["kind"] == "input" else 500)
        elif event == "cancelled" and self.store.requeue(run.job.id, died=False):  # but its job was not
            self._wait_again(run.job.id)
        elif event == "done" and self._stored(run.job.id).state == "running":
            self._begin(self._stored(run.job.id))  # its next part, or its end
        self._changed()

    def _told_of_itself(self, event: str, message: dict[str, Any]) -> None:
        if event == "ready":
            self.ready = True
            self.metrics.ready.set(1)
            log.info("engine ready", extra={"seconds": message["seconds"]})
            for model in self.models.values():
                if model.spec is None:
                    self.engine.send({"describe": model.name, "source": model.source})
            if self.settings.preload and not self._waiting:
                first = next(iter(self.models.values()))
                self.engine.send({"load": first.name, "source": first.source})
            self._changed()
        elif event == "loaded":
            self.loaded, self.device = message["model"], message["device"]
        elif event == "described":
            self.models[message["model"]].spec = read_spec(message["spec"])
        elif event == "unloadable":
            self.models[message["model"]].error = message["error"]
            log.error("model cannot be used", extra={"model": message["model"], "error": message["error"]})

    def _loading(self, run: Run, message: dict[str, Any]) -> None:
        run.last = "loading", {name: message[name] for name in ("what", "done", "total")}
        self._tell_run(run, *run.last)

    def _remarks(self, run: Run, message: dict[str, Any]) -> None:
        """The model is there, and the first step is done."""
        seconds = time.monotonic() - run.began
        self.metrics.stage.labels("prepare").observe(seconds)
        self.device = message["device"]
        if self.loaded != run.model:
            if self.loaded is not None:
                self._switch = (self._switch + seconds) / 2
            self.loaded = run.model
            self._order = None
        if message["remarks"]:
            lines = [*self._stored(run.job.id).remarks, *message["remarks"]]
            self.store.remark(run.job.id, list(dict.fromkeys(lines)))

    def _step(self, run: Run, message: dict[str, Any]) -> None:
        seconds = run.step_seconds = message["seconds"]
        if run.picture_began is None:
            run.picture_began = time.monotonic() - seconds
        run.progress = schema.Progress(
            picture=run.before + message["picture"], of=run.job.total, step=message["step"], steps=message["steps"]
        )
        self.metrics.step.labels(run.model).observe(seconds)
        self.metrics.batch.observe(len(self._runs))
        data = {"seconds": seconds, "eta": _rounded(self._left(run)), "preview": message["preview"]}
        run.last = "step", run.progress.model_dump() | data
        self._tell_run(run, *run.last)

    def _picture(self, run: Run, message: dict[str, Any]) -> None:
        """Take a finished picture in, if its job still wants it."""
        asked = run.job.request
        given = {name: asked[name] for name in PICTURE_FIELDS if asked.get(name)}
        facts = message | {"request": message["request"] | given}
        part = self.store.parts / message["file"]
        picture = self.store.add_picture(run.job, run.before + message["index"], time.time(), part, facts)
        if picture is None:
            return
        self.pace.learn(Request.model_validate(message["request"]), message["seconds"])
        if run.picture_began is not None:
            self.metrics.stage.labels("draw").observe(time.monotonic() - run.picture_began)
            run.picture_began = None
        self.metrics.pictures.labels(run.job.key, run.model).inc()
        self._tell_run(run, "picture", tell_picture(picture, run.job).model_dump(mode="json"), lasting=True)

    def _died(self) -> None:
        """The engine is gone; what it was drawing waits again, at the place it had."""
        self.ready, self.loaded = False, None
        self.metrics.ready.set(0)
        self.metrics.deaths.inc()
        runs, self._runs = list(self._runs.values()), {}
        for run in runs:
            if self.store.requeue(run.job.id, died=True):
                self._wait_again(run.job.id)
                if self._waiting[run.job.id].deaths >= DEATHS:
                    self._fail(run.job.id, f"the engine died {DEATHS} times over this picture", 500)
        for part in self.store.parts.iterdir():
            part.unlink(missing_ok=True)
        self._changed()

    async def _watching(self) -> None:
        """Now and then: end what takes too long, and tidy the store."""
        tidied = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            now, most = time.monotonic(), self.settings.limits.seconds
            for run in list(self._runs.values()):
                if run.stopped is None and now - run.began > most:
                    self._fail(run.job.id, f"it took more than {most:g} s, which is all a job has here", 400)
                elif run.stopped is not None and now - run.stopped > GRACE:
                    log.error("engine does not stop a run, and is ended", extra={"job": run.job.id})
                    self.engine.kill()
                    break
            if now - tidied > 3600:
                tidied = now
                self.store.tidy(time.time())

    # Inside: the rest -----------------------------------------------------------------------------------------------

    def _stored(self, identity: str) -> Job:
        """A job that is known to be there, as the store has it now."""
        job = self.store.job(identity)
        assert job is not None
        return job

    def _wait(self, job: Job) -> None:
        """A job joins those that wait."""
        self._waiting[job.id] = job
        self._work[job.id] = sum(part.count * self.pace.work(part) for part in split(_request(job), _grid(job)))
        self._order = None

    def _wait_again(self, identity: str) -> None:
        self._wait(self._stored(identity))

    def _active(self) -> list[Job]:
        return [*(run.job for run in self._runs.values()), *self._waiting.values()]

    def _is_active(self, identity: str) -> bool:
        return any(job.id == identity for job in self._active())

    def _of_key(self, key: str) -> list[Job]:
        """A key's jobs that wait or run."""
        return [job for job in self._active() if job.key == key]

    def _cost(self, job: Job) -> float:
        """Seconds that a job is thought to take."""
        return self.pace.cost(job.model, self._work[job.id])

    def _left(self, run: Run) -> float | None:
        """Seconds until a run's job ends, where that can be foreseen."""
        at, one = run.progress, self.pace.seconds(_request(run.job))
        if at is None:
            return None if one is None else (run.job.total - run.before) * one
        return (at.of - at.picture - at.step / at.steps) * (at.steps * run.step_seconds if one is None else one)

    def _tell_run(self, run: Run, name: str, data: dict[str, Any], lasting: bool = False) -> None:
        if run.stopped is None:
            self.feed.tell(run.job.id, run.job.key, name, data, lasting)

    def _state(self, identity: str) -> list[Happening]:
        """A job's present state as happenings: its pictures so far, and where it stands."""
        job = self._stored(identity)
        told = self.tell(job)
        data = [("picture", picture.model_dump(mode="json")) for picture in told.pictures]
        run = next((run for run in self._runs.values() if run.job.id == identity), None)
        if job.state in ENDED:
            data.append((job.state, told.model_dump(mode="json")))
        elif run is not None:
            data.append(run.last)
        else:
            data.append(("queued", {"position": told.position, "eta": told.eta}))
        return [Happening(self.feed.number, job.id, job.key, name, one, False) for name, one in data]

    async def _last(self, job: Job) -> schema.Job:
        """The job once it has ended; cancelled if this is."""
        async with aclosing(self.draw(job)) as happenings:
            async for happening in happenings:
                if happening.name in ENDED:
                    return schema.Job.model_validate(happening.data)
        raise Refused(503, "the server is stopping: ask again in a while", retry_after=5)


def tell_picture(picture: Picture, job: Job | None) -> schema.Picture:
    """A picture as the API has it. job: its own, which says where in a grid it is."""
    columns = len(job.grid["x"]["values"]) if job is not None and job.grid is not None else 0
    return schema.Picture(
        id=picture.id,
        job=picture.job,
        index=picture.place,
        cell=(picture.place % columns, picture.place // columns) if columns else None,
        created=picture.created,
        seconds=picture.seconds,
        width=picture.width,
        height=picture.height,
        bytes=picture.bytes,
        type=picture.type,
        sha256=picture.sha256,
        seed=picture.seed,
        model=picture.model,
        prompt=picture.request.get("prompt", ""),
        favourite=bool(picture.favourite),
        deleted=picture.deleted is not None,
        request=picture.request,
        url=f"/v1/pictures/{picture.id}/file",
        thumbnail=f"/v1/pictures/{picture.id}/thumbnail",
    )


def _part(job: Job, place: int) -> tuple[Request, int]:
    """The request that picture `place` of a job belongs to, and the place of that request's first."""
    start = 0
    for part in split(_request(job), _grid(job)):
        if place < start + part.count:
            return part, start
        start += part.count
    raise AssertionError(f"job {job.id} has no picture {place}")


def _request(job: Job) -> Request:
    return Request.model_validate(job.request)


def _grid(job: Job) -> Grid | None:
    return None if job.grid is None else Grid.model_validate(job.grid)


def _digest(request: Request, grid: Grid | None, priority: int, note: str) -> str:
    body = [request.model_dump(mode="json"), None if grid is None else grid.model_dump(mode="json"), priority, note]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_priority(caller: Caller, priority: int) -> None:
    most = 10 if caller.key is None else caller.key.priority
    if priority > most:
        raise Refused(403, f"priority {priority} is more than this key may give: at most {most}", param="priority")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, seconds), 2)


async def _left(http: HTTPRequest) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
