"""OpenAI's API through its Python package: generations, edits, streams and refusals."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import sys
import urllib.parse
import urllib.request
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from inkstream.engine.pictures.metadata import read_request
from inkstream.serve.api.openai import BODY, INSTEAD, REFUSED
from inkstream.serve.app import build
from inkstream.serve.keys import add_key
from inkstream.serve.limits import Limits, Settings
from inkstream.types import InputError

openai = pytest.importorskip("openai")
PROMPT = "a red circle"
SMALL = {"prompt": PROMPT, "size": "32x32", "model": "pocket"}
ONE_STEP = {"steps": 1, "seed": 7}
"""Fields of ours, for the package's `extra_body`."""


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0) as client:
        yield client


def opened(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content)))


def saved(image: Image.Image, name: str = "picture.png") -> tuple[str, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return name, buffer.getvalue()


@pytest.fixture(scope="module")
def circle() -> tuple[str, bytes]:
    return saved(Image.new("RGB", (48, 32), "orange"))


def test_generations_returns_pictures_of_the_requested_size_with_their_records(client, server):
    answer = client.images.generate(**SMALL, n=2, extra_body=ONE_STEP)
    assert [opened(one.b64_json).size for one in answer.data] == [(32, 32)] * 2
    assert (answer.size, answer.output_format, answer.background) == ("32x32", "png", "opaque")
    records = [one.inkstream for one in answer.data]
    assert [record["seed"] for record in records] == [7, 8]
    status, _, stored = server.ask("GET", records[0]["url"])
    assert (status, stored) == (200, base64.b64decode(answer.data[0].b64_json))


def test_it_draws_what_the_native_api_draws(client, server):
    own = server.ended(server.draw(seed=7))
    theirs = client.images.generate(**SMALL, extra_body=ONE_STEP)
    native = Image.open(io.BytesIO(server.ask("GET", own["pictures"][0]["url"])[2]))
    assert opened(theirs.data[0].b64_json).tobytes() == native.tobytes()


@pytest.mark.parametrize(("kind", "pillow"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_have_the_request_in_their_metadata_and_a_quality(client, tmp_path, kind, pillow):
    sizes = []
    for quality in (90, 5):
        answer = client.images.generate(**SMALL, output_format=kind, output_compression=quality, extra_body=ONE_STEP)
        data = base64.b64decode(answer.data[0].b64_json)
        sizes.append(len(data))
        assert Image.open(io.BytesIO(data)).format == pillow
    assert sizes[1] < sizes[0]
    (tmp_path / f"picture.{kind}").write_bytes(data)
    found = read_request(tmp_path / f"picture.{kind}").request
    assert (found.prompt, found.seed, found.steps) == (PROMPT, 7, 1)


def test_the_url_gives_the_picture_in_the_requested_format(client):
    answer = client.images.generate(**SMALL, response_format="url", output_format="webp", extra_body=ONE_STEP)
    assert answer.data[0].b64_json is None
    with urllib.request.urlopen(answer.data[0].url) as reply:
        assert reply.headers["Content-Type"] == "image/webp"
        assert Image.open(io.BytesIO(reply.read())).size == (32, 32)


def test_x_forwarded_proto_of_a_proxy_on_this_machine_makes_urls_https(tmp_path, start_server):
    key = add_key(tmp_path / "keys.json", "ann", 0.0)
    served = start_server(Settings(tmp_path, models=("pocket",)))
    headers = {"Authorization": f"Bearer {key}", "Host": "pictures.example.org", "X-Forwarded-Proto": "https"}
    body = {**SMALL, **ONE_STEP, "response_format": "url"}
    proxies = {"127.0.0.1": "https"}
    if sys.platform == "linux":  # has all of 127.0.0.0/8; of these, uvicorn trusts 127.0.0.1
        proxies["127.0.0.2"] = "http"
    for proxy, scheme in proxies.items():
        connection = http.client.HTTPConnection("127.0.0.1", served.port, source_address=(proxy, 0))
        with closing(connection):
            connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
            answer = json.loads(connection.getresponse().read())
        assert answer["data"][0]["url"].startswith(f"{scheme}://pictures.example.org/v1/images/")
    served.stop()


def test_an_edit_keeps_the_opaque_part_of_the_mask(client, circle):
    mask = Image.new("RGBA", (48, 32), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 48, 32))
    answer = client.images.edit(image=circle, mask=saved(mask), prompt=PROMPT, model="pocket", extra_body=ONE_STEP)
    image = opened(answer.data[0].b64_json)
    assert image.size == (48, 32)
    left, right = image.crop((0, 0, 16, 32)), image.crop((40, 0, 48, 32))
    assert left.getcolors() == [(512, (255, 165, 0))]
    assert right.getcolors() != [(256, (255, 165, 0))]


def test_without_a_mask_a_model_without_references_starts_from_the_one_picture(client, circle, server):
    answer = client.images.edit(image=[circle], prompt=PROMPT, model="pocket", extra_body={"strength": 0, **ONE_STEP})
    request = server.ask("GET", f"/v1/jobs/{answer.inkstream['job']}")[2]["request"]
    assert request["image"].startswith("upload:")
    assert request["strength"] == 0
    with pytest.raises(openai.BadRequestError, match="and no others: send one image") as refused:
        client.images.edit(image=[circle, circle], prompt=PROMPT, model="pocket")
    assert refused.value.param == "image"


def test_an_edit_in_json_takes_uploads_and_data_urls(server, circle):
    upload = server.ask("POST", "/v1/uploads", circle[1])[2]["id"]
    data = "data:image/png;base64," + base64.b64encode(circle[1]).decode()
    same = {"prompt": PROMPT, **ONE_STEP}
    answers = [
        server.ask("POST", "/v1/images/edits", {**same, "images": [image]})
        for image in ({"file_id": upload}, {"image_url": data})
    ]
    assert [status for status, _, _ in answers] == [200, 200]
    assert answers[0][2]["data"][0]["b64_json"] == answers[1][2]["data"][0]["b64_json"]


def test_events_have_partial_pictures_and_then_each_picture(client):
    told = list(client.images.generate(**SMALL, stream=True, partial_images=2, extra_body={"steps": 4, "seed": 7}))
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in told] == kinds
    assert [event.partial_image_index for event in told[:2]] == [0, 1]
    for event in told:
        image = opened(event.b64_json)
        assert (image.format, f"{image.width}x{image.height}") == ("PNG", event.size)
    assert told[2].size == "32x32"
    assert told[2].usage is None


def test_an_edit_is_streamed_under_its_own_names(client, circle):
    told = list(client.images.edit(image=circle, prompt=PROMPT, stream=True, output_format="jpeg", extra_body=ONE_STEP))
    assert [event.type for event in told] == ["image_edit.completed"]
    assert opened(told[0].b64_json).format == "JPEG"


def test_a_client_that_leaves_stops_its_drawing(client, server, until, caplog):
    body = {"prompt": PROMPT, "size": "256x256", "steps": 50}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    newest = lambda: server.ask("GET", "/v1/jobs?limit=1")[2]["jobs"][0]  # noqa: E731
    until(lambda: newest()["request"].get("steps") == 50 and newest()["state"] == "running")
    connection.close()
    until(lambda: newest()["state"] == "cancelled")
    events = client.images.generate(
        prompt=PROMPT, size="256x256", stream=True, partial_images=3, extra_body={"steps": 49}
    )
    next(iter(events))
    events.close()
    until(lambda: newest()["state"] == "cancelled" and newest()["request"]["steps"] == 49)
    assert "Exception" not in caplog.text  # a client that leaves is not an error


def test_a_stream_whose_job_another_client_cancels_ends_with_an_error(client, server, until):
    long = {"prompt": PROMPT, "size": "256x256", "stream": True, "partial_images": 3, "extra_body": {"steps": 48}}
    events = client.images.generate(**long)
    next(iter(events))
    (job,) = server.ask("GET", "/v1/queue")[2]["running"]
    server.ask("DELETE", f"/v1/jobs/{job['id']}")
    with pytest.raises(openai.APIError, match="another client cancelled the job"):
        list(events)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"size": "100x96"}, "size", "multiple of 16"),
        ({"size": "4096x4096"}, "size", "more than this server draws"),
        ({"size": "big"}, "size", "pattern"),
        ({"n": 9}, "n", "at most 8"),
        ({"n": 11}, "n", "10"),
        ({"quality": "ultra"}, "quality", "'low', 'medium', 'high'"),
        ({"background": "transparent"}, "background", "opaque: leave it out"),
        ({"style": "noir"}, "style", "'vivid' or 'natural'"),
        ({"frame_count": 4}, "frame_count", "animations are not drawn here: leave it out"),
        ({"svg": {"model": "x"}}, "svg", "made of pixels here: leave it out"),
        ({"output_format": "gif"}, "output_format", "animations are not drawn here: take png, jpeg or webp"),
        ({"extra_body": {"output_format": {"of": "gif"}}}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_format": "svg"}, "output_format", "made of pixels here: take png, jpeg or webp"),
        ({"extra_body": {"styles": "vivid"}}, "styles", "leave it out"),
        ({"output_compression": 50}, "output_compression", "jpeg or webp"),
        ({"partial_images": 1}, "partial_images", "stream"),
        ({"extra_body": {"num_inference_steps": 4}}, "num_inference_steps", "give steps instead"),
        ({"extra_body": {"width": 32}}, "width", "give size instead"),
        ({"extra_body": {"steps": 0}}, "steps", "greater"),
        ({"extra_body": {"steps": 51}}, "steps", "at most 50"),
    ],
)  # fmt: skip
def test_an_unsupported_value_is_refused_with_the_name_of_its_field(client, fields, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.images.generate(**{**SMALL, **fields})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


@pytest.mark.parametrize("name", ["image_generate_params.ImageGenerate", "image_edit_params.ImageEdit"])
def test_every_field_of_the_newest_package_is_declared_and_on_the_page(name):
    """Honoured, ignored or refused by name: none is unknown."""
    module, kind = name.split(".")
    theirs = getattr(import_module(f"openai.types.{module}"), f"{kind}ParamsBase").__annotations__.keys()
    declared = {*BODY.model_fields, *REFUSED, *INSTEAD, "image", "mask"}
    assert theirs <= declared
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    told = page.partition("## OpenAI API")[2].partition("\n## ")[0]
    assert [field for field in theirs if f"`{field}`" not in told and field not in ("prompt", "image", "mask")] == []


def test_a_model_that_is_not_offered_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="take pocket") as refused:
        client.images.generate(**{**SMALL, "model": "sdxl"})
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def steps_of(answer) -> list[int]:
    return [one.inkstream["request"]["steps"] for one in answer.data]


