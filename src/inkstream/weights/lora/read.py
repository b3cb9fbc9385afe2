"""Reads an adapter's file, in any dialect and algebra, as changes of one of our models' layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from inkstream.types import InputError
from inkstream.weights.files import PICKLES, few, list_weights, read_header, read_tensors
from inkstream.weights.lora import peft
from inkstream.weights.lora.algebras import Layer, bias_of, by, changes_of
from inkstream.weights.lora.changes import Change, LayerChange, Lora, Part, Report
from inkstream.weights.lora.cuts import reorder
from inkstream.weights.lora.keys import BASES, FOLDERS, TEXT, TRIGGERS, read_key
from inkstream.weights.lora.names import COMMON, Names, Place


def read_lora(path: Path | str, names: Names) -> Lora:
    """Read an adapter's safetensors file, or the one in a folder of PEFT or diffusers, for a model with these names.

    Keys without a layer in the model are listed in the report. Raises InputError, in one line, if the file cannot be
    read or is a pickle, if no key has a layer, if a shape is another than the layer's, if a tensor holds NaN or
    infinity, if half of a change is missing, or if a change is of an unknown kind.
    """
    file = adapter_file(Path(path))
    metadata = read_header(file).metadata
    tensors = read_tensors(file)
    config = peft.read_config(file, metadata)
    try:
        return _read(tensors, metadata, config, names)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def adapter_file(path: Path) -> Path:
    """The file of an adapter's path, which may be a folder. Raises InputError if there is none, or several."""
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: convert it to safetensors first")
    if path.suffix == ".gguf":
        raise InputError(f"{path} is a GGUF file: take the adapter's safetensors file")
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file: take the adapter's safetensors file")
    if not path.is_dir():
        return path
    for name in FOLDERS:
        if (path / name).is_file():
            return path / name
    files = [file for file in list_weights(path) if file.suffix == ".safetensors"]
    if len(files) > 1:
        raise InputError(f"{path} holds {len(files)} files ({few([file.name for file in files])}): give one of them")
    if files:
        return files[0]
    if pickles := [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]:
        raise InputError(f"{path} holds only pickles ({few(pickles)}): convert them to safetensors first")
    raise InputError(f"{path} holds no adapter: give a safetensors file")


def _read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: peft.Config, names: Names) -> Lora:
    keys: dict[str, dict[str, str]] = {}  # path of a layer -> role -> key
    places: dict[str, Place] = {}
    vectors: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    unmatched: list[str] = []
    text: list[str] = []
    dialects: Counter[str] = Counter()
    for key, tensor in tensors.items():
        if TEXT.match(key):
            text.append(key)
            continue
        parts = read_key(key)
        if found := names.find(parts.path):
            layout, path, place = found
            dialects[parts.dialect if layout in COMMON else layout] += 1
            if not parts.role:
                raise InputError(f"{key} is an unknown kind of change: use an adapter of a kind that is known")
            if other := keys.setdefault(path, {}).get(parts.role):
                raise InputError(f"{key} and {other} are of the same layer: remove one of the two")
            keys[path][parts.role] = key
            places[path] = place
        elif name := names.find_vector(parts.path):
            dialects[parts.dialect] += 1
            if parts.role not in ("w_norm", "diff", "set_weight", "weight", ""):
                raise InputError(f"{key} is an unknown kind of change of a norm: use another file")
            into = vectors if parts.role in ("w_norm", "diff") else replaced
            into[name] = _vector(key, _finite(key, tensor), names.vectors[name])
        else:
            _refuse_unknown(key, parts.path, names)
            unmatched.append(key)
    if not keys and not vectors and not replaced:
        raise InputError(_no_layer(tensors, text, names))
    layers: dict[str, list[Part]] = {}
    biases: dict[str, Tensor] = {}
    repeated: list[str] = []
    for path, own in sorted(keys.items(), key=lambda item: -places[item[0]].height):  # whole layers before their parts
        place = places[path]
        height, width = names.layers[place.layer]
        held = {role: _finite(key, tensors[key]) for role, key in own.items()}
        layer = Layer(path, (place.height, width), place.layer in names.biased, own, held)
        changes, bias = changes_of(layer, config), bias_of(layer, config)
        for change in changes:
            if change.shape != layer.size:
                raise InputError(
                    f"{path} is {by(change.shape)} there, but {by(layer.size)} in this model: "
                    f"{_made_for(tensors, names) or 'use an adapter made for this model'}"
                )
        known = layers.setdefault(place.layer, [])
        if changes and (others := _overlapping(known, place)):
            if not _equal(others, changes, place):
                raise InputError(f"{path} changes rows of {place.layer} that another key changes: remove one")
            repeated.append(path)
            continue
        for change in changes:
            ordered = change if place.order is None else reorder(change, place.order)
            known.append(Part(ordered, slice(None) if place.height == height else place.rows))
        if bias is not None:
            ours = biases.setdefault(place.layer, torch.zeros(height))
            ours[place.rows] += bias if place.order is None else bias[place.order]
    found = [part.change for parts in layers.values() for part in parts]
    report = Report(
        dialects=tuple(dialects),
        algebras=tuple(dict.fromkeys(change.algebra for change in found)) + (("norms",) if vectors or replaced else ()),
        ranks=tuple(sorted({change.rank for change in found if change.rank is not None})),
        matched=sum(dialects.values()),
        unmatched=tuple(unmatched),
        text=tuple(text),
        repeated=tuple(repeated),
        trigger=next((metadata[key] for key in TRIGGERS if metadata.get(key)), ""),
        base=next((metadata[key] for key in BASES if metadata.get(key)), ""),
    )
    changes = {path: LayerChange(tuple(parts), biases.get(path)) for path, parts in layers.items()}
    return Lora(changes, vectors, dict(metadata), replaced, report)


