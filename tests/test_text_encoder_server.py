"""A text encoder on another machine gives the same pictures, bit for bit, and its weights are not read here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import torch
import uvicorn

from inkstream import Engine, InputError, Machine, Request
from inkstream.cli import main
from inkstream.engine.machine.text_encoder import TextEncoder
from inkstream.serve.encoding import build
from inkstream.serve.keys import Keys, add_key
from inkstream.types import Done, Failed

SMALL = {"width": 32, "height": 32, "steps": 2, "seed": 3, "guidance": 3.0, "negative_prompt": "blurry"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


class Serving:
    """The encoder's server in a thread. asked: the number of prompts that it encoded or had kept."""

    def __init__(self, folder, keys, machine=None):
        self.encoder = TextEncoder(str(folder), machine or Machine("cpu"))
        self.asked = 0

        def encode(*given):
            self.asked += 1
            return self.encoder.encode(*given)

        config = uvicorn.Config(build(encode, Keys(keys)), "127.0.0.1", free_port(), log_config=None)
        self.server = uvicorn.Server(config)
        self.address = f"http://127.0.0.1:{config.port}"
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def serve(tmp_path, until) -> Iterator:
    running = []

    def start(folder, **given) -> Serving:
        running.append(Serving(folder, tmp_path / "keys.json", **given))
        until(lambda: running[-1].server.started, 60)
        return running[-1]

    yield start
    for one in running:
        one.stop()


def last_of(machine: Machine, **wish):
    return list(Engine(machine).submit(Request(**{"prompt": "a fox", **SMALL, **wish})))[-1]


@pytest.mark.parametrize("name", ["tiny_base_folder", "flux1-dev", "flux2-klein-4b"])
def test_pictures_are_equal_and_each_prompt_is_sent_once(name, request, serve, make_folder, tmp_path):
    from inkstream.families import SPECS

    if name in SPECS:
        pytest.importorskip("transformers")
        folder = make_folder(tmp_path / name, SPECS[name].tiny)
    else:
        folder = request.getfixturevalue(name)
    far = serve(folder)
    wish = Request(prompt="a fox", model=str(folder), **{k: v for k, v in SMALL.items() if k != "negative_prompt"})
    engine = Engine(Machine("cpu", text_encoder_server=far.address))
    done = list(engine.submit(wish))[-1]
    assert isinstance(done, Done), done
    assert done.image.tobytes() == Engine(Machine("cpu")).generate(wish).images[0].tobytes()
    asked = far.asked
    assert asked == (2 if name == "tiny_base_folder" else 1)  # guidance has a negative prompt too
    assert isinstance(list(engine.submit(wish.model_copy(update={"seed": 4})))[-1], Done)
    assert far.asked == asked
    encoders = [part for part in vars(engine.model.family).values() if isinstance(part, torch.nn.Module)]
    assert any(all(weight.is_meta for weight in part.parameters()) for part in encoders)


def test_two_processes_draw_what_one_draws(tiny_folder, tmp_path, until):
    port = free_port()
    words = ["serve", "--encode-only", "-m", str(tiny_folder), "--device=cpu", f"--port={port}", f"--data={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "inkstream", *words], env=os.environ, stderr=subprocess.DEVNULL)

    def there() -> bool:
        assert process.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        until(there, 240)
        wish = Request(prompt="a fox", model=str(tiny_folder), width=32, height=32, steps=2, seed=3)
        far = Engine(Machine("cpu", text_encoder_server=f"http://127.0.0.1:{port}")).generate(wish)
        assert far.images[0].tobytes() == Engine(Machine("cpu")).generate(wish).images[0].tobytes()
    finally:
        process.terminate()
        process.wait(30)


def test_the_memory_plan_leaves_the_encoder_out(tiny_folder):
    wish = Request(prompt="a fox", model=str(tiny_folder), width=32, height=32)
    here, away = (
        Engine(Machine("cpu", text_encoder_server=address)).placing(wish) for address in (None, "http://127.0.0.1:9")
    )
    assert away.opened.away == ["text_encoder"]
    saved = here.plans(wish)[0].phases["steps"] - away.plans(wish)[0].phases["steps"]
    assert saved == here.opened.numbers["text_encoder"] * here.opened.dtypes["text_encoder"].itemsize


def test_what_differs_is_told_in_one_line(serve, tiny_folder, tiny_base_folder, make_folder, tmp_path, monkeypatch):
    from inkstream.families import SPECS

    far = serve(tiny_folder)
    there = {"model": str(tiny_folder)}
    other = last_of(Machine("cpu", "bf16", text_encoder_server=far.address), **there)
    assert isinstance(other, Failed)
    assert "the server encodes in float32, not in bfloat16: start it with --dtype bfloat16" in other.error
    another = make_folder(tmp_path / "another", SPECS["z-image-turbo"].tiny, 7)
    other = last_of(Machine("cpu", text_encoder_server=far.address), model=str(another))
    assert "whose text encoders are others" in other.error
    far.stop()
    gone = last_of(Machine("cpu", text_encoder_server=far.address), **there)
    assert isinstance(gone, Failed)
    assert "the text encoder's server cannot be reached" in gone.error
    with pytest.raises(InputError, match="ftp://x is not a server's address"):
        Engine(Machine("cpu", text_encoder_server="ftp://x")).generate(Request(prompt="a fox", **there))


def test_a_server_with_keys_asks_for_one(serve, tiny_folder, tmp_path, monkeypatch):
    key = add_key(tmp_path / "keys.json", "me", 0.0)
    far = serve(tiny_folder)
    machine, there = Machine("cpu", text_encoder_server=far.address), {"model": str(tiny_folder)}
    monkeypatch.delenv("INKSTREAM_API_KEY", raising=False)
    assert "asks for a key" in last_of(machine, **there).error
    monkeypatch.setenv("INKSTREAM_API_KEY", "ink_wrong")
    refused = last_of(machine, **there).error
    assert "does not accept the key" in refused
    assert "ink_wrong" not in refused
    monkeypatch.setenv("INKSTREAM_API_KEY", key)
    assert isinstance(last_of(machine, **there), Done)
    for body in (b"{}", b'{"tokens": [], "mark": "", "dtype": ""}', b"[" * 100, b"x" * (2 << 20)):
        asked = urllib.request.Request(f"{far.address}/v1/encode", body, {"Authorization": f"Bearer {key}",
                                       "Content-Type": "application/json"})  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(asked)
        refusal.value.close()
        assert refusal.value.code in (400, 413, 422)


def test_the_options_are_checked(tmp_path, capsys):
    assert main(["serve", "--encode-only", f"--data={tmp_path}"]) == 2
    assert "--encode-only takes one --model, 0 are given" in capsys.readouterr().err
    assert main(["serve", "--encode-only", "-m", "pocket", "--host=0.0.0.0", f"--data={tmp_path}"]) == 2
    assert "can be reached by others and no key is set" in capsys.readouterr().err
