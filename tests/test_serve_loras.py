"""The server's LoRAs: their list, their previews, and their use in requests of OpenAI's and ComfyUI's programs."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import write_lora_folder
from inkstream.engine.files.lora_facts import read_facts
from inkstream.serve.limits import Settings
from inkstream.types import Machine

SMALL = {"prompt": "a red circle", "size": "32x32", "steps": 2, "seed": 7, "solver": "euler"}
BOLD = "styles/bold"


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (640, 320), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_header(file: Path, shapes: dict[str, list[int]], **metadata: str) -> None:
    """A safetensors file of zeros with these tensors in bfloat16."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def pair(path: str, width: int, rank: int = 4) -> dict[str, list[int]]:
    return {f"{path}.lora_A.weight": [rank, width], f"{path}.lora_B.weight": [width, rank]}


@pytest.fixture(scope="module")
def served(tmp_path_factory, start_server) -> Iterator[Any]:
    folder = write_lora_folder(tmp_path_factory.mktemp("loras"))
    write_header(
        folder / "ink.v1.safetensors",
        pair("diffusion_model.layers.29.attention.to_q", 3840, rank=16),
        **{"modelspec.title": "Ink wash", "modelspec.trigger_phrase": "inkwash, sumi-e, inkwash",
           "modelspec.usage_hint": "best near 0.7", "base_model": "/home/ann/models/z-image.safetensors",
           "modelspec.thumbnail": f"data:image/png;base64,{base64.b64encode(png('teal')).decode()}"},
    )  # fmt: skip
    (folder / "ink.v1.json").write_text('{"preferred weight": 0.7, "activation text": "not used"}')
    write_header(folder / "flux.safetensors", pair("transformer.transformer_blocks.18.attn.to_q", 3072, rank=8))
    (folder / "flux.preview.png").write_bytes(png("gold"))
    (folder / "flux.json").write_text('{"activation text": "flat, calm", "preferred weight": 0}')
    write_header(folder / "lokr.safetensors", {"lycoris_layers_0_attention_qkv.lokr_w1": [4, 4]})
    write_header(folder / "whole.safetensors", {"layers.0.attention.qkv.weight": [8, 8]})
    write_header(folder / "odd.safetensors", pair("layers.0.attention.qkv", 8), **{"modelspec.thumbnail": "data:what"})
    (folder / "torn.safetensors").write_bytes((folder / "flux.safetensors").read_bytes()[:-9])
    (folder / "text.safetensors").write_text("<html>not found</html>")
    served = start_server(
        Settings(tmp_path_factory.mktemp("server"), models=("pocket",), machine=Machine(lora_folder=str(folder)))
    )
    served.loras = folder
    yield served
    served.stop()


@pytest.fixture(scope="module")
def listed(served) -> dict[str, dict[str, Any]]:
    status, _, answer = served.ask("GET", "/v1/loras")
    assert status == 200
    assert str(served.loras) not in json.dumps(answer)
    assert "/home/ann" not in json.dumps(answer)
    return {lora["name"]: lora for lora in answer["data"]}


def test_the_list_says_what_the_headers_say(listed, served):
    assert listed["ink.v1"] == {
        "name": "ink.v1", "title": "Ink wash", "trigger_words": ["inkwash", "sumi-e"], "base": "z-image.safetensors",
        "family": "zimage", "fits": {"pocket": False}, "ranks": [16], "strength": 0.7, "hint": "best near 0.7",
        "bytes": (served.loras / "ink.v1.safetensors").stat().st_size, "preview": "/v1/loras/ink.v1/preview",
        "error": None,
    }  # fmt: skip
    assert listed[BOLD]["fits"] == {"pocket": True}
    assert (listed[BOLD]["ranks"], listed[BOLD]["preview"]) == ([2], None)
    flux = listed["flux"]
    assert (flux["family"], flux["trigger_words"], flux["strength"]) == ("flux1", ["flat", "calm"], None)


def test_what_a_header_does_not_tell_is_left_unknown(listed):
    assert (listed["lokr"]["fits"], listed["lokr"]["family"]) == ({}, "")


