"""The table of options is true: the effect of each option is measured on every kind of model at tiny size."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model
from inkstream.engine.drawing.options import UNSHIFTED, guided, options
from inkstream.engine.engine import remarks
from inkstream.engine.pictures.inputs import to_image
from inkstream.families import SPECS, adapter_names, family_of
from inkstream.families.flux1 import kontext
from inkstream.families.flux1.family import map_size
from inkstream.sampling.schedules import SCHEDULES
from inkstream.types import REPAINTING, InputError, Request, Spec
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.write import write_lora

KINDS = {spec.tiny.name: name for name, spec in reversed(SPECS.items()) if spec.tiny}
"""One known model of each kind."""


def picture(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    image = Image.new("RGB", size, colour)
    image.paste("white", (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return image


def mask() -> Image.Image:
    """White where both ways to look at cells of 16 pixels find it."""
    image = Image.new("L", (64, 64))
    image.paste(255, (14, 14, 36, 36))
    return image


OTHER = {
    "prompt": "another",
    "negative_prompt": "blurry",
    "width": 48,
    "height": 48,
    "steps": 2,
    "guidance": 7.0,
    "seed": 1,
    "variation": "5:0.5",
    "seed_variance": 0.5,
    "solver": "heun",
    "schedule": "normal",
    "shift": 9.0,
    "cfg_normalization": 0.5,
    "cfg_truncation": 0.1,
    "guidance_from": 0.5,
    "guidance_until": 0.95,
    "cache": "none",
    "cache_threshold": 0.0,
    "image": picture("red"),
    "strength": 0.1,
    "mask": mask(),
    "mask_from": "colour:#f00",
    "mask_invert": True,
    "mask_grow": 8,
    "mask_blur": 0,
    "mask_soft": True,
    "mask_fill": "noise",
    "crop": "2",
    "extend": "left=16",
    "reference": (picture("blue"),),
    "regions": ("0,0,0.5x1:a star in the night",),
}
"""For every option outside APART, a value that would change the picture."""
ENLARGING = ("upscale", "upscaler", "upscale_strength")
APART = ("model", "count", "until_verified", "upsample", "control", "control_nets", "tile", *ENLARGING)
"""Options that are not tested here: `upsample` needs a language model, `until_verified` chooses among pictures, `tile`
needs a larger picture, control and enlarging have their own tests, the others do not change the picture."""


def draw(model: Model, fields: dict) -> tuple[bytes, bytes]:
    """The latents, and the picture if a part of one is repainted."""
    request = Request(**{"prompt": "a fox", "width": 32, "height": 32, "steps": 3, "seed": 0, **fields})
    whole = complete(request, model.spec)
    latents = model.sample(request, model.encode(request))
    drawn = whole.edit.paste(to_image(model.decode(latents)[0])).tobytes() if whole.edit else b""
    return latents.numpy().tobytes(), drawn


def write_adapter(path: Path, spec: Spec) -> Path:
    """An adapter of the first layer with 64 outputs."""
    names = adapter_names(spec)
    layer, (outputs, inputs) = next((path, size) for path, size in names.layers.items() if size[0] == 64)
    change = LowRank(torch.full((1, inputs), 0.1), torch.full((outputs, 1), 0.1))
    return write_lora(path, Lora({layer: LayerChange([Part(change)])}), names, "comfyui")


@pytest.mark.parametrize("name", sorted(KINDS.values()))
@torch.no_grad()
def test_options_change_the_picture_exactly_if_the_table_says_so(name, monkeypatch, build, tmp_path):
    monkeypatch.setattr(kontext, "SIZES", ((32, 32),))
    spec = SPECS[name].tiny
    model, table = build(spec), options(spec)
    other = {**OTHER, "loras": [str(write_adapter(tmp_path / "lora.safetensors", spec))]}
    assert {*other, *APART} == set(table)
    needed = {field: other[field] for field, option in table.items() if option.needed}
    on = {"cache": "first-block", "cache_threshold": 10.0} | ({"guidance": 3.0} if spec.guides == "twice" else {})
    plain = draw(model, needed | on)
    for field, option in table.items():
        if field in APART or field in needed:
            continue
        able = table["image"].effect == "honours"
        beside = {"image": other["image"]} if field in ("strength", *REPAINTING) and able else {}
        if field in REPAINTING and field not in ("mask", "mask_from", "extend"):
            beside |= {"mask": other["mask"]}
        if field == "mask_soft":  # a fade wider than a latent cell
            beside |= {"mask_blur": 30}
        if field == "mask_fill":
            beside |= {"strength": 0.7}
        mine = {name: value for name, value in needed.items() if (name, field) != ("mask", "mask_from")}
        fields = mine | on | beside | {field: other[field]}
        if option.effect == "rejects":
            with pytest.raises(InputError, match="leave"):
                draw(model, fields)
            continue
        before = draw(model, needed | on | beside) if beside else plain
        after = draw(model, fields)
        assert (before == after) == (option.effect == "ignores"), field


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_every_model_has_an_effect_for_every_option_and_a_reason_if_not_honoured(spec):
    table = options(spec)
    assert list(table) == list(Request.model_fields)
    for name, option in table.items():
        assert option.effect == "honours" or option.why, name
        assert "\n" not in option.why


def test_unshifted_lists_exactly_the_schedules_without_a_shift():
    assert set(UNSHIFTED) == {name for name, times in SCHEDULES.items() if times(8, 3.0) == times(8, 6.0)}


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("flux1-schnell", {"guidance": 5}, ["guidance 5 has no effect: flux1-schnell was distilled without"]),
        ("flux1-schnell", {"guidance": 1}, []),
        ("flux1-schnell", {"negative_prompt": "x"}, ["negative prompt has no effect: ", "say in the prompt"]),
        ("flux2-klein-4b", {"cfg_truncation": 0.5}, ["cfg truncation 0.5 has no effect: "]),
        ("flux1-dev", {"guidance": 5}, []),
        ("flux1-dev", {"negative_prompt": "x"}, ["negative prompt has no effect: flux1-dev reads its guidance"]),
        ("z-image-turbo", {"negative_prompt": "x"}, ["negative prompt has no effect: guidance is off: say it in the"]),
        ("z-image-turbo", {"guidance": 3}, ["guidance 3: z-image-turbo was distilled without guidance; above 1 it"]),
        ("z-image-turbo", {"guidance": 3, "negative_prompt": "x"}, ["guidance 3: "]),
        ("z-image", {"negative_prompt": "x"}, []),
        ("z-image", {"negative_prompt": "x", "guidance": 1}, ["negative prompt has no effect: ", "set it above 1"]),
        ("z-image", {"shift": 2, "schedule": "bong_tangent"}, ["shift 2 has no effect: schedule bong_tangent"]),
        ("z-image", {"shift": 2}, []),
        ("flux2-dev", {"shift": 2}, []),
        ("flux2-dev", {"cache": "taylor"}, []),
        ("flux2-dev", {"cache_threshold": 0.2}, ["cache threshold 0.2 has no effect: cache is none: set it"]),
        ("flux2-klein-4b", {"cache": "taylor"}, ["cache has no effect: flux2-klein-4b draws in 4 steps, which differ"]),
        ("flux1-fill-dev", {"image": picture("red"), "mask": picture("red"), "strength": 0.5}, ["strength 0.5 has no"]),
        ("flux1-fill-dev", {"image": picture("red"), "mask": picture("red"), "strength": 1}, []),
    ],
)
def test_remarks_list_exactly_the_options_without_effect(model, fields, said):
    lines = remarks(Request(prompt="a fox", **fields), SPECS[model])
    assert len(lines) == bool(said)
    assert [words for words in said if words not in lines[0]] == []


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_a_completed_request_has_no_remarks(spec):
    needed = {name: OTHER[name] for name, option in options(spec).items() if option.needed}
    assert remarks(complete(Request(prompt="a fox", **needed), spec).plain(), spec) == []


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        ("flux1-schnell", {"reference": ("x.png",)}, ["flux1-schnell takes no references", "leave them out"]),
        ("flux1-fill-dev", {}, ["flux1-fill-dev repaints part of a picture", "give image and mask"]),
        ("flux1-fill-dev", {"image": "x.png"}, ["give image and mask"]),
        ("flux1-fill-dev", {"strength": 0.5}, ["give image and mask"]),
        ("flux1-depth-dev", {}, ["flux1-depth-dev follows one map", "give it as reference"]),
        ("flux1-canny-dev", {"reference": ("x.png", "y.png")}, ["2 references", "give one"]),
        ("flux1-dev", {"upsample": True}, ["flux1-dev cannot upsample a prompt", "leave upsample out"]),
        ("flux2-dev", {"strength": 0.5}, ["strength needs a start picture"]),
    ],
)
def test_rejected_options_are_refused_before_a_picture_is_opened(model, fields, words):
    with pytest.raises(InputError) as caught:
        complete(Request(prompt="a fox", **fields), SPECS[model])
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_request_is_guided_only_above_1_by_a_model_with_two_predictions():
    assert guided(Request(), SPECS["z-image"])
    assert not guided(Request(guidance=1), SPECS["z-image"])
    assert not guided(Request(guidance=5), SPECS["flux1-dev"])


@torch.no_grad()
def test_fill_encodes_its_picture_once(build):
    model = build(SPECS["flux1-fill-dev"].tiny)
    calls = []
    model.family.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    draw(model, {"image": picture("red"), "mask": picture("black")})
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("seen", "size"),
    [((512, 512), (1024, 1024)), ((3000, 3000), (1024, 1024)), ((1920, 1080), (1360, 768)), ((600, 900), (832, 1248)),
     ((16_000, 1), (8192, 16))],
)  # fmt: skip
def test_a_map_gives_its_aspect_ratio_and_about_a_megapixel(seen, size):
    assert map_size(*seen, 16) == size


def test_a_map_sets_the_size_unless_the_request_does():
    spec, wide = SPECS["flux1-canny-dev"], (picture("black", (320, 160)),)
    done = complete(Request(prompt="a fox", reference=wide), spec)
    assert (done.width, done.height) == (1456, 720)
    done = complete(Request(prompt="a fox", reference=wide, width=512, height=512), spec)
    assert (done.width, done.height) == (512, 512)


def test_redux_draws_at_its_default_size():
    spec = SPECS["flux1-redux-dev"]
    done = complete(Request(prompt="a fox", reference=(picture("black", (320, 160)),)), spec)
    assert (done.width, done.height) == spec.size


def test_counting_the_weights_of_all_known_models_takes_seconds():
    from inkstream.engine.machine.memory import count_weights

    for family in {spec.family for spec in SPECS.values()}:
        family_of(family)  # imported
    began = time.process_time()
    counts = {name: count_weights(spec) for name, spec in SPECS.items()}
    assert time.process_time() - began < 5  # 2 on a core of its own
    assert counts["flux2-dev"]["transformer"] == 32_223_281_152
