"""Blind votes: vote.html with its pictures, and the rankings that follow from the votes."""

from __future__ import annotations

import io
import json
import random
import secrets
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from inkstream.disk import whole_file
from inkstream.evaluate.bakeoff.results import Picture, Results
from inkstream.evaluate.bakeoff.run import PICTURES
from inkstream.evaluate.bakeoff.votes import (
    JUDGE,
    KEY,
    PAGE,
    SHOWN,
    Key,
    all_votes,
    answer_of,
    read_key,
    settled,
)
from inkstream.evaluate.bakeoff.words import Language, words
from inkstream.evaluate.ranking import Vote, agreement, left_wins, rank
from inkstream.evaluate.report import wilson
from inkstream.evaluate.run import open_picture

SIDE = 1024
"""Longest side of a picture in the page, in pixels. Pictures of all models are written in the same format."""
COMMON = 100
"""Pairs that all voters are asked about, so that their agreement can be told."""
PAGE_WORDS = ("Which picture is better?", "Both pictures were drawn from the same prompt. Who drew them is hidden.",
              "Your name", "Begin", "Left", "Right", "Upper", "Lower", "Tie", "Both bad", "First picture",
              "Second picture", "Undo",
              "Download votes", "Copy votes", "Copied.", "Votes are saved.", "The picture cannot be shown.",
              "Votes stay in this browser until you download them.",
              "The votes cannot be saved: download them.", "Votes: {count}")  # fmt: skip


# The page -------------------------------------------------------------------------------------------------------------


def write_ballot(results: Results, language: Language) -> Path:
    """Write vote.html and its pictures, and return its path. Pictures that are there keep their names.

    Prompts that only one model has drawn are left out.
    """
    folder = results.folder
    (folder / SHOWN).mkdir(exist_ok=True)
    old = read_key(folder) if (folder / KEY).exists() else Key(secrets.token_hex(8), {})
    known = {found["file"]: name for name, found in old.pictures.items()}
    drawn = [picture for picture in results.pictures if picture.file is not None and picture.failure is None]
    key = Key(old.ballot, {known.get(_file(one)) or secrets.token_hex(8): _facts(one) for one in drawn})
    for name, found in key.pictures.items():
        path = folder / SHOWN / f"{name}.png"
        if not path.exists():
            with whole_file(path) as part:
                part.write_bytes(_plain(folder / PICTURES / found["file"]))
    with whole_file(folder / KEY) as part:
        part.write_text(json.dumps({"ballot": key.ballot, "pictures": key.pictures}, indent=1), "utf-8")
    path = folder / PAGE
    with whole_file(path) as part:
        part.write_text(_page(results, key, language), "utf-8")
    return path


def _file(picture: Picture) -> str:
    assert picture.file is not None
    return picture.file


def _facts(picture: Picture) -> dict[str, Any]:
    return {"prompt": picture.case, "seed": picture.seed, "model": picture.model, "file": picture.file}


def _plain(path: Path) -> bytes:
    """A picture as a PNG that holds nothing but its pixels."""
    picture = open_picture(path)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.info = {}
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _page(results: Results, key: Key, language: Language) -> str:
    generator = random.Random(key.ballot)  # the same page for all voters
    masks = generator.sample(range(len(results.names)), len(results.names))
    pictures = [[name, found["prompt"], found["seed"], masks[found["model"]]] for name, found in key.pictures.items()]
    generator.shuffle(pictures)
    data = {
        "ballot": key.ballot,
        "models": len(masks),
        "prompts": {number: line["prompt"] for number, line in results.prompts.items()},
        "pictures": pictures,
        "common": common_pairs(key, generator),
        "words": {text: words(language, text) for text in PAGE_WORDS},
    }
    return Template(Path(__file__).with_name("vote.html").read_text("utf-8")).substitute(
        language="zh-CN" if language == "zh" else "en",
        title=escape(words(language, "Which picture is better?")),
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    )


def common_pairs(key: Key, generator: random.Random) -> list[tuple[str, str]]:
    """Pairs of pictures of one prompt and seed by two models, in random order."""
    cells: dict[tuple[int, int], list[str]] = {}
    for name, found in sorted(key.pictures.items()):
        cells.setdefault((found["prompt"], found["seed"]), []).append(name)
    full = [names for names in cells.values() if len(names) > 1]
    generator.shuffle(full)
    return [tuple(generator.sample(names, 2)) for names in full[:COMMON]]  # type: ignore[misc]


# Rankings -------------------------------------------------------------------------------------------------------------


def rank_votes(results: Results) -> list[dict[str, Any]]:
    """The rankings by people and by judges, those that have votes, as JSON."""
    lines = all_votes(results.folder)
    judged = [line for line in lines if line.get("kind") == JUDGE]
    people = [line for line in lines if line.get("kind") != JUDGE]
    found = ((people, "Ranking by {votes} votes of people"), (judged, "Ranking by {votes} answers of a judge"))
    return [_rank(results, some, title) for some, title in found if settled(some)[0]]


def _rank(results: Results, lines: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    key = read_key(results.folder)
    places = {number: place for place, number in enumerate(results.prompts)}

    def vote_of(line: Mapping[str, Any]) -> Vote:
        left, right = key.pictures[line["left"]], key.pictures[line["right"]]
        return Vote(places[left["prompt"]], left["model"], right["model"], line["verdict"], line["voter"])

    counted, _ = settled(lines)
    votes = [vote_of(line) for line in counted if _compares(line, key)]
    found = rank(votes, len(results.names), len(places))
    bad = [sum(vote.verdict == "bad" and number in (vote.left, vote.right) for vote in votes)
           for number in range(len(results.names))]  # fmt: skip
    answers: dict[frozenset[str], list[str]] = {}
    for line in counted:
        answers.setdefault(frozenset((line["left"], line["right"])), []).append(answer_of(line))
    return {
        "title": title,
        "votes": len(votes),
        "models": [
            {"name": name, "points": round(float(found.points[n]), 1), "low": round(float(found.low[n]), 1),
             "high": round(float(found.high[n]), 1), "rank": found.ranks[n], "votes": found.votes[n], "bad": bad[n]}
            for n, name in enumerate(results.names)
        ],
        "better": [[round(float(value), 4) for value in row] for row in found.better],
        "ties": round(found.ties, 4),
        "agreement": agreement(list(answers.values())),
        "voters": [_voter(name, [line for line in lines if line["voter"] == name], vote_of)
                   for name in dict.fromkeys(line["voter"] for line in lines)],
    }  # fmt: skip


def _compares(line: Mapping[str, Any], key: Key) -> bool:
    return key.pictures[line["left"]]["model"] != key.pictures[line["right"]]["model"]


def _voter(name: str, lines: Sequence[Mapping[str, Any]], vote_of: Any) -> dict[str, Any]:
    """A voter's number of votes, and how often the left picture won, with its interval. Without a bias it is half."""
    left, decided = left_wins([vote_of(line) for line in lines])
    share = left / max(decided, 1)
    low, high = wilson(share, decided)
    told = {"name": name, "votes": len(lines), "decided": decided, "left": round(share, 4), "left_low": round(low, 4),
            "left_high": round(high, 4)}  # fmt: skip
    return told | ({"inconsistent": settled(lines)[1]} if any(line.get("kind") == JUDGE for line in lines) else {})
