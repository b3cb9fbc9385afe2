"""The server's control nets and maps, and A1111's ControlNet in terms of them."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image, ImageDraw

from inkstream.engine.pictures.maps import map_of
from inkstream.families.flux1.control import CONTROLNET, ControlConfig
from inkstream.families.flux2.control import FUN, FunConfig
from inkstream.families.nets import facts_of
from inkstream.families.zimage.control import UNION, UnionConfig
from inkstream.serve.limits import Limits, Settings
from inkstream.types import Machine
from inkstream.weights.keymap import translate
from test_control import write_union
from test_serve_loras import write_header

pytest.importorskip("cv2", reason="MAPS WERE NOT TESTED: pip install 'inkstream[control]'")

HOUSE = Image.new("RGB", (96, 64), "navy")
ImageDraw.Draw(HOUSE).polygon([(20, 60), (20, 30), (48, 8), (76, 30), (76, 60)], fill="gold")


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encoded(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory, start_server, tiny_folder) -> Iterator[Any]:
    """A server with nets for the tiny Z-Image and for published models, and files that are no nets."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "edges").mkdir()
    write_union(folder / "edges" / "union.safetensors")
    write_header(folder / "flux.safetensors", {"controlnet_x_embedder.weight": [3072, 64],
                                               "controlnet_mode_embedder.weight": [10, 8]})  # fmt: skip
    write_header(folder / "odd.safetensors", {"odd.weight": [2]})
    (folder / "torn.safetensors").write_bytes((folder / "odd.safetensors").read_bytes()[:-1])
    models, machine = ("flux1-dev", f"turbo={tiny_folder}"), Machine(control_folder=str(folder))
    limits = Limits(pixels=256 * 256)
    served = start_server(Settings(tmp_path_factory.mktemp("data"), models=models, machine=machine, limits=limits))
    served.nets = folder
    yield served
    served.stop()


def test_nets_are_listed_with_the_models_they_fit_and_damaged_files_with_their_error(served, until):
    until(lambda: served.ask("GET", "/v1/models/turbo/form")[0] == 200)
    listed = {net["name"]: net for net in served.ask("GET", "/v1/controls")[2]["data"]}
    assert list(listed) == ["edges/union", "flux", "odd", "torn"]
    assert listed["edges/union"]["family"] == "zimage"
    assert listed["edges/union"]["fits"] == {"flux1-dev": False, "turbo": True}
    assert listed["flux"]["fits"] == {"flux1-dev": True, "turbo": False}
    assert listed["flux"]["modes"] == ["canny", "tile", "depth", "blur", "pose", "gray", "low-quality"]
    assert listed["odd"]["error"] == "odd.safetensors is not a control net that is known here: see docs/control.md"
    assert listed["torn"]["error"].startswith("torn.safetensors is cut short")
    assert str(served.nets) not in json.dumps(listed)


@pytest.mark.parametrize(
    ("part", "layout", "config", "family"),
    [
        (UNION, "published", UnionConfig(n_layers=1), "zimage"),
        (CONTROLNET, "diffusers", ControlConfig(num_layers=1, num_single_layers=0), "flux1"),
        (CONTROLNET, "native", ControlConfig(num_layers=1, num_single_layers=0, conditioning_embedding_channels=16),
         "flux1"),
        (FUN, "published", FunConfig(num_layers=1), "flux2"),
    ],
)  # fmt: skip
def test_published_nets_are_told_by_their_header(part, layout, config, family):
    import torch

    with torch.device("meta"):
        state = part.build(config).state_dict()
    theirs = translate(part.layouts[layout], state, back=True)
    facts = facts_of({key: tuple(weight.shape) for key, weight in theirs.items()})
    assert facts is not None
    width = getattr(config, "dim", None) or config.attention_head_dim * config.num_attention_heads
    assert (facts.family, facts.width, facts.modes) == (family, width, ())


