"""A recipe is a TOML file that describes a training run. It becomes frozen dataclasses; unknown keys are errors."""

# ruff: noqa: RUF009 (key() returns a field)
from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from inkstream.types import InputError

T = TypeVar("T")
Table = dict[str, Any]


def key(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    """Return a dataclass field for a recipe key: default, meaning, and the lowest and highest allowed number."""
    metadata = {"text": text, "low": low, "high": high}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    """The model to train: existing weights, or the sizes of a new model's parts."""

    name: str = key("", "Name of the exported model. If empty, the name of the run's folder.")
    title: str = key("", "One-line description of the exported model. If empty, the starting model's title.")
    from_: str = key("", "Starting weights: a known model, OWNER/NAME, a folder or a file. If empty, a new model.")
    family: str = key("zimage", "Family of a new model.")
    train: tuple[str, ...] = key(
        (),
        "Parts to train. flow: transformer (if empty), text_encoder, or both; or control alone. autoencoder: vae (if "
        "empty) or vae.decoder.",
    )
    only: tuple[str, ...] = key(
        (), "Patterns of the weights that learn, such as `layers.*.attention.*`; the others stay. If empty, all."
    )
    tokenizer: str = key("pocket", "Tokenizer of a new model: a folder with tokenizer.json, or pocket.")
    transformer: Table = key({}, "Sizes of a new transformer, named as in its config; or `from`, a folder or file.")
    text_encoder: Table = key({}, "The same for the text encoder. The default vocab_size fits the tokenizer.")
    vae: Table = key({}, "The same for the autoencoder.")
    steps: int = key(0, "Default sampling steps of the exported model and previews; 0: the family's default.", 0, 1000)
    guidance: float = key(0.0, "Default guidance of the exported model; 0: the family's default.", 0, 100)
    shift: float = key(0.0, "Default time shift of the exported model; 0: the family's default.", 0, 100)


@dataclass(frozen=True)
class Adapter:
    """A LoRA or a relative of it, which is trained beside a transformer whose own weights stay as they are."""

    kind: Literal["none", "lora", "rslora", "dora", "lokr"] = key(
        "none",
        "none trains the model's own weights. lora: scale alpha / rank (arXiv 2106.09685). rslora: scale "
        "alpha / sqrt(rank) (arXiv 2312.03732). dora: lora, and norms that learn (arXiv 2402.09353). lokr: Kronecker "
        "products (arXiv 2309.14859).",
    )
    rank: int = key(32, "Rank of each layer's change.", 1, 4096)
    alpha: float = key(0.0, "Scale of the change, see `kind`; 0: equal to the rank.", 0)
    factor: int = key(8, "lokr: the most for a side of the first factor, which divides the layer's side.", 1, 4096)
    layers: tuple[str, ...] = key(
        (),
        "Patterns of the layers that change, such as `layers.*.attention.*`, in our names or those of `format`. If "
        "empty: attention and feed-forward of all blocks but refiners.",
    )
    format: Literal["comfyui", "kohya", "diffusers", "lycoris"] = key(
        "comfyui", "Names in the adapter's file; comfyui is ai-toolkit's too, and kohya is musubi-tuner's."
    )
    base: Literal["", "fp8", "int8", "nf4", "int4", "q8_0", "q6_k", "q5_k", "q4_k"] = key(
        "",
        "Number format that the frozen transformer is packed to when it is read. If empty, it stays as it is in its "
        "files, which may be packed already (fp8, nf4, GGUF); weights that are not packed have the run's `dtype`.",
    )
    assistant: str = key(
        "",
        "An adapter's file, such as a de-distillation adapter, that is on while this one learns. It is neither in "
        "previews nor in the result.",
    )
    transfer: str = key(
        "",
        "A distilled model of the same architecture. At the end, it draws the prompts in its few steps, with and "
        "without the adapter, into previews/transfer.png.",
    )
    stream: bool = key(
        False,
        "The transformer's blocks stay in host memory, and each is on the device only while it computes. Includes "
        "`checkpointing`.",
    )


@dataclass(frozen=True)
class Control:
    """A ControlNet, if [model] train = ["control"]. The model itself stays as it is."""

    kind: str = key("", "Kind of net, of those that the family has. If empty, the family's first.")
    map: str = key(
        "canny",
        "The map of each picture that the net sees: one that `inkstream control` draws, or a folder that has a picture "
        "with the name of each picture of `source`.",
    )
    mode: str = key("", "Mode that the net is told, for kinds of nets that are told one.")
    sizes: Table = key({}, "Sizes of the net, named as in its config. The defaults fit the model.")


@dataclass(frozen=True)
class Data:
    """The training data."""

    source: str = key(
        "scenes",
        "scenes: rendered scenes with captions. edits: pairs of scenes, before and after an edit, with instructions. "
        "Else a folder of pictures with captions.",
    )
    references: tuple[str, ...] = key(
        (),
        "Folders of reference pictures: each has a picture with the name of each picture of `source`, which is drawn "
        "from them. The captions are then instructions.",
    )
    sizes: tuple[tuple[int, int], ...] = key(
        ((128, 128),), "Widths and heights in pixels. Each picture gets the size with the nearest aspect ratio."
    )
    buckets: int = key(
        0,
        "If above 0, each picture of a folder has a training size of its own, with sides that are multiples of this: "
        "at most as many pixels as the first of `sizes`, and never larger than the picture.",
        0,
    )
    trigger: str = key(
        "",
        "Words for what is taught. They replace [trigger] in a caption, or go before a caption without them.",
    )
    repeats: int = key(1, "How often each picture of the folder comes in an epoch.", 1, 10_000)
    prior: str = key("", "Folder of other pictures of the same class, so that the model keeps what it knows of it.")
    prior_caption: str = key("", "Caption of the pictures in `prior` that have none, such as `a mug`.")
    prior_weight: float = key(1.0, "Weight of the loss on the pictures in `prior`.", 0, 100)
    prior_by: Literal["pictures", "model"] = key(
        "pictures",
        "What an adapter learns from `prior`. pictures: to draw them. model: to answer as the model does without the "
        "adapter, from the same noisy picture and caption (output preservation).",
    )
    mask: str = key(
        "", "Where the loss counts: `alpha` takes the pictures' transparency; a folder has a white-on-black NAME.png "
        "for each picture. If empty, everywhere.",
    )  # fmt: skip
    mask_floor: float = key(0.0, "Weight of the loss where a mask is black.", 0, 1)
    count: int = key(
        20_000, "Number of scenes that are drawn and cached; 0 draws new scenes for each batch (autoencoder only).", 0
    )
    first: int = key(0, "Index of the first scene.", 0)
    captions: int = key(4, "Captions of each scene. Each epoch uses a random one of them.", 1, 64)
    crop: int = key(0, "Side of random crops in pixels (autoencoder only); 0 uses whole pictures.", 0)
    cache: str = key("cache", "Folder of the cached pictures, latents, tokens and text encoder states.")
    workers: int = key(1, "Processes that draw scenes or open pictures; 0 uses the training process.", 0, 256)
    pool: int = key(16, "Batches in a pool. Samples are sorted by caption length inside a pool.", 1)
    grammar: Table = key({}, "The distribution of scenes: see Grammar in `pocket/grammar.py`.")
    wording: Table = key({}, "The kinds of captions: see Wording in `pocket/captions.py`.")


@dataclass(frozen=True)
class Objective:
    """The training objective."""

    kind: str = key(
        "flow",
        "flow trains a transformer on latents, autoencoder trains a vae, distil trains a transformer to draw in few "
        "steps, reinforce trains a transformer on rewards of its pictures.",
    )
    mean: float = key(0.0, "Mean of the logit-normal times. Above 0, noisier times are more frequent.", -10, 10)
    std: float = key(1.0, "Standard deviation of the times' logit.", 0, 10)
    uniform: float = key(0.1, "Share of samples with times uniform in [0, 1] before the shift.", 0, 1)
    high: float = key(0.0, "Share of samples with times uniform in [`high_from`, 1].", 0, 1)
    high_from: float = key(0.94, "Lowest time of the `high` samples.", 0, 1)
    shift: float = key(1.0, "Time shift of all samples but the `high` ones. Above 1, times are noisier.", 0.01, 100)
    dropout: float = key(0.1, "Share of captions replaced by the empty one. Guidance needs this.", 0, 1)
    weight: Literal["velocity", "image"] = key(
        "velocity", "Loss: squared error of the velocity, or squared error of the image divided by max(t, floor)^2."
    )
    floor: float = key(0.4, "Smallest divisor in the image loss.", 0.001, 1)
    gradient: float = key(0.1, "Autoencoder: weight of the image gradient loss (differences of neighbour pixels).", 0)
    kl: float = key(1e-6, "Autoencoder: weight of the KL loss to a normal distribution.", 0)
    noise: float = key(
        0.0,
        "Autoencoder: highest noise level on normalized latents. Levels in a batch rise from 0 to it. The decoder "
        "learns to correct noise.",
        0,
    )


@dataclass(frozen=True)
class Optimiser:
    """The optimiser."""

    kind: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "muon"] = key(
        "adamw",
        "adamw8bit: states in 8 bits. adafactor: factored states. prodigy: finds its rate. muon: trains matrices "
        "inside blocks, and adamw all others. adamw8bit and prodigy need the extra `train`.",
    )
    lr: float = key(1e-3, "Learning rate of all kinds, and of muon's adamw; prodigy multiplies its own by it: 1.", 0)
    lr_muon: float = key(1e-3, "Learning rate of muon.", 0)
    betas: tuple[float, float] = key((0.9, 0.95), "Betas of adamw, adamw8bit and prodigy.")
    momentum: float = key(0.95, "Momentum of muon.", 0, 1)
    weight_decay: float = key(0.01, "Weight decay of matrices; norms, biases and embeddings have no decay.", 0)
    warmup: int = key(100, "Warmup steps: the learning rate rises linearly from 0.", 0)
    decay: float = key(0.3, "Last share of the steps, in which the learning rate falls linearly to 0.", 0, 1)
    clip: float = key(1.0, "Maximum total gradient norm; 0 does not clip.", 0)
    ema: float = key(0.999, "Decay of the averaged weights (EMA), which are exported; 0 keeps no average.", 0, 1)


