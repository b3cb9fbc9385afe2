"""Metadata: pictures carry the Request that draws them, and the metadata of other programs is read."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from inkstream import __version__
from inkstream.engine.pictures.foreign.a1111 import read_a1111, write_a1111
from inkstream.engine.pictures.foreign.comfyui import read_comfyui
from inkstream.engine.pictures.foreign.reading import Reading, find_model
from inkstream.engine.pictures.metadata import (
    MADE_BY_A_MODEL,
    describe,
    encode_picture,
    free_name,
    picture_format,
    read_request,
    save_picture,
)
from inkstream.families import SPECS
from inkstream.types import InputError, Request, Saving, ScheduleName, SolverName

PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
FULL = Request(
    prompt="a red fox, portrait", negative_prompt="blurry", model="z-image", width=1024, height=768, steps=28,
    guidance=4.5, seed=42, solver="dpmpp_2m", schedule="beta", shift=6.0, cfg_normalization=1.0, cfg_truncation=0.8,
    guidance_from=0.9, guidance_until=0.1,
)  # fmt: skip


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """A PNG's chunks, read without Pillow."""
    at, found = 8, []
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + size
    return found


def url(data: bytes) -> str:
    return Request(image=data).image  # type: ignore[arg-type,return-value]


def drawn(request: Request, kind: str = "PNG", **options) -> str:
    return url(encode_picture(PICTURE, kind, request, SPECS["z-image"], **options))


def png_with(**texts: str) -> str:
    """A PNG as another program writes it, with these text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG", pnginfo=info)
    return url(buffer.getvalue())


def with_comment(comment: bytes, kind: str = "JPEG") -> str:
    """A picture with an EXIF UserComment."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, exif=exif.tobytes())
    return url(buffer.getvalue())


def fields(found) -> dict:
    return found.request.model_dump(include=found.request.model_fields_set)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Ours ----------------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=60) | st.sampled_from(
    [
        "橘猫坐在窗边",
        "🦊 “quoted” \\ ]]> <b>&amp;</b>",
        "\0\r\n\ufffe",
        "a\nSteps: 3, Sampler: x, Seed: 4\nNegative prompt: no",
        "Negative prompt:\nSteps: 1, a: b, c: d",
    ]
)
NUMBER = st.floats(0, 1, allow_subnormal=False)
REQUESTS = st.builds(
    Request,
    prompt=TEXT,
    negative_prompt=TEXT,
    model=st.text(max_size=20),
    width=st.none() | st.integers(1, 500).map(lambda n: n * 16),
    height=st.none() | st.integers(1, 500).map(lambda n: n * 16),
    steps=st.none() | st.integers(1, 1000),
    guidance=st.none() | st.floats(0, 100),
    seed=st.none() | st.integers(0, 2**63 - 1),
    solver=st.none() | st.sampled_from(get_args(SolverName)),
    schedule=st.none() | st.sampled_from(get_args(ScheduleName)),
    shift=st.none() | st.floats(0.01, 100),
    strength=st.none() | NUMBER,
    cfg_truncation=NUMBER,
    variation=st.none() | st.builds("{}:{}".format, st.integers(0, 2**63 - 1), NUMBER),
    seed_variance=NUMBER,
    image=st.none() | st.just("start.png"),
)


@settings(deadline=None, max_examples=60)
@given(REQUESTS, st.sampled_from(["PNG", "WEBP", "JPEG"]))
def test_any_request_comes_back_from_the_picture_as_it_was(request_, kind):
    found = read_request(drawn(request_, kind))
    assert found.source == "inkstream"
    assert found.request == request_
    assert found.ignored == {}


@pytest.mark.parametrize(("prompt", "kind"), [("café, naïve £5", b"tEXt"), ("一只橘猫", b"iTXt"), ("“curly”", b"iTXt")])
def test_the_a1111_text_is_a_text_chunk_if_latin_1_holds_it_else_itxt(prompt, kind):
    data = encode_picture(PICTURE, "PNG", Request(prompt=prompt, seed=1, steps=8), SPECS["z-image"])
    kinds = {body.split(b"\0")[0]: (name, body) for name, body in chunks_of(data) if name in (b"tEXt", b"iTXt")}
    name, body = kinds[b"parameters"]
    assert name == kind
    text = body.split(b"\0", 1)[1].decode("latin-1") if kind == b"tEXt" else body.split(b"\0", 5)[5].decode()
    assert text.startswith(prompt + "\nSteps: 8, ")
    assert kinds[b"inkstream"][0] == b"tEXt"
    record = json.loads(kinds[b"inkstream"][1].split(b"\0", 1)[1])
    assert record["version"] == 1
    assert record["request"]["prompt"] == prompt
    assert record["software"] == f"inkstream {__version__}"
    assert (record["model"], record["licence"], record["commercial"]) == (SPECS["z-image"].title, "apache-2.0", True)
    assert kinds[b"XML:com.adobe.xmp"][0] == b"iTXt"
    assert MADE_BY_A_MODEL.encode() in kinds[b"XML:com.adobe.xmp"][1]


