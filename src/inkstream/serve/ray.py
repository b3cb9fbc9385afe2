"""The server on Ray Serve: one ingress, which owns queue, history and pictures, and as many engines as there is work.

    serve run inkstream.serve.ray:app data=/srv/inkstream models=z-image-turbo gpus=1 most_engines=4

The ingress is the same application as `inkstream serve`; only its engine is replaced by a Ray deployment whose replicas
are engines. Nothing is shared between machines: pictures go along with the messages, in both directions.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from inkstream.serve.engines.worker import Worker, make_engine, memory, open_gate, read_pictures
from inkstream.serve.limits import Settings
from inkstream.types import InputError, Machine

if TYPE_CHECKING:
    from fastapi import FastAPI

ENGINES = "Engine"
"""Name of the deployment of engines; the ingress is called Server."""
GRACE = 60.0
"""Seconds that an engine may go on with a run that nobody wants, before it ends itself."""
log = logging.getLogger("inkstream.serve")


class Args(BaseModel):
    """What `serve run` takes after the application's name, as name=value; a config file's `args`."""

    model_config = ConfigDict(extra="forbid")

    data: Path
    models: str = Field("", description="Names or NAME=PATH, with commas between; none: all that the ingress has.")
    aliases: str = Field("", description="NAME=MODEL, with commas between: other names in OpenAI's API.")
    strict: bool = Field(False, description="Refuse OpenAI's names of models that are no alias.")
    host: str = Field("0.0.0.0", description="Where Ray's proxy listens; others than 127.0.0.1 need keys.")
    key_file: Path | None = None
    least_engines: int = Field(1, ge=0)
    most_engines: int = Field(1, ge=1)
    slots: int = Field(4, ge=1, description="Jobs that one engine draws at once.")
    cpus: float = Field(1, ge=0, description="Of one engine.")
    gpus: float = Field(0, ge=0, description="Of one engine.")
    machine: Machine = Field(Machine(), description="The options of one engine, as of `inkstream serve`.")
    fetch: bool = False


def app(args: dict[str, Any]) -> Any:
    """The application for Ray Serve. ValidationError or InputError where it cannot be."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    given = Args.model_validate(args)
    settings = Settings(
        data=given.data,
        host=given.host,
        models=tuple(name.strip() for name in given.models.split(",") if name.strip()),
        aliases=tuple(alias for alias in given.aliases.split(",") if alias.strip()),
        strict=given.strict,
        key_file=given.key_file,
        machine=given.machine,
        # More than the engines there are can draw, up to what the most would: Ray sees them wait, and starts more.
        slots=given.slots * given.most_engines,
        fetch=given.fetch,
    )

    def ingress() -> FastAPI:
        from inkstream.serve import logs
        from inkstream.serve.app import build

        logs.set_up()
        return build(settings, RayEngines)

    engines: Any = serve.deployment(
        Engine,
        name=ENGINES,
        max_ongoing_requests=given.slots,
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
        autoscaling_config={
            "min_replicas": given.least_engines,
            "max_replicas": given.most_engines,
            "target_ongoing_requests": given.slots,
        },
    )
    server: Any = serve.deployment(
        serve.ingress(ingress)(),
        name="Server",
        num_replicas=1,
        max_ongoing_requests=1000,  # streams of events are requests that last
        ray_actor_options={"num_cpus": 0},
    )
    return server.bind(engines.bind(asdict(settings.machine)))


