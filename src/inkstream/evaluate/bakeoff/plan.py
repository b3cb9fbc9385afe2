"""The plan of a bake-off: prompts x models x seeds. It is frozen in the folder, and a changed plan is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

from inkstream.bench.records import machine
from inkstream.clients.manifest import Wanted, digest
from inkstream.clients.remote.catalogue import is_remote
from inkstream.disk import whole_file
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.larger import times_of
from inkstream.engine.drawing.options import guided
from inkstream.engine.files.loras import find_lora, lora_folder
from inkstream.engine.files.sources import locate
from inkstream.engine.machine.loader import check_machine
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.evaluate.suites import Case
from inkstream.evaluate.suites import digest as digest_of_cases
from inkstream.quant import QuantName
from inkstream.sampling.solvers import times_asked
from inkstream.types import Drawer, InputError, LoraUse, Machine, Request
from inkstream.weights.files import list_weights

VERSION = 1
PLAN, PROMPTS = "plan.json", "prompts.jsonl"
HASHED = ".weights.json"
"""Hashes of weights by path, size and time, so that the files are not read again when a bake-off is resumed."""
QUANTS: tuple[str, ...] = get_args(QuantName)
OF_THE_PLAN = ("model", "prompt", "seed", "count", *PICTURE_FIELDS)
"""Fields of a Request that the plan gives, or that it has none of."""
OF_THE_RUN = ("commercial_only", "max_cost")
"""Fields of a Machine that hold for all models."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """A model of a bake-off, and how it is drawn with. As text: `MODEL[@QUANT][@OPTION=VALUE]...`.

    request, machine: fields of a Request and of a Machine as text; machine may hold `server`.
    """

    name: str
    model: str
    quant: str | None = None
    request: tuple[tuple[str, str], ...] = ()
    machine: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def read(text: str) -> Entry:
        """Read the text form. Raises InputError for an option that there is not, or a value that it cannot have."""
        parts, ends = text.strip().split("@"), list[str]()
        while len(parts) > 1 and (parts[-1] in QUANTS or re.match(r"\w+=", parts[-1])):
            ends.insert(0, parts.pop())
        model = "@".join(parts)
        if not model:
            raise InputError(f"model {text!r} has no name: write it like pocket or pocket@int8")
        quants = [end for end in ends if end in QUANTS]
        if len(quants) > 1 or (quants and is_remote(model)):
            raise InputError(f"model {text} cannot be quantised so: give one of {', '.join(QUANTS)} to a model here")
        given = dict(end.split("=", 1) for end in ends if end not in QUANTS)
        shown = [end for end in ends if not end.startswith("server=")]  # a report names no address
        name = given.pop("name", "") or "@".join([_short(model), *shown])
        on = {field.name for field in fields(Machine)} - {*OF_THE_RUN} | {"server"}
        own = Request.model_fields.keys() - {*OF_THE_PLAN}
        for option in given:
            if option not in on | own:
                raise InputError(f"option {option} of model {text} is not known: take {', '.join(sorted(on | own))}")
        entry = Entry(
            name, model, quants[0] if quants else None,
            tuple((key, value) for key, value in given.items() if key in own),
            tuple((key, value) for key, value in given.items() if key in on),
        )  # fmt: skip
        entry.asked(prompt="a prompt", seed=0)
        return entry

    def asked(self, **given: Any) -> Request:
        """A request of this model. Raises InputError."""
        request: dict[str, Any] = dict(self.request)
        if "loras" in request:
            request["loras"] = (request["loras"],)
        try:
            return Request.model_validate({"model": self.model, **given, **request})
        except ValueError as error:
            wrong = cast(Any, error).errors()[0] if hasattr(error, "errors") else None
            reason = f"{wrong['loc'][0]} {wrong['input']!r}: {wrong['msg']}" if wrong else str(error)
            raise InputError(f"model {self.name}: {reason}") from None

    @property
    def elsewhere(self) -> bool:
        """Whether it is drawn on another machine, which does not tell what it uses."""
        return is_remote(self.model) or "server" in dict(self.machine)


def read_entries(texts: Sequence[str]) -> list[Entry]:
    """Read the models of a bake-off. Raises InputError if there are fewer than two, or two have one name."""
    entries = [Entry.read(text) for given in texts for text in given.split(",") if text.strip()]
    if len(entries) < 2:
        raise InputError(f"{len(entries)} models are no bake-off: give two or more, as in --models pocket,pocket@int8")
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name}: name one, as in {name}@name=second")
    return entries


@dataclass(frozen=True)
class Plan:
    """What is drawn. facts: of each model, as they are frozen. first: the seed of the first picture of prompt 0.

    sources: the models that requests name: those of the entries, or the folders of the quantised ones.
    """

    suite: str
    cases: Mapping[int, Case]
    entries: Sequence[Entry]
    sources: Sequence[str]
    facts: Sequence[Mapping[str, Any]]
    seeds: int
    first: int = 0

    def jobs(self, entry: int) -> Iterator[Wanted]:
        """The pictures of a model. Each prompt has the same seeds for all models."""
        one = self.entries[entry]
        for number, case in self.cases.items():
            sides: dict[str, Any] = {
                side: getattr(case, side) for side in ("width", "height") if getattr(case, side) is not None
            }
            for seed in range(self.seeds):
                fields: dict[str, Any] = {"prompt": case.prompt, "seed": self.first + 1000 * number + seed, **sides}
                request = one.asked(model=self.sources[entry], **fields)
                mark = digest(request.model_copy(update={"model": one.name}))  # a path may change, the model does not
                file = f"{number:04d}-{seed}-{entry:02d}.png"
                yield Wanted(number, entry * self.seeds + seed, request, mark, file)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "suite": self.suite,
            "prompts": len(self.cases),
            "cases": digest_of_cases(list(self.cases.values())),
            "seeds": self.seeds,
            "seed": self.first,
            "machine": machine(),
            "models": list(self.facts),
        }


def describe(entry: Entry, drawer: Drawer, here: Machine, hashes: Hashes) -> dict[str, Any]:
    """The facts of a model that are frozen. None: its machine does not tell. Raises InputError if it cannot draw."""
    spec = drawer.spec(entry.model)
    facts: dict[str, Any] = {
        "name": entry.name,
        "model": _short(entry.model),
        "quant": entry.quant,
        "options": dict(entry.request),
        "on": {key: _short(value) for key, value in entry.machine if key != "server"},
        "where": "a provider" if is_remote(entry.model) else "a server" if entry.elsewhere else "here",
        "licence": spec.licence,
        "commercial": spec.commercial,
        "weights": None,
        "device": None,
        "dtype": None,
    }
    if entry.elsewhere:
        return facts
    whole = complete(entry.asked(prompt="a prompt", seed=0), spec)
    times = len(times_asked(whole.solver, times_of(whole, spec, from_picture=False)[0]))
    shown = ("steps", "guidance", "solver", "schedule", "width", "height")
    facts |= {name: getattr(whole, name) for name in shown}
    facts["evaluations"] = times * (2 if guided(whole, spec) else 1)
    device, dtype = check_machine(here)
    return facts | {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": hashes.of(entry, here),
    }


class Hashes:
    """SHA-256 of the weights of models. What was hashed is noted in the folder with the files' sizes and times."""

    def __init__(self, folder: Path, tell: Tell):
        self.path = folder / HASHED
        self.tell = tell
        self._known: dict[str, str] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}

    def of(self, entry: Entry, here: Machine) -> dict[str, str]:
        """Part -> the hash of its file; of several files, the hash of their hashes. LoRAs count as parts."""
        source = locate(entry.model, chosen=here.chosen)
        files = {name: _files(part.path) for name, part in source.parts.items()}
        uses = [*entry.asked(prompt="a prompt").loras, *here.merge_lora]
        folder = lora_folder(here)
        files |= {f"lora {n}": _files(find_lora(LoraUse.read(use).path, folder)) for n, use in enumerate(uses, 1)}
        found = {name: self._joined(paths) for name, paths in files.items()}
        with whole_file(self.path) as part:
            part.write_text(json.dumps(self._known, indent=1))
        return found

    def _joined(self, paths: Sequence[Path]) -> str:
        found = [self._hash(path) for path in paths]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def _hash(self, path: Path) -> str:
        state = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
        if key not in self._known:
            digest, done = hashlib.sha256(), 0
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
                    done += len(block)
                    self.tell(done, state.st_size)
            self._known[key] = digest.hexdigest()
        return self._known[key]


