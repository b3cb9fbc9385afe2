"""Builds or loads the parts that a run starts from, and exports the trained model as a folder."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inkstream.disk import whole_folder
from inkstream.engine.files.cards import write_card
from inkstream.engine.files.convert import tokenizer_class
from inkstream.engine.files.parts import Found, locate_part
from inkstream.engine.files.quantise import QUANTS, prepare
from inkstream.engine.files.sources import locate
from inkstream.engine.files.tokenizers import encoder_of, read_words, tokenizer_of
from inkstream.engine.machine.install import Placement, install
from inkstream.engine.machine.loader import read, vocabulary_of, weights_of
from inkstream.families import CARD, FAMILIES, SPECS, Family, Part, family_of
from inkstream.quant.packed import Packed, Weight, unpack
from inkstream.train.adapters import AdapterWeights, slots_of
from inkstream.train.optim import reads_time
from inkstream.train.recipe import Model, Recipe
from inkstream.types import InputError, Spec
from inkstream.weights.files import read_state, write_state
from inkstream.weights.keymap import translate

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPENED_LATE = "final_layer.linear."
"""Layers with zero initial weights: the first prediction is then no worse than the mean."""


@dataclass(frozen=True)
class Start:
    """The parts that a run starts from. A run of an autoencoder has only the module `vae` and no tokenizers."""

    kind: type[Family]
    spec: Spec
    modules: dict[str, nn.Module]  # float32, on the CPU; of a run of an adapter, as `read_frozen` places them
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)  # each tokenizer's files by name
    found: dict[str, Found] = field(default_factory=dict)  # the parts that were read from files
    adapter: AdapterWeights | None = None  # what learns in the transformer's place

    def family(self) -> Family:
        return self.kind(self.spec, self.modules, self.tokenizers)


def start(recipe: Recipe, device: torch.device = CPU) -> Start:
    """Build or read the parts that the recipe names. Raises InputError if sizes or files do not fit.

    device: of the run. The parts come there at once if the recipe trains an adapter, which leaves them as they are.
    """
    model = recipe.model
    alone = recipe.objective.kind == "autoencoder"
    found: dict[str, Found] = {}
    configs: dict[str, Any] = {}
    shift, name = model.shift or None, model.name
    words: dict[str, dict[str, bytes]] = {}
    source = locate(model.from_) if model.from_ and not alone else None
    if source is not None:
        kind, found = source.family, dict(source.parts)
        words = {name: read_words(folder) for name, folder in source.tokenizers.items()}
        name = name or source.spec.name
    elif model.family in FAMILIES:
        kind = family_of(model.family)
        words = {} if alone else {name: words_named(model.tokenizer, name) for name in kind.tokenizers}
        if alone and model.from_:
            found["vae"] = locate_part(kind, "vae", model.from_)
    else:
        raise InputError(f"[model] family = {model.family!r} is not known: take {', '.join(FAMILIES)}")
    tokenizers = {name: tokenizer_of(kind.tokenizers[name], files) for name, files in words.items()}
    for part in ("vae",) if alone else [name for name, part in kind.parts.items() if name in found or not part.repo]:
        table = dict(getattr(model, part, {}))
        if "from" in table:
            found[part] = locate_part(kind, part, table["from"])
        if part in found:
            configs[part] = found[part].config
        else:
            configs[part] = read_sizes(kind.parts[part], part, table, {})
    if not alone:
        _join(kind, model, configs, found, tokenizers)
    if source is not None:
        spec = replace(source.spec, name=name, **configs)
    elif alone:
        known = next(spec for spec in SPECS.values() if family_of(spec.family) is kind)
        spec = replace(known, vae=configs["vae"])
    else:
        spec = kind.recognise(configs, _documents(shift), name or "trained")
    wanted = {"steps": model.steps, "guidance": model.guidance, "shift": model.shift, "title": model.title}
    wanted["shift_rule"] = "fixed" if model.shift else None
    spec = replace(
        spec, **{k: v for k, v in wanted.items() if v}, size=recipe.data.sizes[0], repo=None, download_bytes=None
    )

    def module_of(part: str, config: Any) -> nn.Module:
        if part not in found:
            return build(kind.parts[part], config, recipe.run.seed)
        if recipe.adapter.kind != "none":
            return read_frozen(kind, part, found[part], recipe, device)
        return read(found[part], Placement(CPU, torch.float32, rules=found[part].rules), packed=False)

    modules = {part: module_of(part, config) for part, config in configs.items()}
    if recipe.adapter.kind == "none":
        return Start(kind, spec, modules, tokenizers, words, found)
    slots = slots_of(spec, recipe.adapter)
    adapter = AdapterWeights(modules["transformer"], slots, recipe.adapter, recipe.run.seed).to(device)
    return Start(kind, spec, modules, tokenizers, words, found, adapter)


def read_frozen(kind: type[Family], part: str, found: Found, recipe: Recipe, device: torch.device) -> nn.Module:
    """Read a part that does not learn.

    The transformer stays on the device, or its blocks visit it; it is packed as [adapter] base says. The other parts
    are on the device only while they compute: they encode pictures and captions once, and draw previews.
    """
    settings = recipe.adapter
    dtype = torch.float32 if part == "vae" else DTYPES[recipe.run.dtype]  # latents are encoded once: exactly
    stays = part == "transformer" and not settings.stream
    base = settings.base if part == "transformer" else ""

    @contextmanager
    def weights() -> Generator[Mapping[str, Weight]]:
        with weights_of(found, dtype, packed=True) as state:
            yield prepare(state, kind.parts[part], QUANTS[base]) if base else state

    placement = Placement(device, dtype, "resident" if stays else "visiting", found.rules)
    return install(part, found.module, weights(), placement)


def _documents(shift: float | None) -> dict[str, dict[str, Any]]:
    """Return the shift as the scheduler config of a model folder."""
    return {} if shift is None else {"scheduler/scheduler_config.json": {"shift": shift}}


def read_sizes(part: Part, name: str, table: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Return a part's config from a recipe's table. Raises InputError for an unknown size or a wrong type."""
    known = {f.name: f.default for f in fields(part.config)}
    values = dict(given)
    for key, value in table.items():
        if key not in known:
            raise InputError(f"[model.{name}] has no size {key}: it takes from, {', '.join(known)}")
        value = tuple(value) if isinstance(value, list) else value
        default = known[key]
        kinds = (int, float) if isinstance(default, float) else int if default is None else type(default)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise InputError(f"[model.{name}] {key} = {value!r}: give a value like {default!r}")
        values[key] = value
    return part.config(**values)


