"""Reads an adapter's file, in any dialect and algebra, as changes of one of our models' layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inkstream.types import InputError
from inkstream.weights.files import PICKLES, few, list_weights, read_header, read_tensors
from inkstream.weights.lora import peft
from inkstream.weights.lora.changes import Change, Full, LayerChange, Lora, LowRank, Part, Replacement, Report
from inkstream.weights.lora.cuts import reorder
from inkstream.weights.lora.factors import IA3, Dora, Factor, GLoRA, LoHa, LoKr
from inkstream.weights.lora.names import COMMON, TEXT, Names, Place, read_key
from inkstream.weights.lora.rotations import InputRotation, OutputRotation, peft_boft, peft_oft

FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What PEFT and diffusers call the file in a folder."""

TRIGGERS = ("modelspec.trigger_phrase", "trigger_word", "trigger", "ss_trigger")
BASES = ("ss_base_model_version", "modelspec.architecture", "base_model", "base_model_name_or_path")
"""Entries of the metadata, the best first."""

UNSUPPORTED = {
    "lora_mid": "a factor of a convolution",
    "bm": "a factor of a convolution",
    "hada_t1": "a factor of a convolution",
    "hada_t2": "a factor of a convolution",
    "lokr_t1": "a factor of a convolution",
    "lokr_t2": "a factor of a convolution",
    "oft_diag": "OFT of an early LyCORIS",
    "set_bias": "another bias",
    "reshape_weight": "a layer of another size",
}
"""Roles of tensors that no layer of our models can take -> what they are."""

PAIRS = (
    ("down", "up"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("a1", "a2", "b1", "b2"),
    ("on_input", "weight"),
)
"""Roles of tensors that need one another."""

COMPANIONS = {
    "dora_scale": ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a"),
    "magnitude": ("up",),
    "up_bias": ("up",),
    "alpha": ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks", "a1", "diff", "on_input"),
    "rescale": ("oft_blocks",),
    "boft_s": ("boft_R",),
    "lokr_w1": ("lokr_w2", "lokr_w2_a"),
    "lokr_w1_a": ("lokr_w2", "lokr_w2_a"),
    "lokr_w2": ("lokr_w1", "lokr_w1_a"),
    "lokr_w2_a": ("lokr_w1", "lokr_w1_a"),
}
"""Role of a tensor -> roles of which it needs one."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The tensors of one layer of a file. path: in its layout. keys, tensors: by role; tensors are float32."""

    path: str
    place: Place
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]


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
        layer = Layer(path, places[path], own, {role: _finite(key, tensors[key]) for role, key in own.items()})
        _check_complete(layer)
        changes = _changes(layer, config, names)
        bias = _bias(layer, config)
        known = layers.setdefault(layer.place.layer, [])
        if changes and (others := _overlapping(known, layer.place)):
            if not _equal(others, changes, layer.place):
                raise InputError(f"{path} changes rows of {layer.place.layer} that another key changes: remove one")
            repeated.append(path)
            continue
        for change in changes:
            _check_shape(change, layer, tensors, names)
            ordered = change if layer.place.order is None else reorder(change, layer.place.order)
            whole = layer.place.height == names.layers[layer.place.layer][0]
            known.append(Part(ordered, slice(None) if whole else layer.place.rows))
        if bias is not None:
            ours = biases.setdefault(layer.place.layer, torch.zeros(names.layers[layer.place.layer][0]))
            if bias.shape != (layer.place.height,):
                raise InputError(
                    f"{path} has a bias of shape {tuple(bias.shape)}, but this model's has {layer.place.height}"
                )
            ours[layer.place.rows] += bias if layer.place.order is None else bias[layer.place.order]
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


