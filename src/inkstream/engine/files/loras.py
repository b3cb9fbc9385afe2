"""Where the adapters (LoRA and relatives) that requests name are. Torch is not imported."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_data_path

from inkstream.types import InputError, LoraUse, Machine


def lora_folder(machine: Machine) -> Path:
    """Return the folder of the adapters that requests can name. It need not exist."""
    given = machine.lora_folder
    return Path(given).expanduser() if given is not None else user_data_path("inkstream") / "loras"


def find_lora(name: str, folder: Path) -> Path:
    """Return the file or folder of an adapter: a name in the folder of adapters, or a path.

    Raises InputError if there is none.
    """
    known = names_in(folder)
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.exists():
        return path
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a .safetensors file, or put one into {folder}"
    raise InputError(f"lora {name} is neither a file nor a name in {folder}: {hint}")


def names_in(folder: Path) -> dict[str, Path]:
    """Return the adapters in a folder and the folders inside: name -> file. A name is a path without its suffix."""
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def check_loras(loras: Sequence[str], folder: Path) -> None:
    """Raise InputError if an adapter does not exist."""
    for lora in loras:
        find_lora(LoraUse.read(lora).path, folder)
