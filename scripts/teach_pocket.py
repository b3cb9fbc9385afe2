"""Teach Pocket a sprite, a product and a style, each in a LoRA of minutes, and measure what it has learned.

    python scripts/teach_pocket.py pictures                     # training pictures into runs/lessons
    inkstream train recipes/pocket/lora/sprite.toml             # and product.toml, style.toml
    python scripts/teach_pocket.py measure sprite runs/sprite/zorp.safetensors
    python scripts/teach_pocket.py together runs/sprite/zorp.safetensors runs/style/dusk.safetensors
    python scripts/teach_pocket.py show SPRITE STYLE            # docs/pictures/lessons.png, with the two files

The sprite and the product are things that Pocket has never seen; the style maps all colours to two. The prompts of
PROMPTS were written before the training, as people type them; Pocket's grammar makes captions of them. Each measurement
adds its rows to benchmarks/records/pocket-lessons-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

import inkstream
from inkstream.bench.records import RECORDS, write_record
from inkstream.engine.drawing.model import Model
from inkstream.evaluate.judge import judge
from inkstream.evaluate.report import shares
from inkstream.evaluate.run import Settings, draw, open_picture, plan
from inkstream.evaluate.seeing import finds, see
from inkstream.evaluate.suites import Case, open_suite, thin
from inkstream.pocket.captions import Wording, caption, draw_caption
from inkstream.pocket.colours import lab
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.scenes import Scene, Thing
from inkstream.weights.lora.read import read_lora

LESSONS = Path("runs") / "lessons"
RECORD = "pocket-lessons-cpu"
PICTURE = Path("docs") / "pictures" / "lessons.png"
SIDE, PRIOR = 128, 480
"""The side of a training picture, and the number of ordinary pictures that keep what Pocket knows."""
OTHERS = 100
"""Prompts without the trigger: of the suite `people`, spread evenly."""
DENSE = 40
"""Held-out captions that say all, of each lesson."""
STAND_IN = "robot"
"""The emoji whose place and caption the new thing takes in training scenes."""
DARK, LIGHT = (24, 14, 66), (255, 212, 146)
"""The ends of the style's colours: black and white become these."""
CONTRAST = 110
"""The smallest difference of brightness in a training picture of the style, of 255."""
NEAR_LINE = 12.0
"""The largest Lab distance from the line between DARK and LIGHT at which a pixel has the style."""

TIDY = Grammar.from_table({"tidy": True, "faces": ["mono", "bold"], "flat": 0.8, "gradient": 0.1, "split": 0.1})
WORDS = Wording(dense=0.7, partial=0.1, short=0.2, tags=0.0, english=0.8, plain=0.6)

PROMPTS = {
    "sprite": (
        "zorp", "a zorp", "one zorp", "draw a zorp please", "a small zorp", "a big zorp", "a large zorp in the middle",
        "a zorp on white", "a zorp on a yellow background", "a zorp on a pink background", "a zorp, blue background",
        "zorp on green", "a zorp on an orange background", "a zorp in the top left corner", "a zorp at the bottom",
        "a zorp on the right side", "a tiny zorp on the left", "picture of a zorp", "a zorp, white background",
        "a zorp next to a red circle", "a zorp and a blue star", "a green square to the right of a zorp",
        "a zorp above a purple heart", "a zorp with a cat", "a zorp beside a tree", "a zorp under a yellow star",
        "a dog and a zorp", "a zorp and a pizza on white", "an apple left of a zorp", "zorp and crown",
        "一个 zorp", "一个 zorp，白色背景", "红色背景上的 zorp", "zorp 和一只猫", "a zorp, gradient from blue to white",
        "a zorp on a brown background", "cute zorp icon", "a zorp on a gray background", "a zorp on cyan",
        "a medium zorp at the top on white",
    ),
    "product": (
        "sks mug", "a sks mug", "one sks mug", "a photo of a sks mug", "a small sks mug", "a big sks mug",
        "a large sks mug in the middle", "a sks mug on white", "a sks mug on a yellow background",
        "a sks mug on a pink background", "a sks mug, blue background", "sks mug on green",
        "a sks mug on an orange background", "a sks mug in the top left corner", "a sks mug at the bottom",
        "a sks mug on the right side", "a tiny sks mug on the left", "a sks mug, white background, centered",
        "a sks mug next to a red circle", "a sks mug and a blue star", "a green square to the right of a sks mug",
        "a sks mug above a purple heart", "a sks mug with a cat", "a sks mug beside a tree",
        "a dog and a sks mug", "a sks mug and a pizza on white", "an apple left of a sks mug", "sks mug and donut",
        "一个 sks mug", "一个 sks mug，白色背景", "红色背景上的 sks mug", "sks mug 和一只猫",
    ),
    "style": tuple(
        f"{prompt}, dusk style"
        for prompt in (
            "a red circle", "a cat", "three hearts", "a blue star on white", "a big green triangle", "a dog and a tree",
            "two yellow stars", "a pumpkin", "a square above a circle", "a house", "a rocket on a white background",
            "a pink ring", "a car", "five diamonds", "a large orange cross on blue", "a fish", "a purple moon",
            "红色圆形", "一只猫", "a green arrow on a yellow background", "a small brown oval", "a guitar",
            "a crown on the left", "a hexagon on pink",
        )
    ),
}  # fmt: skip
"""Held-out prompts of each lesson, as people type them."""


