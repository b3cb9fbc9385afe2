"""Weights that live at home, in host memory or in a mapped file, and visit the device while their module runs.

Two uses of one thing: a part of a model that is parked between its uses, and a stack of blocks of which only the one
that runs, and the next, are on the device.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

ALIGNED = 256
"""Bytes: where vector units and copy engines like a tensor to start."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of a module: whose it is, under which name, and where it lives.

    mapped: it is a view of a mapped file, so that its pages can be dropped and read again.
    """

    owner: nn.Module
    name: str
    home: Tensor
    mapped: bool

    def put(self, tensor: Tensor) -> None:
        """Let the module compute with another tensor of the same shape."""
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.owner._buffers[self.name] = tensor


class Guest:
    """A module whose large weights visit the device. Those that are on it already, in the right type, are used where
    they are."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, without: Sequence[str] = ()):
        """dtype: what floating weights become on the way; packed bytes stay what they are. without: modules inside
        that are left out. So are vectors: they are on the device for good, small as they are."""
        weights = [weight for weight in weights_of(module, without) if weight.home.ndim > 1]
        types = {weight: dtype if is_number(weight.home) else weight.home.dtype for weight in weights}
        self.module = module
        self.device = device
        self.here = [w for w in weights if w.home.device.type == device.type and w.home.dtype == types[w]]
        self.away = [w for w in weights if w not in self.here]
        self.types = [types[w] for w in self.away]
        ends = [0]
        for weight, kind in zip(self.away, self.types):
            size = weight.home.numel() * kind.itemsize
            ends.append(-(-(ends[-1] + size) // ALIGNED) * ALIGNED)
        self.starts, self.nbytes = ends[:-1], ends[-1]

    def views(self, room: Tensor) -> list[Tensor]:
        """The visiting tensors inside a flat uint8 tensor of at least `nbytes`, not yet filled."""
        return [
            room[start : start + weight.home.numel() * kind.itemsize].view(kind).view(weight.home.shape)
            for start, weight, kind in zip(self.starts, self.away, self.types)
        ]

    def fill(self, views: Sequence[Tensor]) -> None:
        """Copy what lives at home."""
        for view, weight in zip(views, self.away):
            view.copy_(weight.home)

    @contextmanager
    def visit(self, views: Sequence[Tensor]) -> Iterator[None]:
        """The module computes with these tensors; afterwards its own may leave memory."""
        for view, weight in zip(views, self.away):
            weight.put(view)
        try:
            yield
        finally:
            for weight in self.away:
                weight.put(weight.home)
            for weight in (*self.away, *self.here):
                if weight.mapped:
                    advise(weight.home, "MADV_DONTNEED")

    def expect(self) -> None:
        """Let the system read ahead what is in mapped files."""
        for weight in (*self.away, *self.here):
            if weight.mapped:
                advise(weight.home, "MADV_WILLNEED")


class Streamed:
    """A stack of blocks of which each is on the device only while it is the one in hand.

    On a GPU a thread brings the next one meanwhile, through pinned memory and a second stream. On the CPU copying would
    only take time from computing, so there the system is told to read ahead. Modules that a block names in `apart` are
    called by others than the block, and so they are to visit on their own.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, dtype: torch.dtype):
        apart = [[n for n in getattr(block, "apart", ()) if getattr(block, n, None) is not None] for block in blocks]
        self.guests = [Guest(block, device, dtype, names) for block, names in zip(blocks, apart)]
        self.apart = [
            Guest(block.get_submodule(name), device, dtype) for block, names in zip(blocks, apart) for name in names
        ]
        self.device = device
        self.rooms = min(len(blocks), 2 if device.type == "cuda" else 1)
        self.room_bytes = max((guest.nbytes for guest in self.guests), default=0)

    @property
    def nbytes(self) -> int:
        """On the device while they run."""
        return self.rooms * self.room_bytes

    def visits(self, which: slice = slice(None)) -> Iterator[nn.Module]:
        """The blocks in order, or some of them; the others stay at home."""
        guests = self.guests[which]
        return self._on_gpu(guests) if guests and self.device.type == "cuda" else self._in_turn(guests)

    def _in_turn(self, guests: Sequence[Guest]) -> Iterator[nn.Module]:
        room = empty(self.room_bytes, self.device)
        for guest, following in zip_longest(guests, guests[1:]):
            if following is not None:
                following.expect()
            views = guest.views(room)
            guest.fill(views)
            with guest.visit(views):
                yield guest.module

    def _on_gpu(self, guests: Sequence[Guest]) -> Iterator[nn.Module]:
        copying, computing = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        rooms = [empty(self.room_bytes, self.device) for _ in range(self.rooms)]
        pinned = [empty(self.room_bytes, self.device, pinned=True) for _ in range(self.rooms)]
        arrived, computed = ([torch.cuda.Event() for _ in range(self.rooms)] for _ in range(2))
        copying.wait_stream(computing)  # the rooms may be memory that is still being computed with

        def bring(index: int) -> list[Tensor]:
            guest, slot = guests[index], index % self.rooms
            arrived[slot].synchronize()  # until then the pinned room is being read
            guest.fill(guest.views(pinned[slot]))
            with torch.cuda.stream(copying):
                copying.wait_event(computed[slot])  # until then the room on the device is
                rooms[slot][: guest.nbytes].copy_(pinned[slot][: guest.nbytes], non_blocking=True)
                arrived[slot].record(copying)
            return guest.views(rooms[slot])

        try:
            with ThreadPoolExecutor(1, "inkstream-stream") as thread:
                ahead: Future[list[Tensor]] = thread.submit(bring, 0)
                for index, guest in enumerate(guests):
                    views = ahead.result()
                    if index + 1 < len(guests):
                        ahead = thread.submit(bring, index + 1)
                    computing.wait_event(arrived[index % self.rooms])
                    with guest.visit(views):
                        yield guest.module
                    computed[index % self.rooms].record(computing)
        finally:
            computing.wait_stream(copying)  # where this ends early a copy is under way, and the rooms are freed


@contextmanager
def park(guest: Guest) -> Iterator[None]:
    """A part of a model is on the device inside, and at home outside."""
    views = guest.views(empty(guest.nbytes, guest.device))
    guest.fill(views)
    with guest.visit(views):
        yield


def visit_when_called(guest: Guest) -> None:
    """From now on the module's weights are on the device only during its own forward."""
    inside = ExitStack()
    guest.module.register_forward_pre_hook(lambda *_: inside.enter_context(park(guest)) and None)
    guest.module.register_forward_hook(lambda *_: inside.close(), always_call=True)


def where_it_computes(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that a module computes in; its matrices may be elsewhere and of other types, vectors are not."""
    return next((p.device, p.dtype) for p in module.parameters() if p.ndim == 1 and p.is_floating_point())


def read_at_home(table: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """From now on an embedding gives rows on the device, and its table stays where it is."""
    home = next(tensor.device for tensor in chain(table.parameters(), table.buffers()))
    table.register_forward_pre_hook(lambda _, args: (args[0].to(home),))
    table.register_forward_hook(lambda _, args, rows: rows.to(device, dtype))


def weights_of(module: nn.Module, without: Sequence[str] = ()) -> Iterator[Weight]:
    """All tensors of a module but those of these modules inside."""
    ranges = mapped_ranges()
    for prefix, owner in module.named_modules():
        if not any(prefix == name or prefix.startswith(f"{name}.") for name in without):
            for name, tensor in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False)):
                home = tensor.detach()
                yield Weight(owner, name, home, is_mapped(home, ranges))


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor is of numbers to compute with, not of packed bytes."""
    return tensor.is_floating_point()


def empty(size: int, device: torch.device, pinned: bool = False) -> Tensor:
    """Room for so many bytes. No inference tensor, so that it may become a parameter's."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device="cpu" if pinned else device, pin_memory=pinned)


def mapped_ranges() -> list[tuple[int, int]]:
    """Where files are mapped into this process's memory; nothing where the system does not say (all but Linux)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    ranges = []
    for line in maps.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            low, _, high = addresses.partition("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges


def is_mapped(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether a tensor is a view of what lies in one of these ranges."""
    start = tensor.data_ptr()
    return start > 0 and any(low <= start and start + tensor.nbytes <= high for low, high in ranges)


def advise(tensor: Tensor, advice: str) -> None:
    """Tell the system about the whole pages inside a tensor, which must be a view of a mapped file."""
    page = mmap.PAGESIZE
    low = -(-tensor.data_ptr() // page) * page
    high = (tensor.data_ptr() + tensor.nbytes) // page * page
    if high > low and hasattr(mmap, advice):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), getattr(mmap, advice))
