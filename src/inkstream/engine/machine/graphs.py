"""CUDA graphs for small forwards, where a GPU would wait for Python between its kernels.

A recording holds for input shapes: another time, prompt or seed replays the same recording. Before a replay, the inputs
are copied into the memory that the recording reads. A recording with adapters holds for these adapters, and is dropped
with them. Not recorded: large pictures, which keep the GPU busy anyway; training; samples with a step cache or
residuals; and modules whose weights are streamed.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.forward import Sample
from inkstream.nn.qwen3 import Qwen3
from inkstream.nn.stack import Blocks

SMALL = 2 * 64 * 64
"""The most latent cells of a recorded forward, over all its pictures: two pictures of 512 x 512 pixels."""
PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of so many tokens, so that few lengths are recorded. The encoder is causal, so the
padding does not change the tokens before it."""
KEPT = 16
"""The most recordings of one module."""

Compute = Callable[[], list[Tensor]]
Record = Callable[[Compute], tuple[list[Tensor], Callable[[], None]]]
"""Runs a computation once; returns its outputs, and a function that computes them again into the same memory."""


class NotRecordable(RuntimeError):
    """A computation cannot be recorded: it synchronises with the host or does something that a graph cannot hold."""


def replay_small(part: str, module: nn.Module) -> None:
    """Makes a module replay small forwards. Does nothing unless it is a transformer or Qwen3 text encoder on a GPU."""
    kinds = {"transformer": forward_transformer, "text_encoder": forward_text_encoder}
    known = part == "transformer" or isinstance(module, Qwen3)
    is_shared = getattr(module, "is_shared", False)  # a forward waits for other processes
    device = next(module.parameters()).device
    if known and not is_shared and device.type == "cuda" and not comes_and_goes(module):
        replayed: Any = partial(kinds[part], Recordings(partial(record, device)), module.forward)
        module.forward = replayed


def comes_and_goes(module: nn.Module) -> bool:
    """Whether some of a module's weights change their place in memory, or lie on another device."""
    streamed = any(isinstance(stack, Blocks) and stack.streamed is not None for stack in module.modules())
    return streamed or len({weight.device for weight in module.parameters()}) > 1


def forward_transformer(
    recordings: Recordings, forward: Callable[[Sequence[Sample]], list[Tensor]], samples: Sequence[Sample]
) -> list[Tensor]:
    """Runs `forward`, a transformer's, through a recording if the samples are small."""
    times = [sample.t for sample in samples]
    asked = [sample.prepared.at(sample.t) for sample in samples]
    small = sum(sample.x.shape[-2] * sample.x.shape[-1] for sample in samples) <= SMALL
    arounds = [sample.around for sample in samples]
    fixed = all(around.cache is None and not around.residuals for around in arounds)
    if torch.is_grad_enabled() or not fixed or not small or any(prepared is None for prepared in asked):
        return forward(samples)
    # Samples of the same time share its modulation, and those of the same `around` share more.
    alike = tuple((times.index(t), arounds.index(around)) for t, around in zip(times, arounds))
    counts = tuple(len(around.adapters) for around in arounds)
    # New tensor objects: a recording copies only tensors that are not the objects of the step before.
    fresh = {id(sample.x): sample.x.view_as(sample.x) for sample in samples}
    given = [(fresh[id(sample.x)], prepared) for sample, prepared in zip(samples, asked)]
    return recordings.run(
        (alike, counts),
        given,
        lambda given: forward([Sample(x, t, p, around) for (x, p), t, around in zip(given, times, arounds)]),
        [adapter for around in arounds for adapter in around.adapters],
    )


def forward_text_encoder(
    recordings: Recordings,
    forward: Callable[..., Tensor],
    ids: Tensor,
    lengths: Sequence[int],
    texts: Sequence[int] | None = None,
) -> Tensor:
    """Runs `forward`, that of Qwen3, through a recording if there is one prompt."""
    if torch.is_grad_enabled() or texts is not None or len(lengths) > 1:
        return forward(ids, lengths, texts)
    count = len(ids)
    filled = F.pad(ids, (0, -count % PROMPT_MULTIPLE))
    (states,) = recordings.run((), [filled], lambda given: [forward(given[0], [len(filled)])])
    return states[:count]