def test_quality_sets_the_steps_of_a_model_with_many_steps(client):
    same = {**SMALL, "extra_body": {"seed": 7}}
    own = steps_of(client.images.generate(**same))
    assert own == [16]
    for quality, steps in {
        "auto": 16,
        "standard": 16,
        "medium": 16,
        "low": 8,
        "high": 24,
        "hd": 24,
        "xhigh": 32,
        "max": 48,
    }.items():
        assert steps_of(client.images.generate(**same, quality=quality)) == [steps]
    raw = client.images.with_raw_response
    told = raw.generate(**SMALL, complexity="high", safety_identifier="anna", extra_body=ONE_STEP)
    assert told.headers["Inkstream-Ignored"] == "complexity"
    given = raw.generate(**SMALL, quality="hd", extra_body=ONE_STEP)
    assert given.headers["Inkstream-Ignored"] == "quality"
    assert steps_of(given.parse()) == [1]
    assert given.parse().inkstream["remarks"] == ["quality hd has no effect: steps were given"]


def test_fields_without_effect_are_listed_in_a_header(client):
    answer = client.images.with_raw_response.generate(**SMALL, style="vivid", quality="low", extra_body=ONE_STEP)
    assert answer.headers["Inkstream-Ignored"] == "quality, style"
    assert answer.headers["Inkstream-Model"] == "pocket"
    plain = client.images.with_raw_response.generate(
        **SMALL, quality="standard", background="opaque", moderation="low", output_compression=100, extra_body=ONE_STEP
    )
    assert "Inkstream-Ignored" not in plain.headers
    streamed = client.images.with_raw_response.generate(**SMALL, style="natural", stream=True, extra_body=ONE_STEP)
    assert streamed.headers["Inkstream-Ignored"] == "style"
    assert [event.type for event in streamed.parse()] == ["image_generation.completed"]