def test_png_and_lossless_webp_keep_every_pixel():
    noise = Image.effect_noise((32, 32), 90).convert("RGB")
    for kind in ("PNG", "WEBP"):
        data = encode_picture(noise, kind, FULL, lossless=True)
        assert Image.open(io.BytesIO(data)).tobytes() == noise.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_minimal_metadata_is_the_mark_alone(kind):
    secret = FULL.model_copy(update={"prompt": "ZEBRA"})
    for amount, mark in (("minimal", MADE_BY_A_MODEL), ("none", None)):
        source = drawn(secret, kind, saving=Saving(amount))
        facts = describe(source)
        assert facts.get("digital_source_type") == mark
        assert "request" not in facts
        data = encode_picture(PICTURE, kind, secret, saving=Saving(amount))
        assert b"ZEBRA" not in data
        assert b"inkstream 0" not in data
        assert b"Z\0E\0" not in data
        assert "carries no request: give a prompt" in refusal(read_request, source)


def test_metadata_of_the_input_image_is_not_written():
    picture = PICTURE.copy()
    picture.info = {"icc_profile": b"x" * 200, "exif": b"Exif\0\0secret", "comment": b"secret", "xmp": b"secret"}
    for kind in ("PNG", "WEBP", "JPEG"):
        data = encode_picture(picture, kind, FULL, saving=Saving("none"))
        assert b"secret" not in data
        assert b"xxxx" not in data


def test_a_start_picture_given_as_data_is_listed_as_left_out():
    request = FULL.model_copy(update={"image": url(encode_picture(PICTURE, "PNG", FULL)), "mask": "mask.png"})
    source = drawn(request)
    assert len(source) < 10_000
    found = read_request(source)
    assert found.request.image is None
    assert found.request.mask == "mask.png"
    assert "sha256" in found.ignored["image"]


def test_extra_facts_are_kept_beside_the_request():
    data = encode_picture(PICTURE, "PNG", FULL, extra={"seconds": 2.5})
    assert json.loads(read_request(url(data)).raw)["extra"] == {"seconds": 2.5}


def test_adapters_that_were_merged_into_the_model_are_told_as_not_taken_over(tmp_path):
    path = tmp_path / "ink.png"
    save_picture(PICTURE, path, Request(prompt="a fox"), extra={"merged_loras": "ink:0.8"})
    assert read_request(path).ignored == {"--merge-lora": "ink:0.8"}
    assert describe(path)["merged_loras"] == "ink:0.8"


def test_known_fields_of_a_newer_version_are_read():
    unknown = {"wings": 2, "steps": "many", "solver": "warp", "count": True}
    record = {"version": 9, "request": {"prompt": "cat", "seed": 7, **unknown}}
    found = read_request(png_with(inkstream=json.dumps(record)))
    assert fields(found) == {"prompt": "cat", "seed": 7}
    assert found.ignored == unknown


def test_describe_tells_what_a_picture_is_and_carries(tmp_path):
    path = tmp_path / "fox.webp"
    save_picture(PICTURE, path, FULL, SPECS["z-image"], lossless=True)
    facts = describe(path)
    assert json.loads(json.dumps(facts)) == facts
    assert facts == {
        "picture": str(path), "format": "WEBP", "width": 16, "height": 16, "mode": "RGB",
        "bytes": path.stat().st_size, "digital_source_type": MADE_BY_A_MODEL, "source": "inkstream",
        "request": FULL.model_dump(mode="json", exclude_none=True), "model": SPECS["z-image"].title,
        "licence": "apache-2.0", "commercial": True, "software": f"inkstream {__version__}",
    }  # fmt: skip


def test_describe_reads_a_photo_without_metadata(tmp_path):
    PICTURE.save(tmp_path / "photo.jpg")
    facts = describe(tmp_path / "photo.jpg")
    assert set(facts) == {"picture", "format", "width", "height", "mode", "bytes"}


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.PNG", "PNG"), ("a.webp", "WEBP"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG")]
)
def test_a_files_ending_chooses_its_format(tmp_path, name, kind):
    save_picture(PICTURE, tmp_path / name, FULL)
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
    assert read_request(tmp_path / name).request == FULL
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.tiff", "a", "png", "dir.png/a.gif"])
def test_an_unknown_file_ending_is_refused(name):
    assert "take .png, .webp or .jpg" in refusal(picture_format, Path(name))
    assert [picture_format(name) for name in ("jpg", "a.png", Path("b.WebP"))] == ["JPEG", "PNG", "WEBP"]


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    assert "already exists and is not overwritten: give another name" in refusal(save_picture, PICTURE, path, FULL)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["a.png"]


def test_without_hard_links_a_file_is_still_written_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    save_picture(PICTURE, tmp_path / "a.png", FULL)
    assert "already exists" in refusal(save_picture, PICTURE, tmp_path / "a.png", FULL)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_missing_folder_is_created_and_an_impossible_path_is_refused(tmp_path):
    save_picture(PICTURE, tmp_path / "new" / "deep" / "a.png", FULL)
    assert (tmp_path / "new" / "deep" / "a.png").exists()
    (tmp_path / "file").write_text("")
    message = refusal(save_picture, PICTURE, tmp_path / "file" / "a.png", FULL)
    assert "give another" in message