def _files(path: Path) -> list[Path]:
    return list_weights(path) if path.is_dir() else [path]


def _short(text: str) -> str:
    """A model's name; of a path, its last part: a report names no folder of this machine."""
    return Path(text).name if "/" in text and Path(text).expanduser().exists() else text


# The folder -----------------------------------------------------------------------------------------------------------


def freeze(plan: Plan, folder: Path) -> None:
    """Write the plan, unless the folder has it. Raises InputError, which names what differs, if it has another one."""
    ours, path = json.loads(json.dumps(plan.to_json())), folder / PLAN
    if path.exists():
        theirs = read_plan(folder)
        if difference := _difference(theirs, ours):
            raise InputError(f"{folder} holds a bake-off with {difference}: give another --out, or remove the folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"number": number, "prompt": case.prompt, "group": case.group, "text": case.text}, ensure_ascii=False
        )
        for number, case in plan.cases.items()
    ]
    (folder / PROMPTS).write_text("\n".join(lines) + "\n", "utf-8")
    with whole_file(path) as part:
        part.write_text(json.dumps(ours, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_plan(folder: Path) -> dict[str, Any]:
    """The frozen plan of a folder. Raises InputError if there is none."""
    try:
        found = json.loads((folder / PLAN).read_text("utf-8"))
    except OSError:
        raise InputError(f"{folder} holds no bake-off: give the folder of an inkstream bakeoff") from None
    except ValueError as error:
        raise InputError(f"{folder / PLAN} cannot be read ({error}): remove the folder") from None
    return found


def read_prompts(folder: Path) -> dict[int, dict[str, Any]]:
    """The frozen prompts of a folder by their numbers: prompt, group, text."""
    lines = (folder / PROMPTS).read_text("utf-8").splitlines()
    return {line["number"]: line for line in map(json.loads, lines)}


def _difference(theirs: Any, ours: Any, name: str = "") -> str:
    """The first difference of two plans, as `pocket steps 4, not 8`; empty if they are equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = dict.fromkeys([*ours, *theirs])
        found = (_difference(theirs.get(key), ours.get(key), f"{name} {key}".strip()) for key in keys)
        return next(filter(None, found), "")
    if isinstance(theirs, list) and isinstance(ours, list):  # of models
        before, now = ([one["name"] for one in given] for given in (theirs, ours))
        if before != now:
            return f"models {', '.join(before)}, not {', '.join(now)}"
        return next(filter(None, map(_difference, theirs, ours, now)), "")
    return "" if theirs == ours else f"{name} {theirs}, not {ours}"