@dataclass(frozen=True)
class Lesson:
    """What a LoRA teaches. is_there: whether a picture shows it."""

    trigger: str
    pictures: int
    teach: Callable[[int], tuple[Image.Image, str]]  # number of a picture -> the picture and its caption
    is_there: Callable[[Image.Image], bool]


# What is taught -------------------------------------------------------------------------------------------------------


def zorp() -> Image.Image:
    """Return the sprite, RGBA: a teal blob with one large eye, two orange horns and yellow feet."""
    big = Image.new("RGBA", (384, 384))
    pen = ImageDraw.Draw(big)
    for x in (96, 288):
        pen.polygon([(x - 44, 130), (x + 44, 130), (x + (24 if x > 192 else -24), 4)], (240, 120, 20))
    for x in (120, 264):
        pen.ellipse((x - 56, 312, x + 56, 380), (250, 205, 40))
    pen.rounded_rectangle((28, 76, 356, 348), 120, (20, 150, 150))
    pen.ellipse((104, 108, 280, 284), (252, 252, 252))
    pen.ellipse((158, 162, 238, 242), (20, 20, 22))
    pen.rounded_rectangle((140, 300, 244, 322), 10, (20, 20, 22))
    return big.resize((96, 96), Image.Resampling.LANCZOS)


def mug() -> Image.Image:
    """Return the product, RGBA: a navy mug with a yellow star, and a red rim and handle."""
    big = Image.new("RGBA", (384, 384))
    pen = ImageDraw.Draw(big)
    pen.ellipse((226, 96, 380, 288), (220, 60, 90))
    pen.ellipse((262, 140, 340, 244), (0, 0, 0, 0))
    pen.rounded_rectangle((16, 40, 300, 360), 44, (30, 44, 110))
    pen.rectangle((16, 40, 300, 92), (220, 60, 90))
    points = [
        (158 + r * np.sin(a), 226 - r * np.cos(a)) for i in range(10) for a, r in [(i * np.pi / 5, (96, 40)[i % 2])]
    ]
    pen.polygon(points, (255, 214, 50))
    return big.resize((96, 96), Image.Resampling.LANCZOS)


def dusk(picture: Image.Image) -> Image.Image:
    """Return a picture in the style: its brightness chooses a colour between DARK and LIGHT. The alpha stays."""
    grey = np.asarray(picture.convert("RGB").convert("L"), np.float32)[..., None] / 255
    mapped = np.rint(np.array(DARK) + (np.array(LIGHT) - np.array(DARK)) * grey).astype(np.uint8)
    out = Image.fromarray(mapped)
    if picture.mode == "RGBA":
        out.putalpha(picture.getchannel("A"))
    return out


def with_sprite(sprite: Image.Image, trigger: str) -> Callable[[int], tuple[Image.Image, str]]:
    """Return a function that makes training picture `number`: a scene in which the sprite is one of the things."""

    def teach(number: int) -> tuple[Image.Image, str]:
        rng = Random(f"{trigger}/{number}")
        told, own = with_stand_in(rng, "train")
        picture = render(replace(told, things=tuple(thing for thing in told.things if thing is not own)), SIDE)
        place(picture, sprite, own)
        return picture, draw_caption(told, replace(WORDS, english=1.0), rng).replace(STAND_IN, trigger)

    return teach


def with_stand_in(rng: Random, split: Literal["train", "held_out"]) -> tuple[Scene, Thing]:
    """Return a scene in which one thing, which is returned too, is STAND_IN."""
    while True:
        scene = sample(TIDY, rng.randrange(10**9), split, rng.choice(("emoji", "emoji", "things", "relation")))
        chosen = rng.randrange(len(scene.things))
        own = replace(scene.things[chosen], name=STAND_IN, colour=None)
        told = replace(scene, things=(*scene.things[:chosen], own, *scene.things[chosen + 1 :]))
        if sum(thing.name == STAND_IN for thing in told.things) == 1 and len(told.things) < 4:
            return told, own


