"""A recipe is a TOML file read strictly into frozen tables: what is trained, on what, towards what, and how."""

# ruff: noqa: RUF009 (a key is a field)
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
    """A key of a table: its default, what it means, and the range of its numbers."""
    metadata = {"text": text, "low": low, "high": high}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    """What is trained: published weights to go on from, or the sizes of a family's parts to start anew."""

    name: str = key("", "What the exported model is called; the run's folder's name if empty.")
    title: str = key("", "A line that says what the exported model is; that of what it starts from if empty.")
    from_: str = key("", "Go on from these weights: a known model, OWNER/NAME, a folder or a file.")
    family: str = key("zimage", "The family of a model that starts anew.")
    train: tuple[str, ...] = key(
        (), "What learns: transformer (if empty), text_encoder, both; under autoencoder vae (if empty) or vae.decoder."
    )
    tokenizer: str = key("pocket", "Of a new model: a folder that holds tokenizer.json, or pocket's own.")
    transformer: Table = key({}, "Sizes of a new transformer, named as in its config; or `from`, a folder or file.")
    text_encoder: Table = key({}, "The same of the text encoder; its vocabulary is the tokenizer's if left out.")
    vae: Table = key({}, "The same of the autoencoder.")
    steps: int = key(0, "Steps the finished model is drawn with, in previews too; 0 is the family's own.", 0, 1000)
    guidance: float = key(0.0, "Guidance the finished model is drawn with; 0 is the family's own.", 0, 100)
    shift: float = key(0.0, "Shift the finished model is drawn with; 0 is the family's own.", 0, 100)


@dataclass(frozen=True)
class Data:
    """What is learnt from."""

    source: str = key("scenes", "scenes, or a folder of pictures with captions beside them.")
    sizes: tuple[tuple[int, int], ...] = key(
        ((128, 128),), "Widths and heights in pixels: each picture takes the one nearest to its shape."
    )
    count: int = key(
        20_000, "How many scenes are drawn and kept; 0 draws new ones for every batch (autoencoder only).", 0
    )
    first: int = key(0, "The number of the first scene.", 0)
    captions: int = key(4, "Captions kept of each scene, a random one of which is taken every time.", 1, 64)
    crop: int = key(0, "Side in pixels of random crops (autoencoder only); 0 takes whole pictures.", 0)
    cache: str = key("cache", "Folder where drawn scenes, latents and tokens are kept.")
    workers: int = key(1, "Processes that draw scenes or open pictures; 0 does it in the training process.", 0, 256)
    pool: int = key(16, "Batches among which samples are sorted so that those of one batch are of equal length.", 1)
    grammar: Table = key({}, "Which scenes there are: see pocket's Grammar.")
    wording: Table = key({}, "How scenes are described: see pocket's Wording.")


@dataclass(frozen=True)
class Objective:
    """Towards what."""

    kind: str = key("flow", "flow trains a transformer on latents, autoencoder a vae.")
    mean: float = key(0.0, "Of the logit of the time: above 0 trains noisier times more.", -10, 10)
    std: float = key(1.0, "Of the logit of the time.", 0, 10)
    uniform: float = key(0.1, "Share of samples whose time is drawn evenly from 0 to 1 instead.", 0, 1)
    high: float = key(0.0, "Share of samples whose time is drawn evenly from `high_from` to 1 instead.", 0, 1)
    high_from: float = key(0.94, "Where the noisy end begins.", 0, 1)
    shift: float = key(1.0, "Time shift of the others; above 1 trains noisier times more.", 0.01, 100)
    dropout: float = key(0.1, "Share of captions left empty, so that guidance can ask without one.", 0, 1)
    weight: Literal["velocity", "image"] = key(
        "velocity", "Errors count as those of the velocity, or as those of the image over max(t, floor)."
    )
    floor: float = key(0.4, "Of the times by which errors of the image are divided.", 0.001, 1)
    gradient: float = key(0.1, "Autoencoder: weight of the error of neighbouring pixels' differences.", 0)
    kl: float = key(1e-6, "Autoencoder: weight that draws the latents to a normal distribution.", 0)
    noise: float = key(
        0.0, "Autoencoder: most noise on normalized latents; from 0 to that over a batch, so that decoders mend.", 0
    )


@dataclass(frozen=True)
class Optimiser:
    """By which steps."""

    kind: Literal["adamw", "muon"] = key("adamw", "muon takes the matrices inside blocks, adamw the rest.")
    lr: float = key(1e-3, "Learning rate of adamw.", 0)
    lr_muon: float = key(1e-3, "Learning rate of muon.", 0)
    betas: tuple[float, float] = key((0.9, 0.95), "Of adamw.")
    momentum: float = key(0.95, "Of muon.", 0, 1)
    weight_decay: float = key(0.01, "Of matrices; norms, biases and embeddings have none.", 0)
    warmup: int = key(100, "Steps over which the rate rises from 0.", 0)
    decay: float = key(0.3, "The last share of the steps, over which the rate falls to 0 in a line.", 0, 1)
    clip: float = key(1.0, "Largest norm of all gradients together; 0 does not clip.", 0)
    ema: float = key(0.999, "Decay of the averaged weights, which are what is exported; 0 keeps none.", 0, 1)


