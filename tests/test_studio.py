"""The studio in a real browser, on a real server that draws with Pocket and has 25,000 pictures in its gallery."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import write_lora_folder
from inkstream.engine.pictures.edits import Edit, canvas_of
from inkstream.engine.pictures.maps import map_of
from inkstream.serve.api import studio
from inkstream.serve.keys import add_key
from inkstream.serve.limits import Limits, Settings
from inkstream.types import Machine, Region, Request
from test_control import write_union

playwright = pytest.importorskip("playwright.sync_api", reason="THE STUDIO WAS NOT TESTED: pip install playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
AUDIT = (Path(__file__).parent / "audit.js").read_text()
STORED = 25_000
CATS = 40
"""Of the stored pictures, those of a ginger cat, in Chinese."""


@pytest.fixture(scope="module")
def served(tmp_path_factory, start_server, tiny_folder) -> Iterator[Any]:
    """A server of its own, with a full gallery: rows and a few files, put straight into its store."""
    models = ("pocket", f"turbo={tiny_folder}")
    limits = Limits(pictures=4, steps=200)
    loras, nets = fill_loras(write_lora_folder(tmp_path_factory.mktemp("loras"))), tmp_path_factory.mktemp("nets")
    write_union(nets / "union.safetensors")
    upscalers = tmp_path_factory.mktemp("upscalers")
    (upscalers / "dark.pth").write_bytes(b"dark")
    machine = Machine(lora_folder=str(loras), control_folder=str(nets), upscaler_folder=str(upscalers))
    data = tmp_path_factory.mktemp("studio")
    served = start_server(Settings(data, models=models, limits=limits, preload=False, machine=machine))
    fill(served.service.store)
    yield served
    served.stop()


def fill_loras(folder: Path) -> Path:
    """Beside `styles/bold`, which fits Pocket: one with all that a file can say, one for turbo, and a torn one."""
    said = {"modelspec.title": "Bold ink", "modelspec.trigger_phrase": "boldink, thick lines", "ss_base_model_version":
            "pocket", "modelspec.usage_hint": "best near 0.8"}  # fmt: skip
    bold = load_file(folder / "styles" / "bold.safetensors")
    save_file(bold, folder / "ink.safetensors", said)
    (folder / "ink.json").write_text('{"preferred weight": 0.8}')
    Image.new("RGB", (64, 48), "tomato").save(folder / "ink.png")
    down, up = torch.zeros(4, 64), torch.zeros(64, 4)
    save_file({"layers.0.attention.out.lora_A.weight": down, "layers.0.attention.out.lora_B.weight": up},
              folder / "small.safetensors")  # fmt: skip
    (folder / "torn.safetensors").write_bytes((folder / "ink.safetensors").read_bytes()[:-9])
    return folder


def fill(store: Any) -> None:
    folder = store.pictures / "2026-01"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (64, 64), f"hsl({i * 45}, 70%, 60%)").save(folder / f"p{i}.png")
    rows = []
    for i in range(STORED):
        prompt = f"窗边的橘猫 {i}" if i % (STORED // CATS) == 7 else f"a stored picture {i}"
        request = json.dumps({"prompt": prompt, "model": "pocket", "seed": 7_000_000 + i, "width": 64, "height": 64})
        created = 1_767_600_000 + i * 60.0
        words = f"{prompt}\n\npocket\n{7_000_000 + i}"
        rows.append((f"p{i:020}", f"j{i:020}", 0, "", created, 0.1, 64, 64, 200, "image/png", f"{i:064x}",
                     f"2026-01/p{i % 8}.png", 7_000_000 + i, "pocket", words, request))  # fmt: skip
    store._db.executemany(
        "INSERT INTO pictures (id, job, place, key, created, seconds, width, height, bytes, type, sha256, file, seed,"
        " model, words, request) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("THE STUDIO WAS NOT TESTED: there is no browser. apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def profiles(browser) -> dict[str, Any]:
    """Profiles of the browser, by language: they keep the studio's files, as browsers do, and nothing else."""
    return {locale: browser.new_context(locale=locale) for locale in ("en-GB", "zh-CN")}


ONCE = """if (!sessionStorage.getItem('begun')) {
  localStorage.clear();
  sessionStorage.setItem('begun', '1');
  const view = '%s';
  if (view) localStorage.setItem('inkstream.view', JSON.stringify(view));
}"""
"""Of what was kept in the profile, a page knows nothing but the view and what it has kept itself."""


@pytest.fixture
def open_page(served, profiles) -> Iterator[Any]:
    """`open_page(width=, height=, locale=, view=)` is the studio, opened for the first time; console errors fail.

    Browsers note every answer that refuses, too: those that a test is about stand in `open_page.refusals`.
    """
    errors: list[str] = []
    pages = []

    def open_page(
        width: int = 1280, height: int = 800, locale: str = "en-GB", port: int = served.port, view: str = ""
    ) -> Any:
        profiles[locale].clear_cookies()
        page = profiles[locale].new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.add_init_script(ONCE % (view or ("gallery" if width >= 900 else "draw")))
        page.set_default_timeout(60_000)
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        return page

    open_page.refusals = set()  # type: ignore[attr-defined]
    yield open_page
    for page in pages:
        page.close()
    for job in served.ask("GET", "/v1/queue")[2]["queued"] + served.ask("GET", "/v1/queue")[2]["running"]:
        served.ask("DELETE", f"/v1/jobs/{job['id']}")
    assert [error for error in errors if not any(f"status of {one}" in error for one in open_page.refusals)] == []


@pytest.fixture
def page(open_page) -> Any:
    """The studio on a desk, its gallery there."""
    page = open_page()
    page.wait_for_selector(".tile.loaded")
    return page


def ask_for(page: Any, prompt: str, **fields: Any) -> None:
    """Fill the form, small and quick unless told otherwise, and draw."""
    page.fill("#prompt", prompt)
    for label in ("Width", "Height"):
        page.get_by_label(label, exact=True).fill("32")
    for name, value in {"steps": 2, **fields}.items():
        page.fill(f"#field-{name}", str(value))
    page.keyboard.press("Control+Enter")


def jobs(served: Any, state: str = "") -> list[dict[str, Any]]:
    return served.ask("GET", "/v1/jobs" + (f"?state={state}" if state else ""))[2]["jobs"]


def until(condition: Any, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.05)
    return found


# Drawing ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_drawn_with_previews_and_becomes_the_first_of_the_gallery(served, page):
    ask_for(page, "a red heart of the studio", steps=100, count=2)
    card = page.locator(".job[data-state=running]")
    card.locator("progress[value]").wait_for()
    assert card.locator(".preview").get_attribute("src").startswith("data:image/")
    card.locator(".job-line", has_text="step").wait_for()
    page.wait_for_selector(".job[data-state=succeeded]")
    page.wait_for_selector(".tile img[alt='a red heart of the studio']")
    assert page.locator(".count").first.text_content() == "25,002 pictures"
    job = jobs(served, "succeeded")[0]
    assert {name: job["request"][name] for name in ("prompt", "steps", "width", "count")} == {
        "prompt": "a red heart of the studio", "steps": 100, "width": 32, "count": 2,
    }  # fmt: skip
    assert "guidance" not in job["request"]  # only what differs from the model's own is sent
    page.fill("#prompt", "")
    page.press("#prompt", "Alt+ArrowUp")
    assert page.input_value("#prompt") == "a red heart of the studio"


