"""CUDA graphs: at small sizes a GPU waits for Python between its kernels, unless a whole forward is one launch.

What a forward is given is copied to where a recorded one reads it. Recordings are for shapes: a step of another time,
prompt or seed replays the same one. Larger pictures keep the GPU busy by themselves and are never recorded, nor is
anything in training, where something is done around a picture's blocks, or with weights that come and go.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.around import NOTHING
from inkstream.nn.forward import Sample
from inkstream.nn.qwen3 import Qwen3
from inkstream.nn.stack import Blocks

SMALL = 2 * 64 * 64
"""Latent cells, of all pictures of a forward, up to which it is recorded: those of two pictures of 512 x 512 pixels."""
PROMPT_MULTIPLE = 32
"""Prompts are filled up to a multiple of so many tokens, so that few lengths are recorded. No token sees those behind
it, so that what is filled up changes nothing of a prompt."""
KEPT = 16
"""Recordings of one module."""

Compute = Callable[[], list[Tensor]]
Record = Callable[[Compute], tuple[list[Tensor], Callable[[], None]]]
"""Gives what a computation wrote, and a function that computes it again into the same memory."""


class NotRecordable(RuntimeError):
    """A computation waits for the device, or takes something from the host."""


def replay_small(part: str, module: nn.Module) -> None:
    """From now on a model's transformer, or a text encoder of ours, replays small forwards, if it is on a GPU."""
    kinds = {"transformer": forward_transformer, "text_encoder": forward_text_encoder}
    known = part == "transformer" or isinstance(module, Qwen3)
    is_shared = getattr(module, "is_shared", False)  # with other processes, which it waits for
    device = next(module.parameters()).device
    if known and not is_shared and device.type == "cuda" and not comes_and_goes(module):
        module.forward = partial(kinds[part], Recordings(partial(record, device)), module.forward)


def comes_and_goes(module: nn.Module) -> bool:
    """Whether some of a module's weights are not always at one place on the device."""
    streamed = any(isinstance(stack, Blocks) and stack.streamed is not None for stack in module.modules())
    return streamed or len({weight.device for weight in module.parameters()}) > 1


def forward_transformer(
    recordings: Recordings, forward: Callable[[Sequence[Sample]], list[Tensor]], samples: Sequence[Sample]
) -> list[Tensor]:
    """As a family's transformer."""
    times = [sample.t for sample in samples]
    asked = [sample.prepared.at(sample.t) for sample in samples]
    small = sum(sample.x.shape[-2] * sample.x.shape[-1] for sample in samples) <= SMALL
    plain = all(sample.around is NOTHING for sample in samples)
    if torch.is_grad_enabled() or not plain or not small or any(prepared is None for prepared in asked):
        return forward(samples)
    alike = tuple(times.index(t) for t in times)  # samples of one time share what is computed of it
    # No objects of a step before, so that they are copied whatever is in them.
    fresh = {id(sample.x): sample.x.view_as(sample.x) for sample in samples}
    given = [(fresh[id(sample.x)], prepared) for sample, prepared in zip(samples, asked)]
    return recordings.run(alike, given, lambda given: forward([Sample(x, t, p) for (x, p), t in zip(given, times)]))


def forward_text_encoder(
    recordings: Recordings,
    forward: Callable[..., Tensor],
    ids: Tensor,
    lengths: Sequence[int],
    texts: Sequence[int] | None = None,
) -> Tensor:
    """As `Qwen3.forward`."""
    if torch.is_grad_enabled() or texts is not None or len(lengths) > 1:
        return forward(ids, lengths, texts)
    count = len(ids)
    filled = F.pad(ids, (0, -count % PROMPT_MULTIPLE))
    (states,) = recordings.run((), [filled], lambda given: [forward(given[0], [len(filled)])])
    return states[:count]


class Recordings:
    """A module's recorded computations, by the shapes of what they are given. The least recently used go first."""

    def __init__(self, record: Record):
        self._record = record
        self._kept: OrderedDict[Any, Recording | None] = OrderedDict()  # None: met once, or not to be recorded
        self._refused: set[Any] = set()

    def run(self, key: Any, given: Any, compute: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        """compute(given), recorded when it is given such shapes under that key for the second time."""
        key = (key, shapes_of(given))
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

    def _keep(self, key: Any, recording: Recording | None) -> None:
        self._kept[key] = recording
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)


class Recording:
    """One computation, and the memory that it reads and writes."""

    def __init__(self, given: Any, compute: Callable[[Any], list[Tensor]], record: Record):
        self._last = tensors_of(given)  # which was copied to each place
        self._places = [tensor.clone() for tensor in self._last]
        place_of = {id(tensor): place for tensor, place in zip(self._last, self._places)}
        own = rebuild(given, lambda tensor: place_of[id(tensor)])
        self._outputs, self._replay = record(lambda: compute(own))

    def run(self, given: Any) -> list[Tensor]:
        tensors = tensors_of(given)
        for place, tensor, last in zip(self._places, tensors, self._last):
            if tensor is not last:  # what no step changes is copied once
                place.copy_(tensor)
        self._last = tensors
        self._replay()
        return [output.clone() for output in self._outputs]


def record(device: torch.device, compute: Compute) -> tuple[list[Tensor], Callable[[], None]]:
    """As a CUDA graph of what is computed on that device. NotRecordable where the computation is none of the device's
    alone."""
    with torch.cuda.device(device):  # or streams are another's, and nothing is recorded
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(), torch.cuda.stream(aside):
            warnings.simplefilter("ignore")  # that the mode is a prototype
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
    """Memory that all recordings share: what one wrote is copied before another computes."""
    return torch.cuda.graph_pool_handle()


# Trees of tensors: dataclasses, lists, tuples and mappings of them ----------------------------------------------------


def rebuild(tree: Any, each: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(tree, Tensor):
        return each(tree)
    if isinstance(tree, Mapping):
        return {key: rebuild(value, each) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(rebuild(value, each) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: rebuild(getattr(tree, f.name), each) for f in fields(tree)})
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor once, in the order they are met."""
    found: dict[int, Tensor] = {}
    rebuild(tree, lambda tensor: found.setdefault(id(tensor), tensor))
    return list(found.values())


def shapes_of(tree: Any) -> Any:
    """What two trees must have in common for one to be computed as the other was: shapes, what is no tensor, and which
    tensors are the same; not the keys of mappings."""
    order = {id(tensor): i for i, tensor in enumerate(tensors_of(tree))}

    def shape(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return order[id(tree)], tuple(tree.shape), tree.dtype
        if isinstance(tree, Mapping):
            return tuple(shape(value) for value in tree.values())
        if isinstance(tree, list | tuple):
            return tuple(shape(value) for value in tree)
        if is_dataclass(tree) and not isinstance(tree, type):
            return type(tree), *(shape(getattr(tree, f.name)) for f in fields(tree))
        return tree

    return shape(tree)
