"""Where the parts of a model are while others work: plans from the fastest to the most frugal, and what each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from inkstream.engine.drawing.flow import way_of
from inkstream.engine.drawing.model import Complete, Model
from inkstream.engine.files.sources import Source, Unset
from inkstream.engine.machine.peak import peak_of
from inkstream.nn.offload import Guest, Streamed, Weight, advise, is_number, read_at_home, visit_when_called, weights_of
from inkstream.nn.quant import PackedEmbedding
from inkstream.nn.quant import place as put_packed
from inkstream.nn.stack import Blocks
from inkstream.weights.keymap import Rule, becomes

Place = Literal["resident", "visiting"]
"""On the device for good; or layer by layer, each while it is the one in hand."""

PLACEMENTS: Mapping[str, tuple[Place, Place]] = {
    "resident": ("resident", "resident"),
    "parked": ("resident", "visiting"),
    "streamed": ("visiting", "visiting"),
}
"""Name -> the place of the transformer, and that of the others, which are passed through once for each picture."""

TABLES = (nn.Embedding, PackedEmbedding)
"""Of which few rows are read: where their part is not resident, they are read where they are."""


BESIDE = 64 * 2**20
"""Bytes that on a CPU allocators keep of what was freed, and libraries take beside tensors; measured."""


class Sharing(Protocol):
    """Several processes that compute a transformer together."""

    def share(self, transformer: nn.Module) -> None:
        """Leave this process its share."""
        ...

    def attach(self, transformer: nn.Module) -> None:
        """Let the processes answer samples, each its own."""
        ...


@dataclass(frozen=True)
class Plan:
    """A placement of a model, and the peak of bytes that it needs on the device in each phase of a request."""

    placement: str
    phases: Mapping[str, int]  # prompt, steps, picture

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def place_of(placement: str, part: str) -> Place:
    """Where a part is under a placement."""
    return PLACEMENTS[placement][part != "transformer"]


class Placed:
    """A part of a model as a plan wants it placed: what stays on the device, who visits, and the bytes of both.

    module: its weights at home, or on meta. Nothing is moved before `settle`. copied: the names of weights that are no
    views of a file, so that on a CPU they take memory wherever they are.
    """

    def __init__(
        self, module: nn.Module, place: Place, device: torch.device, dtype: torch.dtype, copied: Sequence[str] = ()
    ):
        self.device, self.dtype = device, dtype
        tables = {name: m for name, m in module.named_modules() if place != "resident" and isinstance(m, TABLES)}
        self.tables = list(tables.values())
        self.streams: dict[Blocks, Streamed] = {}
        self.guests: list[Guest] = []
        for name, unit in units(module, place):
            if isinstance(unit, Blocks):
                self.streams[unit] = Streamed(unit, device, dtype)
            else:
                above = f"{name}." if name else ""
                inside = [table.removeprefix(above) for table in tables if table.startswith(above)]
                self.guests.append(Guest(unit, device, dtype, inside))
        visitors = [guest for s in self.streams.values() for guest in (*s.guests, *s.apart)] + self.guests
        visiting = {(w.owner, w.name) for guest in visitors for w in (*guest.away, *guest.here)}
        self.staying = [w for w in weights_of(module, list(tables)) if (w.owner, w.name) not in visiting]
        state, homes = module.state_dict(), {id(w.owner._parameters.get(w.name)) for w in self.staying}
        self.copied = sum(state[name].nbytes for name in copied if id(state[name]) not in homes)

    @property
    def always(self) -> int:
        """Bytes on the device for good."""
        at_home = self.copied if self.device.type == "cpu" else 0
        return at_home + sum(weight.home.numel() * self._type(weight).itemsize for weight in self.staying)

    @property
    def working(self) -> int:
        """Bytes on it beyond that while the part works; on the CPU with those at home that are looked at."""
        pages = pages_seen if self.device.type == "cpu" else lambda guest: 0
        rooms = [guest.nbytes + pages(guest) for guest in self.guests]
        for stream in self.streams.values():  # one after the other
            rooms.append(stream.nbytes + max(map(pages, stream.guests), default=0))
            rooms += [guest.nbytes + pages(guest) for guest in stream.apart]
        return max(rooms, default=0)

    def settle(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Bring what stays to the device, and let the others visit from now on. progress: told the bytes of the former,
        done and in all."""
        for blocks, streamed in self.streams.items():
            blocks.stream(streamed)
        for guest in self.guests:
            visit_when_called(guest)
        for table in self.tables:
            read_at_home(table, self.device, self.dtype)
        staying, self.staying = self.staying[::-1], []
        done, total = 0, sum(weight.home.nbytes for weight in staying)
        progress(0, total)
        while staying:
            weight = staying.pop()  # the last to hold what is moved, but for the module
            size = weight.home.nbytes
            self._move(weight)
            if (done + size) * 100 // max(total, 1) > done * 100 // max(total, 1):
                progress(done + size, total)
            done += size

    def _move(self, weight: Weight) -> None:
        """Pages of a file that were copied from are let go."""
        moved = weight.home.to("meta" if weight.home.is_meta else self.device, self._type(weight))
        if moved is not weight.home:
            weight.put(moved)
            if weight.mapped:
                advise(weight.home, "MADV_DONTNEED")

    def _type(self, weight: Weight) -> torch.dtype:
        return self.dtype if is_number(weight.home) else weight.home.dtype