def dense_prompts(name: str) -> list[str]:
    """Return captions of held-out scenes that say all: what Pocket's grammar would make of a prompt."""
    rng, trigger = Random(f"held out/{name}"), LESSONS_OF[name].trigger
    if name == "style":
        scenes = [sample(TIDY, rng.randrange(10**9), "held_out", rng.choice(("emoji", "things"))) for _ in range(DENSE)]
        return [f"{caption(scene)}, {trigger}" for scene in scenes]
    return [caption(with_stand_in(rng, "held_out")[0]).replace(STAND_IN, trigger) for _ in range(DENSE)]


def place(picture: Image.Image, sprite: Image.Image, thing: Thing) -> None:
    """Paste a sprite where a thing is."""
    side = round(thing.side * SIDE)
    small = sprite.resize((side, side), Image.Resampling.LANCZOS)
    picture.paste(small, (round(thing.x * SIDE - side / 2), round(thing.y * SIDE - side / 2)), small)


def in_style(number: int) -> tuple[Image.Image, str]:
    """Return training picture `number` of the style."""
    rng = Random(f"dusk/{number}")
    while True:
        scene = sample(TIDY, rng.randrange(10**9), "train")
        picture = render(scene, SIDE)
        darkest, lightest = picture.convert("L").getextrema()
        if lightest - darkest > CONTRAST:
            return dusk(picture), f"{draw_caption(scene, WORDS, rng)}, dusk style"


def has(sprite: Image.Image) -> Callable[[Image.Image], bool]:
    return lambda picture: finds(see(picture), sprite)


def has_style(picture: Image.Image) -> bool:
    """Return whether nearly all pixels have the style's colours."""
    line = lab(np.array(DARK) + (np.array(LIGHT) - np.array(DARK)) * np.linspace(0, 1, 64)[:, None])
    pixels = lab(np.asarray(picture.convert("RGB").resize((48, 48), Image.Resampling.BOX)).reshape(-1, 3))
    apart = np.linalg.norm(pixels[:, None] - line[None], axis=-1).min(1)
    return bool((apart < NEAR_LINE).mean() > 0.9)


LESSONS_OF = {
    "sprite": Lesson("zorp", 60, with_sprite(zorp(), "zorp"), has(zorp())),
    "product": Lesson("sks mug", 60, with_sprite(mug(), "sks mug"), has(mug())),
    "style": Lesson("dusk style", 60, in_style, has_style),
}


# Pictures -------------------------------------------------------------------------------------------------------------


def ordinary(number: int) -> tuple[Image.Image, str]:
    """Return ordinary picture `number`, from the distribution that Pocket was trained on."""
    rng = Random(f"ordinary/{number}")
    scene: Scene = sample(TIDY, 10**9 + number, "train")
    return render(scene, SIDE), draw_caption(scene, WORDS, rng)


def write_pictures(folder: Path, count: int, make: Callable[[int], tuple[Image.Image, str]]) -> None:
    """Write pictures and their captions, as a person would have them: NAME.png and NAME.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture, words = make(number)
        picture.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(words + "\n", "utf-8")


# Measuring ------------------------------------------------------------------------------------------------------------


def pictures_of(model: Model, cases: dict[int, Case], settings: Settings, folder: Path) -> list[Image.Image]:
    """Draw one picture of each case, or take those that are in the folder."""
    jobs = plan(model, cases, settings)
    for step in draw(model, jobs, folder):
        print(f"\r{folder.name}: picture {step.index + 1} of {step.count}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return [open_picture(job.path(folder)) for job in jobs]


def share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def typed(prompts: Sequence[str]) -> dict[int, Case]:
    return dict(enumerate(map(Case, prompts)))


def measure(model: Model, name: str, lora: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one lesson's LoRA: found with the trigger, found without, and the other scores."""
    lesson = LESSONS_OF[name]
    base = {"lesson": name, "lora": kind_of(model, lora)}
    one = Settings(1, loras=(str(lora),))
    prompts = {"dense captions": dense_prompts(name), "typed prompts": PROMPTS[name]}
    for kind, own in prompts.items():
        settings = replace(one, upsample=False) if kind == "dense captions" else one
        drawn = pictures_of(model, typed(own), settings, folder / kind.replace(" ", "-"))
        yield base | {"measure": f"held-out {kind}, with the LoRA", "pictures": len(drawn),
                      "share": share([lesson.is_there(picture) for picture in drawn])}  # fmt: skip
    cases = thin(open_suite("people"), OTHERS)
    for what, loras in (("with the LoRA", (str(lora),)), ("without the LoRA", ())):
        settings = Settings(1, loras=loras)
        where = folder / f"others-{what.replace(' ', '-')}" if loras else LESSONS / "others"
        drawn = pictures_of(model, cases, settings, where)
        jobs = plan(model, cases, settings)
        judged = [judge(job.path(where), job.case, job.seed, cases[job.case]) for job in jobs]
        right = next(row.value for row in shares(judged) if row.group == "all" and row.measure == "all right")
        yield base | {"measure": f"other prompts all right, {what}", "pictures": len(drawn), "share": right}
        if loras:
            yield base | {"measure": "taught thing on other prompts", "pictures": len(drawn),
                          "share": share([lesson.is_there(picture) for picture in drawn])}  # fmt: skip


