"""Where the upscaling models that users name are. Torch is not imported."""

from __future__ import annotations

import difflib
from pathlib import Path

from inkstream.types import InputError, Machine, Request

SUFFIXES = (".safetensors", ".pth", ".pt")
"""Suffixes of these files, in order of preference."""
OTHERS = tuple(
    f"{models}{folder}" for models in ("models/", "") for folder in ("upscale_models", "ESRGAN", "RealESRGAN", "DAT")
)
"""The folders of ComfyUI and A1111 that hold them, from the program's own folder or its models folder."""


def upscaler_folder(machine: Machine) -> Path:
    """Return the folder of the upscaling models that requests can name. It need not exist."""
    if machine.upscaler_folder is not None:
        return Path(machine.upscaler_folder).expanduser()
    from platformdirs import user_data_path

    return user_data_path("inkstream") / "upscalers"


def upscalers_in(folder: Path) -> dict[str, Path]:
    """Return the upscaling models in a folder and those inside: name -> file. A name is a path without its suffix.

    In a folder of ComfyUI or A1111, only its folders of upscaling models are searched. Of two files of one name, the
    safetensors file is taken. Files whose names have control characters or are not valid UTF-8 are left out.
    """
    roots = [folder / name for name in OTHERS if (folder / name).is_dir()] or [folder]
    names: dict[str, Path] = {}
    for suffix in SUFFIXES:
        for root in roots:
            for file in sorted(root.rglob(f"*{suffix}")) if root.is_dir() else []:
                names.setdefault(file.relative_to(root).with_suffix("").as_posix(), file)
    return {name: names[name] for name in sorted(names) if name.isprintable()}


def find_upscaler(name: str, folder: Path) -> Path:
    """Return the file of an upscaling model: by its name in the folder, or a path. Raises InputError."""
    known = upscalers_in(folder)
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in SUFFIXES:
        raise InputError(f"{path} is no file of an upscaling model: take one that ends in {', '.join(SUFFIXES)}")
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a .safetensors or .pth file, or put one in {folder}"
    raise InputError(f"upscaler {name} is neither a file nor a name in {folder}: {hint}")


def check_upscaler(request: Request, folder: Path) -> None:
    """Raise InputError if the upscaling model of a request does not exist."""
    if request.upscaler is not None:
        find_upscaler(request.upscaler, folder)