def test_a_job_is_cancelled_in_the_queue(served, page):
    ask_for(page, "too long to wait for", steps=200, count=4)
    page.locator(".job[data-state=running] progress[value]").wait_for()
    page.locator(".job[data-state=running]").get_by_label("Cancel").click()
    page.wait_for_selector(".job[data-state=cancelled]")
    assert jobs(served)[0]["state"] == "cancelled"


def test_a_reload_in_the_middle_loses_nothing(served, page):
    ask_for(page, "drawn on the server", steps=40, count=8)
    page.locator(".job[data-state=running] progress[value]").wait_for()
    page.reload()
    card = page.locator(".job[data-state=running]", has_text="drawn on the server")
    card.locator("progress[value]").wait_for()
    assert page.input_value("#prompt") == "drawn on the server"
    assert page.input_value("#field-steps") == "40"
    page.wait_for_selector(".tile img[alt='drawn on the server']")
    assert [job["request"]["prompt"] for job in jobs(served)].count("drawn on the server") == 1


def test_waiting_jobs_are_moved_and_the_queue_is_paused(served, page):
    page.click("#pause")
    page.wait_for_selector("#queue.paused")
    for name in ("first", "second", "third"):
        ask_for(page, f"the {name} of three")
        page.wait_for_selector(f".job[data-state=queued] >> text=the {name} of three")
    page.locator(".job[data-state=queued]", has_text="third").get_by_label("Draw earlier").click()
    prompts = page.locator(".queued .job-prompt")
    until(lambda: [text.split()[1] for text in prompts.all_text_contents()] == ["first", "third", "second"])
    assert [job["request"]["prompt"] for job in served.ask("GET", "/v1/queue")[2]["queued"]][1] == "the third of three"
    page.click("#pause")
    until(lambda: not served.ask("GET", "/v1/queue")[2]["queued"])


def test_a_refused_request_is_told_in_a_line_beside_its_field(open_page, page):
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".notice.error >> text=There is no prompt")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.locator(".notice").get_by_label("Close").click()
    open_page.refusals.add("400")
    page.get_by_label("Width", exact=True).fill("4096")
    page.get_by_label("Height", exact=True).fill("4096")
    page.fill("#prompt", "far too large")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".notice.error >> text=4096x4096 is more than this server draws")


def test_what_is_being_typed_counts_when_a_key_draws(served, page):
    page.fill("#prompt", "typed to the last")
    for label, pixels in (("Height", "48"), ("Width", "32")):
        page.get_by_label(label, exact=True).fill(pixels)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".tile img[alt='typed to the last']")
    request = jobs(served, "succeeded")[0]["request"]
    assert (request["width"], request["height"]) == (32, 48)
    assert page.text_content("#status") == "pocket on cpu"


def test_a_side_that_is_not_possible_is_told_and_not_changed(open_page, page):
    width, note = page.get_by_label("Width", exact=True), page.locator("#size-note")
    for typed, near in (("130", "128 or 144"), ("7", "16"), ("33", "32 or 48")):
        width.fill(typed)
        width.blur()
        until(lambda near=near: f"take {near}." in note.text_content())
        assert width.input_value() == typed
        assert width.get_attribute("aria-invalid") == "true"
    open_page.refusals.add("400")
    page.fill("#prompt", "not possible")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".notice.error >> text=33")
    width.fill("48")
    width.blur()
    until(lambda: not note.is_visible())


def test_each_press_of_the_keys_draws_and_a_held_key_draws_once(served, page):
    page.fill("#prompt", "pressed twice")
    for _ in range(2):  # the second press comes before the first is answered
        page.evaluate(
            """dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true }));
               dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true, repeat: true }));"""
        )
    until(lambda: len([job for job in jobs(served) if job["request"]["prompt"] == "pressed twice"]) == 2)
    page.wait_for_selector("#draw-now:not([disabled])")
    assert len([job for job in jobs(served) if job["request"]["prompt"] == "pressed twice"]) == 2


# The stage ----------------------------------------------------------------------------------------------------------


def on_stage(page: Any, prompt: str) -> Any:
    """Wait until the finished picture of a prompt is on the stage, with its tools. Returns its element."""
    image = page.locator(".stage-image")
    until(lambda: image.get_attribute("alt") == prompt and page.locator("#stage .tool").count(), 180)
    return image


def test_the_preview_grows_into_the_picture_on_the_stage(served, open_page):
    page = open_page(view="draw")
    until(lambda: page.locator(".frame").count())
    assert not page.locator("#gallery").is_visible()
    ask_for(page, "a star on the stage", steps=100, seed=11)
    shown = """() => {
      const image = document.querySelector(".stage-image");
      const running = image.alt === "Being drawn: a star on the stage" && image.src.startsWith("data:image/");
      return running && document.querySelector(".stage-progress progress").value > 0 && image.getBoundingClientRect();
    }"""
    preview = until(lambda: page.evaluate(shown), 180)
    image = on_stage(page, "a star on the stage")
    assert image.get_attribute("src") == jobs(served, "succeeded")[0]["pictures"][0]["url"]
    box = image.bounding_box()
    assert box == pytest.approx({name: preview[name] for name in box}, abs=40)
    assert min(preview["width"], preview["height"]) > 300
    assert page.locator(".frame[aria-current]").get_attribute("aria-label") == "a star on the stage"
    assert complaints(page) == {"light": [], "dark": []}


def test_the_tools_of_the_stage_draw_again_keep_the_seed_and_delete(served, open_page):
    page = open_page(view="draw")
    until(lambda: page.locator(".frame").count())
    ask_for(page, "tools of the stage", seed=12)
    on_stage(page, "tools of the stage")
    tool = page.locator("#stage").get_by_role("button", name="Keep this seed")
    page.fill("#field-seed", "")
    tool.click()
    assert page.input_value("#field-seed") == "12"
    until(lambda: tool.get_attribute("aria-pressed") == "true")
    tool.click()
    assert page.input_value("#field-seed") == ""
    page.locator("#stage").get_by_role("button", name="Variations").click()
    made = until(lambda: next((job for job in jobs(served, "succeeded") if len(job["pictures"]) == 4), None), 180)
    assert made["request"]["prompt"] == "tools of the stage"
    assert made["request"]["seed"] != 12  # the server chose one
    last = page.locator(".frame").first
    until(lambda: last.get_attribute("data-key") == made["pictures"][3]["id"] and last.get_attribute("aria-current"))
    last.focus()
    page.keyboard.press("ArrowRight")
    until(lambda: page.evaluate("document.activeElement === document.querySelector('.frame[aria-current]')"))
    gone = until(lambda: page.locator(".stage-image").get_attribute("src") == made["pictures"][2]["url"]) and made
    page.locator("#stage").get_by_role("button", name="Delete").click()
    page.locator(".notice >> text=Undo").wait_for()
    assert served.ask("GET", f"/v1/pictures/{gone['pictures'][2]['id']}")[2]["deleted"]
    page.locator(".notice >> text=Undo").click()
    until(lambda: not served.ask("GET", f"/v1/pictures/{gone['pictures'][2]['id']}")[2]["deleted"])
    page.locator("#stage").get_by_role("button", name="Enlarge 2x").click()
    large = until(lambda: next((job for job in jobs(served, "succeeded") if job["request"].get("upscale")), None), 180)
    assert (large["pictures"][0]["width"], large["pictures"][0]["height"]) == (64, 64)


