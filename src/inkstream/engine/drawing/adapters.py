"""The adapters (LoRA and relatives) that requests use with a loaded model: read once, and kept in an LRU cache."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from inkstream.engine.drawing.options import FEW
from inkstream.engine.files.loras import factors_of, find_lora
from inkstream.engine.files.merging import names_of
from inkstream.nn.around.adapters import Adapter
from inkstream.nn.parallel import Kept
from inkstream.nn.prepacked import weight_of
from inkstream.types import InputError, LoraUse, Spec
from inkstream.weights.files import read_header
from inkstream.weights.lora.algebras import DENSE
from inkstream.weights.lora.changes import Bound, Full, LayerChange, LowRank, Part, Report, bind_rows
from inkstream.weights.lora.cuts import rows_of
from inkstream.weights.lora.keys import read_key
from inkstream.weights.lora.names import Names
from inkstream.weights.lora.read import adapter_file, read_lora

KEPT = 2**30
"""Bytes of adapters to keep on the device for later requests, unless a memory limit is set."""
MUCH = 1.2
"""The sum of strengths above which pictures of models that were distilled to few steps often break."""


@dataclass(frozen=True, eq=False)
class Product:
    """An adapter's change of one layer, at a strength: see `nn.around.adapters.Product`."""

    parts: Sequence[tuple[slice, Bound]]  # rows of the layer, and their change
    bias: Tensor | None = None
    strength: float = 1.0
    overlap: bool = False  # several parts change the same rows, and one of them reads the layer's own output

    def __call__(self, x: Tensor, plain: Tensor, out: Tensor) -> None:
        plain = plain.clone() if self.overlap else plain  # it may be the same memory as out
        for rows, bound in self.parts:
            bound.add(x, plain[:, rows], out[:, rows], self.strength)
        if self.bias is not None:
            out.add_(self.bias, alpha=self.strength)


@dataclass(eq=False)
class Held:
    """An adapter on the device."""

    report: Report
    products: Mapping[str, Product]  # at strength 1
    bytes: int
    users: int = 0  # requests that are being drawn with it
    adapters: dict[tuple[object, ...], Adapter] = field(default_factory=dict[tuple[object, ...], Adapter])


class Adapters:
    """The adapters of one loaded transformer.

    device, dtype: what the transformer computes in. folder: where adapters are that requests name. keep: bytes of
    adapters to keep; those of the requests that are being drawn stay beyond that.
    """

    def __init__(
        self,
        transformer: nn.Module,
        spec: Spec,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
        keep: int = KEPT,
    ):
        self.transformer = transformer
        self.spec = spec
        self.device, self.dtype = device, dtype
        self.folder = folder
        self.keep = keep
        modules: dict[str, Any] = dict(cast("Any", transformer).named_modules())
        self.layers = {path: layer for path, layer in modules.items() if hasattr(layer, "in_features")}
        self._held: OrderedDict[tuple[object, ...], Held] = OrderedDict()

    @cached_property
    def names(self) -> Names:
        """The names of the transformer's layers in adapters' files."""
        return names_of(self.spec)

    @property
    def bytes(self) -> int:
        """The memory of all adapters on the device."""
        return sum(held.bytes for held in self._held.values())

    def taken(self, loras: Sequence[str]) -> int:
        """Return the bytes of the adapters that are in use, without those that a request with `loras` shares."""
        own = {identity(find_lora(LoraUse.read(lora).path, self.folder)) for lora in loras}
        return sum(held.bytes for key, held in self._held.items() if held.users and key not in own)

    def get(self, use: LoraUse) -> Adapter:
        """Return an adapter as a request uses it. The same use returns the same object. Raises InputError."""
        held = self._hold(use)
        key = (use.strength, use.blocks)
        if key not in held.adapters:
            factors = factors_of(use, held.products)
            held.adapters[key] = Adapter.of(
                self.transformer,
                {
                    path: replace(product, strength=strength)
                    for path, product in held.products.items()
                    if (strength := use.strength * factors[path]) != 0
                },
            )
        return held.adapters[key]

    @contextmanager
    def use(self, uses: Sequence[LoraUse]) -> Generator[list[str]]:
        """Keep the adapters of a request as long as it is drawn. Gives the lines to show. Raises InputError."""
        held = [self._hold(use) for use in uses]
        for one in held:
            one.users += 1
        try:
            self._trim()
            lines = [line for use, one in zip(uses, held) for line in describe(use, one.report)]
            together = sum(abs(use.strength) for use in uses)
            if self.spec.steps <= FEW and len(uses) > 1 and together > MUCH:
                lines.append(
                    f"loras: strengths of {together:g} together often break pictures of {self.spec.name}, which draws "
                    f"in {self.spec.steps} steps: {MUCH:g} or less is safer"
                )
            yield lines
        finally:
            for one in held:
                one.users -= 1
            self._trim()

    def _hold(self, use: LoraUse) -> Held:
        """The adapter of a use, read if need be."""
        path = find_lora(use.path, self.folder)
        key = identity(path)
        if key not in self._held:
            lora = read_lora(path, self.names)
            if fixed := [*lora.vectors, *lora.replaced]:
                name = fixed[0]
                raise InputError(
                    f"lora {use.path} also changes {name}, which no single picture can have: "
                    f"merge it into the model with --merge-lora {use.path}"
                )
            products = {name: self._bind(name, change) for name, change in lora.layers.items()}
            self._held[key] = Held(lora.report, products, sum(bytes_of(product) for product in products.values()))
        self._held.move_to_end(key)
        return self._held[key]

    def _trim(self) -> None:
        """Drop the adapters that were used least recently, down to `keep` bytes. Those in use stay."""
        for key, held in list(self._held.items()):
            if self.bytes > self.keep and not held.users:
                del self._held[key]

    def _bind(self, name: str, change: LayerChange) -> Product:
        """Prepare the changes of a layer: those of this process's share, if several share the layer."""
        layer = self.layers[name]
        kept: Kept | None = getattr(layer, "kept", None)
        if kept is not None:
            change = share_of(change, kept, name, self.names.layers[name], first=layer.bias is not None)
        return bind(layer, change, self.device, self.dtype)


