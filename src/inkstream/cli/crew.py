"""One command in several processes, as torchrun starts them: the first speaks and writes, the others draw along."""

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
"""Seconds that an interrupted process has to end by itself."""


def follows() -> bool:
    """Whether this is one of them, but not the first."""
    return count_processes() > 1 and os.environ["RANK"] != "0"


def join(way: Way | None, device: str | None) -> Crew | None:
    """The processes that draw together; None where there is one. InputError where a way is given to one."""
    if way is None and count_processes() == 1:  # so torch need not be imported yet
        return None
    from inkstream.engine.machine.parallel import join_crew

    crew = join_crew(way, device)
    if crew is not None:
        end_when_interrupted()
    return crew


def follow(way: Way | None, machine: Machine) -> int:
    """Draw along with the first process, which says what. The exit code: what cannot be done the first one says, too,
    but for what happens to pictures of one's own."""
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
    """From now on Ctrl-C ends this process soon, even one that waits for another, which Python does not interrupt."""
    told, tells = socket.socketpair()
    tells.setblocking(False)
    signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)

    def watch(tells: socket.socket = tells) -> None:
        while told.recv(1)[0] != signal.SIGINT:
            pass
        time.sleep(GRACE)
        os._exit(130)

    threading.Thread(target=watch, name="inkstream-interrupt", daemon=True).start()
