"""Draw docs/pictures/pocket.png, the README's picture, with the model in the package.

python scripts/draw_pictures.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import inkstream

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "pocket.png"
PROMPTS = (
    "a large red heart on the left, a small blue star at the bottom right, on a white background",
    "a red square above a blue circle, on a white background",
    "five small purple circles, on a yellow background",
    "a yellow star in the center, on a gradient from blue top to purple bottom",
    "a green rectangle to the left of an orange heart, on a white background",
    "a large purple ring in the center, on a cyan background",
    "a split background, green left and yellow right, a large black square in the center",
    "三个红色的爱心，白色背景",
    "four black crosses, on an orange background",
    "a green triangle at the top, a brown drop at the bottom, on a white background",
    "a white crescent at the top right, a yellow star at the bottom left, on a black background",
    "two pumpkins, on a white background",
)
COLUMNS, GAP = 6, 4


def draw() -> Image.Image:
    """Draw all prompts into one grid. Picture i has seed i."""
    engine = inkstream.Engine("cpu")
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
