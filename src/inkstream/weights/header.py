"""Reads the header of a safetensors file. Torch is not imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from inkstream.types import InputError


class RawHeader(NamedTuple):
    """The header of a file. entries: tensor -> its dtype, shape and data_offsets. start: byte of the data."""

    entries: Mapping[str, Any]
    metadata: Mapping[str, str]
    start: int


def read_raw_header(path: Path) -> RawHeader:
    """Read the header of one file: 8 bytes with the JSON's length, the JSON, then the data up to the end of the file.

    Raises InputError, which names the file, if the file cannot be read, is cut short or is not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if first == b"version ":
                raise InputError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
            if first.startswith((b"PK\x03\x04", b"\x80\x02")):  # of torch.save, in its new and its old form
                raise InputError(f"{path} is a pickle, which can run code when opened: convert it to safetensors first")
            length = int.from_bytes(first, "little")
            if len(first) < 8 or 8 + length > size:
                raise InputError(f"{path} is cut short or not a safetensors file: download it again")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(side, int) for entry in entries.values() for side in entry["shape"]
        ):
            raise ValueError("its header is not as the format says")
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}): download it again") from error
    if size < whole:
        raise InputError(f"{path} is cut short, it has {size:,} of {whole:,} bytes: download it again")
    return RawHeader(entries, metadata, 8 + length)
