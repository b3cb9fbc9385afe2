"""A1111's API for its clients: the fields they always send are accepted, other fields are supported or refused."""

from __future__ import annotations

import base64
import io
import json
import threading

import pytest
from PIL import Image

from inkstream.engine.pictures.foreign.a1111 import read_a1111
from inkstream.serve.api.a1111 import FromPicture
from inkstream.types import Request

API = "/sdapi/v1"
SMALL = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 2, "seed": 7}
USUAL = {
    "negative_prompt": "", "sampler_name": "Euler", "scheduler": "Automatic", "restore_faces": False, "tiling": False,
    "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_second_pass_steps": 0, "denoising_strength": 0.7,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"}, "styles": [], "clip_skip": 1,
    "override_settings_restore_afterwards": True, "save_images": True, "send_images": True, "subseed": -1,
    "subseed_strength": 0.0, "alwayson_scripts": {}, "script_name": None, "s_churn": 0.0, "refiner_switch_at": 0.8,
}  # fmt: skip
"""Fields that chat programs send."""


def opened(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content)))


def base64_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def ask(server, method: str, path: str, body=None):
    status, _, answer = server.ask(method, API + path, body)
    assert status == 200, answer
    return answer


def test_a_request_of_a_chat_program_draws_the_same_picture_as_the_native_api(server):
    own = server.ended(server.draw(seed=7, steps=2, solver="euler"))
    native = Image.open(io.BytesIO(server.ask("GET", own["pictures"][0]["url"])[2]))
    answer = ask(server, "POST", "/txt2img", {**SMALL, **USUAL})
    assert opened(answer["images"][0]).tobytes() == native.tobytes()
    assert answer["parameters"]["steps"] == 2


def test_batch_size_times_n_iter_pictures_have_their_seeds_and_texts(server):
    answer = ask(server, "POST", "/txt2img", {**SMALL, "batch_size": 2, "n_iter": 2})
    info = json.loads(answer["info"])
    assert len(answer["images"]) == 4
    assert info["all_seeds"] == [7, 8, 9, 10]
    found = read_a1111(info["infotexts"][1])
    assert found is not None
    assert (found.fields["prompt"], int(found.fields["seed"])) == ("a red circle", 8)


def test_a_subseed_varies_one_picture_and_counts_up(server):
    answer = ask(server, "POST", "/txt2img", {**SMALL, "subseed": 5, "subseed_strength": 0.25, "batch_size": 2})
    info = json.loads(answer["info"])
    assert (info["all_seeds"], info["all_subseeds"]) == ([7, 7], [5, 6])
    assert (info["subseed"], info["subseed_strength"]) == (5, 0.25)
    found = read_a1111(info["infotexts"][1])
    assert found is not None
    assert found.fields["variation"] == "6:0.25"
    assert answer["images"][0] != answer["images"][1]
    random = json.loads(ask(server, "POST", "/txt2img", {**SMALL, "subseed_strength": 0.25, "subseed": -1})["info"])
    assert random["subseed"] >= 0


