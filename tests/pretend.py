"""GPUs that are not there: tensors say `cuda:0` or `cuda:1` and hold CPU data. What would go wrong on a GPU is found.

`Machine.plugged_in()` puts such GPUs in the place of `torch.cuda`. Each operation is computed at once, on the CPU.
Three rules are checked, and whatever breaks one is a `Fault`:

- All tensors of an operation are on one device. Copies may cross; a CPU tensor without axes goes with any device.
- The host does not wait between two steps of a request (`Machine.between_steps`): no `.item()`, no `nonzero`, no
  blocking copy, no `synchronize`. A copy between GPU and host blocks unless it is told not to and the host's memory is
  pinned.
- Streams and events order the use of memory. Each stream has a vector clock, and so has the host (all its threads): it
  says what is over for certain. A read must come after the write before it, and a write after all use before it. Freed
  memory goes to who asks next on the stream that it was made on, so that stream must come after all use.

A Fault is raised where it happens. `plugged_in` raises it again at the end, since others may have caught it.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inkstream.types import Event as Told
from inkstream.types import Step

WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "tolist", "__bool__", "__float__", "__int__", "__index__",
    "nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount",
}  # fmt: skip
"""What gives the host a number, or a tensor whose shape depends on numbers."""
INDEXING = {"index", "index_put_", "__getitem__", "__setitem__"}
"""Operations that wait where the index is a mask or a list."""
WHOLE = {
    Tensor.contiguous, Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.item, Tensor.tolist, Tensor.nonzero,
    Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, F.scaled_dot_product_attention,
}  # fmt: skip
"""Functions that fail in a build without CUDA before they reach `Pretend.__torch_dispatch__`."""

Clock = dict["Actor", int]


class Fault(AssertionError):
    """What would go wrong on a GPU."""


class Actor:
    """A stream, or the host. clock: how many operations of each actor are over before this one's next begins."""

    def __init__(self, machine: Machine, device: torch.device):
        self.machine = machine
        self.device = device
        self.clock: Clock = {}

    def learn(self, clock: Clock) -> None:
        self.clock = {actor: max(clock.get(actor, 0), self.clock.get(actor, 0)) for actor in {*clock, *self.clock}}

    def use(self, reads: Iterable[Memory], writes: Iterable[Memory], what: str) -> None:
        """The next operation."""
        self.learn(self.machine.host.clock)  # the host knew this when it asked for the operation
        self.clock[self] = self.clock.get(self, 0) + 1
        for memory in reads:
            self._after(memory.written, f"{what} reads what is not yet written")
            memory.read[self] = self.clock[self]
        for memory in writes:
            self._after(memory.written | memory.read, f"{what} writes over what is still in use")
            memory.written, memory.read = {self: self.clock[self]}, {}

    def _after(self, before: Clock, what: str) -> None:
        if any(self.clock.get(actor, 0) < count for actor, count in before.items()):
            self.machine.fail(what)


class Stream(Actor):
    """As torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0):
        super().__init__(machine := here(), machine.device(device))
        machine.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.learn(other.clock)

    def wait_event(self, event: Event) -> None:
        self.learn(event.clock)

    def synchronize(self) -> None:
        self.machine.wait("Stream.synchronize", self.clock)


class Event:
    """As torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or here().current_stream()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or here().current_stream()).learn(self.clock)

    def synchronize(self) -> None:
        here().wait("Event.synchronize", self.clock)


@dataclass(eq=False)
class Memory:
    """Of a tensor and of all its views. written, read: the number of each actor's last operation that did so."""

    owner: Actor  # it was made by; on the host it is pinned
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)
    is_pooled: bool = False  # it belongs to a graph

    def __del__(self) -> None:
        if isinstance(self.owner, Stream) and not self.is_pooled and self.owner.machine is _plugged_in:
            used = self.written | self.read
            if any(self.owner.clock.get(actor, 0) < count for actor, count in used.items() if actor is not self.owner):
                self.owner.machine.faults.append("memory is freed while another stream uses it")


class Pretend(Tensor):
    """A tensor that says it is on a GPU, or in pinned memory, and holds CPU data."""

    held: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, real: Tensor, memory: Memory) -> Pretend:
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        with torch.inference_mode(False):  # or a weight and its view would not be of one kind
            made = Tensor._make_wrapper_subclass(cls, real.shape, device=memory.owner.device, **layout)  # type: ignore
        made.held, made.memory = real, memory
        return made

    def __repr__(self, **options: Any) -> str:
        return f"Pretend({self.held}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return here().compute(func, args, kwargs or {})


