"""A key has no access to another key's data: ann tries to reach bob's data through every route of the document.

Each route needs a case. After each case, bob's data must be unchanged. No answer to ann may contain an id or a word of
bob's that her request did not contain.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from unittest.mock import ANY
from urllib.parse import quote

import pytest
from PIL import Image
from starlette.routing import WebSocketRoute
from websockets.sync.client import connect

from conftest import write_lora_folder
from inkstream.serve.app import ROUTERS
from inkstream.serve.keys import add_key
from inkstream.serve.limits import Settings
from inkstream.types import Machine

TOKEN = "an idempotency key"
CLIENT = "client"
"""The client id of both keys at ComfyUI's WebSocket."""
EMPTY = ("/comfyui/history/{id}", "/comfyui/object_info/{name}")
"""Routes that answer 200 with an empty object for an unknown id, as ComfyUI does."""
SMALL = {"width": 32, "height": 32, "steps": 1, "model": "pocket"}
BOBS = {**SMALL, "prompt": "bobswords", "seed": 424242, "note": "a1111"}
"""The body of a waiting job of bob's. With this note, the job belongs to A1111's routes."""


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


def graph(image: str = "") -> dict[str, Any]:
    """ComfyUI's standard graph, from noise or from a picture."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "pocket"}),
        "2": ("CLIPTextEncode", {"text": "x", "clip": ["1", 1]}),
        "3": ("EmptyLatentImage", {"width": 32, "height": 32, "batch_size": 1}),
        "4": ("KSampler", {"model": ["1", 0], "seed": 1, "steps": 1, "cfg": 1, "sampler_name": "euler",
                           "scheduler": "simple", "positive": ["2", 0], "negative": ["2", 0],
                           "latent_image": ["6" if image else "3", 0], "denoise": 0.5 if image else 1}),
        "5": ("LoadImage", {"image": image}),
        "6": ("VAEEncode", {"pixels": ["5", 0], "vae": ["1", 2]}),
        "7": ("VAEDecode", {"samples": ["4", 0], "vae": ["1", 2]}),
        "8": ("SaveImage", {"images": ["7", 0], "filename_prefix": ""}),
    }  # fmt: skip
    return {id: {"class_type": kind, "inputs": inputs} for id, (kind, inputs) in nodes.items()}


def form(data: bytes) -> tuple[bytes, dict[str, str]]:
    """A picture as ComfyUI's clients send it: body and headers."""
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head + data + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


