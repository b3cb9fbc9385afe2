"""The options that say on what a model runs, the same for every command that draws."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from inkstream.engine.machine.processes import count_processes
from inkstream.types import InputError

if TYPE_CHECKING:
    from inkstream.clients.http import Client
    from inkstream.engine.engine import Engine
    from inkstream.engine.machine.parallel import Crew

RUN = Group("This run", sort_key=1)


@Parameter(name="*", group=RUN)
@dataclass(frozen=True)
class Machine:
    """Device, number format and memory that a model gets, and whose licence it may have.

    Parameters
    ----------
    device
        cpu, cuda, cuda:1, mps; else the best there is.
    dtype
        bf16, fp32 or fp16; else what suits the device.
    memory
        What the model may take of the device, like 8GiB, on the CPU the whole process; else what is free.
    placement
        Where the model's parts are: all on the device, only those at work, or only the layers at work; else the fastest
        of these that the memory allows.
    compile
        Compile the blocks of the transformer, which the first picture waits for; meant for GPUs.
    commercial_only
        Refuse a model whose licence does not allow commercial use; INKSTREAM_COMMERCIAL_ONLY=1 always does.
    """

    device: str | None = None
    dtype: str | None = None
    memory: str | None = None
    placement: Literal["resident", "parked", "streamed"] | None = None
    compile: bool = False
    commercial_only: bool = False

    def engine(self, crew: Crew | None = None) -> Engine:
        """An engine on it, or on this process's share of it. InputError where there is no such machine."""
        from inkstream.engine.engine import Engine

        if crew is None and count_processes() > 1:
            raise InputError("torchrun is for drawing with inkstream generate, and for training: start this without it")
        self.check()
        device = self.device if crew is None else str(crew.device)
        return Engine(device, self.dtype, False, self.licence, self.bytes, self.placement, crew, self.compile)

    def check(self) -> None:
        """InputError where there is no such device, dtype or size."""
        from inkstream.engine.machine.loader import choose_device, choose_dtype

        choose_dtype(self.dtype, choose_device(self.device))
        assert self.bytes is None or self.bytes

    @property
    def bytes(self) -> int | None:
        """The memory, as a number."""
        from inkstream.engine.machine.memory import read_size

        return None if self.memory is None else read_size(self.memory)

    @property
    def licence(self) -> bool | None:
        """What `load` calls commercial_only: None follows the setting."""
        return self.commercial_only or None

    def words(self) -> list[str]:
        """The options that make it again."""
        options = {f"--{name.replace('_', '-')}": value for name, value in self.given().items()}
        return [option if value is True else f"{option}={value}" for option, value in options.items()]

    def given(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {name: value for name, value in asdict(self).items() if value}


@Parameter(name="*", group=RUN)
@dataclass(frozen=True)
class Anywhere(Machine):
    """A machine, or a server that draws instead of it."""

    server: Annotated[
        str | None,
        Parameter(help="Draw on this server, as http://127.0.0.1:8400; INKSTREAM_API_KEY holds the key it knows."),
    ] = None

    def way_in(self, crew: Crew | None = None) -> Engine | Client:
        """What draws requests. InputError where there is no such machine, or no such address."""
        if self.server is None:
            return self.engine(crew)
        if crew is not None:
            raise InputError(f"--server {self.server} draws there, not in {crew.count} processes here: leave one out")
        from inkstream.clients.http import Client

        for name in self.given().keys() - {"server"}:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is for a model on this machine: leave it out, or leave --server out")
        return Client(self.server, os.environ.get("INKSTREAM_API_KEY") or None)


HERE = Machine()
ANYWHERE = Anywhere()
