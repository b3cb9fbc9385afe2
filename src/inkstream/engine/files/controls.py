"""Where the control nets that users name are. Torch is not imported."""

from __future__ import annotations

from pathlib import Path

from inkstream.engine.files.loras import find_file
from inkstream.types import ControlUse, InputError, Machine, Request


def control_folder(machine: Machine) -> Path:
    """Return the folder of the control nets that requests can name. It need not exist."""
    if machine.control_folder is not None:
        return Path(machine.control_folder).expanduser()
    from platformdirs import user_data_path

    return user_data_path("inkstream") / "controls"


def find_control(name: str, folder: Path) -> Path:
    """Return the file or folder of a control net. Raises InputError if there is none."""
    return find_file("control net", name, folder)


def uses_of(request: Request) -> list[ControlUse]:
    """Return the control nets of a request. Raises InputError if there is not one for each control picture."""
    pictures, nets = len(request.control), len(request.control_nets)
    if pictures != nets:
        counted = [
            f"{n} {name}{'' if n == 1 else 's'}" for n, name in ((nets, "control net"), (pictures, "control picture"))
        ]
        raise InputError(
            f"{counted[0]} and {counted[1]} were given: give each control picture (--control) its net (--control-net)"
        )
    return [ControlUse.read(net) for net in request.control_nets]


def check_controls(request: Request, folder: Path) -> None:
    """Raise InputError if a control net does not exist."""
    for use in uses_of(request):
        find_control(use.path, folder)