def test_on_a_phone_the_result_is_seen_where_the_prompt_is_written(served, open_page):
    page = open_page(390, 844)
    until(lambda: page.locator(".frame").count())
    assert page.locator("#prompt").is_visible()
    ask_for(page, "seen on a phone", seed=13)
    on_stage(page, "seen on a phone")
    box = until(lambda: (found := page.locator(".stage-image").bounding_box()) and found["y"] >= 0 and found)
    assert box["y"] + box["height"] < 844
    prompt = page.locator("#prompt").bounding_box()
    assert box["y"] + box["height"] < prompt["y"] < 844 - 100  # above the buttons
    small = """all => all.filter((one) => one.offsetWidth && Math.min(one.offsetWidth, one.offsetHeight) < 44)
      .map((one) => one.outerHTML.slice(0, 80))"""
    assert page.locator("#stage :is(button, a)").evaluate_all(small) == []


def test_an_empty_stage_has_examples(tmp_path, start_server, open_page):
    empty = start_server(Settings(tmp_path, models=("pocket",), preload=False))
    try:
        for size in ((1280, 800), (390, 844)):
            page = open_page(*size, port=empty.port, view="draw")
            page.locator("#stage .examples button").first.click()
            assert page.input_value("#prompt")
            assert complaints(page) == {"light": [], "dark": []}
            page.close()
    finally:
        empty.stop()


@pytest.mark.parametrize(("size", "locale"), [((1280, 800), "en-GB"), ((390, 844), "zh-CN")])
def test_advice_bakeoffs_and_the_check_of_a_picture_are_reached_by_keyboard(open_page, size, locale):
    page = open_page(*size, locale=locale)
    until(lambda: page.locator("#decide").count())
    page.locator("#decide").focus()
    page.keyboard.press("Enter")
    until(lambda: page.evaluate("document.activeElement.closest('.menu:popover-open') !== null"))
    page.keyboard.press("Enter")
    until(lambda: page.locator("dialog.decide select").count())
    page.locator("dialog.decide input").first.focus()
    page.keyboard.press("Enter")
    until(lambda: page.locator("dialog.decide tbody tr").count() >= 2)
    assert "$" in page.locator("dialog.decide tbody").inner_text()
    assert complaints(page) == {"light": [], "dark": []}
    page.keyboard.press("Escape")
    page.locator("#decide").click()
    page.locator(".menu:popover-open button").nth(1).click()
    until(lambda: "inkstream bakeoff" in page.locator("dialog.decide").inner_text())
    page.keyboard.press("Escape")
    page.locator("#views button:visible").last.click()
    page.locator(".tile-open").first.click()
    page.locator("button.verify").focus()
    page.keyboard.press("Enter")
    until(lambda: page.locator(".verified p").count() >= 2)
    assert complaints(page) == {"light": [], "dark": []}


# The form -----------------------------------------------------------------------------------------------------------


def test_an_option_that_the_model_does_not_take_is_not_offered(page):
    assert page.locator("[data-field=cache]").count() == 1
    assert page.locator("[data-field=upsample]").count() == 1
    assert page.locator("[data-field=reference]").count() == 0
    page.click("summary >> text=Start from pictures")
    assert page.locator("[data-field=image]").is_visible()
    assert not page.locator("[data-field=strength]").is_visible()  # it means nothing without a start picture
    page.fill("#field-steps", "5")
    page.select_option("#model", "turbo")
    page.wait_for_selector("#draw:not(:has([data-field=cache]))")
    assert page.locator("[data-field=upsample]").count() == 0
    assert page.input_value("#field-steps") == "8"  # another model's number
    page.select_option("#model", "pocket")
    page.wait_for_selector("[data-field=cache]", state="attached")
    assert page.input_value("#field-steps") == "5"


def test_a_start_picture_is_kept_on_the_server_and_its_strength_is_offered(served, page, tmp_path):
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "start.png")
    page.click("summary >> text=Start from pictures")
    with page.expect_file_chooser() as chooser:
        page.locator("[data-field=image] button").click()
    chooser.value.set_files(tmp_path / "start.png")
    page.wait_for_selector("[data-field=image] img")
    page.fill("#field-strength", "0.35")
    ask_for(page, "from a start picture", steps=3)
    page.wait_for_selector(".tile img[alt='from a start picture']")
    request = jobs(served)[0]["request"]
    assert request["image"].startswith("upload:")
    assert request["strength"] == 0.35


def test_below_the_prompt_stands_what_the_model_reads_and_what_it_does_not_know(served, page):
    page.fill("#prompt", "a red heart and a dragon")
    page.fill("#field-seed", "3")
    hint = page.locator("#told")
    hint.get_by_text("It cannot draw: dragon").wait_for()
    assert "For anything else use z-image-turbo." in hint.text_content()
    body = {"model": "pocket", "prompt": "a red heart and a dragon", "seed": 3}
    told = served.ask("POST", "/v1/prompts", body)[2]["told"]
    assert page.text_content(".told-words") == f"The model reads: {told}"
    assert page.get_attribute("#prompt", "aria-describedby") == "told"
    assert complaints(page) == {"light": [], "dark": []}
    page.fill("#field-seed", "")
    hint.get_by_text("for one seed").wait_for()
    page.fill("#prompt", "")
    until(lambda: page.text_content("#told") == "")
    page.fill("#prompt", "a dragon")
    hint.get_by_text("dragon").first.wait_for()
    page.uncheck("#field-upsample")  # then it is told as it is typed
    until(lambda: page.text_content("#told") == "")
    page.select_option("#model", "turbo")
    page.wait_for_selector("#draw:not(:has([data-field=upsample]))")
    assert page.text_content("#told") == ""


def test_every_note_of_the_writer_is_said_in_both_languages(open_page):
    page = open_page(locale="zh-CN")
    page.wait_for_selector("#draw-now")
    prompts = {
        "a dragon": "画不了：dragon",
        "no circle": "提示词里一样也没有",
        "nine red hearts": "最多画 5 个东西，而不是 9 个",
        "a red heart, no heart": "要 heart 又不要它",
        'the words "A" and "B"': "只写一段文字：略去 'B'",
        'the word "ABCDEFGHIJ"': "'ABCDEFGHIJ' 有 10 个",
        'the word "é"': "写不了 é",
        "five large red squares and four large blue circles": "放不下",
    }
    for prompt, words in prompts.items():
        page.fill("#prompt", prompt)
        page.locator(".told-notes").get_by_text(words).wait_for()
        assert "要画别的，请用 z-image-turbo。" in page.text_content(".told-notes")
        told = page.text_content(".told-notes").lower()
        assert "pocket draws" not in told
        assert "inkstream" not in told


