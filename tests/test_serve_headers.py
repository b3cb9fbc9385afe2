"""No route of a server with keys answers without a key, with any headers.

This is tested with the installed packages; the record has the oldest and the newest allowed packages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "serve_headers.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("serve_headers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks for annotations there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The table, with the installed packages."""
    done = subprocess.run([sys.executable, SCRIPT, "--here"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_route_answers_without_a_key_whatever_the_headers(found, script):
    assert {row["case"]: row["unguarded"] for row in found["rows"]} == {name: [] for name in script.CASES}


def test_every_route_accepts_a_key(found):
    assert [route for route, status in found["routes"].items() if status == 401] == []
    assert {route: status for route, status in found["routes"].items() if route.startswith("WS")} == {
        "WS /comfyui/ws": 101
    }


def test_the_table_has_every_route_of_the_document(found, tmp_path):
    from inkstream.serve.app import build
    from inkstream.serve.limits import Settings

    app = build(Settings(tmp_path, models=("pocket",)))
    app.state.service.store.close()
    document = {
        f"{method.upper()} {re.sub('{[^}]*}', 'x', path)}"
        for path, operations in app.openapi()["paths"].items()
        for method in operations
    }
    assert document - {*found["routes"]} == set()
    assert len(document) > 40


def test_an_answer_that_should_be_refused_is_listed(script):
    for route, status in ((("GET", "/v1/jobs"), 200), (("WS", "/comfyui/ws"), 101)):
        for name in ("a good Host", "Host: x?", "target /studio/../...", "target http://evil.example/..."):
            statuses = {way: {route: status} for way in script.WAYS}
            row = script.tell(name, script.CASES[name], statuses)
            assert row["unguarded"] == [f"{way} {route[0]} {route[1]}: {status}" for way in script.WAYS]


def test_the_record_has_every_case_and_every_route_with_the_oldest_and_the_newest_packages(found, script):
    record = json.loads((ROOT / "benchmarks" / "records" / "serve-headers.json").read_text())
    assert [*record["peers"]] == [*script.RESOLUTIONS]
    for line in script.requirements():
        name, _, oldest = line.partition(">=")
        shown = re.search(rf"\b{name} ([0-9.]+)", record["peers"]["oldest"])
        if name in script.SHOWN:
            assert shown is not None
            assert shown[1].removesuffix(".0") == oldest
    routes = {row["route"]: row["with a key"] for row in record["rows"] if "route" in row}
    assert {*routes} == {*found["routes"]}
    assert [route for route, statuses in routes.items() if 401 in statuses.values()] == []
    tried = {(row["versions"], row["case"]): row["unguarded"] for row in record["rows"] if "case" in row}
    assert tried == {(versions, case): [] for versions in script.RESOLUTIONS for case in script.CASES}


@pytest.mark.skipif(
    "INKSTREAM_VERSIONS" not in os.environ or shutil.which("uv") is None,
    reason="OTHER VERSIONS WERE NOT TRIED: set INKSTREAM_VERSIONS=1 where uv and a package index are",
)
def test_no_route_answers_without_a_key_with_the_oldest_and_the_newest_packages():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
