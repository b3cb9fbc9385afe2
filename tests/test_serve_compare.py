"""The server tells advice, verifies its pictures, and lets several keys vote blindly on bake-offs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from inkstream.cli import main
from inkstream.evaluate.bakeoff.votes import KEY, PAGE, REPORT, SHOWN, all_votes
from inkstream.serve.keys import add_key
from inkstream.serve.limits import Settings

PICTURES = {f"{number:016x}": {"prompt": 0, "seed": 0, "model": number, "file": f"{number}.png"} for number in (1, 2)}
LEFT, RIGHT = PICTURES


def make_ballot(folder: Path) -> Path:
    """A bake-off's folder with the files that the server reads."""
    (folder / SHOWN).mkdir(parents=True)
    (folder / KEY).write_text(json.dumps({"ballot": "b", "pictures": PICTURES}))
    (folder / PAGE).write_text("<!doctype html><title>vote</title>")
    (folder / REPORT).write_text("<!doctype html><title>names of the models</title>")
    for name in PICTURES:
        Image.new("RGB", (8, 8), "red").save(folder / SHOWN / f"{name}.png")
    return folder


def vote(voter: str, verdict: str = "left") -> bytes:
    line = {"ballot": "b", "voter": voter, "token": "t", "left": LEFT, "right": RIGHT, "verdict": verdict}
    return json.dumps(line).encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory, start_server):
    folder = tmp_path_factory.mktemp("compare")
    make_ballot(folder / "bakeoffs" / "posters")
    (folder / "bakeoffs" / "something else").mkdir()
    made = {"ann": {}, "bob": {}, "root": {"admin": True}}
    keys = {name: add_key(folder / "keys.json", name, 0.0, **more) for name, more in made.items()}
    server = start_server(Settings(folder, models=("pocket",), preload=False))
    server.headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    server.ballot = folder / "bakeoffs" / "posters"
    yield server
    server.stop()


def test_a_bakeoff_is_listed_and_only_an_admin_is_told_of_its_report(served):
    for name, report in (("ann", None), ("root", "/v1/bakeoffs/posters/report")):
        status, _, answer = served.ask("GET", "/v1/bakeoffs", None, served.headers[name])
        assert status == 200
        (listed,) = answer["data"]
        assert (listed["name"], listed["models"], listed["pictures"]) == ("posters", 2, 2)
        assert listed["report"] == report
    assert served.ask("GET", "/v1/bakeoffs/posters/report", None, served.headers["ann"])[0] == 403
    status, found, page = served.ask("GET", "/v1/bakeoffs/posters/report", None, served.headers["root"])
    assert (status, b"names of the models" in page) == (200, True)
    assert "default-src 'none'" in found["content-security-policy"]


def test_the_page_and_its_pictures_are_served_and_nothing_else_of_the_folder(served):
    ann = served.headers["ann"]
    assert served.ask("GET", "/v1/bakeoffs/posters/vote", None, ann)[0] == 200
    assert served.ask("GET", f"/v1/bakeoffs/posters/vote/{LEFT}.png", None, ann)[0] == 200
    assert served.ask("GET", f"/v1/bakeoffs/posters/vote/{'0' * 16}.png", None, ann)[0] == 404
    for path in ("posters/vote/.key.json", "posters/vote/..%2F.key.json"):
        assert served.ask("GET", f"/v1/bakeoffs/{path}", None, ann)[0] in (400, 404)
    for name in ("nothing", "..", ".", "..%2Fbakeoffs%2Fposters", "something%20else"):
        assert served.ask("GET", f"/v1/bakeoffs/{name}/vote", None, ann)[0] == 404


def test_each_key_votes_under_its_own_name(served):
    for name in ("ann", "bob"):
        sent = served.ask("POST", "/v1/bakeoffs/posters/votes", vote("somebody else"), served.headers[name])
        assert sent[0] == 204
    assert sorted(line["voter"] for line in all_votes(served.ballot)) == ["ann", "bob"]
    again = vote("ann", "tie")
    assert served.ask("POST", "/v1/bakeoffs/posters/votes", again, served.headers["ann"])[0] == 204
    assert {line["voter"]: line["verdict"] for line in all_votes(served.ballot)} == {"ann": "tie", "bob": "left"}
    answer = served.ask("GET", "/v1/bakeoffs", None, served.headers["ann"])[2]["data"][0]
    assert (answer["votes"], answer["voters"]) == (2, 2)


def test_what_is_no_vote_is_refused(served):
    status, _, answer = served.ask("POST", "/v1/bakeoffs/posters/votes", b"nonsense", served.headers["ann"])
    assert status == 400
    assert "line 1 is not a vote" in answer["error"]["message"]


def test_advice_is_the_command_lines(served, capsys):
    status, _, answer = served.ask(
        "GET", "/v1/advice?use=posters&pictures=900&card=RTX%203060&language=zh&commercial=true", None,
        served.headers["ann"],
    )  # fmt: skip
    assert status == 200, answer
    words = ["advise", "--use=posters", "--pictures=900", "--card=RTX 3060", "--language=zh", "--commercial", "--json"]
    assert not main(words)
    told = json.loads(capsys.readouterr().out)
    assert (answer["model"], answer["best"]) == (told["model"], told["best"])
    assert [cost["month"] for cost in answer["costs"]] == [cost["month"] for cost in told["costs"]]
    assert answer["place"]["placement"] == told["place"]["fit"]["placement"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("use=weddings", "use weddings is not known"),
        ("card=--help", "--help is not a card"),
        ("card=RTX%203060&budget=5", "give one of them"),
    ],
)
def test_a_wish_that_cannot_be_advised_is_one_line(served, query, said):
    status, _, answer = served.ask("GET", f"/v1/advice?{query}", None, served.headers["ann"])
    assert status == 400
    assert said in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_a_picture_is_verified_by_its_prompt_or_by_what_is_given(served):
    ann = served.headers["ann"]
    body = {"model": "pocket", "prompt": "a red circle #ff0000", "width": 32, "height": 32, "steps": 1, "seed": 1,
            "upsample": False}  # fmt: skip
    job = served.ask("POST", "/v1/jobs", body, ann)[2]
    while (job := served.ask("GET", f"/v1/jobs/{job['id']}", None, ann)[2])["ended"] is None:
        time.sleep(0.1)
    path = f"/v1/pictures/{job['pictures'][0]['id']}/verify"
    status, _, own = served.ask("POST", path, {}, ann)
    assert status == 200, own
    assert any("#ff0000" in check["line"] for check in own["checks"])
    assert not own["empty"]
    given = served.ask("POST", path, {"colours": ["#0a0"]}, ann)[2]
    assert [check["line"].startswith("colour #00aa00") for check in given["checks"]] == [True]
    assert given["passed"] == given["checks"][0]["right"]
    assert served.ask("POST", path, {"colours": ["green"]}, ann)[0] == 400
    assert served.ask("POST", path, {}, served.headers["bob"])[0] == 404