class World:
    """A server with a paused queue. bob has an ended job, a deleted picture, a waiting job and an upload."""

    def __init__(self, folder: Any, start_server: Any):
        limits = {"ann": {"queued": 50}, "bob": {"queued": 50}, "root": {"admin": True}}
        keys = {name: add_key(folder / "keys.json", name, 0.0, **more) for name, more in limits.items()}
        self.keys = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
        loras = write_lora_folder(folder / "loras")
        (loras / "styles" / "bold.png").write_bytes(picture("gold"))
        upscalers = folder / "upscalers"
        upscalers.mkdir()
        (upscalers / "dark.pth").write_bytes(b"dark")
        machine = Machine(lora_folder=str(loras), upscaler_folder=str(upscalers))
        self.served = start_server(Settings(folder, models=("pocket", "second=pocket"), machine=machine))
        self.sent = picture("teal")
        self.upload = self.bob("POST", "/v1/uploads", self.sent)["id"]
        self.graphed = self.bob("POST", "/comfyui/prompt", {"prompt": graph(), "client_id": CLIENT})["prompt_id"]
        while not self.bob("GET", f"/comfyui/history/{self.graphed}"):
            time.sleep(0.1)
        drawn = self.bob("POST", "/v1/jobs", {**BOBS, "image": f"upload:{self.upload}", "count": 2})
        while (drawn := self.bob("GET", f"/v1/jobs/{drawn['id']}"))["ended"] is None:
            time.sleep(0.1)
        assert drawn["state"] == "succeeded", drawn
        self.drawn = drawn["id"]
        self.picture, self.deleted = (one["id"] for one in drawn["pictures"])
        self.bob("PATCH", f"/v1/pictures/{self.picture}", {"favourite": True})
        self.bob("PATCH", f"/v1/pictures/{self.deleted}", {"deleted": True})
        self.file = self.bob("GET", f"/v1/pictures/{self.picture}/file")
        self.bob("POST", "/sdapi/v1/options", {"sd_model_checkpoint": "second"})
        self.ask("root", "PATCH", "/v1/queue", {"paused": True})
        self.waiting = self.bob("POST", "/v1/jobs", BOBS, {"Idempotency-Key": TOKEN})["id"]
        self.marks = {
            self.upload, self.graphed, self.drawn, self.waiting, "bobswords", "424242", "bob",
            *(word for one in drawn["pictures"] for word in (one["id"], one["sha256"])),
        }  # fmt: skip

    def ask(self, name: str, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
        """Status and body of a request with the key of that name."""
        status, _, answer = self.served.ask(method, path, body, {**self.keys[name], **(headers or {})})
        return status, answer

    def bob(self, method: str, path: str, body: Any = None, headers: Any = None) -> Any:
        """The body of a successful request by bob."""
        status, answer = self.ask("bob", method, path, body, headers)
        assert status < 300, answer
        return answer

    def ann(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
        """Status and body of a request by ann. Fails if the answer has data of bob's that the request did not have."""
        status, found, answer = self.served.ask(method, path, body, {**self.keys["ann"], **(headers or {})})
        given = path + (body.decode("latin-1") if isinstance(body, bytes) else json.dumps(body))
        told = (answer.decode("latin-1") if isinstance(answer, bytes) else json.dumps(answer)) + json.dumps(found)
        assert [mark for mark in self.marks if mark in told and mark not in given] == []
        return status, answer

    def refused(self, method: str, path: str, body: Any = None, headers: Any = None) -> None:
        """Check that ann gets the same 404 as for an id that never existed."""
        status, answer = self.ann(method, path, body, headers)
        assert status == 404
        for identity in (self.drawn, self.waiting, self.picture, self.deleted, self.upload):
            elsewhere = path.replace(identity, identity[0] + "0" * 20)
            if elsewhere != path:
                nothing = self.ann(method, elsewhere, body, headers)[1]
                assert json.dumps(answer).replace(identity, identity[0] + "0" * 20) == json.dumps(nothing)
        if method == "GET" and headers is None and not path.endswith("/events"):
            assert self.ask("bob", method, path)[0] == 200  # it exists

    def begin(self, name: str, path: str, body: Any, headers: Any = None) -> int:
        """The status of an answer that is a long stream. The client leaves at once."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=60)) as connection:
            sent = {"Content-Type": "application/json", **self.keys[name], **(headers or {})}
            connection.request("POST", path, json.dumps(body), sent)
            return connection.getresponse().status

    def socket(self, name: str) -> Any:
        """ComfyUI's WebSocket with the key of that name."""
        return connect(f"ws://127.0.0.1:{self.served.port}/comfyui/ws?clientId={CLIENT}",
                       additional_headers=self.keys[name])  # fmt: skip

    def forget(self, job: str) -> None:
        """Delete a job that bob added in one case, so that his data is as before."""
        with self.served.service.store._change() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (job,))

    def waits_of(self, name: str) -> list[dict[str, Any]]:
        return self.ask(name, "GET", "/v1/queue")[1]["queued"]

    def owned(self) -> Any:
        """All of bob's data."""
        paths = ("/v1/jobs", "/v1/pictures", "/v1/pictures?deleted=true", "/v1/queue", "/sdapi/v1/options",
                 "/sdapi/v1/progress")  # fmt: skip
        store = self.served.service.store
        known = store.uploaded("bob"), store.drawn_today("bob", time.time()), store.upload(self.upload)
        return [self.bob("GET", path) for path in paths], known


@pytest.fixture(scope="module")
def world(tmp_path_factory, start_server) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("isolation"), start_server)
    yield world
    world.served.stop()


@pytest.fixture(autouse=True)
def bobs_data_does_not_change(world):
    before = world.owned()
    yield
    for job in world.waits_of("ann"):
        world.ann("DELETE", f"/v1/jobs/{job['id']}")
    assert world.owned() == before


CASES: dict[str, Callable[[World], None]] = {}
"""Route of the document -> the case in which ann tries to reach bob's data through it."""


def case(*routes: str) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    def add(function: Callable[[World], None]) -> Callable[[World], None]:
        CASES.update(dict.fromkeys(routes, function))
        return function

    return add


@case("GET /healthz", "GET /readyz")
def open_paths_name_no_key(world: World) -> None:
    for path in ("/healthz", "/readyz"):
        assert world.ann("GET", path)[0] == 200


@case("GET /metrics")
def only_an_admin_reads_the_metrics(world: World) -> None:
    assert world.ann("GET", "/metrics")[0] == 403
    assert b'key="bob"' in world.ask("root", "GET", "/metrics")[1]