@dataclass(frozen=True)
class Run:
    """Length of the run, batch size, device, and what is saved and measured."""

    steps: int = key(1000, "Number of optimiser steps.", 1)
    batch: int = key(64, "Batch size in samples of the first size. Other sizes get about as many tokens.", 1)
    accumulate: int = key(1, "Gradient accumulation: pieces of a batch that are computed one after the other.", 1)
    minutes: float = key(0.0, "Save and stop after this many minutes. --resume continues. 0: no limit.", 0)
    until: int = key(0, "Save and stop after this step. --resume continues. 0: no limit.", 0)
    seed: int = key(0, "Seed of initial weights, data order and noise.", 0)
    device: str = key("", "cpu, cuda, cuda:N or mps. If empty, the best available device.")
    dtype: Literal["fp32", "bf16"] = key("fp32", "Data type of the computation. Master weights are always fp32.")
    threads: int = key(0, "CPU threads; 0: torch's default.", 0)
    compile: bool = key(False, "Compile each block with torch.compile: minutes at the start, faster steps.")
    checkpointing: bool = key(False, "Gradient checkpointing: less memory, but the backward pass repeats blocks.")
    parallel: Literal["ddp", "fsdp"] = key("ddp", "Under torchrun: ddp copies the weights, fsdp shards them.")
    log: int = key(10, "Steps between two lines of metrics.", 1)
    save: int = key(500, "Steps between two checkpoints.", 1)
    keep: int = key(2, "Number of checkpoints to keep.", 1)
    held_out: int = key(0, "Steps between two measurements on held-out data; 0: none.", 0)
    held_out_count: int = key(64, "Held-out samples.", 1)
    graded: int = key(0, "Steps between two gradings of pictures of the averaged weights; 0: none.", 0)
    graded_suite: str = key("pocket", "Prompt suite of the gradings, as in `inkstream eval --suite`.")
    graded_count: int = key(48, "Prompts of a grading, spread evenly over the suite.", 1)
    best: bool = key(False, "Export the averaged weights with the best grades of `graded`, instead of the last ones.")
    patience: int = key(0, "End and export after so many gradings that are not better than the best one; 0: never.", 0)
    preview: int = key(0, "Steps between two preview sheets of the averaged weights; 0: none.", 0)
    prompts: tuple[str, ...] = key((), "Prompts of previews. If empty, captions of held-out scenes.")
    preview_count: int = key(12, "Pictures on a preview sheet if `prompts` is empty.", 1, 256)
    export: Literal["fp32", "bf16", "fp16"] = key("fp32", "Data type of the exported weights.")