def test_a_damaged_file_is_listed_with_its_error(listed):
    errors = {name: lora["error"] for name, lora in listed.items() if lora["error"]}
    assert errors.keys() == {"torn", "text", "whole"}
    assert errors["torn"].startswith("torn.safetensors is cut short")
    assert errors["text"].startswith("text.safetensors is cut short or not a safetensors file")
    assert all(listed[name]["fits"] == {} for name in errors)


def test_a_changed_file_is_read_again(served):
    file = served.loras / "changed.safetensors"
    write_header(file, pair("layers.0.attention.qkv", 192), **{"modelspec.title": "Before"})
    assert read_facts(file) is read_facts(file)
    write_header(file, pair("layers.0.attention.qkv", 192), **{"modelspec.title": "After that"})
    assert read_facts(file).title == "After that"
    file.unlink()


def test_a_preview_is_the_picture_beside_the_file_or_in_its_metadata(served, listed):
    for name, colour in (("flux", (255, 215, 0)), ("ink.v1", (0, 128, 128))):
        status, headers, content = served.ask("GET", listed[name]["preview"])
        assert (status, headers["content-type"]) == (200, "image/webp")
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (256, 128)
            assert all(abs(a - b) < 12 for a, b in zip(image.convert("RGB").getpixel((9, 9)), colour))
        again = served.ask("GET", listed[name]["preview"], headers={"If-None-Match": headers["etag"]})
        assert again[0] == 304
    for name in ("odd", BOLD, "torn", "none", "..%2Fink.v1"):
        status, _, answer = served.ask("GET", f"/v1/loras/{name}/preview")
        assert (status, answer["error"]["code"]) == (404, "not_found")
        assert str(served.loras) not in answer["error"]["message"]


def test_the_headers_are_read_without_torch(served):
    code = f"""
import sys
from pathlib import Path
from inkstream.engine.files.loras import names_in
from inkstream.engine.files.lora_facts import read_facts, find_preview
from inkstream.serve.api.loras import make_preview, tell
for name, file in names_in(Path({str(served.loras)!r})).items():
    tell(name, file, {{}})
make_preview(Path({str(served.loras)!r}) / "flux.safetensors", 0, 0)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# OpenAI -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(served) -> bytes:
    """The pixels of a picture that the native API draws with the LoRA at half its strength."""
    own = served.ended(served.draw(seed=7, steps=2, solver="euler", loras=[{"path": BOLD, "strength": 0.5}]))
    return pixels(served.ask("GET", own["pictures"][0]["url"])[2])


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        return image.tobytes()


@pytest.mark.parametrize(
    "given",
    [
        {"loras": [f"{BOLD}:0.5"]},
        {"loras": [{"path": BOLD, "strength": 0.5}]},
        {"lora": {"name": BOLD, "scale": 0.5}},
    ],
)
def test_a_generation_takes_loras_in_each_form(served, native, given):
    status, _, answer = served.ask("POST", "/v1/images/generations", {**SMALL, **given})
    assert status == 200, answer
    assert pixels(base64.b64decode(answer["data"][0]["b64_json"])) == native
    assert answer["data"][0]["inkstream"]["request"]["loras"] == [f"{BOLD}:0.5"]


@pytest.mark.parametrize(
    ("given", "status", "param", "words"),
    [
        ({"loras": ["bolt"]}, 404, "loras", BOLD),
        ({"lora": {"name": "/etc/passwd"}}, 404, "loras", "no lora"),
        ({"lora": {"name": BOLD, "local_path": "/x"}}, 400, "lora.local_path", "leave it out"),
        ({"lora": {"name": BOLD}, "loras": [BOLD]}, 400, "lora", "both"),
        ({"lora": {"name": BOLD, "scale": 11}}, 400, "lora.scale", "10"),
        ({"loras": [f"{BOLD}:11"]}, 400, "loras.0", "-10 to 10"),
    ],
)
def test_another_lora_is_refused_with_the_name_of_its_field(served, given, status, param, words):
    found, _, answer = served.ask("POST", "/v1/images/generations", {**SMALL, **given})
    assert (found, answer["error"]["param"]) == (status, param)
    assert words in answer["error"]["message"]


def edit(served, **fields: str) -> tuple[int, Any]:
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}' for name, value in fields.items()]
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join(f"--x\r\n{part}\r\n".encode() for part in parts) + head + png("navy") + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _, answer = served.ask("POST", "/v1/images/edits", body, headers)
    return status, answer


def test_an_edits_form_takes_loras_as_json(served):
    fields = {**{name: str(value) for name, value in SMALL.items()}, "strength": "0.6"}
    drawn = [
        edit(served, **fields, **given)
        for given in ({}, {"loras": f'["{BOLD}:0.5"]'}, {"lora": f'{{"name": "{BOLD}", "scale": 0.5}}'})
    ]
    assert [status for status, _ in drawn] == [200] * 3, drawn
    plain, listed, named = (answer["data"][0]["b64_json"] for _, answer in drawn)
    assert listed == named != plain
    status, answer = edit(served, **fields, loras=BOLD)
    assert (status, answer["error"]["param"]) == (400, "loras")
    assert "is not JSON" in answer["error"]["message"]


# ComfyUI ------------------------------------------------------------------------------------------------------------


def graph(loader: dict[str, Any] | None, text: str = "a red circle") -> dict[str, Any]:
    """ComfyUI's standard graph. loader: a node that loads a LoRA, behind the checkpoint."""
    model, clip = ["1", 0], ["1", 1]
    nodes: dict[str, Any] = {"1": ("CheckpointLoaderSimple", {"ckpt_name": "pocket"})}
    if loader is not None:
        inputs = {"model": model, "lora_name": f"{BOLD}.safetensors", "strength_model": 0.5, **loader}
        only = "strength_clip" not in loader
        nodes["9"] = ("LoraLoaderModelOnly", inputs) if only else ("LoraLoader", {**inputs, "clip": clip})
        model, clip = ["9", 0], clip if only else ["9", 1]
    nodes |= {
        "2": ("CLIPTextEncode", {"text": text, "clip": clip}),
        "3": ("EmptyLatentImage", {"width": 32, "height": 32, "batch_size": 1}),
        "4": ("KSampler", {"model": model, "seed": 7, "steps": 2, "cfg": 1, "sampler_name": "euler",
                           "scheduler": "simple", "positive": ["2", 0], "negative": ["2", 0],
                           "latent_image": ["3", 0], "denoise": 1}),
        "5": ("VAEDecode", {"samples": ["4", 0], "vae": ["1", 2]}),
        "6": ("SaveImage", {"images": ["5", 0], "filename_prefix": ""}),
    }  # fmt: skip
    return {id: {"class_type": kind, "inputs": inputs} for id, (kind, inputs) in nodes.items()}


