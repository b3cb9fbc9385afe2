"""Regions: boxes with texts of their own. Who sees whom is compared with a dense mask that plain code makes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from inkstream import Engine
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model, Run, advance
from inkstream.engine.drawing.templates import filled, has_template
from inkstream.engine.engine import remarks
from inkstream.engine.machine import graphs
from inkstream.engine.machine.loader import open_model
from inkstream.engine.machine.memory import Placing
from inkstream.engine.pictures.metadata import read_request, save_picture
from inkstream.families import SPECS
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_9B_KV, KLEIN_BASE_4B
from inkstream.families.flux3 import model as flux3
from inkstream.families.flux3.specs import KLEIN_BASE
from inkstream.families.zimage import model as zimage
from inkstream.families.zimage.specs import BASE, OMNI
from inkstream.nn import flux
from inkstream.nn.attention import attend
from inkstream.nn.forward import Sample
from inkstream.nn.rope import Rope
from inkstream.nn.sight import Group, Sight, sight_of
from inkstream.types import Conditioning, Encoded, InputError, Machine, Region, Request

FAMILIES = {"Z-Image": BASE, "FLUX.1": DEV, "FLUX.2": KLEIN_BASE_4B, "FLUX.3": KLEIN_BASE}
LEFT, RIGHT = "0,0,0.5x1:a red circle", "0.5,0,0.5x1:a blue star on the right"
CPU = torch.device("cpu")
PICTURE = Image.new("RGB", (64, 64), "white")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wish(**fields: Any) -> Request:
    return Request(**{"prompt": "a fox", "width": 64, "height": 64, "steps": 3, "seed": 0, **fields})


def runs_of(model: Model, wishes: list[Request]) -> list[Run]:
    """Their runs, drawn together."""
    with torch.inference_mode():
        runs = [model.start(complete(one, model.spec), model.encode(one), None) for one in wishes]
        while pending := [run for run in runs if run.query is not None]:
            advance(model.family, pending)
    return runs


# Attention ------------------------------------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in float64. q, k, v: (L, H, E); mask: (Lq, Lk), booleans, or factors of the attention."""
    scores = torch.einsum("ihe,jhe->hij", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhe->ihe", (scores + mask.double().log()).softmax(-1), v.double())


def mask_of(sight: Sight, rows: int, keys: int) -> Tensor:
    mask = torch.zeros(rows, keys)
    for group in sight.groups:
        factors = torch.ones(len(group.sees)) if group.bias is None else group.bias.exp()
        mask[group.rows[:, None], group.sees] = factors
    return mask


def regions_mask(texts: list[int], boxes: list[tuple[int, int, int, int]], grid: tuple[int, int], more: int) -> Tensor:
    """Who sees whom, pair by pair. Tokens: the prompt, the regions' texts, the picture, `more` others."""
    kinds: list[tuple[str, int]] = [("text", number) for number, length in enumerate(texts) for _ in range(length)]
    kinds += [("cell", cell) for cell in range(grid[0] * grid[1])] + [("other", 0)] * more

    def sees(a: tuple[str, int], b: tuple[str, int]) -> bool:
        own = [kind[1] if kind[0] == "text" else 0 for kind in (a, b)]
        if own == [0, 0] or (own[0] == own[1]):
            return True
        if own[0] and own[1]:
            return False
        (cell,) = (kind for kind, text in zip((a, b), own) if not text)
        left, top, right, bottom = boxes[max(own) - 1]
        row, column = divmod(cell[1], grid[1])
        return cell[0] == "cell" and top <= row < bottom and left <= column < right

    return torch.tensor([[sees(a, b) for b in kinds] for a in kinds])


def test_a_sight_is_the_dense_mask_of_its_regions():
    boxes = [(0, 0, 2, 3), (1, 1, 4, 2)]  # they overlap
    regions = [Encoded(normal(n, 8), box) for n, box in zip((4, 5), boxes)]
    expected = regions_mask([3, 4, 5], boxes, (3, 4), 2)
    n = len(expected)
    sight = sight_of(regions, [3, 4, 5], 0, range(12, 24), (3, 4), n, n, CPU)
    assert torch.equal(mask_of(sight, n, n).bool(), expected)
    assert torch.equal(mask_of(sight.targets, 12, n).bool(), expected[12:24])
    q, k, v = (normal(n, 2, 8, seed=i) for i in range(3))
    assert torch.allclose(attend(q, k, v, [n], [n], sights=[sight]).double(), dense(q, k, v, expected), atol=1e-5)
    targets = attend(q[12:24], k, v, [12], [n], sights=[sight.targets])
    assert torch.allclose(targets.double(), dense(q[12:24], k, v, expected[12:24]), atol=1e-5)


def test_a_strength_of_2_is_as_if_the_text_were_there_twice():
    regions = [Encoded(normal(4, 8), (0, 0, 2, 1), 2.0)]
    sight = sight_of(regions, [3, 4], 0, range(7, 11), (2, 2), 11, 11, CPU)
    q, k, v = (normal(11, 2, 8, seed=i) for i in range(3))
    twice = torch.cat((torch.arange(11), torch.arange(3, 7)))
    once = attend(q, k, v, [11], [11], sights=[sight])
    assert torch.allclose(once[7:9], attend(q[7:9], k[twice], v[twice], [2], [15]), atol=1e-5)
    hidden = sight_of([replace(regions[0], strength=0.0)], [3, 4], 0, range(7, 11), (2, 2), 11, 11, CPU)
    others = torch.tensor([0, 1, 2, 7, 8, 9, 10])
    unseen = attend(q, k, v, [11], [11], sights=[hidden])
    assert torch.allclose(unseen[7:9], attend(q[7:9], k[others], v[others], [2], [7]), atol=1e-5)


def test_a_sight_of_all_is_plain_attention_and_its_neighbours_stay_bit_for_bit():
    q, k, v = (normal(26, 2, 8, seed=i) for i in range(3))
    lengths = [5, 5, 6, 5, 5]
    plain = attend(q, k, v, lengths, lengths)
    everything = Sight((Group(torch.arange(6), torch.arange(6)),), torch.arange(6))
    assert torch.equal(attend(q, k, v, lengths, lengths, sights=[None, None, everything, None, None]), plain)
    narrow = Sight((Group(torch.arange(6), torch.arange(3)),), torch.arange(6))
    ours = attend(q, k, v, lengths, lengths, sights=[None, None, narrow, None, None])
    assert torch.equal(ours[:10], plain[:10])
    assert torch.equal(ours[16:], plain[16:])
    assert not torch.allclose(ours[10:16], plain[10:16])


# Families -------------------------------------------------------------------------------------------------------------


def encoded(model: Model, count: int = 2) -> Conditioning:
    """A prompt, a negative prompt, and regions of the left half and of a corner of 4 x 4 tokens."""
    texts = [model.family.encode("x" * n) for n in range(2 + count)]
    boxes = [(0, 0, 2, 4), (1, 2, 4, 4)]
    regions = tuple(Encoded(text.tokens, box) for text, box in zip(texts[2:], boxes))
    return replace(Conditioning.pack(texts[:2]), regions=regions)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_forward_with_regions_is_the_forward_of_all_texts_under_a_dense_mask(name, build, monkeypatch):
    model = build(FAMILIES[name].tiny)
    family, transformer = model.family, model.family.transformer
    cond = encoded(model)
    guided = replace(cond, guidance=3.5) if transformer_takes_guidance(transformer) else cond
    if name == "FLUX.1":
        guided = replace(guided, tokens=guided[0].tokens, lengths=guided.lengths[:1], pooled=guided.pooled[:1])
    sample = family.prepare(guided, 64, 64, [])[0]
    x = normal(*family.latent_shape(64, 64))
    (ours,) = family.answer([Sample(x, 0.6, sample)])
    singles = [
        family.prepare(replace(guided[0], tokens=text, lengths=(len(text),), regions=()), 64, 64, [])[0]
        for text in (guided[0].tokens, *(region.tokens for region in guided.regions))
    ]
    boxes = [region.box for region in guided.regions]
    if name == "Z-Image":
        lengths = [len(one.context) for one in singles]
        mask = regions_mask(lengths, boxes, (4, 4), 32 - 16)
        order = torch.cat((torch.arange(sum(lengths), len(mask)), torch.arange(sum(lengths))))
        mask = mask[order][:, order]
        tables = [singles[0].rope[:32], *(one.rope[32 : 32 + n] for one, n in zip(singles, lengths))]
        plain = replace(singles[0], context=torch.cat([one.context for one in singles]), rope=Rope.cat(tables))
        module, targets = zimage, slice(0, 32)
    else:
        lengths = [len(one.text) for one in singles]
        mask = regions_mask(lengths, boxes, (4, 4), 0)
        tables = [*(one.rope[:n] for one, n in zip(singles, lengths)), singles[0].rope[lengths[0] : lengths[0] + 16]]
        plain = replace(singles[0], text=torch.cat([one.text for one in singles]), rope=Rope.cat(tables))
        module, targets = flux3 if name == "FLUX.3" else flux, slice(sum(lengths), sum(lengths) + 16)

    def by_mask(q: Tensor, k: Tensor, v: Tensor, q_lengths: Any, k_lengths: Any, **_: Any) -> Tensor:
        if k_lengths[0] < len(mask):  # of the picture alone
            return attend(q, k, v, q_lengths, k_lengths)
        return dense(q, k, v, mask if len(q) == len(mask) else mask[targets]).float()

    monkeypatch.setattr(module, "attend", by_mask)
    (expected,) = family.answer([Sample(x, 0.6, plain)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "attend", lambda *given, by, sights: attend(*given, by=by))
    (unmasked,) = family.answer([Sample(x, 0.6, plain)])
    assert not torch.allclose(unmasked, expected, atol=1e-3)
    monkeypatch.undo()
    keys = len(mask)
    everything = Sight((Group(torch.arange(keys), torch.arange(keys)),), torch.arange(keys))
    rows = targets.stop - targets.start
    narrow = Sight((Group(torch.arange(rows), torch.arange(keys)),), torch.arange(rows))
    (open_eyed,) = family.answer([Sample(x, 0.6, replace(sample, sight=replace(everything, targets=narrow)))])
    torch.testing.assert_close(open_eyed, unmasked, rtol=1e-4, atol=1e-4)


def transformer_takes_guidance(transformer: Any) -> bool:
    return getattr(transformer, "guidance_in", None) is not None


@torch.no_grad()
def test_what_a_box_s_text_says_does_not_reach_other_tokens_within_a_block(build):
    """After more blocks it does, through the tokens of the box."""
    spec = BASE.tiny
    model = build(replace(spec, transformer=replace(spec.transformer, n_layers=1)))
    cond, x = encoded(model, 1), normal(*model.family.latent_shape(64, 64))
    (region,) = cond.regions
    outs = []
    for seed in (1, 2):
        other = replace(cond, regions=(replace(region, tokens=normal(*region.tokens.shape, seed=seed)),))
        outs += model.family.answer([Sample(x, 0.6, model.family.prepare(other, 64, 64, [])[0])])
    changed = (outs[0] - outs[1]).abs().amax(0) > 1e-6
    assert changed[:, :4].all()
    assert not changed[:, 4:].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_requests_with_and_without_regions_share_forwards(name, build):
    model = build(FAMILIES[name].tiny)
    able = "guidance" in model.spec.abilities
    guided = {"guidance": 3.0} if able else {}
    wishes = [
        wish(regions=[LEFT, RIGHT], **guided),
        wish(seed=1, width=96, prompt="another"),
        wish(seed=2, height=48, steps=6, regions=["16,0,16x48*1.5:a tree"], cache="first-block", cache_threshold=10),
        wish(seed=3, negative_prompt="x" if able else "", **guided),
    ]
    for ours, request in zip(runs_of(model, wishes), wishes):
        (alone,) = runs_of(model, [request])
        torch.testing.assert_close(ours.result, alone.result, rtol=1e-3, atol=1e-3)
    plain = runs_of(model, [wish(**guided)])[0].result
    assert not torch.allclose(runs_of(model, wishes[:1])[0].result, plain, atol=1e-3)


@torch.no_grad()
def test_the_negative_prompt_and_a_prompt_without_regions_have_no_sight(build):
    model = build(BASE.tiny)
    first, second = model.family.prepare(encoded(model), 64, 64, [])
    assert (first.sight is None, second.sight is None) == (False, True)
    cond = encoded(model)
    assert (len(cond[0].regions), cond[1].regions) == (2, ())
    plain = model.family.prepare(replace(cond, regions=()), 64, 64, [])
    assert torch.equal(plain[1].context, second.context)


@pytest.mark.parametrize("spec", [OMNI, KLEIN_9B_KV], ids=lambda spec: spec.name)
def test_regions_work_with_every_kind_of_model(spec, build):
    from PIL import Image

    model = build(spec.tiny)
    more = {"reference": [Image.new("RGB", (64, 64), "red")]} if "references" in spec.abilities else {}
    plain, regional = (runs_of(model, [wish(regions=given, **more)])[0].result for given in ((), [LEFT]))
    assert torch.isfinite(regional).all()
    assert not torch.allclose(plain, regional, atol=1e-3)


@torch.no_grad()
def test_a_recording_holds_for_other_texts_of_the_same_boxes(build):
    model = build(BASE.tiny)
    family, count = model.family, 0

    def record(compute: Any) -> Any:
        nonlocal count
        count += 1
        outputs = [output.clone() for output in compute()]

        def replay() -> None:
            for output, again in zip(outputs, compute()):
                output.copy_(again)

        return outputs, replay

    transformer = family.transformer
    replayed = partial(graphs.forward_transformer, graphs.Recordings(record), transformer.forward)
    cond, x = encoded(model), normal(*family.latent_shape(64, 64))
    for factor in (1.0, 2.0, 3.0):
        regions = tuple(replace(region, tokens=factor * region.tokens) for region in cond.regions)
        (sample, _) = family.prepare(replace(cond, regions=regions), 64, 64, [0.6])
        asked = [Sample(x, 0.4, sample)]
        assert torch.equal(replayed(asked)[0], transformer(asked)[0])
    assert count == 1


# Requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("0,0,512x1024:a red circle", "0,0,512x1024:a red circle"),
        (" 0 , 0.25, .5 x 0.5 * 1.5 : a: b, c ", "0,0.25,0.5x0.5*1.5:a: b, c"),
        ({"text": "a star", "x": 0, "y": 0, "width": 1, "height": 0.5}, "0,0,1x0.5:a star"),
        ({"text": "a\nb", "x": 16, "y": 32, "width": 64, "height": 64, "strength": 0}, "16,32,64x64*0:a\nb"),
    ],
)
def test_a_region_is_text_or_an_object_and_comes_back(given, text):
    (region,) = Request(regions=[given]).regions
    assert region == text
    assert str(Region.read(region)) == text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a red circle", "is not X,Y,WxH:TEXT: write it like"),
        (7, "region 7 is not X,Y,WxH:TEXT"),
        ("0,0,64x64:", "region 0,0,64x64 has no text"),
        ("0,0,0x64:a", "region 0,0,0x64 is no box"),
        ("0.5,0,64x64:a", "region 0.5,0,64x64 mixes shares and pixels"),
        ("0.6,0,0.5x1:a", "region 0.6,0,0.5x1 leaves the picture"),
        ("0,0,64x64*11:a", "region strength 11 is out of range"),
        ({"text": "a", "x": 0, "y": 0, "width": 9}, "a region has no height"),
        ({"text": "a", "x": 0, "y": 0, "width": 9, "height": "tall"}, "height 'tall' in a region is not a number"),
        ({"text": "a", "box": [0, 0, 1, 1]}, "a region has no field box"),
    ],
)
def test_a_bad_region_is_told_in_one_line(given, says):
    with pytest.raises((InputError, ValidationError)) as caught:
        Request(regions=[given])
    message = caught.value.errors()[0]["msg"] if isinstance(caught.value, ValidationError) else str(caught.value)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"regions": ["32,0,64x64:a"]}, "region 32,0,64x64 leaves the picture, which is 64x64"),
        ({"regions": ["0,0,4x64:a"]}, "region 0,0,4x64 is too small: the model sees units of 16x16 pixels"),
        (
            {"regions": [LEFT], "image": PICTURE, "mask": PICTURE, "crop": "2"},
            "regions are boxes of the whole picture: leave out crop",
        ),
    ],
)
def test_a_region_that_does_not_fit_the_picture_is_refused_before_anything_is_loaded(fields, says):
    with pytest.raises(InputError, match=says) as caught:
        complete(wish(**fields), SPECS["z-image-turbo"])
    assert "\n" not in str(caught.value)


