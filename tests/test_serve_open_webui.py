"""Open WebUI's three image engines: its requests, exactly as it sends them, and the parts of the answers it reads."""

from __future__ import annotations

import base64
import io
import json
import uuid
from typing import Any
from urllib.parse import urlencode

import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from inkstream.serve.keys import add_key
from inkstream.serve.limits import Settings

PROMPT = "a red circle"
USER = {"X-OpenWebUI-User-Name": "Ada", "X-OpenWebUI-User-Id": "1", "X-OpenWebUI-User-Role": "user"}


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


def form(fields: dict[str, str], files: list[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    """The body and the header of a form, as Open WebUI sends it."""
    boundary = uuid.uuid4().hex
    body = b""
    for name, value in fields.items():
        head = f'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="{name}"'
        body += f"--{boundary}\r\n{head}\r\n\r\n{value}\r\n".encode()
    for name, data in files:
        head = f'Content-Disposition: form-data; name="{name}"; filename="{uuid.uuid4()}.png"'
        body += f"--{boundary}\r\nContent-Type: image/png\r\n{head}\r\n\r\n".encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


# openai -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "more"),
    [("dall-e-2", {"response_format": "b64_json"}), ("dall-e-3", {"response_format": "b64_json"}), ("gpt-image-1", {})],
)
def test_its_openai_engine_generates_with_each_model_name_it_offers(server, model, more):
    params = {"steps": 1}  # IMAGES_OPENAI_API_PARAMS
    body = {"model": model, "prompt": PROMPT, "n": 1, "size": "512x512", **more, **params}
    headers = {"Authorization": "Bearer ", "Content-Type": "application/json", **USER}
    status, _, answer = server.ask("POST", "/v1/images/generations?api-version=2025-04-01", body, headers)
    assert status == 200, answer
    (image,) = answer["data"]
    assert image.get("url") is None
    assert opened(base64.b64decode(image["b64_json"])).size == (512, 512)


@pytest.mark.parametrize(("name", "model"), [("image", ""), ("image[]", "gpt-image-1")])
def test_its_openai_engine_edits(server, name, model):
    fields = {"model": model, "prompt": PROMPT, "n": "1", "size": "32x32", "response_format": "b64_json"}
    body, headers = form(fields, [(name, png("orange"))])
    status, _, answer = server.ask("POST", "/v1/images/edits", body, headers | {"Authorization": "Bearer ", **USER})
    assert status == 200, answer
    assert opened(base64.b64decode(answer["data"][0]["b64_json"])).size == (32, 32)


# automatic1111 ------------------------------------------------------------------------------------------------------


def test_its_automatic1111_engine_chooses_a_model_and_generates(server):
    headers = {"authorization": ""}
    status, _, options = server.ask("GET", "/sdapi/v1/options", headers=headers)
    assert status == 200
    models = server.ask("GET", "/sdapi/v1/sd-models", headers=headers)[2]
    assert [(model["title"], model["model_name"]) for model in models] == [("pocket", "pocket")]
    options["sd_model_checkpoint"] = "pocket"
    assert server.ask("POST", "/sdapi/v1/options", options, headers)[0] == 200
    body = {"prompt": PROMPT, "batch_size": 2, "width": 64, "height": 64, "steps": 50, "negative_prompt": "blue",
            "cfg_scale": 4, "sampler_name": "Euler a", "scheduler": "Automatic"}  # fmt: skip
    status, _, answer = server.ask("POST", "/sdapi/v1/txt2img", body, headers)
    assert status == 200, answer
    assert [opened(base64.b64decode(image)).size for image in answer["images"]] == [(64, 64)] * 2
    assert json.loads(answer["info"])["steps"] == 50


# comfyui ------------------------------------------------------------------------------------------------------------


def workflow() -> dict[str, Any]:
    """ComfyUI's standard graph for text to image, which Open WebUI contains."""
    return {
        "3": {
            "inputs": {"seed": 0, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal", "denoise": 1,
                       "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
            "class_type": "KSampler", "_meta": {"title": "KSampler"},
        },
        "4": {"inputs": {"ckpt_name": "model.safetensors"}, "class_type": "CheckpointLoaderSimple",
              "_meta": {"title": "Load Checkpoint"}},
        "5": {"inputs": {"width": 512, "height": 512, "batch_size": 1}, "class_type": "EmptyLatentImage",
              "_meta": {"title": "Empty Latent Image"}},
        "6": {"inputs": {"text": "Prompt", "clip": ["4", 1]}, "class_type": "CLIPTextEncode"},
        "7": {"inputs": {"text": "", "clip": ["4", 1]}, "class_type": "CLIPTextEncode"},
        "8": {"inputs": {"samples": ["3", 0], "vae": ["4", 2]}, "class_type": "VAEDecode"},
        "9": {"inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}, "class_type": "SaveImage"},
    }  # fmt: skip


def filled(**inputs: Any) -> dict[str, Any]:
    """The graph with the values of Open WebUI's settings. inputs: "n" and a node's id -> values, as n3={"steps": 2}."""
    graph = workflow()
    mine = {"n3": {"steps": 2, "seed": 7, "cfg": 1}, "n4": {"ckpt_name": "pocket"}, "n5": {"width": 32, "height": 32},
            "n6": {"text": PROMPT}}  # fmt: skip
    for name in mine.keys() | inputs.keys():
        graph[name[1:]]["inputs"] |= mine.get(name, {}) | inputs.get(name, {})
    return graph


def comfy(server, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str = "") -> Any:
    method = "GET" if body is None else "POST"
    more = {"User-Agent": "Mozilla/5.0", "Authorization": f"Bearer {key}"}
    return server.ask(method, f"/comfyui{path}", body, more | (headers or {}))


def generate(server, graph: dict[str, Any], key: str = "") -> tuple[list[bytes], list[dict[str, Any]], dict[str, Any]]:
    """Draw a graph as Open WebUI does. Returns the pictures, the messages of the WebSocket, and the history."""
    client = str(uuid.uuid4())
    messages = []
    address = f"ws://127.0.0.1:{server.port}/comfyui/ws?clientId={client}"
    with connect(address, additional_headers={"Authorization": f"Bearer {key}"}) as socket:
        status, _, accepted = comfy(server, "/prompt", {"prompt": graph, "client_id": client}, key=key)
        assert status == 200, accepted
        prompt = accepted["prompt_id"]
        while True:
            messages.append(json.loads(socket.recv(timeout=120)))
            data = messages[-1]["data"]
            if messages[-1]["type"] == "executing" and data["node"] is None and data["prompt_id"] == prompt:
                break
    history = comfy(server, f"/history/{prompt}", key=key)[2][prompt]
    pictures = []
    for id, output in history["outputs"].items():
        assert graph[id]["class_type"] in ("SaveImage", "PreviewImage")
        for image in output["images"]:
            query = urlencode({"filename": image["filename"], "subfolder": image["subfolder"], "type": image["type"]})
            status, headers, content = comfy(server, f"/view?{query}", key=key)
            assert (status, headers["content-type"]) == (200, "image/png")
            pictures.append(content)
    return pictures, messages, history


def test_its_comfyui_engine_lists_the_models(server):
    status, _, info = comfy(server, "/object_info")
    assert status == 200
    required = info["CheckpointLoaderSimple"]["input"]["required"]
    assert next(key for key in required if "_name" in key) == "ckpt_name"
    assert required["ckpt_name"][0] == ["pocket"]
    assert comfy(server, "/object_info/KSampler")[2] == {"KSampler": info["KSampler"]}
    assert comfy(server, "/object_info/ControlNetLoader")[2] == {}


def test_its_comfyui_engine_draws_the_standard_graph_as_the_native_api_draws_it(server):
    pictures, messages, history = generate(server, filled(n3={"cfg": 4}, n5={"batch_size": 2}, n7={"text": "blue"}))
    same = {"seed": 7, "steps": 2, "guidance": 4, "negative_prompt": "blue", "schedule": "normal", "solver": "euler"}
    own = server.ended(server.draw(**same, count=2))
    natives = [server.ask("GET", picture["url"])[2] for picture in own["pictures"]]
    assert [opened(one).tobytes() for one in pictures] == [opened(one).tobytes() for one in natives]
    assert history["status"]["status_str"] == "success"
    kinds = [message["type"] for message in messages]
    assert kinds[0] == "status"
    assert kinds[1:3] == ["execution_start", "executing"]
    assert kinds[-3:] == ["executed", "execution_success", "executing"]
    steps = [message["data"]["value"] for message in messages if message["type"] == "progress"]
    assert steps == [1, 2, 1, 2]


def test_its_comfyui_engine_edits_a_picture(server):
    body, headers = form({"type": "input"}, [("image", png("orange"))])
    status, _, uploaded = comfy(server, "/api/upload/image", body, headers)
    assert status == 200, uploaded
    graph = filled(n3={"denoise": 0.0, "latent_image": ["10", 0]})
    graph["10"] = {"inputs": {"pixels": ["11", 0], "vae": ["4", 2]}, "class_type": "VAEEncode"}
    graph["11"] = {"inputs": {"image": uploaded["name"], "upload": "image"}, "class_type": "LoadImage"}
    graph["12"] = {"inputs": {"images": ["8", 0]}, "class_type": "PreviewImage"}
    pictures, _, history = generate(server, graph)
    assert {id: output["images"][0]["type"] for id, output in history["outputs"].items()} == {
        "9": "output",
        "12": "temp",
    }
    assert pictures[0] == pictures[1]
    middle = opened(pictures[0]).resize((1, 1)).getpixel((0, 0))
    assert all(abs(is_ - was) < 40 for is_, was in zip(middle, (255, 165, 0)))


def test_numbers_that_its_settings_send_as_text_are_read_as_numbers(server):
    graph = filled(n3={"cfg": "1", "steps": "2"}, n7={"text": None}, n5={"batch_size": "1"})
    pictures, _, _ = generate(server, graph)
    assert opened(pictures[0]).size == (32, 32)


def without(name: str, input: str) -> dict[str, Any]:
    graph = filled()
    del graph[name]["inputs"][input]
    return graph


def another(id: str, kind: str, **inputs: Any) -> dict[str, Any]:
    return filled() | {id: {"class_type": kind, "inputs": inputs}}


@pytest.mark.parametrize(
    ("graph", "status", "words"),
    [
        (workflow(), 404, "ckpt_name model.safetensors is not offered: take pocket"),
        (filled(n3={"sampler_name": "ddim"}), 400, "node 3: sampler_name ddim is not supported"),
        (filled(n3={"scheduler": "karras"}), 400, "node 3: scheduler karras"),
        (filled(n3={"denoise": 0.5}), 400, "node 3: denoise 0.5"),
        (filled(n3={"steps": "many"}), 400, "node 3: steps many is not a number"),
        (filled(n3={"steps": None}), 400, "node 3: steps None is not a number"),
        (filled(n3={"steps": 0}), 400, "steps 0"),
        (filled(n3={"steps": 2.7}), 400, "node 3: steps 2.7 is not valid: give a whole number"),
        (filled(n3={"denoise": "nan"}), 400, "node 3: denoise nan is not valid: give a finite number"),
        (filled(n3={"denoise": 2}), 400, "node 3: denoise 2 is out of range: give 0 to 1"),
        (filled(n3={"sampler_name": ""}), 400, "node 3: sampler_name is empty"),
        (filled(n3={"scheduler": None}), 400, "node 3: scheduler is empty"),
        (filled(n3={"latent_image": ["3", 0]}), 400, "node 3: latent_image comes from the same node"),
        (filled(n3={"cfg": 1000}), 400, "cfg 1000"),
        (filled(n5={"batch_size": 0}), 400, "batch_size 0"),
        (filled(n5={"batch_size": 100}), 400, "batch_size 100 is too many for one job"),
        (filled(n3={"model": ["4", 1]}), 400, "node 3: output 1 of node 4 is not a MODEL: link one to model"),
        (filled(n3={"model": ["20", 0]}), 400, "node 3: model is not a link"),
        (filled(n6={"text": ["4", 0]}), 400, "node 6: text is a list or an object"),
        (filled(n6={"text": ""}), 400, "there is no prompt"),
        (filled(n6={"text": "a <lora:x:1>"}), 400, "loras"),
        (filled(n5={"width": 40}), 400, "multiple of 16"),
        (without("3", "seed"), 400, "node 3: seed is missing"),
        (without("9", "images"), 400, "node 9: images is missing"),
        (another("4", "UNETLoader", unet_name="x"), 400, "node 4: UNETLoader is not supported: take Checkpoint"),
        (another("9", "Image Save", images=["8", 0]), 400, "end it with SaveImage"),
        (another("7", "ConditioningZeroOut", conditioning=["6", 0]) | {"3": filled(n3={"cfg": 4})["3"]}, 400,
         "node 7: ConditioningZeroOut needs cfg 1"),
        (another("10", "CheckpointLoaderSimple", ckpt_name="z") | {"6": filled(n6={"clip": ["10", 1]})["6"]}, 400,
         "the graph loads pocket and z: load one model"),
        (another("10", "SaveImage", images=["11", 0], filename_prefix="")
         | {"11": {"class_type": "LoadImage", "inputs": {"image": "x"}}}, 400, "node 10: images comes from LoadImage"),
    ],
)  # fmt: skip
def test_an_unsupported_graph_is_refused_with_the_node(server, graph, status, words):
    answered, _, answer = comfy(server, "/prompt", {"prompt": graph, "client_id": str(uuid.uuid4())})
    assert answered == status, answer
    assert words in answer["error"]["message"]


def test_a_graph_of_two_passes_is_refused(server):
    graph = filled(n8={"samples": ["10", 0]})
    graph["10"] = {"class_type": "KSampler", "inputs": graph["3"]["inputs"] | {"latent_image": ["3", 0]}}
    status, _, answer = comfy(server, "/prompt", {"prompt": graph})
    assert (status, answer["error"]["message"]) == (400, "the graph has 2 KSampler nodes: send exactly one")


def test_nodes_that_no_saved_picture_depends_on_are_ignored(server):
    pictures, _, _ = generate(server, another("10", "Note", text="see there"))
    assert len(pictures) == 1


def test_a_prompt_that_is_cancelled_ends_for_its_client_too(server, until):
    client = str(uuid.uuid4())
    graph = filled(n3={"steps": 50}, n5={"width": 256, "height": 256})
    with connect(f"ws://127.0.0.1:{server.port}/comfyui/ws?clientId={client}") as socket:
        prompt = comfy(server, "/prompt", {"prompt": graph, "client_id": client})[2]["prompt_id"]
        assert comfy(server, f"/history/{prompt}")[2] == {}
        until(lambda: json.loads(socket.recv(timeout=60))["type"] == "progress")
        server.ask("DELETE", f"/v1/jobs/{prompt}")
        until(lambda: json.loads(socket.recv(timeout=60))["type"] == "execution_interrupted")
        assert json.loads(socket.recv(timeout=60))["data"]["node"] is None
    told = comfy(server, f"/history/{prompt}")[2][prompt]
    assert (told["outputs"], told["status"]["status_str"]) == ({}, "error")


def test_a_page_of_another_site_opens_no_socket(server):
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{server.port}/comfyui/ws", origin="http://elsewhere.example")
    assert b'method="CONNECT"' in server.ask("GET", "/metrics")[2]  # it is counted among what was refused
    with connect(f"ws://127.0.0.1:{server.port}/comfyui/ws", origin=f"http://127.0.0.1:{server.port}") as socket:
        assert json.loads(socket.recv())["type"] == "status"


def test_a_server_that_stops_ends_its_sockets(tmp_path, start_server):
    served = start_server(Settings(tmp_path, models=("pocket",)))
    with connect(f"ws://127.0.0.1:{served.port}/comfyui/ws") as socket:
        assert json.loads(socket.recv())["type"] == "status"
        served.stop()
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
        assert closed.value.rcvd.code in (1001, 1012)  # going away, restarting


def test_a_key_is_needed_and_sees_only_its_own_prompts(tmp_path, start_server):
    ada, bob = (add_key(tmp_path / "keys.json", name, 0.0) for name in ("ada", "bob"))
    served = start_server(Settings(tmp_path, models=("pocket",)))
    try:
        pictures, _, _ = generate(served, filled(), ada)
        assert opened(pictures[0]).size == (32, 32)
        (job,) = served.ask("GET", "/v1/jobs", headers={"Authorization": f"Bearer {ada}"})[2]["jobs"]
        assert comfy(served, f"/history/{job['id']}", key=bob)[2] == {}
        assert comfy(served, f"/view?filename={job['pictures'][0]['id']}.png", key=bob)[0] == 404
        assert comfy(served, "/prompt", {"prompt": filled()}, key="none")[0] == 401
        with pytest.raises(InvalidStatus, match="403"):
            connect(f"ws://127.0.0.1:{served.port}/comfyui/ws")
    finally:
        served.stop()
