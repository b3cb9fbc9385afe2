"""Placements: where the parts of a model are while others work, from the fastest to the one that needs least memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from inkstream.engine.drawing.complete import Complete
from inkstream.engine.drawing.flow import way_of
from inkstream.engine.drawing.model import Model
from inkstream.engine.files.parts import Found, Unset
from inkstream.engine.files.sources import Source
from inkstream.engine.machine.peak import peak_of
from inkstream.nn.offload import Guest, Streamed, Weight, advise, is_number, read_at_home, visit_when_called, weights_of
from inkstream.nn.quant import PackedEmbedding, PackedWeight
from inkstream.nn.quant import place as put_packed
from inkstream.nn.stack import Blocks
from inkstream.weights.keymap import Rule, becomes
from inkstream.weights.lora.merge import form_after, refit

Place = Literal["resident", "visiting"]
"""resident: always on the device. visiting: each layer is on the device only while it computes."""

PLACEMENTS: Mapping[str, tuple[Place, Place]] = {
    "resident": ("resident", "resident"),
    "parked": ("resident", "visiting"),
    "streamed": ("visiting", "visiting"),
}
"""Name -> the place of the transformer, and the place of the other parts, which run once for each picture."""

NO_CONTROLS: Mapping[Path, Found] = {}

PHASES = ("prompt", "steps", "picture")
"""The phases of a request, in their order."""

TABLES = (nn.Embedding, PackedEmbedding)
"""Tables of which few rows are read. If their part is not resident, the rows are read at home."""


BESIDE = 64 * 2**20
"""Bytes on a CPU that allocators keep after memory was freed, and that libraries take beside tensors. Measured."""


class Sharing(Protocol):
    """Several processes that compute one transformer together."""

    def share(self, transformer: nn.Module) -> None:
        """Cut the transformer to this process's share."""
        ...

    def attach(self, transformer: nn.Module) -> None:
        """Let each process answer its own samples."""
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
    """A part of a model under a placement: the weights that stay on the device, those that visit, and their bytes.

    module: its weights are at home, or on meta. Nothing is moved before `settle`. copied: the names of weights that are
    not views of a file. On a CPU they always take memory.
    """

    def __init__(
        self, module: nn.Module, place: Place, device: torch.device, dtype: torch.dtype, copied: Sequence[str] = ()
    ):
        self.device, self.dtype = device, dtype
        modules: dict[str, Any] = {} if place == "resident" else dict(cast("Any", module).named_modules())
        tables: dict[str, nn.Module] = {name: inner for name, inner in modules.items() if isinstance(inner, TABLES)}
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
        state = module.state_dict(keep_vars=True)
        staying = {id(getattr(weight.owner, weight.name)) for weight in self.staying}  # counted below, as staying
        self.copied = sum(state[name].nbytes for name in copied if id(state[name]) not in staying)

    @property
    def always(self) -> int:
        """Bytes that are always on the device."""
        at_home = self.copied if self.device.type == "cpu" else 0
        return at_home + sum(weight.home.numel() * self._type(weight).itemsize for weight in self.staying)

    @property
    def working(self) -> int:
        """More bytes on the device while the part works. On a CPU, pages at home that are read count too."""
        pages: Callable[[Guest], int] = pages_seen if self.device.type == "cpu" else lambda guest: 0
        rooms = [guest.nbytes + pages(guest) for guest in self.guests]
        for stream in self.streams.values():  # one after the other
            rooms.append(stream.nbytes + max(map(pages, stream.guests), default=0))
            rooms += [guest.nbytes + pages(guest) for guest in stream.apart]
        return max(rooms, default=0)

    def settle(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Move the staying weights to the device, and let the others visit from now on. progress: called with the bytes
        of the staying weights, done and in all."""
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
            weight = staying.pop()  # afterwards only the module holds it
            size = weight.home.nbytes
            self._move(weight)
            if (done + size) * 100 // max(total, 1) > done * 100 // max(total, 1):
                progress(done + size, total)
            done += size

    def _move(self, weight: Weight) -> None:
        """Move a weight to the device. Mapped pages that were copied from are released."""
        moved = weight.home.to("meta" if weight.home.is_meta else self.device, self._type(weight))
        if moved is not weight.home:
            weight.put(moved)
            if weight.mapped:
                advise(weight.home, "MADV_DONTNEED")

    def _type(self, weight: Weight) -> torch.dtype:
        return self.dtype if is_number(weight.home) else weight.home.dtype


def units(module: nn.Module, place: Place) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that visit the device on their own: stacks, the called submodules, or the whole part."""
    if place == "resident":
        return
    if called := getattr(module, "called", ()):
        yield from ((child, module.get_submodule(child)) for child in called)
    elif any(isinstance(inner, nn.ModuleList) and len(inner) for inner in module.modules()):
        yield from _layers(module, "")
    else:
        yield "", module


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield our own stacks whole, and other libraries' stacks layer by layer."""
    for child, inner in module.named_children():
        path = f"{name}.{child}" if name else child
        if isinstance(inner, Blocks):
            yield path, inner
        elif isinstance(inner, nn.ModuleList):
            yield from ((f"{path}.{i}", layer) for i, layer in enumerate(inner))
        else:
            yield from _layers(inner, path)


def pages_seen(guest: Guest) -> int:
    """Return the bytes at home that are in memory too while the guest is on the device."""
    return sum(weight.home.nbytes for weight in (*guest.away, *guest.here))


# Before anything is read ---------------------------------------------------------------------------------------------


def plan_request(
    source: Source, tokenizers: Mapping[str, Any], request: Complete, device: torch.device,
    dtypes: Mapping[str, torch.dtype], crew: Sharing | None = None, merged: Collection[str] = (),
    controls: Mapping[Path, Found] = NO_CONTROLS, control_folder: Path = Path("controls"),
    upscaler_folder: Path = Path("upscalers"), away: Collection[str] = (),
) -> list[Plan]:  # fmt: skip
    """Return the plan of each placement for a request, the fastest placement first.

    dtypes: part -> the dtype that it computes in. crew: cuts the transformer to this process's share. merged: the names
    of the transformer's weights that adapters change. controls: the control nets of the request, which are in the
    folder or elsewhere. upscaler_folder: of the upscaling models that requests name. away: the parts that work on
    another machine. Weights count as they are in the
    files or on the device. Computed tensors are counted by running the request on meta. Memory of drivers and of the
    process itself is not counted.
    """
    modules = {
        part: at_home(source, part, dtypes[part], merged if part == "transformer" else ()) for part in source.parts
    }
    if crew:
        crew.share(modules["transformer"])
    here = {part: module for part, module in modules.items() if part not in away}
    weights = weigh(source, here, device, dtypes, merged)
    nets = {path: net_at_home(found, dtypes["transformer"]) for path, found in controls.items()}
    for name, phases in weights.items():
        beside = sum(weigh_net(controls[path], net, name, device, dtypes["transformer"]) for path, net in nets.items())
        weights[name] = {phase: count + beside for phase, count in phases.items()}
    work = working(on_meta(source, modules, tokenizers, dtypes, nets, control_folder, upscaler_folder), request)
    return [add_up(name, phases, work, device) for name, phases in weights.items()]


def add_up(name: str, weights: Mapping[str, int], work: Mapping[str, int], device: torch.device) -> Plan:
    """Return the plan of a placement, from the bytes of its weights and of its computed tensors in each phase."""
    beside = BESIDE if device.type == "cpu" else 0
    return Plan(name, {phase: beside + count + work.get(phase, 0) for phase, count in weights.items()})


def weigh(
    source: Source,
    modules: Mapping[str, nn.Module],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    merged: Collection[str] = (),
) -> dict[str, dict[str, int]]:
    """Placement -> phase -> bytes of weights on the device. modules: as from `at_home`. merged: of the transformer."""
    own = {
        part: copied(source.parts[part].rules, module, merged if part == "transformer" else ())
        for part, module in modules.items()
    }
    weights: dict[str, dict[str, int]] = {}
    for name in PLACEMENTS:
        placed = {
            part: Placed(module, place_of(name, part), device, dtypes[part], own[part])
            for part, module in modules.items()
        }
        always = sum(part.always for part in placed.values())
        weights[name] = {
            phase: always + max((placed[part].working for part in parts if part in placed), default=0)
            for phase, parts in phases_of(source).items()
        }
    return weights


def on_meta(
    source: Source,
    modules: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    nets: Mapping[Path, nn.Module],
    control_folder: Path,
    upscaler_folder: Path = Path("upscalers"),
) -> Model:
    """Return the model without data. modules, nets: at home; afterwards they are resident on meta."""
    meta, own = torch.device("meta"), dtypes["transformer"]
    for part, module in modules.items():
        Placed(module, "resident", meta, dtypes[part]).settle()
    for net in nets.values():
        Placed(net, "resident", meta, own).settle()
    family = source.family(source.spec, modules, tokenizers)
    return Model(
        family, meta, own, controls=control_folder, read_control=lambda path, use: nets[path], upscalers=upscaler_folder
    )


def phases_of(source: Source) -> dict[str, list[str]]:
    """Phase of a request -> the parts that work in it."""
    at_work = {part: source.family.parts[part].phases for part in source.parts}
    phases = {phase: [part for part, works in at_work.items() if phase in works] for phase in PHASES}
    return {phase: parts for phase, parts in phases.items() if parts}


def net_at_home(found: Found, dtype: torch.dtype) -> nn.Module:
    """Return a control net on meta, with the types that its file has."""
    state = {key: found.tensors[key] for key in found.module.state_dict()}
    found.module.load_state_dict(put_packed(found.module, state, dtype), strict=True, assign=True)
    return found.module.eval().requires_grad_(False)


def weigh_net(found: Found, net: nn.Module, placement: str, device: torch.device, dtype: torch.dtype) -> int:
    """Return the bytes of a control net on the device. Its place is the transformer's. net: at home."""
    placed = Placed(net, place_of(placement, "transformer"), device, dtype, copied(found.rules, net))
    return placed.always + placed.working


def at_home(source: Source, part: str, dtype: torch.dtype, merged: Collection[str] = ()) -> nn.Module:
    """Return the part on meta. Its weights have the types that its files have. merged: those that adapters change."""
    found = source.parts[part]
    with torch.device("meta"), Unset():
        module = source.family.parts[part].build(found.config)
    state = {key: found.tensors[key] for key in module.state_dict()}
    forms = {key: form_after(state[key], dtype) for key in merged}
    state |= {key: refit(key, torch.empty(form.shape, device="meta"), form) for key, form in forms.items()}
    module.load_state_dict(put_packed(module, state, dtype), strict=True, assign=True)
    return module.eval().requires_grad_(False)


def copied(rules: Sequence[Rule], module: nn.Module, merged: Collection[str] = ()) -> list[str]:
    """Return the names of weights that are joined from several weights of the files, or that adapters change.

    rules: from the files' layout. merged: the weights that adapters change.
    """
    modules: dict[str, Any] = dict(cast("Any", module).named_modules())
    packed = {name for name, layer in modules.items() if isinstance(layer, PackedWeight)}

    def is_merged(key: str) -> bool:
        owner, _, name = key.rpartition(".")
        return key in merged or (owner in packed and name != "bias" and f"{owner}.weight" in merged)

    return [key for key in module.state_dict() if len(becomes(rules, key, back=True)) > 1 or is_merged(key)]


def working(model: Model, request: Complete) -> dict[str, int]:
    """Phase -> the peak of computed bytes for a request, beside the weights. model: on meta."""
    phases = way_of(model.family).phases(model, request)
    return {phase: peak_of(compute) for phase, compute in phases.items()}
