"""A1111's API through the package webuiapi: its usual methods, with the default values that it sends."""

from __future__ import annotations

import threading

import pytest
from PIL import Image

webuiapi = pytest.importorskip("webuiapi")
SMALL = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def api(server):
    api = webuiapi.WebUIApi(port=server.port)
    yield api
    api.session.close()


def test_a_prompt_is_drawn_with_the_packages_default_fields(api):
    answer = api.txt2img(prompt="a red circle", steps=1)
    assert answer.image.size == (512, 512)
    assert (answer.info["sampler_name"], answer.info["steps"], answer.info["cfg_scale"]) == ("Euler a", 1, 7)
    assert answer.info["ignored"] == []
    assert answer.parameters["eta"] == 1


def test_euler_a_without_noise_is_euler_and_euler_needs_no_noise(api):
    quiet = api.txt2img(**SMALL, eta=0)
    plain = api.txt2img(**SMALL, sampler_name="Euler")
    noisy = api.txt2img(**SMALL)
    assert quiet.image.tobytes() == plain.image.tobytes() != noisy.image.tobytes()
    assert (quiet.info["sampler_name"], noisy.info["sampler_name"]) == ("Euler", "Euler a")
    assert plain.info["ignored"] == ["eta", "s_noise"]


def test_batches_come_with_their_seeds(api):
    answer = api.txt2img(**SMALL, batch_size=2, n_iter=2)
    assert [image.size for image in answer.images] == [(32, 32)] * 4
    assert answer.info["all_seeds"] == [7, 8, 9, 10]


def test_img2img_keeps_the_black_part_of_the_mask(api):
    start = Image.new("RGB", (32, 32), "orange")
    drawn = api.img2img([start], **SMALL)
    assert drawn.image.size == (32, 32)
    assert drawn.image.tobytes() != start.tobytes()
    assert drawn.info["ignored"] == ["resize_mode"]
    mask = Image.new("RGB", (32, 32))
    mask.paste((255, 255, 255), (24, 0, 32, 32))
    inpainted = api.img2img([start], mask_image=mask, **SMALL)
    assert inpainted.image.crop((0, 0, 12, 32)).getcolors() == [(12 * 32, (255, 165, 0))]
    assert inpainted.image.crop((28, 0, 32, 32)).getcolors() != [(4 * 32, (255, 165, 0))]
    assert not {"mask_blur", "inpainting_fill", "inpaint_full_res"} & set(inpainted.info["ignored"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enable_hr": True}, "hr_upscaler Latent is not known: take one of /sdapi/v1/upscalers"),
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["noir"]}, "styles"),
        ({"subseed_strength": 1.5}, "subseed_strength"),
        ({"s_churn": 1}, "s_churn"),
        ({"eta": 0.5}, "eta 0.5 is not supported with Euler a: give 1"),
        ({"s_noise": 1.1}, "s_noise 1.1 is not supported with Euler a"),
        ({"sampler_name": "DPM fast"}, "/sdapi/v1/samplers"),
        ({"scheduler": "karras"}, "/sdapi/v1/schedulers"),
        ({"script_name": "X/Y/Z plot"}, "script_name"),
        ({"controlnet_units": [webuiapi.ControlNetUnit()], "alwayson_scripts": {}}, "/controlnet/model_list"),
        ({"override_settings": {"sd_model_checkpoint": "sdxl"}}, "model sdxl is not offered: take pocket"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "CLIP_stop_at_last_layers"),
    ],
)
def test_a_field_that_would_change_the_picture_is_refused_by_its_name(api, fields, words):
    with pytest.raises(RuntimeError) as refused:
        api.txt2img(**SMALL, **fields)
    status, text = refused.value.args
    assert status in (400, 404)
    assert words in text