def units(module: nn.Module, place: Place) -> Iterator[tuple[str, nn.Module]]:
    """The modules that come to the device on their own: each layer of a part's stacks, what is called of it, or it."""
    if place == "resident":
        return
    if called := getattr(module, "called", ()):
        yield from ((child, module.get_submodule(child)) for child in called)
    elif any(isinstance(inner, nn.ModuleList) and len(inner) for inner in module.modules()):
        yield from _layers(module, "")
    else:
        yield "", module


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Our own stacks whole; of another library's, layer by layer."""
    for child, inner in module.named_children():
        path = f"{name}.{child}" if name else child
        if isinstance(inner, Blocks):
            yield path, inner
        elif isinstance(inner, nn.ModuleList):
            yield from ((f"{path}.{i}", layer) for i, layer in enumerate(inner))
        else:
            yield from _layers(inner, path)


def pages_seen(guest: Guest) -> int:
    """Bytes at home that are in memory, too, while the guest is there."""
    return sum(weight.home.nbytes for weight in (*guest.away, *guest.here))


# Before anything is read ---------------------------------------------------------------------------------------------


def plan_request(
    source: Source, tokenizers: Mapping[str, Any], request: Complete, device: torch.device,
    dtypes: Mapping[str, torch.dtype], crew: Sharing | None = None,
) -> list[Plan]:  # fmt: skip
    """All plans for a request, from the fastest to the most frugal. dtypes: what each part computes in; crew:
    leaves the transformer what is computed in this process.

    Weights count as they are in the files or become on the device; what is computed with them is counted by doing it
    without data. What a driver or the process takes for itself is not in it.
    """
    modules = {part: at_home(source, part, dtypes[part]) for part in source.parts}
    if crew:
        crew.share(modules["transformer"])
    weights = weigh(source, modules, device, dtypes)
    work = working(on_meta(source, modules, tokenizers, dtypes), request)
    return [add_up(name, phases, work, device) for name, phases in weights.items()]


def add_up(name: str, weights: Mapping[str, int], work: Mapping[str, int], device: torch.device) -> Plan:
    """A plan of its weights and of what is computed with them, in bytes by phase."""
    beside = BESIDE if device.type == "cpu" else 0
    return Plan(name, {phase: beside + count + work.get(phase, 0) for phase, count in weights.items()})


def weigh(
    source: Source, modules: Mapping[str, nn.Module], device: torch.device, dtypes: Mapping[str, torch.dtype]
) -> dict[str, dict[str, int]]:
    """Plan -> phase -> bytes of weights on the device. modules: as `at_home` gives them."""
    weights: dict[str, dict[str, int]] = {}
    for name in PLACEMENTS:
        placed = {
            part: Placed(module, place_of(name, part), device, dtypes[part], copied(source.parts[part].rules, module))
            for part, module in modules.items()
        }
        always = sum(part.always for part in placed.values())
        weights[name] = {
            phase: always + max((placed[part].working for part in parts), default=0)
            for phase, parts in phases_of(source).items()
        }
    return weights


def on_meta(
    source: Source, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> Model:
    """The model without data. modules: as `at_home` gives them; afterwards they are resident."""
    meta = torch.device("meta")
    for part, module in modules.items():
        Placed(module, "resident", meta, dtypes[part]).settle()
    return Model(source.family(source.spec, modules, tokenizers), meta, dtypes["transformer"])


def phases_of(source: Source) -> dict[str, list[str]]:
    """Phase of a request -> the parts that work in it."""
    phases: dict[str, list[str]] = {}
    for part in source.parts:
        for phase in source.family.parts[part].phases:
            phases.setdefault(phase, []).append(part)
    return phases


def at_home(source: Source, part: str, dtype: torch.dtype) -> nn.Module:
    """The part on meta, its weights of the types that its files have."""
    found = source.parts[part]
    with torch.device("meta"), Unset():
        module = source.family.parts[part].build(found.config)
    state = {key: found.tensors[key] for key in module.state_dict()}
    module.load_state_dict(put_packed(module, state, dtype), strict=True, assign=True)
    return module.eval().requires_grad_(False)


def copied(rules: Sequence[Rule], module: nn.Module) -> list[str]:
    """The names of weights that are put together of several in the files, whose layout these rules translate."""
    return [key for key in module.state_dict() if len(becomes(rules, key, back=True)) > 1]


def working(model: Model, request: Complete) -> dict[str, int]:
    """Phase -> the peak of computed bytes for a request, beside the weights. model: on meta."""
    phases = way_of(model.family).phases(model, request)
    return {phase: peak_of(compute) for phase, compute in phases.items()}
