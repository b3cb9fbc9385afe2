"""Draw docs/pictures/pocket.png, the README's picture, with the model in the package.

python scripts/draw_pictures.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import inkstream

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "pocket.png"
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


def draw() -> Image.Image:
    """Draw all prompts into one grid. Picture i has seed i."""
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    pictures = [engine.generate(inkstream.Request(prompt=p, seed=i)).images[0] for i, p in enumerate(PROMPTS)]
    width, height = pictures[0].size
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % COLUMNS * (width + GAP), i // COLUMNS * (height + GAP)))
    return sheet


if __name__ == "__main__":
    draw().save(PICTURE, optimize=True)
    print(PICTURE)
