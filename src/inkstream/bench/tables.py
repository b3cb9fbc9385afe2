"""Tables of the docs, rendered from the records: what a page says of a measurement is what was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inkstream.bench.records import RECORDS, read_record

Row = Mapping[str, Any]
PLACE = re.compile(r"(<!-- record ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where a page shows a record: between these two comments."""


def fill(page: str, folder: Path = RECORDS) -> str:
    """A page with the tables of the records that it names."""
    return PLACE.sub(lambda found: found[1] + "\n" + shown(found[2], folder) + "\n" + found[3], page)


def shown(name: str, folder: Path = RECORDS) -> str:
    """One record: on what it was measured, its table, and the command that measures it again."""
    if not (folder / f"{name}.json").exists():
        return "Not measured yet.\n"
    record = read_record(name, folder)
    machine = record["machine"]
    on = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    beside = ", ".join(f"{peer} {version}" for peer, version in record["peers"].items())
    facts = f"{on}, torch {machine['torch']}" + (f", beside {beside}" if beside else "")
    table = next(make for prefix, make in TABLES.items() if name.startswith(prefix))(record["rows"])
    lines = [f"{facts}, {record['date']}: `{record['command']}`", "", *(f"| {' | '.join(row)} |" for row in table)]
    return "\n".join(lines) + "\n"


def speed(rows: Sequence[Row]) -> list[list[str]]:
    """Cases, and who drew them."""
    heads = ["Case", "Picture", "Asked", "By", "Ratio", "Seconds", "Prompt", "Steps", "Pixels", "Memory"]
    return [
        heads,
        ["---"] * 4 + ["--:"] * 6,
        *(
            [
                row["case"],
                f"{row['width']}x{row['height']}" + (f", {row['pictures']} at once" if row["pictures"] > 1 else ""),
                f"{row['evaluations']} times",
                row["contender"],
                "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                f"{row['median']:.3g} ({row['least']:.3g} to {row['most']:.3g})",
                *(f"{row[f'{stage}_median']:.3g}" for stage in ("prompt", "steps", "pixels")),
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB",
            ]
            for row in rows
        ),
    ]


def caches(rows: Sequence[Row]) -> list[list[str]]:
    """Settings, what they save and what becomes of the pictures."""
    heads = ["Setting", "Times as fast", "Block rows computed", "PSNR, median", "least", "All right", "Things right"]
    return [
        heads,
        ["---"] + ["--:"] * 6,
        *(
            [
                row["setting"],
                f"{row['speed_up']:.2f}",
                f"{row['blocks']:.0%}",
                *("" if row[name] is None else f"{row[name]:.1f} dB" for name in ("psnr_median", "psnr_least")),
                f"{row['all_right']:.0%}",
                f"{row['objects']:.0%}",
            ]
            for row in rows
        ),
    ]


def plans(rows: Sequence[Row]) -> list[list[str]]:
    """Models under plans: bytes foreseen and measured, and times."""
    heads = ["Model", "Plan", "Computes in", "Pixels", "Foreseen", "Measured", "Ratio", "Load", "Evaluation", "In all"]
    return [
        heads,
        ["---"] * 3 + ["--:"] * 7,
        *(
            [
                row["model"],
                row["plan"],
                row["dtype"],
                str(row["pixels"]),
                *(f"{row[name] / 2**30:.2f} GiB" for name in ("foreseen", "measured")),
                f"{row['foreseen'] / row['measured']:.2f}",
                *(f"{row[name]:.1f} s" for name in ("load", "evaluation", "seconds")),
            ]
            if "error" not in row
            else [row["model"], row["plan"], row["error"], *[""] * 7]
            for row in rows
        ),
    ]


def stages(rows: Sequence[Row]) -> list[list[str]]:
    """Pieces of a process."""
    return [
        ["Piece", "Seconds", "Of the processor"],
        ["---", "--:", "--:"],
        *([row["stage"], f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}"] for row in rows),
    ]


def kernels(rows: Sequence[Row]) -> list[list[str]]:
    """Pieces of a model, and ways to compute them."""
    return [
        ["Piece", "Way", "Milliseconds", "Ratio", "Apart"],
        ["---", "---", "--:", "--:", "--:"],
        *(
            [row["case"], row["way"], f"{row['milliseconds']:.3f}", f"{row['ratio']:.2f}", f"{row['apart']:.1e}"]
            for row in rows
        ),
    ]


TABLES: Mapping[str, Callable[[Sequence[Row]], list[list[str]]]] = {
    "plans": plans,
    "memory-gpu": plans,
    "speed-": speed,
    "cache-": caches,
    "start-": stages,
    "kernels-": kernels,
}
"""How the name of a record begins -> its table."""