@dataclass
class Operation:
    """One of a graph."""

    compute: Callable[[], Any]
    outputs: list[Tensor | None]  # None: it lies in an input
    reads: list[Memory]
    writes: list[Memory]
    what: str


class Graph:
    """As torch.cuda.CUDAGraph: the operations on the recorded stream, to be computed again into the same outputs."""

    def __init__(self, keep_graph: bool = False):
        self.operations: list[Operation] = []
        self.device: torch.device | None = None

    def replay(self) -> None:
        """On the device that it was recorded on."""
        stream = here().current_stream(self.device)
        for each in self.operations:
            for output, again in zip(each.outputs, tensors_in(each.compute())):
                if output is not None:
                    output.copy_(again)
            stream.use(each.reads, each.writes, f"replayed {each.what}")


class Machine:
    """Some GPUs, their streams, and what went wrong on them."""

    def __init__(
        self, count: int = 2, capability: tuple[int, int] = (9, 0), free: int = 80 * 2**30, has_flash: bool = True
    ):
        self.count = count
        self.capability = capability
        self.has_flash = has_flash  # whether torch was built with flash attention
        self.free = free  # bytes
        self.faults: list[str] = []
        self.streams: list[Stream] = []
        self.host = Actor(self, torch.device("cpu"))
        self.kernels: dict[str, Callable[..., Any]] = {"torch_attn::_varlen_attn": varlen_attn}
        """What computes operations that a CPU has not, by their names."""
        if torch.__version__ < (2, 13):
            self.kernels["aten::_scaled_mm"] = scaled_mm
        self.sync_mode: Any = "default"
        self._defaults: dict[int, Stream] = {}
        self._here = threading.local()  # of each thread: device, streams, no_waits, graph, recorded

    @contextmanager
    def plugged_in(self) -> Iterator[Machine]:
        """In the place of torch.cuda, in this thread and those that it starts. Raises the faults at the end."""
        global _plugged_in
        torch._C._ensureCUDADeviceGuardSet()
        run = threading.Thread.run

        def run_with_gpus(thread: threading.Thread) -> None:
            with Functions(self):
                run(thread)

        with pytest.MonkeyPatch.context() as patch, Functions(self):
            for name, stand_in in self._stand_ins().items():
                patch.setattr(torch.cuda, name, stand_in)
            patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: self.has_flash)
            patch.setattr(threading.Thread, "run", run_with_gpus)
            _plugged_in = self
            forget()
            try:
                yield self
            finally:
                forget()
                gc.collect()
                _plugged_in = None
        if self.faults:
            raise Fault("; ".join(self.faults))

    def _stand_ins(self) -> dict[str, Any]:
        """What is asked of torch.cuda."""

        def device_of(x: Tensor) -> Any:
            return self.on_device(x.device) if x.is_cuda else nullcontext()

        return {
            "is_available": lambda: True,
            "is_bf16_supported": lambda including_emulation=True: True,
            "device_count": lambda: self.count,
            "current_device": self.current_device,
            "set_device": self.set_device,
            "device": self.on_device,
            "device_of": device_of,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: "a pretended GPU",
            "mem_get_info": lambda device=None: (self.free, self.free),
            "empty_cache": lambda: None,
            "synchronize": self.synchronize,
            "Stream": Stream,
            "Event": Event,
            "stream": self.on_stream,
            "current_stream": self.current_stream,
            "CUDAGraph": Graph,
            "graph": self.record,
            "graph_pool_handle": object,
            "is_current_stream_capturing": lambda: self.recording() is not None,
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
        }

    # What a thread sees ---------------------------------------------------------------------------------------------

    def fail(self, what: str) -> None:
        self.faults.append(what)
        raise Fault(what)

    def between_steps(self, events: Iterable[Told]) -> Iterator[Told]:
        """The events of a request. From one step to the next its thread must not wait."""
        events = iter(events)
        event = None
        while True:
            self._here.no_waits = isinstance(event, Step) and event.step < event.steps
            try:
                event = next(events)
            except StopIteration:
                return
            finally:
                self._here.no_waits = False
            yield event

    def wait(self, what: str, *clocks: Clock) -> None:
        """The host waits until all is over that these clocks know of."""
        if self.recording() is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        if self.sync_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        if getattr(self._here, "no_waits", False):
            self.fail(f"the host waits: {what}")
        for clock in clocks:
            self.host.learn(clock)

    def synchronize(self, device: Any = None) -> None:
        self.wait("synchronize", *(stream.clock for stream in self.streams))

    def device(self, name: Any = None) -> torch.device:
        """With its number."""
        if isinstance(name, int):
            return torch.device("cuda", name)
        device = torch.device("cuda" if name is None else name)
        return torch.device("cuda", self.current_device()) if device == torch.device("cuda") else device

    def current_device(self) -> int:
        return getattr(self._here, "device", 0)

    def set_device(self, device: Any) -> None:
        self._here.device = self.device(device).index

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.device(device).index
        if index not in self._defaults:
            self._defaults[index] = Stream(torch.device("cuda", index))
        return getattr(self._here, "streams", {}).get(index, self._defaults[index])

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._here, "streams", {})
        self._here.streams = {**before, stream.device.index: stream}
        try:
            with self.on_device(stream.device):
                yield
        finally:
            self._here.streams = before

    def recording(self) -> Graph | None:
        """The graph that this thread records."""
        return getattr(self._here, "graph", None)

    @contextmanager
    def record(self, graph: Graph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        """As torch.cuda.graph: it waits for all GPUs, then records the operations on a stream of its own."""
        recorded = Stream()
        for each in self.streams:
            recorded.learn(each.clock)
        self._here.graph, self._here.recorded, graph.device = graph, recorded, recorded.device
        try:
            with self.on_stream(recorded):
                yield
        finally:
            self._here.graph = None
        self.current_stream().learn(recorded.clock)

    # Operations -----------------------------------------------------------------------------------------------------

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation on tensors of which some are pretended."""
        name = func._schema.name if hasattr(func, "_schema") else func.__name__
        short = name.removeprefix("aten::")
        if short == "copy_" and isinstance(args[1], Tensor) and args[0].device != args[1].device:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return self.cross(args[1], args[0], non_blocking)
        if short == "_to_copy" and self.device(kwargs.get("device") or args[0].device) != args[0].device:
            return self.move(args[0], **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in given if tensor.ndim or tensor.is_cuda} or {torch.device("cpu")}
        if len(devices) > 1:
            self.fail(f"{name} takes tensors of {' and '.join(sorted(map(str, devices)))}")
        actor = self.actor_on(next(iter(devices)))
        if isinstance(actor, Stream) and waits(short, args, kwargs):
            self.wait(name, actor.clock)
        kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
        return self._run(actor, self.kernels.get(name, func), args, kwargs, written_by(func, args, kwargs), name)

    def actor_on(self, device: torch.device) -> Actor:
        return self.host if device.type == "cpu" else self.current_stream(device)

    def make(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """A new tensor on a GPU; or with `cpu` in pinned memory."""
        actor = self.actor_on(device)
        if func in (torch.tensor, torch.as_tensor) and device.type == "cuda":
            self.wait(f"{func.__name__} from the host's numbers", actor.clock)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        return self._run(actor, func, args, {**kwargs, "device": "cpu"}, [], func.__name__)

    def move(
        self, x: Tensor, dtype: Any = None, device: Any = None, non_blocking: bool = False, memory_format: Any = None,
        **rest: Any,
    ) -> Tensor:  # fmt: skip
        """A new tensor on another device."""
        kind, form = dtype or x.dtype, memory_format or torch.preserve_format
        empty = torch.empty_like(held_by(x), dtype=kind, memory_format=form)
        device = self.device(device)
        is_plain = device.type == "cpu" and not non_blocking  # else it comes to pinned memory
        target = empty if is_plain else Pretend(empty, Memory(self.actor_on(device)))
        return self.cross(x, target, non_blocking)

    def cross(self, source: Tensor, target: Tensor, non_blocking: bool) -> Tensor:
        """Copy from one device to another, where one of them may be the host."""
        held_by(target).copy_(held_by(source))
        on_gpu, other = (source, target) if source.is_cuda else (target, source)
        stream = self.current_stream(on_gpu.device)
        stream.use(memories(source), memories(target), "a copy")
        if not (non_blocking and isinstance(other, Pretend)):
            self.wait(f"a blocking copy from {source.device} to {target.device}", stream.clock)
        return target

    def _run(self, actor: Actor, func: Any, args: Any, kwargs: Any, writes: Any, what: str) -> Any:
        """Compute on the CPU. What is new belongs to the actor."""
        pretended = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pretend)]
        by_real = {id(tensor.held): tensor for tensor in pretended}
        known = {storage_of(tensor.held): tensor.memory for tensor in pretended}
        args, kwargs = tree_map(held_by, (args, kwargs))

        def compute() -> Any:
            return func(*args, **kwargs)

        out = compute()
        graph = self.recording() if actor is getattr(self._here, "recorded", None) else None
        fresh = {storage_of(result): Memory(actor, is_pooled=graph is not None) for result in tensors_in(out)}
        fresh = {key: memory for key, memory in fresh.items() if key not in known}
        written = memories(writes)
        if written or fresh:  # else it is a view
            reads, writes = [m for m in known.values() if m not in written], [*written, *fresh.values()]
            actor.use(reads, writes, what)
            if graph is not None:
                outputs = [result if storage_of(result) in fresh else None for result in tensors_in(out)]
                graph.operations.append(Operation(compute, outputs, reads, writes, what))
        known |= fresh

        def wrap(result: Any) -> Any:
            if not isinstance(result, Tensor):
                return result
            own = by_real.get(id(result))
            return Pretend(result, known[storage_of(result)]) if own is None else own

        return tree_map(wrap, out)


class Functions(TorchFunctionMode):
    """Handles what does not reach `Pretend.__torch_dispatch__`: new tensors, moves, and `WHOLE`."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, machine = kwargs or {}, self.machine
        x = args[0] if args else None
        if func is Tensor.to:
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[1:], **without(kwargs, "copy"))
            device = machine.device(device or x.device)
            if device != x.device:
                return machine.move(x, dtype, device, non_blocking, memory_format)
            return func(x, dtype or x.dtype, copy=kwargs.get("copy", False), memory_format=memory_format)
        if func is Tensor.cpu and isinstance(x, Pretend) and x.is_cuda:
            return machine.move(x, device="cpu")
        if func is Tensor.data_ptr and isinstance(x, Pretend):
            return x.held.data_ptr()
        if func in WHOLE and any(isinstance(arg, Pretend) for arg in args[:2]):
            return machine.compute(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda" and not isinstance(x, Pretend):
            return machine.make(func, args, kwargs, machine.device(device))
        if kwargs.get("pin_memory"):
            return machine.make(func, args, kwargs, torch.device("cpu"))
        return func(*args, **kwargs)


_plugged_in: Machine | None = None


def here() -> Machine:
    assert _plugged_in is not None, "no machine is plugged in"
    return _plugged_in


def forget() -> None:
    """Empty the caches of the package's modules: they know of devices, and hold tensors."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("inkstream"):
            for value in [*vars(module).values()]:
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def held_by(x: Any) -> Any:
    return x.held if isinstance(x, Pretend) else x


def memories(tree: Any) -> list[Memory]:
    return [leaf.memory for leaf in tree_leaves(tree) if isinstance(leaf, Pretend)]


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the host waits for an operation on a GPU."""
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor) and kwargs.get("output_size") is None
    return name in WAITS or (name in INDEXING and is_mask(args[1]))


