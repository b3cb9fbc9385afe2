"""Draw the docs' pictures with the model in the package: pocket.png of the README, editing.png of editing.md.

python scripts/draw_pictures.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import inkstream
from inkstream.engine.drawing.complete import complete
from inkstream.pocket.draw import render
from inkstream.pocket.scenes import Background, Scene, Thing

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
PROMPTS = (
    "a red circle",
    "一只猫",
    "three hearts",
    "five blue stars",
    "a purple moon on black",
    'a sign that says "OPEN"',
    "红色圆形，黄色背景",
    "a dog under a tree",
    "a big green triangle",
    "a red square to the left of a blue ring",
    "两颗黄色的星星",
    "a pumpkin on a white background",
)
"""Prompts as people type them. Picture i has seed i, and none is chosen."""
COLUMNS, GAP = 6, 4
SIDE = 128
CIRCLE = Thing("circle", "red", "large", 5 / 16, 0.5, 0.4375)
STAR = Thing("star", "yellow", "medium", 13 / 16, 0.5, 0.25)
START = Scene("things", Background("flat", ("blue",)), (CIRCLE, STAR))
"""The start picture of the edits is rendered."""
MASK = (80, 40, 128, 88)
"""The box of the mask, around the star."""
EDITS: tuple[tuple[str, dict[str, object]], ...] = (
    ("a large red circle on the left, a medium white heart on the right, on a blue background", {"mask": MASK}),
    ("a large red circle on the left, on a blue background", {"mask_from": "colour:#ffdc28~90", "mask_grow": 10}),
    ("a large green square on the left, a medium yellow star on the right, on a blue background",
     {"mask": MASK, "mask_invert": True}),
    ("a large red circle on the left, a medium yellow star in the center, on a blue background",
     {"extend": "right=64"}),
)  # fmt: skip
"""A prompt and the fields of each edit. Edit i has seed i, and none is chosen."""


def draw_edits(engine: inkstream.Engine) -> Image.Image:
    """Draw the start picture with each mask in grey above, and the results below."""
    start = render(START, SIDE)
    columns = []
    for seed, (prompt, fields) in enumerate(EDITS):
        mask = Image.new("L", start.size)
        mask.paste(255, MASK)
        given = {**fields, "mask": mask} if "mask" in fields else fields
        request = inkstream.Request(prompt=prompt, image=start, seed=seed, **given)
        edit = complete(request, engine.spec("pocket")).edit
        assert edit is not None
        above = edit.canvas.picture.copy()
        above.paste("#808080", mask=Image.fromarray(edit.canvas.mask))
        columns.append((above, engine.generate(request).images[0]))
    width = sum(above.width + GAP for above, _ in columns) - GAP
    sheet = Image.new("RGB", (width, 2 * start.height + GAP), "white")
    left = 0
    for pictures in columns:
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, row * (start.height + GAP)))
        left += pictures[0].width + GAP
    return sheet


def draw_prompts(engine: inkstream.Engine) -> Image.Image:
    """Draw all prompts into one grid. Picture i has seed i."""
    pictures = [engine.generate(inkstream.Request(prompt=p, seed=i)).images[0] for i, p in enumerate(PROMPTS)]
    width, height = pictures[0].size
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % COLUMNS * (width + GAP), i // COLUMNS * (height + GAP)))
    return sheet


if __name__ == "__main__":
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    for name, draw in {"pocket": draw_prompts, "editing": draw_edits}.items():
        draw(engine).save(PICTURES / f"{name}.png", optimize=True)
        print(PICTURES / f"{name}.png")
