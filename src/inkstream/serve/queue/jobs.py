"""The queue: it accepts jobs, orders them and has the engine draw them. Each job ends exactly once, even after a crash.

The store is the authority. State that exists only here (waiting jobs, listeners, fair sharing) may be lost. Everything
runs in one event loop, so no lock is needed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request as HTTPRequest

from inkstream.engine.drawing.templates import wildcard_folder
from inkstream.engine.files.controls import control_folder
from inkstream.engine.files.loras import lora_folder
from inkstream.engine.files.upscalers import upscaler_folder
from inkstream.serve import schema
from inkstream.serve.engines.models import Offered, choose
from inkstream.serve.engines.pace import ends
from inkstream.serve.engines.process import EngineProcess, MakeEngine
from inkstream.serve.errors import KINDS, Refused, disk_full
from inkstream.serve.keys import Caller, Keys, sign
from inkstream.serve.limits import Settings, check_enlarged, check_text
from inkstream.serve.metrics import Metrics
from inkstream.serve.queue.drawing import Drawing
from inkstream.serve.queue.feed import Feed, Happening
from inkstream.serve.queue.grids import check_parts, split
from inkstream.serve.queue.inputs import PREFIX, pictures_in
from inkstream.serve.queue.records import grid_of, parts_of, tell_picture
from inkstream.serve.queue.schedule import Waiting, in_order
from inkstream.serve.queue.store import Job, Store
from inkstream.serve.schema import ENDED, Grid
from inkstream.types import Request

DEATHS = 6
"""A job fails after this many deaths of the engine during one picture."""
HOLD = 5.0
"""Seconds for which no job starts after a picture or a change of the queue could not be written."""
PING = 15.0
"""Seconds without an event after which a stream sends a ping."""
log = logging.getLogger("inkstream.serve")


@dataclass
class Clocks:
    """State of the fair sharing between keys.

    keys: key -> seconds of work it has received. now: that number, for the key of the job that started last, before
    the job was added.
    """

    keys: dict[str, float] = field(default_factory=dict)
    now: float = 0.0

    def enter(self, key: str) -> None:
        """Add a key that had no jobs. It gets no credit for the time without jobs."""
        self.keys[key] = max(self.keys.get(key, 0.0), self.now)

    def spend(self, key: str, seconds: float) -> None:
        """Count a job that starts."""
        self.now = self.keys.get(key, 0.0)
        self.keys[key] = self.now + seconds


class Jobs:
    """The queue of one server. Call `start` first and `stop` last; all methods run in one event loop."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        models: dict[str, Offered],
        keys: Keys,
        metrics: Metrics,
        make: MakeEngine = EngineProcess,
    ):
        self.settings = settings
        self.store = store
        self.models = models
        self.keys = keys
        self.metrics = metrics
        self.feed = Feed()
        self.drawing = Drawing(settings, store, models, metrics, self.feed, self, make)
        self.paused = store.setting("paused") == "1"
        self.secret = store.setting("secret")
        if not self.secret:
            self.secret = secrets.token_hex(32)
            store.put_setting("secret", self.secret)
        self.on_hold = False  # no job starts, because results could not be stored
        self._held_until = 0.0  # monotonic time of the next attempt
        self._unwritten: dict[str, Callable[[], None]] = {}  # job -> change of its state that must still be written
        self._waiting: dict[str, Job] = {}
        self._work: dict[str, float] = {}  # waiting job -> its work
        self._order: list[str] | None = None  # None: it must be computed again
        self._clocks = Clocks()
        self._waiters: dict[str, int] = {}  # job -> number of clients that wait for its answer
        self._watch: asyncio.Task[None] | None = None

    # Start and stop -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the jobs of the previous server and start the engine."""
        for picture in self.store.recent(50):
            self.drawing.pace.learn(Request.model_validate(picture.request), picture.seconds)
        for job in self.store.recover(time.time()):
            self._add_waiting(job)
        if self._waiting:
            log.info("queue restored", extra={"jobs": len(self._waiting)})
        self.drawing.engine.start()
        self._watch = asyncio.create_task(self._watch_loop())

    async def stop(self) -> None:
        """Stop the engine. Running jobs start again with the next server."""
        self.feed.close()
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self.drawing.engine.stop()

    # New jobs -------------------------------------------------------------------------------------------------------

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
        """Accept a request and return its job. From now on, no crash of a process loses the job.

        request: its pictures must be uploads. token: the client's idempotency key; the same key with the same request
        returns the same job. waited: True if nobody needs the job once the client has left. Raises Refused if the
        request exceeds a limit, the queue is full, or the quota or the rate limit is reached.
        """
        request, _ = choose(self.models, request)
        digest = _digest(request, grid, priority, note)
        check_text(request.prompt, request.negative_prompt, note)
        if token is not None and (job := self.store.repeated(caller.name, token)) is not None:
            if job.digest != digest:
                line = "this idempotency key was used with another body: take a new key"
                raise Refused(409, line, code="idempotency")
            return job
        parts = split(request, grid)
        machine = self.settings.machine
        folders = lora_folder(machine), control_folder(machine), wildcard_folder(machine), upscaler_folder(machine)
        total = check_parts(parts, self.models, self.settings.limits, *folders)
        for part in parts:
            start = None if part.image is None else self.store.upload(part.image.removeprefix(PREFIX), None)
            size = None if start is None else (start.width, start.height)
            check_enlarged(part, self.models[part.model].spec, size, self.settings.limits)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        if seed + request.count > 2**63:
            line = f"seed {seed} is too large for {request.count} pictures: take at most {2**63 - request.count}"
            raise Refused(400, line, param="seed")
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
        self._add_waiting(job)
        extra = {"prompt": request.prompt} if self.settings.log_prompts else {}
        log.info("job accepted", extra={"job": job.id, "key": job.key, "model": job.model, "pictures": total, **extra})
        self.changed()
        return self._stored(job.id)

    async def draw(self, job: Job) -> AsyncGenerator[Happening, None]:
        """Yield the events of a job, from its present state to its end. Closing the iterator early cancels the job.

        It is for routes whose client waits for the answer, like `Engine.submit` in one process.
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
                if not self.feed.closed:  # when the server stops, the client has not left
                    self._write(job.id, self._end, "cancelled")

    async def run(self, http: HTTPRequest, job: Job) -> schema.Job:
        """Wait until a job has ended, and return it. If the client disconnects, the job is cancelled within one step.

        Raises Refused with 503 if the server stops first, and with 499, for the log, if the client has left.
        """
        drawing = asyncio.create_task(self._wait_for_end(job))
        leaving = asyncio.create_task(_wait_for_disconnect(http))
        try:
            await asyncio.wait([drawing, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise Refused(499, "the client left before the answer")
            return drawing.result()
        finally:
            for task in (drawing, leaving):
                task.cancel()
            await asyncio.gather(drawing, leaving, return_exceptions=True)

    async def follow(
        self, identity: str, last: str | None = None, ping: float = PING
    ) -> AsyncGenerator[Happening, None]:
        """Yield the events of a job, up to its end.

        last: id of the last event that the client has seen; the missed events come first. Without it, or if it is too
        old, the job's present state comes first. ping: after so many seconds without an event, yield a `ping`.
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
        """Yield the events of all jobs that the caller may see, like `follow`, but without end."""
        with self.feed.listen(key=caller.scope) as listener:
            missed = self.feed.missed(last, listener)
            if missed is None:
                jobs = [job for job in self._active() if caller.scope in (None, job.key)]
                missed = [happening for job in jobs for happening in self._state(job.id)]
            for happening in missed:
                yield happening
            async for happening in listener.all(ping):
                yield happening

    # Changes --------------------------------------------------------------------------------------------------------

    def cancel(self, identity: str) -> None:
        """Cancel a job, unless it has ended. Its run stops within one step."""
        self._end(identity, "cancelled")

    def move(self, job: Job, caller: Caller, patch: schema.JobPatch) -> None:
        """Change a job's place in the queue. Raises Refused if the job is not waiting or may not have that place."""
        if job.id not in self._waiting:
            raise Refused(409, f"job {job.id} is {job.state}: move only queued jobs", code="not_queued")
        priority = job.priority if patch.priority is None else patch.priority
        place = job.place
        if "before" in patch.model_fields_set:
            others = [other for other in self._waiting.values() if other.key == job.key and other.id != job.id]
            others.sort(key=lambda other: other.place)
            index = next((i for i, other in enumerate(others) if other.id == patch.before), None)
            if patch.before is None:
                place = max((other.place for other in others), default=0.0) + 1
            elif index is None:
                line = f"before {patch.before} is not a queued job of the same key: take one from /v1/queue"
                raise Refused(400, line, param="before")
            else:
                priority = others[index].priority if patch.priority is None else priority
                place = (others[index].place + (others[index - 1].place if index else others[0].place - 2)) / 2
        _check_priority(caller, priority)
        self.store.move(job.id, priority, place)
        self._add_waiting(self._stored(job.id))
        self.changed()

    def pause(self, paused: bool) -> None:
        """Pause or resume the start of jobs. Running jobs continue."""
        self.paused = paused
        self.store.put_setting("paused", str(int(paused)))
        self.feed.tell("", "", "queue", {"paused": paused})
        self.changed()

    # State ----------------------------------------------------------------------------------------------------------

    def order(self) -> list[str]:
        """Ids of the waiting jobs, in the order in which they start."""
        if self._order is None:
            waiting = [
                Waiting(job.id, job.key, job.priority, job.place, job.model, self._cost(job))
                for job in self._waiting.values()
            ]
            order = in_order(waiting, self._clocks.keys, self.drawing.loaded, self.drawing.switch)
            self._order = [job.id for job in order]
        return self._order

    def etas(self) -> dict[str, float | None]:
        """Active job -> estimated seconds until it ends, None if unknown."""
        pace, runs = self.drawing.pace, list(self.drawing.runs.values())
        if not all(pace.knows(run.model) for run in runs):
            return dict.fromkeys(job.id for job in self._active())
        waiting = [self._waiting[identity] for identity in self.order()]
        timed = [self._cost(job) if pace.knows(job.model) and not self.paused else None for job in waiting]
        foreseen = ends([self.drawing.left(run) for run in runs], timed, self.settings.slots)
        return dict(zip([*(run.job.id for run in runs), *(job.id for job in waiting)], foreseen))

    def tell(self, job: Job) -> schema.Job:
        """The job's API record."""
        return self.tell_all([job])[0]

    def tell_all(self, jobs: Sequence[Job]) -> list[schema.Job]:
        """The API records of several jobs."""
        waits = any(job.state not in ENDED for job in jobs)
        etas = self.etas() if waits else {}
        positions = self._positions() if waits else {}
        return [self._tell(job, positions.get(job.id), etas.get(job.id)) for job in jobs]

    def signed(self, path: str, seconds: int = 3600) -> str:
        """The path with a signature: it is readable without a key for so many seconds."""
        until = int(time.time()) + seconds
        return f"{path}?until={until}&signature={sign(self.secret, path, until)}"

    # Results of runs (drawing.Queue) --------------------------------------------------------------------------------

    def finished(self, job: str) -> None:
        """The job has all its pictures."""
        self._write(job, self._end, "succeeded")

    def failed(self, job: str, message: str, status: int) -> None:
        """The job cannot be drawn. status: 400 if the client can correct the request, else 500."""
        code = "drawing_failed" if status == 500 else None
        self._write(job, self._end, "failed", {"message": message, "type": KINDS[status], "param": None, "code": code})

    def lost(self, job: str, died: bool) -> None:
        """The job's run has ended too early. If the job is still running, it waits again at its old place."""
        line = f"the engine died {DEATHS} times during this picture: ask for a smaller one, or see the server's log"
        self._write(job, self._requeue, died, line)

    def unsaved(self, job: str, reason: str) -> None:
        """A picture of the job could not be stored: the job waits again, and no job starts for `HOLD` seconds."""
        self._hold(reason)
        line = f"the picture cannot be saved ({reason}): free space on the server's disk"
        self._write(job, self._requeue, True, line)

    def changed(self) -> None:
        """The queue or the engine has changed: start all jobs that can start, and report positions to listeners."""
        self._order = None
        while self._next():
            self._order = None
        self.metrics.queued.set(len(self._waiting))
        self.metrics.running.set(len(self.drawing.runs))
        if self.feed.listened_to() and self._waiting:
            etas = self.etas()
            for identity, position in self._positions().items():
                data = {"position": position, "eta": _rounded(etas[identity])}
                self.feed.tell(identity, self._waiting[identity].key, "queued", data, lasting=False)

    # Private --------------------------------------------------------------------------------------------------------

    def _admit(self, caller: Caller, priority: int, pictures: int) -> None:
        """Raise Refused if the disk or the queue is full, or the key has reached one of its limits."""
        _check_priority(caller, priority)
        limits, key, now = self.settings.limits, caller.key, time.time()
        if self.store.free() < limits.reserve:
            raise disk_full()
        if len(self._waiting) >= limits.queue:
            raise self._queue_full(f"the queue is full ({limits.queue} jobs)")
        if key is None:
            return
        mine = self._of_key(key.name)
        if key.queued is not None and sum(job.id in self._waiting for job in mine) >= key.queued:
            raise self._queue_full(f"{key.queued} jobs of this key are already waiting")
        if key.pictures_per_day is not None:
            left = key.pictures_per_day - self.store.drawn_today(key.name, now) - sum(job.total for job in mine)
            if pictures > left:
                raise Refused(
                    429,
                    f"this key may draw {key.pictures_per_day} pictures a day and has {max(0, left)} left: try again "
                    "after midnight UTC",
                    code="insufficient_quota",
                    retry_after=math.ceil(86_400 - now % 86_400),
                )
        self.keys.spend(key, now)

    def _queue_full(self, why: str) -> Refused:
        """The answer to a job that the queue has no place for. A place is free when the next job ends."""
        wait = max(1, math.ceil(min([eta for eta in self.etas().values() if eta is not None], default=5.0)))
        return Refused(429, f"{why}: try again in {wait} s", code="queue_full", retry_after=wait)

    def _next(self) -> bool:
        """Start the next job. False if no job is waiting or none can start now."""
        if self.paused or not self._waiting:
            return False
        job = self._waiting[self.order()[0]]
        if not self.drawing.has_room(job.model) or not self._can_store():
            return False
        try:
            begun = self.store.start(job.id, time.time())
        except (sqlite3.Error, OSError) as error:
            self._hold(str(error))
            return False
        self._clocks.spend(job.key, self._cost(job))
        del self._waiting[job.id], self._work[job.id]
        if begun:
            log.info("job started", extra={"job": job.id, "key": job.key, "model": job.model})
            self.metrics.stage.labels("wait").observe(time.time() - job.created)
            self.drawing.begin(self._stored(job.id))
        return True

    def _can_store(self) -> bool:
        """Whether the disk has enough free space to start a job, and the last failed write is long enough ago."""
        try:
            free = self.store.free()
        except OSError as error:
            self._hold(str(error))
            return False
        if free < self.settings.limits.reserve:
            self._hold("the disk is full")
        elif time.monotonic() >= self._held_until:
            self.on_hold = False
        return not self.on_hold

    def _hold(self, reason: str) -> None:
        """Start no job for `HOLD` seconds."""
        if not self.on_hold:
            log.error("no job starts until the disk can be written again", extra={"reason": reason})
        self.on_hold, self._held_until = True, time.monotonic() + HOLD

    def _write(self, job: str, change: Callable[..., None], *values: Any) -> None:
        """Write a change of a job's state. If the disk refuses it, `_watch_loop` tries again."""
        try:
            change(job, *values)
        except (sqlite3.Error, OSError) as error:
            self._hold(str(error))
            self._unwritten[job] = partial(change, job, *values)

    def _requeue(self, job: str, died: bool, message: str) -> None:
        """Put a running job back into the queue. After `DEATHS` failures it fails with the message instead."""
        if not self.store.requeue(job, died):
            return
        self._add_waiting(self._stored(job))
        if self._waiting[job].deaths >= DEATHS:
            self.failed(job, message, 500)

    def _end(self, identity: str, state: str, error: dict[str, Any] | None = None) -> None:
        """End a job. If it has already ended, nothing changes."""
        if not self.store.end(identity, state, time.time(), error):
            return
        waited = self._waiting.pop(identity, None) is not None
        self._work.pop(identity, None)
        self.drawing.stop(identity)
        job = self._stored(identity)
        self.metrics.jobs.labels(state).inc()
        seconds = None if job.started is None else round((job.ended or 0) - job.started, 3)
        log.info("job ended", extra={"job": identity, "key": job.key, "state": state, "seconds": seconds})
        self.feed.tell(identity, job.key, state, self.tell(job).model_dump(mode="json"))
        if waited:
            self.changed()

    async def _watch_loop(self) -> None:
        """Once a second: end jobs that take too long and retry failed writes. Once an hour: tidy the store."""
        tidied = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            try:
                self.drawing.check_time()
                for job, change in list(self._unwritten.items()):
                    change()
                    if self._unwritten.get(job) is change:  # the call may have left another change
                        del self._unwritten[job]
                if self.on_hold:
                    self.changed()
                if time.monotonic() - tidied > 3600:
                    tidied = time.monotonic()
                    self.store.tidy(time.time())
            except (sqlite3.Error, OSError) as error:
                self._hold(str(error))

    def _stored(self, identity: str) -> Job:
        """A job that exists, as it is now in the store."""
        job = self.store.job(identity)
        assert job is not None
        return job

    def _add_waiting(self, job: Job) -> None:
        """Add a job to the waiting jobs, or replace it there."""
        self._waiting[job.id] = job
        self._work[job.id] = sum(part.count * self.drawing.pace.work(part) for part in parts_of(job))
        self._order = None

    def _cost(self, job: Job) -> float:
        """Estimated seconds that a waiting job takes if it is drawn alone."""
        return self.drawing.pace.seconds(job.model, self._work[job.id])

    def _positions(self) -> dict[str, int]:
        """Waiting job -> number of jobs of the same key that start before it. Jobs of other keys do not count."""
        before: Counter[str] = Counter()
        positions = {}
        for identity in self.order():
            key = self._waiting[identity].key
            positions[identity] = before[key]
            before[key] += 1
        return positions

    def _active(self) -> list[Job]:
        return [*(run.job for run in self.drawing.runs.values()), *self._waiting.values()]

    def _is_active(self, identity: str) -> bool:
        return identity in self._waiting or self.drawing.run_of(identity) is not None

    def _of_key(self, key: str) -> list[Job]:
        """The key's waiting and running jobs."""
        return [job for job in self._active() if job.key == key]

    def _tell(self, job: Job, position: int | None, eta: float | None) -> schema.Job:
        run = self.drawing.run_of(job.id)
        return schema.Job(
            id=job.id,
            state=job.state,  # type: ignore[arg-type]
            created=job.created,
            started=job.started,
            ended=job.ended,
            priority=job.priority,
            note=job.note,
            key=job.key,
            position=position,
            eta=None if job.state in ENDED else _rounded(eta),
            progress=None if run is None else run.progress,
            request=job.request,
            grid=grid_of(job),
            pictures=[tell_picture(picture, job) for picture in self.store.pictures_of(job.id)],
            error=None if job.error is None else schema.Error.model_validate(job.error),
            remarks=job.remarks,
        )

    def _state(self, identity: str) -> list[Happening]:
        """A job's present state as events: one for each picture so far, then its position, progress or end."""
        job = self._stored(identity)
        told = self.tell(job)
        data = [("picture", picture.model_dump(mode="json")) for picture in told.pictures]
        run = self.drawing.run_of(identity)
        if job.state in ENDED:
            data.append((job.state, told.model_dump(mode="json")))
        elif run is not None:
            data.append(run.last)
        else:
            data.append(("queued", {"position": told.position, "eta": told.eta}))
        return [Happening(self.feed.number, job.id, job.key, name, one, False) for name, one in data]

    async def _wait_for_end(self, job: Job) -> schema.Job:
        """The job after its end. If this task is cancelled, the job is cancelled, too."""
        async with aclosing(self.draw(job)) as happenings:
            async for happening in happenings:
                if happening.name in ENDED:
                    return schema.Job.model_validate(happening.data)
        raise Refused(503, "the server is stopping: try again in 5 s", retry_after=5)


def _digest(request: Request, grid: Grid | None, priority: int, note: str) -> str:
    """A hash of the body, to recognise a repeated request."""
    body = [request.model_dump(mode="json"), None if grid is None else grid.model_dump(mode="json"), priority, note]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_priority(caller: Caller, priority: int) -> None:
    most = 10 if caller.key is None else caller.key.priority
    if priority > most:
        raise Refused(403, f"priority {priority} is too high for this key: give at most {most}", param="priority")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, seconds), 2)


async def _wait_for_disconnect(http: HTTPRequest) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
