"""Pocket comes along: small, offline, known by its spec, and it draws what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import inkstream
from inkstream import Request
from inkstream.engine.files.sources import locate
from inkstream.evaluate.grades import grade
from inkstream.evaluate.suites import open_suite, thin
from inkstream.families.zimage.specs import POCKET
from inkstream.pocket.scenes import Background, Scene, Thing

PACKAGE = Path(inkstream.__file__).parent
MIB = 1 << 20


@pytest.fixture(scope="module")
def pocket():
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    for _ in engine.load("pocket"):
        pass
    return engine


def test_all_weights_that_ship_are_under_forty_five_mebibytes():
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".safetensors", ".png", ".webp", ".npz")]
    assert sum(path.suffix == ".safetensors" for path in files) >= 3
    assert sum(path.stat().st_size for path in files) < 45 * MIB


def test_the_spec_is_that_of_the_folder():
    found = locate("pocket").spec
    for name in ("transformer", "text_encoder", "vae", "steps", "guidance", "shift", "size", "abilities", "licence"):
        assert getattr(found, name) == getattr(POCKET, name), name


def test_no_model_named_is_pocket(pocket):
    result = pocket.generate(Request(prompt="a large red circle in the center, on a white background", seed=1))
    assert result.requests[0].model == "pocket"
    assert result.images[0].size == POCKET.size


@pytest.mark.slow
def test_it_draws_what_it_is_told(pocket):
    """Easy prompts, three seeds each: nearly all pictures are right. The whole suite is `inkstream eval pocket`."""
    right = []
    for name, colour in [("circle", "red"), ("square", "blue"), ("star", "green"), ("heart", "purple")]:
        scene = Scene("things", Background("flat", ("white",)), (Thing(name, colour, "large", 0.5, 0.5, 0.43),))
        request = Request(prompt=f"a large {colour} {name} in the center, on a white background", seed=0, count=3)
        for image in pocket.generate(request).images:
            marks = grade(image, scene)
            right.append(marks.object_and_colour and marks.background and marks.places == 1)
    assert sum(right) >= 11, right


def test_held_out_scenes_are_mostly_right(pocket):
    """Things and emoji of the suite that no training shows."""
    cases = [case for case in thin(open_suite("pocket"), 40).values() if case.group in ("things", "emoji")]
    shares = []
    for number, case in enumerate(cases):
        picture = pocket.generate(Request(prompt=case.prompt, seed=number)).images[0]
        shares.append(grade(picture, case.scene, stated=case.stated).objects)
    assert len(shares) >= 10
    assert sum(shares) / len(shares) > 0.6, shares


UNNEEDED = ("huggingface_hub", "transformers", "rich", "torch._dynamo", "sympy", "inkstream.families.flux1.family")
"""Slow to import, and no help to a picture by a model that is here."""
OFFLINE = f"""
import socket, sys
def refuse(*args, **kwargs): raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from inkstream.cli import main
code = main(["generate", "a large red circle", "--seed", "1", "--json"])
print(*(name for name in {UNNEEDED} if name in sys.modules), file=sys.stderr)
status = open("/proc/self/status").read()  # getrusage would count what its parent had when it forked
print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(code)
"""


def test_the_first_command_needs_no_network_little_memory_and_no_import_in_vain(tmp_path):
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **home}
    )
    assert done.returncode == 0, done.stderr
    *talk, imported, peak = done.stderr.splitlines()
    assert any("pocket" in line and "-m z-image-turbo" in line for line in talk), done.stderr
    assert Path(tmp_path / json.loads(done.stdout)["pictures"][0]["path"]).is_file()
    assert imported.split() == []
    assert int(peak) < 1.5 * 1024 * 1024  # KiB
