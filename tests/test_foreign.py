"""Pictures of other programs are read: every setting is taken over, or told as not taken over."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreign_pictures import FLUX_PAGE, FOREIGN, FOX, NESTED, SUBGRAPH, Foreign, forge, page, png, saved, sdcpp
from inkstream.cli import main
from inkstream.cli.generate import Wish, understand
from inkstream.engine.pictures.foreign.a1111 import write_a1111
from inkstream.engine.pictures.foreign.workflow import to_prompt
from inkstream.engine.pictures.metadata import read_request
from inkstream.families import SPECS
from inkstream.families.names import named
from inkstream.types import InputError, Request


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_the_corpus_has_sixty_pictures_of_distinct_names():
    assert len({foreign.name for foreign in FOREIGN}) == len(FOREIGN) >= 60


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.name)
def test_every_setting_is_taken_over_or_told(foreign: Foreign):
    found = read_request(url(foreign.data))
    fields = found.request.model_dump(include=found.request.model_fields_set)
    assert {name: value for name, value in fields.items() if value != ""} == foreign.fields
    assert set(found.ignored) == set(foreign.ignored)
    assert {name: found.ignored[name] for name in foreign.values} == foreign.values


# Names of models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("flux2_dev_fp8mixed.safetensors", "flux2-dev"),
        ("flux1-dev-kontext_fp8_scaled.safetensors", "flux1-kontext-dev"),
        ("FLUX1/flux1-kontext-dev_fp8_scaled_KJ", "flux1-kontext-dev"),
        ("z-image-turbo_fp8_scaled_e4m3fn_KJ.safetensors", "z-image-turbo"),
        ("flux2-dev-UD-Q4_K_XL.gguf", "flux2-dev"),
        ("svdq-int4_r32-flux.1-dev.safetensors", "flux1-dev"),
        ("svdq-fp4_r128-z-image-turbo.safetensors", "z-image-turbo"),
        ("nunchaku-tech/nunchaku-flux.1-fill-dev", "flux1-fill-dev"),
        ("FLUX.1 dev (quantized)", "flux1-dev"),
        ("Z-Image Turbo (SDNQ uint4 + SVD)", "z-image-turbo"),
        ("FLUX.2 [dev] Transformer (GGUF Q4_K_M)", "flux2-dev"),
        ("FLUX.2 Klein 9B (SDNQ dynamic 4-bit + SVD)", "flux2-klein-9b"),
        ("FLUX.2 Klein 4B (Diffusers)", "flux2-klein-4b"),
        ("FLUX Schnell (Quantized)", "flux1-schnell"),
        ("flux-2-klein-base-9b-fp8", "flux2-klein-base-9b"),
        ("FLUX.2-klein-9b-kv-fp8", "flux2-klein-9b-kv"),
        ("z_image_turbo_1.0_q8p.ckpt", "z-image-turbo"),
        ("flux_2_klein_base_4b_i8x.ckpt", "flux2-klein-base-4b"),
        ("filipstrand/FLUX.1-Krea-dev-mflux-4bit", "flux1-krea-dev"),
        ("flux1-dev-bnb-nf4-v2.safetensors", "flux1-dev"),
        ("Diffusers/Z-Image-Turbo [f332072aa7]", "z-image-turbo"),
        ("zImageTurbo_turbo", "z-image-turbo"),
        ("flux1DevFp8_v10", "flux1-dev"),
        ("flux1-dev-IQ4_XS.gguf", "flux1-dev"),
        ("flux2-dev-nvfp4-mixed.safetensors", "flux2-dev"),
        ("FLUX.1-dev-DF11", "flux1-dev"),
        ("Z-Image-Base-Q4_K_M.gguf", "z-image"),
        ("C:\\models\\unet\\flux1-canny-dev-Q8_0.gguf", "flux1-canny-dev"),
        ("flux1-dev-fp8_e4m3fn_fast-v2.1.safetensors", "flux1-dev"),
        ("Disty0/FLUX.2-klein-4B-SDNQ-4bit-dynamic-svd-r32", "flux2-klein-4b"),
        ("Z-Image-Turbo-v2", None),
        ("FLUX.1-lite-8B", None),
        ("flux.1-dev-de-distill", None),
        ("z-image-de-turbo", None),
        ("flux1-dev-fp8-hyper", None),
        ("flux-3-image-klein", "flux3-klein"),
        ("Z-Image-Edit", None),
        ("z_image_turbo_2602_controlnet_union", None),
        ("pixelwave_flux1_dev_v4", None),
        ("fp8", None),
        ("model.safetensors", None),
        ("", None),
    ],
)
def test_a_published_name_is_known_in_every_packing_and_a_finetune_is_not(name, known):
    spec = named(name)
    assert (spec and spec.name) == known


def test_every_known_model_is_known_by_its_own_names():
    for spec in SPECS.values():
        assert named(spec.name) is spec
        for repo in {spec.repo} - {None, SPECS["flux1-dev"].repo, SPECS["flux1-schnell"].repo}:
            assert named(repo) is spec


# What the user sees ---------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = Path("x.png")
        path.write_bytes(png(parameters=text))
        return path

    return write


@pytest.mark.parametrize(
    ("unet", "told"),
    [("pixelwave.gguf", "x.png names the model pixelwave.gguf, which is not known here"), ("", "x.png names no model")],
)
def test_a_picture_of_no_known_model_asks_for_one_in_one_line(write, capsys, unet, told):
    write(sdcpp(FOX, unet, "euler simple"))
    assert main(["generate", "--from", "x.png", "-o", "y.png"]) != 0
    message = capsys.readouterr().err
    assert f"{told}: choose the model to draw with, for example -m z-image-turbo" in message
    assert message.strip().count("\n") == 0
    assert not Path("y.png").exists()


@pytest.mark.parametrize(
    ("model", "guidance", "told"),
    [("flux1-dev", 4.5, ""), ("city96/FLUX.1-dev-gguf", 4.5, ""), ("z-image", 1, "; Guidance 4.500000")],
)
def test_the_model_that_draws_decides_what_its_guidance_is(write, model, guidance, told):
    path = write(sdcpp(FOX, "", "euler simple", guidance=4.5))
    said: list[str] = []
    request = understand(Wish(model=model), path, said.append)
    assert (request.model, request.guidance, request.prompt) == (model, guidance, FOX)
    assert said == [f"x.png: not taken over: Eta 0.000000; RNG cuda{told}"]


def test_the_files_of_a_model_of_any_name_decide_what_its_guidance_is(write, make_folder):
    path = write(forge(FOX, "pixelwave_flux1_dev", 3.5))
    for name, guidance in (("flux1-dev", 3.5), ("flux2-klein-base-4b", 1)):
        folder = make_folder(Path(f"mine-{guidance}"), SPECS[name].tiny)
        request = understand(Wish(model=str(folder)), path, lambda line: None)
        assert (request.model, request.guidance) == (str(folder), guidance)


def test_a_request_without_a_model_is_not_said_to_be_pockets(write):
    found = read_request(write(forge(FOX, "pixelwave", 3.5)))
    assert "model" not in found.request.model_fields_set
    assert "pocket" not in write_a1111(found.request, "x", "")


def test_our_own_text_names_the_guidance_that_a_model_reads_as_forge_does(write):
    request = Request(prompt=FOX, model="flux1-dev", steps=20, seed=1, guidance=3.5)
    text = write_a1111(request, "inkstream")
    assert "CFG scale: 1, Distilled CFG Scale: 3.5" in text
    assert read_request(write(text)).request == request


# Hostile graphs -------------------------------------------------------------------------------------------------------


def test_hostile_graphs_of_the_page_end_quickly():
    ring = {id: ("Reroute", [], {"": (id % 50 + 1, 0, "*")}) for id in range(1, 51)}
    inside_itself = page({1: ("nest-sub", [], {})}, inside="nest-sub", promoted=[], result=(1, 0))
    doubling = [
        page({id: (f"sub-{level + 1}", [], {}) for id in (1, 2)}, inside=f"sub-{level}", promoted=[], result=(1, 0))
        for level in range(40)
    ]
    chain = {id: ("Reroute", [], {"": (id + 1, 0, "*")}) for id in range(1, 4000)}
    used = {57: ("nest-sub", [], {}), 58: ("sub-0", [], {}), 9: ("SaveImage", [], {"images": (57, 0, "IMAGE")})}
    for whole in (page(ring | FLUX_PAGE), page(chain), page(used, [inside_itself, *doubling])):
        began = time.process_time()
        to_prompt(whole)
        assert time.process_time() - began < 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-30, 99) | st.text(max_size=4) | st.sampled_from(["f2fd-sub", "KSampler"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_graph_of_the_page_never_raises_anything_but_an_input_error(data):
    whole = json.loads(json.dumps(page({**FLUX_PAGE, 57: ("f2fd-sub", [], {})}, [SUBGRAPH, NESTED])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = whole
        while True:
            key = data.draw(st.sampled_from(sorted(at, key=str))) if isinstance(at, dict) else None
            key = data.draw(st.integers(0, len(at) - 1)) if isinstance(at, list) else key
            if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
                at = at[key]
            else:
                at[key] = data.draw(JSON)
                break
    try:
        found = read_request(url(saved(None, workflow=whole)))
    except InputError:
        return
    json.dumps(found.ignored, allow_nan=False)