class Engine:
    """A replica: one engine. It knows nothing of queues, keys or HTTP, as the worker of `inkstream serve` does not."""

    def __init__(self, machine: Mapping[str, Any]):
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.drawn = 0
        self.threads: list[threading.Thread] = []
        self.free = open_gate()
        self.parts = Path(tempfile.mkdtemp(prefix="inkstream-"))
        self.trouble = ""
        try:
            self.engine = make_engine(machine)
        except InputError as error:
            self.trouble = str(error)

    async def hello(self) -> dict[str, Any]:
        """Whether it can draw, what it has drawn so far, and how many runs it has in hand."""
        if self.trouble:
            return {"event": "unusable", "error": self.trouble}
        known = {"engine": self.name, "drawn": self.drawn, "runs": self._runs()}
        return {"event": "ready", "seconds": 0.0, "memory": memory(), **known}

    async def tell(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What it says to a message that is about no run: `load` or `describe`."""
        told: list[dict[str, Any]] = []
        worker = Worker(self.engine, self.parts, lambda **one: told.append(one), self.free)
        if "load" in message:
            if self._runs():
                return []
            self.free.clear()
            await asyncio.to_thread(worker.load, message["load"], message["source"])
        else:
            await asyncio.to_thread(worker.describe, message["describe"], message["source"])
        return told

    async def draw(self, message: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """All it says of one run, to its end; a picture's bytes are with it. Closing it stops the run within a step."""
        letters: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def say(**told: Any) -> None:
            loop.call_soon_threadsafe(letters.put_nowait, told)

        worker = Worker(self.engine, self.parts, say, self.free)
        worker.live.add(message["draw"])
        thread = threading.Thread(target=worker.draw, args=(message,), daemon=True)
        thread.start()
        self.threads.append(thread)
        try:
            while True:
                told = await letters.get()
                if told["event"] == "picture":
                    part = self.parts / told["file"]
                    told["data"] = part.read_bytes()
                    part.unlink()
                    self.drawn += 1
                yield told
                if told["event"] in ("done", "failed", "cancelled", "unsaved"):
                    return
        finally:
            worker.cancel(message["draw"])
            loop.call_later(GRACE, lambda: os._exit(1) if thread.is_alive() else None)

    def _runs(self) -> int:
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        return len(self.threads)


class RayEngines:
    """All engines, as the queue sees its one: jobs are handed to whichever is least busy, and what it says is told on.

    An engine that dies takes only its own runs with it; Ray starts another.
    """

    def __init__(self, first: Mapping[str, Any], told: Callable[[dict[str, Any]], None], died: Callable[[], None]):
        self.parts = Path(first["parts"])
        self.told = told
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._handle: Any = None

    def start(self) -> None:
        from ray import serve  # pyright: ignore[reportMissingImports]

        self._handle = serve.get_deployment_handle(ENGINES, serve.get_replica_context().app_name)
        self._do(self._greet())

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell an engine."""
        if "cancel" in message:
            if message["cancel"] in self._runs:
                self._runs[message["cancel"]].cancel()
        elif "draw" in message:
            self._runs[message["draw"]] = task = asyncio.create_task(self._draw(message))
            task.add_done_callback(lambda task: self._ended(message["draw"], task))
        else:
            self._do(self._ask(message))

    def kill(self) -> None:
        """Nothing: an engine that does not stop a run ends itself."""

    async def stop(self) -> None:
        """Begin nothing more, and leave what is being drawn; the next start draws it again."""
        tasks = [*self._runs.values(), *self._others]
        self.told = lambda message: None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _greet(self) -> None:
        """The first engine to come answers; until then jobs wait."""
        for wait in itertools.chain((1.0, 2.0, 5.0), itertools.repeat(10.0)):
            try:
                self.told(await self._handle.hello.remote())
                return
            except Exception as error:
                log.error("no engine answers", extra={"error": type(error).__name__})
            await asyncio.sleep(wait)

    async def _ask(self, message: Mapping[str, Any]) -> None:
        try:
            for told in await self._handle.tell.remote(dict(message)):
                self.told(told)
        except Exception as error:
            log.error("an engine did not answer", extra={"error": type(error).__name__})

    async def _draw(self, message: Mapping[str, Any]) -> None:
        """One run, wherever it is drawn."""
        stream: Any = None
        try:
            carried = {**message, "request": await asyncio.to_thread(read_pictures, message["request"])}
            stream = self._handle.options(stream=True).draw.remote(carried)
            async for told in stream:
                if "data" in told:
                    (self.parts / told["file"]).write_bytes(told.pop("data"))
                self.told(told)
        except asyncio.CancelledError:
            if stream is not None:
                stream.cancel()
            raise
        except Exception as error:  # its engine is gone, or the machine it ran on
            log.warning("engine ended", extra={"error": type(error).__name__})
            self.told({"run": message["draw"], "event": "lost"})

    def _ended(self, run: str, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before it begins says nothing itself."""
        self._runs.pop(run, None)
        if task.cancelled():
            self.told({"run": run, "event": "cancelled"})

    def _do(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
