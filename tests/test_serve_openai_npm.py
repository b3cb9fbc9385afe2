"""OpenAI's API through its npm package, which INKSTREAM_NPM=1 installs into a temporary folder."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(
    "INKSTREAM_NPM" not in os.environ,
    reason="NPM'S PACKAGE WAS NOT TRIED: give INKSTREAM_NPM=1",
)


def opened(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.fixture(scope="module")
def told(server, tmp_path_factory) -> dict[str, Any]:
    """The answers that the package got."""
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text("{}")
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "openai"], cwd=folder, check=True, timeout=300)
    shutil.copy(Path(__file__).parent / "openai_client.mjs", folder)
    Image.new("RGB", (48, 32), "orange").save(folder / "picture.png")
    mask = Image.new("RGBA", (48, 32), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 48, 32))
    mask.save(folder / "mask.png")
    words = ["node", "openai_client.mjs", f"http://127.0.0.1:{server.port}/v1", "picture.png", "mask.png"]
    done = subprocess.run(words, cwd=folder, check=True, timeout=300, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def test_it_lists_the_models_and_generates(told):
    assert told["models"] == ["pocket"]
    assert [opened(content).size for content in told["generated"]] == [(32, 32)] * 2
    assert told["ignored"] == "style"


def test_one_of_openais_model_names_gets_a_url(told):
    kind, content = told["fetched"]
    assert kind == "image/png"
    assert opened(content).tobytes() == opened(told["generated"][0]).tobytes()


def test_it_edits_and_keeps_the_opaque_part_of_the_mask(told):
    image = opened(told["edited"])
    assert image.crop((0, 0, 16, 32)).getcolors() == [(512, (255, 165, 0))]
    assert image.crop((40, 0, 48, 32)).getcolors() != [(256, (255, 165, 0))]


def test_it_reads_events(told):
    kinds = [kind for kind, _ in told["events"]]
    assert kinds == ["image_generation.partial_image", "image_generation.completed", "image_edit.completed"]
    assert opened(told["events"][1][1]).size == (32, 32)


def test_it_raises_its_own_errors_for_refusals(told):
    assert told["errors"] == [
        ["BadRequestError", 400, "size", None],
        ["BadRequestError", 400, "background", None],
        ["NotFoundError", 404, "model", "model_not_found"],
        ["BadRequestError", 400, "steps", None],
    ]


def test_leaving_stops_the_drawing(told, server, until):
    assert told["left"] == "APIUserAbortError"
    until(lambda: server.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]["state"] == "cancelled")
