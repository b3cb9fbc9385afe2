"""The server on Ray Serve: one ingress with the queue, the history and the pictures, and one or more engines.

    serve run inkstream.serve.ray:app data=/srv/inkstream models=z-image-turbo gpus=1 most_engines=4

The ingress is the same application as `inkstream serve`. Its engine is a Ray deployment, and each replica of that
deployment is one engine. Machines share no files: messages carry the pictures in both directions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from inkstream.clients.remote.catalogue import is_remote
from inkstream.serve.engines.worker import Worker, make_engine, memory, open_gate, read_pictures, with_remote
from inkstream.serve.limits import Settings
from inkstream.types import InputError, Machine

if TYPE_CHECKING:
    from fastapi import FastAPI

ENGINES = "Engine"
"""Name of the deployment of engines. The ingress is the deployment Server."""
GRACE = 60.0
"""Seconds that a cancelled run may take to stop. After that, its engine ends itself."""
log = logging.getLogger("inkstream.serve")


def parsed(value: Any) -> Any:
    """A value from JSON if it is a text, as NAME=VALUE on a command line gives it."""
    return json.loads(value) if isinstance(value, str) else value


class Args(BaseModel):
    """Arguments of the application: NAME=VALUE after `serve run APP`, or `args` in a config file."""

    model_config = ConfigDict(extra="forbid")

    data: Path
    models: str = Field("", description="Names or NAME=PATH, comma-separated; empty: all models of the ingress.")
    aliases: str = Field("", description="NAME=MODEL, comma-separated: more names of models in OpenAI's API.")
    strict: bool = Field(False, description="Refuse OpenAI's model names unless they are aliases.")
    host: str = Field("0.0.0.0", description="Address of Ray's proxy. Any address except 127.0.0.1 needs keys.")
    key_file: Path | None = None
    least_engines: int = Field(1, ge=0)
    most_engines: int = Field(1, ge=1)
    slots: int = Field(4, ge=1, description="Jobs that one engine draws at the same time.")
    cpus: float = Field(1, ge=0, description="CPUs of one engine.")
    gpus: float = Field(0, ge=0, description="GPUs of one engine.")
    machine: Annotated[Machine, BeforeValidator(parsed)] = Field(
        Machine(), description="Options of one engine, as in `inkstream serve`; JSON, or a table of the config file."
    )
    fetch: bool = False


def app(args: dict[str, Any]) -> Any:
    """The application for Ray Serve. Raises ValidationError or InputError if the arguments are not valid."""
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
        # Enough jobs for `most_engines`. Jobs beyond the present engines wait in Ray, so that Ray starts more engines.
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
        max_ongoing_requests=1000,  # each stream of events is one long request
        ray_actor_options={"num_cpus": 0},
    )
    sources = [name.rpartition("=")[2] for name in settings.models]
    return server.bind(engines.bind(asdict(settings.machine), [name for name in sources if is_remote(name)]))


class Engine:
    """A replica: one engine. Like the worker of `inkstream serve`, it does not know queues, keys or HTTP."""

    def __init__(self, machine: Mapping[str, Any], remote: Sequence[str] = ()):
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.drawn = 0
        self.threads: list[threading.Thread] = []
        self.free = open_gate()
        self.parts = Path(tempfile.mkdtemp(prefix="inkstream-"))
        self.trouble = ""
        try:
            self.engine = make_engine(machine)
            self.drawer = with_remote(self.engine, remote)
        except InputError as error:
            self.trouble = str(error)

    async def hello(self) -> dict[str, Any]:
        """`ready` with the counts of drawn pictures and of runs, or `unusable` if the engine could not be made."""
        if self.trouble:
            return {"event": "unusable", "error": self.trouble}
        known = {"engine": self.name, "drawn": self.drawn, "runs": self._runs()}
        return {"event": "ready", "seconds": 0.0, "memory": memory(), **known}

    async def tell(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The engine's answers to a message without a run: `load` or `describe`."""
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
        """Yield all messages of one run; a picture's message has its bytes. Closing stops the run within one step."""
        letters: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def say(**told: Any) -> None:
            loop.call_soon_threadsafe(letters.put_nowait, told)

        worker = Worker(self.engine, self.parts, say, self.free, self.drawer)
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
    """All engines behind the interface of one: Ray gives each run to the least busy engine.

    If an engine dies, only its own runs are lost. Ray starts another engine.
    """

    def __init__(self, first: Mapping[str, Any], told: Callable[[dict[str, Any]], None], died: Callable[[], None]):
        self.parts = Path(first["parts"])
        self.told = told
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._handle: Any = None

    def start(self) -> None:
        from ray import serve  # pyright: ignore[reportMissingImports]

        self._handle = serve.get_deployment_handle(ENGINES, serve.get_replica_context().app_name)
        self._start_task(self._wait_for_engine())

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to an engine."""
        if "cancel" in message:
            if message["cancel"] in self._runs:
                self._runs[message["cancel"]].cancel()
        elif "draw" in message:
            self._runs[message["draw"]] = task = asyncio.create_task(self._draw(message))
            task.add_done_callback(lambda task: self._ended(message["draw"], task))
        else:
            self._start_task(self._ask(message))

    def kill(self) -> None:
        """Do nothing: an engine that cannot stop a run ends itself."""

    async def stop(self) -> None:
        """Cancel all runs. The next start draws them again."""
        tasks = [*self._runs.values(), *self._tasks]
        self.told = lambda message: None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait_for_engine(self) -> None:
        """Wait for the first engine. Jobs wait until it answers."""
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
        """Draw one run on any engine, and pass its messages on."""
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
        except Exception as error:  # the engine or its machine is gone
            log.warning("engine ended", extra={"error": type(error).__name__})
            self.told({"run": message["draw"], "event": "lost"})

    def _ended(self, run: str, task: asyncio.Task[None]) -> None:
        """Report a cancelled run: a task that is cancelled before it starts cannot report itself."""
        self._runs.pop(run, None)
        if task.cancelled():
            self.told({"run": run, "event": "cancelled"})

    def _start_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
