"""Steps that take over from each other: what is left out, what stands in for it, and that pictures do not mix."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from inkstream import Request
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import advance
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_BASE_4B
from inkstream.families.flux3.specs import KLEIN
from inkstream.families.qwenimage.specs import BASE as QWEN
from inkstream.families.zimage.specs import BASE
from inkstream.nn.around import Around
from inkstream.nn.around.cache import POINTS, StepCache, lagrange
from inkstream.nn.forward import Forward, Rows, Sample, Span, run_blocks
from inkstream.nn.offload import Streamed
from inkstream.nn.stack import Blocks

KINDS = ["first-block", "taylor"]
SPECS = [BASE, DEV, KLEIN_BASE_4B, KLEIN, QWEN]
ROWS = Rows((Span(0, 2, True), Span(0, 4)))


class Add(nn.Module):
    """Adds to every row what it is told."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.calls = 0

    def forward(self, x, what):
        self.calls += 1
        return x + what


@pytest.fixture
def stack():
    return Blocks(Add() for _ in range(4))


def forward(blocks, cache, t, rows=None):
    """Blocks that add 1 (the first) and t squared (the others); the last gives `rows` rows of those it is given."""
    count = len(blocks) - 1

    def call(i, block, x, _):
        out = block(x, 1.0 if i == 0 else t**2)
        return out[:rows] if i == count else out

    return run_blocks("blocks", blocks, torch.zeros(6, 4), call, step(cache, t), ROWS, narrows=rows is not None)


def step(cache, t):
    return Forward.over([Sample(torch.zeros(1), t, None, Around(cache))])


def test_lagranges_weights_make_the_polynomial_through_the_points():
    times = [1.0, 0.7, 0.65]
    value = lambda t: 3 - 2 * t + 5 * t * t  # noqa: E731
    assert sum(w * value(s) for w, s in zip(lagrange(times, 0.2), times)) == pytest.approx(value(0.2))
    assert lagrange([0.4], 0.1) == [1]
    assert lagrange(times, 0.7) == [0, 1, 0]


def test_what_is_left_out_is_as_it_was_or_goes_on_as_it_went(stack):
    for points, expected in ((1, 0.6**2), (2, 0.55**2 - 0.05**2), (3, 0.5**2)):
        cache = StepCache(points, 0)
        for t in (0.8, 0.7, 0.6):
            forward(stack, cache, t)
        cache.threshold = 1
        called = [block.calls for block in stack]
        out = forward(stack, cache, 0.5)
        assert [block.calls for block in stack] == [called[0] + 1, *called[1:]]
        assert torch.allclose(out, torch.full((6, 4), 1 + 3 * (expected if points != 2 else 2 * 0.6**2 - 0.7**2)))


def test_blocks_behind_which_rows_are_missing_are_always_run(stack):
    cache = StepCache(1, 1)
    whole = forward(stack, cache, 0.5, rows=2)
    calls = [block.calls for block in stack]
    assert torch.equal(forward(stack, cache, 0.5, rows=2), whole)
    assert [block.calls - before for block, before in zip(stack, calls)] == [1, 0, 0, 1]


def test_blocks_run_again_once_the_first_has_moved_by_the_threshold_since_they_last_ran(stack):
    cache, ran = StepCache(1, 0.25), []
    for first in (1.0, 1.1, 1.2, 1.3, 1.4):
        calls = stack[1].calls
        call = lambda i, block, x, _, first=first: block(x, first if i == 0 else 1.0)  # noqa: E731
        run_blocks("blocks", stack, torch.zeros(6, 4), call, step(cache, 0.5), ROWS)
        ran.append(stack[1].calls > calls)
    assert ran == [True, False, False, True, False]


def test_a_solver_that_asks_twice_at_one_time_keeps_the_later_answer(stack):
    cache = StepCache(3, 0)
    for t in (0.8, 0.5, 0.5):
        forward(stack, cache, t)
    cache.threshold = 1
    line = 0.5**2 + (0.8**2 - 0.5**2) / (0.8 - 0.5) * (0.2 - 0.5)
    assert torch.allclose(forward(stack, cache, 0.2), torch.full((6, 4), 1 + 3 * line))


def test_a_block_that_is_left_out_is_not_brought(stack):
    whole = forward(stack, StepCache(1, 0), 0.5, rows=2)
    stack.stream(Streamed(stack, torch.device("cpu"), torch.float64))
    brought = []
    for i, guest in enumerate(stack.streamed.guests):
        fill = guest.fill
        guest.fill = lambda views, i=i, fill=fill: (brought.append(i), fill(views))
    cache = StepCache(1, 1)
    for expected in ([0, 1, 2, 3], [0, 3]):
        brought.clear()
        assert torch.equal(forward(stack, cache, 0.5, rows=2), whole)
        assert brought == expected


