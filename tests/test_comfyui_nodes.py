"""The nodes for ComfyUI draw on a running server; of ComfyUI itself they need nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "integrations" / "comfyui"
SMALL = {"model": "", "prompt": "a red circle", "seed": 7, "width": 32, "height": 32, "steps": 2, "guidance": -1}


@pytest.fixture(scope="module")
def pack():
    spec = importlib.util.spec_from_file_location("inkstream_nodes", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["inkstream_nodes"] = module
    spec.loader.exec_module(module)
    yield module
    for name in ("inkstream_nodes", "inkstream_nodes.nodes"):
        del sys.modules[name]


@pytest.fixture
def draw(pack, server):
    node = pack.NODE_CLASS_MAPPINGS["InkstreamDraw"]
    url = f"http://127.0.0.1:{server.port}"
    return lambda **more: getattr(node(), node.FUNCTION)(**{"server": url, "count": 1, **SMALL, **more})


def test_the_node_declares_what_its_function_takes(pack):
    node = pack.NODE_CLASS_MAPPINGS["InkstreamDraw"]
    inputs = node.INPUT_TYPES()
    code = getattr(node, node.FUNCTION).__code__
    assert list(code.co_varnames[1 : code.co_argcount]) == [*inputs["required"], *inputs["optional"]]
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_pictures_come_as_comfyui_has_them_with_the_requests_that_draw_them(draw, server):
    images, requests = draw(count=2)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), torch.float32)
    assert 0 <= images.min() < images.max() <= 1
    assert [request["seed"] for request in json.loads(requests)] == [7, 8]


def test_what_the_mask_leaves_of_an_image_comes_back_as_it_was(draw):
    image = torch.full((1, 32, 48, 3), 0.2)
    mask = torch.zeros(1, 32, 48)
    mask[:, :, 32:] = 1
    images, _ = draw(image=image, mask=mask, strength=1.0, width=-1, height=-1)
    assert images.shape == (1, 32, 48, 3)
    assert torch.equal(images[0, :, :16], image[0, :, :16])
    assert not torch.equal(images[0, :, 40:], image[0, :, 40:])


def test_what_the_server_refuses_is_said_in_its_words(draw):
    with pytest.raises(RuntimeError, match="multiple of 16"):
        draw(width=40)
    with pytest.raises(RuntimeError, match="takes no references"):
        draw(references=torch.zeros(1, 32, 32, 3))
    with pytest.raises(RuntimeError, match="does not answer"):
        draw(server="http://127.0.0.1:1")


def test_stopping_the_run_cancels_the_job(pack, server):
    class Stopped(BaseException):
        pass

    def watch(part: float) -> None:
        if part > 0:
            raise Stopped

    request = {"prompt": "a red circle", "width": 256, "height": 256, "steps": 50}
    with pytest.raises(Stopped):
        sys.modules["inkstream_nodes.nodes"].Server(f"http://127.0.0.1:{server.port}").run(request, watch)
    assert server.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]["state"] == "cancelled"