def test_the_map_of_a_picture_is_an_upload_that_a_request_can_follow(served):
    kinds = {kind["name"]: kind for kind in served.ask("GET", "/v1/maps")[2]["data"]}
    assert kinds["canny"]["settings"][0] == {
        "name": "low", "help": "An edge goes on while its gradient is above this.", "default": 0.1, "minimum": 0.0,
        "maximum": 4.0,
    }  # fmt: skip
    assert [setting["name"] for setting in kinds["depth"]["settings"]] == ["invert"]  # and no name of a model
    own = served.ask("POST", "/v1/uploads", png(HOUSE))[2]["id"]
    body = {"map": "canny", "picture": f"upload:{own}", "width": 64, "height": 64, "settings": {"low": 0.2}}
    status, _, told = served.ask("POST", "/v1/maps", body)
    assert (status, told["width"], told["height"]) == (201, 64, 64)
    drawn = Image.open(io.BytesIO(served.ask("GET", f"/v1/uploads/{told['id']}")[2]))
    assert drawn.tobytes() == map_of("canny", HOUSE, (64, 64), low=0.2).tobytes()
    asked = {"model": "turbo", "control": [f"upload:{told['id']}"], "control_nets": ["edges/union:0.6"]}
    assert served.ended(served.draw(**asked))["state"] == "succeeded"
    people = {"people": [{"pose_keypoints_2d": [32, 10, 1, 32, 20, 1] + [0] * 48}], "canvas_width": 64,
              "canvas_height": 64}  # fmt: skip
    status, _, told = served.ask("POST", "/v1/maps", {"map": "openpose", "keypoints": people})
    assert (status, told["width"]) == (201, 64)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"map": "cany"}, "map", "did you mean canny?"),
        ({"map": "canny"}, "picture", "is drawn from picture"),
        ({"map": "pose", "picture": "data:,x"}, "keypoints", "is drawn from keypoints"),
        ({"map": "canny", "picture": "/etc/passwd"}, "picture", "picture is neither a data URL nor upload:ID"),
        ({"map": "canny", "picture": "upload:u0"}, "picture", "picture names an unknown upload"),
        ({"map": "canny", "picture": "data:,x", "settings": {"low": 9}}, "settings", "no number from 0 to 4"),
        ({"map": "depth", "picture": "data:,x", "settings": {"model": "/etc"}}, "settings.model", "number"),
        ({"map": "canny", "picture": "data:,x", "width": 64}, "width", "given together"),
        ({"map": "canny", "picture": "data:,x", "width": 512, "height": 512}, "width", "more than this server draws"),
    ],
)
def test_a_map_that_cannot_be_drawn_is_refused_in_one_line(served, body, param, words):
    status, _, answer = served.ask("POST", "/v1/maps", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


def test_the_routes_import_no_torch():
    code = "import sys, inkstream.serve.app; print('torch' in sys.modules, 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


# A1111's ControlNet -------------------------------------------------------------------------------------------------

SMALL = {"prompt": "a house", "width": 64, "height": 64, "steps": 2, "seed": 7, "sampler_name": "Euler",
         "override_settings": {"sd_model_checkpoint": "turbo"}}  # fmt: skip


def with_units(*units: dict[str, Any]) -> dict[str, Any]:
    return {**SMALL, "alwayson_scripts": {"ControlNet": {"args": [*units]}}}


def test_units_of_controlnet_are_our_control_pictures_and_nets(served):
    unit = {"enabled": True, "input_image": encoded(HOUSE), "module": "canny", "model": "union [0123abcd]",
            "weight": 0.5, "guidance_start": 0.0, "guidance_end": 0.5, "threshold_a": 51, "threshold_b": 76.5,
            "control_mode": "Balanced", "resize_mode": "Crop and Resize", "pixel_perfect": True,
            "processor_res": 512, "low_vram": False, "hr_option": "Both", "save_detected_map": True}  # fmt: skip
    off = {**unit, "enabled": False, "model": "None"}
    status, _, answer = served.ask("POST", "/sdapi/v1/txt2img", with_units(unit, off))
    assert status == 200, answer
    request = served.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]["request"]
    assert request["control_nets"] == ["edges/union:0.5@0-0.5"]
    [name] = request["control"]
    sent = Image.open(io.BytesIO(served.ask("GET", f"/v1/uploads/{name.removeprefix('upload:')}")[2]))
    assert sent.tobytes() == map_of("canny", HOUSE, (64, 64), low=0.2, high=0.3).tobytes()
    native = {**{name: SMALL[name] for name in ("prompt", "width", "height", "steps", "seed")}, "solver": "euler",
              "model": "turbo", "control": [f"data:image/png;base64,{encoded(sent)}"],
              "control_nets": ["edges/union:0.5@0-0.5"]}  # fmt: skip
    job = served.ended(served.draw(**native))
    ours = Image.open(io.BytesIO(served.ask("GET", job["pictures"][0]["url"])[2]))
    theirs = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_ready_map_is_stretched_cropped_or_padded(served, mode):
    unit = {"image": {"image": encoded(HOUSE)}, "model": "union", "resize_mode": mode}
    assert served.ask("POST", "/sdapi/v1/txt2img", with_units(unit))[0] == 200
    [name] = served.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]["request"]["control"]
    sent = Image.open(io.BytesIO(served.ask("GET", f"/v1/uploads/{name.removeprefix('upload:')}")[2]))
    assert sent.size == (64, 64)
    gold = [x for x in range(64) if sent.getpixel((x, 40))[0] > 128]
    assert len(gold) == pytest.approx({0: 37, 1: 56, 2: 37}[mode], abs=2)  # of 56 of 96 pixels
    tall = [y for y in range(64) if sent.getpixel((32, y))[0] > 128]
    assert len(tall) == pytest.approx({0: 52, 1: 52, 2: 35}[mode], abs=2)


