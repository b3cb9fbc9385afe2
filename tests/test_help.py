"""`inkstream --help` answers at once: little processor time, and no torch."""

from __future__ import annotations

import compileall
import json
import os
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


def test_help_takes_little_more_time_than_the_library_that_prints_it():
    """Processor time: 0.3 s where the library takes 0.25 s."""
    runs, library = [], []
    for _ in range(3):
        runs.append(run("--help"))
        code = "import os, cyclopts, cyclopts.help, rich.console, rich.table; print(sum(os.times()[:2]))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        library.append(float(done.stdout))
    assert all(code == 0 and "generate" in shown for code, shown, _, _ in runs)
    assert statistics.median(seconds for _, _, seconds, _ in runs) < 1.6 * statistics.median(library)


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["generate", "x", "-W", "100"], "width 100 is not a multiple of 16: take 96 or 112"),
     (["generate", "x", "-m", "z-image-turbo", "-H", "1000"], "height 1000 is not a multiple of 16"),
     (["generate", "x", "-m", "z-imige"], "z-imige is not a known model, file or folder: did you mean z-image"),
     (["generate", "x", "--steps", "0"], "--steps 0 is too small"),
     (["draft", "x", "-m", "nope"], "nope is not a known model"),
     (["serve", "--vae", "nofile"], "nofile does not exist: give the vae as a file or folder")],
)  # fmt: skip
def test_wrong_values_and_names_are_told_without_importing_torch(argv, said, tmp_path):
    code = MEASURE.replace("code =", "err = io.StringIO()\nwith contextlib.redirect_stderr(err):\n    code =")
    code = code.replace("shown.getvalue()", "err.getvalue()").format(argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    code, shown, _, heavy = json.loads(done.stdout)
    assert code == 2
    assert said in shown
    assert heavy == []


@pytest.mark.parametrize("first", ["doctor import print_software as show", "models import list_models as show"])
def test_the_first_lines_of_doctor_and_models_need_no_torch(first):
    code = f"import sys; from inkstream.cli.{first}; show(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_for_a_shell(shell, tmp_path):
    code = "from inkstream.cli import run; run()"
    command = [sys.executable, "-c", code, "--install-completion", "--shell", shell]
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": f"/bin/{shell}"}
    environment = {name: value for name, value in environment.items() if not name.startswith("XDG_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert any("--negative-prompt" in text and "doctor" in text for text in written)


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["--version"]])
def test_what_needs_no_model_imports_no_torch(argv):
    code, shown, _, heavy = run(*argv)
    assert code == 0
    assert shown.strip()
    assert heavy == []
