"""Suites of prompts: Pocket's suites of held-out scenes, our own files, the user's files, and those of others."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from inkstream.evaluate.edits import edit_cases
from inkstream.evaluate.importers import IMPORTERS, about, import_suite, split
from inkstream.pocket.captions import STATES, caption
from inkstream.pocket.draw import render
from inkstream.pocket.edits import Edit
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.scenes import Kind, Scene
from inkstream.types import InputError, Request

FACTS: tuple[str, ...] = tuple(sorted(frozenset().union(*STATES.values())))
"""Facts that a prompt may state in addition to things, their colours and number, relations and written text."""

FIRST_SEED = 5_000_000
"""First scene number of the suites."""


@dataclass(frozen=True)
class Case:
    """A prompt, and the known facts about its picture. width, height: None is the model's default."""

    prompt: str
    group: str = "prompts"  # group of its results in reports
    scene: Scene | None = None  # ground truth for the graders
    stated: frozenset[str] = STATES["dense"]  # facts of FACTS that the prompt states
    open_colour: bool = False  # the prompt does not state the colours of its shapes
    text: str | None = None  # text to be written; "\\n" separates lines
    width: int | None = None
    height: int | None = None
    edit: Edit | None = None  # the prompt is an instruction, and the scene is the one after the edit


@dataclass(frozen=True)
class Stratum:
    """A group of `count` prompts: scenes of one kind."""

    group: str
    kind: Kind
    count: int
    english: float | None = None  # share of English text; None: the grammar's share
    length: tuple[int, int] | None = None  # range of text lengths in characters


POCKET: tuple[Stratum, ...] = (
    Stratum("things", "things", 36),
    Stratum("relation", "relation", 30),
    Stratum("count", "count", 30),
    Stratum("emoji", "emoji", 24),
    Stratum("English 1-3", "text", 24, 1.0, (1, 3)),
    Stratum("English 4-6", "text", 24, 1.0, (4, 6)),
    Stratum("English 7+", "text", 12, 1.0, (7, 10)),
    Stratum("Chinese", "text", 20, 0.0, (1, 4)),
)
TEXT: tuple[Stratum, ...] = (
    Stratum("English 1-3", "text", 40, 1.0, (1, 3)),
    Stratum("English 4-6", "text", 40, 1.0, (4, 6)),
    Stratum("English 7+", "text", 40, 1.0, (7, 10)),
    *(Stratum(f"Chinese {n}", "text", 20, 0.0, (n, n)) for n in (1, 2, 3, 4)),
)
SUITES: dict[str, tuple[Stratum, ...]] = {"pocket": POCKET, "text": TEXT}
"""Generated suites."""

FILES = ("people", "people2", "posters", "products", "characters", "scenes")
"""Suites that are files of prompts in the package.

`people` and `people2` are prompts as users type them, written without knowing the parser. `people` has 300 prompts. Its
failures were used to improve the parser. `people2` has 160 prompts, written after the parser was finished: it is for
measuring only. The others have 21 English and 21 Chinese prompts each, for real models; `posters` says the texts.
"""


EDITS = "edits"
"""The suite of edits, for models that take references: the prompt says what to change in a scene's picture."""
EACH = 20
"""Edits of each kind in it."""


def open_suite(name: str, grammar: Grammar | None = None) -> list[Case]:
    """Return the cases of a suite. Raises InputError if there is no such suite, or its file cannot be read.

    name: of a suite of ours; the path of a .jsonl file, or of a .txt file with a prompt a line; or a suite of others as
    geneval:FILE (see `importers`).
    """
    if name in SUITES:
        return list(held_out_cases(SUITES[name], grammar or Grammar()))
    if name == EDITS:
        return [Case(one.instruction, one.edit.kind, one.edit.after, edit=one.edit) for one in edit_cases(EACH)]
    if name in FILES:
        return read_suite(Path(__file__).parent / f"{name}.jsonl")
    if imported := split(name):
        return [_case(row) for row in import_suite(*imported)]
    if not name.endswith((".jsonl", ".txt")):
        known = ", ".join([*SUITES, EDITS, *FILES, *(f"{kind}:FILE" for kind in IMPORTERS)])
        raise InputError(f"there is no suite {name}: take {known} or give a file that ends in .jsonl or .txt")
    return read_suite(Path(name))


def about_suite(name: str) -> str:
    """A line about a suite of others: its licence and the hash of its file. Empty for other suites."""
    return about(*imported) if (imported := split(name)) else ""


