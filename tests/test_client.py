"""The client draws over HTTP what the engine draws here, and tells the same, whatever happens to the connection."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from PIL import Image

import inkstream
from inkstream import Client, InputError, Request
from inkstream.cli import main
from inkstream.clients.http import read_events
from inkstream.engine.pictures.metadata import read_request
from inkstream.types import Done, Failed, Loading, Queued, Step

WISH = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def address(server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def engine():
    return inkstream.Engine(inkstream.Machine("cpu"))


class Relay:
    """Hands bytes on to the server; `cut` breaks every connection there is, `refuse` makes it take no others either."""

    def __init__(self, port: int):
        self.to = port
        self.taken = 0
        self._ends: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                near = self._door.accept()[0]
            except OSError:  # closed
                return
            self.taken += 1
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:  # nobody is behind it
                near.close()
                continue
            self._ends += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._hand_on, args=(a, b), daemon=True).start()

    @staticmethod
    def _hand_on(a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def refuse(self) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes who waits at it
        self._door.close()
        self.cut()


@pytest.fixture
def relay(server) -> Iterator[Relay]:
    relay = Relay(server.port)
    yield relay
    relay.refuse()


def test_a_client_tells_what_the_engine_tells(address, engine):
    request = Request(**WISH, count=2, model="pocket")
    here, there = list(engine.submit(request)), list(Client(address).submit(request))
    kinds = [[type(event) for event in events if isinstance(event, Step | Done)] for events in (here, there)]
    assert kinds[0] == kinds[1] == [Step, Step, Done] * 2
    assert isinstance(there[0], Queued)
    steps = [
        [(e.step, e.steps, e.index, e.count, e.t) for e in events if isinstance(e, Step)] for events in (here, there)
    ]
    assert steps[0] == steps[1]
    done = [[event for event in events if isinstance(event, Done)] for events in (here, there)]
    for ours, theirs in zip(*done, strict=True):
        assert theirs.image.tobytes() == ours.image.tobytes()
        assert theirs.request == ours.request
        assert (theirs.index, theirs.count) == (ours.index, ours.count)


def test_previews_come_along_and_pictures_of_this_machine_are_sent(address, tmp_path):
    Image.new("RGB", (48, 32), "orange").save(tmp_path / "start.png")
    request = Request(prompt="a red circle", image=tmp_path / "start.png", strength=0.6, steps=4)
    events = list(Client(address).submit(request))
    assert {event.preview.mode for event in events if isinstance(event, Step)} == {"RGB"}
    done = events[-1]
    assert isinstance(done, Done)
    assert done.image.size == (48, 32)
    assert done.request.image == str(tmp_path / "start.png")


def test_closing_the_iterator_cancels_the_job(address, server):
    with closing(Client(address).submit(Request(**{**WISH, "width": 256, "height": 256, "steps": 50}))) as events:
        assert any(isinstance(event, Step) for event in events)
    job = server.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]
    assert job["state"] == "cancelled"


def test_a_connection_that_breaks_is_made_again_and_no_picture_comes_twice(relay):
    indices = []
    for event in Client(relay.address).submit(Request(**WISH, count=4)):
        if isinstance(event, Done):
            indices.append(event.index)
            relay.cut()
        assert not isinstance(event, Failed)
    assert indices == [0, 1, 2, 3]
    assert relay.taken > 4


@pytest.mark.slow
def test_a_server_that_starts_again_in_the_middle_is_come_back_to(tmp_path, start_server, relay):
    from inkstream.serve.limits import Settings

    first = start_server(Settings(tmp_path, models=("pocket",), preload=False, slots=1))
    relay.to, second, indices = first.port, None, []
    for event in Client(relay.address).submit(Request(**WISH, count=3)):
        assert not isinstance(event, Failed)
        if isinstance(event, Done):
            indices.append(event.index)
            if second is None:
                first.stop()
                relay.cut()
                second = start_server(Settings(tmp_path, models=("pocket",), preload=False, slots=1))
                relay.to = second.port
    assert second is not None
    second.stop()
    assert indices == [0, 1, 2]


def test_a_server_that_is_gone_for_good_fails_the_request_and_names_the_address(server, relay):
    events = []
    for event in Client(relay.address, patience=1).submit(
        Request(**{**WISH, "width": 128, "height": 128, "steps": 20})
    ):
        events.append(event)
        if isinstance(event, Step) and event.step == 1:
            relay.refuse()
    assert events[-1].kind == "input"
    assert relay.address in events[-1].error
    assert [event.note for event in events if isinstance(event, Loading) and event.what == "server"] == [
        f"the server at {relay.address} does not answer: waiting 1 s for it to be there again"
    ]
    job = server.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]
    server.ask("DELETE", f"/v1/jobs/{job['id']}")


def test_what_the_server_refuses_fails_as_it_would_here(address):
    for wish, words in (
        ({"model": "other"}, "take pocket"),
        ({"width": 40}, "multiple of 16"),
        ({"count": 9}, "at most 8"),
    ):
        (failed,) = Client(address).submit(Request(**{**WISH, **wish}))
        assert isinstance(failed, Failed)
        assert failed.kind == "input"
        assert words in failed.error
    with pytest.raises(InputError, match="take pocket"):
        Client(address).generate(Request(prompt="a", model="other"))


def test_what_has_no_effect_is_said(address):
    notes = [
        event.note
        for event in Client(address).submit(Request(**WISH, cache_threshold=0.2))
        if isinstance(event, Loading)
    ]
    assert any("cache threshold" in note for note in notes)


def test_no_server_and_no_address_are_told_at_once():
    with closing(socket.create_server(("127.0.0.1", 0))) as door:
        port = door.getsockname()[1]
    (failed,) = Client(f"http://127.0.0.1:{port}").submit(Request(**WISH))
    assert "does not answer" in failed.error
    with pytest.raises(InputError, match="write it as"):
        Client("localhost:8400")
    with pytest.raises(InputError, match="leave /v1 out"):
        Client("http://localhost:8400/v1/")


@pytest.mark.parametrize("answer", [b"<p>Welcome!</p>", b"{}", b"[1]", b"{", b""])
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_another_programs_server_is_told_from_one_of_ours(answer, kind):
    with socket.create_server(("127.0.0.1", 0)) as door:

        def welcome() -> None:
            near = door.accept()[0]
            near.recv(65536)
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(answer)}\r\n\r\n"
            near.sendall(head.encode() + answer)
            near.close()

        threading.Thread(target=welcome, daemon=True).start()
        (failed,) = Client(f"http://127.0.0.1:{door.getsockname()[1]}").submit(Request(**WISH))
    assert isinstance(failed, Failed)
    assert failed.error.endswith("is not an inkstream server: check its address")


def test_a_key_goes_to_the_server_and_to_no_other_it_points_to(tmp_path, start_server):
    from inkstream.serve.keys import add_key
    from inkstream.serve.limits import Settings

    key = add_key(tmp_path / "keys.json", "somebody", 0.0)
    served = start_server(Settings(tmp_path, models=("pocket",), preload=False))
    try:
        url = f"http://127.0.0.1:{served.port}"
        assert [spec.name for spec in Client(url, key).models()] == ["pocket"]
        with pytest.raises(InputError, match="asks for a key"):
            Client(url).models()
    finally:
        served.stop()
    with socket.create_server(("127.0.0.1", 0)) as door:

        def point_elsewhere() -> None:
            near = door.accept()[0]
            near.recv(65536)
            near.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
            near.close()

        threading.Thread(target=point_elsewhere, daemon=True).start()
        with pytest.raises(InputError, match="answered 302"):
            Client(f"http://127.0.0.1:{door.getsockname()[1]}", key).models()


def test_events_are_read_with_their_names_and_pings_between_them():
    lines = b': ping\n\nid: a-1\nevent: step\ndata: {"step": 1}\n\n: ping\n\nid: a-2\nevent: done\ndata: {}\n\n'
    assert list(read_events(iter(lines.splitlines(keepends=True)))) == [
        ("step", "a-1", {"step": 1}),
        ("done", "a-2", {}),
    ]


def test_the_command_line_draws_on_a_server_and_writes_what_it_would_have_drawn(address, tmp_path, capsys):
    words = ["a red circle", "--width=32", "--height=32", "--steps=1", "--seed=7", "--quiet"]
    for name, more in (("here.png", []), ("there.png", [f"--server={address}"])):
        assert main(["generate", *words, *more, f"--output={tmp_path / name}"]) == 0
    here, there = (Image.open(tmp_path / name) for name in ("here.png", "there.png"))
    assert here.tobytes() == there.tobytes()
    assert read_request(tmp_path / "there.png").request == read_request(tmp_path / "here.png").request
    records = [json.loads(image.text["inkstream"]) for image in (here, there)]
    assert records[0]["licence"] == records[1]["licence"]
    capsys.readouterr()
    assert main(["generate", *words, f"--server={address}", f"--output={tmp_path}/", "--json"]) == 0
    assert f"--server {address}" in json.loads(capsys.readouterr().out)["again"]


@pytest.mark.parametrize(
    "option",
    [
        "--device=cpu",
        "--dtype=fp32",
        "--memory=8GiB",
        "--placement=parked",
        "--commercial-only",
        "--compile",
        "--attention=sdpa",
        "--dry-run",
    ],
)
def test_options_for_this_machine_are_refused_beside_a_server(address, option, capsys, tmp_path):
    assert main(["generate", "a cat", f"--server={address}", option, f"--output={tmp_path}/"]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_a_client_needs_no_torch():
    code = "import sys, inkstream; inkstream.Client('http://localhost'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
