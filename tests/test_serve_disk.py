"""A disk that becomes full during a save, a read-only folder, and two servers on one folder."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from inkstream.cli import main
from inkstream.serve.errors import explain_trouble
from inkstream.serve.limits import Limits, Settings

SCRIPT = Path(__file__).parent.parent / "scripts" / "serve_faults.py"
SMALL = {"prompt": "a red circle", "model": "pocket", "width": 32, "height": 32, "steps": 1, "seed": 1}
linux = pytest.mark.skipif(sys.platform != "linux", reason="sets limits of other processes")


def script() -> Any:
    spec = importlib.util.spec_from_file_location("serve_faults", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_faults"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def process(tmp_path_factory) -> Iterator[Any]:
    """`inkstream serve` as a separate process with a ready engine."""
    server = script().Server(tmp_path_factory.mktemp("disk") / "data")
    server.start()
    soon(lambda: server.ask("GET", "/readyz"))
    yield server
    server.stop()


def soon(ask: Callable[[], Any], wanted: Callable[[Any], Any] = lambda answer: True) -> Any:
    """Call `ask` until its result is wanted, and return the result."""
    end = time.monotonic() + 300
    while True:
        try:
            if wanted(answer := ask()):
                return answer
        except (AssertionError, sys.modules["serve_faults"].Down):
            assert time.monotonic() < end
        assert time.monotonic() < end, answer
        time.sleep(0.3)


def limit_files(server: Any, size: int) -> None:
    """Limit the size of every file of the server and its engine, as on a full disk. -1 removes the limit."""
    import resource

    for pid in (server.process.pid, *server.engines()):
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def answer(server: Any, method: str, path: str, body: Any = None) -> str:
    """The message of an error answer."""
    with pytest.raises(AssertionError) as refused:
        server.ask(method, path, body)
    return str(refused.value)


def ended(process: Any, job: dict[str, Any]) -> dict[str, Any]:
    return soon(lambda: process.ask("GET", f"/v1/jobs/{job['id']}"), lambda job: job["ended"])


@linux
def test_accepted_jobs_are_drawn_when_a_full_disk_has_space_again(process):
    jobs = [process.ask("POST", "/v1/jobs", SMALL | {"steps": 30, "count": 2, "width": 128}) for _ in range(4)]
    limit_files(process, 1)
    assert "answered 503" in (text := answer(process, "POST", "/v1/jobs", SMALL))
    assert "then try again" in text
    assert str(process.folder) not in text
    time.sleep(2.0)  # the drawing continues, but nothing can be saved
    assert process.ask("GET", "/healthz")["status"] == "ok"
    states = {process.ask("GET", f"/v1/jobs/{job['id']}")["state"] for job in jobs}
    assert states <= {"queued", "running"}
    limit_files(process, -1)
    for job in jobs:
        done = ended(process, job)
        assert (done["state"], len(done["pictures"])) == ("succeeded", 2)
        for picture in done["pictures"]:
            data = process.ask("GET", picture["url"])
            assert hashlib.sha256(data).hexdigest() == picture["sha256"]
            Image.open(io.BytesIO(data)).load()
    assert len(list(process.folder.glob("pictures/*/*"))) == process.ask("GET", "/v1/pictures")["total"]
    assert list(process.folder.glob("parts/*")) == []


@linux
def test_a_server_killed_on_a_full_disk_loses_no_accepted_job(process):
    before = process.ask("GET", "/v1/pictures")["total"]
    job = process.ask("POST", "/v1/jobs", SMALL | {"steps": 30, "width": 128})
    limit_files(process, 1)
    time.sleep(1.0)
    process.kill()
    process.start()
    soon(lambda: process.ask("GET", "/readyz"))
    assert ended(process, job)["state"] == "succeeded"
    assert process.ask("GET", "/v1/pictures")["total"] == before + 1


@linux
def test_an_upload_that_does_not_fit_leaves_no_partial_file(process):
    limit_files(process, 1000)
    noise = Image.frombytes("L", (64, 64), os.urandom(4096))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    request = urllib.request.Request(
        f"http://127.0.0.1:{process.port}/v1/uploads", buffer.getvalue(), {"Content-Type": "image/png"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 503
    assert b"disk is full" in refused.value.read()
    assert list(process.folder.glob("uploads/*")) == []
    limit_files(process, -1)
    assert urllib.request.urlopen(request, timeout=30).status == 201


def test_a_picture_that_can_never_be_saved_fails_its_job_with_the_reason(tmp_path, start_server, until, monkeypatch):
    from inkstream.serve.queue import jobs

    monkeypatch.setattr(jobs, "HOLD", 0.0)
    program = (
        "import json, sys; print(json.dumps({'event': 'ready', 'seconds': 0}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    if 'draw' in (told := json.loads(line)):\n"
        "        told = {'run': told['draw'], 'event': 'unsaved', 'error': 'Disk quota exceeded'}\n"
        "        print(json.dumps(told), flush=True)"
    )
    served = start_server(Settings(tmp_path, models=("pocket",), preload=False), engine=program)
    error = served.ended(served.draw())["error"]
    assert "cannot be saved (Disk quota exceeded)" in error["message"]
    assert error["type"] == "server_error"
    served.stop()


def test_below_the_disk_reserve_nothing_is_accepted_and_the_gallery_works(tmp_path, start_server, until):
    served = start_server(Settings(tmp_path, models=("pocket",)))
    done = served.ended(served.draw())
    served.ask("PATCH", "/v1/queue", {"paused": True})
    waiting = served.draw()
    served.stop()
    full = start_server(Settings(tmp_path, models=("pocket",), limits=Limits(reserve=1 << 60)))
    until(lambda: full.ask("GET", "/readyz")[0] == 200)
    full.ask("PATCH", "/v1/queue", {"paused": False})
    for method, path, body in (("POST", "/v1/jobs", SMALL), ("POST", "/v1/uploads", b"x")):
        status, headers, refusal = full.ask(method, path, body)
        assert (status, refusal["error"]["code"], headers["retry-after"]) == (503, "disk_full", "60")
        assert refusal["error"]["message"].startswith("the server's disk is full: free some")
    assert full.ask("GET", f"/v1/jobs/{waiting['id']}")[2]["state"] == "queued"
    assert full.ask("GET", done["pictures"][0]["url"])[0] == 200
    full.stop()


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """`mounted(options)` mounts a file system in memory and returns its folder. Skips the test without permission."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"file systems cannot be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_disk_that_fills_up_during_a_drawing_loses_no_picture(mounted, start_server, until):
    disk = mounted("size=4m")
    served = start_server(Settings(disk / "data", models=("pocket",), limits=Limits(reserve=0)))
    first = served.ended(served.draw(seed=1))
    jobs = [served.draw(seed=number, steps=20, width=128, count=2) for number in range(4)]
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    until(lambda: served.service.jobs.on_hold)
    assert served.ask("GET", "/healthz")[0] == 200
    assert served.ask("GET", first["pictures"][0]["url"])[0] == 200
    assert served.ask("GET", first["pictures"][0]["thumbnail"])[0] == 200  # although it cannot be saved
    assert list(disk.glob("data/thumbnails/*")) == []
    ballast.unlink()
    done = [served.ended(job) for job in jobs]
    assert [(job["state"], len(job["pictures"])) for job in done] == [("succeeded", 2)] * 4
    assert len(list(disk.glob("data/pictures/*/*"))) == 9
    served.stop()


