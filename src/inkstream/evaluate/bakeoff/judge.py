"""A judge: a model that sees pictures, behind a chat server with OpenAI's API. It is asked in both orders.

The two pictures and the prompt go to its address; no names go. An answer counts if it is the same in both orders.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from inkstream.engine.drawing.enhancer import content_of, first_model
from inkstream.engine.keys import find_key
from inkstream.engine.wire import Lines, ask, open_peer
from inkstream.evaluate.bakeoff.results import Results
from inkstream.evaluate.bakeoff.votes import JUDGE, SHOWN, VOTES, Key, all_votes, file_name, read_key, settled
from inkstream.evaluate.ranking import Vote, count_votes, information, pairs_of
from inkstream.types import InputError

KEY = "INKSTREAM_JUDGE_KEY"
"""The environment variable, or the name in the keyring, of the server's key."""
TRIES = 2
"""How often a question is asked whose answer cannot be read."""

INSTRUCTION = """You compare two pictures that were drawn from the same prompt. First see which one shows what the \
prompt asks for: subjects, numbers, colours, places, and text letter for letter. If both do, take the better made one: \
no broken shapes, no artefacts, a good composition. Which picture comes first means nothing.

Answer with one JSON object and nothing else: {"better": "first"}, {"better": "second"}, {"better": "tie"} if they are \
equally good, or {"better": "bad"} if both miss the prompt."""
VERDICTS = {"first": "left", "second": "right", "tie": "tie", "bad": "bad"}
ANSWER = re.compile(r'"better"\s*:\s*"(\w+)"')


class Judge:
    """A model that judges. model: its name at the server; None: the first that the server lists. Raises InputError."""

    def __init__(self, address: str, model: str | None = None):
        secret = find_key(KEY)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self.peer = open_peer("the judge", address, f"check {KEY} and the address", secret, headers)
        self.model: str = model or _end(first_model(self.peer, "--judge-model"))

    def verdict(self, prompt: str, first: bytes, second: bytes) -> str:
        """Ask about two PNG files. Raises InputError if the answer cannot be read."""
        content: list[dict[str, Any]] = [{"type": "text", "text": f"The prompt: {prompt}"}]
        for title, data in (("The first picture:", first), ("The second picture:", second)):
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            content += [{"type": "text", "text": title}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": content}]
        text = ""
        for _ in range(TRIES):
            body = {"model": self.model, "messages": messages, "temperature": 0}
            text = content_of(_end(ask(self.peer, "POST", "chat/completions", body)))
            found = ANSWER.findall(text)
            if found and found[-1] in VERDICTS:
                return VERDICTS[found[-1]]
        raise InputError(f"the judge's answer {text[:80]!r} is no verdict: take another --judge-model")


def ask_judge(results: Results, judge: Judge, questions: int) -> Iterator[int]:
    """Ask a judge until it has answered so many pairs, and yield their number. Each answer is on the disk at once.

    The pairs are chosen by information, and among the pictures of two models by chance.
    """
    folder, key, voter = results.folder, read_key(results.folder), f"{JUDGE} {judge.model}"
    path = folder / VOTES / f"{file_name(voter, '')}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [line for line in all_votes(folder) if line["voter"] == voter]
    whole = {pair for pair in map(_pair, lines) if sum(_pair(line) == pair for line in lines) == 2}
    lines = [line for line in lines if _pair(line) in whole]  # a killed process may leave a pair in one order
    path.write_text("".join(map(_line, lines)), "utf-8")
    with path.open("a", encoding="utf-8") as log:
        while (done := len(lines) // 2) < questions:
            asked = _choose(results, key, lines)
            if asked is None:
                raise InputError(f"the judge was asked about all {done} pairs: give fewer --questions, or more seeds")
            names = list(asked)
            random.Random(f"{key.ballot} {done}").shuffle(names)
            data = [(folder / SHOWN / f"{name}.png").read_bytes() for name in names]
            prompt = results.prompts[key.pictures[names[0]]["prompt"]]["prompt"]
            for a, b in ((0, 1), (1, 0)):
                line = {"ballot": key.ballot, "voter": voter, "kind": JUDGE, "left": names[a], "right": names[b],
                        "verdict": judge.verdict(prompt, data[a], data[b])}  # fmt: skip
                lines.append(line)
            log.write("".join(map(_line, lines[-2:])))
            log.flush()
            os.fsync(log.fileno())
            yield done + 1


def _choose(results: Results, key: Key, lines: list[dict[str, Any]]) -> frozenset[str] | None:
    """The next pair: of the models that tell most, one that was not asked about. None if all were."""
    models, places = len(results.names), {number: place for place, number in enumerate(results.prompts)}
    votes = [
        Vote(places[key.pictures[line["left"]]["prompt"]], key.pictures[line["left"]]["model"],
             key.pictures[line["right"]]["model"], line["verdict"])
        for line in settled(lines)[0]
    ]  # fmt: skip
    known = information(count_votes(votes, models, len(places)).sum(0), models)
    asked = set(map(_pair, lines))
    generator = random.Random(f"{key.ballot} {len(lines)}")
    for number in np.argsort(-known, kind="stable"):
        pair = pairs_of(models)[number]
        cells: dict[tuple[int, int], list[str]] = {}
        for name, found in sorted(key.pictures.items()):
            if found["model"] in pair:
                cells.setdefault((found["prompt"], found["seed"]), []).append(name)
        left = [frozenset(names) for names in cells.values() if len(names) == 2 and frozenset(names) not in asked]
        if left:
            return generator.choice(left)
    return None


def _pair(line: dict[str, Any]) -> frozenset[str]:
    return frozenset((line["left"], line["right"]))


def _line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _end(lines: Lines | Generator[str, None, Any]) -> Any:
    """The answer of a request, without its lines of waiting."""
    while True:
        try:
            next(lines)
        except StopIteration as end:
            return end.value
