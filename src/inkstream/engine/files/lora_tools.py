"""What is done with adapters' files: describe, convert, shrink and compare them, and extract one from a tuned model."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkstream.disk import whole_folder
from inkstream.engine.files.merging import names_of
from inkstream.engine.files.parts import Found
from inkstream.engine.files.sources import Source
from inkstream.families import SPECS
from inkstream.quant.packed import unpack
from inkstream.types import InputError, Spec
from inkstream.weights.files import in_section, read_header, read_state
from inkstream.weights.keymap import becomes, translate
from inkstream.weights.lora import peft
from inkstream.weights.lora.arithmetic import approximate, dot, whole_change
from inkstream.weights.lora.changes import Change, LayerChange, Lora, Part
from inkstream.weights.lora.cuts import rows_of
from inkstream.weights.lora.keys import TEXT, read_key
from inkstream.weights.lora.names import Names
from inkstream.weights.lora.read import adapter_file, read_lora
from inkstream.weights.lora.write import DIALECTS, write_lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HISTORY = "inkstream.history"
"""The entry of the metadata that lists, as JSON, what was done with an adapter's file."""
BLOCK = re.compile(r"(.*?\.\d+)\.")
"""The block that a layer is in, at the beginning of its path."""

Count = Callable[[int, int], None]
"""Called with the number of layers done, and of all."""


def silent(done: int, total: int) -> None:
    """A `Count` that shows nothing."""


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter's file that was read. models: the known models that it fits, or the one that was given."""

    path: Path
    lora: Lora
    names: Names
    models: Sequence[str]

    @property
    def dialect(self) -> str:
        """The dialect to write it in again: its own if that can be written, else comfyui."""
        return next((name for name in self.lora.report.dialects if name in DIALECTS), "comfyui")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its numbers, if it can be written; float32 otherwise."""
        sizes: defaultdict[torch.dtype, int] = defaultdict(int)
        for tensor in read_header(self.path).tensors.values():
            if isinstance(tensor, Tensor):
                sizes[tensor.dtype] += tensor.numel()
        most = max(sizes, key=lambda dtype: sizes[dtype])
        return most if most in DTYPES.values() else torch.float32


class ModelWeights:
    """A transformer's weights on disk, read one at a time, in float32."""

    def __init__(self, found: Found):
        self.found = found
        self.names = found.tensors.keys()
        self._keys = in_section({name: name for name in read_header(found.path).tensors}, found.section)
        self._sources: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._keys:
            for ours in becomes(found.rules, name):
                self._sources[ours].append(name)

    def __getitem__(self, name: str) -> Tensor:
        theirs = self._sources[name]
        state = read_state(self.found.path, {self._keys[key] for key in theirs})
        weight = translate(self.found.rules, {key: state[self._keys[key]] for key in theirs})[name]
        return weight.float() if isinstance(weight, Tensor) else unpack(weight)


# Reading ------------------------------------------------------------------------------------------------------------


def open_file(path: Path | str, spec: Spec | None = None) -> AdapterFile:
    """Read an adapter. spec: of the model that it is for; None: it is looked for among the known models.

    Raises InputError if the file cannot be read, or fits no model.
    """
    file = adapter_file(Path(path).expanduser())
    if spec is not None:
        names = names_of(spec)
        return AdapterFile(file, read(file, names), names, [spec.name])
    keys = [key for key in read_header(file).tensors if not TEXT.match(key)]
    kinds: dict[Any, list[Spec]] = {}
    for known in SPECS.values():
        kinds.setdefault((known.family, known.transformer), []).append(known)
    fitting: list[tuple[int, AdapterFile]] = []
    errors: list[tuple[int, InputError]] = []
    for specs in kinds.values():
        names = names_of(specs[0])
        paths = [read_key(key).path for key in keys]
        matched = sum(names.find(path) is not None or names.find_vector(path) is not None for path in paths)
        try:
            found = AdapterFile(file, read(file, names), names, [known.name for known in specs])
        except InputError as error:
            errors.append((matched, error))
            continue
        fitting.append((matched, found))
        if matched == len(keys):
            break
    if not fitting:
        matched, error = max(errors, key=lambda pair: pair[0])
        if matched:
            raise InputError(f"{error} (or give the model with -m MODEL)")
        raise InputError(f"{file} fits no known model, its keys are like {keys[0] if keys else 'none'}: give -m MODEL")
    return max(fitting, key=lambda pair: pair[0])[1]


def read(file: Path, names: Names) -> Lora:
    """Read an adapter; PEFT's configuration beside it gives entries of the metadata that the file lacks."""
    lora = read_lora(file, names)
    base = peft.read_config(file, lora.metadata).entries.get("base_model_name_or_path")
    beside = {"base_model_name_or_path": str(base)} if base else {}
    return replace(lora, metadata={**beside, **lora.metadata})