@case("POST /v1/session", "DELETE /v1/session")
def a_cookie_holds_the_key_it_was_made_with(world: World) -> None:
    status, found, _ = world.served.ask("POST", "/v1/session", None, world.keys["ann"])
    assert status == 204
    cookie = {"Cookie": found["set-cookie"].partition(";")[0]}
    assert world.served.ask("GET", f"/v1/jobs/{world.drawn}", None, cookie)[0] == 404
    assert world.served.ask("GET", "/v1/jobs", None, cookie)[2] == world.ann("GET", "/v1/jobs")[1]
    assert world.served.ask("DELETE", "/v1/session", None, cookie)[0] == 204
    assert world.ask("bob", "GET", "/v1/jobs")[0] == 200


@case("POST /v1/jobs")
def a_request_cannot_use_uploads_of_another_key(world: World) -> None:
    names = f"upload:{world.upload}"
    own = world.ann("POST", "/v1/uploads", picture("red"))[1]["id"]
    for given in ({"image": names}, {"reference": [names]}, {"image": f"upload:{own}", "mask": names},
                  {"image": f"upload:{own}", "reference": [f"upload:{own}", names]},
                  {"control": [names], "control_nets": ["x"]}):  # fmt: skip
        status, answer = world.ann("POST", "/v1/jobs", {**SMALL, "prompt": "x", **given})
        assert (status, answer["error"]["code"]) == (400, "no_upload")
    for given in (f"upload:{world.picture}", f"/v1/pictures/{world.picture}/file", world.upload):
        assert world.ann("POST", "/v1/jobs", {**SMALL, "prompt": "x", "image": given})[0] == 400
    body, token = {**SMALL, "prompt": "x"}, {"Idempotency-Key": TOKEN}
    status, job = world.ann("POST", "/v1/jobs", body, token)
    assert (status, job["key"], job["position"]) == (202, "ann", 0)  # bob's that waits is not counted
    assert world.ann("POST", "/v1/jobs", body, token)[1]["id"] == job["id"]
    assert world.ann("POST", "/v1/jobs", {**body, "prompt": "y"}, token)[0] == 409  # it is her own idempotency key


@case("GET /v1/jobs")
def jobs_are_listed_only_for_their_key(world: World) -> None:
    own = [world.ann("POST", "/v1/jobs", {**SMALL, "prompt": "x"})[1]["id"] for _ in range(2)]
    listed = world.ann("GET", "/v1/jobs?limit=500")[1]["jobs"]
    assert {job["key"] for job in listed} == {"ann"}
    for state in ("queued", "running", "succeeded", "failed", "cancelled"):
        assert {job["key"] for job in world.ann("GET", f"/v1/jobs?state={state}")[1]["jobs"]} <= {"ann"}
    page = world.ann("GET", "/v1/jobs?limit=1")[1]
    assert page["next"] == own[1]  # and not a number that counts the jobs of all
    assert world.ann("GET", f"/v1/jobs?limit=1&before={page['next']}")[1]["jobs"][0]["id"] == own[0]
    status, answer = world.ann("GET", f"/v1/jobs?before={world.drawn}")
    assert (status, answer["error"]["param"]) == (400, "before")


@case("GET /v1/jobs/{id}", "DELETE /v1/jobs/{id}", "GET /v1/jobs/{id}/events")
def a_job_exists_only_for_its_key(world: World) -> None:
    for job in (world.drawn, world.waiting):
        world.refused("GET", f"/v1/jobs/{job}")
        world.refused("DELETE", f"/v1/jobs/{job}")
        world.refused("GET", f"/v1/jobs/{job}/events")
        world.refused("GET", f"/v1/jobs/{job}/events", headers={"Last-Event-ID": "0" * 16 + "-" + "0" * 16})


@case("PATCH /v1/jobs/{id}")
def a_job_is_moved_only_by_its_key_and_among_its_own_jobs(world: World) -> None:
    world.refused("PATCH", f"/v1/jobs/{world.waiting}", {"priority": -5})
    world.refused("PATCH", f"/v1/jobs/{world.waiting}", {"before": None})
    own = world.ann("POST", "/v1/jobs", {**SMALL, "prompt": "x"})[1]["id"]
    world.refused("PATCH", f"/v1/jobs/{world.waiting}", {"before": own})
    for job in (world.waiting, world.drawn):
        status, answer = world.ann("PATCH", f"/v1/jobs/{own}", {"before": job})
        assert (status, answer["error"]["param"]) == (400, "before")