def test_a_written_file_has_the_users_own_permissions(tmp_path):
    save_picture(PICTURE, tmp_path / "a.png", FULL)
    (tmp_path / "b.txt").write_text("")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_a_picture_can_be_written_to_a_stream():
    class Pipe(io.RawIOBase):
        """Like stdout: can be written, not searched."""

        data = b""

        def writable(self):
            return True

        def seekable(self):
            return False

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    save_picture(PICTURE, pipe, FULL)  # type: ignore[arg-type]
    assert pipe.data.startswith(b"\x89PNG")
    assert read_request(url(pipe.data)).request == FULL
    pipe = Pipe()
    save_picture(PICTURE, pipe, FULL, format="webp")  # type: ignore[arg-type]
    assert pipe.data[8:12] == b"WEBP"


def test_free_names_count_up(tmp_path):
    for name in ("fox.png", "fox-2.png", "fox-3.png"):
        path = free_name(tmp_path, "fox", ".png")
        assert path.name == name
        save_picture(PICTURE, path, FULL)


def test_a_request_too_long_for_a_jpeg_is_refused_with_a_remedy():
    request = Request(prompt="长" * 20_000)
    assert "save it as .png or .webp" in refusal(encode_picture, PICTURE, "JPEG", request)
    assert read_request(drawn(request, "WEBP")).request == request
    assert "quality 0 is not between 1 and 100" in refusal(encode_picture, PICTURE, "JPEG", request, quality=0)


# A1111 ---------------------------------------------------------------------------------------------------------------

FORGE = """masterpiece, a castle on a hill,
golden hour <lora:castle_v2:0.8> <lora:filmGrain:0.35>
Negative prompt: blurry,
low quality: bad
Steps: 20, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 4.5, Seed: 12345, Size: 896x1152, Model hash: \
abc123, Model: z_image_bf16, Denoising strength: 0.4, Clip skip: 2, Lora hashes: "castle_v2: dead, grain: beef", \
Wildcard prompt: "a {castle|tower}, \\"big\\"", Version: f2.0.1"""


def check_forge(found):
    assert found.source == "a1111"
    assert fields(found) == {
        "prompt": "masterpiece, a castle on a hill,\ngolden hour", "negative_prompt": "blurry,\nlow quality: bad",
        "steps": 20, "solver": "dpmpp_2m", "schedule": "sgm_uniform", "guidance": 4.5, "seed": 12345, "width": 896,
        "height": 1152, "model": "z-image", "strength": 0.4,
    }  # fmt: skip
    assert found.ignored == {
        "loras": ["castle_v2:0.8", "filmGrain:0.35"], "Clip skip": "2", "Wildcard prompt": 'a {castle|tower}, "big"',
    }  # fmt: skip


def test_a_forge_picture_is_read():
    check_forge(read_request(png_with(parameters=FORGE)))


