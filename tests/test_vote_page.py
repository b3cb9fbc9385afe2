"""The voting page in a real browser: 500 simulated votes come out as the strengths that cast them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inkstream.cli import main
from inkstream.evaluate.bakeoff.ballot import write_ballot
from inkstream.evaluate.bakeoff.plan import PLAN, PROMPTS
from inkstream.evaluate.bakeoff.polls import serve_votes
from inkstream.evaluate.bakeoff.results import read_results
from inkstream.evaluate.bakeoff.votes import all_votes, read_key
from inkstream.evaluate.ranking import chances, pairs_of

playwright = pytest.importorskip("playwright.sync_api", reason="THE VOTING PAGE WAS NOT TESTED: pip install playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
STRENGTHS = (1.3, 0.4, -0.5, -1.4)
TIES = -0.7
PROMPTS_DRAWN, SEEDS = 40, 2
KEYS = ("ArrowLeft", "ArrowRight", "ArrowUp")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A bake-off of four models whose pictures are small and have different colours."""
    names = ("ash", "birch", "cedar", "dogwood")
    found = tmp_path_factory.mktemp("votes") / "out"
    (found / "pictures").mkdir(parents=True)
    machine = {"cpu": "x", "cores": 1, "accelerator": None, "torch": "2", "inkstream": "0"}
    models = [{"name": name, "options": {}, "on": {}, "weights": None} for name in names]
    plan = {"suite": "mine", "prompts": PROMPTS_DRAWN, "seeds": SEEDS, "seed": 0, "machine": machine, "models": models}
    (found / PLAN).write_text(json.dumps(plan))
    prompts = [
        {"number": n, "prompt": f"prompt {n} <b>&", "group": "prompts", "text": None} for n in range(PROMPTS_DRAWN)
    ]
    (found / PROMPTS).write_text("".join(json.dumps(line) + "\n" for line in prompts))
    lines = []
    for number in range(PROMPTS_DRAWN):
        for model in range(len(names)):
            for seed in range(SEEDS):
                file = f"{number:04d}-{seed}-{model:02d}.png"
                Image.new("RGB", (16, 16), (6 * number, 60 * model, 90 * seed)).save(found / "pictures" / file)
                lines.append({"row": number, "index": model * SEEDS + seed, "digest": "", "file": file, "sha256": ""})
    (found / "pictures" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_ballot(read_results(found), "en")
    return found


@pytest.fixture
def folder(drawn, tmp_path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "out"))


@pytest.fixture
def open_page() -> Iterator[Open]:
    """`open_page(address)` is the page at a voter's; errors on its console fail."""
    if CHROMIUM is None:
        pytest.skip("THE VOTING PAGE WAS NOT TESTED: there is no browser. apt-get install chromium")
    errors: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def open_(address: str, voter: str = "Anna", **options: Any) -> Any:
            page = browser.new_context(**options).new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
            page.goto(address)
            page.get_by_label("Your name").fill(voter)
            page.keyboard.press("Enter")
            page.locator("body[data-asked]").wait_for()
            return page

        yield open_
        browser.close()
    assert errors == []


def sides(page: Any) -> list[str]:
    """The names of the two pictures that are shown."""
    return page.evaluate("[...document.querySelectorAll('#pair img')].map((i) => i.src.split('/').pop().slice(0, 16))")


def asked(page: Any, count: int) -> None:
    page.locator(f"body[data-asked='{count}']").wait_for()


