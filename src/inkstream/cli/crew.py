"""One command in several processes that torchrun starts. Process 0 prints and writes; the others only draw."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from inkstream.cli.machine import make_engine
from inkstream.engine.machine.processes import count_processes
from inkstream.types import Failed, InputError, Loading, Machine, Request

if TYPE_CHECKING:
    from inkstream.engine.machine.parallel import Crew, Way

GRACE = 3.0
"""Seconds that an interrupted process has to end by itself, before it is ended."""


def follows() -> bool:
    """Return whether this is a process other than process 0."""
    return count_processes() > 1 and os.environ["RANK"] != "0"


def join(way: Way | None, device: str | None) -> Crew | None:
    """Join the processes that draw together; None if there is only one. Raises InputError if one process gets a way."""
    if way is None and count_processes() == 1:  # so torch need not be imported yet
        return None
    from inkstream.engine.machine.parallel import join_crew

    crew = join_crew(way, device)
    if crew is not None:
        end_when_interrupted()
    return crew


def follow(way: Way | None, machine: Machine) -> int:
    """Draw together with process 0, which decides what to draw. Returns the exit code.

    Process 0 reports the errors. Only an error in pictures of this process, with way "replicas", is raised here.
    """
    drawing, crew = False, None
    try:
        crew = join(way, machine.device)
        for event in make_engine(machine, crew).submit(Request.model_validate({})):
            drawing = drawing or (isinstance(event, Loading) and event.what == "prompt")
            if isinstance(event, Failed):
                raise InputError(event.error)
    except InputError:
        if drawing and crew is not None and crew.way == "replicas":
            raise
        return 2
    return 0


def end_when_interrupted() -> None:
    """Let Ctrl-C end this process after GRACE seconds, even while it waits for another process."""
    told, tells = socket.socketpair()
    tells.setblocking(False)
    signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)

    def watch(tells: socket.socket = tells) -> None:
        while told.recv(1)[0] != signal.SIGINT:
            pass
        time.sleep(GRACE)
        os._exit(130)

    threading.Thread(target=watch, name="inkstream-interrupt", daemon=True).start()
