"""The gallery and the models over HTTP, and their OpenAPI document."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import inkstream
from inkstream.engine.drawing.options import options
from inkstream.engine.drawing.writing import written_out
from inkstream.families import SPECS
from inkstream.serve.engines.models import offer
from inkstream.serve.limits import Settings
from inkstream.types import InputError, Request


@pytest.fixture(scope="module")
def drawn(server):
    """An ended job with two pictures."""
    return server.ended(server.draw(prompt="一只橘猫 and a Blue kite", count=2, seed=4242, width=64))


def png(server, picture) -> bytes:
    return server.ask("GET", picture["url"])[2]


def test_pictures_are_found_by_words_seed_model_and_date(server, drawn):
    a, b = drawn["pictures"]

    def found(query: str) -> list[str]:
        status, _, page = server.ask("GET", f"/v1/pictures?{query}")
        assert status == 200
        return [picture["id"] for picture in page["pictures"]]

    assert found("q=%E6%A9%98%E7%8C%AB") == [b["id"], a["id"]]
    assert found("q=blue%20KITE") == [b["id"], a["id"]]
    assert found("seed=4243") == [b["id"]]
    assert a["id"] in found("model=pocket&limit=500")
    assert found("model=other") == []
    assert found(f"until={a['created']}&seed=4243") == []
    assert found(f"since={b['created']}&seed=4243") == [b["id"]]
    page = server.ask("GET", "/v1/pictures?q=kite&limit=1")[2]
    assert (page["total"], page["pictures"][0]["id"]) == (2, b["id"])
    page = server.ask("GET", f"/v1/pictures?q=kite&limit=1&before={page['next']}")[2]
    assert page["pictures"][0]["id"] == a["id"]


def test_a_favourite_is_marked_and_a_deletion_is_undone(server, drawn):
    path = f"/v1/pictures/{drawn['pictures'][0]['id']}"
    assert server.ask("PATCH", path, {"favourite": True})[2]["favourite"]
    found = server.ask("GET", "/v1/pictures?favourite=true&q=kite")[2]
    assert [picture["id"] for picture in found["pictures"]] == [drawn["pictures"][0]["id"]]
    assert server.ask("PATCH", path, {"deleted": True})[2]["deleted"]
    assert server.ask("GET", "/v1/pictures?q=kite")[2]["total"] == 1
    assert server.ask("GET", "/v1/pictures?q=kite&deleted=true")[2]["total"] == 1
    back = server.ask("PATCH", path, {"deleted": False, "favourite": False})[2]
    assert (back["deleted"], back["favourite"]) == (False, False)
    assert server.ask("GET", "/v1/pictures?q=kite")[2]["total"] == 2


def test_a_thumbnail_is_made_once_and_not_sent_again_to_the_same_client(server, drawn):
    picture = drawn["pictures"][0]
    status, headers, data = server.ask("GET", picture["thumbnail"])
    assert (status, headers["content-type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(data)).size == (64, 32)
    assert "immutable" in headers["cache-control"]
    assert server.ask("GET", picture["thumbnail"], headers={"If-None-Match": headers["etag"]})[0] == 304
    assert server.ask("GET", picture["url"], headers={"If-None-Match": '"other"'})[0] == 200


def test_a_picture_whose_file_was_removed_is_not_found(server):
    picture = server.ended(server.draw())["pictures"][0]
    row = server.service.store.picture(picture["id"])
    (server.service.store.pictures / row.file).unlink()
    assert server.ask("GET", picture["url"])[0] == 404
    assert server.ask("GET", picture["thumbnail"])[0] == 404


def test_recall_reads_the_request_of_a_picture(server, drawn):
    status, _, found = server.ask("POST", "/v1/recall", png(server, drawn["pictures"][1]))
    assert (status, found["tool"], found["request"]["seed"]) == (200, "inkstream", 4243)
    assert found["request"] == drawn["pictures"][1]["request"]


def test_a_picture_of_this_server_recalls_its_start_picture_too(server, drawn):
    upload = server.ask("POST", "/v1/uploads", png(server, drawn["pictures"][0]))[2]
    done = server.ended(server.draw(image=f"upload:{upload['id']}", steps=1, strength=1.0))
    found = server.ask("POST", "/v1/recall", png(server, done["pictures"][0]))[2]
    assert found["request"]["image"] == f"upload:{upload['id']}"


def test_a_path_in_metadata_is_never_opened(server, tmp_path):
    from inkstream.engine.pictures.metadata import save_picture

    save_picture(Image.new("RGB", (16, 16)), tmp_path / "a.png", Request(prompt="x", image="/etc/passwd"))
    status, _, found = server.ask("POST", "/v1/recall", (tmp_path / "a.png").read_bytes())
    assert status == 200
    assert "image" not in found["request"]
    assert any("image" in line for line in found["remarks"])


def test_recall_refuses_other_files_and_pictures_without_a_request(server):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    assert server.ask("POST", "/v1/recall", buffer.getvalue())[0] == 404
    for path in ("/v1/recall", "/v1/uploads"):
        status, _, body = server.ask("POST", path, b"not a picture")
        assert status == 400
        assert "not a picture in a supported format" in body["error"]["message"]
        assert server.ask("POST", path, b"")[0] == 400


def test_an_upload_of_too_many_pixels_is_refused_from_its_header(server):
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 16000, 4000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    status, _, body = server.ask("POST", "/v1/uploads", b"\x89PNG\r\n\x1a\n" + chunk + b"\0" * 100)
    assert (status, body["error"]["code"]) == (400, "invalid_image")


def test_the_list_of_models_is_openais_with_details_of_ours(server):
    models = server.ask("GET", "/v1/models")[2]
    assert (models["object"], [m["id"] for m in models["data"]]) == ("list", ["pocket"])
    details = models["data"][0]["inkstream"]
    assert (details["licence"], details["commercial"], details["size"]) == ("apache-2.0", True, [128, 128])
    assert server.ask("GET", "/v1/models/pocket")[2]["id"] == "pocket"
    assert server.ask("GET", "/v1/models/gpt")[0] == 404


def test_the_form_has_each_field_with_its_effect_on_the_model(server):
    fields = {field["name"]: field for field in server.ask("GET", "/v1/models/pocket/form")[2]["fields"]}
    assert set(fields) == set(Request.model_fields) - {"model"}
    table = options(SPECS["pocket"])
    assert all(field["effect"] == table[name].effect for name, field in fields.items())
    assert (fields["width"]["type"], fields["width"]["default"], fields["width"]["step"]) == ("integer", 128, 16)
    assert (fields["steps"]["default"], fields["steps"]["maximum"]) == (16, 50)
    assert fields["solver"]["type"] == "choice"
    assert "heun" in fields["solver"]["choices"]
    assert (fields["reference"]["type"], fields["image"]["type"]) == ("pictures", "picture")
    assert fields["guidance"]["maximum"] == 100
    assert (fields["upsample"]["type"], fields["upsample"]["default"]) == ("boolean", True)  # its grammar writes


def test_a_local_copy_of_a_model_that_writes_prompts_out_has_the_same_form(tmp_path, start_server, until):
    folder = Path(inkstream.__file__).parent / str(SPECS["pocket"].folder)
    served = start_server(Settings(tmp_path, models=("pocket", f"copy={folder}"), preload=False))
    until(lambda: served.service.models["copy"].spec)
    form, copied = (served.ask("GET", f"/v1/models/{name}/form")[2]["fields"] for name in ("pocket", "copy"))
    assert [field for field in form if field["name"] == "upsample"] == [
        field for field in copied if field["name"] == "upsample"
    ]
    body = {"prompt": "a dragon and a red heart", "seed": 3}
    told = [served.ask("POST", "/v1/prompts", body | {"model": name})[2] for name in ("pocket", "copy")]
    assert told[0] == told[1]
    served.stop()


def test_the_prompts_route_gives_the_prompt_that_a_drawing_uses(server):
    body = {"prompt": "a dragon and a red heart", "negative_prompt": "blue", "seed": 3}
    status, _, answer = server.ask("POST", "/v1/prompts", body)
    request = Request.model_validate(body)
    assert (status, answer["told"]) == (200, written_out(request, SPECS["pocket"], Path()))
    assert answer["told"].startswith("a ")
    assert "red heart" in answer["told"]
    assert "dragon" in answer["notes"][0]
    job = server.ended(server.draw(**body))
    assert answer["notes"] == [line for line in job["remarks"] if line in answer["notes"]]


def test_the_words_of_a_lora_stay_in_the_prompt_that_is_told(server):
    body = {"prompt": "a zorp on a yellow background", "seed": 3}
    plain, kept = (server.ask("POST", "/v1/prompts", body | more)[2] for more in ({}, {"loras": ["styles/bold:0.8"]}))
    assert "zorp" not in plain["told"]
    assert "zorp" in plain["notes"][0]
    assert "zorp" in kept["told"]
    assert kept["notes"] == []


@pytest.mark.parametrize("asked", [{"upsample": False}, {"prompt": "a dragon", "upsample": False}])
def test_a_prompt_that_is_not_written_out_is_returned_unchanged(server, asked):
    body = {"prompt": "a red heart", **asked}
    assert server.ask("POST", "/v1/prompts", body)[2] == {"told": body["prompt"], "notes": []}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "gpt", "prompt": "x"}, 404, "model"),
        ({"prompt": "x" * 40_000}, 400, "prompt"),
        ({"negative_prompt": "x" * 40_000}, 400, "negative_prompt"),
        ({"prompt": "x", "seed": -1}, 400, "seed"),
        ({"prompt": "x", "steps": 3}, 400, "steps"),
        ({"prompt": "x", "loras": ["bold"]}, 404, "loras"),
        ({"prompt": "x", "loras": ["/etc/passwd"]}, 404, "loras"),
    ],
)
def test_a_prompt_that_cannot_be_written_out_is_refused(server, body, status, param):
    answered, _, answer = server.ask("POST", "/v1/prompts", body)
    assert (answered, answer["error"]["param"]) == (status, param)


def test_models_are_offered_by_name_or_path_and_no_others(tmp_path):
    (tmp_path / "my model").mkdir()
    models = offer(["pocket", str(tmp_path / "my model"), f"other={tmp_path / 'my model'}"])
    assert list(models) == ["pocket", "my-model", "other"]
    assert models["my-model"].spec is None
    assert next(iter(offer([]))) == "pocket"
    with pytest.raises(InputError, match="neither a known model nor a path"):
        offer(["no/such/model"])
    with pytest.raises(InputError, match="two models"):
        offer(["pocket", "pocket"])


@pytest.mark.slow
def test_a_model_from_a_folder_is_described_by_the_engine_and_draws(tmp_path, tiny_folder, start_server, until):
    from inkstream.serve.limits import Settings

    served = start_server(Settings(tmp_path, models=(f"tiny={tiny_folder}",), preload=False))
    until(lambda: served.service.models["tiny"].spec is not None)
    assert served.ask("GET", "/v1/models/tiny/form")[0] == 200
    job = served.draw(width=64, height=64)
    done = served.ended(job)
    assert (done["state"], done["request"]["model"]) == ("succeeded", "tiny")
    data = served.ask("GET", done["pictures"][0]["url"])[2]
    assert str(tiny_folder).encode() not in data
    served.stop()


def test_the_document_declares_a_success_and_the_errors_of_keys_and_no_422(server):
    document = server.ask("GET", "/openapi.json")[2]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = set(operation["responses"])
            assert "422" not in statuses, (method, path)
            assert any(status.startswith("2") for status in statuses)
            if path.startswith("/v1/"):
                assert {"401", "403"} <= statuses, (method, path)
    names = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(names) == len(set(names))


def test_unknown_paths_and_methods_and_invalid_json_get_errors_in_the_same_form(server):
    status, _, body = server.ask("GET", "/v1/nothing")
    assert (status, body["error"]["type"]) == (404, "not_found_error")
    assert server.ask("PUT", "/v1/jobs")[0] == 405
    status, _, body = server.ask("POST", "/v1/jobs", b"{", {"Content-Type": "application/json"})
    assert (status, body["error"]["code"]) == (400, "invalid_json")
    assert server.ask("GET", "/docs")[0] == 404  # its page would load scripts from elsewhere


def test_health_readiness_and_metrics_are_reported(server, until, drawn):
    assert server.ask("GET", "/healthz")[2]["status"] == "ok"
    assert server.ask("GET", "/readyz")[0] == 200
    text = server.ask("GET", "/metrics")[2].decode()
    for name in ("inkstream_queue_jobs", "inkstream_step_seconds_count", "inkstream_batch_size_bucket",
                 'inkstream_pictures_total{key="",model="pocket"}', 'inkstream_memory_bytes{kind="process"}',
                 'inkstream_stage_seconds_count{stage="draw"}', 'route="/v1/pictures"'):  # fmt: skip
        assert name in text, name


def test_the_servers_process_never_imports_torch(tmp_path):
    code = f"""
import sys
from pathlib import Path
from inkstream.serve.limits import Settings
from inkstream.serve.app import build
import inkstream.cli.serve, uvicorn
app = build(Settings(Path({str(tmp_path)!r})))
app.openapi()
from inkstream.serve.engines.models import form
for model in app.state.service.models.values():
    form(model, app.state.service.settings.limits)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("body", [{"paused": 0}, {"paused": "no"}, {"paused": None}, {}, {"paused": True, "now": True}])
def test_only_true_and_false_pause_the_queue(server, body):
    status, _, answer = server.ask("PATCH", "/v1/queue", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert server.ask("GET", "/v1/queue")[2]["paused"] is False