def test_the_switch_shows_whether_the_prompt_will_be_written_out(served, page, tmp_path):
    switch = page.locator("#field-upsample")
    assert switch.is_checked()  # the model's own habit
    ask_for(page, "written out by itself", seed=5)
    page.wait_for_selector(".tile img[alt='written out by itself']")
    request = jobs(served)[0]["request"]
    assert "upsample" not in request
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "start.png")
    page.click("summary >> text=Start from pictures")
    with page.expect_file_chooser() as chooser:
        page.locator("[data-field=image] button").click()
    chooser.value.set_files(tmp_path / "start.png")
    page.wait_for_selector("[data-field=image] img")
    assert not switch.is_checked()  # a drawing from a picture is told what was typed
    switch.check()
    ask_for(page, "written out by wish", seed=5)
    page.wait_for_selector(".tile img[alt='written out by wish']")
    assert jobs(served)[0]["request"]["upsample"] is True
    switch.uncheck()
    ask_for(page, "told as typed", seed=5)
    page.wait_for_selector(".tile img[alt='told as typed']")
    assert "upsample" not in jobs(served)[0]["request"]


# LoRAs --------------------------------------------------------------------------------------------------------------


def choose_lora(page: Any, title: str) -> None:
    page.click("#add-lora")
    page.locator(".lora-choice", has_text=title).click()


def test_a_lora_is_chosen_weighed_drawn_with_and_comes_back(served, page):
    page.click("#add-lora")
    choices = page.locator(".lora-choice")
    assert choices.count() == 4
    assert choices.locator("img").count() == 1
    assert choices.filter(has_text="torn").is_disabled()
    assert "cut short" in choices.filter(has_text="torn").inner_text()
    assert "Made for another model than pocket" in choices.filter(has_text="small").inner_text()
    assert choices.last.inner_text() != choices.first.inner_text()
    choices.filter(has_text="Bold ink").click()
    strength = page.locator(".lora input[type=number]")
    assert strength.input_value() == "0.8"  # the file's own
    assert page.evaluate("document.activeElement === document.querySelector('.lora input[type=number]')")
    assert strength.get_attribute("aria-label") == "Strength of Bold ink"
    strength.fill("3.25")  # beyond the slider
    assert page.locator(".lora input[type=range]").input_value() == "2"
    page.locator(".lora input[type=range]").fill("-0.5")
    assert strength.input_value() == "-0.5"
    page.fill("#prompt", "a red circle,")
    page.get_by_role("button", name="boldink", exact=True).click()
    assert page.input_value("#prompt") == "a red circle, boldink"
    assert page.get_by_role("button", name="boldink", exact=True).get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="boldink", exact=True).click()
    assert page.input_value("#prompt") == "a red circle, boldink"  # once is enough
    choose_lora(page, "bold")
    ask_for(page, "a red circle, boldink", seed=7)
    page.wait_for_selector(".tile img[alt='a red circle, boldink']")
    assert jobs(served, "succeeded")[0]["request"]["loras"] == ["ink:-0.5", "styles/bold"]
    for name in ("Bold ink", "bold"):
        page.get_by_label(f"Remove {name}", exact=True).click()
    assert page.evaluate("document.activeElement.id") == "add-lora"
    assert page.locator(".lora").count() == 0
    page.locator(".tile-open").first.click()
    facts = page.locator("dialog .facts")
    facts.get_by_text("Bold ink × -0.5").wait_for()
    facts.get_by_text("bold × 1").wait_for()
    page.locator("dialog").get_by_role("button", name="Use these settings").click()
    until(lambda: page.locator(".lora").count() == 2)
    assert page.locator(".lora input[type=number]").first.input_value() == "-0.5"


def test_the_steps_and_blocks_of_a_lora_stay_when_its_strength_changes(served, page, open_page):
    job = served.ended(served.draw(prompt="x of steps", steps=2, loras=["styles/bold:0.5@0.25-1#layers.0-7=0.5"]))
    drop(page, served.ask("GET", job["pictures"][0]["url"])[2], "found.png")
    page.wait_for_selector(".lora")
    page.locator(".lora input[type=number]").fill("0.75")
    ask_for(page, "x of steps again")
    page.wait_for_selector(".tile img[alt='x of steps again']")
    assert jobs(served, "succeeded")[0]["request"]["loras"] == ["styles/bold:0.75@0.25-1#layers.0-7=0.5"]


def test_a_lora_that_does_not_fit_or_is_not_there_is_told_and_so_are_too_strong_ones(served, page):
    until(lambda: served.ask("GET", "/v1/models/turbo/form")[0] == 200)
    warning = page.locator(".loras-field > .lora-note")
    choose_lora(page, "small")
    assert page.locator(".lora .lora-note").inner_text() == "Made for another model than pocket."
    choose_lora(page, "Bold ink")
    assert not warning.is_visible()  # Pocket draws in 10 steps or more
    page.select_option("#model", "turbo")
    until(lambda: page.locator(".lora").count() == 0)  # each model has its own
    choose_lora(page, "bold ink")
    assert page.locator(".lora .lora-note").inner_text() == "Made for another model than turbo."
    page.get_by_label("Remove Bold ink").click()
    choose_lora(page, "small")
    assert page.locator(".lora .lora-note").count() == 0
    page.locator(".lora input[type=number]").fill("1.2")
    assert not warning.is_visible()
    page.locator(".lora input[type=number]").fill("1.25")
    assert "together above 1.2" in warning.inner_text()
    page.wait_for_function("JSON.parse(localStorage.getItem('inkstream.wish')).own.turbo")  # saved a moment later
    page.evaluate("""() => {
      const wish = JSON.parse(localStorage.getItem("inkstream.wish"));
      wish.own.turbo.loras = ["gone:0.5"];
      addEventListener("pagehide", () => localStorage.setItem("inkstream.wish", JSON.stringify(wish)));
    }""")
    page.reload()
    page.wait_for_selector(".lora .lora-note >> text=The server has no LoRA of this name.")


def test_many_loras_have_a_search(served, page):
    folder = Path(served.service.settings.machine.lora_folder) / "many"
    folder.mkdir()
    try:
        for i in range(12):
            shutil.copy(folder.parent / "styles" / "bold.safetensors", folder / f"style {i}.safetensors")
        page.click("#add-lora")
        page.get_by_label("Search LoRAs").fill("style 11")  # files that came after the page was opened
        until(lambda: page.locator(".lora-choice:visible").count() == 1)
        page.get_by_label("Search LoRAs").fill("")
        box = page.locator(".menu:popover-open").bounding_box()
        assert box["y"] >= 8
        assert box["y"] + box["height"] <= 792  # within the window, also after the list has grown
        page.get_by_label("Search LoRAs").fill("nothing like it")
        page.wait_for_selector("text=No LoRA matches.")
    finally:
        shutil.rmtree(folder)