def test_img2img_follows_its_start_picture_if_a_unit_has_none(served):
    body = with_units({"module": "blur_gaussian", "model": "edges/union"}) | {"init_images": [encoded(HOUSE)]}
    assert served.ask("POST", "/sdapi/v1/img2img", body)[0] == 200
    [name] = served.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]["request"]["control"]
    sent = Image.open(io.BytesIO(served.ask("GET", f"/v1/uploads/{name.removeprefix('upload:')}")[2]))
    assert sent.tobytes() == map_of("blur", HOUSE, (64, 64)).tobytes()


@pytest.mark.parametrize(
    ("unit", "field", "words"),
    [
        ({"model": "None"}, "model", "model None of ControlNet is not one of /controlnet/model_list"),
        ({"module": "depth_midas"}, "module", "send a ready map with none"),
        ({"control_mode": "ControlNet is more important"}, "control_mode", "give Balanced"),
        ({"resize_mode": "Squeeze"}, "resize_mode", "give Crop and Resize"),
        ({"union_control_type": "Segmentation"}, "union_control_type", "take one of openpose, depth"),
        ({"mask": "AAAA"}, "mask", "mask of ControlNet is not supported"),
        ({"guidance_start": 0.8, "guidance_end": 0.2}, "guidance_start", "take 0 <= FROM < UNTIL <= 1"),
        ({"weight": 11}, "weight", "less than or equal to 10"),
        ({"image": "AAAA"}, "image", "is not a picture"),
        ({"image": None}, "image", "unit 0 of ControlNet has no picture: give image"),
    ],
)
def test_a_unit_without_an_equivalent_is_refused_by_its_field(served, unit, field, words):
    body = with_units({"image": encoded(HOUSE), "model": "union", **unit})
    status, _, answer = served.ask("POST", "/sdapi/v1/txt2img", body)
    assert (status, answer["error"]["param"]) == (400, f"alwayson_scripts.controlnet.args.0.{field}")
    assert words in answer["error"]["message"]


def test_the_lists_and_maps_of_controlnet_are_ours(served):
    assert served.ask("GET", "/controlnet/version")[2] == {"version": 2}
    assert "edges/union" in served.ask("GET", "/controlnet/model_list")[2]["model_list"]
    assert {"none", "canny", "mlsd"} <= {*served.ask("GET", "/controlnet/module_list")[2]["module_list"]}
    assert "All" in served.ask("GET", "/controlnet/control_types")[2]["control_types"]
    body = {"controlnet_module": "canny", "controlnet_input_images": [encoded(HOUSE)], "controlnet_threshold_a": 51,
            "controlnet_threshold_b": 76.5}  # fmt: skip
    [answer] = served.ask("POST", "/controlnet/detect", body)[2]["images"]
    drawn = Image.open(io.BytesIO(base64.b64decode(answer)))
    assert drawn.tobytes() == map_of("canny", HOUSE, low=0.2, high=0.3).tobytes()


def test_the_package_webuiapi_sends_units(served):
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(port=served.port)
    unit = webuiapi.ControlNetUnit(image=HOUSE, module="canny", model="union")
    fields = {name: SMALL[name] for name in ("prompt", "width", "height", "steps", "seed", "sampler_name")}
    scripts: dict[str, Any] = {}  # the package's own default is one dict for all calls, into which it writes the units
    sent = {"controlnet_units": [unit], "override_settings": SMALL["override_settings"], "alwayson_scripts": scripts}
    drawn = api.txt2img(**fields, **sent)
    assert drawn.image.size == (64, 64)
    assert "edges/union" in api.controlnet_model_list()
    api.session.close()