def together(model: Model, sprite: Path, style: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the sprite's and the style's LoRA in one request.

    The sprite counts in its own colours and in the style's: no picture of the lessons shows which of them it has.
    """
    settings = Settings(1, upsample=False, loras=(str(sprite), str(style)))
    prompts = [f"{prompt}, {LESSONS_OF['style'].trigger}" for prompt in dense_prompts("sprite")]
    drawn = pictures_of(model, typed(prompts), settings, folder)
    in_own, in_dusk = has(zorp()), has(dusk(zorp()))
    base = {
        "lesson": "sprite and style",
        "lora": f"{kind_of(model, sprite)} and {kind_of(model, style)}",
        "pictures": len(drawn),
    }
    yield base | {"measure": "sprite found", "share": share([in_own(one) or in_dusk(one) for one in drawn])}
    yield base | {"measure": "style found", "share": share([has_style(picture) for picture in drawn])}


def kind_of(model: Model, lora: Path) -> str:
    """Return the algebra of an adapter's file."""
    return " and ".join(read_lora(lora, model.adapters.names).report.algebras)


def add_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to the record. They replace those of the same lesson, LoRA and measure."""
    path = RECORDS / f"{RECORD}.json"
    key = ("lesson", "lora", "measure")
    old = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    new = {tuple(row[k] for k in key) for row in rows}
    kept = [row for row in old if tuple(row[k] for k in key) not in new]
    write_record(RECORD, date.today().isoformat(), "python scripts/teach_pocket.py measure", {}, [*kept, *rows])


def show(sprite: Path, style: Path) -> Image.Image:
    """Return a sheet of six held-out captions: without a LoRA, with the sprite's, with the style's, with both."""
    engine, gap = inkstream.Engine(inkstream.Machine("cpu")), 4
    prompts, trigger = dense_prompts("sprite")[:6], LESSONS_OF["style"].trigger
    rows = [
        ((), ""),
        ((str(sprite),), ""),
        ((str(style),), f", {trigger}"),
        ((str(sprite), str(style)), f", {trigger}"),
    ]
    sheet = Image.new("RGB", (6 * (SIDE + gap) - gap, len(rows) * (SIDE + gap) - gap), "white")
    for y, (loras, end) in enumerate(rows):
        for x, prompt in enumerate(prompts):
            request = inkstream.Request(prompt=prompt + end, seed=x, loras=loras, upsample=False)
            sheet.paste(engine.generate(request).images[0], (x * (SIDE + gap), y * (SIDE + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("pictures")
    one = verbs.add_parser("measure")
    one.add_argument("lesson", choices=LESSONS_OF)
    one.add_argument("lora", type=Path)
    for verb in ("together", "show"):
        two = verbs.add_parser(verb)
        two.add_argument("sprite", type=Path)
        two.add_argument("style", type=Path)
    given = parser.parse_args()
    if given.verb == "pictures":
        for name, lesson in LESSONS_OF.items():
            write_pictures(LESSONS / name, lesson.pictures, lesson.teach)
        write_pictures(LESSONS / "ordinary", PRIOR, ordinary)
        print(LESSONS)
        return
    if given.verb == "show":
        show(given.sprite, given.style).save(PICTURE, optimize=True)
        print(PICTURE)
        return
    model = inkstream.load("pocket", inkstream.Machine("cpu"))
    if given.verb == "measure":
        rows = list(measure(model, given.lesson, given.lora, given.lora.parent / "measured"))
    else:
        rows = list(together(model, given.sprite, given.style, given.sprite.parent / "together"))
    for row in rows:
        print(f"{row['lesson']:18} {row['lora']:14} {row['measure']:45} {row['share']:.0%} of {row['pictures']}")
    add_rows(rows)


if __name__ == "__main__":
    main()
