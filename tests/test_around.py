"""What is done around a picture's blocks travels with it: toy adapters and residuals, made here, share a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model, Run, advance
from inkstream.engine.machine.compile import compile_blocks
from inkstream.engine.machine.placement import Placed
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_9B_KV, KLEIN_BASE_4B
from inkstream.families.flux3.specs import KLEIN, KLEIN_BASE
from inkstream.families.qwenimage.specs import BASE as QWEN
from inkstream.families.zimage.specs import BASE
from inkstream.nn.around import Around
from inkstream.nn.around.adapters import Adapter
from inkstream.nn.around.residuals import Hints
from inkstream.nn.forward import ANY, PLAIN, Forward, Rows, Sample, Span
from inkstream.nn.linear import linear
from inkstream.nn.quant import PackedLinear, place
from inkstream.quant.pack import pack
from inkstream.types import InputError, Request

SPECS = [BASE, DEV, KLEIN_BASE_4B, KLEIN_BASE, KLEIN, QWEN]
NAMED = {
    "zimage": ("layers.0.attention.qkv", "layers.1.feed_forward.w2", "context_refiner.0.attention.out",
               "noise_refiner.0.feed_forward.w1", "layers.1.adaLN_modulation.0", "cap_embedder.1"),
    "flux1": ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1",
              "single_blocks.1.linear2", "single_blocks.0.modulation.lin", "txt_in"),
    "flux2": ("double_blocks.0.txt_attn.proj", "double_blocks.1.img_mlp.0", "single_blocks.0.linear1",
              "single_blocks.1.linear2", "double_stream_modulation_img.lin", "txt_in"),
    "flux3": ("content_mode_blocks.image.0.q_proj", "txt_mode_blocks.1.attn_out", "single_blocks.0.mlp_in",
              "single_blocks.1.mlp_out", "single_stream_modulations.image.lin", "txt_in"),
    "qwenimage": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.out", "modulation.1",
                  "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.img_mlp.gate_layer", "txt_in.in_layer"),
}  # fmt: skip
"""Of each family layers in both kinds of stacks, behind attention and before it, and outside of blocks."""
LAST_STACK = {
    "zimage": "layers",
    "flux1": "single_blocks",
    "flux2": "single_blocks",
    "flux3": "single_blocks",
    "qwenimage": "transformer_blocks",
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product of rank 2 beside a layer's own."""

    down: Tensor  # (2, I)
    up: Tensor  # (O, 2)

    def __call__(self, x: Tensor, plain: Tensor, out: Tensor) -> None:
        assert isinstance(x, Tensor), "it was rounded"
        out += (x @ self.down.T.to(x)) @ self.up.T.to(x)


def low_rank(layer: Any, seed: int, size: float = 0.3) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(2, layer.in_features, generator=generator) / layer.in_features**0.5
    return LowRank(down, torch.randn(layer.out_features, 2, generator=generator) * size)


def adapter(model: Model, seed: int) -> Around:
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    names = NAMED[model.spec.family]
    products = {name: low_rank(transformer.get_submodule(name), seed + i) for i, name in enumerate(names)}
    return Around(adapters=(Adapter.of(transformer, products),))