@case("GET /v1/events")
def events_are_sent_only_to_their_key(world: World) -> None:
    bobs = world.served.events("/v1/events", world.keys["bob"])
    seen, event, data = next(bobs)
    assert (event, data["job"]) == ("queued", world.waiting)
    bobs.close()
    for headers in ({}, {"Last-Event-ID": seen}):
        stream = world.served.events("/v1/events", {**world.keys["ann"], **headers})
        other = world.bob("POST", "/v1/jobs", BOBS)["id"]
        world.bob("DELETE", f"/v1/jobs/{other}")
        own = world.ann("POST", "/v1/jobs", {**SMALL, "prompt": "x"})[1]["id"]
        world.ann("DELETE", f"/v1/jobs/{own}")
        names = []
        for name, event, data in stream:
            assert data["job"] not in (other, world.waiting, world.drawn)
            names.append(name)
            if (event, data["job"]) == ("cancelled", own):
                break
        stream.close()
        numbers = [name.partition("-")[2] for name in names]
        assert len({len(number) for number in numbers}) == 1
        assert all(int(number, 16) > 2**32 for number in numbers)  # the ids do not show a count
        world.forget(other)


@case("GET /v1/queue")
def the_queue_has_only_ones_own_jobs(world: World) -> None:
    queue = world.ann("GET", "/v1/queue")[1]
    assert (queue["queued"], queue["running"], queue["eta"]) == ([], [], 0.0)
    own = [world.ann("POST", "/v1/jobs", {**SMALL, "prompt": "x"})[1]["id"] for _ in range(2)]
    queued = world.ann("GET", "/v1/queue")[1]["queued"]
    assert [(job["id"], job["position"]) for job in queued] == [(own[0], 0), (own[1], 1)]


@case("PATCH /v1/queue")
def only_an_admin_pauses_the_queue(world: World) -> None:
    assert world.ann("PATCH", "/v1/queue", {"paused": False})[0] == 403


@case("GET /v1/models", "GET /v1/models/{name}", "GET /v1/models/{name}/form")
def all_keys_see_the_models(world: World) -> None:
    for path in ("/v1/models", "/v1/models/pocket", "/v1/models/pocket/form"):
        status, answer = world.ann("GET", path)
        assert status == 200
        assert answer == world.ask("bob", "GET", path)[1]


@case("GET /v1/advice")
def advice_is_the_same_for_all_keys(world: World) -> None:
    assert world.ann("GET", "/v1/advice") == world.ask("bob", "GET", "/v1/advice")


@case("POST /v1/pictures/{id}/verify")
def a_picture_is_verified_only_for_its_key(world: World) -> None:
    for one in (world.picture, world.deleted):
        world.refused("POST", f"/v1/pictures/{one}/verify", {})


@case(
    "GET /v1/bakeoffs",
    "GET /v1/bakeoffs/{name}/vote",
    "GET /v1/bakeoffs/{name}/vote/{picture}",
    "POST /v1/bakeoffs/{name}/votes",
    "GET /v1/bakeoffs/{name}/report",
)
def bakeoffs_are_for_all_keys_and_lead_nowhere_else(world: World) -> None:
    """`test_serve_compare` tries a folder with a bake-off. Here is none."""
    assert world.ann("GET", "/v1/bakeoffs")[1] == {"data": []}
    for name in ("..", "../pictures", "uploads"):
        given = f"/v1/bakeoffs/{quote(name, safe='')}"
        assert world.ann("GET", f"{given}/vote")[0] == 404
        assert world.ann("POST", f"{given}/votes", b"{}")[0] == 404
        assert world.ann("GET", f"{given}/vote/{'0' * 16}.png")[0] == 404
        assert world.ann("GET", f"{given}/report")[0] == 404


@case("GET /v1/loras", "GET /v1/loras/{name}/preview")
def all_keys_see_the_loras_and_no_path(world: World) -> None:
    folder = world.served.service.settings.machine.lora_folder
    for path in ("/v1/loras", "/v1/loras/styles/bold/preview"):
        status, answer = world.ann("GET", path)
        assert status == 200
        assert answer == world.ask("bob", "GET", path)[1]
        assert folder not in str(answer)
    for name in ("../../uploads/" + world.upload, f"{folder}/styles/bold", "styles/../styles/bold", "bold", ""):
        for given in (name, quote(name, safe="")):
            assert world.ann("GET", f"/v1/loras/{given}/preview")[0] == 404
    assert world.served.ask("GET", "/v1/loras")[0] == 401
    assert world.served.ask("GET", "/v1/loras/styles/bold/preview")[0] == 401


