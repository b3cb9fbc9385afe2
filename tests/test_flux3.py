"""FLUX.3 alone: sizes, names, positions, jumps of the flow map, prompts with boxes. Parity tests compare it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from inkstream import Request
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.larger import times_of
from inkstream.engine.drawing.model import advance
from inkstream.families.flux3.boxes import check_boxes
from inkstream.families.flux3.keys import DIFFUSERS, SINGLE_FILE
from inkstream.families.flux3.model import Flux3Transformer, picture_positions, text_positions
from inkstream.families.flux3.specs import KLEIN, KLEIN_BASE, SHIFT, SPECS, Flux3Config, infer_config
from inkstream.families.names import named
from inkstream.nn.forward import Sample
from inkstream.sampling.solvers import SOLVERS, drive
from inkstream.types import InputError, Query, Solver
from inkstream.weights.keymap import translate

TINY = Flux3Config(
    num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24,
    axes_dims_rope=(8, 8, 8, 8), flow_map=True,
)  # fmt: skip
PARAMETERS = {"flux3-klein": 5_548_681_984, "flux3-klein-base": 5_538_458_368}
SIGMAS = [
    1, 0.99047, 0.9798, 0.96777, 0.95411, 0.93845, 0.92032, 0.89909, 0.8739, 0.84351, 0.80613, 0.75904, 0.69789,
    0.61527, 0.49749, 0.31601, 0,
]  # fmt: skip
LAYERS = ("q_proj", "k_proj", "v_proj", "attn_out", "mlp_in", "mlp_out")
NORMS = ("norm.query_norm.scale", "norm.key_norm.scale")
MODES = ("txt", "image", "image_cond")
STACKS = ("txt_mode_blocks", "content_mode_blocks.image", "content_mode_blocks.image_cond", "single_blocks")
KEYS = {
    "txt_in.weight",
    *(f"emb_in.{mode}.weight" for mode in MODES[1:]),
    *(f"{time}.{layer}.weight" for time in ("time_in", "ref_time_in") for layer in ("in_layer", "out_layer")),
    *(f"{stage}_stream_modulations.{mode}.lin.weight" for stage in ("early", "single") for mode in MODES),
    *(f"{stack}.0.{layer}.weight" for stack in STACKS for layer in LAYERS),
    *(f"{stack}.0.{norm}" for stack in STACKS for norm in NORMS),
    *(f"final_layer.image.{layer}.weight" for layer in ("linear", "adaLN_modulation.1")),
}
"""The names in the single files, of a model with one block of each kind."""


def on_meta(config: Flux3Config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return Flux3Transformer(config).state_dict()


def shaken(config: Flux3Config) -> Flux3Transformer:
    torch.manual_seed(0)
    model = Flux3Transformer(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if name.endswith("norm.scale") else 0.0, std=0.1)
    return model


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_the_full_models_have_the_published_number_of_parameters_and_are_known_by_their_shapes(spec):
    state = on_meta(spec.transformer)
    assert sum(weight.numel() for weight in state.values()) == PARAMETERS[spec.name]
    assert infer_config({key: tuple(weight.shape) for key, weight in state.items()}) == spec.transformer


def test_our_names_are_those_of_the_single_files():
    small = replace(TINY, num_layers=1, num_single_layers=1)
    assert on_meta(small).keys() == KEYS
    of_jumps = {key for key in KEYS if key.startswith("ref_time_in")}
    assert on_meta(replace(small, flow_map=False)).keys() == KEYS - of_jumps


def test_each_layout_round_trips_to_the_identity_and_drops_what_only_training_needed():
    state = shaken(TINY).state_dict()
    for rules in (SINGLE_FILE, DIFFUSERS):
        theirs = translate(rules, state, back=True)
        more = {"repa_projectors.0.weight": state["txt_in.weight"]} if rules is SINGLE_FILE else {}
        ours = translate(rules, {**theirs, **more})
        assert ours.keys() == state.keys()
        assert all(torch.equal(ours[key], state[key]) for key in state)
    assert not any(key in state for key in theirs if "txt_mode_blocks" not in key)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("flux-3-image-klein.safetensors", KLEIN),
        ("flux3-image-klein-int8-convrot.safetensors", KLEIN),
        ("flux3-image-klein-base-int8-convrot.safetensors", KLEIN_BASE),
        ("black-forest-labs/flux-3-image-klein-base", KLEIN_BASE),
        ("flux3-klein-nvfp4", KLEIN),
    ],
)
def test_names_of_files_are_known(name, known):
    assert named(name) == known


def test_the_schedule_is_the_published_one():
    request = complete(Request(prompt="a fox", seed=0), KLEIN)
    times, _ = times_of(request, KLEIN, from_picture=False)
    assert (request.steps, request.shift, request.guidance) == (16, SHIFT, 1)
    assert times == pytest.approx(SIGMAS, abs=1e-5)


def test_positions_of_pictures_count_in_halves_and_references_count_down():
    assert text_positions(2).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert picture_positions([(2, 2)], 0).tolist() == [[0, 0, 0, 0], [0, 0, 0.5, 0], [0, 0.5, 0, 0], [0, 0.5, 0.5, 0]]
    assert picture_positions([(1, 1), (1, 2)], -1).tolist() == [[0, 0, 0, -1], [0, 0, 0, -2], [0, 0, 0.5, -2]]


# Jumps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_query_says_where_its_velocity_is_followed_to(name):
    """So a flow map, asked for the mean velocity on that way, gets there exactly."""
    asked: list[Query] = []

    def watched(solver: Solver) -> Solver:
        try:
            query = next(solver)
            while True:
                asked.append(query)
                query = solver.send((yield query))
        except StopIteration as end:
            return end.value

    ts = [1.0, 0.6, 0.2, 0.0]
    drive(
        watched(SOLVERS[name](torch.zeros(()), ts, torch.Generator().manual_seed(0))), lambda x, t: torch.ones_like(x)
    )
    assert all(query.to is not None and query.to <= query.t for query in asked)
    expected = {"euler": ts[1:], "lcm": [0.0] * 3}
    assert [query.to for query in asked] == expected.get(name, [query.to for query in asked])


def test_a_flow_map_is_told_each_steps_end_and_foresees_the_steps_of_euler(build):
    with torch.no_grad():
        model = build(KLEIN.tiny)
    told: list[tuple[float, float | None]] = []
    transformer = model.family.transformer
    transformer.register_forward_pre_hook(lambda _, args: told.extend((s.t, s.prepared.to) for s in args[0]))
    computed: list[int] = []
    transformer.ref_time_in.register_forward_hook(lambda _, args, out: computed.append(len(out)))
    request = complete(Request(prompt="a fox", width=64, height=64, steps=3, seed=0), model.spec)
    with torch.inference_mode():
        run = model.start(request, model.encode(request), None)
    while run.query is not None:
        advance(model.family, [run])
    times, _ = times_of(request, model.spec, from_picture=False)
    assert told == list(pairwise(times))
    assert computed == [3]  # all steps in one pass, before the first


def test_an_unforeseen_jump_is_answered_as_a_foreseen_one_and_a_recording_holds_one_jump():
    model = shaken(TINY)
    x, text = torch.randn(128, 4, 3), torch.randn(7, 24)
    (foreseen,), (open_,) = (model.prepare([text], 4, 3, times) for times in ((0.9, 0.5), ()))
    for t, to in ((0.9, 0.5), (0.5, 0.0)):
        asked = [model([Sample(x, t, replace(one, to=to))])[0] for one in (foreseen, open_)]
        assert torch.allclose(*asked, atol=1e-5)
        own = replace(foreseen, to=to).at(t)
        assert torch.equal(model([Sample(x, t, own)])[0], asked[0])
    assert replace(foreseen, to=0.4).at(0.9) is None
    elsewhere = model([Sample(x, 0.9, replace(foreseen, to=0.1))])[0]
    assert (elsewhere - model([Sample(x, 0.9, replace(foreseen, to=0.5))])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("flow_map", [False, True])
def test_text_and_references_of_a_base_model_pass_their_own_blocks_once(flow_map):
    model, calls = shaken(replace(TINY, flow_map=flow_map)), []
    for stack in (model.txt_mode_blocks, model.content_mode_blocks["image_cond"]):
        stack[0].register_forward_hook(lambda *_: calls.append(1))
    (sample,) = model.prepare([torch.randn(5, 24)], 2, 3, [1.0, 0.5], [torch.randn(128, 2, 2)])
    for t in (1.0, 0.5):
        model([Sample(torch.randn(128, 2, 3), t, sample)])
    assert len(calls) == (4 if flow_map else 2)


def test_both_prompts_of_guidance_share_the_pictures_own_blocks():
    model, rows = shaken(replace(TINY, flow_map=False)), []
    model.content_mode_blocks["image"][0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    prepared = model.prepare([torch.randn(5, 24), torch.randn(3, 24)], 2, 3, [0.5])
    x = torch.randn(128, 2, 3)
    together = model([Sample(x, 0.5, one) for one in prepared])
    assert rows == [6]
    assert all(torch.allclose(y, model([Sample(x, 0.5, one)])[0], atol=1e-5) for y, one in zip(together, prepared))


# Boxes ----------------------------------------------------------------------------------------------------------------

CAPTION = (
    'A table <table_1> [old] with a cup <cup_1>. [{"id": "table_1", "bbox": [500, 0, 1000, 1000], "desc": "oak"}, '
)
CUP = '{"id": "cup_1", "bbox": [400, 450, 520, 560], "desc": "a red cup"}]'
MOVED = (
    'Move it <cup_1>. [{"id": "cup_1", "from": "ref_image_0", "src_bbox": [1, 2, 30, 40], "tgt_bbox": null, '
    '"desc": "x"}]'
)


@pytest.mark.parametrize(("prompt", "references"), [("a fox [1, 2]", 0), (CAPTION + CUP, 0), (MOVED, 1)])
def test_prompts_with_boxes_in_order_and_without_boxes_are_taken(prompt, references):
    check_boxes(prompt, references)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (CAPTION + CUP[:-1], "is not JSON"),
        (CAPTION + CUP.replace("520", "300"), r"bbox \[400, 450, 300, 560\] of box cup_1 is not \[top, left"),
        (CAPTION + CUP.replace("560", "1001"), "from 0 to 1000"),
        (CAPTION + '{"id": "cup_1", "bbox": [0.1, 0.1, 0.5, 0.5], "desc": "x"}]', "from 0 to 1000"),
        (CAPTION + CUP.replace("cup_1", "2 cups"), "has the id '2 cups'"),
        (CAPTION + CUP.replace("cup_1", "table_1"), "2 boxes have the id table_1"),
        (CAPTION + CUP.replace("cup_1", "pot_1"), "does not cite <pot_1>"),
        (CAPTION + CUP.replace("a red cup", " "), "box cup_1 has no desc"),
        (CAPTION + '{"id": "cup_1", "desc": "x"}]', "has no bbox, src_bbox or tgt_bbox"),
        (MOVED, "box cup_1 is from 'ref_image_0': take target without src_bbox"),
        (MOVED.replace("ref_image_0", "target"), "is from 'target'"),
    ],
)
def test_what_is_wrong_with_a_box_is_said_in_one_line(prompt, said):
    with pytest.raises(InputError, match=said) as caught:
        check_boxes(prompt, 0)
    assert "\n" not in str(caught.value)
