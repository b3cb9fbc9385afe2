"""Writes an adapter's file in the dialects that other programs read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inkstream.disk import whole_file
from inkstream.types import InputError
from inkstream.weights.files import write_state
from inkstream.weights.lora import peft
from inkstream.weights.lora.changes import Change, Full, Lora, LowRank
from inkstream.weights.lora.cuts import Reordered, reorder, rows_of
from inkstream.weights.lora.factors import IA3, Dora, Factor, GLoRA, LoHa, LoKr
from inkstream.weights.lora.names import Names
from inkstream.weights.lora.rotations import OutputRotation


@dataclass(frozen=True)
class Dialect:
    """How keys are written. prefix: of all keys. underscores: the paths have them in place of dots.

    down, up: suffixes of LoRA's halves. magnitude: of DoRA's norms. alpha: the scale has a key of its own; without,
    it is multiplied into `up`. lycoris: the other algebras have LyCORIS' suffixes; without, they cannot be written.
    """

    prefix: str
    underscores: bool = False
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    magnitude: str = "dora_scale"
    alpha: bool = False
    lycoris: bool = True


DIALECTS = {
    "kohya": Dialect("lora_unet_", True, "lora_down.weight", "lora_up.weight", alpha=True),
    "comfyui": Dialect("diffusion_model."),
    "diffusers": Dialect("transformer.", magnitude="lora_magnitude_vector", lycoris=False),
    "peft": Dialect("base_model.model.", magnitude="lora_magnitude_vector", lycoris=False),
    "lycoris": Dialect("lycoris_", True, "lora_down.weight", "lora_up.weight", alpha=True),
}
"""kohya: musubi and web UIs too. comfyui: ai-toolkit too. peft: a folder. lycoris: SimpleTuner too."""

OF_DIALECTS = ("ss_network_module", "ss_network_args")
"""Entries of the metadata that are of the dialect of the file that an adapter came from."""

MODULES = {"kohya": "networks.lora", "lycoris": "lycoris.kohya"}
"""Dialect -> the program of training that its metadata name."""


def write_lora(
    path: Path | str,
    lora: Lora,
    names: Names,
    dialect: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter as a safetensors file, or as a folder in the dialect `peft`, and return the file.

    metadata: entries for the file's header, beside those that are in `lora.metadata` and those that are made of the
    changes: the rank, PEFT's configuration, and hashes of the tensors. dtype: of the tensors. Raises InputError if the
    dialect is unknown, or cannot hold a change.
    """
    if dialect not in DIALECTS:
        raise InputError(f"the dialect {dialect} is unknown: take {', '.join(DIALECTS)}")
    way, path = DIALECTS[dialect], Path(path)
    for layer, changed in lora.layers.items():
        for part in changed.parts:
            if part.change.algebra not in ("LoRA", "DoRA"):
                _lycoris_only(way, dialect, f"the {part.change.algebra} of {layer}")
    changes = _changes(lora, names, names.written[dialect])
    state: dict[str, Tensor] = {}
    for their, (change, bias) in changes.items():
        start = way.prefix + (their.replace(".", "_") if way.underscores else their)
        tensors = _spell(their, change, way)
        if bias is not None:
            _lycoris_only(way, dialect, f"the change of the bias of {their}")
            tensors["diff_b"] = bias
        state |= {f"{start}.{suffix}": tensor for suffix, tensor in tensors.items()}
    if lora.vectors or lora.replaced:
        _lycoris_only(way, dialect, f"the change of {next(iter([*lora.vectors, *lora.replaced]))}")
    for name, value in lora.vectors.items():
        start = way.prefix + (name.replace(".", "_") if way.underscores else name)
        state[f"{start.removesuffix('_weight').removesuffix('.weight')}.diff"] = value
    for name, value in lora.replaced.items():
        start = way.prefix + (name.replace(".", "_") if way.underscores else name)
        state[f"{start.removesuffix('_weight').removesuffix('.weight')}.set_weight"] = value
    if not state:
        raise InputError("the adapter changes nothing, so there is nothing to write: train it on some layers")
    state = {
        key: tensor.detach().to(torch.float32 if key.endswith(".alpha") else dtype).contiguous()
        for key, tensor in state.items()
    }
    kept = {key: value for key, value in lora.metadata.items() if key not in (*OF_DIALECTS, peft.METADATA)}
    said = {**kept, **_describe(state, changes, dialect), **(metadata or {})}
    config = _peft_config(changes) if not way.lycoris else {}
    if dialect == "peft":
        path.mkdir(parents=True, exist_ok=True)
        with whole_file(path / peft.FILE) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        path = path / "adapter_model.safetensors"
    elif config:
        said[peft.METADATA] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    write_state(path, state, said)
    return path