def residual(model: Model, seed: int) -> Around:
    """Behind the first block of each of the model's last two stacks, and behind the very last block."""
    last = len(getattr(model.family.transformer, LAST_STACK[model.spec.family])) - 1  # type: ignore[attr-defined]

    def begin(samples: Mapping[int, Sample]) -> Hints:
        (t,) = {sample.t for sample in samples.values()}

        def hint(stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor | None:
            if index == 0 or (stack == LAST_STACK[model.spec.family] and index == last):
                shape = (len(rows.targets), after.shape[1])
                return 0.3 * t * torch.randn(shape, generator=torch.Generator().manual_seed(seed + index))
            return None

        return hint

    return Around(residuals=(begin,))


def wish(model: Model, **fields: Any) -> Request:
    guidance = {"guidance": 3.0} if model.spec.guides == "twice" else {}
    return complete(
        Request(**{"prompt": "a fox", "width": 64, "height": 48, "steps": 4, "seed": 0, **guidance, **fields}),
        model.spec,
    )


def draw(model: Model, wishes: list[tuple[Request, Around]]) -> list[Tensor]:
    """What comes of these requests drawn together, their latents. Every step must be one forward."""
    runs = [start(model, request, around) for request, around in wishes]
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    forwards: list[int] = []
    hook = transformer.register_forward_hook(lambda *_: forwards.append(1))
    steps = max(run.evaluations for run in runs)
    while pending := [run for run in runs if run.query is not None]:
        advance(model.family, pending)
    hook.remove()
    assert len(forwards) == steps
    return [run.result for run in runs]


def start(model: Model, request: Request, around: Around) -> Run:
    with torch.inference_mode():
        return model.start(request, model.encode(request), None, around=around)


def decibels(a: Tensor, b: Tensor) -> float:
    """How near b is to a, against a's own range."""
    error = float((a - b).square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10((a.max() - a.min()) ** 2 / error))


def agree_with_single_runs(model: Model, wishes: list[tuple[Request, Callable[[], Around]]]) -> list[Tensor]:
    """Draw them together and alone; what is around each is made anew, since caches remember."""
    together = draw(model, [(request, around()) for request, around in wishes])
    for (request, around), ours in zip(wishes, together):
        (alone,) = draw(model, [(request, around())])
        assert decibels(alone, ours) >= 80
    return together


@pytest.fixture(params=SPECS, ids=lambda spec: spec.family)
def model(request, build) -> Model:
    with torch.no_grad():
        return build(request.param.tiny)


def test_three_requests_with_three_adapters_share_a_forward_and_equal_their_single_runs(model):
    wishes = [(wish(model, seed=i, width=64 + 32 * i, prompt="a" * (i + 1)), i) for i in range(3)]
    drawn = agree_with_single_runs(model, [(request, lambda i=i: adapter(model, 10 * i)) for request, i in wishes])
    plain = draw(model, [(request, Around()) for request, _ in wishes])
    other = draw(model, [(request, adapter(model, 10 * (i + 1))) for request, i in wishes])
    for ours, without, another in zip(drawn, plain, other):
        assert decibels(without, ours) < 40
        assert decibels(another, ours) < 40


def test_one_picture_drawn_with_two_adapters_and_without_in_one_batch_gives_three_pictures(model):
    """At the same point and time: what is the same for both prompts of guidance is not the same here."""
    arounds = [Around, lambda: adapter(model, 1), lambda: adapter(model, 2)]
    drawn = agree_with_single_runs(model, [(wish(model, width=128, height=64), around) for around in arounds])
    assert all(decibels(a, b) < 40 for a, b in pairwise(drawn))


def test_a_request_with_a_residual_is_drawn_beside_one_without(model):
    wishes = [(wish(model, seed=1), lambda: residual(model, 5)), (wish(model, seed=2, width=96), Around)]
    ours, _ = agree_with_single_runs(model, wishes)
    (plain,) = draw(model, [(wish(model, seed=1), Around())])
    assert decibels(plain, ours) < 40


def test_a_request_with_a_step_cache_shares_its_forwards_with_one_without(model):
    calls: list[int] = []
    last = getattr(model.family.transformer, LAST_STACK[model.spec.family])  # type: ignore[attr-defined]
    skipped = 1 if model.spec.family == "qwenimage" else 0  # the first block of a model's only stack always runs
    last[skipped].register_forward_hook(lambda module, args, out: calls.append(len(out)))
    with_cache = wish(model, seed=1, steps=8, cache="first-block", cache_threshold=10)
    wishes = [(with_cache, Around), (wish(model, seed=2, steps=8, width=96), Around)]
    agree_with_single_runs(model, wishes)
    assert len(set(calls[:8])) == 2  # in some of the steps the rows of one picture were left out


def test_all_of_it_goes_together(model):
    def everything() -> Around:
        return Around(adapters=adapter(model, 1).adapters, residuals=residual(model, 5).residuals)

    wishes = [
        (wish(model, seed=1, steps=8, cache="taylor", cache_threshold=0.5), everything),
        (wish(model, seed=2, steps=8), lambda: adapter(model, 2)),
        (wish(model, seed=3, steps=6, width=128, cache="first-block", cache_threshold=10), Around),
        (wish(model, seed=4, steps=3, height=96), lambda: residual(model, 7)),
    ]
    agree_with_single_runs(model, wishes)


@pytest.mark.parametrize("spec", [*SPECS, KLEIN_9B_KV], ids=lambda spec: spec.name)
def test_every_product_of_a_transformer_goes_through_the_door(build, spec):
    """Of those that are computed: each layer meets every row that it is given, with an owner."""
    with torch.no_grad():
        model = build(spec.tiny)
    transformer = model.family.transformer
    met: dict[str, int] = {}

    def meet(name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        def product(x: Tensor, plain: Tensor, out: Tensor) -> None:
            met[name] = met.get(name, 0) + len(x)

        return product

    given: dict[str, int] = {}
    names = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    for name in names:
        count = lambda _, args, name=name: given.update({name: given.get(name, 0) + len(args[0])})  # noqa: E731
        transformer.get_submodule(name).register_forward_pre_hook(count)
    around = Around(adapters=(Adapter.of(transformer, {name: meet(name) for name in names}),))
    latents = torch.randn(model.family.latent_shape(64, 64))
    cond = model.family.encode("a fox")
    cond = replace(cond, guidance=3.5 if spec.guides == "read" else None)
    if "references" in spec.abilities:
        cond = replace(cond, references=(latents,))
    with torch.inference_mode():
        for times in ((0.5,), ()):  # foreseen, and not
            (prepared,) = model.family.prepare(cond, 64, 64, times, around)
            model.family.answer([Sample(latents, 0.5, prepared, around)])
    assert met == given
    assert sorted(met) == sorted(names)


def packed(transformer: Any) -> None:
    """All layers that fit multiply 8-bit numbers."""
    state = transformer.state_dict()
    fit = [k for k, w in state.items() if w.ndim == 2 and ("blocks" in k or "layers" in k)]
    held: Mapping[str, Any] = {**state, **{k: pack("int8", state[k], dynamic=True) for k in fit}}
    transformer.load_state_dict(place(transformer, held, torch.float32), assign=True)


def test_what_is_rounded_for_its_readers_stays_in_full_where_one_is_adapted(model):
    packed(model.family.transformer)  # type: ignore[attr-defined]
    layers = [
        (name, layer)
        for name, layer in model.family.transformer.named_modules()  # type: ignore[attr-defined]
        if isinstance(layer, PackedLinear)
    ]
    assert layers
    products = {name: low_rank(layer, i, 0.02) for i, (name, layer) in enumerate(layers)}
    around = Around(adapters=(Adapter.of(model.family.transformer, products),))  # type: ignore[attr-defined]
    agree = draw(model, [(wish(model, seed=1), around), (wish(model, seed=2), Around())])
    for ours, (request, own) in zip(agree, ((wish(model, seed=1), around), (wish(model, seed=2), Around()))):
        (alone,) = draw(model, [(request, own)])
        assert decibels(alone, ours) >= 40  # a number next to a border is rounded to either side


def test_streamed_blocks_are_adapted_as_resident_ones(build):
    for spec in SPECS:
        with torch.no_grad():
            resident, streamed = build(spec.tiny), build(spec.tiny)
        transformer = streamed.family.transformer.requires_grad_(False)
        Placed(transformer, "visiting", torch.device("cpu"), torch.float32).settle()
        (expected,) = draw(resident, [(wish(resident), adapter(resident, 3))])
        (ours,) = draw(streamed, [(wish(streamed), adapter(streamed, 3))])
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
def test_compiled_regions_serve_adapted_forwards_and_another_adapter_compiles_nothing(build, spec):
    torch.compiler.reset()
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    with torch.no_grad():
        plain, compiled = build(spec.tiny), build(spec.tiny)
    compile_blocks(compiled.family.transformer, backend=count)
    sizes = [wish(plain, seed=i, width=64 + 32 * i) for i in range(3)]

    def agree(*seeds: int | None) -> int:
        """Draw with these adapters, or none, in one batch. Returns the number of graphs that were compiled."""
        before = len(graphs)
        ours, expected = (
            draw(model, [(one, Around() if seed is None else adapter(model, seed)) for one, seed in zip(sizes, seeds)])
            for model in (compiled, plain)
        )
        assert min(map(decibels, expected, ours)) >= 80
        return len(graphs) - before

    assert agree(None, None) > 0
    agree(None, None, None)
    assert agree(None, None) == agree(None, None, None) == 0
    assert agree(1) > 0
    agree(None, 2)  # several pictures: dimensions become dynamic
    agree(1, 2, 3)
    agree(None, None, None)  # a forward without adapters may compile once more after the first with adapters
    assert agree(4) == agree(5, None, 6) == agree(7, 8) == agree(None, 9) == agree(None, None, None) == 0
    torch.compiler.reset()


def test_the_weights_of_an_adapter_learn_while_the_models_own_stay(model):
    transformer = model.family.transformer.requires_grad_(False)  # type: ignore[attr-defined]
    products = {name: low_rank(transformer.get_submodule(name), i) for i, name in enumerate(NAMED[model.spec.family])}
    for product in products.values():
        product.down.requires_grad_()
        product.up.requires_grad_()
    around = Around(adapters=(Adapter.of(transformer, products),))
    cond = model.family.encode("a fox")
    cond = replace(cond, guidance=3.5 if model.spec.guides == "read" else None)
    x = torch.randn(model.family.latent_shape(64, 64))
    (prepared,) = model.family.prepare(cond, 64, 64, (), around)
    (plain,) = model.family.prepare(cond, 64, 64, ())
    ours, other = model.family.answer([Sample(x, 0.5, prepared, around), Sample(x, 0.5, plain)])
    (ours.square().sum() + other.square().sum()).backward()
    assert all(p.down.grad is not None and p.down.grad.abs().sum() > 0 for p in products.values())
    assert all(p.up.grad is not None and p.up.grad.abs().sum() > 0 for p in products.values())


def test_an_adapter_for_another_model_is_refused(model):
    with pytest.raises(InputError, match=r"an adapter changes layers\.7\.nothing, which is not a layer of this model"):
        Adapter.of(model.family.transformer, {"layers.7.nothing": lambda x, plain, out: None})  # type: ignore[attr-defined]


def test_the_door_changes_the_rows_of_each_owner_and_no_others():
    layer, x = nn.Linear(3, 2).requires_grad_(False), torch.randn(6, 3)
    changes = (lambda x, plain, out: out.add_(plain), lambda x, plain, out: out.add_(1))
    twice, more = (Around(adapters=(Adapter({layer: change}),)) for change in changes)
    both = Around(adapters=more.adapters + twice.adapters)  # each change is relative to the layer's own output
    rows = Rows((Span(0, 1), Span(1, 2), Span(2, 1), Span(3, 1), Span(1, 1)))
    own = layer(x)
    expected = torch.cat((own[:1], 2 * own[1:3], own[3:4] + 1, own[4:5] + 1 + own[4:5], 2 * own[5:]))
    assert torch.equal(linear(layer, x, Forward([Around(), twice, more, both]), rows), expected)
    assert torch.equal(linear(layer, x, PLAIN, ANY), own)
    assert linear(layer, x[:0], Forward([twice]), rows[:0]).shape == (0, 2)  # a process may have no row of a stream
    assert linear(nn.Linear(3, 2), x, Forward([Around(), twice, more, both]), rows).shape == own.shape


@pytest.mark.parametrize("cut", [slice(0, 9), slice(2, 5), slice(3, 9), slice(4, 4)])
def test_rows_are_cut_as_what_has_a_row_for_each_of_them(cut):
    rows, x = Rows((Span(0, 3, True), Span(0, 0), Span(1, 2), Span(1, 4, True))), torch.arange(9)
    owner = torch.cat([torch.full((span.length,), span.owner) for span in rows.spans])
    own = rows[cut]
    assert len(own) == len(x[cut])
    assert [span.owner for span in own.spans for _ in range(span.length)] == owner[cut].tolist()
    assert torch.equal(rows.targets_of(x), torch.tensor([0, 1, 2, 5, 6, 7, 8]))
    parts = {(0,): rows.take(x, (0,)), (1,): rows.take(x, (1,))}
    assert torch.equal(rows.join(parts), x)
