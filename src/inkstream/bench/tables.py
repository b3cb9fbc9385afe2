"""Render the docs' tables from the records, so that the pages show the measured numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inkstream.bench.records import RECORDS, read_record

Row = Mapping[str, Any]
Cell = Callable[[Row], str]
PLACE = re.compile(r"(<!-- record ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""The place of a record in a page: between these two comments."""


def fill(page: str, folder: Path = RECORDS) -> str:
    """Return a page with the tables of all records that it names."""
    return PLACE.sub(lambda found: found[1] + "\n" + shown(found[2], folder) + "\n" + found[3], page)


def shown(name: str, folder: Path = RECORDS) -> str:
    """Render one record: the machine, the versions, the date, the command that measures it, and the table."""
    if not (folder / f"{name}.json").exists():
        return "Not measured yet.\n"
    record = read_record(name, folder)
    machine = record["machine"]
    on = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} core{'' if machine['cores'] == 1 else 's'}"
    beside = ", ".join(f"{peer} {version}" for peer, version in record["peers"].items())
    facts = f"{on}, torch {machine['torch']}" + (f", compared with {beside}" if beside else "")
    words, numbers = next(columns for prefix, columns in TABLES.items() if name.startswith(prefix))
    table = [
        [*words, *numbers],
        ["---"] * len(words) + ["--:"] * len(numbers),
        *([cell(row) for cell in (*words.values(), *numbers.values())] for row in record["rows"]),
    ]
    lines = [f"{facts}, {record['date']}: `{record['command']}`", "", *(f"| {' | '.join(row)} |" for row in table)]
    return "\n".join(lines) + "\n"


# Cells: a cell is empty if the row lacks the field or the field is None -----------------------------------------------


def field(name: str, form: str = "", unit: str = "", scale: float = 1) -> Cell:
    """Return a cell that shows a field of the row: as it is, or times `scale` in the format `form`."""

    def cell(row: Row) -> str:
        if (value := row.get(name)) is None:
            return ""
        return f"{value * scale:{form}}{unit}" if form else f"{value}{unit}"

    return cell


def gibibytes(name: str) -> Cell:
    return field(name, ".2f", " GiB", 2**-30)


def percent(name: str) -> Cell:
    return field(name, ".0%")


def within(name: str) -> Cell:
    """Return a cell that shows a share and its interval."""

    def cell(row: Row) -> str:
        if row.get(name) is None:
            return ""
        return f"{row[name]:.1%} ({row[f'{name}_low']:.0%} to {row[f'{name}_high']:.0%})"

    return cell


def picture(row: Row) -> str:
    return f"{row['width']}x{row['height']}" + (f", {row['pictures']} at once" if row["pictures"] > 1 else "")


def spread(row: Row) -> str:
    return f"{row['median']:.3g} ({row['least']:.3g} to {row['most']:.3g})"


def median_of_unit(row: Row) -> str:
    return f"{row['median']:.3g} {row['unit']}"


def foretold(row: Row) -> str:
    return "" if "error" in row else f"{row['foreseen'] / row['measured']:.2f}"


def computes(row: Row) -> str:
    return row.get("error") or row["dtype"]


Columns = tuple[Mapping[str, Cell], Mapping[str, Cell]]
"""Columns of text, aligned left, and columns of numbers, aligned right."""

