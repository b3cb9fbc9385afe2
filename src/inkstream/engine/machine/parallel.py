"""Several processes, each with an engine and a GPU of its own, draw one request. torchrun starts them.

Every process runs the same steps of the same solver. The processes divide the transformer's work or the pictures.
Process 0 is given the request, reports its events and returns the pictures.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from inkstream.engine.drawing.complete import Complete
from inkstream.engine.drawing.options import cached, guided
from inkstream.engine.machine.loader import choose_device
from inkstream.engine.machine.processes import count_processes
from inkstream.nn.forward import Sample
from inkstream.nn.parallel import Group, heads_of, share_layers, share_tokens
from inkstream.types import Done, InputError, Loading, Request, Spec

Asked = TypeVar("Asked", bound=Request)
Way = Literal["replicas", "cfg", "context", "tensor"]

WAYS: Mapping[Way, str] = {
    "replicas": "each process draws different pictures",
    "cfg": "one half computes the prompt, the other half the negative prompt",
    "context": "they divide the tokens of a picture",
    "tensor": "they divide the weights of the transformer",
}
"""What the processes divide among them -> its description for the user."""

PATIENCE = timedelta(hours=12)
"""The timeout of collective operations: another process may be downloading, or asking the user whether it may."""
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process", "communicator was aborted")
"""Words of an error that mean another process has ended."""


def join_crew(way: Way | None = None, device: str | None = None) -> Crew | None:
    """Joins the processes that torchrun started; None if this is the only process.

    way: what the processes divide; None chooses by the first request. device: "cpu", "cuda", or None for the best one.
    InputError if there are more processes than GPUs, or a way is given for one process.
    """
    if count_processes() == 1:
        if way is not None:
            raise InputError(
                f"--parallel {way} is for several processes: start them as in "
                f"torchrun --nproc-per-node 2 -m inkstream generate --parallel {way} 'a lighthouse in fog'"
            )
        return None
    own = own_device(device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=PATIENCE)
        # gloo's threads hold tensors: a thread that does so at Python's exit would abort the process
        atexit.register(dist.destroy_process_group)
    return Crew(way, own)


def own_device(name: str | None, local: int, beside: int) -> torch.device:
    """The device of process number `local` of `beside` processes on this machine."""
    device = choose_device(name)
    if device.type == "mps":
        raise InputError(f"{beside} processes cannot share {device}: start one process, or give --device cpu")
    if device.type != "cuda":
        return device
    if device.index is not None:  # pyright: ignore[reportUnnecessaryComparison]
        raise InputError(f"device {name} is one GPU for {beside} processes: give --device cuda for one GPU each")
    if beside > (gpus := torch.cuda.device_count()):
        raise InputError(f"{beside} processes were started for {gpus} GPUs: start {gpus}, or give --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class Crew:
    """The processes that draw together, seen from process number `rank`, and what they divide."""

    def __init__(self, way: Way | None, device: torch.device):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.asked: Way | None = way
        self.way: Way | None = way  # for the loaded model
        self._first_of_machine = os.environ["LOCAL_RANK"] == "0"
        self._group = Group(self.rank, self.count)  # the processes that compute one forward together

    # Before the first step -------------------------------------------------------------------------------------------

    def same(self, request: Asked) -> Asked:
        """Broadcasts process 0's request: every process returns it."""
        words = request.model_dump_json(include=request.model_fields_set).encode()
        size = torch.tensor([len(words)])
        dist.broadcast(size, 0)
        text = (
            torch.as_tensor(np.frombuffer(words, np.uint8).copy())
            if self.rank == 0
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(text, 0)
        return type(request).model_validate_json(text.numpy().tobytes())

    @contextmanager
    def in_turn(self) -> Generator[None]:
        """A context that the first process of each machine passes before the others, since it may have to download."""
        if not self._first_of_machine:
            self.wait()
        yield
        if self._first_of_machine:
            self.wait()

    def wait(self) -> None:
        """A barrier: blocks until every process has called it."""
        dist.all_reduce(torch.zeros(1))  # pyright: ignore[reportUnknownMemberType]

    def settle(self, request: Request, spec: Spec) -> Loading:
        """Chooses what the processes divide if no way was given, and reports it. InputError as in `check`."""
        self.way = self.asked or choose_way(request, spec, self.count)
        self.check(request, spec)
        if self.way == "cfg":
            half = self.count // 2
            new_group = cast("Callable[[list[int]], Any]", dist.new_group)  # pyright: ignore[reportUnknownMemberType]
            halves = [new_group([*range(start, start + half)]) for start in (0, half)]
            self._group = Group(self.rank % half, half, halves[self.rank // half])
        return Loading("processes", note=f"{self.count} processes: {WAYS[self.way]} (--parallel {self.way})")

    def check(self, request: Request, spec: Spec) -> None:
        """InputError if the chosen way cannot draw a request."""
        if self.way != "cfg":
            return
        if self.count % 2:
            raise InputError(
                f"--parallel cfg needs an even number of processes, {self.count} were started: "
                "start one more, or take --parallel context"
            )
        if self.asked and not guided(request, spec):
            raise InputError(
                f"--parallel cfg needs guidance, which is off for {spec.name}: give --guidance above 1, "
                "or take --parallel context"
            )
        if cached(request, spec):
            raise InputError(
                f"--cache {request.cache} needs both prompts in one process, --parallel cfg separates them: "
                "leave one option out, or take --parallel context"
            )

    def share(self, transformer: nn.Module) -> None:
        """Reduces a transformer to this process's share. InputError if there are more processes than heads."""
        if self.way == "replicas" or self._group.count == 1:
            return
        if (heads := heads_of(transformer)) < self._group.count:
            raise InputError(
                f"--parallel {self.way} divides {heads} heads, too few for {self._group.count} processes: start {heads}"
            )
        (share_layers if self.way == "tensor" else share_tokens)(transformer, self._group)

    def attach(self, transformer: nn.Module) -> None:
        """For the way "cfg": makes the transformer compute one prompt in each half of the processes."""
        if self.way == "cfg":
            transformer.forward = partial(self._forward, transformer.forward)

    # While a request is drawn ----------------------------------------------------------------------------------------

    def _forward(self, forward: Callable[..., list[Tensor]], samples: Sequence[Sample]) -> list[Tensor]:
        """The transformer's forward, with the samples divided between the halves. Both compute a single sample."""
        if len(samples) == 1:
            return forward(samples)
        half = self._group.count
        mine = range(len(samples))[self.rank // half :: 2]
        known = dict(zip(mine, forward([samples[i] for i in mine])))
        velocities = [
            known[i].contiguous() if i in known else torch.empty_like(sample.x) for i, sample in enumerate(samples)
        ]
        for i, velocity in enumerate(velocities):
            dist.broadcast(velocity, half * (i % 2))
        return velocities

    @property
    def own(self) -> slice:
        """The slice of a request's pictures that this process draws."""
        return slice(self.rank, None, self.count) if self.way == "replicas" else slice(None)

    def others(self, done: Done, pictures: Sequence[Complete]) -> Iterator[Done]:
        """Gathers pictures for the way "replicas": process 0 yields the others' pictures, which they send to it.

        done: the picture that this process has drawn. pictures: the complete request of every picture.
        """
        if self.way != "replicas":
            return
        if self.rank > 0:
            dist.send(torch.tensor([done.seconds]), 0)
            dist.send(torch.as_tensor(np.array(done.image)), 0)
            return
        for rank in range(1, min(self.count, done.count - done.index)):
            seconds = torch.empty(1)
            pixels = torch.empty(done.image.height, done.image.width, 3, dtype=torch.uint8)
            dist.recv(seconds, rank)
            dist.recv(pixels, rank)
            yield replace(
                done,
                image=Image.fromarray(pixels.numpy()),
                request=pictures[done.index + rank].plain(),
                index=done.index + rank,
                seconds=float(seconds),
            )

    def explain(self, error: RuntimeError, is_out_of_memory: bool) -> Exception:
        """The error to report instead of `error`. An error in one process ends all of them."""
        if is_out_of_memory:
            return MemoryError(
                f"process {self.rank} of {self.count} ran out of memory: "
                "take --placement parked or streamed, a smaller size, or --parallel tensor"
            )
        if any(words in str(error) for words in LOST):
            return InputError(f"another of the {self.count} processes has failed: see the error that it printed")
        return error


def choose_way(request: Request, spec: Spec, count: int) -> Way:
    """The way for `count` processes if none was given: replicas if there is a picture for each process, else cfg if the
    request is guided, else context."""
    if request.count >= count:
        return "replicas"
    return "cfg" if guided(request, spec) and count % 2 == 0 and not cached(request, spec) else "context"
