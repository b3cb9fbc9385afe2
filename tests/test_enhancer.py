"""A prompt enhancer, on this machine or at a chat server, is a writer behind the one switch `upsample`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from inkstream import Engine, InputError, Machine, Remote, Request
from inkstream.cli import main
from inkstream.engine.drawing.enhancer import CHINESE, ENGLISH, ChatWriter, instruct, plain
from inkstream.engine.pictures.metadata import describe, read_request
from inkstream.types import Done, Failed, Loading
from remote_providers import DIALECTS, KEY, Pretended

SMALL = {"width": 32, "height": 32, "steps": 1, "seed": 3}


class Chat:
    """A chat server with OpenAI's API. It writes `answer`, in pieces if it streams."""

    def __init__(self) -> None:
        self.answer = "<think>a fox, hm</think>A red fox in deep snow, soft morning light."
        self.streams = True
        self.status = 200
        self.asked: list[Any] = []
        self.keys: list[str] = []
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                self._send("application/json", {"object": "list", "data": [{"id": "qwen3-4b", "object": "model"}]})

            def do_POST(self) -> None:
                chat.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                chat.keys.append(self.headers.get("Authorization", ""))
                if chat.status != 200:
                    self._send("application/json", {"error": {"message": f"no {chat.keys[-1]}"}})
                elif not chat.streams:
                    self._send("application/json", {"choices": [{"message": {"content": chat.answer}}]})
                else:
                    pieces = [chat.answer[i : i + 7] for i in range(0, len(chat.answer), 7)]
                    events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
                    lines = [f"data: {json.dumps(event)}\n\n" for event in [*events, {"choices": []}]]
                    self._send("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

            def _send(self, kind: str, content: Any) -> None:
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(chat.status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def chat(monkeypatch) -> Iterator[Chat]:
    monkeypatch.delenv("INKSTREAM_ENHANCER_KEY", raising=False)
    chat = Chat()
    yield chat
    chat.server.shutdown()
    chat.server.server_close()


def test_a_server_writes_the_prompt_and_the_model_draws_that(chat, tiny_folder):
    engine = Engine(Machine("cpu", enhancer=chat.address))
    request = Request(prompt="a fox", model=str(tiny_folder), **SMALL)
    events = list(engine.submit(request))
    done = events[-1]
    assert isinstance(done, Done), done
    written = "A red fox in deep snow, soft morning light."
    assert (done.request.prompt, done.request.upsample) == (written, False)
    assert [event.text for event in events if isinstance(event, Loading) and event.text][-1] == written
    plainly = Engine(Machine("cpu")).generate(request.model_copy(update={"prompt": written})).images[0]
    assert done.image.tobytes() == plainly.tobytes()
    asked = chat.asked[0]
    assert asked["model"] == "qwen3-4b"
    assert asked["messages"] == [{"role": "system", "content": ENGLISH}, {"role": "user", "content": "a fox"}]
    again = list(engine.submit(done.request))[-1]
    assert isinstance(again, Done)
    assert again.image.tobytes() == done.image.tobytes()
    assert len(chat.asked) == 1


def test_upsample_is_the_switch(chat, tiny_folder):
    engine = Engine(Machine("cpu", enhancer=chat.address))
    request = Request(prompt="a fox", model=str(tiny_folder), upsample=False, **SMALL)
    assert list(engine.submit(request))[-1].request.prompt == "a fox"
    pocket = Request(prompt="a red circle", **SMALL)  # it has a grammar of its own
    assert list(engine.submit(pocket))[-1].request.prompt == "a red circle"
    json_prompt = Request(prompt='{"scene": "a fox"}', model=str(tiny_folder), **SMALL)
    assert list(engine.submit(json_prompt))[-1].request.prompt == '{"scene": "a fox"}'
    assert chat.asked == []


def test_both_prompts_are_in_the_picture(chat, tiny_folder, tmp_path, capsys):
    path = str(tmp_path / "fox.png")
    words = ["generate", "a fox", "-m", str(tiny_folder), "-W", "32", "-H", "32", "--steps", "1", "-o", path]
    assert main([*words, "--device=cpu", f"--enhancer={chat.address}", "--enhancer-model=mine"]) == 0
    assert "prompt: A red fox in deep snow" in capsys.readouterr().err
    assert describe(path)["upsampled_from"] == "a fox"
    assert read_request(path).request.prompt.startswith("A red fox")
    assert chat.asked[0]["model"] == "mine"


def test_a_remote_model_gets_what_the_enhancer_wrote(chat, monkeypatch):
    provider = Pretended(DIALECTS["dashscope"])
    monkeypatch.setenv("DASHSCOPE_HTTP_BASE_URL", provider.address)
    monkeypatch.setenv("DASHSCOPE_API_KEY", KEY)
    remote = Remote("dashscope:z-image-turbo", Machine(enhancer=chat.address))
    done = list(remote.submit(Request(prompt="a fox", seed=1)))[-1]
    provider.stop()
    assert isinstance(done, Done), done
    assert done.request.prompt.startswith("A red fox")
    assert provider.bodies[0]["parameters"]["prompt_extend"] is False
    assert done.cost == pytest.approx(0.015)


def test_instructions_are_in_the_language_of_the_prompt():
    assert instruct("a fox in the snow", 0) == ENGLISH
    assert instruct("雪地里的一只狐狸，招牌写着 SALE", 0) == CHINESE
    assert instruct('a sign with the words "春季新品"', 0) == ENGLISH
    assert "2 pictures" in instruct("make it blue", 2)
    assert "一张图片" in instruct("把它变成蓝色", 1)


@pytest.mark.parametrize(
    "text",
    [
        "A fox.",
        '"A fox."',
        "Prompt: A fox.",
        "**Prompt:** A fox.",
        "```\nA fox.\n```",
        "<think>a\nb</think>\n\nA fox.",
        "提示词：A fox.",
        "  A\n fox. ",
    ],
)
def test_only_the_prompt_is_taken_from_an_answer(text):
    assert plain(text) == "A fox."


def test_quotes_inside_a_prompt_stay():
    assert plain('"SALE" on a sign beside "NEW"') == '"SALE" on a sign beside "NEW"'
    assert plain("<think>not finished") == ""


def test_an_answer_at_once_is_read_too(chat):
    chat.streams = False
    assert list(ChatWriter(chat.address).write("a fox", [], 1))[-1].startswith("A red fox")


def test_what_goes_wrong_is_told_in_one_line(chat, monkeypatch, tiny_folder):
    chat.answer = "<think>never ends"
    with pytest.raises(InputError, match="the enhancer wrote no prompt: leave upsample out"):
        list(ChatWriter(chat.address).write("a fox", [], 1))
    monkeypatch.setenv("INKSTREAM_ENHANCER_KEY", KEY)
    chat.status = 401
    with pytest.raises(InputError, match=r"does not accept the key \(no Bearer \*\*\*\): check INKSTREAM_ENHANCER_KEY"):
        list(ChatWriter(chat.address, "x").write("a fox", [], 1))
    assert chat.keys[-1] == f"Bearer {KEY}"
    with pytest.raises(InputError, match="would carry the key of the enhancer unencrypted"):
        ChatWriter("http://example.com/v1")
    chat.server.shutdown()
    chat.server.server_close()
    request = Request(prompt="a fox", model=str(tiny_folder), **SMALL)
    last = list(Engine(Machine("cpu", enhancer=chat.address, enhancer_model="x")).submit(request))[-1]
    assert isinstance(last, Failed)
    assert last.error.startswith("the enhancer cannot be reached")


def test_another_models_language_model_writes_by_its_name(tmp_path, make_folder, tiny_folder):
    from inkstream.families import SPECS

    klein = make_folder(tmp_path / "klein", SPECS["flux2-klein-4b"].tiny)
    engine = Engine(Machine("cpu", enhancer=str(klein)))
    request = Request(prompt="a fox", model=str(tiny_folder), **SMALL)
    first, again = (list(engine.submit(request))[-1] for _ in range(2))
    assert isinstance(first, Done), first
    assert first.request.prompt not in ("", "a fox")  # noise: the weights are random
    assert again.request.prompt == first.request.prompt  # the seed chooses the words
    last = list(Engine(Machine("cpu", enhancer="no/such/place.safetensors")).submit(request))[-1]
    assert isinstance(last, Failed)
    assert "no/such/place.safetensors is not a known model" in last.error
