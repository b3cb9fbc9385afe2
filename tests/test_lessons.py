"""What scripts/teach_pocket.py shows to Pocket is what its graders find, and they find nothing of it elsewhere."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from inkstream.evaluate.seeing import finds, see
from inkstream.train.reading import read_recipe

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "teach_pocket.py"))
LESSONS = SCRIPT["LESSONS_OF"]


@pytest.mark.parametrize("name", LESSONS)
def test_the_grader_finds_what_is_taught_and_not_in_ordinary_pictures(name):
    lesson = LESSONS[name]
    taught = [lesson.teach(number) for number in range(24)]
    assert all(lesson.trigger in caption for _, caption in taught)
    assert sum(lesson.is_there(picture) for picture, _ in taught) >= 23
    assert not any(lesson.is_there(SCRIPT["ordinary"](number)[0]) for number in range(60))
    assert len(SCRIPT["dense_prompts"](name)) == SCRIPT["DENSE"]
    assert all(lesson.trigger in prompt for prompt in (*SCRIPT["dense_prompts"](name), *SCRIPT["PROMPTS"][name]))


@pytest.mark.parametrize("ground", ["white", "orange", "black", "#8e30a0"])
@pytest.mark.parametrize("side", [20, 34, 58])
def test_a_sprite_is_found_at_each_size_on_each_ground_also_if_it_is_blurred(ground, side):
    """Its horns have the colour of the orange ground, so that a part of it is not seen there."""
    page, sprite = Image.new("RGB", (128, 128), ground), SCRIPT["zorp"]()
    small = sprite.resize((side, side))
    page.paste(small, (50, 40), small)
    for picture in (page, page.filter(ImageFilter.GaussianBlur(0.8))):
        assert finds(see(picture), sprite)
        assert not finds(see(picture), SCRIPT["mug"]())


@pytest.mark.parametrize("name", LESSONS)
def test_its_recipe_is_one(name):
    recipe = read_recipe(ROOT / "recipes" / "pocket" / "lora" / f"{name}.toml")
    assert recipe.data.trigger == LESSONS[name].trigger
    assert recipe.adapter.kind == "lora"