def _changes(lora: Lora, names: Names, layout: str) -> dict[str, tuple[Change | None, Tensor | None]]:
    """Path in a layout -> the change of that layer's weight, and of its bias."""
    if unknown := [path for path in lora.layers if path not in names.layers]:
        raise InputError(f"the adapter changes {unknown[0]}, which is not a layer of this model: use one made for it")
    found: dict[str, tuple[Change | None, Tensor | None]] = {}
    for their, place in names.places(layout).items():
        if (layer := lora.layers.get(place.layer)) is None:
            continue
        change = rows_of(layer.parts, place.rows, names.layers[place.layer][0], place.layer)
        bias = None if layer.bias is None else layer.bias[place.rows]
        if place.order is not None:
            back = place.order.argsort()
            change, bias = None if change is None else reorder(change, back), None if bias is None else bias[back]
        bias = bias if bias is not None and bias.any() else None
        if change is not None or bias is not None:
            found[their] = change, bias
    return found


def _spell(their: str, change: Change | None, way: Dialect) -> dict[str, Tensor]:
    """The tensors of a change, by their suffixes."""
    match change:
        case None:
            return {}
        case LowRank():
            scaled = {way.down: change.down, way.up: change.up}
            if way.alpha:
                return {**scaled, **_alpha(change.scale, change.rank)}
            return {**scaled, way.up: change.up * change.scale}
        case Dora(change=inner, magnitude=magnitude) if not isinstance(inner, Full | Reordered):
            if way.magnitude != "dora_scale" and change.axis == 0:
                raise InputError(f"the DoRA of {their} has norms of columns: write it in the dialect lycoris")
            norms = magnitude if way.magnitude == "dora_scale" else magnitude[:, 0]
            return {**_spell(their, inner, way), way.magnitude: norms}
        case LoHa():
            factors = {"hada_w1_a": change.a1, "hada_w1_b": change.b1, "hada_w2_a": change.a2, "hada_w2_b": change.b2}
            return {**factors, **_alpha(change.scale, change.rank)}
        case LoKr():
            return _spell_lokr(change)
        case GLoRA():
            factors = {f"{name}.weight": getattr(change, name) for name in ("a1", "a2", "b1", "b2")}
            return {**factors, **_alpha(change.scale, change.rank)}
        case IA3():
            return {"weight": change.gain.flatten(), "on_input": torch.tensor(float(change.on_input))}
        case OutputRotation():
            limit = {"oft_blocks": change.blocks, "alpha": torch.tensor(change.limit / change.shape[0])}
            return limit if change.rescale is None else {**limit, "rescale": change.rescale}
        case Full():
            return {"diff": change.change}
        case Reordered() if not change.reads:
            return {"diff": change.delta(None)}
        case _:
            raise InputError(f"the {change.algebra} of {their} has no form in files: merge it, or write another change")


def _spell_lokr(change: LoKr) -> dict[str, Tensor]:
    """The factors of a LoKr. Its scale has a key only if a factor is low-rank, else it is multiplied into w1."""

    def factor(name: str, own: Factor, scale: float) -> dict[str, Tensor]:
        return {name: own * scale} if isinstance(own, Tensor) else {f"{name}_a": own[0] * scale, f"{name}_b": own[1]}

    rank = change.rank
    w1 = factor("lokr_w1", change.w1, change.scale if rank is None else 1.0)
    return {**w1, **factor("lokr_w2", change.w2, 1.0), **({} if rank is None else _alpha(change.scale, rank))}


def _alpha(scale: float, rank: int) -> dict[str, Tensor]:
    return {"alpha": torch.tensor(scale * rank)}


def _lycoris_only(way: Dialect, dialect: str, what: str) -> None:
    if not way.lycoris:
        raise InputError(f"{what} cannot be written in the dialect {dialect}: take comfyui, kohya or lycoris")


def _peft_config(changes: Mapping[str, tuple[Change | None, Tensor | None]]) -> dict[str, object]:
    ranks = {path: change.rank for path, (change, _) in changes.items() if change is not None and change.rank}
    doras = [isinstance(change, Dora) for change, _ in changes.values()]
    if any(doras) and not all(doras):
        raise InputError("some layers have a DoRA and some a LoRA: write it in the dialect comfyui, kohya or lycoris")
    return peft.write_config(ranks, any(doras))


def _describe(
    state: Mapping[str, Tensor], changes: Mapping[str, tuple[Change | None, Tensor | None]], dialect: str
) -> dict[str, str]:
    """The entries of the metadata that follow from the changes. The hashes are those of all bytes of the tensors.

    The first 12 digits of `sshs_model_hash` are what A1111 writes into pictures as the hash of a LoRA.
    """
    hashed = hashlib.sha256()
    for _, tensor in sorted(state.items(), key=lambda item: -item[1].element_size()):  # the order in the file
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.hash_sha256": f"0x{hashed.hexdigest()}",
        "sshs_model_hash": hashed.hexdigest(),
    }
    ranked = [change for change, _ in changes.values() if change is not None and change.rank]
    if dialect in MODULES:
        said["ss_network_module"] = MODULES[dialect]
    if ranked:
        first, change = ranked[0].rank or 0, ranked[0]
        change = change.change if isinstance(change, Dora) else change
        scale = getattr(change, "scale", 1.0) if DIALECTS[dialect].alpha else 1.0
        said |= {"ss_network_dim": str(first), "ss_network_alpha": f"{scale * first:g}"}
    return said
