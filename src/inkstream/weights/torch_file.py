"""Reads the tensors of a file that torch.save wrote (.pth, .pt). Its pickle is read as data: nothing is unpickled.

`pickletools.genops` lists the pickle's operations. The few that build dicts, lists and numbers are followed here; of
the calls, only those that stand for a tensor or a dict. No name in the file is looked up, and no code that it names is
run.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from inkstream.types import InputError, as_object

SUFFIXES = (".pth", ".pt")
"""Suffixes of these files."""
LONGEST = 64 * 2**20
"""Largest pickle in bytes. The one of a model with a thousand tensors has 200 kB."""
WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net", "generator")
"""Names under which training programs keep the weights, the preferred first."""
OLD = 0x1950A86A20F9469CFC6C
"""The number that the files of torch before 1.6 begin with."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Name(NamedTuple):
    """A name of Python code that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


class Storage(NamedTuple):
    """The numbers of one or more tensors, which are elsewhere in the file."""

    dtype: torch.dtype
    key: str
    length: int


class View(NamedTuple):
    """A tensor: a part of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Unreadable(ValueError):
    """The file is damaged, or holds what is neither a number nor a tensor."""


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file. Raises InputError if it is damaged or holds anything but numbers and tensors."""
    try:
        with path.open("rb") as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_old(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None
    except Unreadable as error:
        raise InputError(f"{path} {error}: take a .safetensors file") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        reason = "an entry is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0][:100]
        raise InputError(f"{path} is damaged or was not written by torch ({reason}): download it again") from None


def _read_zip(file: BinaryIO) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if members["data.pkl"].file_size > LONGEST:
            raise Unreadable("has too long a list of its tensors")
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise Unreadable("is compressed, which torch does not do")  # so no file is larger than it looks
        if "byteorder" in members and archive.read(members["byteorder"]).strip() != b"little":
            raise Unreadable("has its bytes in another order")
        content = Pickle(archive.read(members["data.pkl"])).read()

        def numbers(storage: Storage) -> Tensor:
            info = members[f"data/{storage.key}"]
            if info.file_size != storage.length * storage.dtype.itemsize:
                raise Unreadable(f"is cut short: it has {info.file_size} bytes for {storage.length} numbers")
            return _numbers(storage, archive.read(info))

        return _tensors(content, numbers)


def _read_old(file: BinaryIO) -> dict[str, Tensor]:
    """Read a file of torch before 1.6: five pickles, then for each storage its length and its numbers."""
    file.seek(0)
    stream = io.BytesIO(file.read())
    if stream.getvalue()[:8] == b"version ":
        raise Unreadable("is a git-lfs pointer, not the weights")
    number, _, _, content, keys = (Pickle(stream).read() for _ in range(5))
    if number != OLD:
        raise ValueError("its first number is wrong")
    places: dict[str, int] = {}
    storages = {view.storage.key: view.storage for view in _views(content).values()}
    for key in map(str, keys):
        count = int.from_bytes(stream.read(8), "little")
        places[key] = stream.tell()
        if key not in storages or storages[key].length != count:
            raise ValueError(f"storage {key[:40]} is not as its list says")
        stream.seek(count * storages[key].dtype.itemsize, io.SEEK_CUR)

    def numbers(storage: Storage) -> Tensor:
        stream.seek(places[storage.key])
        return _numbers(storage, stream.read(storage.length * storage.dtype.itemsize))

    return _tensors(content, numbers)


def _numbers(storage: Storage, data: bytes) -> Tensor:
    if len(data) != storage.length * storage.dtype.itemsize:
        raise Unreadable("is cut short")
    return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _tensors(content: Any, numbers: Callable[[Storage], Tensor]) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, view in _views(content).items():
        reach = view.offset + sum((side - 1) * step for side, step in zip(view.shape, view.stride))
        inside = min(view.offset, *view.shape, *view.stride, 0) >= 0 and reach < view.storage.length
        if len(view.shape) != len(view.stride) or not (inside or 0 in view.shape):
            raise ValueError(f"{name[:100]} reaches beyond its numbers")
        if view.storage.key not in held:
            held[view.storage.key] = numbers(view.storage)
        tensors[name] = held[view.storage.key].as_strided(view.shape, view.stride, view.offset)
    return tensors


def _views(content: Any) -> dict[str, View]:
    """The tensors of the dict that holds the weights. It may be inside another."""
    for _ in range(3):
        entries = as_object(content)
        if entries is None:
            break
        if views := {str(key): value for key, value in entries.items() if isinstance(value, View)}:
            return views
        content = next((entries[name] for name in WRAPPERS if as_object(entries.get(name))), None)
    raise Unreadable("holds no dict of tensors")


@dataclass
class Pickle:
    """The content of one pickle, as dicts, lists, numbers, texts and Views."""

    source: bytes | BinaryIO
    stack: list[Any] = field(default_factory=list[Any])
    marks: list[int] = field(default_factory=list[int])
    memo: dict[int, Any] = field(default_factory=dict[int, Any])

    def read(self) -> Any:
        for operation, argument, _ in pickletools.genops(cast("Any", self.source)):
            if operation.name == "STOP":
                return self.stack.pop()
            self.follow(operation.name, argument)
        raise ValueError("a pickle has no end")

    def follow(self, name: str, argument: Any) -> None:
        """Follow one operation. The names are those of pickletools."""
        if name in ("PROTO", "FRAME"):
            return
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in WRITTEN:
            self.stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self.since_mark()
            pairs = zip(items[::2], items[1::2])
            self.stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else entries_of(pairs))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items, self.stack[-count:] = self.stack[-count:], []
            self.stack.append(tuple(items))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()]
            self.stack[-1].update(entries_of(zip(items[::2], items[1::2])))
        elif name in ("APPEND", "APPENDS"):
            items = self.since_mark() if name == "APPENDS" else [self.stack.pop()]
            self.stack[-1].extend(items)
        elif name == "GLOBAL":
            self.stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self.stack.append(Name(text_of(self.stack.pop(-2)), text_of(self.stack.pop())))
        elif name == "BINPERSID":
            self.stack.append(storage_of(self.stack.pop()))
        elif name == "REDUCE":
            given, called = self.stack.pop(), self.stack.pop()
            self.stack.append(meant_by(called, given))
        elif name == "BUILD" and isinstance(self.stack[-2], dict):
            self.stack.pop()  # versions of the modules, which torch hangs on a state dict
        else:
            raise Unreadable(f"holds more than tensors ({name.lower()}), and nothing in it was run")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items


CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
WRITTEN = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
)  # fmt: skip
"""Operations whose argument is a value."""


def entries_of(pairs: Iterable[tuple[Any, Any]]) -> dict[str | int, Any]:
    """The entries of a dict. A key is a text or a number: a tuple of tuples could take for ever to compare."""
    entries = dict[str | int, Any]()
    for key, value in pairs:
        entries[key if isinstance(key, int) else text_of(key)] = value
    return entries


def text_of(value: Any) -> str:
    """A value that must be a text. Raises Unreadable."""
    if not isinstance(value, str):
        raise Unreadable("has a name that is no text")
    return value


def storage_of(given: Any) -> Storage:
    """The storage that a persistent id means: ("storage", its type, its key, its place, its number of elements)."""
    kind, type_, key, _, count = given[:5]
    if kind != "storage" or not isinstance(type_, Name) or type_.name not in STORAGES:
        raise Unreadable(f"holds numbers of an unknown type ({type_ if isinstance(type_, Name) else 'no name'})")
    return Storage(STORAGES[type_.name], text_of(key), int(count))


def meant_by(called: Any, given: Any) -> Any:
    """What a call stands for. Raises Unreadable for a call of anything but torch's makers of tensors, and dicts."""
    if called == ("collections", "OrderedDict"):
        return entries_of(given[0]) if given else {}
    if called == ("torch._utils", "_rebuild_tensor_v2") and isinstance(given[0], Storage):
        storage, offset, shape, stride = given[:4]
        return View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
    if called == ("torch._utils", "_rebuild_parameter") and isinstance(given[0], View):
        return given[0]
    raise Unreadable(f"calls {called if isinstance(called, Name) else 'code'}, and nothing in it was run")