@dataclass(frozen=True)
class Run:
    """How long, how much at once, where, and what is kept."""

    steps: int = key(1000, "Steps of the optimiser in all.", 1)
    batch: int = key(64, "Samples a step, of the first size; of larger sizes as many as hold as many tokens.", 1)
    accumulate: int = key(1, "Pieces a batch is computed in, one after the other.", 1)
    minutes: float = key(0.0, "Save and stop after so long, to go on with --resume; 0 is no limit.", 0)
    until: int = key(0, "Save and stop after this step, to go on with --resume; 0 goes on to the end.", 0)
    seed: int = key(0, "Of the first weights, the order of the data, and the noise.", 0)
    device: str = key("", "cpu, cuda, cuda:N or mps; the best there is if empty.")
    dtype: Literal["fp32", "bf16"] = key("fp32", "What is computed in; weights are kept in fp32 in any case.")
    threads: int = key(0, "Threads of the processor; 0 leaves torch's choice.", 0)
    compile: bool = key(False, "Compile each block: minutes at the start, faster after.")
    checkpointing: bool = key(False, "Compute each block again in the backward pass instead of keeping it in memory.")
    parallel: Literal["ddp", "fsdp"] = key("ddp", "Under torchrun: ddp copies the weights, fsdp shares them out.")
    log: int = key(10, "Steps between two lines of metrics.", 1)
    save: int = key(500, "Steps between two checkpoints.", 1)
    keep: int = key(2, "How many checkpoints are kept.", 1)
    held_out: int = key(0, "Steps between two measurements on what is not trained on; 0 takes none.", 0)
    held_out_count: int = key(64, "Samples of such a measurement.", 1)
    graded: int = key(0, "Steps between two gradings of pictures drawn with the averaged weights; 0 takes none.", 0)
    graded_suite: str = key("pocket", "Whose prompts are graded: as `inkstream eval --suite` has it.")
    graded_count: int = key(48, "Prompts of such a grading, spread evenly over the suite.", 1)
    preview: int = key(0, "Steps between two sheets of pictures drawn with the averaged weights; 0 draws none.", 0)
    prompts: tuple[str, ...] = key((), "What previews show; captions of held-out scenes if empty.")
    preview_count: int = key(12, "Pictures on a sheet when no prompts are given.", 1, 256)
    export: Literal["fp32", "bf16", "fp16"] = key("fp32", "Numbers of the exported weights.")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. Equal recipes give equal runs."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Run = field(default_factory=Run)
    own: Mapping[str, Any] = field(default_factory=dict)  # tables of the task's, by name


TABLES: dict[str, type] = {"model": Model, "data": Data, "objective": Objective, "optimiser": Optimiser, "run": Run}
"""Those that every recipe has."""


def as_tables(recipe: Recipe) -> dict[str, Table]:
    """The inverse of as_recipe, every key stated, as JSON has it."""
    tables = json.loads(json.dumps(asdict(recipe)))
    tables |= tables.pop("own")
    return {name: {spoken(key): value for key, value in table.items()} for name, table in tables.items()}


def as_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Tables as TOML, which read_recipe takes."""
    lines = [f"{name} = {_spelt(value)}" for name, value in table.items() if not isinstance(value, Mapping)]
    for name, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{name}]", as_toml(value, f"{prefix}{name}.")]
    return "\n".join(lines).strip("\n")


def _spelt(value: Any) -> str:
    """A value as TOML has it: as JSON does, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def completed(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of an older recipe with the keys that recipes have had since, at their defaults."""
    whole = {name: {**table, **tables.get(name, {})} for name, table in as_tables(Recipe()).items()}
    return {**tables, **whole}


def differences(now: Mapping[str, Any], before: Mapping[str, Any], where: str = "") -> tuple[str, ...]:
    """The keys at which two recipes, as tables, differ: `run.minutes`."""
    found: list[str] = []
    for name in {**now, **before}:
        a, b = now.get(name), before.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{name}.")
        elif a != b:
            found.append(where + name)
    return tuple(found)


def read_table(kind: type[T], table: Mapping[str, Any], where: str, default: T | None = None) -> T:
    """One table as a frozen dataclass; what it leaves out is as in `default`.

    InputError names the key, its value and what is allowed.
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
    """The value as its annotation wants it: an int may stand for a float, a list is a tuple."""
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
    """A field's name as it stands in the file: `from` is a word of Python's."""
    return name.rstrip("_")