@pytest.mark.parametrize("order", ["be", "le"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_the_same_text_is_read_from_exif_in_either_byte_order(order, kind):
    check_forge(read_request(with_comment(b"UNICODE\0" + FORGE.encode(f"utf-16-{order}"), kind)))


def test_a_chinese_prompt_is_read_from_exif_with_and_without_a_byte_order_mark():
    text = "一只橘猫坐在窗边\nSteps: 8, Sampler: Euler, CFG scale: 1"
    for body in (text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-16-be")):
        assert read_request(with_comment(b"UNICODE\0" + body)).request.prompt == "一只橘猫坐在窗边"


def test_utf_8_in_a_latin_1_chunk_is_decoded():
    text = "橘猫\nSteps: 8, Sampler: Euler, CFG scale: 1".encode().decode("latin-1")
    assert read_request(png_with(parameters=text)).request.prompt == "橘猫"
    text = "café\nSteps: 8, Sampler: Euler, CFG scale: 1"
    assert read_request(png_with(parameters=text)).request.prompt == "café"


def test_settings_without_an_equal_are_listed_as_ignored():
    text = "cat\nSteps: 8, Sampler: DPM++ 2M Karras, Schedule type: Automatic, Seed: -1, Model: dreams_8, Size: 9x9"
    found = read_request(png_with(parameters=text))
    assert fields(found) == {"prompt": "cat", "negative_prompt": "", "steps": 8, "solver": "dpmpp_2m"}
    assert found.ignored == {"schedule": "Karras", "model": "dreams_8", "seed": "-1", "width": "9", "height": "9"}


def test_the_strength_of_a_second_pass_is_ignored():
    text = "cat\nSteps: 8, Sampler: Euler, Seed: 1, Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: ESRGAN"
    found = read_request(png_with(parameters=text))
    assert found.request.strength is None
    assert found.ignored == {"Denoising strength": "0.5", "Hires upscale": "2", "Hires upscaler": "ESRGAN"}


def test_json_lists_among_the_pairs_are_parsed_whole():
    text = 'cat\nSteps: 8, Resources: [{"type":"lora","Seed":3},{"a, Seed: 4":1}], Sampler: Euler, Seed: 7'
    assert dict(read_a1111(text).fields)["seed"] == "7"  # type: ignore[union-attr]


def test_a_lone_prompt_is_read_from_a_png_but_not_from_a_cameras_comment():
    assert fields(read_request(png_with(parameters="just {a|b} cat"))) == {"prompt": "just {a|b} cat"}
    assert "carries no request" in refusal(read_request, with_comment(b"ASCII\0\0\0Holiday, Paris: 2019"))


def test_an_empty_negative_prompt_has_no_line_and_odd_values_are_quoted():
    request = FULL.model_copy(update={"negative_prompt": "", "model": 'models/a, "b": c.safetensors'})
    lines = write_a1111(request, "inkstream 9").split("\n")
    assert lines == [
        "a red fox, portrait",
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Beta, CFG scale: 4.5, Shift: 6, Seed: 42, Size: 1024x768, "
        'Model: "a, \\"b\\": c.safetensors", Version: inkstream 9',
    ]


@pytest.mark.parametrize("solver", get_args(SolverName))
@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_every_solver_and_schedule_survives_the_a1111_text(solver, schedule):
    request = FULL.model_copy(update={"solver": solver, "schedule": schedule, "strength": 0.25})
    found = read_request(png_with(parameters=write_a1111(request, "inkstream 1")))
    said = {"prompt", "negative_prompt", "model", "width", "height", "steps", "guidance", "seed", "solver", "schedule"}
    assert fields(found) == request.model_dump(include=said | {"shift", "strength"})
    assert found.ignored == {}


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_is_parsed_or_ignored(text, tail):
    reading = read_a1111(text)
    assert reading is None or isinstance(reading, Reading)
    reading = read_a1111(f"{text}\nSteps: {tail}, a: {text}, Seed: 3, B: {tail}")
    assert reading is None or isinstance(reading, Reading)


# The models' names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("z_image_turbo_bf16.safetensors", "z-image-turbo"),
        ("split_files\\diffusion_models\\z_image_turbo_bf16.safetensors", "z-image-turbo"),
        ("Tongyi-MAI/Z-Image-Turbo", "z-image-turbo"),
        ("Z-Image Turbo", "z-image-turbo"),
        ("z-image-turbo-Q4_K_M.gguf", "z-image-turbo"),
        ("z_image_fp8_e4m3fn_scaled", "z-image"),
        ("z_image_turbo_int8_convrot.safetensors", "z-image-turbo"),
        ("zImageTurbo_realism_v2.safetensors", None),
        ("z-image-2", None),
        ("sd_xl_base_1.0", None),
        ("", None),
        (None, None),
        (["z-image"] * 3, None),
    ],
)
def test_a_model_file_is_recognised_in_any_precision_and_a_finetune_is_not(name, known):
    reading = Reading({}, {})
    find_model(name, reading)
    assert reading.fields.get("model") == known
    assert ("model" in reading.ignored) == (known is None)


# Flat JSON ------------------------------------------------------------------------------------------------------------


def test_a_swarmui_picture_is_read():
    params = {
        "prompt": "a photo of a cat", "negativeprompt": "dog", "model": "Z/z_image_turbo_bf16", "images": 1, "seed": 99,
        "steps": 8, "cfgscale": 1.0, "aspectratio": "1:1", "width": 1024, "height": 768, "sampler": "res_multistep",
        "scheduler": "simple", "sigmashift": 3.0, "initimagecreativity": 0.6, "loras": ["pixel-art"],
        "loraweights": ["0.7"], "automaticvae": True, "swarm_version": "0.9.8.1",
    }  # fmt: skip
    data = {"sui_image_params": params, "sui_extra_data": {"date": "2026-01-02"}, "sui_models": [{"name": "x"}]}
    found = read_request(png_with(parameters=json.dumps(data, indent=2)))
    assert found.source == "swarmui"
    assert fields(found) == {
        "prompt": "a photo of a cat", "negative_prompt": "dog", "model": "z-image-turbo", "seed": 99, "steps": 8,
        "guidance": 1, "width": 1024, "height": 768, "solver": "res_multistep", "schedule": "simple", "shift": 3,
        "strength": 0.6,
    }  # fmt: skip
    assert found.ignored == {"loras": ["pixel-art:0.7"]}
    jpeg = read_request(with_comment(b"UNICODE\0" + json.dumps(data).encode("utf-16-le")))
    assert (jpeg.source, jpeg.request) == ("swarmui", found.request)


def test_an_invokeai_picture_is_read():
    data = {
        "generation_mode": "z_image_txt2img", "positive_prompt": "a lighthouse", "negative_prompt": "fog",
        "width": 1024, "height": 1024, "seed": 777, "rand_device": "cpu", "cfg_scale": 1.0, "steps": 8,
        "scheduler": "heun", "model": {"key": "k", "hash": "h", "name": "Z-Image Turbo", "base": "z-image"},
        "loras": [{"model": {"name": "grain"}, "weight": 0.5}], "strength": 0.75, "init_image": "abc.png",
        "app_version": "6.12.0",
    }  # fmt: skip
    found = read_request(png_with(invokeai_metadata=json.dumps(data), invokeai_graph="{}"))
    assert found.source == "invokeai"
    assert fields(found) == {
        "prompt": "a lighthouse", "negative_prompt": "fog", "width": 1024, "height": 1024, "seed": 777, "guidance": 1,
        "steps": 8, "solver": "heun", "model": "z-image-turbo", "strength": 0.75,
    }  # fmt: skip
    assert found.ignored == {"init_image": "abc.png", "loras": ["grain:0.5"]}


PAIRS = "Steps: 8, Sampler: Euler, CFG scale: 1, Seed: 5, Size: 64x64, Model: z_image_turbo"


@pytest.mark.parametrize(
    ("texts", "loras", "left"),
    [
        (
            {"parameters": f"a cat <lora:pixel:0.7> <lora:none:1><lora:ink>\n{PAIRS}"},
            ["styles/pixel:0.7", "ink"], ["none:1"],
        ),
        ({"parameters": f'a cat\n{PAIRS}, Hashes: {{"lora:pixel": "abc"}}'}, [], ["pixel"]),
        ({"parameters": f"a cat <lora:twice:1>\n{PAIRS}"}, [], ["twice:1"]),  # it may be either file
        (
            {"parameters": json.dumps({"sui_image_params": {"prompt": "a", "loras": ["styles/pixel", "ink"],
                                                            "loraweights": ["0.5"]}})},
            ["styles/pixel:0.5", "ink"], None,
        ),
        (
            {"invokeai_metadata": json.dumps({"positive_prompt": "a", "app_version": "6",
                                              "loras": [{"model": {"name": "ink"}, "weight": 0.25}, 3]})},
            ["ink:0.25"], ["None:1"],
        ),
    ],
)  # fmt: skip
def test_loras_of_other_programs_are_used_if_one_file_of_that_name_is_here(texts, loras, left):
    found = read_request(png_with(**texts), loras=["styles/pixel", "ink", "a/twice", "b/twice"])
    assert list(found.request.loras) == loras
    assert found.ignored.get("loras") == left
    assert not read_request(png_with(**texts)).request.loras


MFLUX = {
    "mflux_version": "0.24.0", "model": "Tongyi-MAI/Z-Image-Turbo", "base_model": "None", "seed": 5, "steps": 9,
    "guidance": None, "height": 640, "width": 832, "precision": "mlx.core.bfloat16", "quantize": 8,
    "generation_time_seconds": 12.3, "created_at": "2026-02-03T04:05:06", "lora_paths": ["/l/a.safetensors"],
    "lora_scales": [0.8], "image_path": "/me/in.png", "image_strength": 0.3, "prompt": "橘猫", "negative_prompt": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_mflux_picture_is_read(kind):
    comment = b"ASCII\0\0\0" + json.dumps(MFLUX, ensure_ascii=False).encode()
    found = read_request(with_comment(comment, kind))
    assert found.source == "mflux"
    assert fields(found) == {
        "prompt": "橘猫", "model": "z-image-turbo", "seed": 5, "steps": 9, "width": 832, "height": 640, "strength": 0.7
    }  # fmt: skip
    assert found.ignored == {
        "quantize": 8, "lora_paths": ["/l/a.safetensors"], "lora_scales": "[0.8]", "image_path": "/me/in.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "theirs", "ours"),
    [("Tongyi-MAI/Z-Image", 4.0, 5.0), ("Tongyi-MAI/Z-Image", 1.0, 1.0), ("Tongyi-MAI/Z-Image-Turbo", 0.0, 1.0),
     ("black-forest-labs/FLUX.1-dev", 3.5, 3.5), ("black-forest-labs/FLUX.1-dev", 1.0, 1.0)],
)  # fmt: skip
def test_mflux_guidance_is_converted_to_the_standard_scale(model, theirs, ours):
    comment = b"ASCII\0\0\0" + json.dumps({**MFLUX, "model": model, "guidance": theirs}).encode()
    found = read_request(with_comment(comment))
    assert found.request.guidance == ours
    assert "guidance" not in found.ignored


def test_a_fooocus_picture_is_read():
    data = {
        "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "juggernautXL_v8", "guidance_scale": 4.0,
        "metadata_scheme": "fooocus", "negative_prompt": "bad", "prompt": "an astronaut", "resolution": "(1152, 896)",
        "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "seed": "42", "steps": 30, "version": "Fooocus v2.5.5",
    }  # fmt: skip
    found = read_request(png_with(parameters=json.dumps(data), fooocus_scheme="fooocus"))
    assert found.source == "fooocus"
    assert fields(found) == {
        "prompt": "an astronaut", "negative_prompt": "bad", "guidance": 4, "seed": 42, "steps": 30, "width": 1152,
        "height": 896,
    }  # fmt: skip
    assert found.ignored == {
        "adm_guidance": "(1.5, 0.8, 0.3)", "model": "juggernautXL_v8", "solver": "dpmpp_2m_sde_gpu",
        "schedule": "karras",
    }  # fmt: skip


# ComfyUI -------------------------------------------------------------------------------------------------------------


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def turbo(**changes) -> dict:
    """The graph of ComfyUI's own Z-Image-Turbo template; changes replace whole nodes."""
    return {
        "9": node("SaveImage", filename_prefix="z-image", images=["43", 0]),
        "39": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default"),
        "40": node("VAELoader", vae_name="ae.safetensors"),
        "41": node("EmptySD3LatentImage", width=1024, height=768, batch_size=1),
        "42": node("ConditioningZeroOut", conditioning=["45", 0]),
        "43": node("VAEDecode", samples=["44", 0], vae=["40", 0]),
        "44": node(
            "KSampler", seed=47447417949230, steps=9, cfg=1, sampler_name="res_multistep", scheduler="simple",
            denoise=1, model=["47", 0], positive=["45", 0], negative=["42", 0], latent_image=["41", 0],
        ),
        "45": node("CLIPTextEncode", text="a latina model, 橘猫", clip=["39", 0]),
        "46": node("UNETLoader", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default"),
        "47": node("ModelSamplingAuraFlow", shift=3, model=["46", 0]),
    } | {key.removeprefix("n"): value for key, value in changes.items()}  # fmt: skip


TURBO = {
    "prompt": "a latina model, 橘猫", "seed": 47447417949230, "steps": 9, "guidance": 1, "solver": "res_multistep",
    "schedule": "simple", "width": 1024, "height": 768, "model": "z-image-turbo", "shift": 3,
}  # fmt: skip


def comfy(graph: dict):
    return read_request(png_with(prompt=json.dumps(graph), workflow="{}"))


def test_comfyuis_own_graph_is_read():
    found = comfy(turbo())
    assert found.source == "comfyui"
    assert fields(found) == TURBO
    assert found.ignored == {}


def test_a_comfyui_webp_is_read():
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(turbo())
    exif[0x010F] = "workflow:{}"
    buffer = io.BytesIO()
    PICTURE.save(buffer, "WEBP", exif=exif)
    assert fields(read_request(url(buffer.getvalue()))) == TURBO


def test_the_parts_of_a_custom_sampler_are_followed():
    custom = {
        "n44": node(
            "SamplerCustomAdvanced", noise=["50", 0], guider=["51", 0], sampler=["52", 0], sigmas=["53", 0],
            latent_image=["41", 0],
        ),
        "n50": node("RandomNoise", noise_seed=["60", 0]),
        "n60": node("PrimitiveInt", value=11),
        "n51": node("CFGGuider", cfg=4.5, model=["55", 0], positive=["45", 0], negative=["54", 0]),
        "n52": node("KSamplerSelect", sampler_name="euler"),
        "n53": node("SplitSigmas", step=3, sigmas=["56", 0]),
        "n56": node("BasicScheduler", scheduler="beta", steps=["61", 0], denoise=1.0, model=["47", 0]),
        "n61": node("INTConstant", value=24),
        "n54": node("CLIPTextEncode", text="blurry", clip=["39", 0]),
        "n55": node("LoraLoaderModelOnly", lora_name="pixel.safetensors", strength_model=0.7, model=["47", 0]),
    }  # fmt: skip
    found = comfy(turbo(**custom))
    assert fields(found) == TURBO | {
        "seed": 11, "guidance": 4.5, "solver": "euler", "schedule": "beta", "steps": 24, "negative_prompt": "blurry"
    }  # fmt: skip
    assert found.ignored == {"loras": ["pixel.safetensors:0.7"]}
    known = read_request(png_with(prompt=json.dumps(turbo(**custom))), loras=["styles/pixel"])
    assert (known.request.loras, known.ignored) == (("styles/pixel:0.7",), {})
    custom["n51"] = node("BasicGuider", model=["55", 0], conditioning=["57", 0])
    custom["n57"] = node("FluxGuidance", guidance=3.5, conditioning=["45", 0])
    found = comfy(turbo(**custom))
    assert (found.request.guidance, found.request.prompt) == (1, TURBO["prompt"])
    assert found.ignored == {"loras": ["pixel.safetensors:0.7"], "FluxGuidance": 3.5}


def test_texts_and_numbers_are_followed_through_the_nodes_that_hold_them():
    found = comfy(turbo(
        n45=node("CLIPTextEncode", text=["70", 0], clip=["39", 0]),
        n70=node("StringConcatenate", string_a=["71", 0], string_b=["72", 0], delimiter=", "),
        n71=node("PrimitiveStringMultiline", value="a castle"),
        n72=node("ShowText|pysssss", text=["73", 0]),
        n73=node("PrimitiveString", value="at dawn"),
        n41=node("EmptySD3LatentImage", width=["74", 0], height=["74", 1], batch_size=4),
        n74=node("Resolution", width=832, height=1216),
    ))  # fmt: skip
    assert found.request.prompt == "a castle, at dawn"
    assert (found.request.width, found.request.height) == (832, 1216)
    assert found.ignored == {"batch_size": 4}


def test_prompts_are_followed_through_controlnets_which_are_listed():
    found = comfy(turbo(
        n44=node("KSampler", seed=1, steps=8, cfg=3, sampler_name="exponential/res_2s", scheduler="bong_tangent",
                 denoise=1, model=["47", 0], positive=["80", 0], negative=["80", 1], latent_image=["41", 0]),
        n80=node("ControlNetApplyAdvanced", strength=1, positive=["45", 0], negative=["81", 0], control_net=["82", 0]),
        n81=node("CLIPTextEncode", text="ugly", clip=["39", 0]),
    ))  # fmt: skip
    assert (found.request.prompt, found.request.negative_prompt) == (TURBO["prompt"], "ugly")
    assert (found.request.solver, found.request.schedule) == ("res_2s", "bong_tangent")
    assert found.ignored == {"conditioning": ["ControlNetApplyAdvanced", "ControlNetApplyAdvanced"]}


def test_the_first_sampler_is_read_and_later_ones_are_listed():
    found = comfy(turbo(
        n43=node("VAEDecode", samples=["90", 0], vae=["40", 0]),
        n90=node("KSampler", seed=2, steps=4, cfg=1, sampler_name="euler", scheduler="simple", denoise=0.4,
                 model=["46", 0], positive=["45", 0], negative=["42", 0], latent_image=["91", 0]),
        n91=node("LatentUpscaleBy", samples=["44", 0], scale_by=1.5),
    ))  # fmt: skip
    assert fields(found) == TURBO
    assert found.ignored == {"later_samplers": ["KSampler"]}


def test_a_start_picture_is_listed_and_its_strength_is_read():
    sampler = turbo()["44"]
    sampler["inputs"] |= {"denoise": 0.55, "latent_image": ["95", 0]}
    found = comfy(turbo(
        n44=sampler, n95=node("VAEEncode", pixels=["96", 0], vae=["40", 0]), n96=node("LoadImage", image="me.png")
    ))  # fmt: skip
    assert found.request.strength == 0.55
    assert found.request.width is None
    assert found.ignored == {"image": "me.png"}


def test_a_broken_link_loses_only_its_own_field():
    sampler = turbo()["44"]
    sampler["inputs"] |= {"seed": ["404", 0], "steps": ["44", 0], "negative": ["404", 1], "model": ["404", 0]}
    found = comfy(turbo(n44=sampler, n45=node("CustomPrompt", clip=["39", 0], words=["404", 0])))
    assert fields(found) == {k: TURBO[k] for k in ("guidance", "solver", "schedule", "width", "height")}
    assert found.ignored["prompt"] == "a text from CustomPrompt that could not be followed"


def test_loops_in_a_graph_end():
    ring = {str(i): node("StringConcatenate", string_a=[str(i), 0], string_b=[str((i + 1) % 5), 0]) for i in range(5)}
    looped = turbo(n45=node("CLIPTextEncode", text=["0", 0]), n47=node("ModelPatch", model=["47", 0]))
    looped["41"] = node("EmptyLatentImage", width=["41", 0], height=64, batch_size=["41", 0])
    looped["42"] = node("ConditioningSetTimestepRange", conditioning=["42", 0])
    looped["44"]["inputs"]["latent_image"] = ["44", 0]
    found = comfy(looped | ring)
    assert found.request.prompt == ""
    assert found.request.seed == TURBO["seed"]
    assert "later_samplers" not in found.ignored


def test_a_text_that_doubles_itself_ends():
    links = [[str(i + 1), 0] for i in range(100, 150)]
    bomb = {str(i + 100): node("StringConcatenate", string_a=link, string_b=link) for i, link in enumerate(links)}
    bomb["150"] = node("PrimitiveString", value="ha")
    began = time.process_time()
    assert comfy(turbo(n45=node("CLIPTextEncode", text=["100", 0])) | bomb).request.prompt == ""
    assert time.process_time() - began < 1


def test_a_long_chain_of_nodes_ends():
    chain = {str(i): node("ImagePass", a=[str(i + 1), 0], latent_image=[str(i + 1), 0]) for i in range(1000, 20_000)}
    began = time.process_time()
    read_comfyui(chain | {"1": node("SaveImage", images=["1000", 0])})
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "graph",
    [{}, {"1": 2}, {"1": {"inputs": []}}, {"1": node("SaveImage", images=[1, 2, 3])}, {"prompt": {"a": None}},
     {"1": {"class_type": None, "inputs": {"images": [[], {}]}}}],
)  # fmt: skip
def test_a_graph_without_a_sampler_carries_no_request(graph):
    assert "carries no request" in refusal(comfy, graph)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["1", "2", "3"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(st.sampled_from(["1", "2", "3", 1]), st.integers(0, 1)).map(list)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
INPUT_NAMES = st.sampled_from([
    "latent_image", "model", "positive", "negative", "conditioning", "text", "seed", "steps", "cfg", "sampler",
    "sigmas", "guider", "noise", "scheduler", "sampler_name", "denoise", "width", "height", "shift", "unet_name",
    "lora_name", "string_a", "string_b", "delimiter", "batch_size", "image", "start_at_step", "value", "lora_1",
])  # fmt: skip
CLASSES = st.sampled_from(["SaveImage", "KSampler", "EmptyLatent", "LoadImage", "LoraLoader", "ConditioningZeroOut", 3])


@settings(deadline=None)
@given(st.dictionaries(
    st.sampled_from(["1", "2", "3", "4"]),
    st.fixed_dictionaries({"class_type": CLASSES, "inputs": st.dictionaries(INPUT_NAMES, JSON, max_size=8)}),
))  # fmt: skip
def test_a_graph_never_raises_anything_but_an_input_error(graph):
    try:
        found = comfy(graph)
    except InputError:
        return
    json.dumps(found.ignored, allow_nan=False).encode()


def test_references_given_as_data_are_kept_as_digests_and_paths_stay(tmp_path):
    shown = Image.new("RGB", (8, 8), "red")
    asked = Request(prompt="x", seed=1, reference=(shown, Path("b.png")))
    save_picture(Image.new("RGB", (16, 16)), tmp_path / "data.png", asked)
    digest = hashlib.sha256(base64.b64decode(asked.reference[0].partition(",")[2])).hexdigest()
    assert f"only its sha256 is kept: {digest}, b.png".encode() in (tmp_path / "data.png").read_bytes()
    assert b"data:image" not in (tmp_path / "data.png").read_bytes()
    save_picture(Image.new("RGB", (16, 16)), tmp_path / "path.png", asked.model_copy(update={"reference": ("a.png",)}))
    assert read_request(tmp_path / "path.png").request.reference == ("a.png",)


# Other untrusted input ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.sampled_from(["inkstream", "parameters", "prompt", "invokeai_metadata", "comment", "workflow"]),
    st.sampled_from(["sui_image_params", "request", "mflux_version", "app_version", "adm_guidance", "extraMetadata"]),
    st.dictionaries(
        st.sampled_from([*Request.model_fields, "cfgscale", "sampler", "model", "loras", "guidance", "image_strength",
                         "resolution", "scheduler", "positive_prompt", "left_out", "fluxguidancescale", "c", "uc",
                         "seed_mode", "size", "v2", "scale", "z_image_shift", "lora_combined_1"]),
        JSON,
    ),
)  # fmt: skip
def test_values_of_the_wrong_type_are_ignored_not_raised(key, wrapper, values):
    data = {wrapper: values, **values}
    try:
        found = read_request(png_with(**{key: json.dumps(data)}))
    except InputError:
        return
    json.dumps(found.ignored, allow_nan=False).encode()
    json.dumps(describe(png_with(**{key: json.dumps(data)}))).encode()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"request":' * 100_000,
        '{"request": {"seed": ' + "9" * 5000 + "}}",
        '{"request": {"prompt": "\\ud800", "seed": 3}}',
        '{"request": {"steps": NaN, "guidance": Infinity, "seed": true}}',
        '{"request": []}',
        '{"version": "x"}',
        "a" * 5_000_000,
        "Steps: 1, " * 300_000,
        'A:["' * 300_000,
        "<lora:" * 300_000,
    ],
)
def test_hostile_texts_are_read_quickly_without_errors(text):
    for key in ("inkstream", "parameters", "prompt"):
        began = time.process_time()
        try:
            found = read_request(png_with(**{key: text}))
        except InputError:
            continue
        finally:
            assert time.process_time() - began < 5
        assert len(json.dumps(found.ignored, allow_nan=False)) < 100_000
        str(found.ignored).encode()