def test_a_model_without_the_ability_refuses_regions():
    spec = SPECS["z-image-turbo"]
    unable = replace(spec, abilities=spec.abilities - {"regions"})
    with pytest.raises(InputError, match="takes no regions: leave them out"):
        complete(wish(regions=[LEFT]), unable)
    assert remarks(wish(regions=[LEFT]), spec) == []


def test_boxes_are_rounded_to_tokens():
    on_grid = Region.read("0.3,0,0.4x1:a").on_grid
    assert on_grid(1024, 512, 16) == (19, 0, 45, 32)
    assert Region.read("8,7,24x24:a").on_grid(64, 64, 16) == (1, 0, 2, 2)


def test_regions_are_templates_that_each_seed_writes_out(tmp_path):
    request = wish(prompt="a fox", regions=["0,0,0.5x1:a {red|green|blue} circle", RIGHT])
    assert has_template(request)
    texts = {filled(request.model_copy(update={"seed": seed}), tmp_path).regions for seed in range(20)}
    assert {Region.read(first).text for first, _ in texts} == {f"a {c} circle" for c in ("red", "green", "blue")}
    assert {second for _, second in texts} == {RIGHT}


def test_regions_are_in_the_metadata_and_in_the_memory_that_is_foreseen(tiny_base_folder, tmp_path):
    engine = Engine(Machine(device="cpu", dtype="fp32"))
    request = wish(model=str(tiny_base_folder), regions=[LEFT, RIGHT], guidance=3.0)
    result = engine.generate(request)
    path = tmp_path / "picture.png"
    save_picture(result.images[0], path, result.requests[0])
    again = read_request(path).request
    assert again.regions == (LEFT, RIGHT)
    assert engine.generate(again).images[0].tobytes() == result.images[0].tobytes()
    json.dumps(again.model_dump(mode="json"))
    placing = Placing(open_model(tiny_base_folder, Machine(device="cpu", dtype="fp32")))
    for plain, more in zip(placing.plans(wish()), placing.plans(wish(regions=[LEFT, RIGHT]))):
        assert more.peak > plain.peak