def _changes(layer: Layer, config: peft.Config, names: Names) -> list[Change]:
    """The changes of one layer's weight, by the roles of its tensors."""
    own, height = layer.tensors, layer.place.height
    size = height, names.layers[layer.place.layer][1]
    found: list[Change] = []
    if "up" in own:
        down, up = _matrix(own["down"]), _matrix(own["up"])
        if up.shape[1] != len(down):
            raise InputError(
                f"{layer.keys['up']} is {_by(up.shape)}, its other half {_by(down.shape)}: download the file again"
            )
        if len(down) > max(size):
            raise InputError(f"{layer.keys['down']} has rank {len(down)}, its layer is {_by(size)}: take another file")
        found.append(LowRank(down, up, _scale(layer, config, len(down))))
    if "hada_w1_a" in own:
        a1, b1, a2, b2 = (own[name] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        found.append(LoHa(a1, b1, a2, b2, _scale(layer, config, len(b1))))
    if "lokr_w1" in own or "lokr_w1_a" in own:
        found.append(_lokr(layer, config))
    if (scale := own.get("dora_scale", own.get("magnitude"))) is not None:
        found = [Dora(change, _lines(scale, size, layer, "dora_scale" if "dora_scale" in own else "magnitude"))
                 for change in found]  # fmt: skip
    if "a1" in own:
        a1, a2, b1, b2 = (own[name] for name in ("a1", "a2", "b1", "b2"))
        found.append(GLoRA(a1, a2, b1, b2, _scale(layer, config, len(b2))))
    if "oft_blocks" in own:
        limit = float(own["alpha"]) * height if "alpha" in own else 0.0
        rescale = own["rescale"].reshape(-1, 1) if "rescale" in own else None
        if own["oft_blocks"].ndim not in (3, 4) or own["oft_blocks"].shape[-3:-1].numel() != height:
            raise InputError(_misfit(layer, "oft_blocks", (height,)))
        if rescale is not None and len(rescale) != height:
            raise InputError(_misfit(layer, "rescale", (height,)))
        found.append(OutputRotation(own["oft_blocks"], size, limit, rescale))
    if "oft_R" in own:
        entries = config.entries
        terms = entries.get("num_cayley_neumann_terms", 5) if entries.get("use_cayley_neumann", True) else None
        eps = entries.get("eps", 6e-5) if entries.get("coft") else None
        try:
            found.append(InputRotation(peft_oft(own["oft_R"], size[1], terms, eps), size))
        except ValueError as error:
            raise InputError(f"{layer.keys['oft_R']}: {error}: use an adapter made for this model") from error
    if "boft_R" in own:
        if own["boft_R"].ndim != 4 or own["boft_R"].shape[1:3].numel() != size[1]:
            raise InputError(_misfit(layer, "boft_R", (size[1],)))
        rescale = own["boft_s"].reshape(-1, 1) if "boft_s" in own else torch.ones(height, 1)
        found.append(InputRotation(peft_boft(own["boft_R"]), size, rescale))
    if "ia3_l" in own:
        gain = _lines(own["ia3_l"] - 1, size, layer, "ia3_l")
        if gain.shape == (height, 1) and layer.place.layer in names.biased:
            raise InputError(
                f"{layer.keys['ia3_l']} scales the bias of {layer.place.layer} too, which is not supported: use a LoRA"
            )
        found.append(IA3(gain, size))
    if "on_input" in own:
        shape = (1, -1) if own["on_input"].item() else (-1, 1)
        gain = own["weight"].reshape(shape)
        if gain.numel() != size[1 if own["on_input"].item() else 0]:
            raise InputError(_misfit(layer, "weight", size))
        found.append(IA3(gain, size))
    if "diff" in own:
        found.append(Full(_matrix(own["diff"])))
    if "set_weight" in own:
        found.append(Replacement(_matrix(own["set_weight"])))
    return found


def _lokr(layer: Layer, config: peft.Config) -> LoKr:
    def factor(name: str) -> Factor:
        own = layer.tensors
        return own[name] if name in own else (own[f"{name}_a"], own[f"{name}_b"])

    change = LoKr(factor("lokr_w1"), factor("lokr_w2"))
    if config.kind == "LOKR":  # PEFT's scale is alpha / r in any case
        scale = config.scale(layer.path, config.rank(layer.path))
    else:
        scale = 1.0 if change.rank is None else _scale(layer, config, change.rank)
    return LoKr(change.w1, change.w2, scale)


def _scale(layer: Layer, config: peft.Config, rank: int) -> float:
    """alpha / r. The file's own alpha comes first, then PEFT's configuration; without both it is 1."""
    if "alpha" in layer.tensors:
        return float(layer.tensors["alpha"]) / rank
    return config.scale(layer.path, rank)


def _bias(layer: Layer, config: peft.Config) -> Tensor | None:
    """The change of the bias, if there is one."""
    own = layer.tensors
    found = [own[role] for role in ("diff_b", "b_norm") if role in own]
    if "up_bias" in own:
        found.append(_scale(layer, config, len(own["down"])) * own["up_bias"])
    return torch.stack(found).sum(0) if found else None


def _check_complete(layer: Layer) -> None:
    own = layer.keys
    if own.keys() <= {"weight"}:
        raise InputError(f"{own['weight']} is a whole weight, as a model has it: give an adapter")
    for role in own:
        if role in UNSUPPORTED:
            raise InputError(f"{own[role]} is {UNSUPPORTED[role]}, which is not supported: use another adapter")
    for roles in PAIRS:
        missing = [role for role in roles if role not in own]
        if missing and len(missing) < len(roles):
            present = next(own[role] for role in roles if role in own)
            raise InputError(f"{present} is there, but {layer.path} lacks {few(missing)}: download the file again")
    for role, others in COMPANIONS.items():
        if role in own and not any(other in own for other in others):
            missing = " or ".join(others)
            raise InputError(f"{own[role]} is there, but {layer.path} lacks {missing}: download the file again")
    if "w_norm" in own:
        raise InputError(f"{own['w_norm']} is a change of a norm, but {layer.path} is a linear layer: use another file")


def _check_shape(change: Change, layer: Layer, tensors: Mapping[str, Tensor], names: Names) -> None:
    expected = layer.place.height, names.layers[layer.place.layer][1]
    if change.shape != expected:
        raise InputError(
            f"{layer.path} is {_by(change.shape)} there, but {_by(expected)} in this model: "
            f"{_made_for(tensors, names) or 'use an adapter made for this model'}"
        )


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


def _matrix(tensor: Tensor) -> Tensor:
    """A matrix, which may be stored as a convolution of size 1."""
    return tensor.flatten(1) if tensor.ndim > 2 and tensor.shape[2:].numel() == 1 else tensor


def _lines(values: Tensor, size: tuple[int, int], layer: Layer, role: str) -> Tensor:
    """Factors of rows as (O, 1), or of columns as (1, I). Without a second axis they are of rows."""
    flat = values.flatten()
    if values.ndim >= 2 and values.shape[0] == 1 and len(flat) == size[1]:
        return flat[None]
    if len(flat) == size[0]:
        return flat[:, None]
    raise InputError(_misfit(layer, role, size))


def _misfit(layer: Layer, role: str, size: tuple[int, ...]) -> str:
    shape = _by(layer.tensors[role].shape)
    return f"{layer.keys[role]} is {shape}, which does not fit {_by(size)} in this model: use another adapter"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


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
