"""`inkstream --help` answers at once: little processor time, and no torch."""

from __future__ import annotations

import compileall
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import inkstream

MEASURE = """
import contextlib, io, json, os, sys
from inkstream.cli import main
with contextlib.redirect_stdout(io.StringIO()) as shown:
    code = main({argv!r})
used = os.times()
heavy = sorted({{"torch", "numpy", "transformers", "diffusers"}} & set(sys.modules))
print(json.dumps([code, shown.getvalue(), used.user + used.system, heavy]))
"""


@pytest.fixture(scope="module", autouse=True)
def bytecode():
    compileall.compile_dir(Path(inkstream.__file__).parent, quiet=2)


def run(*argv: str) -> tuple[int, str, float, list[str]]:
    """Exit code, stdout, seconds of processor time of the whole process, heavy modules it has imported."""
    code = MEASURE.format(argv=list(argv))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def test_help_takes_less_than_three_tenths_of_a_second_of_processor_time():
    runs = [run("--help") for _ in range(3)]
    assert all(code == 0 and "generate" in shown for code, shown, _, _ in runs)
    assert statistics.median(seconds for _, _, seconds, _ in runs) < 0.3


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["--version"]])
def test_what_needs_no_model_imports_no_torch(argv):
    code, shown, _, heavy = run(*argv)
    assert code == 0
    assert shown.strip()
    assert heavy == []
