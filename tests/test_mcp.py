"""Agents draw: the tools over the protocol itself, with an engine here and with a server."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image

import inkstream
from inkstream.cli.machine import Anywhere
from inkstream.engine.pictures.metadata import read_request
from inkstream.types import REPAINTING, InputError

protocol = pytest.importorskip("mcp")
from inkstream.cli.mcp import build  # noqa: E402

SMALL = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 2, "seed": 7}


def talk(server: Any, work: Callable[[Any], Any]) -> Any:
    """What an agent's client is answered."""

    async def run() -> Any:
        async with protocol.Client(server) as client:
            return await work(client)

    return anyio.run(run)


def call(server: Any, tool: str, arguments: dict[str, Any], **more: Any) -> Any:
    return talk(server, lambda client: client.call_tool(tool, arguments, **more))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return build(Anywhere("cpu"), tmp_path_factory.mktemp("drawn"))


def test_the_tools_take_the_fields_of_a_request(here):
    tools = {tool.name: tool for tool in talk(here, lambda client: client.list_tools()).tools}
    assert set(tools) == {"generate", "edit", "list_models"}
    fields = tools["generate"].input_schema["properties"]
    assert fields["steps"]["description"] == "Number of solver steps."
    assert tools["edit"].input_schema["properties"].keys() - fields.keys() == {
        "image",
        *REPAINTING,
        "strength",
        "reference",
    }


def test_a_picture_comes_as_an_image_and_as_a_file_that_edit_can_name(here):
    told = []

    async def hear(at: float, total: float | None, message: str | None) -> None:
        told.append((at, total))

    answer = call(here, "generate", {**SMALL, "count": 2}, progress_callback=hear)
    assert [block.type for block in answer.content] == ["text", "image"] * 2
    facts = json.loads(answer.content[0].text)
    assert Image.open(io.BytesIO(base64.b64decode(answer.content[1].data))).size == (32, 32)
    assert (facts["seed"], facts["width"]) == (7, 32)
    assert read_request(facts["path"]).request.prompt == "a red circle"
    assert told[-1] == (4, 4)
    edited = call(here, "edit", {"prompt": "a blue square", "image": facts["path"], "steps": 2, "strength": 0.5})
    assert not edited.is_error
    assert json.loads(edited.content[0].text)["path"] != facts["path"]


@pytest.mark.parametrize(
    ("tool", "given", "words"),
    [
        ("generate", {"prompt": "a", "image": "a.png"}, "call edit"),
        ("generate", {"prompt": "a", "widht": 32}, "widht"),
        ("generate", {"prompt": "a", "width": 40}, "multiple of 16"),
        ("generate", {"prompt": "a", "model": "z-image-turbo"}, "not downloaded yet"),
        ("edit", {"prompt": "a"}, "give image or reference"),
        ("edit", {"prompt": "a", "image": "/nowhere.png"}, "/nowhere.png does not exist"),
        ("paint", {}, "there is no tool"),
    ],
)
def test_what_cannot_be_done_is_told_to_the_agent(here, tool, given, words):
    answer = call(here, tool, given)
    assert answer.is_error
    assert words in answer.content[0].text


def test_an_agent_that_gives_up_stops_the_drawing(server, tmp_path, until):
    there = build(Anywhere(server=f"http://127.0.0.1:{server.port}"), tmp_path)
    long = {**SMALL, "width": 256, "height": 256, "steps": 50}

    async def give_up(client: Any) -> None:
        async def hear(at: float, total: float | None, message: str | None) -> None:
            scope.cancel()

        with anyio.CancelScope() as scope:
            await client.call_tool("generate", long, progress_callback=hear)

    talk(there, give_up)
    until(lambda: server.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]["state"] == "cancelled")


def test_the_command_speaks_the_protocol_and_draws_on_a_server_without_torch(server, tmp_path):
    words = ["-m", "inkstream", "mcp", f"--server=http://127.0.0.1:{server.port}", f"--output={tmp_path}"]
    # A torch that cannot be imported stands in the way of whoever tries.
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    paths = os.pathsep.join([str(tmp_path), str(Path(inkstream.__file__).parent.parent)])
    process = protocol.StdioServerParameters(command=sys.executable, args=words, env={"PYTHONPATH": paths})

    async def work(client: Any) -> tuple[Any, Any]:
        return await client.call_tool("list_models", {}), await client.call_tool("generate", SMALL)

    listed, drawn = talk(protocol.stdio_client(process), work)
    assert [model["name"] for model in json.loads(listed.content[0].text)] == ["pocket"]
    with Image.open(json.loads(drawn.content[0].text)["path"]) as image:
        assert image.size == (32, 32)


def test_one_session_does_all_that_an_agents_program_does(server, tmp_path):
    words = ["-m", "inkstream", "mcp", f"--server=http://127.0.0.1:{server.port}", f"--output={tmp_path}"]
    paths = {"PYTHONPATH": str(Path(inkstream.__file__).parent.parent)}
    process = protocol.StdioServerParameters(command=sys.executable, args=words, env=paths)
    told: dict[str, Any] = {"progress": []}

    async def hear(at: float, total: float | None, message: str | None) -> None:
        told["progress"].append((at, total))

    async def run() -> None:
        async with protocol.stdio_client(process) as (read, write), protocol.ClientSession(read, write) as session:
            told["hello"] = await session.initialize()
            await session.send_ping()
            told["tools"] = {tool.name for tool in (await session.list_tools()).tools}
            told["models"] = await session.call_tool("list_models", {})
            told["drawn"] = await session.call_tool("generate", SMALL, progress_callback=hear)
            path = json.loads(told["drawn"].content[0].text)["path"]
            same = {"prompt": "a blue square", "steps": 2, "seed": 7, "strength": 0.5}
            data = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
            told["edits"] = [await session.call_tool("edit", {**same, "image": image}) for image in (path, data)]
            told["wrong"] = await session.call_tool("generate", {"prompt": "a", "steps": 0})
            for ask in (session.list_resources, session.list_prompts):  # there are none, and none are announced
                with pytest.raises(protocol.MCPError):
                    await ask()
            with anyio.move_on_after(2):
                await session.call_tool("generate", {**SMALL, "width": 256, "height": 256, "steps": 50})
            told["after"] = await session.call_tool("generate", SMALL)

    anyio.run(run)
    assert told["hello"].server_info.name == "inkstream"
    assert told["hello"].capabilities.resources is None
    assert told["tools"] == {"generate", "edit", "list_models"}
    assert [model["name"] for model in json.loads(told["models"].content[0].text)] == ["pocket"]
    assert told["progress"] == [(1, 2), (2, 2)]
    paths = [json.loads(answer.content[0].text)["path"] for answer in (told["drawn"], *told["edits"], told["after"])]
    pixels = [Image.open(path).tobytes() for path in paths]
    assert pixels[0] == pixels[3] != pixels[1] == pixels[2]
    assert told["wrong"].is_error
    assert "steps" in told["wrong"].content[0].text


def test_options_for_this_machine_are_refused_beside_a_server(tmp_path):
    with pytest.raises(InputError, match="--device"):
        build(Anywhere("cpu", server="http://127.0.0.1:1"), tmp_path)