# Describing ---------------------------------------------------------------------------------------------------------


def describe(opened: AdapterFile, weights: ModelWeights | None = None, count: Count = silent) -> dict[str, Any]:
    """Return what an adapter's file is, as JSON. weights: of the model, to compare the size of the changes with."""
    report, file = opened.lora.report, opened.path
    unmatched = {"unmatched": list(report.unmatched)} if report.unmatched else {}
    text = {"text_encoder_keys": list(report.text)} if report.text else {}
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "models": list(opened.models),
        "dialects": list(report.dialects),
        "algebras": list(report.algebras),
        "ranks": list(report.ranks),
        "dtype": next((name for name, dtype in DTYPES.items() if dtype == opened.dtype), str(opened.dtype)),
        "layers": len(opened.lora.layers),
        "other_parameters": len(opened.lora.vectors) + len(opened.lora.replaced),
        "matched_keys": report.matched,
        **unmatched,
        **text,
        **({"repeated": list(report.repeated)} if report.repeated else {}),
        "trigger": report.trigger,
        "base": report.base,
        **hashes(file),
        "metadata": dict(opened.lora.metadata),
        "norms": norms(opened, weights, count),
    }


def hashes(file: Path) -> dict[str, str]:
    """Return the hash that A1111 writes into pictures, of all bytes behind the header, and the file's SHA-256.

    A1111 takes the metadata's `sshs_model_hash` if there is one, and shows 12 digits of it.
    """
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with file.open("rb") as stream:
        start = stream.read(8)
        whole.update(start)
        whole.update(stream.read(int.from_bytes(start, "little")))
        while chunk := stream.read(1 << 20):
            whole.update(chunk)
            tensors.update(chunk)
    said = read_header(file).metadata.get("sshs_model_hash", "")
    return {"hash": (said or tensors.hexdigest())[:12], "sha256": whole.hexdigest()}


def norms(opened: AdapterFile, weights: ModelWeights | None, count: Count = silent) -> dict[str, dict[str, float]]:
    """Return, for each block and in total, the Frobenius norm of the change, and that norm over the weights' norm.

    Without the model's weights, the second is left out, and so are blocks whose change depends on them.
    """
    squares: defaultdict[str, float] = defaultdict(float)
    owns: defaultdict[str, float] = defaultdict(float)
    unknown: set[str] = set()
    for i, (path, layer) in enumerate(opened.lora.layers.items()):
        weight = weights[f"{path}.weight"] if weights else None
        if weight is None and any(part.change.reads for part in layer.parts):
            unknown |= {block_of(path), "total"}
        else:
            change = whole_change(layer, opened.names.layers[path][0], path, weight)
            size = 0.0 if change is None else dot(change, change)
            for block in (block_of(path), "total"):
                squares[block] += size
                owns[block] += 0.0 if weight is None else float(weight.square().sum(dtype=torch.float64))
        count(i + 1, len(opened.lora.layers))
    return {
        block: {"norm": squares[block] ** 0.5}
        | ({"relative": (squares[block] / owns[block]) ** 0.5} if owns[block] else {})
        for block in in_order(squares)
        if block not in unknown
    }


def in_order(blocks: Iterable[str]) -> list[str]:
    """Return blocks by name and number; the total comes first."""
    words = {block: block.rpartition(".") for block in blocks}
    return sorted(words, key=lambda block: (
        block != "total", words[block][0], int(words[block][2]) if words[block][2].isdigit() else 0, block
    ))  # fmt: skip


def block_of(path: str) -> str:
    """Return the block that a layer or parameter is in, such as `layers.3`; of one outside blocks, its first word."""
    found = BLOCK.match(path)
    return found[1] if found else path.split(".")[0]


# Writing ------------------------------------------------------------------------------------------------------------


def check_output(out: Path | str, dialect: str) -> Path:
    """Return the path to write to. Raises InputError if it exists, or has not the ending of the dialect's files."""
    path = Path(out).expanduser()
    if dialect not in DIALECTS:
        raise InputError(f"the dialect {dialect} is unknown: take {', '.join(DIALECTS)}")
    if path.exists():
        raise InputError(f"{path} exists and is not overwritten: give another --output")
    if dialect == "peft" and path.suffix:
        raise InputError(f"{path}: an adapter in the dialect peft is a folder: give a name without {path.suffix}")
    if dialect != "peft" and path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file: give a name that ends in .safetensors")
    return path


