"""Several processes, each with an engine and a GPU of its own, draw one request. torchrun starts them.

All of them take the same steps of the same solver; only what is asked of the transformer is shared out, or which
pictures are drawn. The first one is given the request, tells of it and has the pictures.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from inkstream.engine.drawing.model import Complete
from inkstream.engine.drawing.options import cached, guided
from inkstream.engine.machine.loader import choose_device
from inkstream.engine.machine.processes import count_processes
from inkstream.nn.forward import Sample
from inkstream.nn.parallel import Group, heads_of, share_layers, share_tokens
from inkstream.types import Done, InputError, Loading, Request, Spec

Asked = TypeVar("Asked", bound=Request)
Way = Literal["replicas", "cfg", "context", "tensor"]

WAYS: Mapping[Way, str] = {
    "replicas": "each draws pictures of its own",
    "cfg": "half of them answer for the prompt, half for the negative one",
    "context": "they share the tokens of a picture",
    "tensor": "they share the weights of the transformer",
}
"""What the processes share, and how it is told."""

PATIENCE = timedelta(hours=12)
"""How long they wait for one that downloads, or asks whether it may."""
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process", "communicator was aborted")
"""What errors say where another process has ended."""


def join_crew(way: Way | None = None, device: str | None = None) -> Crew | None:
    """The processes that torchrun started, this one among them; None where there is only this.

    way: what they share; None chooses by the first request. device: "cpu", "cuda" or None for the best there is.
    InputError where there are several for one GPU, or a way for one process.
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
        # gloo's threads hold tensors: one that still does so while Python ends would abort the process
        atexit.register(dist.destroy_process_group)
    return Crew(way, own)


def own_device(name: str | None, local: int, beside: int) -> torch.device:
    """The device of process `local` of those `beside` each other on this machine."""
    device = choose_device(name)
    if device.type == "mps":
        raise InputError(f"{beside} processes cannot share {device}: start one without torchrun, or give --device cpu")
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise InputError(f"device {name} is one for {beside} processes: give cuda, of which each takes its own")
    if beside > (there := torch.cuda.device_count()):
        raise InputError(f"{beside} processes were started for {there} GPUs: start {there}, or give --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class Crew:
    """The processes that draw together, of which this is number `rank`, and what they share."""

    def __init__(self, way: Way | None, device: torch.device):
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.asked: Way | None = way
        self.way: Way | None = way  # of the model that is loaded
        self._first_of_machine = os.environ["LOCAL_RANK"] == "0"
        self._group = Group(self.rank, self.count)  # that computes one forward

    # Before the first step -------------------------------------------------------------------------------------------

    def same(self, request: Asked) -> Asked:
        """The first process's request, for all."""
        words = request.model_dump_json(include=request.model_fields_set).encode()
        size = torch.tensor([len(words)])
        dist.broadcast(size, 0)
        text = (
            torch.from_numpy(np.frombuffer(words, np.uint8).copy())
            if self.rank == 0
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(text, 0)
        return type(request).model_validate_json(text.numpy().tobytes())

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process of each machine goes in alone: it may have to download what all of them need."""
        if not self._first_of_machine:
            self.wait()
        yield
        if self._first_of_machine:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        dist.all_reduce(torch.zeros(1))

    def settle(self, request: Request, spec: Spec) -> Loading:
        """Choose what is shared, if nobody did, and say it. InputError where it cannot be."""
        self.way = self.asked or choose_way(request, spec, self.count)
        self.check(request, spec)
        if self.way == "cfg":
            half = self.count // 2
            halves = [dist.new_group([*range(start, start + half)]) for start in (0, half)]
            self._group = Group(self.rank % half, half, halves[self.rank // half])  # type: ignore[arg-type]
        return Loading("processes", note=f"{self.count} processes: {WAYS[self.way]} (--parallel {self.way})")

    def check(self, request: Request, spec: Spec) -> None:
        """InputError where a request cannot be drawn so."""
        if self.way != "cfg":
            return
        if self.count % 2:
            raise InputError(
                f"--parallel cfg shares two prompts, and {self.count} processes were started: "
                "start an even number, or take --parallel context"
            )
        if self.asked and not guided(request, spec):
            raise InputError(
                f"--parallel cfg needs guidance, which is off for {spec.name}: give --guidance above 1, "
                "or take --parallel context"
            )
        if cached(request, spec):
            raise InputError(
                f"--cache {request.cache} looks at both prompts, which --parallel cfg takes apart: leave one of them "
                "out, or take --parallel context"
            )

    def share(self, transformer: nn.Module) -> None:
        """Leave this process its share of a transformer. InputError where there are more processes than shares."""
        if self.way == "replicas" or self._group.count == 1:
            return
        if (heads := heads_of(transformer)) < self._group.count:
            raise InputError(
                f"--parallel {self.way} shares {heads} heads, too few for {self._group.count} processes: start {heads}"
            )
        (share_layers if self.way == "tensor" else share_tokens)(transformer, self._group)

    def attach(self, transformer: nn.Module) -> None:
        """Let the halves of the crew answer prompts, each its own."""
        if self.way == "cfg":
            transformer.forward = partial(self._answer, transformer.forward)

    # While it is drawn -----------------------------------------------------------------------------------------------

    def _answer(self, answer: Callable[..., list[Tensor]], samples: Sequence[Sample]) -> list[Tensor]:
        """As the transformer's own. What is asked of one prompt alone is answered by both halves."""
        if len(samples) == 1:
            return answer(samples)
        half = self._group.count
        mine = range(len(samples))[self.rank // half :: 2]
        known = dict(zip(mine, answer([samples[i] for i in mine])))
        velocities = [
            known[i].contiguous() if i in known else torch.empty_like(sample.x) for i, sample in enumerate(samples)
        ]
        for i, velocity in enumerate(velocities):
            dist.broadcast(velocity, half * (i % 2))
        return velocities

    @property
    def own(self) -> slice:
        """Which of a request's pictures this process draws."""
        return slice(self.rank, None, self.count) if self.way == "replicas" else slice(None)

    def others(self, done: Done, pictures: Sequence[Complete]) -> Iterator[Done]:
        """The pictures that the other processes have drawn beside one of the first process's; of others, nothing.

        pictures: what draws each picture of the request.
        """
        if self.way != "replicas":
            return
        if self.rank > 0:
            dist.send(torch.tensor([done.seconds]), 0)
            dist.send(torch.from_numpy(np.array(done.image)), 0)
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
        """What to say of an error, which ends this process and with it all."""
        if is_out_of_memory:
            return MemoryError(
                f"process {self.rank} of {self.count} ran out of memory: "
                "take --placement parked or streamed, a smaller size, or --parallel tensor"
            )
        if any(words in str(error) for words in LOST):
            return InputError(f"one of the {self.count} processes has ended, and so all do: its own line says why")
        return error


def choose_way(request: Request, spec: Spec, count: int) -> Way:
    """What so many processes share where nobody chose: pictures, if there is one for each; else the two prompts of
    guidance; else the picture."""
    if request.count >= count:
        return "replicas"
    return "cfg" if guided(request, spec) and count % 2 == 0 and not cached(request, spec) else "context"