def test_metadata_over_the_limit_is_not_read():
    assert "carries no request" in refusal(read_request, png_with(parameters="a" * (4 << 20) + "b"))
    text = "cat\nSteps: 8, " + ", ".join(f"key {i}: {i}" for i in range(1000))
    assert len(read_request(png_with(parameters=text)).ignored) == 100


def test_exif_is_written_big_endian():
    data = encode_picture(PICTURE, "JPEG", Request(prompt="橘猫"))
    assert b"Exif\0\0MM" in data
    assert b"UNICODE\0" + "橘猫".encode("utf-16-be") in data


def test_ignored_texts_are_one_printable_line():
    record = {"request": {"prompt": "x", "trap": "\x1b[2J\nrm" + "z" * 1000}}
    note = read_request(png_with(inkstream=json.dumps(record))).ignored["trap"]
    assert note.isprintable()
    assert len(note) < 210


def test_an_xmp_packet_with_a_dtd_is_not_parsed():
    chunks = chunks_of(encode_picture(PICTURE, "PNG", FULL))
    packet = next(body.split(b"\0", 5)[5].decode() for _, body in chunks if body.startswith(b"XML:com.adobe.xmp"))
    assert describe(png_with(**{"XML:com.adobe.xmp": packet}))["digital_source_type"] == MADE_BY_A_MODEL
    packet = packet.replace("<x:xmpmeta", '<!DOCTYPE x [<!ENTITY a "ha">]><x:xmpmeta')
    assert "digital_source_type" not in describe(png_with(**{"XML:com.adobe.xmp": packet}))