@pytest.mark.parametrize(
    "made",
    [
        graph({}),
        graph({"strength_clip": 0.5}),
        graph({"strength_clip": 1}),
        graph({"lora_name": "bold", "strength_clip": 0}),
        graph(None, "a red circle <lora:bold:0.5>"),
    ],
)
def test_a_graph_takes_a_lora_from_its_nodes_or_its_prompt(served, made):
    status, _, accepted = served.ask("POST", "/comfyui/prompt", {"prompt": made})
    assert status == 200, accepted
    request = served.ask("GET", f"/v1/jobs/{accepted['prompt_id']}")[2]["request"]
    assert (request["loras"], request["prompt"]) == ([f"{BOLD}:0.5"], "a red circle")
    served.ask("DELETE", f"/v1/jobs/{accepted['prompt_id']}")


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ({"strength_clip": 0.7}, "node 9: strength_clip 0.7"),
        ({"lora_name": "bolt.safetensors"}, "the LoRA bolt, which is not one of /v1/loras"),
        ({"strength_model": 11}, "-10 to 10"),
        ({"strength_model": "much"}, "node 9: strength_model much is not a number"),
    ],
)
def test_a_graph_with_another_lora_is_refused(served, loader, words):
    status, _, answer = served.ask("POST", "/comfyui/prompt", {"prompt": graph(loader)})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert words in answer["error"]["message"]


def test_the_nodes_list_the_files(served):
    info = served.ask("GET", "/comfyui/object_info/LoraLoader")[2]["LoraLoader"]
    assert f"{BOLD}.safetensors" in info["input"]["required"]["lora_name"][0]
    assert info["output"] == ["MODEL", "CLIP"]