class Recordings:
    """A module's recordings by key and input shapes. An LRU cache of KEPT entries."""

    def __init__(self, record: Record):
        self._record = record
        self._kept: OrderedDict[Any, Recording | None] = OrderedDict()  # None: run once, or not recordable
        self._refused: set[Any] = set()
        self._owners: set[int] = set()

    def run(
        self, key: Any, given: Any, compute: Callable[[Any], list[Tensor]], owners: Sequence[object] = ()
    ) -> list[Tensor]:
        """compute(given). The second call with the same key, owners and shapes is recorded; later ones replay it.

        owners: of memory that `compute` reads beside what is given. A recording does not keep them alive: it is dropped
        with the first of them.
        """
        key = (key, tuple(map(id, owners)), shapes_of(given))
        for owner in owners:
            if id(owner) not in self._owners:
                self._owners.add(id(owner))
                weakref.finalize(owner, self._drop, id(owner)).atexit = False
        recording = self._kept.get(key)
        if recording is None:
            if key not in self._kept or key in self._refused:
                self._keep(key, None)
                return compute(given)
            try:
                recording = Recording(given, compute, self._record)
            except NotRecordable:
                self._refused.add(key)
                return compute(given)
        self._keep(key, recording)
        return recording.run(given)

    def _drop(self, owner: int) -> None:
        self._owners.discard(owner)
        for key in [key for key in self._kept if owner in key[1]]:
            del self._kept[key]
        self._refused = {key for key in self._refused if owner not in key[1]}

    def _keep(self, key: Any, recording: Recording | None) -> None:
        self._kept[key] = recording
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)


class Recording:
    """A recorded computation, and the memory that it reads and writes."""

    def __init__(self, given: Any, compute: Callable[[Any], list[Tensor]], record: Record):
        self._last = tensors_of(given)  # the tensor that was last copied to each place
        self._places = [tensor.clone() for tensor in self._last]
        place_of = {id(tensor): place for tensor, place in zip(self._last, self._places)}
        own = rebuild(given, lambda tensor: place_of[id(tensor)])
        self._outputs, self._replay = record(lambda: compute(own))

    def run(self, given: Any) -> list[Tensor]:
        """Copies the inputs into place, replays, and returns copies of the outputs."""
        tensors = tensors_of(given)
        for place, tensor, last in zip(self._places, tensors, self._last):
            if tensor is not last:  # an input that no step changes is copied once
                place.copy_(tensor)
        self._last = tensors
        self._replay()
        return [output.clone() for output in self._outputs]


def record(device: torch.device, compute: Compute) -> tuple[list[Tensor], Callable[[], None]]:
    """Records a computation on that device as a CUDA graph; see `Record`.

    NotRecordable if the computation synchronises with the host or cannot be captured.
    """
    with torch.cuda.device(device):  # otherwise the streams are another device's and the graph stays empty
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(), torch.cuda.stream(aside):
            warnings.simplefilter("ignore")  # torch warns that the debug mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                compute()
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                raise NotRecordable(str(error)) from error
            finally:
                torch.cuda.set_sync_debug_mode(before)
                here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool(), capture_error_mode="thread_local"):
                outputs = compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotRecordable(str(error)) from error
        return outputs, graph.replay


@cache
def pool() -> Any:
    """The memory pool of all recordings. Sharing is safe: outputs are copied before another recording is replayed."""
    return torch.cuda.graph_pool_handle()


# Trees of tensors: dataclasses, lists, tuples and mappings of them ----------------------------------------------------


def rebuild(tree: Any, each: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor replaced by each(tensor)."""
    if isinstance(tree, Tensor):
        return each(tree)
    if isinstance(tree, Mapping):
        return {key: rebuild(value, each) for key, value in cast("Mapping[Any, Any]", tree).items()}
    if isinstance(tree, list | tuple):
        kind: Any = type(cast("Sequence[Any]", tree))
        return kind(rebuild(value, each) for value in cast("Sequence[Any]", tree))
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: rebuild(getattr(tree, f.name), each) for f in fields(tree)})
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor of a tree once, in the order of the tree."""
    found: dict[int, Tensor] = {}
    rebuild(tree, lambda tensor: found.setdefault(id(tensor), tensor))
    return list(found.values())


def shapes_of(tree: Any) -> Any:
    """The key of a tree's recording: equal for trees with the same structure, shapes, dtypes and non-tensor values.

    Two places that hold the same tensor must do so in both trees. Keys of mappings do not count.
    """
    order = {id(tensor): i for i, tensor in enumerate(tensors_of(tree))}

    def shape(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return order[id(tree)], tuple(tree.shape), tree.dtype
        if isinstance(tree, Mapping):
            return tuple(shape(value) for value in cast("Mapping[Any, Any]", tree).values())
        if isinstance(tree, list | tuple):
            return tuple(shape(value) for value in cast("Sequence[Any]", tree))
        if is_dataclass(tree) and not isinstance(tree, type):
            return type(tree), *(shape(getattr(tree, f.name)) for f in fields(tree))
        return tree

    return shape(tree)
