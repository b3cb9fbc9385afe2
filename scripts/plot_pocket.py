"""The scores of Pocket's landed weights over the core-hours of their training: a picture and a table.

    python scripts/plot_pocket.py                      # draws the picture and prints the table
    python scripts/plot_pocket.py --add 321600 6.6     # first adds the present records: samples and core-hours so far

The scores are in benchmarks/records/pocket-hours.json, one entry for each landed weights, from the records of the
suites `people` and `people2`. The picture is docs/pictures/pocket-hours.png, the table is that of docs/pocket.md. The
last column continues the trend: a score that gained g points from the first to the last weights gains
g log((H + 10) / H) / log(H / h) in ten more hours, where h and H are the hours of the first and last weights. So each
doubling of the hours gains equally many points.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from inkstream.engine.pictures.sheet import font

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "records"
LANDED = RECORDS / "pocket-hours.json"
"""For each landed weights: samples and core-hours of the run of recipes/pocket/grown.toml, and scores of each suite."""
MORE = 10.0  # core-hours of the extrapolation
GROUPS = {
    "all": "all", "bare": "one thing", "one attribute": "one more attribute", "dense": "dense", "relation": "relation",
    "count": "count", "English 1-3": "English, 1 to 3", "English 4-6": "English, 4 to 6",
    "English 7-8": "English, 7 or 8", "chinese plain": "Chinese, plain", "Hanzi": "Hanzi",
}  # fmt: skip
SIZE, LEFT, RIGHT, TOP, BOTTOM = (900, 460), 60, 230, 20, 44
INKS = (
    (20, 20, 20), (36, 84, 166), (200, 80, 30), (40, 130, 70), (130, 60, 150), (20, 150, 170), (150, 120, 20),
    (220, 60, 120), (110, 110, 230), (120, 160, 40), (150, 90, 60),
)  # fmt: skip


def scores(suite: str) -> dict[str, tuple[float, int]]:
    """Return share and number of prompts of each group in the present record of a suite."""
    rows = json.loads((RECORDS / f"pocket-{suite}-cpu.json").read_text())["rows"]
    return {row["group"]: (row["value"], row["pictures"]) for row in rows if row.get("measure") == "all right"}


def add(samples: int, hours: float) -> None:
    """Add the present records to the landed weights."""
    landed = json.loads(LANDED.read_text())
    landed.append({"samples": samples, "hours": hours, **{suite: scores(suite) for suite in ("people", "people2")}})
    LANDED.write_text(json.dumps(landed, indent=1) + "\n")


def gain(first: float, last: float, hours: Sequence[float]) -> float:
    """Return what MORE hours add to a share, by the trend from the first to the last landed weights, at most to 1."""
    start, end = hours[0], hours[-1]
    return min((last - first) * math.log((end + MORE) / end) / math.log(end / start), 1 - last)


def table() -> str:
    """Return the Markdown table of all landed weights."""
    landed = json.loads(LANDED.read_text())
    people, untouched = ([one[suite] for one in landed if suite in one] for suite in ("people", "people2"))
    hours = [one["hours"] for one in landed]
    heads = [f"`{suite}`, {one['hours']} h" for suite in ("people", "people2") for one in landed if suite in one]
    lines = [
        f"| prompts | {' | '.join(heads)} | `people` in {MORE:g} more hours |",
        f"|---|{'--:|' * (len(heads) + 1)}",
    ]
    for group, name in GROUPS.items():
        shares = [found[group][0] for found in (*people, *untouched)]
        more = gain(people[0][group][0], people[-1][group][0], hours)
        cells = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(f"| {name} ({people[-1][group][1]}) | {cells} | {more * 100:+.0f} points |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Draw the shares of suite people over the core-hours."""
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    landed = json.loads(LANDED.read_text())
    found, spent = [one["people"] for one in landed], [one["hours"] for one in landed]
    last = math.ceil(spent[-1])
    right, bottom = SIZE[0] - RIGHT, SIZE[1] - BOTTOM
    letters = font(240)

    def at(hours: float, share: float) -> tuple[float, float]:
        return LEFT + hours / last * (right - LEFT), bottom - share * (bottom - TOP)

    for tenth in range(0, 11, 2):
        x, y = at(0, tenth / 10)
        pen.line([(x, y), (right, y)], fill=(225, 225, 225))
        pen.text((x - 8, y), f"{10 * tenth}%", fill=(90, 90, 90), font=letters, anchor="rm")
    for hours in range(last + 1):
        pen.text((at(hours, 0)[0], bottom + 8), str(hours), fill=(90, 90, 90), font=letters, anchor="ma")
    pen.text(
        ((LEFT + right) / 2, bottom + 26), "core-hours of the grown model", fill=(90, 90, 90), font=letters, anchor="ma"
    )
    ends = sorted((found[-1][group][0], group) for group in GROUPS)
    below = bottom + 14.0
    for share, group in ends:  # from low to high: each name is at least a line above the one before
        ink = INKS[list(GROUPS).index(group)]
        points = [at(hours, own[group][0]) for hours, own in zip(spent, found)]
        pen.line(points, fill=ink, width=4 if group == "all" else 2)
        for x, y in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        below = min(at(0, share)[1], below - 15)
        pen.line([points[-1], (right + 8, below)], fill=(200, 200, 200))
        pen.text((right + 12, below), f"{GROUPS[group]} {share:.0%}", fill=ink, font=letters, anchor="lm")
    image.save(path, optimize=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--add"]:
        add(int(sys.argv[2]), float(sys.argv[3]))
    draw(ROOT / "docs" / "pictures" / "pocket-hours.png")
    print(table())
