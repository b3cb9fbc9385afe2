"""Read state dicts from memory-mapped safetensors and GGUF files, and write safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inkstream.disk import whole_file
from inkstream.quant.packed import Weight
from inkstream.types import InputError
from inkstream.weights import dialects, gguf
from inkstream.weights.header import read_raw_header

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of pickle files, which can run code when they are opened."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SUFFIXES = (".safetensors", ".gguf")
"""Suffixes of weight files that can be read, in order of preference."""

MAIN = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""Prefixes that single files put before the names of a transformer's weights."""

_SECTION = re.compile(r"(vae|first_stage_model)\.|text_encoders\.([^.]+\.)?(transformer\.)?")
"""Prefixes of the other parts in a file that holds a whole model, as ComfyUI saves it."""

_LONGEST_MARK = 4096
"""Largest size in bytes of a format mark, the small tensor that holds the packing of another tensor."""

T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """The header of a file. Weights are on meta: they have a name, a shape and a dtype or format, but no data."""

    tensors: dict[str, Weight]
    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """Read the header of a file, or the merged headers of a folder's shards. No weight is read.

    Raises InputError, which names the file, if a file is missing, cut short, damaged or a pickle, or if a weight is
    packed in a way that is not supported.
    """
    files, index = weight_files(path)
    if files[0].suffix == ".gguf":
        tensors = _merge((file, gguf.read_gguf(file, on_meta=True)) for file in files)
        return Header(tensors, {key: value for file in files for key, value in gguf.read_metadata(file).items()})
    raw, metadata = _read_raw_header(path, files)
    for name, file in index.items():
        if name not in raw:
            raise InputError(f"{Path(path)}: the index lists {name} in {file}, which lacks it: download it again")
    return Header(_gather(path, raw, metadata), metadata)


def read_state(path: Path | str, only: Collection[str] | None = None) -> dict[str, Weight]:
    """Read the weights of a file or of a folder's shards as views of the memory-mapped files; nothing is copied.

    only: the names to read; all if it is None. Packed weights stay packed. A weight's pages are loaded when it is first
    used, and they are shared with the system's file cache. Raises InputError as `read_header` does.
    """
    files, _ = weight_files(path)
    if files[0].suffix == ".gguf":
        return _merge((file, gguf.read_gguf(file, only)) for file in files)
    raw = _merge((file, _read_one(file, only)) for file in files)
    state = _gather(path, raw, _read_raw_header(path, files)[1])
    return {name: weight for name, weight in state.items() if only is None or name in only}


def read_tensors(path: Path | str, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read safetensors files like `read_state`, but return each tensor as it is stored, without making a Packed."""
    return _merge((file, _read_one(file, only)) for file in weight_files(path)[0])


def weight_files(path: Path | str) -> tuple[list[Path], dict[str, str]]:
    """Return the weight files of a path, and its index as tensor name -> file name (empty if there is no index).

    A folder's `*.index.json` lists its shards. Without an index, all safetensors files in the folder are taken, or all
    GGUF files if there is no safetensors file.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: convert it to safetensors first")
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path} is missing: check the path, or download it again")
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path} is not a safetensors or GGUF file: give a file of one of these two kinds")
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
    files = list_weights(path)
    if not files:
        pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLES]
        if pickles:
            raise InputError(f"{path} holds only pickles ({few(pickles)}): convert them to safetensors first")
        raise InputError(f"{path} holds no safetensors or GGUF file: download it again")
    kinds = [file for file in files if file.suffix == files[0].suffix]
    return sorted(kinds), {}


def list_weights(folder: Path, deep: bool = False) -> list[Path]:
    """List the weight files in a folder, safetensors first. deep: also search the folders inside it."""
    return [file for suffix in SUFFIXES for file in sorted(folder.glob(f"**/*{suffix}" if deep else f"*{suffix}"))]


def sections(names: Iterable[str]) -> list[str]:
    """Return the sections of a file that holds several parts of a model, as the prefixes of their names.

    The main section, "", holds the transformer's names, which may have a prefix of their own (MAIN), and all others.
    """
    return list(dict.fromkeys(match[0] if (match := _SECTION.match(name)) else "" for name in names))


def in_section(state: Mapping[str, T], section: str) -> dict[str, T]:
    """Return the entries of a section, by their names without its prefix. In the main section, names may lack it.

    Raises InputError if two keys get the same name.
    """
    if section:
        return {key.removeprefix(section): value for key, value in state.items() if sections([key]) == [section]}
    main = {key: value for key, value in state.items() if not _SECTION.match(key)}
    prefix = next((p for p in MAIN if any(key.startswith(p) for key in main)), "")
    stripped = {key.removeprefix(prefix): value for key, value in main.items()}
    if len(stripped) < len(main):
        twice = [key for key in main if key.startswith(prefix) and key.removeprefix(prefix) in main]
        raise InputError(f"{few(twice)} occurs with and without the prefix {prefix}: remove one of the two")
    return stripped