def write(
    out: Path, lora: Lora, names: Names, dialect: str, dtype: torch.dtype, done: Mapping[str, Any]
) -> Path:  # fmt: skip
    """Write an adapter; its metadata get an entry of what was done. It appears when it is complete."""
    try:
        before: list[Any] = list(json.loads(lora.metadata.get(HISTORY, "[]")))
    except (ValueError, TypeError):
        before = [lora.metadata[HISTORY]]
    said = {HISTORY: json.dumps([*before, done])}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if dialect != "peft":
            return write_lora(out, lora, names, dialect, said, dtype)
        with whole_folder(out) as temporary:
            write_lora(temporary, lora, names, dialect, said, dtype)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): give another --output") from error
    return out


def convert(opened: AdapterFile, out: Path | str, dialect: str, dtype: torch.dtype | None = None) -> Path:
    """Write an adapter in another dialect. dtype: None keeps the file's. Raises InputError if it cannot be written."""
    path = check_output(out, dialect)
    done = {"tool": "convert", "from": opened.path.name, "to": dialect}
    return write(path, opened.lora, opened.names, dialect, dtype or opened.dtype, done)


@dataclass(frozen=True, eq=False)
class Approximated:
    """An adapter of low rank that stands for a change. share: norm of what it keeps / norm of the change."""

    path: Path
    share: float
    ranks: Sequence[int]


@dataclass(eq=False)
class _Sum:
    """The squares of the norms of all changes, and of what is kept of them."""

    all: float = 0.0
    kept: float = 0.0

    def add(self, values: Tensor, rank: int) -> None:
        squares = values.double().square()
        self.all += float(squares.sum())
        self.kept += float(squares[:rank].sum())

    @property
    def share(self) -> float:
        return (self.kept / self.all) ** 0.5 if self.all else 1.0


def check_size(rank: int | None, keep: float | None) -> None:
    """Raise InputError unless just one of the two is given, and within its range."""
    if (rank is None) == (keep is None):
        raise InputError("give either --rank, such as 16, or --keep, such as 0.9")
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank} is out of range: give 1 or more")
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"--keep {keep:g} is out of range: give more than 0, and 1 at most")


def resize(
    opened: AdapterFile,
    out: Path | str,
    rank: int | None = None,
    keep: float | None = None,
    dialect: str | None = None,
    count: Count = silent,
) -> Approximated:
    """Write an adapter as LoRA of a lower rank: the nearest one in the Frobenius norm.

    rank: of each layer as the file's dialect has them. keep: the share of each layer's norm to keep at least; the rank
    follows from it. Low-rank changes are never made dense. Raises InputError for changes that depend on the model.
    """
    check_size(rank, keep)
    dialect = dialect or opened.dialect
    path = check_output(out, dialect)
    lora, names, total = opened.lora, opened.names, _Sum()
    layers: dict[str, list[Part]] = {}
    ranks: list[int] = []
    places = [place for place in names.places(names.written[dialect]).values() if place.layer in lora.layers]
    for i, place in enumerate(places):
        parts = lora.layers[place.layer].parts
        if reading := [part.change.algebra for part in parts if part.change.reads]:
            raise InputError(
                f"the {reading[0]} of {place.layer} depends on the model's weights: merge it (inkstream lora merge), "
                "and extract the difference (inkstream lora extract)"
            )
        change = rows_of(parts, place.rows, names.layers[place.layer][0], place.layer)
        if change is not None:
            _approximate(change, place.rows, layers.setdefault(place.layer, []), ranks, total, rank, keep)
        count(i + 1, len(places))
    changes = {name: LayerChange(layers.get(name, []), layer.bias) for name, layer in lora.layers.items()}
    done = {"tool": "resize", "from": opened.path.name, "kept": total.share}
    done |= {"rank": rank} if keep is None else {"keep": keep}
    written = write(path, replace(lora, layers=changes), names, dialect, opened.dtype, done)
    return Approximated(written, total.share, ranks)


