"""The report of a bake-off: report.html, which is one file, and the contact sheets."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from inkstream.disk import whole_file
from inkstream.engine.pictures.sheet import Tile, contact_sheet
from inkstream.evaluate.bakeoff.results import MONEY, Picture, Results, shown
from inkstream.evaluate.bakeoff.run import PICTURES
from inkstream.evaluate.bakeoff.votes import REPORT
from inkstream.evaluate.bakeoff.words import Language, words
from inkstream.evaluate.report import MARKS, Row
from inkstream.evaluate.run import open_picture

SHOWN = 60
"""Most prompts whose pictures are in the page."""
SIDE = 320
"""Longest side of a picture in the page, in pixels."""
ROWS = 20
"""Rows of a contact sheet."""
TILE = 128


def write_report(
    results: Results, language: Language, rankings: Sequence[Mapping[str, Any]], sheets: Sequence[str]
) -> Path:
    """Write report.html and return its path. rankings: as `ballot.rank_votes` makes them."""

    def say(text: str, **values: object) -> str:
        return escape(words(language, text, **values))

    plan = results.plan
    number = {"prompts": len(results.prompts), "models": len(results.names), "seeds": plan["seeds"]}
    size = say("{prompts} prompts x {models} models x {seeds} seeds", **number)
    parts = [
        f"<h1>{say('Bake-off')}: {escape(plan['suite'])}</h1>",
        f'<p class="faint">{size} · {say("Machine")}: {escape(_machine(plan["machine"]))}</p>',
        f"<h2>{say('At a glance')}</h2>",
        _glance(results, say),
        *(_ranking(results.names, ranking, say) for ranking in rankings),
        f"<h2>{say('Prompts and pictures')}</h2>",
        _pictures(results, say),
        f"<h2>{say('All measures')}</h2>",
        _measures(results, say),
        f"<h2>{say('Models and settings')}</h2>",
        _settings(plan["models"], say),
        f"<h2>{say('What the numbers mean')}</h2>",
        *(f"<p>{say(line)}</p>" for line in NOTES),
        f"<h2>{say('Files')}</h2>",
        '<p><a href="results.csv">results.csv</a> · <a href="results.json">results.json</a> · '
        '<a href="plan.json">plan.json</a></p>',
        f"<p>{say('Contact sheets')}: "
        + " · ".join(f'<a href="{one}">{Path(one).stem}</a>' for one in sheets)
        + "</p>",
    ]
    page = Template(Path(__file__).with_name("report.html").read_text("utf-8")).substitute(
        language="zh-CN" if language == "zh" else "en",
        title=f"{say('Bake-off')}: {escape(plan['suite'])}",
        models=len(results.names), body="\n".join(parts), close=say("close"),
    )  # fmt: skip
    path = results.folder / REPORT
    with whole_file(path) as part:
        part.write_text(page, "utf-8")
    return path


NOTES = (
    "Shares have 95 % intervals by Wilson.",
    "Means have 95 % intervals by resampling whole prompts: pictures of one prompt depend on each other.",
    "Seconds are from the request to the picture. The first picture after a model is loaded does not count.",
    "Memory is that of the GPU, or of the whole process on a CPU.",
    "Energy is that of the GPU and of whole processors, where they tell it.",
    "The cost is a provider's price, or electricity.",
)


def _machine(machine: Mapping[str, Any]) -> str:
    on = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{on}, torch {machine['torch']}, inkstream {machine['inkstream']}"


# Tables ---------------------------------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML. The first cell of a row is its head."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return f'<div class="wide" tabindex="0"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _named(model: str) -> str:
    """A model's name as HTML. A narrow column may break it before each option."""
    return escape(model).replace("@", "<wbr>@")


def _glance(results: Results, say: Any) -> str:
    found = {(row.of, row.measure): row for row in results.rows if row.group == "all"}
    columns = {"All right": "all right", "Text exact": "text exact, by rapidocr", "Seconds": "seconds",
               "Peak memory": "peak memory in bytes", "Energy": "energy in joules", "Cost": MONEY,
               "Failed": "failed"}  # fmt: skip
    heads = [say(head) for head in ("Model", *columns)]
    rows = []
    for name in results.names:
        cells = []
        for title, measure in columns.items():
            row = found.get((name, measure))
            empty = say("not asked" if title.startswith(("All right", "Text")) else "not told")
            cells.append(
                f'<span class="faint">{empty}</span>' if row is None else _cell(row, scaled=title == "All right")
            )
        rows.append([_named(name), *cells])
    return _table(heads, rows)


