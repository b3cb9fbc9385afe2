"""Take the screenshots docs/pictures/studio-*.png: a real server and a real browser, in desktop and in phone size.

    python scripts/draw_studio.py [FOLDER]

FOLDER keeps the server's data, so that a second run does not draw the same pictures again.
"""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import uvicorn
from draw_pictures import PROMPTS
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from inkstream.serve.app import build
from inkstream.serve.limits import Settings
from inkstream.types import Machine

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
CHINESE = ("三个红色的爱心，白色背景", "四颗黄色的星星，蓝色背景")
MORE = (
    "a purple star, on a gradient from yellow top to orange bottom",
    "two green hearts, on a black background",
    "a cyan ring above an orange square, on a white background",
    "a large brown cross on the right, a small pink circle on the left, on a yellow background",
    "four white circles, on a purple background",
    "a split background, blue left and white right, a large red star in the center",
    "a yellow crescent in the center, on a gradient from blue top to black bottom",
    "three cyan drops, on a white background",
    "a pink heart to the right of a green circle, on a black background",
    "an orange triangle below a purple square, on a white background",
    "two white stars, on a red background",
    "a large green ring in the center, on a pink background",
)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 800}
GRID = 202_611
"""Seed of the grid. The gallery's search finds the grid's pictures by it."""
MOST = 200_000
"""Largest size in bytes of a picture in the documentation."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run a server in a thread and yield its address."""
    machine = Machine(control_folder=str(write_net(folder / "controls")))
    app = build(Settings(folder, models=("pocket", "z-image-turbo"), machine=machine))
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.1)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    app.state.service.jobs.feed.close()
    server.should_exit = True
    thread.join(20)


def ask(address: str, body: Any = None, method: str = "GET") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urlopen(request) as answer:
        return json.loads(answer.read())


def fill(address: str) -> None:
    """Draw the pictures of the gallery and of the grid that the server does not have yet."""
    here = {job["note"] for job in ask(f"{address}/v1/jobs?limit=500")["jobs"]}
    axes = {"x": {"field": "steps", "values": [2, 4, 8, 16]}, "y": {"field": "guidance", "values": [1, 4, 7]}}
    jobs: list[dict[str, Any]] = [{"prompt": PROMPTS[0], "seed": GRID, "note": "grid", "grid": axes}]
    jobs += [{"prompt": prompt, "seed": i, "note": str(i)} for i, prompt in enumerate((*PROMPTS, *MORE, CHINESE[1]))]
    for job in jobs:
        if job["note"] not in here:
            ask(f"{address}/v1/jobs", job, "POST")
    while (queue := ask(f"{address}/v1/queue"))["queued"] or queue["running"]:
        time.sleep(1)


def open_page(browser: Any, address: str, size: dict[str, int], scheme: str, locale: str = "en-GB") -> Page:
    context = browser.new_context(viewport=size, color_scheme=scheme, locale=locale)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#gallery .tiles", state="attached")
    page.wait_for_selector(".frame")
    return page


def shoot(page: Page, name: str) -> None:
    """Save a screenshot after animations have ended. A file above MOST bytes is reduced to 256 colours."""
    page.wait_for_timeout(700)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = PICTURES / f"studio-{name}.png"
    picture.save(path, optimize=True)
    if path.stat().st_size > MOST:
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size >> 10} KB")


def gallery(page: Page) -> None:
    """Show the gallery."""
    page.click("#views [data-view=gallery]")
    page.wait_for_selector(".tile.loaded")


def draw_desk(browser: Any, address: str) -> None:
    page = open_page(browser, address, DESK, "light")
    page.fill("#prompt", PROMPTS[1])
    page.keyboard.press("Control+Enter")
    page.locator(".stage-image").and_(page.get_by_alt_text(PROMPTS[1], exact=True)).wait_for(timeout=120_000)
    shoot(page, "stage")
    page.click("#draft-now")
    page.fill("#prompt", CHINESE[0])
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".stage-progress progress[value]", timeout=120_000)
    gallery(page)
    page.wait_for_selector(".job:nth-child(2) progress[value]", timeout=120_000)
    page.wait_for_timeout(1500)
    shoot(page, "desk-light")
    for job in (queue := ask(f"{address}/v1/queue"))["queued"] + queue["running"]:
        ask(f"{address}/v1/jobs/{job['id']}", method="DELETE")
    page = open_page(browser, address, DESK, "dark", "zh-CN")
    page.fill("#prompt", CHINESE[1])
    gallery(page)
    for i in (0, 3):
        page.locator(".tile-open").nth(i).click(modifiers=["Control"])
    shoot(page, "desk-dark")
    page = open_page(browser, address, DESK, "light")
    gallery(page)
    page.locator(".tile-open").nth(4).click()
    page.wait_for_selector(".facts")
    shoot(page, "viewer")


def draw_dialogs(browser: Any, address: str) -> None:
    page = open_page(browser, address, DESK, "light")
    gallery(page)
    page.fill("#search", str(GRID))
    page.wait_for_selector(".count >> text='12 pictures'")
    page.wait_for_selector(".tile.loaded")
    tiles = page.locator(".tile-open")
    tiles.first.click()
    page.locator("dialog").get_by_role("button", name="All pictures of this job").click()
    page.wait_for_selector(".sheet-grid img")
    shoot(page, "grid")
    page.keyboard.press("Escape")
    for i in (4, 7):  # newest first: the pictures with 16 and with 2 steps, both with guidance 4
        tiles.nth(i).click(modifiers=["Control"])
    page.get_by_role("button", name="Compare").click()
    shoot(page, "compare")


def draw_canvas(browser: Any, address: str) -> None:
    page = open_page(browser, address, DESK, "light")
    gallery(page)
    page.locator(".tile-open").first.click()
    page.get_by_role("button", name="Start from this picture").click()
    page.get_by_role("button", name="Paint a mask, extend").click()
    page.wait_for_selector(".board[data-shown]")
    box = page.locator(".surface").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] - 180, middle[1] - 60)
    page.mouse.down()
    for x, y in ((-60, 60), (60, -20), (150, 90)):
        page.mouse.move(middle[0] + x, middle[1] + y, steps=12)
    page.mouse.up()
    page.keyboard.press("x")
    page.fill("#extend-right", "40")
    shoot(page, "canvas")
    page.get_by_role("button", name="Done").click()
    page.select_option("#model", "z-image-turbo")
    page.wait_for_selector("#draw:has([data-section=control])")
    page.locator(".tile-open").first.click()
    page.get_by_role("button", name="As control picture").click()
    page.get_by_role("button", name="Make a map").click()
    page.wait_for_selector(".map-place img:not([hidden])")
    shoot(page, "map")


def write_net(folder: Path) -> Path:
    """Write a file that looks like a control net of Z-Image, for the form, and return its folder."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({"control_all_x_embedder.2-1.weight": torch.zeros(3840, 132)}, folder / "z-image-union.safetensors")
    return folder


def draw_phone(browser: Any, address: str) -> None:
    page = open_page(browser, address, PHONE, "light")
    page.fill("#prompt", PROMPTS[0])
    shoot(page, "phone-light")
    page = open_page(browser, address, PHONE, "dark")
    gallery(page)
    shoot(page, "phone-dark")


def main() -> None:
    chromium = shutil.which("chromium") or sys.exit("chromium is not installed: apt-get install chromium")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    PICTURES.mkdir(exist_ok=True)
    with serve(folder) as address, sync_playwright() as p:
        fill(address)
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        for draw in (draw_desk, draw_dialogs, draw_canvas, draw_phone):
            draw(browser, address)
        browser.close()


if __name__ == "__main__":
    main()
