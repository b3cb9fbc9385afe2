"""State dicts from safetensors files, memory-mapped, and back to them. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inkstream.types import InputError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that run code when they are opened."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a file says it holds. Tensors are on meta: a name, a shape, a dtype, no data."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """The header of a file, or of a folder's shards together; no weight is read.

    InputError, naming the file, where one is missing, cut short, damaged, or is a pickle.
    """
    files, index = weight_files(path)
    headers = [(file, _read_one_header(file)) for file in files]
    merged = Header(_merge((file, header.tensors) for file, header in headers), {})
    for _, header in headers:
        merged.metadata.update(header.metadata)
    for name, file in index.items():
        if name not in merged.tensors:
            raise InputError(f"{Path(path)}: the index says {file} holds {name}, which it does not: download it again")
    return merged


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder's shards together, as views of the mapped files: nothing is copied.

    Memory is taken as they are touched, and is the file's own pages. Errors as `read_header`.
    """
    return _merge((file, _read_one(file)) for file in weight_files(path)[0])


def weight_files(path: Path | str) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files behind a path, and what its index says: tensor name -> file name (empty without one).

    A folder's `*.index.json` names its shards; without one every safetensors file in it counts.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: convert it to safetensors first")
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path} is missing: check the path, or download it again")
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is no safetensors file, the only kind that is read")
        return [path], {}
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise InputError(f"{path} holds {len(indexes)} indexes ({', '.join(p.name for p in indexes)}): keep one")
    if indexes:
        index = _read_index(indexes[0])
        files = [path / name for name in dict.fromkeys(index.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(f"{path} lacks {few(missing)}, which {indexes[0].name} names: download it again")
        return files, index
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLES]
        if pickles:
            raise InputError(f"{path} holds only pickles ({few(pickles)}): convert them to safetensors first")
        raise InputError(f"{path} holds no safetensors file: download it again")
    return files, {}


def strip_prefix(state: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The state dict without the first of the prefixes that any of its keys carries; other keys stay as they are.

    InputError where two keys would become one.
    """
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in state)), "")
    stripped = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    if len(stripped) < len(state):
        twice = [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) in state]
        raise InputError(f"{few(twice)} is there with and without its prefix {prefix}: remove one of the two")
    return stripped


def write_state(
    path: Path | str,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a state dict as safetensors, one tensor at a time, and return the files written.

    A file appears under its name only when it is whole. Above `shard_bytes` the state is cut, in its own order, into
    `NAME-00001-of-0000N.safetensors` beside an index `NAME.safetensors.index.json`. progress: told the bytes of each
    tensor once written.
    """
    path = Path(path)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes or math.inf
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes or math.inf
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _write_one(path, shards[0], metadata or {}, progress)
        return [path]
    files = [path.with_name(f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors") for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        _write_one(file, shard, metadata or {}, progress)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": {name: file.name for file, shard in zip(files, shards) for name in shard},
    }
    with _whole(path.with_name(path.name + ".index.json")) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return files


def _merge(states: Iterator[tuple[Path, dict[str, Tensor]]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file, state in states:
        for name in state:
            if name in origin:
                raise InputError(f"{name} is in both {origin[name]} and {file.name}: keep one of the two")
        merged.update(state)
        origin.update(dict.fromkeys(state, file))
    return merged


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text("utf-8"))["weight_map"]
        if any(Path(file).name != file for file in index.values()):
            raise ValueError("a shard lies elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no index of shards ({error}): download it again") from error
    return index


def _read_one(path: Path) -> dict[str, Tensor]:
    _read_one_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): download it again") from error


def _read_one_header(path: Path) -> Header:
    """The eight bytes of a length, that much JSON, and the data, which must end with the file."""
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: convert it to safetensors first")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise InputError(f"{path} is a pointer of git-lfs, not the weights: run `git lfs pull`")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or 8 + length > size:
                raise InputError(f"{path} is cut short or no safetensors file: download it again")
            data = json.loads(file.read(length))
        metadata = data.pop("__metadata__", {})
        foreign = {entry["dtype"] for entry in data.values()} - DTYPES.keys()
        if foreign:
            raise InputError(f"{path} holds numbers of type {few(sorted(foreign))}, which are not read here")
        tensors = {name: _tensor(entry) for name, entry in data.items()}
        ends = [entry["data_offsets"][1] for entry in data.values()]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}): download it again") from error
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise InputError(f"{path} is cut short, {size:,} of {whole:,} bytes: download it again")
    return Header(tensors, metadata)


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
    begin, end = entry["data_offsets"]
    if end - begin != tensor.nbytes:
        raise ValueError(f"{end - begin} bytes for {entry['dtype']} {entry['shape']}")
    return tensor


def _write_one(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], progress: Callable[[int], None] | None
) -> None:
    """The largest dtypes first, so that every tensor starts at a multiple of its own."""
    ordered = sorted(state.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that mapped tensors start where vector units like it
    with _whole(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(tensor.nbytes)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes it at the end, or is gone where the end is not reached."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def few(names: Sequence[str], count: int = 3) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