def bind(layer: Any, change: LayerChange, device: torch.device, dtype: torch.dtype) -> Product:
    """Prepare an adapter's changes of a layer, at strength 1. device, dtype: what the layer computes in."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    reads = any(part.change.reads for part in change.parts)
    weight = weight_of(layer).to(device, torch.float32) if reads else None
    own = None if layer.bias is None else layer.bias.detach().to(device, torch.float32)
    low = [(part.rows, part.change) for part in change.parts if isinstance(part.change, LowRank)]
    others = [part for part in change.parts if not isinstance(part.change, LowRank) or len(low) == 1]
    parts: list[tuple[slice, Bound]] = [(slice(None), bind_rows(low, move))] if len(low) > 1 else []
    for part in others:
        bias = None if own is None else own[part.rows]
        rows = None if weight is None else weight[part.rows]
        parts.append((part.rows, moved(part.change, device).bind(rows, bias, move)))
    spans = sorted(part.rows.indices(layer.out_features)[:2] for part in change.parts)
    overlap = reads and any(start < stop for (_, stop), (start, _) in pairwise(spans))
    return Product(parts, None if change.bias is None else move(change.bias), overlap=overlap)


def moved(value: Any, device: torch.device) -> Any:
    """Return a change with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        pair = cast("Any", value)
        items = [moved(item, device) for item in pair]
        return pair._make(items) if hasattr(pair, "_make") else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: moved(getattr(value, one.name), device) for one in fields(value)})
    return value


def share_of(change: LayerChange, kept: Kept, name: str, size: tuple[int, int], first: bool) -> LayerChange:
    """Return the changes of what one process keeps of a layer. size: of the whole layer. first: the process that adds
    the bias, if the layer's inputs are shared. Raises InputError for a change that needs whole rows of the weight."""
    parts: list[Part] = []
    if kept.side == "out":
        at = 0
        for start, stop in kept.runs:
            own = rows_of(change.parts, slice(start, stop), size[0], name)
            if own is not None:
                parts.append(Part(own, slice(at, at + stop - start)))
            at += stop - start
        bias = None if change.bias is None else torch.cat([change.bias[start:stop] for start, stop in kept.runs])
        return LayerChange(parts, bias)
    columns = torch.cat([torch.arange(start, stop) for start, stop in kept.runs])
    for part in change.parts:
        if part.change.reads:
            raise InputError(f"{name} is changed by {part.change.algebra}, which needs whole rows of the weight: "
                             "take --parallel context")  # fmt: skip
        low = part.change
        own = replace(low, down=low.down[:, columns]) if isinstance(low, LowRank) else Full(low.delta(None)[:, columns])
        parts.append(Part(own, part.rows))
    return LayerChange(parts, change.bias if first else None)


def describe(use: LoraUse, report: Report) -> list[str]:
    """Return lines about an adapter: what it is, how strong, and what of its file changes nothing."""
    name = Path(use.path).stem
    strength = f" at strength {use.strength:g}" if use.strength != 1 else ""
    ranks = f" of rank {' and '.join(map(str, report.ranks))}" if report.ranks else ""
    trigger = f"; trigger: {report.trigger}" if report.trigger else ""
    what = f"{' and '.join(report.algebras)}{ranks}{strength}, {report.matched} tensors used{trigger}"
    return [f"lora {name}: {line}" for line in (what, *report.remarks())]


def identity(path: Path) -> tuple[object, ...]:
    """Return what tells one version of an adapter's file from another."""
    status = path.stat()
    return path.resolve(), status.st_mtime_ns, status.st_size


def bytes_of(product: Product) -> int:
    """Return the memory of a product's tensors."""
    return sum(bound.bytes for _, bound in product.parts) + (0 if product.bias is None else product.bias.nbytes)


def bytes_foreseen(loras: Sequence[str], folder: Path, dtype: torch.dtype, spec: Spec) -> int:
    """Return the memory that adapters take on a device, from the headers of their files. spec: of the model."""
    files = {find_lora(LoraUse.read(lora).path, folder) for lora in loras}
    tensors = [(read_key(key), tuple(weight.shape)) for file in files
               for key, weight in read_header(adapter_file(file)).tensors.items()]  # fmt: skip
    numbers = sum(math.prod(shape) for _, shape in tensors)
    if dense := [key.path for key, shape in tensors if is_dense(key.role, shape)]:
        names = names_of(spec)
        places = [found[2] for path in dense if (found := names.find(path))]
        numbers += sum(place.height * names.layers[place.layer][1] for place in places)
    return numbers * dtype.itemsize


def is_dense(role: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a file says that its change is as large as the layer's weight when it is bound."""
    return role in DENSE or (role == "dora_scale" and len(shape) == 2 and shape[0] == 1 < shape[1])
