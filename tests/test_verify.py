"""What was asked for is found in pictures that show it, and missed in those that do not; wrong ones are drawn again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from inkstream.cli import main
from inkstream.engine.drawing.options import options
from inkstream.engine.drawing.verifying import STRIDE, draw_until_verified
from inkstream.engine.pictures.asked import Asked, asked_in
from inkstream.engine.pictures.checks import check_colours, check_text, delta_e2000
from inkstream.engine.pictures.metadata import describe, save_picture
from inkstream.evaluate.verify import check_things, compare_layouts, is_flat, layout_of, quality_of, verify
from inkstream.families import SPECS
from inkstream.pocket.draw import render
from inkstream.pocket.scenes import Background, Scene, Thing, Writing
from inkstream.serve.errors import Refused
from inkstream.serve.limits import Limits, check
from inkstream.types import Done, Failed, InputError, Loading, Request, Step

WHITE = Background("flat", ("white",))
CIRCLE, SQUARE = Thing("circle", "red", "medium", 0.25, 0.5, 0.25), Thing("square", "blue", "medium", 0.75, 0.5, 0.25)
PAIR = Scene("relation", WHITE, (CIRCLE, SQUARE), relation="left of")


def sign(text: str, side: int = 256) -> Image.Image:
    return render(Scene("text", WHITE, writings=(Writing(text, "bold", "black", 0.5, 0.5, 0.25),)), side)


# What is asked


@pytest.mark.parametrize(
    ("prompt", "texts", "colours"),
    [
        ('a sign that says "OPEN" and “CLOSED”', ("OPEN", "CLOSED"), ()),
        ("写着「春天」的海报，颜色#F80", ("春天",), ("#ff8800",)),
        ("a dog's bone and the cat's toy", (), ()),
        ("the words 'BIG DAY' on #12aBc3, and #12ABC3 again", ("BIG DAY",), ("#12abc3",)),
        ('{"scene": "a shop sign \\"OPEN\\"", "color_palette": ["#FF8000"], "subjects": [{"x": "\'A\'"}]}',
         ("OPEN", "A"), ("#ff8000",)),
        ('{"not json', (), ()),
        ("issue #1234567 and #12", (), ()),
    ],
)  # fmt: skip
def test_a_prompt_asks_for_its_quoted_texts_and_hex_colours(prompt, texts, colours):
    assert asked_in(prompt) == Asked(texts, colours)


# Texts and colours


@pytest.mark.parametrize(
    ("lines", "wanted", "errors"),
    [
        (["SUMMER SALE", "50% off"], "summer sale", 0),
        (["SUMMER", "SALE"], "SUMMER SALE", 0),  # over two lines
        (["SUMMER SALE"], "SALE", 0),  # a word of a line
        (["5O%"], "50%", 0),  # look-alikes
        (["SALES"], "SALE", 1),  # an additional character
        (["春季新品"], "春季新", 1),
        (["春季新品 上市"], "上市", 0),
        (["SLAE"], "SALE", 2),
        ([], "SALE", 4),
        (["completely other words"], "SALE", 4),
    ],
)
def test_a_text_is_exact_if_it_is_a_run_of_whole_words(lines, wanted, errors):
    found = check_text(lines, wanted)
    assert (found.errors, found.exact) == (errors, errors == 0)
    assert found.ned == 1 if found.exact else found.ned < 1


def test_the_script_of_a_text_is_told():
    assert [check_text([], text).script for text in ("OPEN", "春天", "さくら", "50%")] == [
        "Latin", "Chinese", "Japanese", "Latin",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [  # Sharma, Wu and Dalal 2005, table 1
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
        ((50, 2.5, 0), (56, -27, -3), 31.903),
    ],
)
def test_delta_e2000_has_the_published_values(a, b, distance):
    assert float(delta_e2000(np.array(a), np.array(b))) == pytest.approx(distance, abs=1e-4)
    assert float(delta_e2000(np.array(b), np.array(a))) == pytest.approx(distance, abs=1e-4)


def test_an_area_has_a_colour_and_edges_claim_none():
    picture = Image.new("RGB", (200, 100), "#ff8000")
    ImageDraw.Draw(picture).rectangle((0, 0, 99, 99), fill="#0000ff")
    picture = picture.resize((400, 200), Image.Resampling.BICUBIC)  # the seam has mixed colours
    orange, blue, grey = check_colours(picture, ("#ff8000", "#0505fa", "#804080"))
    assert (orange.right, blue.right, grey.right) == (True, True, False)
    assert orange.delta_e == 0
    assert orange.share == pytest.approx(0.49, abs=0.02)
    assert blue.nearest == "#0000ff"


def test_a_colour_of_less_than_half_a_percent_of_the_picture_is_missing():
    picture = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(picture).rectangle((10, 10, 20, 20), fill="#ff0000")
    assert not check_colours(picture, ("#ff0000",))[0].right
    ImageDraw.Draw(picture).rectangle((10, 10, 30, 30), fill="#ff0000")
    assert check_colours(picture, ("#ff0000",))[0].right


# Things and quality


@pytest.mark.parametrize(
    ("scene", "prompt", "right"),
    [
        (PAIR, "a red circle left of a blue square", [True, True, True]),
        (PAIR, "蓝色的正方形在红色的圆形的左边", None),
        (replace(PAIR, things=(replace(CIRCLE, x=0.75), replace(SQUARE, x=0.25))),
         "a red circle left of a blue square", [True, True, False]),
        (PAIR, "two red circles", [False]),
        (PAIR, "a circle and a square", [True, True]),
        (PAIR, "a green circle", [False]),
    ],
)  # fmt: skip
def test_counts_colours_and_relations_of_flat_pictures_are_checked(scene, prompt, right):
    found = [check.right for check in check_things(render(scene, 192), prompt)]
    assert found == right if right else False in found


def test_things_of_photographs_and_of_unknown_words_are_not_counted():
    noise = Image.effect_noise((128, 128), 90).convert("RGB")
    assert not is_flat(noise)
    assert is_flat(render(PAIR, 128))
    assert verify(noise, Asked(), "a red circle").notes == ("things are not counted: the picture is not flat",)
    assert "'platypus'" in verify(render(PAIR, 128), Asked(), "a platypus and a red circle").notes[0]


def test_quality_tells_blank_pictures_and_seams():
    noise = Image.effect_noise((128, 128), 20).convert("RGB")
    assert quality_of(Image.new("RGB", (64, 64), "black")).blank
    assert quality_of(Image.new("RGB", (64, 64), "black")).dark == 1
    assert quality_of(noise.resize((32, 32)).resize((128, 128))).sharpness < quality_of(noise).sharpness
    smooth = Image.fromarray(np.full((64, 96, 3), 100, np.uint8))
    smooth.paste((140, 140, 140), (40, 0, 96, 64))
    assert quality_of(smooth).seams == ("x=40",)
    assert quality_of(noise).seams == ()


def test_duplicates_and_the_diversity_of_seeds_are_told():
    layouts = {
        "a": layout_of(render(PAIR, 128)),
        "b": layout_of(render(PAIR, 192)),
        "c": layout_of(render(replace(PAIR, background=Background("flat", ("green",))), 128)),
    }
    same, diversity = compare_layouts(layouts)
    assert same == [("a", "b")]
    assert diversity is not None
    assert diversity > 20
    assert compare_layouts({"a": layouts["a"]}) == ([], None)


# Drawing again


def drawing(pictures):
    """A Drawer's submit that draws the next of these pictures, and the seeds that it was asked for."""
    seeds = []

    def draw(request):
        seeds.append(request.seed)
        yield Step(1, 1, 0, 1, 0.0, 0.1)
        yield Done(pictures[len(seeds) - 1], request, 0, 1, 2.0)

    return draw, seeds


