"""Where the adapters (LoRA and relatives) that users name are, and how strong. Torch is not imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from inkstream.types import InputError, LoraUse, Machine
from inkstream.weights.lora.keys import FOLDERS


def lora_folder(machine: Machine) -> Path:
    """Return the folder of the adapters that requests can name. It need not exist."""
    if machine.lora_folder is not None:
        return Path(machine.lora_folder).expanduser()
    from platformdirs import user_data_path

    return user_data_path("inkstream") / "loras"


def find_lora(name: str, folder: Path) -> Path:
    """Return the file or folder of an adapter. Raises InputError if there is none. Uses no network.

    name: in the folder, a path, or on the hub: OWNER/NAME or OWNER/NAME/FILE, if the hub's cache holds it.
    """
    try:
        return find_file("lora", name, folder)
    except InputError as error:
        if misread := re.fullmatch(r"(.+\.safetensors)([:@#].*)", name):
            raise InputError(
                f"lora {misread[1]}: {misread[2]} is no strength, steps or blocks: "
                "write PATH[:STRENGTH][@FROM-UNTIL][#BLOCKS=FACTOR,...]"
            ) from error
        if (published := on_hub(name)) is None:
            raise
        if (file := find_cached(*published)) is None:
            raise InputError(f"{error}; as a name on the hub, inkstream generate --lora {name} downloads it") from error
        return file


def on_hub(name: str) -> tuple[str, str] | None:
    """Return the repository on the hub that an adapter's name means, and its file, "" for the only one; else None."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/((?:\w[^/\\]*/)*\w[^/\\]*\.safetensors))?", name)
    return None if found is None or found[1].endswith(".safetensors") else (found[1], found[2] or "")


def find_cached(repo: str, file: str) -> Path | None:
    """Return an adapter's file in the hub's cache. file: "" for the only one, or the one with a usual name."""
    from inkstream.weights import hub  # a slow import, only needed for names on the hub

    for name in (file,) if file else (*FOLDERS, "*.safetensors"):
        folder = hub.cached(repo, files_of(name))
        found = [] if folder is None else [*folder.rglob(name)] if "*" in name else [folder / name]
        if len(found) == 1 and found[0].is_file():
            return found[0]
    return None


def files_of(name: str) -> tuple[str, str]:
    """Return an adapter's file in a repository, and that of PEFT's configuration beside it."""
    return name, str(PurePosixPath(name).with_name("adapter_config.json"))


def find_file(what: str, name: str, folder: Path) -> Path:
    """Return a file by its name in the folder, or a path. what: the kind of file, for the error.

    Raises InputError if there is none.
    """
    named = folder / f"{name}.safetensors"
    if named.is_file() and named.is_relative_to(folder) and ".." not in named.relative_to(folder).parts:
        return named
    path = Path(name).expanduser()
    if path.exists():
        return path
    known = names_in(folder)
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a .safetensors file, or put one into {folder}"
    raise InputError(f"{what} {name} is neither a file nor a name in {folder}: {hint}")


def names_in(folder: Path) -> dict[str, Path]:
    """Return the safetensors files in a folder and those inside: name -> file. A name is a path without its suffix.

    Files whose names have control characters or are not valid UTF-8 are left out, because no text can name them.
    """
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    names = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {name: file for name, file in names.items() if name.isprintable()}


def check_loras(loras: Sequence[str], folder: Path) -> None:
    """Raise InputError if an adapter does not exist."""
    for lora in loras:
        find_lora(LoraUse.read(lora).path, folder)


def read_merges(merges: Sequence[str]) -> list[LoraUse]:
    """Read the adapters to merge, as PATH[:STRENGTH]. Raises InputError for a range of steps."""
    uses = [LoraUse.read(merge) for merge in merges]
    for use in uses:
        if (use.begins, use.ends) != (0, 1):
            steps = f"@{use.begins:g}-{use.ends:g}"
            raise InputError(f"{use.path}{steps}: merged weights hold for all steps: leave out {steps}, or take --lora")
    return uses


def factors_of(use: LoraUse, layers: Sequence[str] | Mapping[str, object]) -> dict[str, float]:
    """Return the factor of the strength at each layer. Raises InputError if a pattern of blocks fits no layer."""
    factors = dict.fromkeys(layers, 1.0)
    for pattern, factor in use.blocks:
        fitting = [layer for layer in layers if fits(pattern, layer)]
        if not fitting:
            example = next(iter(layers))
            raise InputError(f"lora {use.path} changes no layer in {pattern}: take a part of a path like {example}")
        factors |= dict.fromkeys(fitting, factor)
    return factors


def fits(pattern: str, layer: str) -> bool:
    """Whether a pattern of blocks fits a layer's path. `layers.0-14` fits the layers in blocks 0 to 14 of `layers`."""
    for wanted, name in zip_longest(pattern.split("."), layer.split(".")[: pattern.count(".") + 1]):
        run = re.fullmatch(r"(\d+)-(\d+)", wanted)
        if not (int(run[1]) <= int(name) <= int(run[2]) if run and (name or "").isdigit() else wanted == name):
            return False
    return True
