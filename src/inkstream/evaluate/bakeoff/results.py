"""The results of a bake-off: one entry for each picture, and for each model shares and means with their intervals."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from inkstream.advice.figures import read_figures
from inkstream.bench.records import write_record
from inkstream.clients.manifest import NAME, read_lines
from inkstream.disk import whole_file
from inkstream.engine.pictures.checks import delta_e2000
from inkstream.evaluate.bakeoff.check import marks_of, read_checks
from inkstream.evaluate.bakeoff.plan import read_plan, read_prompts
from inkstream.evaluate.bakeoff.run import PICTURES
from inkstream.evaluate.ranking import bootstrap_mean
from inkstream.evaluate.report import Judged, Row, shares, wilson
from inkstream.evaluate.verify import LAYOUT, SAME
from inkstream.pocket.colours import lab

MONEY = "cost in US dollars"
"""The cost of a picture: what a provider takes, or the electricity of a picture drawn here."""
SHARES = ("right", "exact", "failed", "duplicates", "lines across", "object", "colours", "background", "places",
          "relation", "count", "clipped", "wrong characters", "NED")  # fmt: skip
"""Measures whose names hold one of these are shown in percent."""


@dataclass(frozen=True)
class Picture:
    """A picture of a bake-off, or its failure. seed: its number among the seeds of the prompt."""

    case: int
    seed: int
    model: int
    file: str | None
    seconds: float | None = None
    cold: bool = False
    peak_bytes: int | None = None
    joules: float | None = None
    cost: float | None = None
    failure: str | None = None  # nan, refusal, error, or blank: all pixels have one colour
    error: str = ""
    checks: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Results:
    """All that is known of a bake-off's folder. rows: shares and means; Row.of is the model's name."""

    folder: Path
    plan: Mapping[str, Any]
    prompts: Mapping[int, Mapping[str, Any]]
    pictures: Sequence[Picture]
    rows: Sequence[Row]

    @property
    def names(self) -> list[str]:
        return [model["name"] for model in self.plan["models"]]


def read_results(folder: Path) -> Results:
    """Read the results of a folder. Raises InputError if it holds no bake-off."""
    plan, prompts, checks = read_plan(folder), read_prompts(folder), read_checks(folder)
    price = read_figures().electricity.price
    lines = {(line["row"], line["index"]): line for line in read_lines(folder / PICTURES / NAME)}
    pictures = [_picture(line, plan["seeds"], checks, price) for _, line in sorted(lines.items())]
    rows = [row for number in range(len(plan["models"])) for row in _rows(number, plan, prompts, pictures)]
    return Results(folder, plan, prompts, pictures, rows)


def _picture(line: Mapping[str, Any], seeds: int, checks: Mapping[str, Mapping[str, Any]], price: float) -> Picture:
    model, seed = divmod(line["index"], seeds)
    found = checks.get(line.get("file", ""))
    blank = found is not None and found["quality"]["blank"]
    joules = sum(line["joules"].values()) if line.get("joules") else None
    cost = line.get("cost")
    if cost is None and joules is not None:
        cost = joules / 3.6e6 * price
    return Picture(
        line["row"], seed, model, line.get("file"), line.get("seconds"), line.get("cold", False),
        line.get("peak_bytes"), joules, cost, "blank" if blank else line.get("failure"), line.get("error", ""), found,
    )  # fmt: skip


def checked(picture: Picture) -> Mapping[str, Any]:
    """The checks of a picture that has them."""
    assert picture.checks is not None
    return picture.checks


# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(model: int, plan: Mapping[str, Any], prompts: Mapping[int, Any], pictures: Sequence[Picture]) -> list[Row]:
    """The rows of a model: what it took, what failed, what was right, and how its pictures are."""
    of, own = plan["models"][model]["name"], [picture for picture in pictures if picture.model == model]
    if not own:
        return []
    drawn = [picture for picture in own if picture.checks is not None]

    def mean(measure: str, get: Callable[[Picture], float | None], among: Iterable[Picture] = own) -> list[Row]:
        values = [(value, picture.case) for picture in among if (value := get(picture)) is not None]
        if not values:
            return []
        middle, low, high = bootstrap_mean([value for value, _ in values], [case for _, case in values])
        return [Row(of, measure, "all", middle, low, high, len(values))]

    def share(measure: str, answers: Iterable[bool | None], group: str = "all") -> list[Row]:
        asked = [bool(answer) for answer in answers if answer is not None]
        value = sum(asked) / max(len(asked), 1)
        return [Row(of, measure, group, value, *wilson(value, len(asked)), len(asked))] if asked else []

    warm = [picture for picture in own if not picture.cold]
    peaks = [picture.peak_bytes for picture in own if picture.peak_bytes is not None]
    seconds = [picture.seconds for picture in warm if picture.seconds is not None]
    failed = share("failed", (picture.failure is not None for picture in own))
    for kind in ("nan", "blank", "refusal", "error"):
        failed += share(f"failed: {kind}", (picture.failure == kind for picture in own))
    return [
        *mean("seconds", lambda p: p.seconds, warm),
        *([Row(of, "seconds, median", "all", median(seconds), pictures=len(seconds))] if seconds else []),
        *([Row(of, "peak memory in bytes", "all", float(max(peaks)), pictures=len(peaks))] if peaks else []),
        *mean("energy in joules", lambda p: p.joules, warm),
        *mean(MONEY, lambda p: p.cost),
        *[row for row in failed if row.value or row.measure == "failed"],
        *share("all right", (checked(p)["right"] for p in drawn)),
        *_by_group(share, "all right", drawn, prompts),
        *_texts(share, mean, drawn),
        *share("colours right", (all(checked(p)["colours"]) if checked(p)["colours"] else None for p in drawn)),
        *share("things right", (all(checked(p)["things"]) if checked(p)["things"] else None for p in drawn)),
        *_graders(of, drawn, prompts),
        *mean("sharpness", lambda p: checked(p)["quality"]["sharpness"], drawn),
        *mean("clipped to black", lambda p: checked(p)["quality"]["dark"], drawn),
        *mean("clipped to white", lambda p: checked(p)["quality"]["bright"], drawn),
        *share("with lines across", (bool(checked(p)["quality"]["seams"]) for p in drawn)),
        *_variety(share, drawn),
    ]  # fmt: skip


def _by_group(share: Any, measure: str, drawn: Sequence[Picture], prompts: Mapping[int, Any]) -> list[Row]:
    groups = list(dict.fromkeys(prompts[picture.case]["group"] for picture in drawn))
    if len(groups) < 2:
        return []
    return [
        row
        for group in groups
        for row in share(measure, (checked(p)["right"] for p in drawn if prompts[p.case]["group"] == group), group)
    ]


def _texts(share: Any, mean: Any, drawn: Sequence[Picture]) -> list[Row]:
    """Exact texts, NED and wrong characters, by script. A picture is exact if all its texts are."""
    scripts = list(dict.fromkeys(text["script"] for picture in drawn for text in checked(picture)["texts"]))
    rows = []
    for group in ["all", *(scripts if len(scripts) > 1 else [])]:

        def of(picture: Picture, group: str = group) -> list[Any]:
            return [text for text in checked(picture)["texts"] if group in ("all", text["script"])]

        def exact(picture: Picture) -> bool | None:
            return all(text["exact"] for text in of(picture)) if of(picture) else None

        def ned(picture: Picture) -> float | None:
            return float(np.mean([text["ned"] for text in of(picture)])) if of(picture) else None

        def wrong(picture: Picture) -> float | None:
            length = sum(text["length"] for text in of(picture))
            return min(sum(text["errors"] for text in of(picture)) / length, 1.0) if length else None

        found = [
            *share("text exact, by rapidocr", map(exact, drawn)),
            *mean("likeness of text (NED), by rapidocr", ned, drawn),
            *mean("wrong characters, by rapidocr", wrong, drawn),
        ]  # fmt: skip
        rows += [Row(**{**asdict(row), "group": group}) for row in found]
    return rows


def _graders(of: str, drawn: Sequence[Picture], prompts: Mapping[int, Any]) -> list[Row]:
    """What the graders of scenes say, as `inkstream eval` tells it."""
    judged = [
        Judged(Path(), picture.case, picture.seed, prompts[picture.case]["group"], marks)
        for picture in drawn
        if picture.checks is not None and (marks := marks_of(picture.checks)) is not None
    ]
    return [row for row in shares(judged, of) if row.measure != "all right"]


def _variety(share: Any, drawn: Sequence[Picture]) -> list[Row]:
    """The diversity over the seeds of a prompt, as `inkstream verify` measures it, and the share of duplicates."""
    by_case: dict[int, list[Any]] = {}
    for picture in drawn:
        data = base64.b64decode(checked(picture)["layout"])
        pixels = np.frombuffer(data, np.uint8).reshape(LAYOUT, LAYOUT, 3)
        by_case.setdefault(picture.case, []).append(lab(pixels))
    apart = [
        (float(delta_e2000(a, b).mean()), case)
        for case, layouts in by_case.items()
        for a, b in combinations(layouts, 2)
    ]
    if not apart:
        return []
    rows = share("duplicates among seeds", (distance <= SAME for distance, _ in apart))
    middle, low, high = bootstrap_mean([distance for distance, _ in apart], [case for _, case in apart])
    return [Row(rows[0].of, "diversity over seeds", "all", middle, low, high, len(apart)), *rows]


# Files ----------------------------------------------------------------------------------------------------------------


def flat(results: Results) -> list[dict[str, Any]]:
    """One flat row for each picture."""
    rows = []
    for picture in results.pictures:
        checks = picture.checks or {}
        texts, quality = checks.get("texts", []), checks.get("quality", {})
        marks = {name: value for name, value in (checks.get("marks") or {}).items() if name not in ("script", "length")}
        prompt = results.prompts[picture.case]
        rows.append({
            "model": results.names[picture.model], "prompt": picture.case, "group": prompt["group"],
            "words": prompt["prompt"], "seed": results.plan["seed"] + 1000 * picture.case + picture.seed,
            "file": picture.file and f"{PICTURES}/{picture.file}", "seconds": picture.seconds, "cold": picture.cold,
            "peak_bytes": picture.peak_bytes, "joules": picture.joules, "cost_usd": picture.cost,
            "failure": picture.failure, "error": picture.error, "right": checks.get("right"),
            "texts": len(texts), "texts_exact": sum(text["exact"] for text in texts),
            "text_errors": sum(text["errors"] for text in texts),
            "text_characters": sum(text["length"] for text in texts),
            "colours": len(checks.get("colours", [])), "colours_right": sum(checks.get("colours", [])),
            "things": len(checks.get("things", [])), "things_right": sum(checks.get("things", [])),
            "sharpness": quality.get("sharpness"), "dark": quality.get("dark"), "bright": quality.get("bright"),
            "lines_across": len(quality.get("seams", [])), **{f"graded_{name}": value for name, value in marks.items()},
        })  # fmt: skip
    return rows


def write_tables(results: Results, more: Mapping[str, Any]) -> None:
    """Write results.csv, a line for each picture, and results.json, with the plan, all rows and what is in `more`."""
    rows = flat(results)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    with whole_file(results.folder / "results.csv") as part:
        part.write_text("\ufeff" + text.getvalue(), "utf-8")  # spreadsheets read UTF-8 by the mark
    told = [{name: value for name, value in asdict(row).items() if value is not None} for row in results.rows]
    document = {"plan": results.plan, "rows": told, **more, "pictures": rows}
    with whole_file(results.folder / "results.json") as part:
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


def as_record(results: Results, name: str, command: str = "", more: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write a record of a bake-off with a row for each model: how it was drawn with, and its measures over all groups.

    It names no path of this machine. command: repeats it; default: that of `inkstream bakeoff`. more: further rows.
    """
    plan = results.plan
    rows = []
    for number, model in enumerate(plan["models"]):
        kept = {key: value for key, value in model.items() if key not in ("name", "options", "on", "weights")}
        row = {"of": model["name"], **model["options"], **model["on"], **kept}
        row["pictures"] = sum(one.model == number and one.file is not None for one in results.pictures)
        for found in results.rows:
            if found.of == model["name"] and found.group == "all":
                key = "".join(char if char.isalnum() else "_" for char in found.measure)
                told = {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
                row |= {key: round(value, 5) for key, value in told.items() if value is not None}
        rows.append(row)
    models = ",".join(model["name"] for model in plan["models"])
    usual = f"inkstream bakeoff {plan['suite']} --models {models} --seeds {plan['seeds']} --limit {plan['prompts']}"
    return write_record(name, date.today().isoformat(), command or usual, {}, [*rows, *more])


def shown(measure: str, value: float) -> str:
    """A value as text in the unit of its measure."""
    if measure.startswith("peak memory"):
        return f"{value / 2**30:.2f} GiB"
    if measure.startswith("seconds"):
        return f"{value:.2f} s"
    if measure.startswith("energy"):
        return f"{value:.1f} J"
    if measure == MONEY:
        return f"${value:.5f}" if 0 < value < 0.001 else f"${value:.4f}"
    return f"{value:.1%}" if any(word in measure for word in SHARES) else f"{value:.4g}"


def as_lines(results: Results) -> list[str]:
    """The rows as lines of text: a line for each measure, a column for each model."""
    found = {(row.of, row.measure, row.group): shown(row.measure, row.value) for row in results.rows}
    keys = list(dict.fromkeys((row.measure, row.group) for row in results.rows))
    titles = [measure if group == "all" else f"{measure}, {group}" for measure, group in keys]
    table = [["", *results.names]]
    table += [[title, *(found.get((name, *key), "") for name in results.names)] for title, key in zip(titles, keys)]
    widths = [max(map(len, column)) for column in zip(*table)]
    return [f"{first:<{widths[0]}}  " + "  ".join(f"{cell:>{wide}}" for cell, wide in zip(rest, widths[1:]))
            for first, *rest in table]  # fmt: skip