def test_a_grid_is_one_job_and_its_sheet_names_rows_and_columns(served, page):
    page.click("summary >> text=X/Y grid")
    page.select_option("#grid-x", "steps")
    page.get_by_label("Values").fill("1, 2")
    page.select_option("#grid-y", "solver")
    page.get_by_label("dpmpp 2m", exact=True).uncheck()
    page.wait_for_selector("text=4 pictures as one job")
    page.fill("#prompt", "a grid of four")
    for label in ("Width", "Height"):
        page.get_by_label(label, exact=True).fill("32")
    page.click("#draw-now")
    page.locator(".notice >> text=Open").click()
    page.wait_for_selector(".sheet-grid .sheet-tile img")
    assert [" ".join(text.split()) for text in page.locator(".sheet-grid th").all_text_contents()] == [
        "Steps 1", "Steps 2", "Solver euler", "Solver heun",
    ]  # fmt: skip
    assert jobs(served)[0]["grid"]["y"] == {"field": "solver", "values": ["euler", "heun"]}
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")


def test_drafts_are_picked_and_refined(served, page):
    page.fill("#prompt", "a drafted heart")
    for label in ("Width", "Height"):
        page.get_by_label(label, exact=True).fill("32")
    page.click("#draft-now")
    page.locator(".notice >> text=Pick").click()
    page.wait_for_selector("dialog.sheet")
    drafted = jobs(served)[0]
    assert (drafted["note"], len(drafted["pictures"]), drafted["request"]["steps"]) == ("draft", 4, 8)
    page.locator("dialog .pick").nth(2).click()
    page.locator("dialog").get_by_role("button", name="Refine").click()
    page.select_option("#refine-scale", "1.5")
    page.get_by_role("button", name="Refine 1").click()
    refined = until(lambda: next((j for j in jobs(served, "succeeded") if j["note"].startswith("refined")), None))
    pick = drafted["pictures"][2]
    assert {n: refined["request"][n] for n in ("prompt", "seed", "width", "height", "strength")} == {
        "prompt": "a drafted heart", "seed": pick["seed"], "width": 48, "height": 48, "strength": 0.5,
    }  # fmt: skip


def test_what_is_copied_is_true(served, page):
    made = {"model": "pocket", "prompt": 'it\'s 三个 "hearts"', "steps": 3, "guidance": 2.5, "width": 32, "height": 32}
    base = f"/studio/{studio.DIGEST}"
    command, curl, python = page.evaluate(
        f"async (made) => {{ const c = await import('{base}/copy.js');"
        " return [c.asCommand(made), c.asCurl(made), c.asPython(made)]; }",
        made,
    )
    words = shlex.split(command)
    assert words[:3] == ["inkstream", "generate", made["prompt"]]
    assert dict(zip(words[3::2], words[4::2])) == {
        f"--{name}": str(made[name]) for name in ("model", "steps", "guidance", "width", "height")
    }
    words = shlex.split(curl.replace("\\\n", " "))
    assert json.loads(words[words.index("-d") + 1]) == made
    assert words[1] == f"http://127.0.0.1:{served.port}/v1/jobs"
    asked = python[python.index("inkstream.Request") : python.index("\n)") + 2]
    assert eval(asked, {"inkstream": type("inkstream", (), {"Request": Request})}) == Request.model_validate(made)


# The canvas ---------------------------------------------------------------------------------------------------------