def test_pictures_decide_each_for_itself_in_one_forward(stack):
    """Of three, one has no cache, one skips and one does not; each gets what it gets alone."""
    bold, shy = StepCache(1, 1), StepCache(1, 0)
    rows = Rows(tuple(Span(i, n, target) for n, target in ((1, True), (2, False)) for i in range(3)))
    ran = []

    def call(i, block, x, own):
        ran.append(own.samples)
        return block(x, torch.cat([torch.full((span.length, 4), 1.0 + span.owner) for span in own.spans]) * t)

    for t in (0.8, 0.5):
        ran.clear()
        samples = [Sample(torch.zeros(1), t, None, around) for around in (Around(bold), Around(), Around(shy))]
        out = run_blocks("blocks", stack, torch.zeros(9, 4), call, Forward.over(samples), rows)
    assert ran == [(0, 1, 2), *[(1, 2)] * 3]
    for i, expected in enumerate((0.5 + 3 * 0.8, 2 * 4 * 0.5, 3 * 4 * 0.5)):
        assert torch.allclose(rows.take(out, [i]), torch.full((3, 4), expected))


def request(spec, **fields):
    guidance = {"guidance": 3.0} if spec.guides == "twice" else {}
    return Request(**{"prompt": "a fox", "width": 32, "height": 32, "steps": 6, "seed": 0, **guidance, **fields})


def latents(model, **fields):
    wish = request(model.spec, **fields)
    return model.sample(wish, model.encode(wish))


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.family)
def model(request, build):
    with torch.no_grad():
        return build(request.param.tiny)


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_zero_gives_the_picture_without_a_cache_bit_for_bit(model, kind):
    assert torch.equal(latents(model, cache=kind, cache_threshold=0), latents(model))


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_is_drawn_in_fewer_blocks_and_the_drift_falls_with_the_threshold(model, kind):
    exact, errors, calls = latents(model), [], []
    transformer = model.family.transformer
    stacks = [module for module in transformer.modules() if isinstance(module, Blocks)]
    hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for stack in stacks for block in stack]
    counts = []
    for threshold in (10.0, 0.3, 0.0):
        calls.clear()
        errors.append((latents(model, cache=kind, cache_threshold=threshold) - exact).abs().mean().item())
        counts.append(len(calls))
    for hook in hooks:
        hook.remove()
    assert errors[0] > errors[2] == 0
    assert errors[0] >= errors[1]
    assert counts[0] < counts[2]
    assert counts[0] <= counts[1] <= counts[2]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_drawn_together_are_those_drawn_alone(model, kind):
    """Of other prompts, seeds, sizes, thresholds, guidance, steps; some with a cache, some without."""
    wishes = [
        request(model.spec, cache=kind, cache_threshold=0.3),
        request(model.spec, seed=5),
        request(model.spec, cache=kind, cache_threshold=0.5, prompt="a bear", width=48, seed=3),
        request(model.spec, cache="first-block", cache_threshold=0.2, steps=4, seed=4),
    ]
    alone = [model.sample(wish, model.encode(wish))[0] for wish in wishes]
    runs = [model.start(complete(w, model.spec), model.encode(w), None) for w in wishes]
    while pending := [run for run in runs if run.query is not None]:
        advance(model.family, pending)
    for run, expected in zip(runs, alone):
        assert torch.allclose(run.result, expected, atol=1e-5)


@pytest.mark.parametrize("width", [32, 128])  # with pads in the picture's tokens, and without
def test_guidance_that_begins_and_ends_on_the_way_starts_the_cache_anew(build, width):
    with torch.no_grad():
        model = build(BASE.tiny)
    wish = {"guidance_from": 0.95, "guidance_until": 0.5, "steps": 8, "width": width, "height": 64}
    exact = latents(model, **wish)
    assert torch.equal(latents(model, **wish, cache="taylor", cache_threshold=0), exact)
    drawn = latents(model, **wish, cache="taylor", cache_threshold=10)
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, exact)


def test_a_forward_that_failed_is_run_whole_the_next_time(build):
    with torch.no_grad():
        model = build(BASE.tiny)
    wish = complete(request(model.spec, cache="first-block", cache_threshold=10), model.spec)
    run = model.start(wish, model.encode(wish), None)
    block, calls = model.family.transformer.layers[0], []
    block.register_forward_hook(lambda *_: calls.append(1))
    advance(model.family, [run])
    advance(model.family, [run])
    assert len(calls) == 1  # the second step skipped it

    def fail(*_):
        raise RuntimeError("no memory")

    hook = model.family.transformer.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        advance(model.family, [run])
    hook.remove()
    advance(model.family, [run])
    assert len(calls) == 2
    run.close()


def test_what_was_remembered_is_freed_with_the_last_step(build):
    with torch.no_grad():
        model = build(BASE.tiny)
    wish = complete(request(model.spec, cache="taylor"), model.spec)
    run = model.start(wish, model.encode(wish), None)
    cache = weakref.ref(run.leg.around.cache)
    while run.query is not None:
        advance(model.family, [run])
    gc.collect()
    assert cache() is None
    assert run.result.isfinite().all()


def test_every_kind_of_cache_is_known():
    kinds = Request.model_fields["cache"].annotation.__args__
    assert set(kinds) == {"none", *POINTS}
    assert all(math.isfinite(points) for points in POINTS.values())