PLANS: Columns = (
    {"Model": field("model"), "Plan": field("plan"), "Dtype": computes},
    {
        "Pixels": field("pixels"),
        "Predicted": gibibytes("foreseen"),
        "Measured": gibibytes("measured"),
        "Ratio": foretold,
        "Load": field("load", ".1f", " s"),
        "Evaluation": field("evaluation", ".1f", " s"),
        "Total": field("seconds", ".1f", " s"),
    },
)
TABLES: Mapping[str, Columns] = {
    "bakeoff-": (
        {"": field("of")},
        {
            "Pictures": field("pictures"),
            "Drawn again": field("drawn_again"),
            "All right": within("all_right"),
            "Text exact, by rapidocr": within("text_exact__by_rapidocr"),
            "Object and colour": field("object_and_colour", ".1%"),
            "Count": field("count", ".1%"),
            "Relation": field("relation", ".1%"),
            "Seconds, median": field("seconds__median", ".2f"),
            "Memory": gibibytes("peak_memory_in_bytes"),
            "Dollars": field("cost_in_US_dollars", ".4f"),
            "Failed": field("failed", ".1%"),
        },
    ),
    "verify": (
        {"Asked for": field("kind")},
        {
            "True pictures": field("truths"),
            "Accepted": field("true_right", ".1%"),
            "Wrong pictures": field("wrong"),
            "Refused": field("wrong_right", ".1%"),
        },
    ),
    "until-verified": (
        {"Drawn": field("drawings")},
        {
            "Prompts": field("prompts"),
            "Exact text, by rapidocr": field("exact", ".1%"),
            "Exact text, by inkstream's own reader": field("exact_by_own_reader", ".1%"),
            "Drawings a picture": field("drawings_a_picture", ".2f"),
        },
    ),
    "marks": (
        {"Pictures": field("kind")},
        {
            "Number": field("pictures"),
            "PSNR": field("psnr", ".1f", " dB"),
            "Unchanged": percent("unchanged"),
            "JPEG 80": percent("jpeg_80"),
            "75 %": percent("resized_75"),
            "75 %, JPEG 80": percent("resized_75_jpeg_80"),
            "JPEG 50": percent("jpeg_50"),
            "50 %": percent("resized_50"),
            "10 % brighter": percent("brighter_10"),
            "5 % cropped": percent("cropped_5"),
            "Found where none is": field("found_in_unmarked"),
        },
    ),
    "plans": PLANS,
    "memory-gpu": PLANS,
    "train": (
        {"Base": field("base"), "Layers": field("layers"), "Rank": field("rank")},
        {
            "Pixels": field("pixels"),
            "Predicted": gibibytes("foreseen"),
            "Measured": gibibytes("measured"),
            "Ratio": lambda row: f"{row['foreseen'] / row['measured']:.2f}",
            "Seconds": field("seconds", ".0f"),
        },
    ),
    "convert": (
        {"Model": field("model"), "`--quant`": field("kind")},
        {
            "Peak": gibibytes("peak"),
            "Seconds": field("seconds", ".0f"),
            "CPU seconds": field("cpu_seconds", ".0f"),
            "Written": gibibytes("bytes"),
        },
    ),
    "quant-pocket": (
        {"`--quant`": field("kind")},
        {
            "In this format": percent("share"),
            "Bits per number": field("bits", ".2f"),
            "Files": field("megabytes", ".1f", " MB"),
            "PSNR, median": field("psnr_median", ".1f", " dB"),
            "PSNR, 10th percentile": field("psnr_tenth", ".1f", " dB"),
            "Evaluation error": field("one_evaluation", ".1%"),
            "All right": percent("all_right"),
            "Objects right": percent("objects"),
            "Relations right": percent("relation"),
            "Counts right": percent("count"),
            "Product error, 3840 rows": field("product_3840", ".2%"),
            "Product error, 10240 rows": field("product_10240", ".2%"),
        },
    ),
    "quant-speed": (
        {"`--quant`": field("kind")},
        {
            "Ratio": field("ratio", ".2f"),
            "Seconds": field("seconds_median", ".2f"),
            "Least": field("seconds_least", ".2f"),
            "Most": field("seconds_most", ".2f"),
            "Error": field("error", ".1%"),
        },
    ),
    "batching": (
        {"Measured": field("what"), "": field("note")},
        {
            "Together": field("together", ".4g"),
            "One by one": field("one_by_one", ".4g"),
            "Ratio": field("ratio", ".2f"),
        },
    ),
    "speed-": (
        {
            "Case": field("case"),
            "Picture": picture,
            "Evaluations": field("evaluations"),
            "Contender": field("contender"),
        },
        {
            "Ratio": field("ratio", ".2f"),
            "Seconds": spread,
            "Prompt": field("prompt_median", ".3g"),
            "Steps": field("steps_median", ".3g"),
            "Pixels": field("pixels_median", ".3g"),
            "Memory": gibibytes("peak_bytes"),
        },
    ),
    "cache-": (
        {"Setting": field("setting")},
        {
            "Speed-up": field("speed_up", ".2f"),
            "Block rows computed": percent("blocks"),
            "PSNR, median": field("psnr_median", ".1f", " dB"),
            "PSNR, least": field("psnr_least", ".1f", " dB"),
            "All right": percent("all_right"),
            "Objects right": percent("objects"),
        },
    ),
    "pocket-edit-": (
        {"Graded": field("graded"), "Kind": field("kind")},
        {
            "Pictures": field("pictures"),
            "Asked change": percent("asked"),
            "Things and grounds that stayed": percent("facts"),
            "All else stayed": percent("kept"),
            "Both": percent("both"),
        },
    ),
    "pocket-inpaint-": (
        {"Kind": field("kind")},
        {
            "Pictures": field("pictures"),
            "Right": percent("right"),
            "Bytes outside equal": percent("outside_equal"),
            "New pixels of the background": percent("background_share"),
            "Mean step over the seam, of 255": field("seam_levels", ".2g"),
            "Mean largest step in the new space": field("steepest_levels", ".2g"),
        },
    ),
    "larger-": (
        {"Pixels": field("pixels"), "Window": field("tile"), "Strength": field("strength")},
        {
            "Windows": field("windows"),
            "Evaluations": field("evaluations"),
            "Seconds": field("seconds"),
            "Memory foreseen": gibibytes("foreseen"),
            "Memory measured": gibibytes("measured"),
            "Foreseen / measured": field("foreseen_share", ".2f"),
            "Seam ratio, rows": field("drawn_rows", ".3f"),
            "Seam ratio, columns": field("drawn_columns", ".3f"),
            "Start picture, rows": field("start_rows", ".3f"),
            "Start picture, columns": field("start_columns", ".3f"),
        },
    ),
    "fuzz-": (
        {"Input": field("kind")},
        {
            "Cases": field("cases"),
            "Taken": field("taken"),
            "Refused in one line": field("refused"),
            "Faults": field("faults"),
            "Slowest": field("slowest_seconds", ".1f", " s"),
        },
    ),
    "text-server-": (
        {"Model": field("model"), "": field("how")},
        {
            "Tokens": field("tokens"),
            "Bytes of states": field("bytes", ",.0f"),
            "Encoded here": field("seconds_here", ".1f", " ms", 1000),
            "By the server": field("seconds_away", ".1f", " ms", 1000),
            "Weights not read": gibibytes("weights_bytes"),
        },
    ),
    "start-": (
        {"Stage": field("stage")},
        {"Seconds": field("seconds", ".2f"), "CPU seconds": field("cpu_seconds", ".2f")},
    ),
    "profile-": (
        {"Case": field("case")},
        {
            "Steps": field("seconds", ".3g", " s"),
            "Matrix products": percent("products"),
            "Attention": percent("attention"),
            "Passes over memory": percent("passes"),
            "Between operations": percent("between"),
        },
    ),
    "kernels-": (
        {"Operation": field("case"), "Method": field("way")},
        {
            "Milliseconds": field("milliseconds", ".3f"),
            "Ratio": field("ratio", ".2f"),
            "Difference": field("apart", ".1e"),
        },
    ),
    "serve-faults": (
        {},
        {
            "Jobs": field("jobs"),
            "Clients": field("clients"),
            "Rounds": field("rounds"),
            "Engine kills": field("engine_kills"),
            "Server kills": field("server_kills"),
            "Kills while drawing": field("at_work"),
            "Pictures": field("pictures"),
            "Lost, doubled or damaged": field("problems"),
        },
    ),
    "serve-": (
        {"Measured": field("what"), "": field("note")},
        {
            "Median": median_of_unit,
            "95th percentile": field("p95", ".3g"),
            "Most": field("most", ".3g"),
            "Samples": field("samples"),
        },
    ),
}
"""Prefix of a record's name -> the columns of its table."""