@case("GET /v1/upscalers")
def all_keys_see_the_upscaling_models_and_no_path(world: World) -> None:
    status, answer = world.ann("GET", "/v1/upscalers")
    assert status == 200
    assert answer == world.ask("bob", "GET", "/v1/upscalers")[1] == {"data": [{"name": "dark", "bytes": 4}]}
    assert world.served.ask("GET", "/v1/upscalers")[0] == 401


@case(
    "GET /v1/controls",
    "GET /v1/maps",
    "POST /controlnet/detect",
    *(f"GET /controlnet/{name}" for name in ("version", "settings", "model_list", "module_list", "control_types")),
)
def all_keys_see_the_control_nets_and_the_maps_and_no_path(world: World) -> None:
    own = base64.b64encode(picture("red")).decode()
    for route in [route for route, function in CASES.items() if function.__name__.startswith("all_keys_see_the_cont")]:
        method, _, path = route.partition(" ")
        body = {"controlnet_input_images": [own]} if method == "POST" else None
        status, answer = world.ann(method, path, body)
        assert status == 200
        assert answer == world.ask("bob", method, path, body)[1]
        assert str(world.served.service.settings.data) not in str(answer)
        assert world.served.ask(method, path, body)[0] == 401
    for given in (f"upload:{world.upload}", world.upload, f"/v1/pictures/{world.picture}/file"):
        assert world.ann("POST", "/controlnet/detect", {"controlnet_input_images": [given]})[0] == 400


@case("POST /v1/maps")
def a_map_is_not_drawn_of_an_upload_of_another_key(world: World) -> None:
    status, answer = world.ann("POST", "/v1/maps", {"map": "grey", "picture": f"upload:{world.upload}"})
    assert (status, answer["error"]["code"]) == (400, "no_upload")
    for given in (world.upload, f"/v1/pictures/{world.picture}/file"):
        assert world.ann("POST", "/v1/maps", {"map": "grey", "picture": given})[0] == 400
    sent = "data:image/png;base64," + base64.b64encode(world.sent).decode()
    status, own = world.ann("POST", "/v1/maps", {"map": "grey", "picture": sent})
    assert status == 201
    assert world.ask("bob", "GET", f"/v1/uploads/{own['id']}")[0] == 404


@case("GET /v1/pictures")
def a_search_finds_and_counts_only_ones_own_pictures(world: World) -> None:
    for query in ("", "q=bobswords", "q=424242", "seed=424242", "model=pocket", "favourite=true", "deleted=true",
                  "offset=1", "limit=1", "since=0", "until=9999999999"):  # fmt: skip
        status, found = world.ann("GET", f"/v1/pictures?{query}")
        assert (status, found) == (200, {"pictures": [], "next": None, "total": 0})
    for one in (world.picture, world.deleted):
        status, answer = world.ann("GET", f"/v1/pictures?before={one}")
        assert (status, answer["error"]["param"]) == (400, "before")
    assert world.bob("GET", "/v1/pictures?limit=1")["next"] == world.picture


@case(
    "GET /v1/pictures/{id}", "PATCH /v1/pictures/{id}", "GET /v1/pictures/{id}/file", "GET /v1/pictures/{id}/thumbnail",
    "GET /v1/images/{id}/file.{output_format}",
)  # fmt: skip
def a_picture_exists_only_for_its_key(world: World) -> None:
    tags = {"If-None-Match": ", ".join(f'"{mark}", "{mark}-256"' for mark in world.marks if len(mark) == 64)}
    for one in (world.picture, world.deleted):
        world.refused("GET", f"/v1/pictures/{one}")
        for body in ({"favourite": False}, {"deleted": True}, {"deleted": False}):
            world.refused("PATCH", f"/v1/pictures/{one}", body)
        for path in (
            f"/v1/pictures/{one}/file",
            f"/v1/pictures/{one}/thumbnail",
            f"/v1/images/{one}/file.png",
            f"/v1/images/{one}/file.webp",
        ):
            world.refused("GET", path)
            world.refused("GET", path, headers=tags)  # not even 304


@case("POST /v1/uploads", "GET /v1/uploads/{id}")
def keys_do_not_share_uploads(world: World) -> None:
    status, own = world.ann("POST", "/v1/uploads", world.sent)
    assert status == 201
    assert own["id"] != world.upload
    world.refused("GET", f"/v1/uploads/{world.upload}")
    world.refused("GET", f"/v1/uploads/{world.upload}", headers={"If-None-Match": f'"{world.upload}"'})
    assert world.ann("GET", f"/v1/uploads/{own['id']}") == (200, world.sent)


