"""The queue: jobs are accepted, put in order, drawn by the engine, and end exactly once, whatever dies in between.

The store is the truth; what is kept here beside it (who waits, who listens, whose turn it is) can be lost. All of it
happens in one event loop, so nothing needs a lock.
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

from inkstream.serve import schema
from inkstream.serve.engines.models import Offered, choose
from inkstream.serve.engines.pace import ends
from inkstream.serve.engines.process import EngineProcess, MakeEngine
from inkstream.serve.errors import KINDS, Refused, disk_full
from inkstream.serve.keys import Caller, Keys, sign
from inkstream.serve.limits import Settings, check_text
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
"""Engines that may die over one picture before its job is given up."""
HOLD = 5.0
"""Seconds until something is begun again after a picture, or a change of the queue, could not be written."""
PING = 15.0
"""Seconds of silence after which a stream says that it is still there."""
log = logging.getLogger("inkstream.serve")


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
        self.full = False  # nothing is begun, since it could not be kept
        self._held = 0.0  # until then
        self._owed: dict[str, Callable[[], None]] = {}  # job -> what of it must still be written
        self._waiting: dict[str, Job] = {}
        self._work: dict[str, float] = {}  # of each that waits
        self._order: list[str] | None = None
        self._clocks = Clocks()
        self._waiters: dict[str, int] = {}  # clients that wait for a job's answer
        self._watch: asyncio.Task[None] | None = None

    # Life -----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the last server left, and start an engine."""
        for picture in self.store.recent(50):
            self.drawing.pace.learn(Request.model_validate(picture.request), picture.seconds)
        for job in self.store.recover(time.time()):
            self._wait(job)
        if self._waiting:
            log.info("queue taken up", extra={"jobs": len(self._waiting)})
        self.drawing.engine.start()
        self._watch = asyncio.create_task(self._watching())

    async def stop(self) -> None:
        """End the engine. What is running will start again with the next server."""
        self.feed.close()
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self.drawing.engine.stop()

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
        """Accept a request, whose pictures are uploads. No death of a process loses it from now on.

        token: the client's idempotency key; the same one with the same request gives the same job again. waited: of no
        use once the client is gone. Refused where it asks for too much, or the queue, quota or rate is spent.
        """
        request, _ = choose(self.models, request)
        digest = _digest(request, grid, priority, note)
        check_text(request.prompt, request.negative_prompt, note)
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
        self.changed()
        return self._stored(job.id)

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
                    self._write(job.id, self._end, "cancelled")

    async def run(self, http: HTTPRequest, job: Job) -> schema.Job:
        """Wait until a job has ended, and return it. A client that leaves meanwhile cancels it, within one step.

        Refused with 503 where the server stops first; with 499, for the log, where the client is gone.
        """
        drawing = asyncio.create_task(self._last(job))
        leaving = asyncio.create_task(_left(http))
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
        self._wait(self._stored(job.id))
        self.changed()

    def pause(self, paused: bool) -> None:
        """Begin no more jobs, or go on. What is being drawn is finished."""
        self.paused = paused
        self.store.put_setting("paused", str(int(paused)))
        self.feed.tell("", "", "queue", {"paused": paused})
        self.changed()

    # Telling --------------------------------------------------------------------------------------------------------

    def order(self) -> list[str]:
        """The jobs that wait, in the order they will be begun."""
        if self._order is None:
            waiting = [
                Waiting(job.id, job.key, job.priority, job.place, job.model, self._cost(job))
                for job in self._waiting.values()
            ]
            order = in_order(waiting, self._clocks.keys, self.drawing.loaded, self.drawing.switch)
            self._order = [job.id for job in order]
        return self._order

    def etas(self) -> dict[str, float | None]:
        """Seconds until each job that has not ended does, where that can be foreseen."""
        pace, runs = self.drawing.pace, list(self.drawing.runs.values())
        if not all(pace.knows(run.model) for run in runs):
            return dict.fromkeys(job.id for job in self._active())
        waiting = [self._waiting[identity] for identity in self.order()]
        timed = [self._cost(job) if pace.knows(job.model) and not self.paused else None for job in waiting]
        foreseen = ends([self.drawing.left(run) for run in runs], timed, self.settings.slots)
        return dict(zip([*(run.job.id for run in runs), *(job.id for job in waiting)], foreseen))

    def tell(self, job: Job) -> schema.Job:
        """A job as the API has it."""
        return self.tell_all([job])[0]

    def tell_all(self, jobs: Sequence[Job]) -> list[schema.Job]:
        """The same of several."""
        waits = any(job.state not in ENDED for job in jobs)
        etas = self.etas() if waits else {}
        positions = self._positions() if waits else {}
        return [self._tell(job, positions.get(job.id), etas.get(job.id)) for job in jobs]

    def signed(self, path: str, seconds: int = 3600) -> str:
        """The same path, readable without a key for a while."""
        until = int(time.time()) + seconds
        return f"{path}?until={until}&signature={sign(self.secret, path, until)}"

    # What becomes of runs -------------------------------------------------------------------------------------------

    def finished(self, job: str) -> None:
        """All its pictures are there."""
        self._write(job, self._end, "succeeded")

    def failed(self, job: str, message: str, status: int) -> None:
        """It cannot be drawn: 400 where who asked can mend it, else 500."""
        code = "drawing_failed" if status == 500 else None
        self._write(job, self._end, "failed", {"message": message, "type": KINDS[status], "param": None, "code": code})

    def lost(self, job: str, died: bool) -> None:
        """Its run has ended before it was done; unless it has ended itself, it waits again, at the place it had."""
        self._write(job, self._lost, died, f"the engine died {DEATHS} times over this picture")

    def unsaved(self, job: str, reason: str) -> None:
        """Its picture could not be kept: it waits again, and all others with it, for a while."""
        self._hold(reason)
        self._write(job, self._lost, True, f"the picture cannot be saved ({reason}): free some of the server's disk")

    def changed(self) -> None:
        """Something about the queue has: begin what can be begun, and tell who waits where it stands."""
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

    # Inside ---------------------------------------------------------------------------------------------------------

    def _admit(self, caller: Caller, priority: int, pictures: int) -> None:
        """Refused where the queue, the key's share of it, its day or its minute is spent."""
        _check_priority(caller, priority)
        limits, key, now = self.settings.limits, caller.key, time.time()
        if self.store.free() < limits.reserve:
            raise disk_full()
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

    def _next(self) -> bool:
        """Begin the next job, if there is one and the engine has room for it."""
        if self.paused or not self._waiting:
            return False
        job = self._waiting[self.order()[0]]
        if not self.drawing.has_room(job.model) or not self._can_keep():
            return False
        try:
            begun = self.store.start(job.id, time.time())
        except (sqlite3.Error, OSError) as error:
            self._hold(str(error))
            return False
        self._clocks.spend(job.key, self._cost(job))
        del self._waiting[job.id], self._work[job.id]
        if begun:
            log.info("job begun", extra={"job": job.id, "key": job.key, "model": job.model})
            self.metrics.stage.labels("wait").observe(time.time() - job.created)
            self.drawing.begin(self._stored(job.id))
        return True

    def _can_keep(self) -> bool:
        """Whether there is room for what would be begun."""
        try:
            free = self.store.free()
        except OSError as error:
            self._hold(str(error))
            return False
        if free < self.settings.limits.reserve:
            self._hold("the disk is full")
        elif time.monotonic() >= self._held:
            self.full = False
        return not self.full

    def _hold(self, reason: str) -> None:
        """Begin nothing for a while."""
        if not self.full:
            log.error("nothing is begun until something can be written again", extra={"reason": reason})
        self.full, self._held = True, time.monotonic() + HOLD

    def _write(self, job: str, change: Callable[..., None], *values: Any) -> None:
        """Note what has become of a job; later, where that cannot be written now."""
        try:
            change(job, *values)
        except (sqlite3.Error, OSError) as error:
            self._hold(str(error))
            self._owed[job] = partial(change, job, *values)

    def _lost(self, job: str, died: bool, message: str) -> None:
        """A job waits again; it fails with the message where that has led nowhere too often."""
        if not self.store.requeue(job, died):
            return
        self._wait(self._stored(job))
        if self._waiting[job].deaths >= DEATHS:
            self.failed(job, message, 500)

    def _end(self, identity: str, state: str, error: dict[str, Any] | None = None) -> None:
        """A job ends, once: what comes later changes nothing."""
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

    async def _watching(self) -> None:
        """Now and then: end what takes too long, write what could not be written, and tidy the store."""
        tidied = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            try:
                self.drawing.check_time()
                for job, change in list(self._owed.items()):
                    change()
                    if self._owed.get(job) is change:  # it may have come to owe another one
                        del self._owed[job]
                if self.full:
                    self.changed()
                if time.monotonic() - tidied > 3600:
                    tidied = time.monotonic()
                    self.store.tidy(time.time())
            except (sqlite3.Error, OSError) as error:
                self._hold(str(error))

    def _stored(self, identity: str) -> Job:
        """A job that is known to be there, as the store has it now."""
        job = self.store.job(identity)
        assert job is not None
        return job

    def _wait(self, job: Job) -> None:
        """A job joins those that wait."""
        self._waiting[job.id] = job
        self._work[job.id] = sum(part.count * self.drawing.pace.work(part) for part in parts_of(job))
        self._order = None

    def _cost(self, job: Job) -> float:
        """Seconds that a job which waits is thought to take, alone."""
        return self.drawing.pace.seconds(job.model, self._work[job.id])

    def _positions(self) -> dict[str, int]:
        """Of each job that waits: how many of the same key will be begun before it. Jobs of others are not counted."""
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
        """A key's jobs that wait or run."""
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
        """A job's present state as happenings: its pictures so far, and where it stands."""
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

    async def _last(self, job: Job) -> schema.Job:
        """The job once it has ended; cancelled if this is."""
        async with aclosing(self.draw(job)) as happenings:
            async for happening in happenings:
                if happening.name in ENDED:
                    return schema.Job.model_validate(happening.data)
        raise Refused(503, "the server is stopping: ask again in a while", retry_after=5)


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