@pytest.mark.parametrize(
    "sent",
    [
        {"model": "dall-e-3", "quality": "hd", "style": "vivid", "size": "512x512", "prompt": PROMPT, "n": 1},
        {"model": "gpt-image-1", "prompt": PROMPT, "n": 1, "background": "auto", "output_format": "png",
         "quality": "auto", "size": "auto"},
    ],
)  # fmt: skip
def test_requests_of_librechats_tools_get_the_answers_they_expect(client, sent):
    (picture,) = client.images.generate(**sent).data
    if sent["model"] == "gpt-image-1":
        assert opened(picture.b64_json).size == (128, 128)
        return
    path = urllib.parse.urlsplit(picture.url).path
    assert path.endswith(".png")  # the program names its file after it
    with urllib.request.urlopen(picture.url) as reply:
        assert Image.open(io.BytesIO(reply.read())).size == (512, 512)


@pytest.mark.parametrize("name", ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1.5", "chatgpt-image-latest"])
def test_openais_model_names_mean_the_only_model(client, name):
    answer = client.images.with_raw_response.generate(**{**SMALL, "model": name}, extra_body=ONE_STEP)
    assert answer.headers["Inkstream-Model"] == "pocket"
    (picture,) = answer.parse().data
    if name.startswith("dall-e"):
        assert picture.b64_json is None
        assert re.search(r"/file\.png\?", picture.url)
        with urllib.request.urlopen(picture.url) as reply:
            assert Image.open(io.BytesIO(reply.read())).size == (32, 32)
    else:
        assert picture.url is None
        assert opened(picture.b64_json).size == (32, 32)


def test_an_alias_names_a_model_and_other_names_of_openais_are_refused(tmp_path, start_server, tiny_folder, until):
    models = ("pocket", f"turbo={tiny_folder}")
    settings = Settings(tmp_path, models=models, aliases=("dall-e-3=turbo", "house=pocket"))
    served = start_server(settings)
    until(lambda: served.service.models["turbo"].spec)
    with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{served.port}/v1", max_retries=0) as client:
        same = {"prompt": PROMPT, "size": "32x32", "response_format": "b64_json"}
        for name, model in {"dall-e-3": "turbo", "house": "pocket"}.items():
            answer = client.images.with_raw_response.generate(**same, model=name, quality="hd")
            assert answer.headers["Inkstream-Model"] == model
            ignored = "quality" if model == "turbo" else None  # it draws in few steps
            assert answer.headers.get("Inkstream-Ignored") == ignored
        with pytest.raises(openai.NotFoundError, match="take pocket, turbo, or start the server with --alias dall-e-2"):
            client.images.generate(**same, model="dall-e-2")
    served.stop()


def test_a_strict_server_knows_no_names_but_its_own(tmp_path, start_server):
    served = start_server(Settings(tmp_path, models=("pocket",), strict=True))
    with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{served.port}/v1", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="--alias gpt-image-1=MODEL"):
            client.images.generate(**{**SMALL, "model": "gpt-image-1"})
        assert client.images.generate(**SMALL, extra_body=ONE_STEP).data
    served.stop()


@pytest.mark.parametrize(
    ("alias", "words"),
    [
        ("dall-e-3", "write it as NAME=MODEL"),
        ("=pocket", "write it as NAME=MODEL"),
        ("dall-e-3=turbo", "take pocket"),
        ("pocket=pocket", "is already taken"),
    ],
)
def test_an_invalid_alias_is_refused_at_the_start(tmp_path, alias, words):
    with pytest.raises(InputError, match=words):
        build(Settings(tmp_path, models=("pocket",), aliases=(alias,)))


def test_a_wrong_key_a_used_up_quota_and_a_full_queue_raise_the_packages_errors(tmp_path, start_server):
    key = add_key(tmp_path / "keys.json", "somebody", 0.0, pictures_per_day=2)
    other = add_key(tmp_path / "keys.json", "other", 0.0)
    settings = Settings(tmp_path, models=("pocket",), limits=Limits(queue=1))
    served = start_server(settings, engine="input()")
    client = openai.OpenAI(api_key=key, base_url=f"http://127.0.0.1:{served.port}/v1", max_retries=0)
    with client, pytest.raises(openai.RateLimitError, match="2 pictures a day") as refused:
        client.images.generate(**SMALL, n=3)
    assert refused.value.code == "insufficient_quota"
    assert int(refused.value.response.headers["retry-after"]) > 0
    client = openai.OpenAI(api_key="guessed", base_url=client.base_url, max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="the key is not known") as refused:
        client.images.generate(**SMALL)
    assert refused.value.code == "invalid_api_key"
    headers = {"Authorization": f"Bearer {other}"}
    assert served.ask("POST", "/v1/jobs", {"prompt": PROMPT}, headers)[0] == 202
    client = openai.OpenAI(api_key=other, base_url=client.base_url, max_retries=0)
    with client, pytest.raises(openai.RateLimitError, match="queue is full"):
        client.images.generate(**SMALL)
    served.stop()


def test_an_upload_that_is_not_a_picture_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="not a picture") as refused:
        client.images.edit(image=("a.png", b"no picture"), prompt=PROMPT)
    assert (refused.value.code, refused.value.param) == ("invalid_image", "image")


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"prompt": "\\ud800"}', b"[" * 100_000, b"\xff"])
def test_a_body_that_is_not_a_json_object_is_refused(server, body):
    assert server.ask("POST", "/v1/images/generations", body)[0] == 400
    assert server.ask("POST", "/v1/images/edits", body)[0] == 400


@pytest.mark.parametrize("given", [{}, {"image_url": "/etc/passwd"}, {"file_id": "../x"}, {"image_url": "http://a/b"}])
def test_an_edit_takes_only_data_urls_and_uploads(server, given):
    status, _, answer = server.ask("POST", "/v1/images/edits", {"prompt": PROMPT, "images": [given]})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_models_are_listed_and_the_document_has_the_fields(client, server):
    assert [model.id for model in client.models.list()] == ["pocket"]
    paths = server.ask("GET", "/openapi.json")[2]["paths"]
    content = paths["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert {"prompt", "size", "steps", "seed", "image", "mask"} <= content["multipart/form-data"]["schema"][
        "properties"
    ].keys()
    assert not {"width", "count", "reference"} & content["application/json"]["schema"]["properties"].keys()