@dataclass(frozen=True)
class Recipe:
    """A complete recipe. Equal recipes give equal runs."""

    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    control: Control = field(default_factory=Control)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Run = field(default_factory=Run)
    own: Mapping[str, Any] = field(default_factory=dict)  # the task's own tables by name


TABLES: dict[str, type] = {
    "model": Model, "adapter": Adapter, "control": Control, "data": Data, "objective": Objective,
    "optimiser": Optimiser, "run": Run,
}  # fmt: skip
"""The tables that every recipe has."""


def as_tables(recipe: Recipe) -> dict[str, Table]:
    """Return a recipe as JSON-like tables with all keys: the inverse of as_recipe."""
    tables = json.loads(json.dumps(asdict(recipe)))
    tables |= tables.pop("own")
    return {name: {spoken(key): value for key, value in table.items()} for name, table in tables.items()}


def as_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Return tables as TOML, which read_recipe can read."""
    lines = [f"{name} = {_spelt(value)}" for name, value in table.items() if not isinstance(value, Mapping)]
    for name, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{name}]", as_toml(value, f"{prefix}{name}.")]
    return "\n".join(lines).strip("\n")


def _spelt(value: Any) -> str:
    """Return a value as TOML. It equals JSON except for the character U+007F."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def completed(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of an older recipe with the defaults of newer keys added."""
    whole = {name: {**table, **tables.get(name, {})} for name, table in as_tables(Recipe()).items()}
    return {**tables, **whole}


