"""Ray Data and Ray Serve, on a cluster of this machine alone. Each test starts one, which takes most of its time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _ray():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install -e '.[ray]'")


def test_a_batch_on_ray_that_is_killed_goes_on_where_it_was(tiny_folder, tmp_path):
    words = ["-m", str(tiny_folder), "-W", "32", "-H", "32", "--steps", "20", "--slots", "1", "--ray"]
    outcome = script("batch_fault").ordeal(tmp_path, 6, 1, words)
    assert outcome["problems"] == []
    assert outcome["pictures"] == outcome["lines"] == 6
    assert outcome["killed at"][0] >= 2


def test_two_engines_answer_as_one_server_and_the_death_of_one_loses_nothing():
    command = [sys.executable, str(SCRIPTS / "serve_ray.py"), "--jobs", "16", "--kill"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    outcome = json.loads(done.stdout[done.stdout.index("{") :])
    assert outcome["problems"] == []
    assert outcome["pictures"] == 16
    assert outcome["cancelled after steps"] >= 3
