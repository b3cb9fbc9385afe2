"""The engine's worker: a preload and a run do not disturb each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from inkstream.engine.engine import Engine
from inkstream.serve.engines.worker import Worker, obey
from inkstream.types import Machine

DRAWN = {"prompt": "x", "width": 32, "height": 32, "steps": 1, "seed": 1}


class Heard:
    """The messages of a worker. The first message of a preload waits for one second or until a run sends a message."""

    def __init__(self) -> None:
        self.words: list[dict[str, Any]] = []
        self.run_spoke = threading.Event()

    def __call__(self, **word: Any) -> None:
        first = "run" not in word and not self.words
        self.words.append(word)
        if "run" in word:
            self.run_spoke.set()
        elif first:
            self.run_spoke.wait(1.0)


def obeyed(messages: list[dict[str, Any]], tmp_path: Any) -> list[dict[str, Any]]:
    heard = Heard()
    worker = Worker(Engine(Machine("cpu")), tmp_path, heard)
    with ThreadPoolExecutor(4) as threads:
        for message in messages:
            obey(worker, threads, message)
    return heard.words


def test_a_run_of_another_model_starts_after_the_preload(tmp_path, tiny_folder):
    load = {"load": "pocket", "source": "pocket"}
    draw = {"draw": "r", "name": "turbo", "request": DRAWN | {"model": str(tiny_folder)}, "upsampled_from": ""}
    words = obeyed([load, draw], tmp_path)
    assert [word for word in words if word["event"] in ("unloadable", "failed")] == []
    own = [word["event"] for word in words if "run" not in word]
    assert own[-1] == "loaded"
    assert [word["event"] for word in words if "run" in word][-2:] == ["picture", "done"]
    assert words.index(next(word for word in words if "run" in word)) == len(own)  # the run spoke after it


def test_a_run_after_a_failed_preload_is_drawn(tmp_path, tiny_folder):
    load = {"load": "gone", "source": str(tmp_path / "gone")}
    draw = {"draw": "r", "name": "turbo", "request": DRAWN | {"model": str(tiny_folder)}, "upsampled_from": ""}
    words = obeyed([load, draw], tmp_path)
    assert [word["event"] for word in words if "run" not in word] == ["unloadable"]
    assert words[-1]["event"] == "done"


def test_no_model_is_preloaded_if_a_run_came_first(tmp_path, tiny_folder):
    draw = {"draw": "r", "name": "turbo", "request": DRAWN | {"model": str(tiny_folder)}, "upsampled_from": ""}
    words = obeyed([draw, {"load": "pocket", "source": "pocket"}], tmp_path)
    assert [word for word in words if "run" not in word] == []
    assert words[-1]["event"] == "done"