def _join(
    kind: type[Family], model: Model, configs: dict[str, Any], found: Mapping[str, Found], tokenizers: Mapping[str, Any]
) -> None:
    """Fill in sizes that two parts share if the recipe leaves them out. Raises InputError if shared sizes differ."""
    for name, tokenizer in tokenizers.items():
        part, used = encoder_of(name), vocabulary_of(tokenizer)
        if part not in found and "vocab_size" not in getattr(model, part, {}):
            configs[part] = replace(configs[part], vocab_size=-(-used // 64) * 64)
        if configs[part].vocab_size < used:
            size = f"vocab_size of [model.{part}] is {configs[part].vocab_size}"
            raise InputError(f"{size}, but the tokenizer has {used} tokens: raise it, or take another tokenizer")
    for ours, theirs in kind.joints:
        (a, own), (b, other) = ours.split("."), theirs.split(".")
        if b not in configs:
            continue
        wanted = getattr(configs[b], other)
        if a not in found and own not in getattr(model, a) and own in {f.name for f in fields(configs[a])}:
            configs[a] = replace(configs[a], **{own: wanted})
        if getattr(configs[a], own) != wanted:
            got = getattr(configs[a], own)
            raise InputError(f"[model.{a}] {own} is {got}, the {b}'s {other} is {wanted}: make them equal")


def build(part: Part, config: Any, seed: int) -> nn.Module:
    """Build a new part with initial weights. Raises InputError if its sizes are not possible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = part.build(config)
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError) as error:
            raise InputError(f"a model with the sizes {config} cannot be built ({error})") from error
        initialise(module)
    return module


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Set initial weights, drawn from torch's generator.

    Linear layers keep the variance of their input. Modulation layers get a tenth of that standard deviation.
    Convolutions keep torch's default initialisation.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            small = 0.1 if reads_time(name) else 1.0
            nn.init.normal_(child.weight, std=small / math.sqrt(child.in_features))
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight)
    for name, weight in module.named_parameters():
        if name.startswith(OPENED_LATE):
            nn.init.zeros_(weight)
        elif name.endswith("pad_token"):
            nn.init.normal_(weight, std=0.02)


# The tokenizer ------------------------------------------------------------------------------------------------------


def words_named(place: str, name: str) -> dict[str, bytes]:
    """Return a tokenizer's files by name.

    place: "pocket" for Pocket's own tokenizer, or a folder. If the folder has a subfolder `name`, that one is read.
    """
    if place == "pocket":
        from inkstream.pocket.tokenizer import save_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(Path(folder))
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    folder = Path(place).expanduser()
    return read_words(folder / name if (folder / name).is_dir() else folder)


def words_key(words: Mapping[str, Mapping[str, bytes]]) -> str:
    """Return a hash of the tokenizer files that the tokens depend on."""
    names = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
    read = [files.get(name, b"") for files in words.values() for name in names]
    return hashlib.sha256(b"".join(read)).hexdigest()


# Export -------------------------------------------------------------------------------------------------------------


def export(begun: Start, spec: Spec, states: Mapping[str, Mapping[str, Tensor]], folder: Path, dtype: str) -> Path:
    """Write the model as a diffusers folder, which `inkstream.load` reads. A run of an autoencoder writes only `vae`.

    states: new weights of the trained parts, with inkstream's names; other parts keep their weights. An existing folder
    is replaced when the new one is complete.
    """
    with whole_folder(folder, replace=True) as temporary:
        documents: dict[str, Any] = {**begun.kind.documents(spec), CARD: write_card(spec)}
        for name, files in begun.words.items():
            documents["model_index.json"] |= tokenizer_class(name, files.get("tokenizer_config.json", b"{}"))
        whole = "transformer" in begun.modules
        for name, content in documents.items():
            if whole or name == "vae/config.json":
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if whole:
            for tokenizer, files in begun.words.items():
                (temporary / tokenizer).mkdir()
                for name, content in files.items():
                    (temporary / tokenizer / name).write_bytes(content)
        for name, module in begun.modules.items():
            part = begun.kind.parts[name]
            state = {**_unread(begun, spec, name), **module.state_dict(), **states.get(name, {})}
            kept = torch.float32 if name == "vae" and dtype == "fp16" else DTYPES[dtype]
            state = {key: tensor.detach().to("cpu", kept) for key, tensor in state.items()}
            library = documents["model_index.json"][name][0]
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            rules = part.layouts.get("diffusers", ())
            (temporary / name).mkdir(exist_ok=True)
            path = temporary / name / f"{stem}.safetensors"
            write_state(path, translate(rules, state, back=True), shard_bytes=5_000_000_000)
    return folder


def _unread(begun: Start, spec: Spec, name: str) -> dict[str, Tensor]:
    """Return weights that published files hold and the module does not use: the original ones, or neutral ones."""
    part = begun.kind.parts[name]
    if name in begun.found:
        found = begun.found[name]
        ours = begun.modules[name].state_dict()
        state = translate(found.rules, read_state(found.path)) if len(found.tensors) > len(ours) else {}
        return {
            key: unpack(weight) if isinstance(weight, Packed) else weight
            for key, weight in state.items()
            if key not in ours
        }
    return dict(part.neutral(getattr(spec, name)))