def test_a_start_on_a_full_disk_or_in_a_read_only_folder_is_refused(mounted, tmp_path, capsys):
    disk = mounted("size=512k")
    assert main(["serve", f"--data={disk / 'data'}", "--model=pocket", "--port=18412"]) == 2
    assert "is full: free some space" in capsys.readouterr().err.splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk / "data", disk / "other"):
        assert main(["serve", f"--data={folder}", "--model=pocket", "--port=18412"]) == 2
        assert "is not writable (Read-only file system)" in capsys.readouterr().err.splitlines()[-1]


@linux
def test_a_second_server_on_the_same_folder_is_refused_and_the_first_continues(process, capsys):
    job = process.ask("POST", "/v1/jobs", SMALL | {"steps": 20, "width": 128})
    assert main(["serve", f"--data={process.folder}", "--model=pocket", "--port=18413"]) == 2
    assert "in use by another server: stop it" in capsys.readouterr().err.splitlines()[-1]
    assert ended(process, job)["state"] == "succeeded"


@pytest.mark.parametrize("name", ["EROFS", "EACCES", "EPERM", "ENOENT", "EIO"])
def test_an_error_of_a_read_only_or_missing_folder_is_reported_as_not_writable(name):
    refusal = explain_trouble(OSError(getattr(errno, name), "reason", "/path/of/ours"))
    assert (refusal.status, refusal.code) == (503, "not_writable")
    assert "/path/of/ours" not in refusal.message