def add_picture(page: Any, field: str, picture: Image.Image) -> None:
    """Put a picture into a field of the form, by its button."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    if not page.locator(f"[data-field={field}]").is_visible():
        page.click("summary >> text=Start from pictures")
    with page.expect_file_chooser() as chooser:
        page.locator(f"[data-field={field}] button.empty").click()
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    page.wait_for_selector(f"[data-field={field}] .slot img")


def on_canvas(page: Any, width: int) -> Callable[[float, float], tuple[float, float]]:
    """A function from pixels of the picture to those of the window, for a picture that is shown whole."""
    page.wait_for_selector("dialog.canvas .board[data-shown]")
    box = page.locator("dialog.canvas .surface").bounding_box()
    zoom = min((box["width"] - 56) / width, (box["height"] - 56) / width, 8)  # square, with margins of 28
    left, top = box["x"] + (box["width"] - width * zoom) / 2, box["y"] + (box["height"] - width * zoom) / 2
    return lambda x, y: (left + x * zoom, top + y * zoom)


def drag(page: Any, *points: tuple[float, float]) -> None:
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def mask_of(served: Any, request: dict[str, Any]) -> np.ndarray:
    """The mask that the server got."""
    data = served.ask("GET", f"/v1/uploads/{request['mask'].removeprefix('upload:')}")[2]
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def test_what_is_painted_is_the_servers_mask_and_the_edges_extend_the_picture(served, page):
    add_picture(page, "image", Image.new("RGB", (64, 64), "teal"))
    page.get_by_role("button", name="Paint a mask, extend").click()
    at = on_canvas(page, 64)
    page.fill("#canvas-size", "8")
    drag(page, at(16, 16), at(48, 16))
    page.keyboard.press("r")
    drag(page, at(8, 40), at(24, 56))
    page.keyboard.press("e")
    drag(page, at(8, 40), at(16, 48))
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+y")  # the rectangle is back, the erased part is not
    assert page.evaluate("document.activeElement.className") == "surface"
    page.keyboard.press("x")
    handle = page.get_by_role("slider", name="New space: Right")
    box = handle.bounding_box()
    grip = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    drag(page, grip, (grip[0] + at(16, 0)[0] - at(0, 0)[0], grip[1]))
    assert handle.get_attribute("aria-valuenow") == "16"
    page.fill("#extend-top", "24")
    assert complaints(page) == {"light": [], "dark": []}
    page.get_by_role("button", name="Done").click()
    page.wait_for_selector("[data-field=mask] .slot img")
    ask_for(page, "on the canvas")
    page.wait_for_selector(".tile img[alt='on the canvas']")
    request = jobs(served, "succeeded")[0]["request"]
    assert request["extend"] == "top=24,right=16"
    mask = mask_of(served, request)
    assert mask.shape == (64, 64)
    assert (mask[13:19, 14:50] == 255).all()
    assert (mask[40:56, 8:24] == 255).all()
    assert mask[:11].max() == mask[22:39].max() == mask[30:, 26:].max() == 0
    assert set(np.unique(mask)) == {0, 255}
    page.reload()  # what was painted last is forgotten: the canvas shows the mask of a request
    page.locator(".tile-open").first.click()
    page.locator("dialog").get_by_role("button", name="Use these settings").click()
    page.get_by_role("button", name="Paint a mask, extend").click()
    page.get_by_text(f"Painted: {round(100 * (mask > 0).mean(), 1):g}%").wait_for()
    page.keyboard.press("Delete")
    page.get_by_text("Painted: 0%").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector("[data-field=mask] .slot img", state="detached")


def test_one_finger_paints_two_fingers_move_and_a_pen_presses(served, page):
    add_picture(page, "image", Image.new("RGB", (64, 64), "teal"))
    page.get_by_role("button", name="Paint a mask, extend").click()
    at = on_canvas(page, 64)
    page.fill("#canvas-size", "8")
    painted = page.locator(".canvas-options [role=status]")
    devtools = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        spots = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": spots})

    touch("touchStart", at(20, 20))
    touch("touchMove", at(40, 20))
    touch("touchEnd")
    until(lambda: "Painted: 0%" not in painted.inner_text())
    one = painted.inner_text()
    touch("touchStart", at(20, 40))
    touch("touchMove", at(24, 40))
    touch("touchStart", at(24, 40), at(44, 40))  # a second finger: the stroke was no stroke
    touch("touchMove", at(14, 40), at(54, 40))
    touch("touchEnd")
    assert painted.inner_text() == one
    page.keyboard.press("0")
    for force, y in ((0.1, 50), (1.0, 40)):
        pen = {"button": "left", "buttons": 1, "clickCount": 1, "pointerType": "pen", "force": force}
        for kind, x in (("mousePressed", 20), ("mouseMoved", 40), ("mouseReleased", 40)):
            devtools.send("Input.dispatchMouseEvent", {"type": kind, **dict(zip("xy", at(x, y))), **pen})
    page.get_by_role("button", name="Done").click()
    page.wait_for_selector("[data-field=mask] .slot img")
    name = until(lambda: page.evaluate("JSON.parse(localStorage.getItem('inkstream.wish'))?.shared.mask"))
    mask = mask_of(served, {"mask": name})
    touched, light, firm = ((mask[:, 30][rows] > 0).sum() for rows in (slice(10, 30), slice(46, 60), slice(32, 46)))
    assert touched == firm == 8
    assert 1 <= light <= 4


def test_the_canvas_shows_what_the_server_repaints(page):
    rng = np.random.default_rng(0)
    spots = np.kron(rng.random((6, 9)) < 0.3, np.ones((8, 8))) * 255
    greys = np.kron(rng.integers(0, 256, (6, 9)), np.ones((8, 8)))
    for greyed, fields in (
        (spots, {"mask_blur": 5}),
        (spots, {"mask_blur": 9, "mask_grow": 7, "mask_invert": True}),
        (spots, {"mask_blur": 0, "mask_grow": -2, "extend": "left=9,bottom=5"}),
        (greys, {"mask_blur": 20, "mask_soft": True, "mask_grow": 2, "extend": "90x80@top-right"}),
    ):
        mask = Image.fromarray(greyed.astype(np.uint8))
        request = Request(image="data:,", mask=png_of(mask), **fields)
        canvas = canvas_of(request, Image.new("RGB", mask.size))
        edit = Edit(canvas, canvas.picture.size, request.mask_blur, request.mask_soft, "original")
        share = edit._share(min(request.mask_blur, 8) if request.mask_soft else request.mask_blur)
        if request.mask_soft:
            share = np.minimum(share, edit._share(request.mask_blur)) * canvas.mask / 255
        shown = page.evaluate(
            """async ([base, bytes, width, height, fields]) => {
              const { regionOf } = await import(`${base}/region.js`);
              const { readExtend } = await import(`${base}/extend.js`);
              const region = regionOf({ width, height, bytes: Uint8Array.from(bytes) }, {
                invert: fields.mask_invert ?? false, soft: fields.mask_soft ?? false, grow: fields.mask_grow ?? 0,
                blur: fields.mask_blur, extend: readExtend(fields.extend, { width, height }),
              });
              return [region.height, region.width, [...region.shares]];
            }""",
            [f"/studio/{studio.DIGEST}", list(mask.tobytes()), *mask.size, fields],
        )
        assert (shown[0], shown[1]) == canvas.mask.shape
        assert np.abs(np.reshape(shown[2], canvas.mask.shape) - share * 255).max() <= 1


def test_a_control_picture_gets_a_map_a_net_and_its_steps(served, page):
    until(lambda: served.ask("GET", "/v1/models/turbo/form")[0] == 200)
    page.select_option("#model", "turbo")
    page.click("summary >> text=Control pictures")
    picture = Image.new("RGB", (48, 32), "navy")
    picture.paste("gold", (12, 8, 36, 24))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with page.expect_file_chooser() as chooser:
        page.click("#add-control")
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    assert page.get_by_label("Control net of Control 1").input_value() == "union"
    for label in ("Width", "Height"):
        page.get_by_label(label, exact=True).fill("32")
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Make a map").click()
    page.wait_for_selector(".map-place img:not([hidden])")
    page.select_option("#map-kind", "grey")
    page.wait_for_selector("dialog.maps >> text=32 × 32")
    assert complaints(page) == {"light": [], "dark": []}
    page.get_by_role("button", name="Use this map").click()
    page.locator(".net-strength input[type=number]").fill("0.5")
    page.get_by_label("Control 1: to").fill("60")
    page.keyboard.press("Tab")
    ask_for(page, "controlled")
    page.wait_for_selector(".tile img[alt='controlled']")
    request = jobs(served, "succeeded")[0]["request"]
    assert request["control_nets"] == ["union:0.5@0-0.6"]
    name = request["control"][0].removeprefix("upload:")
    sent = Image.open(io.BytesIO(served.ask("GET", f"/v1/uploads/{name}")[2]))
    assert sent.tobytes() == map_of("grey", picture, (32, 32)).tobytes()


def test_an_edited_picture_is_laid_over_its_start_picture(served, page):
    start = png_of(Image.new("RGB", (32, 32), "teal"))
    served.ended(served.draw(prompt="a wider one", width=None, height=None, image=start, extend="left=16,bottom=32"))
    page.locator(".tile-open", has=page.locator("img[alt='a wider one']")).click()
    page.get_by_role("button", name="Before and after").click()
    page.get_by_label("Line between the pictures").fill("80")
    stage, before = (page.locator(f".compare-stage{part}").bounding_box() for part in ("", " .over img"))
    assert before["width"] == pytest.approx(stage["width"] * 32 / 48, abs=1)
    assert before["x"] - stage["x"] == pytest.approx(stage["width"] * 16 / 48, abs=1)
    assert before["height"] == pytest.approx(stage["height"] / 2, abs=1)


def png_of(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# Recall -------------------------------------------------------------------------------------------------------------


def drop(page: Any, data: bytes, name: str) -> None:
    """Drop a file onto the page."""
    page.evaluate(
        """([bytes, name]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          for (const kind of ["dragenter", "dragover", "drop"])
            document.querySelector("#gallery").dispatchEvent(
              new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [list(data), name],
    )


def test_a_dropped_picture_brings_its_settings_back(served, open_page, page, tmp_path):
    job = served.ended(served.draw(prompt="三个红色的爱心", steps=3, seed=77, guidance=2.5))
    page.fill("#prompt", "something else")
    drop(page, served.ask("GET", job["pictures"][0]["url"])[2], "found.png")
    page.wait_for_selector(".notice >> text=Settings loaded")
    found = {name: page.input_value(f"#{name}") for name in ("prompt", "field-steps", "field-seed", "field-guidance")}
    assert found == {"prompt": "三个红色的爱心", "field-steps": "3", "field-seed": "77", "field-guidance": "2.5"}
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    open_page.refusals.add("404")
    drop(page, (tmp_path / "plain.png").read_bytes(), "plain.png")
    page.wait_for_selector(".notice.error >> text=carries no request")
    assert page.input_value("#prompt") == "三个红色的爱心"


# The gallery --------------------------------------------------------------------------------------------------------


def test_a_gallery_of_25000_scrolls_from_end_to_end(page):
    gallery = page.locator("#gallery")
    assert int(page.locator(".count").first.text_content().replace(",", "").split()[0]) >= STORED
    longest = page.evaluate(
        """async () => {
          const view = document.querySelector("#gallery");
          let longest = 0;
          let last = performance.now();
          for (let i = 0; i < 60; i += 1) {
            view.scrollTop += 900;
            await new Promise(requestAnimationFrame);
            longest = Math.max(longest, document.querySelectorAll(".tile").length);
          }
          return [longest, performance.now() - last];
        }"""
    )[0]
    assert longest < 150  # tiles that exist, whatever the number of pictures
    gallery.evaluate("view => { view.scrollTop = view.scrollHeight }")
    page.wait_for_selector(".tile.loaded img[alt='a stored picture 0']")
    assert page.locator(".tile").count() < 150
    gallery.evaluate("view => { view.scrollTop = 0 }")
    page.wait_for_selector(".tile[data-index='0'].loaded")


def test_the_gallery_is_searched_by_words_of_two_chinese_characters_seeds_and_days(page):
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.fill("#search", "橘猫")
    page.wait_for_selector(f".count >> text='{CATS} pictures'")
    page.wait_for_selector(".tile.loaded img[alt^='窗边的橘猫']")
    page.fill("#search", "no such thing")
    page.wait_for_selector("text=No picture matches.")
    page.click("text=Show all")
    page.get_by_label("More filters").click()
    page.fill("#search-seed", "7000123")
    page.wait_for_selector(".count >> text='1 picture'")
    page.wait_for_selector(".tile img[alt='a stored picture 123']")
    page.fill("#search-seed", "")
    page.fill("#search-since", "2026-01-06")
    page.fill("#search-until", "2026-01-06")
    page.wait_for_selector(".count >> text='1,440 pictures'")  # one a minute


def test_a_picture_is_walked_to_marked_deleted_and_brought_back(served, page):
    page.fill("#search", "a stored picture 2499")
    page.wait_for_selector(".count >> text='13 pictures'")
    page.locator(".tile-open").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".tile-open:focus img[alt='a stored picture 24998']")
    page.keyboard.press("f")
    page.wait_for_selector(".tile.favourite img[alt='a stored picture 24998']")
    page.keyboard.press("Delete")
    page.wait_for_selector(".count >> text='12 pictures'")
    assert served.ask("GET", "/v1/pictures?q=24998&deleted=true")[2]["total"] == 1
    page.locator(".notice >> text=Undo").click()
    page.wait_for_selector(".count >> text='13 pictures'")
    page.get_by_label("Favourites only").click()
    page.wait_for_selector(".count >> text='1 picture'")
    assert served.ask("GET", "/v1/pictures?favourite=true")[2]["total"] == 1


