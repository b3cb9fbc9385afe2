"""JSON prompts: the documented fields become one canonical line, and an error is one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkstream.families.flux2.json_prompt import CAMERA_FIELDS, FIELDS, SUBJECT_FIELDS, json_prompt
from inkstream.types import InputError

MUG = {
    "camera": {"ISO": 200, "angle": "high", "lens-mm": 85, "f-number": "f/5.6", "depth_of_field": "shallow"},
    "subjects": [
        {"color_palette": ["matte black ceramic", "#a0b1c2"], "description": "a mug", "pose": "still"},
        {"description": "a spoon, color #00ff7f", "position": "left", "action": "lying"},
    ],
    "scene": "a café — 早晨",
    "color_palette": ["#ff8800", "#FFFFFF"],
    "style": "product photo", "lighting": "soft", "mood": "calm", "background": "concrete",
    "composition": "rule of thirds",
}  # fmt: skip

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="#"), min_size=1).filter(str.strip)
COLOURS = st.from_regex(r"#[0-9A-Fa-f]{6}", fullmatch=True)
PALETTES = st.lists(COLOURS, min_size=1, max_size=3)
PROMPTS = st.fixed_dictionaries(
    {},
    optional={
        **{name: WORDS for name in FIELDS if name not in ("subjects", "color_palette", "camera")},
        "color_palette": PALETTES,
        "subjects": st.lists(
            st.fixed_dictionaries({"description": WORDS}, optional={"action": WORDS, "color_palette": PALETTES}),
            min_size=1, max_size=3,
        ),
        "camera": st.dictionaries(st.sampled_from(CAMERA_FIELDS), st.one_of(WORDS, st.integers(1, 900))),
    },
).filter(bool)  # fmt: skip


def test_fields_are_written_in_their_documented_order_on_one_line_with_colours_in_capitals():
    text = json_prompt(MUG)
    assert "\n" not in text
    assert text == json_prompt(json.dumps(MUG, indent=4))
    assert text.startswith('{"scene": "a café — 早晨", "subjects": [{"description": "a mug", "pose": "still", ')
    written = json.loads(text)
    assert list(written) == list(FIELDS)
    assert list(written["camera"]) == ["angle", "depth_of_field", "lens-mm", "f-number", "ISO"]
    assert written["color_palette"] == ["#FF8800", "#FFFFFF"]
    assert written["subjects"][0]["color_palette"] == ["matte black ceramic", "#A0B1C2"]
    assert written["subjects"][1]["description"] == "a spoon, color #00FF7F"
    assert written["camera"]["lens-mm"] == 85


@given(PROMPTS)
def test_canonical_text_stays_the_same(prompt):
    text = json_prompt(prompt)
    assert json_prompt(text) == text
    assert json.loads(text).keys() == prompt.keys()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('{"scene": "a', r"cannot be read at line 1, column 11 \(Unterminated string"),
        ("a cat", r"cannot be read at line 1, column 1"),
        ("[]", r"the prompt is \[\]: write an object"),
        ("[" * 100_000, r"nests too deep"),
        ("{}", r"is empty: give it a scene or subjects"),
        ('{"scene": "a", "scene": "b"}', r"has the field scene twice: keep one"),
        ({"Scene": "a"}, r'field "Scene", which FLUX\.2 does not know: did you mean scene\?'),
        ({"colour_palette": ["#000000"]}, r"did you mean color_palette\?"),
        ({"xyz": 1}, r"take scene, subjects, style"),
        ({"scene": 3}, r"scene is 3: write some text, or leave the field out"),
        ({"mood": "  "}, r'mood is "  ": write some text'),
        ({"subjects": {"description": "a"}}, r"subjects is .*: write a list like"),
        ({"subjects": []}, r"subjects is \[\]: write a list"),
        ({"subjects": ["a cat"]}, r'subject 1 is "a cat": write an object like \{"description": \.\.\.\}'),
        ({"subjects": [{"description": "a"}, {"pose": "b"}]}, r"subject 2 has no description: say what it is"),
        ({"subjects": [{"description": "a", "color": "b"}]}, r'subject 1 has a field "color".*color_palette'),
        ({"color_palette": "#FF0000"}, r"color_palette is .*: write a list like"),
        ({"color_palette": ["#F80"]}, r'color_palette has the colour "#F80": write #FF8800'),
        ({"color_palette": ["#GG0000"]}, r'"#GG0000": write six hex digits like #FF8800'),
        ({"color_palette": ["ff8800"]}, r"has the colour ff8800: write #FF8800"),
        ({"subjects": [{"description": "a", "color_palette": ["#12345"]}]}, r"subject 1's color_palette .*#12345"),
        ({"scene": "a wall in color #12345, wide"}, r'scene has the colour "#12345"'),
        ({"scene": "a wall in hex #FF00000"}, r'scene has the colour "#FF00000"'),
        ({"camera": "wide"}, r'camera is "wide": write an object like \{"angle": \.\.\.\}'),
        ({"camera": {"lens": None}}, r"camera\.lens is null: write some text"),
        ({"camera": {"ISO": True}}, r"camera\.ISO is true"),
        ({"camera": {"ISO": float("inf")}}, r"camera\.ISO is Infinity"),
        ({"scene": ["x" * 500]}, r'scene is \["x+\.\.\.: write some text'),
    ],
)
def test_an_error_is_one_line_with_the_remedy(source, said):
    with pytest.raises(InputError, match=said) as caught:
        json_prompt(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["a shirt with #7 on it", "#1 fan", "hex bolts", "tag #FF8800FF", "added cafe #face"])
def test_text_that_is_not_a_colour_stays(text):
    assert json.loads(json_prompt({"scene": text}))["scene"] == text


def test_words_of_hex_digits_without_a_hash_stay():
    assert json.loads(json_prompt({"color_palette": ["facade"]}))["color_palette"] == ["facade"]


def test_every_field_is_documented_once():
    for fields in (FIELDS, SUBJECT_FIELDS, CAMERA_FIELDS):
        assert len(set(fields)) == len(fields)