def _made_for(tensors: Mapping[str, Tensor], names: Names) -> str:
    """What model the widths of a file's tensors point to, if it is another one; else ""."""

    def usual(sizes: Counter[int]) -> str:
        known = Counter({names.widths[size]: count for size, count in sizes.items() if size in names.widths})
        return max(known, key=known.__getitem__, default="")

    theirs = usual(Counter(size for tensor in tensors.values() for size in tensor.shape))
    ours = usual(Counter(width for _, width in names.layers.values()))
    return f"it was made for {theirs}, use one made for this model" if theirs != ours and theirs else ""


def _no_layer(tensors: Mapping[str, Tensor], text: list[str], names: Names) -> str:
    if not tensors:
        return "it is empty: download it again"
    if len(text) == len(tensors):
        return f"all of its {len(text)} keys are of text encoders, which adapters do not change: use another adapter"
    made_for = _made_for(tensors, names) or "use an adapter made for this model"
    return f"none of its {len(tensors)} keys has a layer in this model ({few([*tensors])}): {made_for}"


def _refuse_unknown(key: str, path: str, names: Names) -> None:
    """Raises InputError if a key is of a layer of the model, but ends in a way that is not known."""
    words = path.split(".")
    if any(names.find(".".join(words[:count])) for count in range(1, len(words))):
        raise InputError(f"{key} is an unknown kind of change: use an adapter of a kind that is known")


def _finite(key: str, tensor: Tensor) -> Tensor:
    full = tensor.float()
    if not full.isfinite().all():
        raise InputError(f"{key} holds NaN or infinity: download the file again, or train with a lower rate")
    return full


def _vector(key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.numel() != torch.Size(shape).numel():
        raise InputError(f"{key} has {tensor.numel()} numbers, but this model's has {torch.Size(shape).numel()}")
    return tensor.reshape(shape)


def _overlapping(parts: list[Part], place: Place) -> list[Part]:
    """The parts that change some of the rows of a place."""
    low, high = place.rows.start, place.rows.stop
    return [part for part in parts if (part.rows.start or 0) < high and (part.rows.stop or high) > low]


def _equal(parts: list[Part], changes: list[Change], place: Place) -> bool:
    """Whether parts change the rows of a place as `changes` do. What reads the weight is never equal."""
    both = [*(part.change for part in parts), *changes]
    if any(change.reads for change in both) or place.order is not None:
        return False
    theirs = sum((change.delta(None) for change in changes), torch.zeros(changes[0].shape))
    ours = torch.zeros_like(theirs)
    low, high = place.rows.start, place.rows.stop
    for part in parts:
        start = part.rows.start or 0
        stop = start + part.change.shape[0]
        begin, end = max(start, low), min(stop, high)
        ours[begin - low : end - low] += part.change.delta(None)[begin - start : end - start]
    return torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))