@case("POST /v1/recall", "POST /sdapi/v1/png-info")
def recall_of_another_keys_picture_gives_only_its_metadata(world: World) -> None:
    assert f"upload:{world.upload}" in json.dumps(world.bob("POST", "/v1/recall", world.file))
    status, found = world.ask("ann", "POST", "/v1/recall", world.file)
    assert (status, found["request"]["prompt"]) == (200, "bobswords")  # the file's metadata has it
    assert world.upload not in json.dumps(found)
    encoded = base64.b64encode(world.file).decode()
    status, found = world.ask("ann", "POST", "/sdapi/v1/png-info", {"image": encoded})
    assert status == 200
    assert world.upload not in json.dumps(found)


@case("POST /v1/prompts")
def a_written_out_prompt_is_the_same_for_all_keys(world: World) -> None:
    body = {"model": "pocket", "prompt": "a red heart and a dragon", "seed": 3}
    status, told = world.ann("POST", "/v1/prompts", body)
    assert status == 200
    assert told == world.ask("bob", "POST", "/v1/prompts", body)[1]


@case("POST /v1/images/generations")
def keys_do_not_share_idempotency_keys_of_generations(world: World) -> None:
    body = {"prompt": "x", "model": "pocket", "size": "32x32", "steps": 1, "stream": True}
    assert world.begin("ann", "/v1/images/generations", body, {"Idempotency-Key": TOKEN + "2"}) == 200
    newest = world.ann("GET", "/v1/jobs?limit=1")[1]["jobs"][0]
    assert newest["key"] == "ann"
    assert world.begin("ann", "/v1/images/generations", body, {"Idempotency-Key": TOKEN}) in (200, 409)  # her own
    for name in ("image", "mask", "reference"):
        assert world.ann("POST", "/v1/images/generations", {**body, name: f"upload:{world.upload}"})[0] == 400


@case("POST /v1/images/edits")
def an_edit_cannot_use_uploads_of_another_key(world: World) -> None:
    body = {"prompt": "x", "model": "pocket", "size": "32x32", "steps": 1}
    own = {"file_id": world.ann("POST", "/v1/uploads", picture("red"))[1]["id"]}
    for theirs in ({"file_id": world.upload}, {"image_url": f"upload:{world.upload}"}, {"file_id": world.picture}):
        for given in ({"images": [theirs]}, {"images": [own], "mask": theirs}):
            status, answer = world.ann("POST", "/v1/images/edits", {**body, **given})
            assert (status, answer["error"]["code"]) == (400, "no_upload")


@case("POST /sdapi/v1/txt2img", "POST /sdapi/v1/interrupt", "GET /sdapi/v1/progress")
def progress_and_interrupt_concern_only_ones_own_drawings(world: World) -> None:
    assert world.ann("GET", "/sdapi/v1/progress")[1]["state"]["job"] == ""
    assert world.ann("POST", "/sdapi/v1/interrupt")[0] == 200
    assert world.bob("GET", f"/v1/jobs/{world.waiting}")["state"] == "queued"
    answers = []
    body = {"prompt": "x", "steps": 1, "width": 32, "height": 32}
    asking = threading.Thread(target=lambda: answers.append(world.ann("POST", "/sdapi/v1/txt2img", body)))
    asking.start()
    while not (own := world.waits_of("ann")):
        time.sleep(0.05)
    state = world.ann("GET", "/sdapi/v1/progress")[1]["state"]
    assert (state["job"], state["job_count"]) == (own[0]["id"], 1)
    assert world.bob("GET", "/sdapi/v1/progress")["state"]["job"] == world.waiting
    world.ann("POST", "/sdapi/v1/interrupt")
    asking.join(60)
    assert [(status, answer["images"]) for status, answer in answers] == [(200, [])]


@case("POST /sdapi/v1/img2img")
def img2img_cannot_use_uploads_of_another_key(world: World) -> None:
    for given in (f"upload:{world.upload}", world.upload, world.picture, f"/v1/pictures/{world.picture}/file"):
        body = {"prompt": "x", "init_images": [given], "steps": 1, "width": 32, "height": 32}
        assert world.ann("POST", "/sdapi/v1/img2img", body)[0] == 400