@pytest.mark.slow
def test_500_simulated_votes_in_the_page_rank_the_models_by_the_strengths_that_cast_them(folder, open_page, capsys):
    key, generator = read_key(folder), np.random.default_rng(7)
    theta = np.array([*STRENGTHS, TIES])
    chance = dict(zip(pairs_of(4), chances(theta, 4)))
    with serve_votes(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = open_page(f"http://127.0.0.1:{server.server_port}/")
        for number in range(500):
            left, right = (key.pictures[name]["model"] for name in sides(page))
            found = chance[min(left, right), max(left, right)]
            outcome = generator.choice(3, p=found if left < right else found[[1, 0, 2]])
            page.keyboard.press(KEYS[outcome])
            asked(page, number + 1)
        page.get_by_text("Votes are saved.").wait_for()
        page.evaluate("sending")  # the last request
        server.shutdown()
    votes = all_votes(folder)
    assert len(votes) == 500
    assert len({(vote["left"], vote["right"]) for vote in votes}) > 300
    for vote in votes:
        left, right = key.pictures[vote["left"]], key.pictures[vote["right"]]
        assert (left["prompt"], left["seed"]) == (right["prompt"], right["seed"])
        assert left["model"] != right["model"]
    on_the_left = sum(key.pictures[vote["left"]]["model"] == 0 for vote in votes)
    shown = sum(0 in (key.pictures[vote["left"]]["model"], key.pictures[vote["right"]]["model"]) for vote in votes)
    assert 0.35 < on_the_left / shown < 0.65
    assert main(["bakeoff", "rank", str(folder), "--json", "--quiet"]) == 0
    (ranking,) = json.loads(capsys.readouterr().out)["rankings"]
    models = ranking["models"]
    assert [model["name"] for model in sorted(models, key=lambda m: -m["points"])] == [
        "ash",
        "birch",
        "cedar",
        "dogwood",
    ]
    truth = 1000 + 400 / np.log(10) * (np.array(STRENGTHS) - np.mean(STRENGTHS))
    for model, true in zip(models, truth):  # the page chooses by chance, so the bounds are those of 4 standard errors
        assert abs(model["points"] - true) < model["high"] - model["low"] < 200
    (voter,) = ranking["voters"]
    assert abs(voter["left"] - 0.5) < voter["left_high"] - voter["left_low"]


def test_votes_are_cast_by_keys_and_clicks_undone_kept_and_downloaded(folder, open_page, tmp_path):
    page = open_page(f"file://{folder}/vote.html")
    first = sides(page)
    page.keyboard.press("1")
    asked(page, 1)
    page.get_by_role("button", name="Both bad").click()
    asked(page, 2)
    page.get_by_role("button", name="Second picture").click()
    asked(page, 3)
    page.get_by_role("button", name="Undo").click()
    asked(page, 2)
    page.keyboard.press("ArrowUp")
    asked(page, 3)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download votes").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name.startswith("votes-Anna-")
    votes = [json.loads(line) for line in path.read_text().splitlines()]
    assert [vote["verdict"] for vote in votes] == ["left", "bad", "tie"]
    assert [votes[0]["left"], votes[0]["right"]] == first
    assert all(vote["voter"] == "Anna" and vote["seconds"] >= 0 for vote in votes)
    page.reload()
    page.get_by_label("Your name").fill("Anna")
    page.keyboard.press("Enter")
    asked(page, 3)  # they stay in the browser
    assert main(["bakeoff", "rank", str(folder), "--votes", str(path), "--quiet"]) == 0
    assert "Ranking by 3 votes of people" in (folder / "report.html").read_text()


def test_the_page_can_be_used_with_a_screen_reader_and_on_a_phone(folder, open_page):
    phone = {"viewport": {"width": 390, "height": 760}, "has_touch": True, "is_mobile": True}
    page = open_page(f"file://{folder}/vote.html", **phone)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    shown = [image.get_attribute("alt") for image in page.query_selector_all("#pair img")]
    assert shown == ["First picture", "Second picture"]
    assert page.locator("#prompt").get_attribute("aria-live") == "polite"
    boxes = [button.bounding_box() for button in page.query_selector_all("button:visible")]
    assert all(box["height"] >= 38 for box in boxes)
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] + 1  # one above the other
    assert page.get_by_role("button", name="Upper").is_visible()
    assert "<b>&" in page.locator("#prompt").inner_text()
    page.get_by_role("button", name="First picture").tap()
    asked(page, 1)


def test_every_fifth_question_is_one_that_all_voters_see(folder, open_page):
    pairs = []
    for voter in ("Anna", "Bo"):
        page = open_page(f"file://{folder}/vote.html", voter)
        seen = []
        for number in range(10):
            seen.append(frozenset(sides(page)))
            page.keyboard.press(KEYS[number % 3])
            asked(page, number + 1)
        pairs.append([seen[4], seen[9]])
    assert pairs[0] == pairs[1]