def test_the_mark_is_read_from_an_attribute_too():
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'Iptc4xmpExt:DigitalSourceType="{MADE_BY_A_MODEL}"/></rdf:RDF></x:xmpmeta>'
    )
    assert describe(png_with(**{"XML:com.adobe.xmp": packet}))["digital_source_type"] == MADE_BY_A_MODEL


def test_texts_behind_the_pixels_are_read():
    data = encode_picture(PICTURE, "PNG", FULL, saving=Saving("none"))
    body = b"parameters\0" + FORGE.encode()
    chunk = struct.pack(">I", len(body)) + b"tEXt" + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))
    check_forge(read_request(url(data[:-12] + chunk + data[-12:])))


def test_a_cut_off_picture_still_gives_its_request():
    data = encode_picture(Image.effect_noise((64, 64), 90).convert("RGB"), "PNG", FULL)
    assert read_request(url(data[:-500])).request == FULL


def test_a_missing_or_damaged_picture_is_refused(tmp_path):
    assert "does not exist" in refusal(read_request, tmp_path / "gone.png")
    (tmp_path / "notes.png").write_text("not a picture")
    assert "is not a picture" in refusal(describe, tmp_path / "notes.png")


def test_neither_module_imports_torch():
    code = "import sys; from inkstream.engine.pictures import inputs, metadata; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