@case("GET /sdapi/v1/options", "POST /sdapi/v1/options")
def each_key_chooses_its_own_model(world: World) -> None:
    assert world.bob("GET", "/sdapi/v1/options")["sd_model_checkpoint"] == "second"
    assert world.ann("GET", "/sdapi/v1/options")[1]["sd_model_checkpoint"] == "pocket"
    assert world.ann("POST", "/sdapi/v1/options", {"sd_model_checkpoint": "pocket"})[0] == 200


@case(*(f"GET /sdapi/v1/{name}" for name in (
    "samplers", "schedulers", "sd-models", "loras", "upscalers", "sd-vae", "sd-modules", "hypernetworks",
    "face-restorers", "realesrgan-models", "prompt-styles", "latent-upscale-modes", "embeddings", "scripts",
    "script-info", "extensions", "cmd-flags",
)), *(f"POST /sdapi/v1/refresh-{name}" for name in ("checkpoints", "loras", "vae")), "GET /comfyui/object_info",
      "GET /comfyui/object_info/{name}")  # fmt: skip
def all_keys_see_the_lists(world: World) -> None:
    for route in [route for route, function in CASES.items() if function is all_keys_see_the_lists]:
        method, _, path = route.replace("{name}", "LoadImage").partition(" ")
        status, answer = world.ann(method, path)
        assert status == 200
        assert answer == world.ask("bob", method, path)[1]
    assert world.ann("GET", "/comfyui/object_info")[1]["LoadImage"]["input"]["required"]["image"] == [[]]


@case("GET /sdapi/v1/memory")
def memory_is_that_of_the_machine(world: World) -> None:
    status, answer = world.ann("GET", "/sdapi/v1/memory")
    assert (status, {*answer}) == (200, {"ram", "cuda"})


@case("POST /sdapi/v1/skip")
def skip_ignores_drawings_of_another_key(world: World) -> None:
    assert world.ann("POST", "/sdapi/v1/skip") == (200, {})
    assert world.ask("bob", "POST", "/sdapi/v1/skip")[0] == 400  # bob's waits


@case("POST /sdapi/v1/interrogate", "POST /sdapi/v1/extra-single-image", "POST /sdapi/v1/extra-batch-images")
def extras_cannot_use_uploads_of_another_key(world: World) -> None:
    for given in (f"upload:{world.upload}", world.upload, world.picture, f"/v1/pictures/{world.picture}/file"):
        for path, body in (
            ("extra-single-image", {"image": given}),
            ("extra-batch-images", {"imageList": [{"data": given, "name": "x"}]}),
            ("interrogate", {"image": given}),
        ):
            assert world.ann("POST", f"/sdapi/v1/{path}", body)[0] == 400
    own = base64.b64encode(picture("red")).decode()
    assert world.ann("POST", "/sdapi/v1/extra-single-image", {"image": own})[1]["image"] == own


@case("POST /comfyui/prompt")
def a_graph_cannot_use_uploads_of_another_key_and_its_number_counts_only_own_jobs(world: World) -> None:
    for given in (world.upload, f"upload:{world.upload}", world.picture, f"/v1/pictures/{world.picture}/file"):
        assert world.ann("POST", "/comfyui/prompt", {"prompt": graph(given)})[0] == 400
    own = world.ann("POST", "/comfyui/api/upload/image", *form(picture("red")))[1]["name"]
    status, accepted = world.ann("POST", "/comfyui/prompt", {"prompt": graph(own)})
    assert (status, accepted["number"]) == (200, 0)  # bob's that waits is not counted, nor those before
    assert world.ann("POST", "/comfyui/prompt", {"prompt": graph()})[1]["number"] == 1
    assert {job["id"] for job in world.waits_of("ann")} >= {accepted["prompt_id"]}


@case("POST /comfyui/api/upload/image")
def keys_do_not_share_uploads_of_comfyui(world: World) -> None:
    status, own = world.ann("POST", "/comfyui/api/upload/image", *form(world.sent))
    assert status == 200
    assert own["name"] != world.upload
    assert world.ann("GET", f"/v1/uploads/{own['name']}") == (200, world.sent)


@case("GET /comfyui/history/{id}")
def a_history_exists_only_for_its_key(world: World) -> None:
    assert world.graphed in world.bob("GET", f"/comfyui/history/{world.graphed}")
    for job in (world.graphed, world.drawn, world.waiting, "j" + "0" * 20):
        assert world.ann("GET", f"/comfyui/history/{job}") == (200, {})