def _cell(row: Row, scaled: bool = False) -> str:
    """A value with its interval, and on a scale from 0 to 100 % if it is to be seen at a glance."""
    text = shown(row.measure, row.value)
    if row.low is None or row.high is None:
        return text
    low, high = shown(row.measure, row.low), shown(row.measure, row.high)
    text += "" if low == high == text else f"<small>{low} - {high}</small>"
    if scaled:
        left, wide, middle = 100 * row.low, 100 * (row.high - row.low), 100 * row.value
        bar = f'<i style="left:{left:.1f}%;width:{wide:.1f}%"></i><b style="left:{middle:.1f}%"></b>'
        text += f'<div class="scale" aria-hidden="true">{bar}</div>'
    return text


def _measures(results: Results, say: Any) -> str:
    found = {(row.of, row.measure, row.group): row for row in results.rows}
    keys = list(dict.fromkeys((row.measure, row.group) for row in results.rows))
    rows = []
    for measure, group in keys:
        title = say(measure) + ("" if group == "all" else f", {say(group)}")
        cells = [_cell(row) if (row := found.get((name, measure, group))) else "" for name in results.names]
        rows.append([title, *cells])
    return _table([say("Measure"), *map(_named, results.names)], rows)


def _settings(models: Sequence[Mapping[str, Any]], say: Any) -> str:
    def size(model: Mapping[str, Any]) -> str:
        return f"{model['width']}x{model['height']}" if "width" in model else ""

    def weights(model: Mapping[str, Any]) -> str:
        found = model["weights"] or {}
        return "; ".join(f"{name} {digest[:12]}" for name, digest in found.items())

    def options(model: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={value}" for key, value in {**model["options"], **model["on"]}.items())

    def fact(name: str) -> Any:
        return lambda model: "" if model.get(name) is None else say(str(model[name]))

    names = ("where", "quant", "device", "dtype", "steps", "evaluations", "guidance", "solver", "licence")
    columns = {**{name: fact(name) for name in names}, "size": size, "options": options, "weights": weights}
    rows = [[say(name), *((get(model) or f'<span class="faint">{say("not told")}</span>') for model in models)]
            for name, get in columns.items()]  # fmt: skip
    return _table([say("Model"), *(_named(model["name"]) for model in models)], rows, "left")


def _ranking(names: Sequence[str], ranking: Mapping[str, Any], say: Any) -> str:
    models = sorted(ranking["models"], key=lambda model: -model["points"])
    low, high = (edge(model[name] for model in models) for edge, name in ((min, "low"), (max, "high")))
    span = max(high - low, 1)
    rows = []
    for model in models:
        left, wide = 100 * (model["low"] - low) / span, 100 * (model["high"] - model["low"]) / span
        dot = 100 * (model["points"] - low) / span
        bar = f'<i style="left:{left:.1f}%;width:{wide:.1f}%"></i><b style="left:{dot:.1f}%"></b>'
        points = (
            f"{model['points']:.0f}<small>{model['low']:.0f} - {model['high']:.0f}</small>"
            f'<div class="scale" aria-hidden="true">{bar}</div>'
        )
        rows.append([_named(model["name"]), str(model["rank"]), points, str(model["votes"]), str(model["bad"])])
    order = [names.index(model["name"]) for model in models]
    better = [[_named(names[a]), *("" if a == b else f"{ranking['better'][a][b]:.0%}" for b in order)] for a in order]
    voters = [
        [escape(voter["name"]), str(voter["votes"]), _bias(voter), str(voter.get("inconsistent", ""))]
        for voter in ranking["voters"]
    ]
    agree = ranking["agreement"]
    return "".join([
        f"<h2>{say(ranking['title'], votes=ranking['votes'])}</h2>",
        _table([say(head) for head in ("Model", "Rank", "Points", "Votes", "Both bad")], rows),
        f"<p>{say('Models whose intervals overlap share a rank. 400 points more are odds of ten to one.')}</p>",
        f"<h3>{say('P(row is better than column)')}</h3>",
        _table(["", *(_named(names[b]) for b in order)], better),
        f"<h3>{say('Voters')}</h3>",
        _table([say(head) for head in ("Voters", "Votes", "left wins", "inconsistent answers")], voters),
        f"<p>{say('share of ties between equal models')}: {ranking['ties']:.0%}"
        + ("" if agree is None else f" · {say(AGREEMENT)}: {agree:.2f}") + "</p>",
    ])  # fmt: skip


AGREEMENT = "agreement (Krippendorff's alpha)"


def _bias(voter: Mapping[str, Any]) -> str:
    if not voter["decided"]:
        return ""
    return f"{voter['left']:.0%}<small>{voter['left_low']:.0%} - {voter['left_high']:.0%}</small>"


# Pictures -------------------------------------------------------------------------------------------------------------


def _pictures(results: Results, say: Any) -> str:
    numbers = list(results.prompts)
    most = min(SHOWN, len(numbers))
    chosen = [numbers[(2 * i + 1) * len(numbers) // (2 * most)] for i in range(most)]
    found = {(picture.case, picture.model, picture.seed): picture for picture in results.pictures}
    parts = []
    if most < len(numbers):
        note = "{shown} of {total} prompts are shown here; the contact sheets have all."
        parts.append(f"<p>{say(note, shown=most, total=len(numbers))}</p>")
    for number in chosen:
        columns = []
        for model, name in enumerate(results.names):
            seeds = [found.get((number, model, seed)) for seed in range(results.plan["seeds"])]
            tiles = "".join(_tile(results, picture, name, say) for picture in seeds)
            columns.append(f'<figure><figcaption>{escape(name)}</figcaption><div class="seeds">{tiles}</div></figure>')
        prompt = escape(results.prompts[number]["prompt"])
        parts.append(f'<div class="prompt"><p>{prompt}</p><div class="row" tabindex="0">{"".join(columns)}</div></div>')
    return "".join(parts)


def _tile(results: Results, picture: Picture | None, name: str, say: Any) -> str:
    if picture is None or picture.file is None:
        return f"<span>{say('not drawn') if picture is None else escape(picture.error or picture.failure or '')}</span>"
    right = picture.checks and picture.checks["right"]
    sign, kind = {True: ("✓", "right"), False: ("✗", "wrong"), None: ("–", "not checked")}[right]
    data = base64.b64encode(_thumbnail(results.folder / PICTURES / picture.file)).decode()
    title = f"{name} · {results.prompts[picture.case]['prompt']}"
    return (
        f'<button title="{escape(title)}"><img alt="{escape(name)}: {say(kind)}" src="data:image/webp;base64,{data}">'
        f'<em class="{kind if right is not None else "faint"}" aria-hidden="true">{sign}</em></button>'
    )


def _thumbnail(path: Path) -> bytes:
    picture = open_picture(path)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82)
    return buffer.getvalue()


def write_sheets(results: Results) -> list[str]:
    """Write the contact sheets: prompts are rows, models are columns, one set for each seed. Returns their names."""
    found = {(picture.case, picture.model, picture.seed): picture for picture in results.pictures}
    numbers, names = list(results.prompts), []
    (results.folder / "sheets").mkdir(exist_ok=True)
    for seed in range(results.plan["seeds"]):
        for sheet, start in enumerate(range(0, len(numbers), ROWS), 1):
            tiles = [
                _sheet_tile(results, found.get((number, model, seed)), number, model)
                for number in numbers[start : start + ROWS]
                for model in range(len(results.names))
            ]
            name = f"sheets/seed-{seed + 1}-{sheet:02d}.png"
            heading = " · ".join(results.names)
            with whole_file(results.folder / name) as part:
                contact_sheet(tiles, len(results.names), TILE, heading).save(part, "PNG")
            names.append(name)
    return names


def _sheet_tile(results: Results, picture: Picture | None, number: int, model: int) -> Tile:
    """A tile with the prompt below the first model's picture, and the model's name below the others."""
    text = results.prompts[number]["prompt"] if model == 0 else results.names[model]
    if picture is None or picture.file is None:
        return Tile(
            Image.new("RGB", (TILE, TILE), (225, 225, 230)), f"{text}: {picture.error if picture else '-'}", "wrong"
        )
    mark = MARKS[picture.checks["right"] if picture.checks else None]
    return Tile(open_picture(results.folder / PICTURES / picture.file), text, mark)