def write_state(
    path: Path | str,
    state: Mapping[str, Weight],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a state dict as safetensors, one weight at a time, and return the files written.

    A file gets its final name only when it is complete. A state above `shard_bytes` is split in its own order into
    `NAME-00001-of-0000N.safetensors`, with an index `NAME.safetensors.index.json`. progress: called with the size in
    bytes of each written weight. Raises InputError if safetensors files cannot hold a weight's format.
    """
    path = Path(path)
    shards: list[dict[str, Weight]] = [{}]
    room = shard_bytes or math.inf
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes or math.inf
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_stream(path, state, state.items(), metadata, progress)
        return [path]
    files = [path.with_name(f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors") for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        write_stream(file, shard, shard.items(), metadata, progress)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": {
            part: file.name
            for file, shard in zip(files, shards)
            for name, weight in shard.items()
            for part in dialects.spell(name, weight)[0]
        },
    }
    with whole_file(path.with_name(path.name + ".index.json")) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return files


def write_stream(
    path: Path,
    plan: Mapping[str, Weight],
    weights: Iterable[tuple[str, Weight]],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write one safetensors file, with only one weight in memory at a time.

    plan: name -> weight of the file, which may be on meta. weights: the same names with their data, in any order.
    progress: called with the size in bytes of each written weight. Raises ValueError if plan and weights differ.
    """
    spelt = {name: dialects.spell(name, weight) for name, weight in plan.items()}
    layers = {layer: says for _, said in spelt.values() for layer, says in said.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    if layers:
        header["__metadata__"][dialects.METADATA] = json.dumps({"format_version": "1.0", "layers": layers})
    offset = 0
    # Larger dtypes come first, so that each tensor's offset is a multiple of its element size.
    tensors = [item for parts, _ in spelt.values() for item in parts.items()]
    for name, tensor in sorted(tensors, key=lambda item: -item[1].element_size()):
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # pad to 64 bytes, so that mapped tensors are aligned for vector units
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        missing = {name for name, _ in tensors}
        for name, weight in weights:
            for part, tensor in dialects.spell(name, weight)[0].items():
                begin, end = header[part]["data_offsets"]
                if tensor.nbytes != end - begin:
                    raise ValueError(f"{part} has {tensor.nbytes} bytes, {end - begin} were planned")
                file.seek(start + begin)
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                missing.remove(part)
            if progress is not None:
                progress(weight.nbytes)
        if missing:
            raise ValueError(f"nothing was written for {few(sorted(missing))}")


def _gather(path: Path | str, raw: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Weight]:
    try:
        return dialects.gather(raw, metadata)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_raw_header(path: Path | str, files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors as stored, on meta except the format marks, and the headers' metadata.

    The quantisation metadata of all shards is merged.
    """
    headers = [(file, _read_one_header(file)) for file in files]
    raw = _merge((file, tensors) for file, (tensors, _) in headers)
    metadata = {key: value for _, (_, said) in headers for key, value in said.items()}
    if len(headers) > 1 and dialects.METADATA in metadata:
        layers = {}
        with suppress(ValueError, KeyError, TypeError):  # `dialects.gather` reports metadata that cannot be read
            for _, (_, said) in headers:
                layers |= json.loads(said.get(dialects.METADATA, '{"layers": {}}'))["layers"]
            metadata[dialects.METADATA] = json.dumps({"format_version": "1.0", "layers": layers})
    return raw, metadata


def _merge(states: Iterable[tuple[Path, Mapping[str, T]]]) -> dict[str, T]:
    merged: dict[str, T] = {}
    origin: dict[str, Path] = {}
    for file, state in states:
        for name in state:
            if name in origin:
                raise InputError(f"{name} is in both {origin[name]} and {file.name}: keep only one of the two")
        merged.update(state)
        origin.update(dict.fromkeys(state, file))
    return merged


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text("utf-8"))["weight_map"]
        if any(Path(file).name != file for file in index.values()):
            raise ValueError("a shard is in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not an index of shards ({error}): download it again") from error
    return index


def _read_one(path: Path, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read the tensors of one file. only: the names to read; the scales and marks of each name are read too."""
    _read_one_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if only is not None:
                layers = {_layer(n) for n in only}
                names = [n for n in names if n in only or _layer(n) in layers or "scaled_fp8" in n]
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): download it again") from error


def _read_one_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the header of one file. Returns the tensors, on meta except the format marks, and the metadata."""
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: convert it to safetensors first")
    entries, metadata, start = read_raw_header(path)
    try:
        with path.open("rb") as file:
            marks = {
                name: _read_mark(file, start + entry["data_offsets"][0], *entry["shape"])
                for name, entry in entries.items()
                if name.endswith(dialects.MARKS) and entry["dtype"] == "U8" and len(entry["shape"]) == 1
            }
        foreign = {entry["dtype"] for entry in entries.values()} - DTYPES.keys()
        if foreign:
            by = ", which is packed by MLX (mflux)," if foreign == {"U32"} else ""
            raise InputError(
                f"{path}{by} holds numbers of type {few(sorted(foreign))}, which are not supported: take the bf16 file"
            )
        tensors = {name: _tensor(entry) for name, entry in entries.items()} | marks
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # torch 2.11 lists all forms of a call
        raise InputError(f"{path} is damaged or not a safetensors file ({reason}): download it again") from error
    return tensors, dict(metadata)


def _layer(name: str) -> str:
    """The layer that a tensor belongs to: of a weight, a bias, and all that lies beside a packed weight."""
    layer, is_beside, _ = name.partition(".weight.")
    return layer if is_beside else name.rpartition(".")[0]


def _read_mark(file: BinaryIO, start: int, size: int) -> Tensor:
    if size > _LONGEST_MARK:
        raise ValueError(f"a format mark has {size} bytes, the limit is {_LONGEST_MARK}")
    file.seek(start)
    return torch.tensor(list(file.read(size)), dtype=torch.uint8)


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
    begin, end = entry["data_offsets"]
    if end - begin != tensor.nbytes:
        raise ValueError(f"{end - begin} bytes for {entry['dtype']} {entry['shape']}")
    return tensor


def few(names: Sequence[str], count: int = 3) -> str:
    """Return the first `count` names as text, and the number of the others."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