@case("GET /comfyui/view")
def a_file_is_sent_only_to_its_key(world: World) -> None:
    for one in (world.picture, world.deleted):
        for kind in ("output", "temp"):
            world.refused("GET", f"/comfyui/view?filename={one}.png&type={kind}")
    for path in (
        "../inkstream.db",
        "../keys.json",
        f"../uploads/{world.upload}.png",
        f"../pictures/{world.picture}.png",
    ):
        for query in (f"filename={path}", f"filename={world.picture}.png&subfolder={path}/.."):
            assert world.ann("GET", f"/comfyui/view?{query}")[0] == 404


@case("WS /comfyui/ws")
def a_websocket_gets_only_messages_of_its_key(world: World) -> None:
    with world.socket("bob") as bobs, world.socket("ann") as anns:  # both call themselves the same
        status = json.loads(bobs.recv(timeout=10))["data"]["status"]
        assert status["exec_info"]["queue_remaining"] == len(world.waits_of("bob")) == 1
        assert json.loads(anns.recv(timeout=10))["data"]["status"]["exec_info"]["queue_remaining"] == 0
        accepted = {name: world.ask(name, "POST", "/comfyui/prompt", {"prompt": graph(), "client_id": CLIENT})[1]
                    for name in ("bob", "ann")}  # fmt: skip
        for name in ("bob", "ann"):
            world.ask(name, "DELETE", f"/v1/jobs/{accepted[name]['prompt_id']}")
        for name, socket in (("bob", bobs), ("ann", anns)):
            kinds, prompts = [], set()
            while kinds[-1:] != ["execution_interrupted"]:
                message = json.loads(socket.recv(timeout=10))
                kinds.append(message["type"])
                prompts.add(message["data"]["prompt_id"])
            assert prompts == {accepted[name]["prompt_id"]}
        assert json.loads(anns.recv(timeout=10))["data"]["node"] is None
        with pytest.raises(TimeoutError):
            anns.recv(timeout=0.5)
    world.forget(accepted["bob"]["prompt_id"])


def routes_of(world: World) -> list[str]:
    """All operations of the document, and all WebSockets, which OpenAPI cannot describe."""
    paths = world.served.ask("GET", "/openapi.json")[2]["paths"]
    sockets = [f"WS {route.path}" for router in ROUTERS for route in router.routes
               if isinstance(route, WebSocketRoute)]  # fmt: skip
    return [f"{method.upper()} {path}" for path, operations in paths.items() for method in operations] + sockets


def test_every_route_has_a_case(world):
    assert {*routes_of(world)} == {*CASES}


@pytest.mark.parametrize("route", CASES)
def test_a_key_gets_nothing_of_another_key(world, route):
    CASES[route](world)


def test_no_route_finds_the_ids_of_another_key(world):
    for route in [route for route in routes_of(world) if "{" in route]:
        method, _, path = route.partition(" ")
        for identity in (world.drawn, world.waiting, world.picture, world.deleted, world.upload):
            body = None if method in ("GET", "DELETE") else {}
            named = path.replace("{id}", identity).replace("{name}", identity).replace("{output_format}", "png")
            nothing = (200, {}) if path in EMPTY else (404, {"error": ANY})
            assert world.ann(method, named, body) == nothing


def test_a_signed_link_ends_with_its_time_and_with_its_picture(world):
    served, path = world.served, f"/v1/images/{world.picture}/file.png"
    link = served.service.jobs.signed(path)
    assert served.ask("GET", link)[2] == world.file
    assert served.ask("GET", served.service.jobs.signed(path, seconds=-1))[0] == 401
    signature = link.partition("?")[2]
    for other in (f"/v1/images/{world.deleted}/file.png", f"/v1/images/{world.picture}/file.webp",
                  f"/v1/pictures/{world.picture}/file", f"/v1/jobs/{world.drawn}",
                  "/v1/jobs", "/v1/pictures", "/v1/queue", "/metrics"):  # fmt: skip
        assert served.ask("GET", f"{other}?{signature}")[0] == 401
    for method in ("POST", "PATCH", "DELETE", "PUT"):
        assert served.ask(method, link)[0] == 401
    assert served.ask("GET", served.service.jobs.signed(f"/v1/images/{world.deleted}/file.png"))[0] == 404
    for other in (f"/v1/pictures/{world.deleted}", "/metrics"):  # even where one was made for such a path
        assert served.ask("GET", served.service.jobs.signed(other))[0] in (403, 404)
    world.bob("PATCH", f"/v1/pictures/{world.picture}", {"deleted": True})
    assert served.ask("GET", link)[0] == 404
    world.bob("PATCH", f"/v1/pictures/{world.picture}", {"deleted": False})
    assert served.ask("GET", link)[0] == 200
