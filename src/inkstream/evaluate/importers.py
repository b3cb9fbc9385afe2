"""Suites of prompts of others, read from the files that the user downloaded. None is shipped, nothing is downloaded.

A hash is that of the file in the publisher's repository at the named commit. Where no hash is known here, the line says
so. Licences: of the repositories' LICENSE files and the data sets' cards on the hub, read on 2026-11-30.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inkstream.types import InputError

Rows = Iterator[dict[str, Any]]
"""Prompts as the lines of a suite's file: prompt, group, and the text to write where it is known."""


@dataclass(frozen=True)
class Imported:
    """A suite of others. place: where its file is published; hashes: SHA-256 -> the file and its commit."""

    title: str
    file: str
    place: str
    licence: str
    read: Callable[[Path], Rows]
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])


def split(name: str) -> tuple[str, Path] | None:
    """The importer and the path of a name such as geneval:FILE; None for any other name."""
    kind, colon, path = name.partition(":")
    return (kind, Path(path).expanduser()) if colon and kind in IMPORTERS else None


def import_suite(kind: str, path: Path) -> list[dict[str, Any]]:
    """The prompts of a file. Raises InputError, which names the file that is wanted, if it is another one."""
    suite = IMPORTERS[kind]
    try:
        rows = list(suite.read(path))
    except OSError as error:
        reason = error.strerror or "no such file"
        raise InputError(f"{path} cannot be read ({reason}): download {suite.file} from {suite.place}") from None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
        rows = []
    if not rows or not all(isinstance(text, str) for row in rows for text in row.values()):
        raise InputError(f"{path} is not {suite.file} of {suite.title}: download it from {suite.place}")
    return rows


def about(kind: str, path: Path) -> str:
    """A line about a suite: its licence, and whether the file is the one that is known."""
    suite = IMPORTERS[kind]
    if not suite.hashes:
        hashed = "its SHA-256 is not known here"
    elif not path.is_file():
        hashed = "its SHA-256 is not checked"
    elif known := suite.hashes.get(digest := hashlib.sha256(path.read_bytes()).hexdigest()):
        hashed = f"SHA-256 {digest[:16]}... is that of {known}"
    else:
        wanted = " or ".join(f"{one[:16]}..." for one in suite.hashes)
        hashed = f"SHA-256 {digest[:16]}... is not {wanted}: another version, or changed"
    return f"{suite.title}, licence {suite.licence}; {hashed}"


# Formats --------------------------------------------------------------------------------------------------------------


def _geneval(path: Path) -> Rows:
    for line in _json_lines(path):
        yield {"prompt": line["prompt"], "group": line["tag"]}


def _longtext(path: Path) -> Rows:
    for line in _json_lines(path):
        yield {"prompt": line["prompt"], "group": line["category"], "text": "\n".join(line["text"])}


def _dpg(path: Path) -> Rows:
    """The folder of texts, or the table, which has a row for each question about a picture."""
    if path.is_dir():
        for file in sorted(path.glob("*.txt"), key=lambda file: (len(file.stem), file.stem)):
            yield {"prompt": " ".join(file.read_text("utf-8").split())}
        return
    seen = set[str]()
    for line in _table(path):
        if line["item_id"] not in seen:
            seen.add(line["item_id"])
            yield {"prompt": " ".join(line["text"].split())}


def _oneig(path: Path) -> Rows:
    for line in _table(path):
        yield {"prompt": line.get("prompt_en") or line["prompt_cn"], "group": line["category"]}


def _cvtg(path: Path) -> Rows:
    """A file N.json or N_combined.json, of prompts with N texts, or the unpacked folder."""
    files = sorted(path.rglob("[0-9].json")) if path.is_dir() else [path]
    for file in files:
        found = json.loads(file.read_text("utf-8"))
        count = file.stem.partition("_")[0]
        listed = found.get("data_list")
        prompts = [line["prompt"] for line in listed] if listed is not None else list(found.values())
        for prompt in prompts:
            yield {"prompt": prompt, "group": f"{file.parent.name} {count}" if path.is_dir() else f"{count} texts"}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def _table(path: Path) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline=""))


IMPORTERS: dict[str, Imported] = {
    "geneval": Imported(
        "GenEval", "prompts/evaluation_metadata.jsonl", "github.com/djghosh13/geneval", "MIT", _geneval,
        {"5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13": "evaluation_metadata.jsonl of d927da8e"},
    ),
    "dpg": Imported(
        "DPG-Bench", "the folder dpg_bench/prompts or dpg_bench.csv", "github.com/TencentQQGYLab/ELLA", "Apache-2.0",
        _dpg,
    ),
    "cvtg": Imported(
        "CVTG-2K", "CVTG-2K.zip, unpacked,", "huggingface.co/datasets/dnkdnk/CVTG-2K", "Apache-2.0", _cvtg,
    ),
    "longtext": Imported(
        "LongText-Bench", "text_prompts.jsonl or text_prompts_zh.jsonl",
        "huggingface.co/datasets/X-Omni/LongText-Bench", "Apache-2.0", _longtext,
        {"a2130769e72bd8560470a066114cdac87f80f1eb071ba6bc0f7033225a9be0d8": "text_prompts.jsonl of 10c33d30",
         "6512cd121ac093e8113e114d76eb2c0ce967c220b18e2049e1063554ce496758": "text_prompts_zh.jsonl of 10c33d30"},
    ),
    "oneig": Imported(
        "OneIG-Bench", "OneIG-Bench.csv or OneIG-Bench-ZH.csv", "github.com/OneIG-Bench/OneIG-Benchmark",
        "CC BY-NC 4.0 (no commercial use)", _oneig,
        {"e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1": "OneIG-Bench.csv of 9a89d8cb",
         "8fc4ae1403db32dbb1203cc457361c3215500b34e741194a53f5002c9d824700": "OneIG-Bench-ZH.csv of 9a89d8cb"},
    ),
}  # fmt: skip
"""Beginnings of names of suites -> how the file behind the colon is read."""
