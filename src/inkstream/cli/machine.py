"""Options of what a model runs on, shared by all commands that draw."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from inkstream.engine.machine.processes import count_processes
from inkstream.types import AttentionName, Drawer, InputError, Machine, PlacementName, Saving  # noqa: F401

# cyclopts looks up the types of inherited fields in the module of the subclass.

if TYPE_CHECKING:
    from inkstream.engine.engine import Engine
    from inkstream.engine.machine.parallel import Crew

RUN = Group("This run", sort_key=1)
Here = Annotated[Machine, Parameter(name="*", group=RUN)]


@Parameter(name="*", group=RUN)
@dataclass(frozen=True)
class Anywhere(Machine):
    """The options of a machine, or a server that draws instead."""

    server: Annotated[
        str | None,
        Parameter(help="Draw on this server, such as http://127.0.0.1:8400; INKSTREAM_API_KEY is its API key."),
    ] = None


HERE = Machine()
Files = Annotated[Saving, Parameter(name="*", group=RUN)]
ANYWHERE = Anywhere()


def make_engine(machine: Machine, crew: Crew | None = None) -> Engine:
    """Make an engine on a machine, or on this process's share of it. Raises InputError if it has no such device."""
    from inkstream.engine.engine import Engine

    if crew is None and count_processes() > 1:
        raise InputError("torchrun is for drawing with inkstream generate, and for training: start this without it")
    if crew is not None:
        machine = replace(machine, device=str(crew.device))
    return Engine(machine, crew=crew)


def make_drawer(machine: Anywhere, crew: Crew | None = None, models: Iterable[str] = ()) -> Drawer:
    """Make what draws requests. Raises InputError if there is no such machine, or no such address.

    models: those that the user named. Only remote models among them can be drawn with. If all are, no engine is made.
    """
    if machine.server is None:
        from inkstream.clients.remote.catalogue import is_remote

        named = list(models)
        remote = [name for name in named if is_remote(name)]
        if remote and crew is not None:
            raise InputError(f"{remote[0]} is not drawn in {crew.count} processes here: start this without torchrun")
        if not remote:
            return make_engine(machine, crew)
        from inkstream.clients.remote.drawer import remote_drawers
        from inkstream.clients.router import Router

        drawers = remote_drawers(remote, machine)
        return drawers[remote[0]] if remote == named and len(drawers) == 1 else Router(make_engine(machine), drawers)
    if crew is not None:
        raise InputError(f"--server {machine.server} draws there, not in {crew.count} processes here: leave one out")
    from inkstream.clients.http import Client

    for name in options_of(machine).keys() - {"server"}:
        option = "--" + name.replace("_", "-")
        raise InputError(f"{option} is for a model on this machine: leave it out, or leave --server out")
    return Client(machine.server, os.environ.get("INKSTREAM_API_KEY") or None)


def check_machine(machine: Machine) -> None:
    """Raise InputError if the machine has no such device, dtype, memory size or attention."""
    from inkstream.engine.machine import loader

    loader.check_machine(machine)


def options_of(machine: Machine) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    options = {field.name: (getattr(machine, field.name), field.default) for field in fields(machine)}
    return {name: value for name, (value, default) in options.items() if value != default}


def words_of(machine: Machine) -> list[str]:
    """Return the command line's words that give these options again."""
    options = {f"--{name.replace('_', '-')}": value for name, value in options_of(machine).items()}
    return [
        option if one is True else f"{option}={one}"
        for option, value in options.items()
        for one in (value if isinstance(value, tuple) else (value,))
    ]
