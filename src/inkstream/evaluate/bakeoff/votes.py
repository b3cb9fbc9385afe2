"""Blind votes: the files of a folder that the voting page and its server need. Nothing here needs torch.

The names of pictures in the page are random. `.key.json` says which picture is whose; it stays in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from inkstream.disk import whole_file
from inkstream.evaluate.ranking import Verdict
from inkstream.types import InputError, as_object

KEY, PAGE, SHOWN, VOTES, REPORT = ".key.json", "vote.html", "vote", "votes", "report.html"
VERDICTS: tuple[str, ...] = get_args(Verdict)
JUDGE = "judge"
"""The kind of a voter that is a model."""


@dataclass(frozen=True)
class Key:
    """Which picture is whose. pictures: name in the page -> prompt, seed, model, file."""

    ballot: str
    pictures: Mapping[str, Mapping[str, Any]]


def read_key(folder: Path) -> Key:
    """Read the key of a folder. Raises InputError if there is none."""
    try:
        found = json.loads((folder / KEY).read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder} has no voting page: run inkstream bakeoff vote {folder}") from None
    return Key(found["ballot"], found["pictures"])


def read_votes(text: str, key: Key, name: str) -> list[dict[str, Any]]:
    """Read a file of votes, one JSON object a line. Raises InputError, which names the line, if one is none of ours."""
    votes = []
    for number, written in enumerate(text.splitlines(), 1):
        if not written.strip():
            continue
        try:
            line = as_object(json.loads(written)) or {}
        except ValueError:
            line = {}
        named = all(isinstance(line.get(field), str) for field in ("voter", "left", "right"))
        if not named or line.get("verdict") not in VERDICTS:
            raise InputError(f"{name}, line {number} is not a vote: download the votes from vote.html again")
        if line.get("ballot") != key.ballot or not {line["left"], line["right"]} <= key.pictures.keys():
            raise InputError(f"{name}, line {number} is a vote of another bake-off: give files of votes of this one")
        votes.append(line)
    return votes


def add_votes(folder: Path, path: Path) -> int:
    """Copy a voter's file into the folder, and return its number of votes. A later file of the voter replaces it."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a file of votes from vote.html") from None
    return save_votes(folder, text, str(path))


def save_votes(folder: Path, text: str, name: str, voter: str = "") -> int:
    """Save a voter's votes, whole or not at all. Raises InputError if they are none, or of several voters.

    voter: who has voted, if that is known better than the votes tell.
    """
    votes = read_votes(text, read_key(folder), name)
    if voter:
        votes = [{**line, "voter": voter} for line in votes]
    voters = {(line["voter"], str(line.get("token", ""))) for line in votes}
    if len(voters) != 1:
        raise InputError(f"{name} has votes of {len(voters)} voters: give the file of one voter")
    ((voter, token),) = voters
    target = folder / VOTES / f"{file_name(voter, token)}.jsonl"
    target.parent.mkdir(exist_ok=True)
    with whole_file(target, flush=True) as part:
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in votes), "utf-8")
    return len(votes)


def file_name(voter: str, token: str) -> str:
    """A voter's file: two people of one name have two."""
    plain = "".join(char if char.isalnum() else "-" for char in f"{voter[:40]}-{token[:16]}")
    return plain.strip("-") or "voter"


def all_votes(folder: Path) -> list[dict[str, Any]]:
    """All votes in the folder. Raises InputError if a file is none of votes."""
    if not (folder / VOTES).exists():
        return []
    key = read_key(folder)
    paths = sorted((folder / VOTES).glob("*.jsonl"))
    return [line for path in paths for line in read_votes(path.read_text("utf-8"), key, str(path))]


def settled(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """The votes that count: of a judge, one of each pair whose two answers agree. And the number of those that do not.

    A pair that was asked in one order only does not count yet.
    """
    counted = [line for line in lines if line.get("kind") != JUDGE]
    pairs: dict[tuple[str, frozenset[str]], list[Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("kind") == JUDGE:
            pairs.setdefault((line["voter"], frozenset((line["left"], line["right"]))), []).append(line)
    apart = 0
    for asked in pairs.values():
        answers = {answer_of(line) for line in asked}
        if len({line["left"] for line in asked}) == 2:
            counted += asked[:1] if len(answers) == 1 else []
            apart += len(answers) > 1
    return counted, apart


def answer_of(line: Mapping[str, Any]) -> str:
    """The picture that won, or tie, or bad."""
    return line[line["verdict"]] if line["verdict"] in ("left", "right") else line["verdict"]
