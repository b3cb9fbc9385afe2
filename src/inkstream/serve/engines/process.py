"""The engine's process as the server sees it: started, spoken to in lines of JSON, started again when it dies."""

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
"""Bytes of the longest message: a preview is a few thousand."""
PATIENCE = 30.0
"""Seconds between tries to start an engine that keeps dying, at most."""
log = logging.getLogger("inkstream.serve")

COMMAND = (sys.executable, "-m", "inkstream.serve.engines.worker")


class Engine(Protocol):
    """What draws, as the queue sees it, wherever it is."""

    def start(self) -> None: ...

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell it; what it cannot hear is lost, and that is told."""
        ...

    def kill(self) -> None:
        """End it at once, where it does not stop what it was told to."""
        ...

    async def stop(self) -> None: ...


MakeEngine = Callable[[Mapping[str, Any], Callable[[dict[str, Any]], None], Callable[[], None]], Engine]
"""From the first message, and whom to call with each message of the engine and at its death, to an engine."""


class EngineProcess:
    """Keeps one engine running until `stop`. told: called with each message; died: called when one has ended."""

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
        self._has_drawn = False  # this engine
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._keeping = asyncio.create_task(self._keep())

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell the engine; what it cannot hear any more is lost, and its death is told."""
        if self.process is not None and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        """End the engine at once; another one is started."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()

    async def stop(self) -> None:
        """End the engine, and start no other."""
        self._stopping = True
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()  # which it takes as the end
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
                log.exception("the engine's death was not understood")
            await asyncio.sleep(pause)

    async def _run(self) -> None:
        """One engine's life."""
        self._has_drawn = False
        self.process = await asyncio.create_subprocess_exec(
            *self.command, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=LINE, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        process = self.process
        assert process.stdout is not None
        talk = asyncio.create_task(self._log(process))
        try:
            self.send(self.first)
            async for line in process.stdout:
                if not line.endswith(b"\n"):
                    break  # cut short by its death
                try:
                    message = json.loads(line)
                except ValueError:
                    log.error("engine said what is no JSON")
                    continue
                try:
                    self._has_drawn |= message["event"] == "picture"
                    self.told(message)
                except Exception:
                    log.exception("a message of the engine was not understood")
            await process.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(talk, 1.0)  # its last words
        finally:
            self.kill()
            talk.cancel()

    async def _log(self, process: Process) -> None:
        """What the engine writes to stderr goes into the log, a line each."""
        assert process.stderr is not None
        with suppress(ValueError, asyncio.CancelledError):
            async for line in process.stderr:
                if text := line.decode("utf-8", "replace").rstrip():
                    log.warning("engine says", extra={"line": text[:2000]})