def held_out_cases(strata: Sequence[Stratum], grammar: Grammar) -> Iterator[Case]:
    """Yield cases of held-out scenes, which training never shows, with plain dense captions. One in three is Chinese.

    Text lengths are equally frequent. A string is repeated only if there are too few others.
    """
    for place, stratum in enumerate(strata):
        used: Counter[Scene | str] = Counter()
        seeds = count(FIRST_SEED + 100_000 * place)
        for number in range(stratum.count):
            narrow = _narrowed(grammar, stratum, number)
            tries = 0
            while used[_key(scene := sample(narrow, next(seeds), "held_out", stratum.kind))] > tries // 3:
                tries += 1
            used[_key(scene)] += 1
            text = "\n".join(writing.text for writing in scene.writings) or None
            yield Case(caption(scene, "dense", "zh" if number % 3 == 2 else "en"), stratum.group, scene, text=text)


def _key(scene: Scene) -> Scene | str:
    """Return the key of a scene. Two scenes of a suite should have different keys."""
    return scene.writings[0].text.casefold() if scene.writings else scene


def _narrowed(grammar: Grammar, stratum: Stratum, number: int) -> Grammar:
    """Return the grammar for scene `number` of a stratum. Half of its texts are random strings: there are few words."""
    if stratum.english is None or stratum.length is None:
        return grammar
    low, high = stratum.length
    length = low + number % (high - low + 1)
    return replace(
        grammar, english=stratum.english, letters=(length, length), characters=(length, length), spelt=0.5,
        shuffled=0.5, beside_text=0.3, second_line=0.0,
    )  # fmt: skip


def read_suite(path: Path) -> list[Case]:
    """Read cases from a file with one JSON object a line: prompt, and optionally the other fields of a Case.

    A line of a .txt file is a prompt.

    Raises InputError; the message names the line and the error in it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a file of one JSON object a line") from error
    cases, plain = [], path.suffix == ".txt"
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                cases.append(_case({"prompt": line.strip()} if plain else json.loads(line)))
            except ValueError as error:  # InputError and the errors of JSON and pydantic are ValueErrors
                reason = str(error) if isinstance(error, InputError | json.JSONDecodeError) else _first_line(error)
                raise InputError(f"{path}, line {number}: {reason}") from error
    if not cases:
        raise InputError(f'{path} holds no prompt: write one on each line, as {{"prompt": "a red circle"}}')
    return cases


def thin(cases: Sequence[Case], limit: int | None) -> dict[int, Case]:
    """Return at most `limit` cases, evenly spread over all, by their numbers in the suite."""
    most = len(cases) if limit is None else min(limit, len(cases))
    return {(number := (2 * i + 1) * len(cases) // (2 * most)): cases[number] for i in range(most)}


def digest(cases: Sequence[Case]) -> str:
    """Return a hash of the cases. Suites with equal cases have equal hashes."""
    tables = [{**asdict(case), "stated": sorted(case.stated)} for case in cases]
    tables = [{name: value for name, value in table.items() if name != "edit" or value} for table in tables]
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:16]


def _case(table: Any) -> Case:
    known = ("prompt", "group", "scene", "stated", "open_colour", "text", "width", "height")
    if not isinstance(table, dict):
        raise InputError('not a JSON object: write it as {"prompt": "a red circle"}')
    for name in table:
        if name not in known:
            raise InputError(f"{name!r} is not known: a prompt takes {', '.join(known)}")
    for name in ("prompt", "group", "text"):
        if name in table and not (isinstance(table[name], str) and table[name].strip()):
            raise InputError(f"{name} {table[name]!r} is not a text: write some, or leave it out")
    if "prompt" not in table:
        raise InputError("prompt is missing: say what to draw")
    sizes = {name: table[name] for name in ("width", "height") if name in table}
    Request(prompt=table["prompt"], **sizes)  # raises for values that no request may have
    stated = table.get("stated", sorted(STATES["dense"]))
    if not isinstance(stated, list) or any(fact not in FACTS for fact in stated):
        raise InputError(f"stated {stated!r} is not known: give a list of {', '.join(FACTS)}")
    open_colour = table.get("open_colour", False)
    if not isinstance(open_colour, bool):
        raise InputError(f"open_colour {open_colour!r} is not a boolean: give true or false")
    scene = _scene(table["scene"]) if "scene" in table else None
    text = table.get("text")
    if text is None and scene is not None:
        text = "\n".join(writing.text for writing in scene.writings) or None
    return Case(table["prompt"], table.get("group", "prompts"), scene, frozenset(stated), open_colour, text, **sizes)


def _scene(table: Any) -> Scene:
    scene = Scene.from_json(table)
    try:
        render(scene, 64)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"the scene cannot be drawn ({error}): take names that the grammar knows") from error
    return scene


def _first_line(error: ValueError) -> str:
    """Return pydantic's first error, as `width 7: Input should be ...`."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    return f"{first['loc'][0]} {first['input']!r}: {first['msg']}"