def test_img2img_keeps_the_black_part_of_the_mask(server):
    start = Image.new("RGB", (48, 32), "orange")
    mask = Image.new("L", (48, 32))
    mask.paste(255, (32, 0, 48, 32))
    body = {"prompt": "a red circle", "steps": 2, "init_images": [base64_of(start)], "mask": base64_of(mask),
            "denoising_strength": 1.0, "mask_blur": 4, "inpaint_full_res": True, "inpainting_fill": 0}  # fmt: skip
    image = opened(ask(server, "POST", "/img2img", body)["images"][0])
    assert image.crop((0, 0, 16, 32)).getcolors() == [(512, (255, 165, 0))]
    assert image.crop((40, 0, 48, 32)).getcolors() != [(256, (255, 165, 0))]


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, {}),
        ({"mask_blur": 4}, {"mask_grow": 8, "mask_blur": 16}),
        ({"mask_blur_x": 1, "mask_blur_y": 2}, {"mask_grow": 4, "mask_blur": 8}),
        ({"mask_blur": 0, "inpainting_mask_invert": 1}, {"mask_grow": 0, "mask_blur": 0, "mask_invert": True}),
        ({"inpainting_mask_invert": 0, "inpainting_fill": 0}, {"mask_fill": "blur"}),
        ({"inpainting_fill": 2, "inpaint_full_res": True}, {"mask_fill": "noise", "crop": "32px"}),
        ({"inpaint_full_res": 1, "inpaint_full_res_padding": 0}, {"crop": "0px"}),
        ({"inpaint_full_res": False, "inpaint_full_res_padding": 64}, {}),
    ],
)
def test_the_options_of_a_mask_become_ours(given, fields):
    picture = base64_of(Image.new("RGB", (4, 4)))
    body = FromPicture.model_validate({"init_images": [picture], "mask": picture, **given})
    assert body.repainting() == fields
    Request.model_validate(fields)
    assert FromPicture.model_validate({"init_images": [picture], **given}).mask_blur is None  # nothing without a mask


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"enable_hr": True, "hr_upscaler": "Latent"}, "hr_upscaler", "take one of /sdapi/v1/upscalers"),
        ({"enable_hr": True, "hr_prompt": "a cat"}, "hr_prompt", "leave it out"),
        ({"enable_hr": True, "hr_scale": 99}, "hr_scale", "less than or equal to 16"),
        ({"enable_hr": True, "hr_resize_x": 1024}, "upscale", "more than this server's limit of 0.25 megapixels"),
        ({"styles": ["noir"]}, "styles", "noir"),
        ({"alwayson_scripts": {"ADetailer": {"args": [{}]}}}, "alwayson_scripts", "ADetailer"),
        ({"override_settings": {"eta": 1}}, "override_settings.eta", "not a known field"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "CLIP_stop_at_last_layers", "is not supported"),
        ({"sampler_name": "PLMS"}, "sampler_name", "/sdapi/v1/samplers"),
        ({"scheduler": "Karras"}, "scheduler", "/sdapi/v1/schedulers"),
        ({"prompt": "a <lora:x:1>"}, "prompt", "/v1/loras"),
        ({"prompt": "a <lora:bold:much>"}, "prompt", "<lora:bold:0.8>"),
        ({"width": 40}, "width", "multiple of 16"),
        ({"seed": -2}, "seed", "greater"),
        ({"turbo": True}, "turbo", "leave it out"),
    ],
)
def test_an_unsupported_value_is_refused_with_the_name_of_its_field(server, fields, param, words):
    status, _, answer = server.ask("POST", f"{API}/txt2img", {**SMALL, **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


def test_progress_is_reported_and_interrupt_returns_the_finished_pictures(server, until):
    answers = []
    body = {**SMALL, "width": 128, "height": 128, "steps": 25, "n_iter": 4}
    thread = threading.Thread(target=lambda: answers.append(ask(server, "POST", "/txt2img", body)))
    thread.start()
    until(lambda: ask(server, "GET", "/progress?skip_current_image=true")["progress"] > 0.3)
    told = ask(server, "GET", "/progress")
    assert told["state"]["sampling_steps"] == 25
    assert told["state"]["job_count"] == 4
    assert opened(told["current_image"]).size[0] > 0
    ask(server, "POST", "/interrupt")
    thread.join(60)
    assert 1 <= len(answers[0]["images"]) < 4
    assert ask(server, "GET", "/progress")["progress"] == 0


def test_interrupt_does_not_touch_jobs_of_other_apis(server):
    server.ask("PATCH", "/v1/queue", {"paused": True})
    job = server.draw()
    ask(server, "POST", "/interrupt")
    assert ask(server, "GET", "/progress")["state"]["job"] == ""
    server.ask("PATCH", "/v1/queue", {"paused": False})
    assert server.ended(job)["state"] == "succeeded"


def test_the_lists_that_clients_read_at_their_start_exist(server):
    assert [model["title"] for model in ask(server, "GET", "/sd-models")] == ["pocket"]
    assert {"Euler", "DPM++ 2M"} <= {sampler["name"] for sampler in ask(server, "GET", "/samplers")}
    assert {"automatic", "simple"} <= {schedule["name"] for schedule in ask(server, "GET", "/schedulers")}
    assert ask(server, "GET", "/options")["sd_model_checkpoint"] == "pocket"
    assert [lora["name"] for lora in ask(server, "GET", "/loras")] == ["styles/bold"]
    assert [one["name"] for one in ask(server, "GET", "/upscalers")] == ["None", "Lanczos", "twice"]
    for path in ("sd-vae", "prompt-styles", "hypernetworks"):
        assert ask(server, "GET", f"/{path}") == []


def test_the_model_is_set_by_its_title(server):
    ask(server, "POST", "/options", {"sd_model_checkpoint": "pocket.safetensors [0123456789]", "sd_vae": "Automatic"})
    assert ask(server, "GET", "/options")["sd_model_checkpoint"] == "pocket"
    status, _, answer = server.ask("POST", f"{API}/options", {"sd_model_checkpoint": "sdxl"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert server.ask("POST", f"{API}/options", {"eta_noise_seed_delta": 1})[0] == 400


def test_the_request_of_a_picture_is_read_from_its_metadata(server):
    drawn = ask(server, "POST", "/txt2img", SMALL)["images"][0]
    told = ask(server, "POST", "/png-info", {"image": f"data:image/png;base64,{drawn}"})
    assert told["info"].startswith("a red circle\nSteps: 2")
    assert told["parameters"]["seed"] == 7
    empty = ask(server, "POST", "/png-info", {"image": base64_of(Image.new("RGB", (8, 8)))})
    assert empty == {"info": "", "items": {}, "parameters": {}}
    assert server.ask("POST", f"{API}/png-info", {"image": "AAAA"})[0] == 400


def test_a_prompts_tag_uses_a_lora_of_the_servers_folder(server):
    own = server.ended(server.draw(seed=7, steps=2, loras=[{"path": "styles/bold", "strength": 0.5}]))
    native = Image.open(io.BytesIO(server.ask("GET", own["pictures"][0]["url"])[2]))
    plain, tagged = (
        ask(server, "POST", "/txt2img", {**SMALL, "prompt": f"a red circle{tag}", "sampler_name": "Euler"})
        for tag in ("", " <lora:bold:0.5>")
    )
    assert opened(tagged["images"][0]).tobytes() == native.tobytes() != opened(plain["images"][0]).tobytes()
    assert "<lora:bold:0.5>" in json.loads(tagged["info"])["infotexts"][0]


@pytest.mark.parametrize("path", ["bolt", "/etc/passwd", "styles/../styles/bold", "styles/bold.safetensors", ""])
def test_only_names_of_the_folder_are_open_to_clients(server, path):
    status, _, answer = server.ask("POST", "/v1/jobs", {"prompt": "a", "loras": [path]})
    assert status in (400, 404)
    assert answer["error"]["param"].startswith("loras")
    if path == "bolt":
        assert "take styles/bold" in answer["error"]["message"]


def test_the_second_pass_is_drawn_as_the_native_api_draws_it(server):
    second = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "twice", "hr_second_pass_steps": 0}
    answer = ask(server, "POST", "/txt2img", {**SMALL, "steps": 4, **second, "denoising_strength": 0.5})
    own = server.ended(server.draw(seed=7, steps=4, upscale="2x", upscaler="twice", upscale_strength=0.5))
    native = Image.open(io.BytesIO(server.ask("GET", own["pictures"][0]["url"])[2]))
    assert opened(answer["images"][0]).size == (64, 64)
    assert opened(answer["images"][0]).tobytes() == native.tobytes()
    sized = {"enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 64, "hr_cfg": 2}
    answer = ask(server, "POST", "/txt2img", {**SMALL, **sized, "denoising_strength": 0})
    assert opened(answer["images"][0]).size == (96, 64)
    assert json.loads(answer["info"])["ignored"] == ["hr_cfg"]


def test_extras_enlarge_pictures_by_the_models_of_the_folder(server):
    picture = Image.linear_gradient("L").resize((20, 12)).convert("RGB")
    given = {"image": base64_of(picture), "upscaler_1": "twice"}
    twice = opened(ask(server, "POST", "/extra-single-image", given)["image"])
    assert twice.tobytes() == picture.resize((40, 24), Image.Resampling.NEAREST).tobytes()
    for fields, size in (
        ({"upscaling_resize": 4}, (80, 48)),
        ({"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64}, (64, 64)),
        ({"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64, "upscaling_crop": False}, (64, 38)),
        ({"upscaler_1": "Lanczos"}, (40, 24)),
        ({"upscaler_1": "None"}, (20, 12)),
    ):
        assert opened(ask(server, "POST", "/extra-single-image", given | fields)["image"]).size == size
    both = {"imageList": [{"data": base64_of(picture), "name": "a"}] * 2, "upscaler_1": "twice"}
    images = ask(server, "POST", "/extra-batch-images", both)["images"]
    assert [opened(image).tobytes() for image in images] == [twice.tobytes()] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"upscaler_1": "/etc/passwd"}, "upscaler_1"),
        ({"upscaler_1": "../twice"}, "upscaler_1"),
        ({"upscaler_2": "twice", "extras_upscaler_2_visibility": 0.5}, "upscaler_2"),
        ({"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 30_000, "upscaling_resize_h": 30_000},
         "upscale"),
    ],
)  # fmt: skip
def test_extras_of_other_upscalers_and_huge_sizes_are_refused(server, fields, param):
    body = {"image": base64_of(Image.new("RGB", (8, 8))), **fields}
    status, _, answer = server.ask("POST", f"{API}/extra-single-image", body)
    assert (status, answer["error"]["param"]) == (400, param)
    status, _, answer = server.ask("POST", "/v1/jobs", {"prompt": "x", "upscaler": "/etc/passwd", "upscale": "2x"})
    assert (status, answer["error"]["code"]) == (404, "upscaler_not_found")