def extract(
    tuned: Source,
    base: Source,
    out: Path | str,
    rank: int | None = None,
    keep: float | None = None,
    dialect: str = "comfyui",
    dtype: torch.dtype = torch.float32,
    count: Count = silent,
) -> Approximated:
    """Write the difference of two transformers of one architecture as LoRA: of each layer the nearest of a rank.

    rank, keep: as in `resize`. Biases, norms and other parameters are kept in full. Raises InputError if the
    architectures differ, or the models do not.
    """
    check_size(rank, keep)
    path = check_output(out, dialect)
    if (tuned.family, tuned.spec.transformer) != (base.family, base.spec.transformer):
        raise InputError(
            f"{tuned.spec.name} and {base.spec.name} are not of one architecture, so no LoRA leads from one to the "
            "other: give the base that the model was tuned from"
        )
    names, total = names_of(base.spec), _Sum()
    ours, theirs = ModelWeights(tuned.parts["transformer"]), ModelWeights(base.parts["transformer"])
    layers: dict[str, list[Part]] = {}
    ranks: list[int] = []
    places: defaultdict[str, list[slice]] = defaultdict(list)
    for place in names.places(names.written[dialect]).values():
        places[place.layer].append(place.rows)
    for i, (layer, runs) in enumerate(places.items()):
        change = ours[f"{layer}.weight"] - theirs[f"{layer}.weight"]
        for rows in runs if change.any() else ():
            _approximate(change[rows], rows, layers.setdefault(layer, []), ranks, total, rank, keep)
        count(i + 1, len(places))
    biases = {name: ours[f"{name}.bias"] - theirs[f"{name}.bias"] for name in names.biased}
    biases = {name: bias for name, bias in biases.items() if bias.any()}
    vectors = {name: ours[name] - theirs[name] for name in names.vectors}
    vectors = {name: vector for name, vector in vectors.items() if vector.any()}
    if not layers and not biases and not vectors:
        raise InputError(f"{tuned.spec.name} and {base.spec.name} have equal weights: give a tuned model and its base")
    changed = [name for name in names.layers if name in layers or name in biases]
    lora = Lora({name: LayerChange(layers.get(name, []), biases.get(name)) for name in changed}, vectors)
    size = {"rank": rank} if keep is None else {"keep": keep}
    done = {"tool": "extract", "tuned": tuned.spec.name, "base": base.spec.name, "kept": total.share, **size}
    said = {"ss_base_model_version": base.spec.family, "ss_sd_model_name": base.spec.name}
    return Approximated(
        write(path, replace(lora, metadata=said), names, dialect, dtype, done), total.share, ranks
    )  # fmt: skip


def _approximate(
    change: Change | Tensor, rows: slice, into: list[Part], ranks: list[int], total: _Sum,
    rank: int | None, keep: float | None,
) -> None:  # fmt: skip
    low, values = approximate(change, rank, keep)
    if low is not None:
        into.append(Part(low, rows))
        ranks.append(low.rank)
        total.add(values, low.rank)


# Comparing ----------------------------------------------------------------------------------------------------------


def compare(
    a: AdapterFile, b: AdapterFile, weights: ModelWeights | None = None, count: Count = silent
) -> dict[str, Any]:
    """Return the cosine between two adapters' changes, <A, B> / (|A| |B|), in total and for each block, as JSON.

    A block that only one of them changes has the cosine 0. weights: of the model, for changes that depend on them.
    """
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    names = list(dict.fromkeys([*all_names(a.lora), *all_names(b.lora)]))
    for i, name in enumerate(names):
        ours, theirs = (change_of(one, name, weights) for one in (a, b))
        products = (
            0.0 if ours is None or theirs is None else dot(ours, theirs),
            0.0 if ours is None else dot(ours, ours),
            0.0 if theirs is None else dot(theirs, theirs),
        )
        for block in ("total", block_of(name)):
            sums[block] = [total + product for total, product in zip(sums[block], products)]
        count(i + 1, len(names))
    both = {block: {"cosine": ab / (aa * bb) ** 0.5 if aa and bb else 0.0, "norms": [aa**0.5, bb**0.5]}
            for block in in_order(sums) for ab, aa, bb in [sums[block]]}  # fmt: skip
    total = both.pop("total")
    return {"files": [str(a.path), str(b.path)], **total, "blocks": both}


def all_names(lora: Lora) -> list[str]:
    """Return the layers, biases and other parameters that an adapter changes."""
    biases = [f"{path}.bias" for path, layer in lora.layers.items() if layer.bias is not None]
    return [*(path for path, layer in lora.layers.items() if layer.parts), *biases, *lora.vectors, *lora.replaced]


def change_of(opened: AdapterFile, name: str, weights: ModelWeights | None) -> Change | Tensor | None:
    """Return the change of a layer, of a bias or of another parameter; None if there is none."""
    lora, path = opened.lora, name.removesuffix(".bias")
    if name in lora.vectors:
        return lora.vectors[name]
    if name in lora.replaced:
        if weights is None:
            raise InputError(f"{opened.path} replaces {name}: give the model with -m MODEL")
        return lora.replaced[name] - weights[name]
    if name in lora.layers:
        reads = any(part.change.reads for part in lora.layers[name].parts)
        weight = weights[f"{name}.weight"] if weights and reads else None
        return whole_change(lora.layers[name], opened.names.layers[name][0], name, weight)
    return lora.layers[path].bias if path in lora.layers and name != path else None
