"""Offloading: weights live in host memory or in a mapped file and are copied to the device while their module runs.

It has two uses. A part of a model is parked between its uses. A stack of blocks is streamed, with only the running
block and the next one on the device.
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
"""The alignment of tensors in bytes, which suits vector units and copy engines."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of a module: its owner, its name there, and `home`, the tensor that stays in host memory.

    mapped: home is a view of a mapped file, so its pages can be dropped and read again.
    """

    owner: nn.Module
    name: str
    home: Tensor
    mapped: bool

    def put(self, tensor: Tensor) -> None:
        """Lets the module compute with another tensor of the same shape."""
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.owner._buffers[self.name] = tensor


class Guest:
    """A module whose large weights are copied to the device for each run.

    Weights that are already on the device in the right dtype stay there.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, without: Sequence[str] = ()):
        """dtype: the dtype of floating-point weights on the device; packed bytes keep theirs.

        without: inner modules to leave out. Vectors are left out too: they are small and stay on the device.
        """
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
        """Unfilled tensors for the copied weights, inside a flat uint8 tensor of at least `nbytes`."""
        return [
            room[start : start + weight.home.numel() * kind.itemsize].view(kind).view(weight.home.shape)
            for start, weight, kind in zip(self.starts, self.away, self.types)
        ]

    def fill(self, views: Sequence[Tensor]) -> None:
        """Copies the weights from host memory into the views."""
        for view, weight in zip(views, self.away):
            view.copy_(weight.home)

    @contextmanager
    def visit(self, views: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the module computes with these tensors. Afterwards the pages of its mapped weights may be dropped."""
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
        """Tells the system to read ahead the weights that are in mapped files."""
        for weight in (*self.away, *self.here):
            if weight.mapped:
                advise(weight.home, "MADV_WILLNEED")


class Streamed:
    """A stack of blocks, each of which is on the device only while it runs.

    A GPU uses double buffering: a thread copies the next block through pinned memory on a second CUDA stream while one
    block computes. On the CPU a copying thread would take time from computing, so the system is told to read ahead
    instead. Modules named in a block's `apart` are called outside the block, so they are copied on their own.
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
        """Bytes on the device while the blocks run."""
        return self.rooms * self.room_bytes

    def visits(self, which: slice = slice(None)) -> Iterator[nn.Module]:
        """The blocks in order, or some of them. The others stay in host memory."""
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
        copying.wait_stream(computing)  # the rooms may reuse memory that earlier kernels still read

        def bring(index: int) -> list[Tensor]:
            guest, slot = guests[index], index % self.rooms
            arrived[slot].synchronize()  # until then an earlier copy reads the pinned room
            guest.fill(guest.views(pinned[slot]))
            with torch.cuda.stream(copying):
                copying.wait_event(computed[slot])  # until then an earlier block uses the device room
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
            computing.wait_stream(copying)  # after an early exit a copy may still run, and the rooms are freed here


@contextmanager
def park(guest: Guest) -> Iterator[None]:
    """Inside, a part of a model is on the device; outside, it is in host memory."""
    views = guest.views(empty(guest.nbytes, guest.device))
    guest.fill(views)
    with guest.visit(views):
        yield


def visit_when_called(guest: Guest) -> None:
    """Keeps the module's weights on the device only during its own forward, by hooks."""
    inside = ExitStack()
    guest.module.register_forward_pre_hook(lambda *_: inside.enter_context(park(guest)) and None)
    guest.module.register_forward_hook(lambda *_: inside.close(), always_call=True)


def where_it_computes(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that a module computes in, read from a vector: matrices may differ in both."""
    return next((p.device, p.dtype) for p in module.parameters() if p.ndim == 1 and p.is_floating_point())


def read_at_home(table: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Keeps an embedding's table where it is and returns its rows on the device, by hooks."""
    home = next(tensor.device for tensor in chain(table.parameters(), table.buffers()))
    table.register_forward_pre_hook(lambda _, args: (args[0].to(home),))
    table.register_forward_hook(lambda _, args, rows: rows.to(device, dtype))


def weights_of(module: nn.Module, without: Sequence[str] = ()) -> Iterator[Weight]:
    """All tensors of a module, except those of the inner modules named in `without`."""
    ranges = mapped_ranges()
    for prefix, owner in module.named_modules():
        if not any(prefix == name or prefix.startswith(f"{name}.") for name in without):
            for name, tensor in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False)):
                home = tensor.detach()
                yield Weight(owner, name, home, is_mapped(home, ranges))


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers, not packed bytes."""
    return tensor.is_floating_point()


def empty(size: int, device: torch.device, pinned: bool = False) -> Tensor:
    """A buffer of so many bytes. It is not an inference tensor, so that it can become a parameter."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device="cpu" if pinned else device, pin_memory=pinned)


def mapped_ranges() -> list[tuple[int, int]]:
    """The address ranges of memory-mapped files in this process. Empty on systems other than Linux."""
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
    """Whether a tensor lies inside one of these address ranges."""
    start = tensor.data_ptr()
    return start > 0 and any(low <= start and start + tensor.nbytes <= high for low, high in ranges)


def advise(tensor: Tensor, advice: str) -> None:
    """Calls madvise for the whole pages inside a tensor, which must be a view of a mapped file."""
    page = mmap.PAGESIZE
    low = -(-tensor.data_ptr() // page) * page
    high = (tensor.data_ptr() + tensor.nbytes) // page * page
    if high > low and hasattr(mmap, advice):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), getattr(mmap, advice))
