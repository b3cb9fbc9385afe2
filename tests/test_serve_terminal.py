"""What `inkstream serve` and `inkstream studio` tell a person at a terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from inkstream.cli import main, serve
from inkstream.serve import logs
from inkstream.serve.limits import Settings

COMMAND = [sys.executable, "-m", "inkstream"]


class Screen(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        return True


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def on_a_terminal(words: list[str], **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], Said]]:
    """Run a command whose stderr is a terminal. Yields the process and what it has written by now."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, *words], stderr=theirs, env=os.environ | environment)
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        yield process, Said(ours)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()
            os.close(ours)


class Said:
    """What was written to a terminal so far."""

    def __init__(self, screen: int):
        self.screen, self.text = screen, ""

    def wait_for(self, words: str, seconds: float = 60.0) -> str:
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end, f"{words!r} was not written, but {self.text!r}"
            try:
                self.text += os.read(self.screen, 65536).decode()
            except (BlockingIOError, OSError):
                time.sleep(0.05)
        return self.text


def test_a_server_on_this_machine_tells_its_address_its_models_and_its_folder():
    lines = serve.banner(Settings(Path("/data"), models=("pocket",)), keys=0, lan="192.0.2.7")
    assert "  studio     http://127.0.0.1:8400" in lines
    assert "  models     pocket" in lines
    assert "  pictures   /data" in lines
    assert "  access     this machine only" in lines
    assert not any("192.0.2.7" in line for line in lines)


def test_a_server_for_others_tells_their_address_as_a_qr_code_that_a_camera_reads():
    cv2 = pytest.importorskip("cv2")
    lines = serve.banner(Settings(Path("/data"), host="0.0.0.0", port=9000), keys=2, lan="192.0.2.7")
    assert "  for others http://192.0.2.7:9000" in lines
    assert "  access     with a key (2 in use)" in lines
    code = lines[lines.index("") + 1 : next(i for i, line in enumerate(lines) if line.startswith("  Scan"))]
    plain = [line.replace("\x1b[0m", "").replace("\x1b[7m", "") for line in code]
    halves = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
    rows = [[halves[one][half] for one in line] for line in plain for half in (0, 1)]
    wide = max(map(len, rows))
    light = np.array([row + [0] * (wide - len(row)) for row in rows], np.uint8)
    picture = np.pad(np.kron(light * 255, np.ones((8, 8), np.uint8)), 40, constant_values=255)
    assert cv2.QRCodeDetector().detectAndDecode(picture)[0] == "http://192.0.2.7:9000"


def test_a_server_with_keys_on_this_machine_asks_for_one():
    lines = serve.banner(Settings(Path("/data"), host="::1", models=("pocket",)), keys=1, lan=None)
    assert "  studio     http://[::1]:8400" in lines
    assert "  access     this machine only, with a key (1 in use)" in lines
    assert any("then --host 0.0.0.0" in line for line in lines)


@pytest.mark.parametrize("command", ["serve", "studio"])
def test_a_port_that_is_not_possible_or_in_use_is_told_in_a_line(command, capsys):
    for port in ("0", "99999"):
        assert main([command, "--port", port]) == 2
        assert f"--port {port} is out of range: give 1 to 65535" in capsys.readouterr().err
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main([command, "--port", str(port)]) == 2
        assert (
            f"--port {port} cannot be opened (Address already in use): give another --port" in capsys.readouterr().err
        )


def test_a_machine_without_a_network_gets_no_address_for_others():
    lines = serve.banner(Settings(Path("/data"), host="0.0.0.0"), keys=1, lan=None)
    assert not any("for others" in line or "Scan" in line for line in lines)


def test_the_log_is_words_on_a_terminal_and_json_elsewhere():
    for stream, as_json, words in ((Screen(), False, True), (Screen(), True, False), (io.StringIO(), False, False)):
        logs.set_up(stream, as_json=as_json)
        logging.getLogger("inkstream.serve").info("job accepted", extra={"job": "j1", "key": "", "pictures": 2})
        logging.getLogger("inkstream.serve").warning("disk is full")
        first, second = stream.getvalue().splitlines()
        if words:
            assert first.partition("  ")[2] == "job accepted  job j1  pictures 2"
            assert second.partition("  ")[2] == "warning: disk is full"
        else:
            assert json.loads(first)["event"] == "job accepted"
            assert json.loads(first)["key"] == ""
    logs.set_up()


@pytest.mark.slow
def test_a_server_at_a_terminal_tells_where_it_is_and_stops_with_ctrl_c(tmp_path):
    port = free_port()
    with on_a_terminal(["serve", "--port", str(port), "--data", str(tmp_path)]) as (process, said):
        text = said.wait_for("Ctrl-C stops the server")
        assert f"http://127.0.0.1:{port}" in text
        assert '{"time"' not in text
    assert process.returncode == 130


@pytest.mark.slow
def test_the_studio_opens_in_the_browser_and_a_second_one_uses_the_running_server(tmp_path):
    port = free_port()
    seen = tmp_path / "seen.txt"
    browser = tmp_path / "browser.sh"
    browser.write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\n"
        f"urllib.request.urlopen(sys.argv[1], timeout=20)\nopen({str(seen)!r}, 'a').write(sys.argv[1] + '\\n')\n"
    )  # it asks the server before it gives back control, as a browser in a terminal does
    browser.chmod(0o755)
    words = ["studio", "--port", str(port), "--data", str(tmp_path / "data")]
    with on_a_terminal(words, BROWSER=str(browser)) as (_, said):
        said.wait_for("Ctrl-C stops the server")
        end = time.monotonic() + 30
        while not seen.exists():
            assert time.monotonic() < end, "the browser was not opened, or got no page"
            time.sleep(0.05)
        again = subprocess.run(
            [*COMMAND, *words], env=os.environ | {"BROWSER": str(browser)}, capture_output=True, text=True, timeout=60
        )
        assert (again.returncode, again.stderr) == (0, f"a server runs at http://127.0.0.1:{port}: opening it\n")
    assert seen.read_text().split() == [f"http://127.0.0.1:{port}"] * 2
