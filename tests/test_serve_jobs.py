"""Jobs over HTTP: they are accepted, drawn by the real engine, reported as events, and end once."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from inkstream.engine.pictures.metadata import read_request


def test_a_job_is_accepted_drawn_and_kept_with_its_request(server):
    job = server.draw(seed=7)
    assert job["state"] in ("queued", "running")
    done = server.ended(job)
    assert (done["state"], done["error"]) == ("succeeded", None)
    picture = done["pictures"][0]
    assert (picture["width"], picture["height"], picture["seed"], picture["model"]) == (32, 32, 7, "pocket")
    status, headers, data = server.ask("GET", picture["url"])
    assert (status, headers["content-type"]) == (200, "image/png")
    assert len(data) == picture["bytes"]
    assert Image.open(io.BytesIO(data)).size == (32, 32)


def test_a_picture_carries_the_same_metadata_as_one_of_the_command_line(server, tmp_path):
    from inkstream.cli import main

    own = tmp_path / "own.png"
    words = ["a red circle", "--width=32", "--height=32", "--steps=1", "--seed=7", f"--output={own}", "--quiet"]
    assert main(["generate", *words]) == 0
    done = server.ended(server.draw(seed=7))
    data = server.ask("GET", done["pictures"][0]["url"])[2]
    assert Image.open(io.BytesIO(data)).text == Image.open(own).text  # type: ignore[attr-defined]
    assert Image.open(io.BytesIO(data)).tobytes() == Image.open(own).tobytes()
    (tmp_path / "other.png").write_bytes(data)
    assert read_request(tmp_path / "other.png").request == read_request(own).request


def test_a_seed_is_drawn_when_the_job_is_accepted(server):
    job = server.draw()
    assert server.ended(job)["pictures"][0]["seed"] == job["request"]["seed"]


def test_events_have_steps_with_previews_pictures_and_the_end(server):
    job = server.draw(steps=40, count=2)  # so many that the listener is there before the end, on fast machines too
    told = list(server.events(f"/v1/jobs/{job['id']}/events"))
    names = [name for _, name, _ in told]
    assert names[-1] == "succeeded"
    assert names.count("picture") == 2
    last = [data for _, name, data in told if name == "step"][-1]
    assert (last["picture"], last["of"], last["step"], last["steps"]) == (1, 2, 40, 40)
    assert last["preview"].startswith("data:image/jpeg;base64,")
    assert told[-1][2]["pictures"] == [data for _, name, data in told if name == "picture"]


def test_events_of_an_ended_job_are_its_pictures_and_its_end(server):
    done = server.ended(server.draw())
    names = [name for _, name, _ in server.events(f"/v1/jobs/{done['id']}/events")]
    assert names == ["picture", "succeeded"]


def test_a_client_that_reconnects_gets_only_the_missed_events(server):
    job = server.draw(steps=40, count=2)
    told = list(server.events(f"/v1/jobs/{job['id']}/events"))
    first = next(identity for identity, name, _ in told if name == "picture")
    again = list(server.events(f"/v1/jobs/{job['id']}/events", {"Last-Event-ID": first}))
    lasting = [event for event in told if event[1] in ("picture", "succeeded")]
    assert again == lasting[1:]
    end = list(server.events(f"/v1/jobs/{job['id']}/events", {"Last-Event-ID": told[-1][0]}))
    assert end[-1][1] == "succeeded"


def test_the_stream_of_everything_names_the_job_of_each_event(server, until):
    events = server.events("/v1/events")
    server.ask("PATCH", "/v1/queue", {"paused": True})
    assert next(events)[1:] == ("queue", {"job": "", "paused": True})
    server.ask("PATCH", "/v1/queue", {"paused": False})
    job = server.draw()
    seen = []
    for _, name, data in events:
        if data["job"] == job["id"]:
            seen.append(name)
        if name == "succeeded":
            break
    assert seen[-2:] == ["picture", "succeeded"]
    events.close()


def test_the_same_idempotency_key_gives_the_same_job_and_another_body_is_a_conflict(server):
    body = {"prompt": "a blue square", "width": 32, "height": 32, "steps": 1}
    first = server.ask("POST", "/v1/jobs", body, {"Idempotency-Key": "once"})[2]
    status, _, second = server.ask("POST", "/v1/jobs", body, {"Idempotency-Key": "once"})
    assert (status, second["id"]) == (202, first["id"])
    status, _, error = server.ask("POST", "/v1/jobs", {**body, "steps": 2}, {"Idempotency-Key": "once"})
    assert (status, error["error"]["type"]) == (409, "conflict_error")
    server.ended(first)


def test_a_paused_queue_starts_no_job_and_can_be_reordered(server):
    server.ask("PATCH", "/v1/queue", {"paused": True})
    try:
        a, b, c = (server.draw(note=name) for name in "abc")
        queue = server.ask("GET", "/v1/queue")[2]
        assert queue["paused"]
        assert [job["note"] for job in queue["queued"]] == ["a", "b", "c"]
        assert server.ask("PATCH", f"/v1/jobs/{c['id']}", {"before": a["id"]})[2]["position"] == 0
        assert server.ask("PATCH", f"/v1/jobs/{a['id']}", {"before": None})[2]["position"] == 2
        assert server.ask("PATCH", f"/v1/jobs/{a['id']}", {"priority": 5})[2]["position"] == 0
        queue = server.ask("GET", "/v1/queue")[2]["queued"]
        assert [job["note"] for job in queue] == ["a", "c", "b"]
        status, _, cancelled = server.ask("DELETE", f"/v1/jobs/{b['id']}")
        assert (status, cancelled["state"]) == (200, "cancelled")
    finally:
        server.ask("PATCH", "/v1/queue", {"paused": False})
    done = [server.ended(job) for job in (a, c)]
    assert [job["state"] for job in done] == ["succeeded", "succeeded"]
    assert done[0]["started"] < done[1]["started"]
    assert server.ask("PATCH", f"/v1/jobs/{a['id']}", {"priority": 1})[0] == 409


def test_a_cancelled_running_job_stops_and_keeps_its_pictures(server):
    job = server.draw(steps=20, count=8, width=128, height=128)
    for _, name, _ in server.events(f"/v1/jobs/{job['id']}/events"):
        if name == "picture":
            server.ask("DELETE", f"/v1/jobs/{job['id']}")
    ended = server.ended(job)
    assert ended["state"] == "cancelled"
    assert 1 <= len(ended["pictures"]) < 8
    after = server.ended(server.draw())  # its slot is free again
    assert after["state"] == "succeeded"
    assert server.ask("GET", f"/v1/jobs/{job['id']}")[2] == ended


def test_cancelling_an_ended_job_changes_nothing(server):
    done = server.ended(server.draw())
    assert server.ask("DELETE", f"/v1/jobs/{done['id']}")[2] == done


def test_a_grid_is_one_job_with_a_picture_for_each_pair(server):
    grid = {"x": {"field": "steps", "values": [1, 2]}, "y": {"field": "seed", "values": [5, 6]}}
    done = server.ended(server.draw(grid=grid))
    cells = {tuple(p["cell"]): (p["request"]["steps"], p["seed"]) for p in done["pictures"]}
    assert cells == {(0, 0): (1, 5), (1, 0): (2, 5), (0, 1): (1, 6), (1, 1): (2, 6)}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"width": 33}, "width"),
        ({"width": 1024, "height": 1024}, "width"),
        ({"steps": 51}, "steps"),
        ({"count": 9}, "count"),
        ({"guidance": -1}, "guidance"),
        ({"sampler": "euler"}, "sampler"),
        ({"solver": "magic"}, "solver"),
        ({"model": "/etc/passwd"}, "model"),
        ({"model": "z-image"}, "model"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": "file:///etc/passwd"}, "image"),
        ({"image": "http://127.0.0.1/x.png"}, "image"),
        ({"image": "upload:u00"}, "image"),
        ({"image": "data:image/png;base64,aGVsbG8="}, "image"),
        ({"priority": 11}, "priority"),
        ({"grid": {"x": {"field": "image", "values": ["a"]}}}, "grid"),
        ({"grid": {"x": {"field": "steps", "values": ["many"]}}}, "grid"),
        ({"grid": {"x": {"field": "seed", "values": [1, 2, 3]}, "y": {"field": "steps", "values": [1, 2, 3]}}}, "grid"),
        ({"seed": 2**63 - 1, "count": 2}, "seed"),
    ],
)
def test_an_invalid_field_is_refused_by_its_name(server, change, param):
    body = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 1, **change}
    status, _, answer = server.ask("POST", "/v1/jobs", body)
    assert status == (404 if param == "model" else 400)
    assert answer["error"]["param"] == param
    assert answer["error"]["message"].count("\n") == 0


def test_a_start_picture_is_used_and_leaves_no_path_in_the_metadata(server):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    status, _, upload = server.ask("POST", "/v1/uploads", buffer.getvalue())
    assert (status, upload["width"], upload["type"]) == (201, 32, "image/png")
    assert server.ask("POST", "/v1/uploads", buffer.getvalue())[2] == upload
    done = server.ended(server.draw(image=f"upload:{upload['id']}", strength=0.5, steps=2))
    assert (done["state"], done["request"]["image"]) == ("succeeded", f"upload:{upload['id']}")
    data = server.ask("GET", done["pictures"][0]["url"])[2]
    record = json.loads(Image.open(io.BytesIO(data)).text["inkstream"])  # type: ignore[attr-defined]
    assert "image" not in record["request"]
    assert "sha256" in record["left_out"]["image"]
    assert str(server.service.store.folder).encode() not in data


def test_a_broken_upload_fails_its_job_with_a_line_for_the_user(server):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    upload = server.ask("POST", "/v1/uploads", buffer.getvalue()[:-60])[2]
    done = server.ended(server.draw(image=f"upload:{upload['id']}"))
    assert (done["state"], done["error"]["type"]) == ("failed", "invalid_request_error")


def test_jobs_are_listed_newest_first_a_page_at_a_time(server):
    made = [server.ended(server.draw(note=str(i)))["id"] for i in range(3)]
    page = server.ask("GET", "/v1/jobs?limit=2&state=succeeded")[2]
    assert [job["id"] for job in page["jobs"]] == made[:0:-1]
    following = server.ask("GET", f"/v1/jobs?limit=2&state=succeeded&before={page['next']}")[2]
    assert following["jobs"][0]["id"] == made[0]
    assert server.ask("GET", "/v1/jobs?before=x")[0] == 400


def test_a_field_without_effect_gets_a_remark(server):
    done = server.ended(server.draw(guidance=1, negative_prompt="blue"))
    assert any("negative prompt" in line for line in done["remarks"])