def flat(colour):
    return Image.new("RGB", (32, 32), colour)


def test_a_picture_is_drawn_again_until_it_passes():
    draw, seeds = drawing([flat("blue"), flat("green"), flat("#ff0000"), flat("red")])
    request = Request(prompt="a wall in #ff0000", seed=7, until_verified=5)
    events = list(draw_until_verified(draw, request))
    assert seeds == [7, 7 + STRIDE, 7 + 2 * STRIDE]
    done = events[-1]
    assert (done.request.seed, done.request.until_verified, done.seconds) == (7 + 2 * STRIDE, 0, 6.0)
    assert done.checked == "colour #ff0000 within 0.0"
    (note,) = [event.note for event in events if isinstance(event, Loading) and event.note]
    assert note == f"drawn 3 times, seed {done.request.seed}: colour #ff0000 within 0.0"
    assert len([event for event in events if isinstance(event, Step)]) == 3


def test_the_best_picture_is_kept_if_none_passes():
    draw, seeds = drawing([flat("blue"), flat("#e02020"), flat("green")])
    *_, note, done = draw_until_verified(draw, Request(prompt="a wall in #ff0000", seed=1, until_verified=2))
    assert len(seeds) == 3
    assert done.request.seed == 1 + STRIDE
    assert note.note.startswith(f"none of 3 drawings passes, kept the best, seed {1 + STRIDE}: colour #ff0000 missing")