def is_mask(index: Any) -> bool:
    """Whether the size of what is picked depends on numbers, or a list has to be brought to the device."""
    leaves = [index] if isinstance(index, Tensor) else [*index] if isinstance(index, tuple | list) else []
    return any(isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.dtype == torch.bool) for leaf in leaves)


def written_by(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes to."""
    if not hasattr(func, "_schema"):
        return [args[0]] if func in (Tensor.copy_, Tensor.__setitem__) else []
    named = [(argument, args[i] if i < len(args) else kwargs.get(argument.name))
             for i, argument in enumerate(func._schema.arguments)]  # fmt: skip
    return [value for argument, value in named if argument.alias_info is not None and argument.alias_info.is_write]


def without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def by_sequences(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *longest: int) -> Tensor:
    """Attention within sequences that lie end to end, (L, H, E), in the arguments that kernels for such take."""
    assert longest == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))).transpose(0, 1)
        for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True)
    ]
    return torch.cat(parts)


def varlen_attn(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The answer, sums and the state of a generator, as torch's operation gives them."""
    out = by_sequences(*args[:7])
    return out, out.new_empty(out.shape[1], len(out), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    use_fast_accum: bool = False,
) -> Tensor:
    """torch's product of 8-bit floats, with a scale for each row of `a` and each column of `b`."""
    out = a.float() @ b.float() * scale_a * scale_b
    return (out if bias is None else out + bias).to(out_dtype)
