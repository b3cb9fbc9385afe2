"""The engine process as the server sees it: started, used through lines of JSON, and restarted if it dies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

LINE = 32 << 20
"""Bytes of the longest message. A preview has a few thousand."""
PATIENCE = 30.0
"""Longest pause, in seconds, before a restart of an engine that keeps dying."""
log = logging.getLogger("inkstream.serve")

COMMAND = (sys.executable, "-m", "inkstream.serve.engines.worker")


class Engine(Protocol):
    """The interface of an engine for the queue, whether it is a process or a cluster."""

    def start(self) -> None: ...

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. If the engine is gone, the message is lost and `died` is called."""
        ...

    def kill(self) -> None:
        """End the engine at once, when it does not stop a cancelled run."""
        ...

    async def stop(self) -> None: ...


MakeEngine = Callable[[Mapping[str, Any], Callable[[dict[str, Any]], None], Callable[[], None]], Engine]
"""Makes an engine from three arguments: the first message to it, `told` (called with each of its messages), and `died`
(called when it has died)."""


class EngineProcess:
    """Keeps one engine process running until `stop`.

    first: the first message to each process. told: called with each message from it. died: called when it has ended.
    """

    def __init__(
        self,
        first: Mapping[str, Any],
        told: Callable[[dict[str, Any]], None],
        died: Callable[[], None],
        command: Sequence[str] = COMMAND,
    ):
        self.first = first
        self.told = told
        self.died = died
        self.command = command
        self.process: Process | None = None
        self._stopping = False
        self._has_drawn = False  # whether the present process has drawn a picture
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._keeping = asyncio.create_task(self._keep())

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to the engine. If the engine has died, the message is lost and `died` is called."""
        if self.process is not None and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        """End the engine process at once. A new one is started."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()

    async def stop(self) -> None:
        """End the engine process and start no new one."""
        self._stopping = True
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()  # the worker ends when its stdin closes
            with suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), 5.0)
        self.kill()
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping

    async def _keep(self) -> None:
        pause = 0.0
        while not self._stopping:
            began = asyncio.get_running_loop().time()
            try:
                await self._run()
            except OSError as error:
                log.error("engine cannot be started", extra={"error": str(error)})
            if self._stopping:
                return
            lived = asyncio.get_running_loop().time() - began
            pause = 0.0 if lived > PATIENCE or self._has_drawn else min(PATIENCE, 2 * pause + 0.1)
            code = self.process.returncode if self.process is not None else None
            log.warning("engine ended", extra={"code": code, "lived": round(lived, 1)})
            try:
                self.died()
            except Exception:
                log.exception("error while handling the end of the engine")
            await asyncio.sleep(pause)

    async def _run(self) -> None:
        """Start one engine process and handle its messages until it ends."""
        self._has_drawn = False
        self.process = await asyncio.create_subprocess_exec(
            *self.command, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=LINE, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        process = self.process
        assert process.stdout is not None
        logging_task = asyncio.create_task(self._log(process))
        try:
            self.send(self.first)
            async for line in process.stdout:
                if not line.endswith(b"\n"):
                    break  # the process died while it wrote this line
                try:
                    message = json.loads(line)
                except ValueError:
                    log.error("the engine sent a line that is not JSON")
                    continue
                try:
                    self._has_drawn |= message["event"] == "picture"
                    self.told(message)
                except Exception:
                    log.exception("error while handling a message of the engine")
            await process.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(logging_task, 1.0)  # the last lines on its stderr
        finally:
            self.kill()
            logging_task.cancel()

    async def _log(self, process: Process) -> None:
        """Copy each line from the engine's stderr into the log."""
        assert process.stderr is not None
        with suppress(ValueError, asyncio.CancelledError):
            async for line in process.stderr:
                if text := line.decode("utf-8", "replace").rstrip():
                    log.warning("engine says", extra={"line": text[:2000]})