def test_each_picture_of_a_request_has_its_own_seeds_and_place():
    draw, seeds = drawing([flat("blue"), flat("red"), flat("red")])
    events = list(draw_until_verified(draw, Request(prompt="#f00", seed=4, count=2, until_verified=3)))
    assert seeds == [4, 4 + STRIDE, 5]
    assert [(event.index, event.count) for event in events if isinstance(event, Done)] == [(0, 2), (1, 2)]
    assert [event.index for event in events if isinstance(event, Step)] == [0, 0, 1]


def test_a_failure_ends_the_drawing():
    def draw(request):
        yield Failed("no such model", "input")

    assert list(draw_until_verified(draw, Request(prompt="#f00", until_verified=3))) == [
        Failed("no such model", "input")
    ]


def test_a_prompt_that_asks_for_nothing_is_told_so():
    table = options(SPECS["z-image-turbo"], Request(prompt="a fox", until_verified=2))
    assert table["until_verified"].effect == "ignores"
    assert "quote the text" in table["until_verified"].why
    assert options(SPECS["z-image-turbo"], Request(prompt='"FOX"', until_verified=2))["until_verified"].why == ""
    assert options(SPECS["pocket"], Request(prompt="the word FOX", until_verified=2))["until_verified"].why == ""


def test_a_server_counts_what_may_be_drawn_again():
    check(Request(prompt="x", count=2, until_verified=31), None, Limits())
    with pytest.raises(Refused, match="until_verified 32 may draw 66 pictures: take at most 64 in all"):
        check(Request(prompt="x", count=2, until_verified=32), None, Limits())


def test_pocket_draws_until_the_text_is_right_and_the_picture_says_so(tmp_path, capsys):
    pytest.importorskip("rapidocr", reason="needs the extra ocr")
    words = ["generate", 'the word "OPEN"', "--steps", "1", "--until-verified", "1", "-s", "3", "-W", "64", "-H", "64"]
    assert main([*words, "-o", str(tmp_path / "a.png"), "--json"]) == 0
    shown, said = capsys.readouterr()
    told = json.loads(shown)
    assert told["pictures"][0]["checked"].startswith('text "OPEN"')
    assert told["pictures"][0]["seed"] in (3, 3 + STRIDE)
    assert "--until-verified" not in told["again"]
    assert told["pictures"][0]["checked"] in said
    assert describe(tmp_path / "a.png")["checked"] == told["pictures"][0]["checked"]


# The command


def test_verify_asks_for_what_the_metadata_asks_for(tmp_path, capsys):
    pytest.importorskip("rapidocr", reason="needs the extra ocr")
    good, bad = (str(tmp_path / name) for name in ("good.png", "bad.png"))
    save_picture(sign("OPEN"), good, Request(prompt='a white sign, "OPEN"'))
    save_picture(sign("OPFN"), bad, Request(prompt='a white sign, "OPEN"'))
    assert main(["verify", good, bad, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [picture["passed"] for picture in told["pictures"]] == [True, False]
    assert told["pictures"][1]["texts"][0]["errors"] == 1
    assert told["duplicates"] == [[good, bad]]


def test_verify_of_colours_needs_no_reader(tmp_path, capsys):
    path = str(tmp_path / "a.png")
    flat("#ff8000").save(path)
    assert main(["verify", path, "--colour", "#ff8000"]) == 1  # all pixels have one colour
    assert "colour #ff8000 within 0.0\n  blank: all pixels" in capsys.readouterr().out
    render(PAIR, 64).save(path)
    assert main(["verify", path, "--colour", "#dc1e26", "--colour", "205cd8"]) == 0
    assert main(["verify", path]) == 0
    assert "nothing was asked for: give --text or --colour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--colour", "red"], "colour 'red' is not a hex code: write it like #ff8000 or #f80"),
        (["--text", " "], "--text is empty: give the text that the picture must show"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(words, line, tmp_path, capsys):
    flat("red").save(tmp_path / "a.png")
    assert main(["verify", str(tmp_path / "a.png"), *words]) == 2
    assert capsys.readouterr().err == f"inkstream: {line}\n"


def test_texts_without_the_extra_are_refused_before_anything_is_drawn(monkeypatch):
    from inkstream.engine.drawing import verifying

    def missing():
        raise InputError("reading text needs rapidocr: pip install 'inkstream[ocr]'")

    monkeypatch.setattr(verifying, "open_reader", missing)
    draw, seeds = drawing([])
    with pytest.raises(InputError, match="needs rapidocr"):
        next(draw_until_verified(draw, Request(prompt='"OPEN"', until_verified=1)))
    assert seeds == []