def test_a_picture_is_opened_walked_on_from_and_closed(page):
    page.fill("#search", "a stored picture 2499")
    page.wait_for_selector(".count >> text='13 pictures'")
    page.locator(".tile-open").first.click()
    page.wait_for_selector("dialog.viewer >> text=a stored picture 24999")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("dialog.viewer >> text=a stored picture 24998")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")


def test_two_pictures_are_compared(page):
    for i in (0, 2):
        page.locator(".tile-open").nth(i).click(modifiers=["Control"])
    page.get_by_role("button", name="Compare").click()
    slider = page.get_by_label("Line between the pictures")
    slider.fill("25")
    clip = page.locator("dialog .over").evaluate("image => getComputedStyle(image).clipPath")
    assert clip in ("inset(0px calc(75%) 0px 0px)", "inset(0px 75% 0px 0px)")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("Escape")
    page.wait_for_selector(".tile.picked", state="detached")


# Languages, looks, keys ---------------------------------------------------------------------------------------------


def test_regions_are_drawn_moved_resized_and_told(served, page):
    page.click("summary >> text=Regions")
    for label in ("Width", "Height"):
        page.get_by_label(label, exact=True).fill("64")
        page.keyboard.press("Tab")
    stage = page.locator(".regions-page")
    stage.scroll_into_view_if_needed()

    def at(x: float, y: float) -> tuple[float, float]:
        box = stage.bounding_box()
        return box["x"] + 1 + x * (box["width"] - 2), box["y"] + 1 + y * (box["height"] - 2)

    drag(page, at(0.0, 0.0), at(0.25, 0.5))
    assert page.evaluate("document.activeElement.ariaLabel") == "Text of region 1"
    page.keyboard.type("a red circle")
    drag(page, at(0.1, 0.3), at(0.35, 0.3))  # the box moves to the right by a quarter
    drag(page, at(0.497, 0.497), at(0.747, 0.997))  # and grows by its corner
    page.keyboard.press("Tab")
    page.click("#add-region")
    page.keyboard.type("a blue star")
    page.get_by_label("Strength of region 2").fill("2")
    page.get_by_role("button", name="Region 2: 25% from the left").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    drag(page, at(0.9, 0.1), at(0.902, 0.102))  # too small for a box
    assert stage.locator(".region-box").count() == 2
    assert complaints(page) == {"light": [], "dark": []}
    page.fill("#prompt", "with regions")
    page.fill("#field-steps", "2")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".tile img[alt='with regions']")
    first, second = (Region.read(one) for one in jobs(served, "succeeded")[0]["request"]["regions"])
    assert (first.text, first.strength) == ("a red circle", 1)
    assert first[1:5] == pytest.approx((0.25, 0, 0.5, 1), abs=0.02)
    assert second == ("a blue star", 0.2188, 0.25, 0.5, 0.5313, 2)
    page.get_by_role("button", name="Remove region 1").click()
    page.locator(".tile-open").first.click()
    page.locator("dialog").get_by_role("button", name="Use these settings").click()
    assert page.get_by_label("Text of region 1").input_value() == "a red circle"


def test_an_upscaling_model_of_the_server_is_chosen(page):
    page.click("summary >> text=Finer control")
    page.get_by_label("Upscale", exact=True).fill("2x")
    chooser = page.get_by_label("Upscaler", exact=True)
    chooser.select_option("dark")
    page.reload()
    page.wait_for_selector("#field-upscaler >> option[value=dark]", state="attached")
    assert chooser.input_value() == "dark"
    chooser.select_option("None (Lanczos)")
    assert complaints(page) == {"light": [], "dark": []}