def test_progress_works_skip_is_refused_and_interrupt_returns_finished_pictures(server, api, until):
    assert api.skip() == {}
    answers = []
    long = {**SMALL, "width": 128, "height": 128, "steps": 25, "n_iter": 4}
    thread = threading.Thread(target=lambda: answers.append(webuiapi.WebUIApi(port=server.port).txt2img(**long)))
    thread.start()
    until(lambda: api.get_progress()["progress"] > 0.3)
    assert api.get_progress()["state"]["sampling_steps"] == 25
    assert "interrupt" in api.skip()["error"]["message"]
    assert api.interrupt() == {}
    thread.join(60)
    assert 1 <= len(answers[0].images) < 4
    assert api.get_progress()["progress"] == 0


def test_options_can_be_sent_back_unchanged_and_choose_the_model(api):
    options = api.get_options()
    assert api.set_options(options) == {}
    assert api.get_options() == options
    api.util_set_model("Pocket")
    assert api.util_get_current_model() == "pocket"
    refused = api.set_options({"eta_noise_seed_delta": 1})
    assert refused["error"]["param"] == "eta_noise_seed_delta"


def test_lists_have_the_models_samplers_and_schedules_and_all_others_are_empty(api):
    assert api.util_get_model_names() == ["pocket"]
    assert {"Euler", "Euler a"} <= set(api.util_get_sampler_names())
    assert {"automatic", "simple"} <= set(api.util_get_scheduler_names())
    assert [lora["name"] for lora in api.get_loras()] == ["styles/bold"]
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos", "twice"]
    for look in (
        api.get_latent_upscale_modes, api.get_hypernetworks, api.get_face_restorers,
        api.get_realesrgan_models, api.get_prompt_styles, api.get_sd_vae,
    ):  # fmt: skip
        assert look() == []
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_cmd_flags() == {}
    assert api.refresh_checkpoints() is None
    memory = api.get_memory()
    assert 0 < memory["ram"]["free"] < memory["ram"]["total"] == memory["ram"]["free"] + memory["ram"]["used"]
    assert "/metrics" in memory["cuda"]["error"]


def test_the_request_of_a_picture_is_read_from_its_metadata(api):
    told = api.png_info(api.txt2img(**SMALL).image)
    # The package saves the picture anew with its text chunks.
    assert told.info.startswith("a red circle\nSteps: 2")
    assert told.parameters["seed"] == 7
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


def test_extras_return_the_picture_unchanged_or_enlarged(api):
    picture = Image.new("RGB", (16, 8), "teal")
    assert api.extra_single_image(picture).image.tobytes() == picture.tobytes()
    assert [image.size for image in api.extra_batch_images([picture, picture]).images] == [(16, 8)] * 2
    assert api.extra_single_image(picture, upscaler_1=webuiapi.Upscaler.Lanczos).image.size == (32, 16)
    assert api.extra_single_image(picture, upscaler_1="twice", upscaling_resize=4).image.size == (64, 32)
    with pytest.raises(RuntimeError, match=r"upscaler_1 LDSR is not known: take one of /sdapi/v1/upscalers"):
        api.extra_single_image(picture, upscaler_1=webuiapi.Upscaler.LDSR)
    with pytest.raises(RuntimeError, match="is not supported: give 0"):
        api.extra_batch_images([picture], gfpgan_visibility=1)


def test_interrogate_is_refused(api):
    with pytest.raises(RuntimeError, match="no model here describes pictures"):
        api.interrogate(Image.new("RGB", (8, 8)))


def test_a_key_is_the_password(tmp_path, start_server):
    from inkstream.serve.keys import add_key
    from inkstream.serve.limits import Settings

    key = add_key(tmp_path / "keys.json", "studio", 0.0)
    served = start_server(Settings(tmp_path, models=("pocket",)))
    try:
        api = webuiapi.WebUIApi(port=served.port, username="anyone", password=key)
        assert api.txt2img(**SMALL).image.size == (32, 32)
        api.set_auth("anyone", "another")
        with pytest.raises(RuntimeError, match="401"):
            api.txt2img(**SMALL)
        api.session.close()
    finally:
        served.stop()