def differences(now: Mapping[str, Any], before: Mapping[str, Any], where: str = "") -> tuple[str, ...]:
    """Return the keys that differ between two recipes, given as tables. A key looks like `run.minutes`."""
    found: list[str] = []
    for name in {**now, **before}:
        a, b = now.get(name), before.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{name}.")
        elif a != b:
            found.append(where + name)
    return tuple(found)


def read_table(kind: type[T], table: Mapping[str, Any], where: str, default: T | None = None) -> T:
    """Read one table into a frozen dataclass. Missing keys have the values of `default`.

    Raises InputError for a wrong key or value; the message names the key, the value and what is allowed.
    """
    known = {spoken(f.name): f for f in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    values = {}
    for name, value in table.items():
        if name not in known:
            raise InputError(f"[{where}] has no key {name}: {nearest(name, known)}")
        values[known[name].name] = _value(value, hints[known[name].name], known[name], f"[{where}] {name}")
    return kind(**values) if default is None else replace(default, **values)  # type: ignore[type-var]


def _value(value: Any, hint: Any, key: Field[Any], where: str) -> Any:
    """Convert a value to its annotated type: an int becomes a float, a list becomes a tuple."""
    taken = _fit(value, hint)
    if taken is MISSING:
        raise InputError(f"{where} = {value!r}: {_wanted(hint)}")
    low, high = key.metadata.get("low"), key.metadata.get("high")
    if isinstance(taken, int | float) and ((low is not None and taken < low) or (high is not None and taken > high)):
        bounds = f"from {low} to {high}" if high is not None and low is not None else f"{low} or more"
        raise InputError(f"{where} = {value!r} is out of range: give {bounds}")
    return taken


def _fit(value: Any, hint: Any) -> Any:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if value in inside and isinstance(value, str) else MISSING
    if origin in (Union, types.UnionType):
        return next((v for h in inside if (v := _fit(value, h)) is not MISSING), MISSING)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return MISSING
        kinds = [inside[0]] * len(value) if inside[-1] is Ellipsis else list(inside)
        items = [_fit(v, h) for v, h in zip(value, kinds)]
        return MISSING if len(value) != len(kinds) or MISSING in items else tuple(items)
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else MISSING
    if hint is type(None):
        return None if value is None else MISSING
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else MISSING


def _wanted(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"take {' or '.join(inside)}"
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if origin is tuple:
        inner = _wanted(inside[0]).removeprefix("give ")
        return f"give a list, each {inner}" if inside[-1] is Ellipsis else f"give a list of {len(inside)}, each {inner}"
    return f"give {words.get(hint, 'a table')}"


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"


def spoken(name: str) -> str:
    """Return a field's name in the file, for example `from` for `from_`, because `from` is a Python keyword."""
    return name.rstrip("_")