def test_both_languages_say_everything_that_the_page_says(page):
    base = f"/studio/{studio.DIGEST}"
    en, zh = page.evaluate(
        f"async () => [(await import('{base}/words.en.js')).en, (await import('{base}/words.zh.js')).zh]"
    )
    assert set(en) <= set(zh)
    source = "".join(content.decode() for name, content in studio.FILES.items() if name.endswith((".js", ".html")))
    told = page.evaluate(
        r"""(source) => [...source.matchAll(/\bt\("([\w.]+)"/g), ...source.matchAll(/data-t(?:-label)?="(\w+)"/g)]
            .map((match) => match[1])""",
        source,
    )
    assert set(told) <= set(en)
    holes = {name: sorted({part.split("}")[0] for part in text.split("{")[1:]}) for name, text in en.items()}
    assert {name: sorted({p.split("}")[0] for p in zh[name].split("{")[1:]}) for name in en} == holes


def test_the_language_follows_the_browser_and_can_be_switched(open_page):
    page = open_page(locale="zh-CN")
    page.wait_for_selector("#draw-now >> text=绘图")
    page.fill("#prompt", "留在这里")
    page.click("#language")
    page.wait_for_selector("#draw-now >> text=Draw")
    assert page.input_value("#prompt") == "留在这里"
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 800)])
def test_everything_has_a_name_contrast_and_room(open_page, width, height):
    page = open_page(width, height)
    page.wait_for_selector("#draw-now")
    narrow = width < 900
    for view in ("draw", "queue", "gallery") if narrow else ("draw", "gallery"):
        page.click(f"#views [data-view={view}]")
        if view == "draw":
            for summary in page.locator("summary").all():
                summary.click()
            page.select_option("#grid-x", "steps")
            choose_lora(page, "Bold ink")
            choose_lora(page, "small")
            page.click("#add-lora")
            assert complaints(page) == {"light": [], "dark": []}
            page.keyboard.press("Escape")
        if view == "gallery":
            page.wait_for_selector(".tile.loaded")
        assert complaints(page) == {"light": [], "dark": []}
    page.locator(".tile-open").first.click()
    page.wait_for_selector("dialog .facts")
    assert complaints(page) == {"light": [], "dark": []}


def complaints(page: Any) -> dict[str, list[str]]:
    """What the audit finds, in either look."""
    found = {}
    for look in ("light", "dark"):
        page.emulate_media(color_scheme=look)
        page.evaluate("() => Promise.all(document.getAnimations().map((one) => one.finished))")  # colours fade over
        found[look] = page.evaluate(AUDIT)
    return found


def test_the_audit_finds_what_is_wrong(page):
    faults = {
        "contrast": "color: #bbb",
        "no name": "",
        "no alt": "",
        "target": "position: fixed; width: 9px; height: 9px; padding: 0; overflow: hidden",
        "wider": "width: 3000px; height: 1px",
    }
    tags = {"contrast": "p", "no alt": "img", "wider": "div"}
    for fault, style in faults.items():
        text = "" if fault in ("no name", "no alt") else "x"
        page.evaluate(
            """([tag, style, text]) => {
              const element = document.createElement(tag);
              element.style.cssText = style;  // by script, which the policy allows; not as an attribute
              element.textContent = text;
              if (tag === "img") element.src = document.querySelector(".brand img").src;
              element.id = "fault";
              document.body.append(element);
            }""",
            [tags.get(fault, "button"), style, text],
        )
        until(lambda fault=fault: any(line.startswith(fault) for line in page.evaluate(AUDIT)), 10)
        page.evaluate("document.getElementById('fault').remove()")
    assert page.evaluate(AUDIT) == []


def test_the_focus_is_seen_wherever_it_goes(page):
    seen = set()
    for _ in range(45):
        page.keyboard.press("Tab")
        name, shown = page.evaluate(
            """() => {
              const at = document.activeElement;
              const rings = [at, at.closest("label")].filter(Boolean).map((one) => getComputedStyle(one));
              const ring = rings.some((style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2);
              return [at.id || at.className || at.tagName, at === document.body || ring];
            }"""
        )
        assert shown, f"{name} shows no focus"
        seen.add(name)
    assert {"prompt", "draw-now", "search"} <= seen  # and the gallery's thousands are one stop


def test_a_server_with_keys_asks_for_one_and_the_browser_keeps_it(tmp_path, start_server, open_page):
    guarded = start_server(Settings(tmp_path, models=("pocket",)))
    key = add_key(guarded.service.settings.keys, "studio", time.time(), admin=True)
    try:
        open_page.refusals.add("401")
        page = open_page(port=guarded.port)
        page.fill("#key", "not it")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=does not know this key")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#draw-now")
        page.wait_for_selector("#gallery h2")
        page.reload()
        page.wait_for_selector("#draw-now")
        assert page.locator("dialog").count() == 0
        assert page.evaluate("async () => (await fetch('/v1/queue')).status") == 200  # by the cookie alone
        page.close()
    finally:
        guarded.stop()


# The files ----------------------------------------------------------------------------------------------------------


def test_the_page_is_asked_for_again_and_its_files_are_kept(served):
    status, headers, page = served.ask("GET", "/")
    assert status == 200
    assert headers["cache-control"] == "no-cache"
    assert "script-src 'self'" in headers["content-security-policy"]
    assert served.ask("GET", "/", headers={"If-None-Match": headers["etag"]})[0] == 304
    address = f"/studio/{studio.DIGEST}/main.js"
    assert f'src="{address}"' in page.decode()
    status, headers, _ = served.ask("GET", address)
    assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    assert "immutable" in headers["cache-control"]
    assert served.ask("GET", "/studio/0/main.js")[1]["cache-control"] == "no-cache"
    assert served.ask("GET", f"/studio/{studio.DIGEST}/../studio.py")[0] == 404


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_inline():
    for name, content in studio.FILES.items():
        text = content.decode()
        for line in text.splitlines():
            for scheme in ("http://", "https://"):
                assert scheme not in line.replace("http://www.w3.org/2000/svg", ""), f"{name}: {line}"
        assert "innerHTML" not in text
    page = studio.FILES["index.html"].decode()
    assert " style=" not in page
    assert "<script>" not in page


# Modules ------------------------------------------------------------------------------------------------------------


def test_modules_import_one_another_without_a_circle():
    line = re.compile(r'^import .* from "\./([\w.]+)";$', re.MULTILINE)
    imports = {name: line.findall(text.decode()) for name, text in studio.FILES.items() if name.endswith(".js")}
    assert "dom.js" in imports["main.js"]
    left = dict(imports)
    while ready := [name for name, needs in left.items() if not left.keys() & needs]:
        for name in ready:
            del left[name]
    assert not left, f"a circle is in the imports of {', '.join(left)}: move the shared function to a lower module"
