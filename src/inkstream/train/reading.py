"""Reading of recipes: a TOML file becomes a Recipe, with the tables that its task declares."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from inkstream.train.kinds import TASKS
from inkstream.train.pictures import SCENES
from inkstream.train.recipe import (
    TABLES,
    Control,
    Data,
    Objective,
    Optimiser,
    Recipe,
    Table,
    nearest,
    read_table,
    spoken,
)
from inkstream.train.reinforce import Reinforce
from inkstream.train.rewards import weights_of
from inkstream.train.tasks import Task
from inkstream.types import InputError

FOLDERS = [f for f in fields(Data) if f.name in ("buckets", "trigger", "repeats", "prior", "mask", "references")]
"""Keys of [data] that mean something for a folder of pictures only."""


def read_recipe(path: Path | str, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a TOML file and apply changes such as run.steps=50.

    Raises InputError; the message names the key, the value and what is allowed.
    """
    return as_recipe(read_tables(path, changes))


def read_tables(path: Path | str, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Read the tables of a recipe, as in `read_recipe`, without a look at what they hold."""
    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of a recipe") from error
    except ValueError as error:  # an error of TOML or UTF-8
        raise InputError(f"{path} is not valid TOML: {error}") from error
    for change in changes:
        change_table(table, change)
    return table


def change_table(table: Table, change: str) -> None:
    """Set one key of nested tables. The value is parsed as TOML; if that fails, it is a string without quotes."""
    name, sign, text = change.partition("=")
    *tables, last = name.strip().split(".")
    if not sign or not tables:
        raise InputError(f"{change!r} is not a change: write TABLE.KEY=VALUE, as in run.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"{change!r} cannot be set: {part} is not a table")
    table[last] = value


def as_recipe(table: Mapping[str, Any]) -> Recipe:
    """Return a recipe from nested tables, as parsed from TOML or JSON."""
    objective = table.get("objective", {})
    kind = objective.get("kind", Objective.kind) if isinstance(objective, Mapping) else Objective.kind
    own = _task(kind).tables
    kinds = {**TABLES, **own}
    for name, content in table.items():
        if name not in kinds:
            raise InputError(f"[{name}] is not a table of a recipe: {nearest(name, kinds)}")
        if not isinstance(content, Mapping):
            raise InputError(f"{name} = {content!r} is outside a table: a recipe has [{'], ['.join(kinds)}]")
    parts = {name: read_table(kind, table.get(name, {}), name) for name, kind in TABLES.items()}
    for name, kind in own.items():
        default = parts["optimiser"] if kind is Optimiser else kind()
        parts.setdefault("own", {})[name] = read_table(kind, table.get(name, {}), name, default)
    recipe = Recipe(**parts)
    _check(recipe)
    return recipe


def _task(kind: Any) -> type[Task]:
    """Return the task class of an objective's kind. Raises InputError for an unknown kind."""
    if not isinstance(kind, str) or kind not in TASKS:
        raise InputError(f"[objective] kind = {kind!r}: take one of {', '.join(TASKS)}")
    return TASKS[kind]


def _check(recipe: Recipe) -> None:
    """Check rules that involve several keys. Raises InputError."""
    model, data, objective, run = recipe.model, recipe.data, recipe.objective, recipe.run
    learns = _task(objective.kind).learns
    if any(name not in learns for name in model.train):
        raise InputError(f"[model] train = {list(model.train)}: {objective.kind} takes {' or '.join(learns)}")
    if len(model.train) > 1 and objective.kind == "autoencoder":
        raise InputError(f"[model] train = {list(model.train)}: name only one, vae contains vae.decoder")
    if model.from_ and (model.transformer or model.text_encoder):
        raise InputError("[model] from sets all sizes: remove [model.transformer] and [model.text_encoder]")
    if not data.sizes or any(side < 16 or side % 16 for size in data.sizes for side in size):
        raise InputError(f"[data] sizes = {[list(s) for s in data.sizes]}: give multiples of 16, as in [[128, 128]]")
    if data.buckets % 16:
        raise InputError(f"[data] buckets = {data.buckets}: give a multiple of 16, such as 32")
    own = [f.name for f in FOLDERS if getattr(data, f.name) != f.default]
    if data.source in SCENES and own:
        raise InputError(f"[data] {own[0]} is for a folder of pictures: name one in [data] source")
    if objective.kind == "autoencoder" and (unread := [name for name in own if name != "buckets"]):
        raise InputError(f"[data] {unread[0]} is for a transformer, not for an autoencoder: leave it out")
    if data.prior_by == "model" and not data.prior:
        raise InputError("[data] prior_by = model needs pictures whose captions it answers: name a folder in prior")
    if data.prior_by == "model" and recipe.adapter.kind == "none":
        raise InputError("[data] prior_by = model needs a model that stays as it is: train an [adapter] beside it")
    if data.prior and data.references:
        raise InputError("[data] prior holds pictures without references: leave it out, or leave out references")
    if (data.references or data.source == "edits") and (run.prompts or run.graded):
        key = "prompts" if run.prompts else "graded"
        raise InputError(f"[run] {key} draws without references: leave it out, previews draw held-out pairs")
    kind, lr = recipe.optimiser.kind, recipe.optimiser.lr
    if kind == "prodigy" and lr < 0.1:
        raise InputError(f"[optimiser] lr = {lr:g}: prodigy multiplies the rate that it finds by this, set it to 1")
    if run.parallel == "fsdp" and kind not in ("adamw", "muon"):
        raise InputError(f"[optimiser] kind = {kind} cannot be sharded: take adamw, or [run] parallel = ddp")
    if (run.best or run.patience) and not run.graded:
        raise InputError("[run] best and patience go by the grades of pictures: set graded, the steps between gradings")
    _check_adapter(recipe)
    _check_control(recipe)
    if objective.kind == "distil":
        _check_distil(recipe)
    if objective.kind == "reinforce":
        _check_reinforce(recipe)
    if objective.kind != "autoencoder" and data.source in SCENES and not data.count:
        why = f"does not cache scenes, but {objective.kind} needs cached scenes: give their number"
        raise InputError(f"[data] count = 0 {why}")
    if not data.count and len(data.sizes) > 1:
        raise InputError(f"[data] count = 0 allows one size, but sizes has {len(data.sizes)}: keep one")
    if objective.uniform + objective.high > 1:
        both = f"uniform {objective.uniform} and high {objective.high}"
        raise InputError(f"[objective] {both} add up to more than 1: lower one")
    if data.crop % 16:
        raise InputError(f"[data] crop = {data.crop}: give a multiple of 16")
    if run.batch % run.accumulate:
        raise InputError(f"[run] batch = {run.batch} is not a multiple of accumulate = {run.accumulate}: change one")


def _check_adapter(recipe: Recipe) -> None:
    """Check rules about the adapter. Raises InputError."""
    adapter, run = recipe.adapter, recipe.run
    if adapter.kind == "none":
        if changed := [f.name for f in fields(adapter) if getattr(adapter, f.name) != f.default]:
            raise InputError(f'[adapter] has {changed[0]} but no kind, so no adapter is trained: add kind = "lora"')
        return
    if recipe.objective.kind == "autoencoder":
        raise InputError("[adapter] changes a transformer, and autoencoder trains none: remove [adapter]")
    if not recipe.model.from_:
        raise InputError("[adapter] needs a model to change: name one in [model] from")
    if recipe.model.train not in ((), ("transformer",)):
        raise InputError(f"[model] train = {list(recipe.model.train)}: an adapter changes the transformer alone")
    if recipe.optimiser.kind == "muon":
        raise InputError("[optimiser] kind = muon trains the model's own matrices: take adamw for an adapter")
    if run.parallel == "fsdp":
        raise InputError("[run] parallel = fsdp shards weights that learn, and an adapter's are small: take ddp")
    if adapter.kind == "lokr" and adapter.format == "diffusers":
        raise InputError("[adapter] format = diffusers has no names for lokr: take comfyui, kohya or lycoris")
    if adapter.transfer and not run.prompts:
        raise InputError("[adapter] transfer draws the prompts of previews: give some in [run] prompts")
    if adapter.stream and run.compile:
        raise InputError("[run] compile compiles resident blocks, and [adapter] stream moves them: set one to false")


def _check_control(recipe: Recipe) -> None:
    """Check rules about a control net. Raises InputError."""
    train, settings = recipe.model.train, recipe.control
    if "control" not in train:
        if changed := [f.name for f in fields(Control) if getattr(settings, f.name) != getattr(Control(), f.name)]:
            raise InputError(f'[control] has {changed[0]}, but no net is trained: add [model] train = ["control"]')
        return
    if train != ("control",):
        raise InputError(f"[model] train = {list(train)}: the model stays while a control net learns, name it alone")
    if not recipe.model.from_:
        raise InputError("[control] needs a model to guide: name one in [model] from")
    if recipe.run.prompts or recipe.run.graded:
        key = "prompts" if recipe.run.prompts else "graded"
        raise InputError(f"[run] {key} draws without control pictures: leave it out, previews follow held-out maps")
    if recipe.run.parallel == "fsdp":
        raise InputError("[run] parallel = fsdp shards weights that learn, and a control net's are not: take ddp")


def _check_distil(recipe: Recipe) -> None:
    """Check rules about a distillation. Raises InputError."""
    own, data = recipe.own["distil"], recipe.data
    if not recipe.model.from_:
        raise InputError("[objective] kind = distil needs a teacher: name a model in [model] from")
    if not 0 <= own.times[0] < own.times[1] <= 1:
        raise InputError(f"[distil] times = {list(own.times)}: give two rising times from 0 to 1, such as [0.02, 0.98]")
    if own.method == "dmd" and not (own.dm or own.ca):
        raise InputError("[distil] dm = 0 and ca = 0 teach nothing: set one of them above 0")
    if own.reward:
        if own.method != "dmd":
            raise InputError(f"[distil] reward is for method dmd: {own.method} imitates the teacher, leave reward out")
        _check_rewards(recipe)
    elif recipe.own["reinforce"] != Reinforce():
        raise InputError("[reinforce] has no effect without a weight: set [distil] reward above 0, such as 0.05")
    if own.method != "dmd" and own.levels == "random":
        raise InputError(f"[distil] levels = random is for method dmd: the paths of {own.method} have the schedule's")
    if unread := [name for name in ("prior", "mask", "trigger") if getattr(data, name)]:
        raise InputError(
            f"[data] {unread[0]} is for training on pictures, and a student learns of its teacher: leave it out"
        )


def _check_rewards(recipe: Recipe) -> None:
    """Check the table of rewards. Raises InputError."""
    own = recipe.own["reinforce"]
    weights_of(own.rewards)
    if own.method == "dpo" and own.beta < 10:
        raise InputError(f"[reinforce] beta = {own.beta:g} is too little for dpo: take about 2000")
    if own.method == "grpo" and (own.noise == 0 or own.steps == 1):
        key = "noise = 0" if own.noise == 0 else "steps = 1"
        raise InputError(f"[reinforce] {key} leaves grpo no stochastic step: raise it, or take method nft")
    if recipe.data.references or recipe.data.source == "edits":
        raise InputError("[reinforce] draws without references: leave them out")


def _check_reinforce(recipe: Recipe) -> None:
    """Check rules about reinforcement learning. Raises InputError."""
    data = recipe.data
    _check_rewards(recipe)
    if not recipe.model.from_:
        raise InputError("[objective] kind = reinforce needs a model that draws: name one in [model] from")
    if unread := [name for name in ("prior", "mask") if getattr(data, name)]:
        raise InputError(f"[data] {unread[0]} is for training on pictures, and rewards value others: leave it out")


def describe() -> str:
    """Return all recipe keys as Markdown tables, for docs/training.md."""
    parts, tables = [], dict(TABLES)
    for task in TASKS.values():
        tables |= task.tables
    for name, kind in tables.items():
        rows = [f"| `{spoken(f.name)}` | {_shown(f)} | {f.metadata['text']} |" for f in fields(kind)]
        parts.append("\n".join([f"### [{name}]", kind.__doc__ or "", "", "| key | default | meaning |",
                                "| --- | --- | --- |", *rows]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _shown(key: Field[Any]) -> str:
    default = {} if key.default is MISSING else key.default
    if isinstance(default, tuple):
        default = [list(v) if isinstance(v, tuple) else v for v in default]
    text = str(default).lower() if isinstance(default, bool) else repr(default).replace("'", '"')
    kind = get_args(key.type) if get_origin(key.type) is Literal else ()
    return f"`{text}`" + (f" of {', '.join(kind)}" if kind else "")
