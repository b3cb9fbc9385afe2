"""The family that docs/add-a-model.md builds is a family: it is opened, draws, learns, and keeps every promise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream import Engine, load
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model, advance
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.families import FAMILIES, SPECS, Family, Part
from inkstream.flow import add_noise
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.around.adapters import Adapter, Product
from inkstream.nn.around.residuals import Hints
from inkstream.nn.forward import Rows, Sample
from inkstream.nn.quant import place
from inkstream.quant.pack import pack
from inkstream.types import Machine, Request, Spec
from inkstream.weights.keymap import translate

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "add-a-model.md"


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    """The toy family with its two rows in the tables, as the page adds them: its Specs, tables, model and class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        from toy import family, keys, model, specs

        patch.setitem(FAMILIES, "toy", "toy.family:Toy")
        for spec in specs.SPECS:
            patch.setitem(SPECS, spec.name, spec)
        yield SimpleNamespace(specs=specs, keys=keys, model=model, family=family)


@pytest.fixture(scope="module")
def folder(toy, make_folder, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny-toy", toy.specs.TOY.tiny)


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(folder, Machine("cpu", "fp32"))


def wish(model: Model, **fields: Any) -> Request:
    return complete(
        Request(**{"prompt": "a fox", "width": 64, "height": 64, "steps": 4, "seed": 0, **fields}), model.spec
    )


def draw(model: Model, wishes: list[tuple[Request, Around]]) -> list[Tensor]:
    """What comes of these requests drawn together; every step must be one forward."""
    forwards: list[int] = []
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    hook = transformer.register_forward_hook(lambda *_: forwards.append(1))
    with torch.inference_mode():
        runs = [model.start(request, model.encode(request), None, around=around) for request, around in wishes]
    steps = max(run.evaluations for run in runs)
    while pending := [run for run in runs if run.query is not None]:
        advance(model.family, pending)
    hook.remove()
    assert len(forwards) == steps
    return [run.result for run in runs]


def decibels(a: Tensor, b: Tensor) -> float:
    """How near b is to a, against a's own range."""
    error = float((a - b).square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10((a.max() - a.min()) ** 2 / error))


def adapter(model: Model, seed: int) -> Around:
    """It adds a small product to the first block's attention and to the text's embedding."""
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)

    def product(path: str) -> Product:
        layer = transformer.get_submodule(path)
        weight = 0.1 * torch.randn(layer.out_features, layer.in_features, generator=generator)
        return lambda x, plain, out: out.add_(x @ weight.T)

    paths = ("layers.0.attention.qkv", "text_embedder")
    return Around(adapters=(Adapter.of(transformer, {path: product(path) for path in paths}),))


def residual(samples: Mapping[int, Sample]) -> Hints:
    (t,) = {sample.t for sample in samples.values()}

    def hint(stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor | None:
        return torch.full_like(rows.targets_of(after), t) if (stack, index) == ("layers", 0) else None

    return hint


# The page --------------------------------------------------------------------------------------------------------


def test_the_code_on_the_page_is_the_toy_family():
    shown = dict(re.findall(r"^### `(\w+\.py)`\n.*?^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    files = {path.name: path.read_text() for path in (HERE / "toy").glob("*.py") if path.name != "__init__.py"}
    assert shown == files


def test_the_page_names_every_function_of_the_contract_and_every_field_that_a_family_fills():
    page = PAGE.read_text()
    functions = [name for name in vars(Family) if not name.startswith("_")]
    data = [field.name for kind in (Part, Spec) for field in fields(kind)] + list(Family.__annotations__)
    assert len(functions) > 10
    assert [name for name in (*functions, *data) if f"`{name}`" not in page] == []


# The contract --------------------------------------------------------------------------------------------------------


def test_its_class_has_every_function_and_table_of_the_contract(toy):
    names = [name for name in (*vars(Family), *Family.__annotations__) if not name.startswith("_")]
    assert [name for name in names if name not in ("spec", "transformer") and not hasattr(toy.family.Toy, name)] == []


def test_a_folder_of_it_is_recognised_by_its_keys_with_the_sizes_that_it_has(toy, folder, model):
    tiny = toy.specs.TOY.tiny
    assert type(model.family) is toy.family.Toy
    assert (model.spec.transformer, model.spec.vae) == (tiny.transformer, tiny.vae)
    (folder / "transformer" / "config.json").rename(folder / "config.aside")
    try:  # and by their shapes
        assert load(folder, Machine("cpu", "fp32")).spec.transformer == tiny.transformer
    finally:
        (folder / "config.aside").rename(folder / "transformer" / "config.json")


def test_the_engine_draws_the_same_picture_for_the_same_seed_and_keeps_what_is_outside_a_mask(folder):
    engine = Engine(Machine("cpu", "fp32"))
    size = {"width": 64, "height": 64}
    request = Request(prompt="a fox", negative_prompt="grey", model=str(folder), steps=2, seed=7, count=2, **size)
    first, second = engine.generate(request).images
    assert first.size == (64, 64) == second.size
    assert first.tobytes() != second.tobytes()
    (again,) = engine.generate(request.model_copy(update={"seed": 8, "count": 1})).images
    assert again.tobytes() == second.tobytes()
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    (edited,) = engine.generate(
        request.model_copy(update={"image": as_given(first), "mask": as_given(mask), "count": 1})
    ).images
    left = (0, 0, 32, 64)
    assert edited.crop(left).tobytes() == first.crop(left).tobytes()
    assert edited.tobytes() != first.tobytes()


def as_given(image: Image.Image) -> str:
    """A picture as a request holds it."""
    given = Request.model_validate({"image": image}).image
    assert given is not None
    return given


def test_pictures_of_other_sizes_and_prompts_share_forwards_with_whatever_is_around_them(model):
    wishes: list[tuple[Request, Callable[[], Around]]] = [
        (wish(model, seed=4, steps=6, cache="first-block", cache_threshold=10), Around),
        (wish(model, width=32), Around),
        (wish(model, seed=1, prompt="a long blue whale"), lambda: adapter(model, 1)),
        (wish(model, seed=2, height=96), lambda: adapter(model, 2)),
        (wish(model, seed=3), lambda: Around(residuals=(residual,))),
    ]
    together = draw(model, [(request, around()) for request, around in wishes])
    for ours, (request, around) in zip(together, wishes):
        (alone,) = draw(model, [(request, around())])
        assert decibels(alone, ours) >= 80
        if request.seed:
            (plain,) = draw(model, [(request.model_copy(update={"cache": "none"}), NOTHING)])
            assert decibels(plain, ours) < 60


def test_every_product_goes_through_the_door(model):
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    names = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    met: dict[str, int] = {}
    given: dict[str, int] = {}

    def count(counts: dict[str, int], name: str, x: Tensor) -> None:
        counts[name] = counts.get(name, 0) + len(x)

    def meet(name: str) -> Product:
        return lambda x, plain, out: count(met, name, x)

    hooks = [
        transformer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: count(given, name, args[0])
        )
        for name in names
    ]
    around = Around(adapters=(Adapter.of(transformer, {name: meet(name) for name in names}),))
    latents = torch.randn(model.family.latent_shape(64, 64))
    with torch.inference_mode():
        for times in ((0.5,), ()):  # foreseen, and not
            (prepared,) = model.family.prepare(model.family.encode("a fox"), 64, 64, times, around)
            model.family.answer([Sample(latents, 0.5, prepared, around)])
    for hook in hooks:
        hook.remove()
    assert met == given
    assert sorted(met) == sorted(names)


def test_a_time_that_was_not_foreseen_is_answered_as_one_that_was(model):
    latents, cond = torch.randn(model.family.latent_shape(64, 64)), model.family.encode("a fox")
    with torch.inference_mode():
        foreseen, open_ = (model.family.prepare(cond, 64, 64, times)[0] for times in ((0.75, 0.5), ()))
        ours, expected = (model.family.answer([Sample(latents, 0.5, p)])[0] for p in (foreseen, open_))
    assert decibels(expected, ours) >= 100
    assert list(foreseen.at(0.5).times) == [0.5]
    assert foreseen.at(0.4) is None


def test_under_every_plan_the_picture_is_the_same(folder, model):
    request = wish(model, seed=5)
    (expected,) = draw(model, [(request, NOTHING)])
    for plan in PLACEMENTS:
        (ours,) = draw(load(folder, Machine("cpu", "fp32", placement=plan)), [(request, NOTHING)])
        assert torch.equal(ours, expected), plan


def test_each_layout_round_trips_to_the_identity(toy):
    with torch.device("meta"):
        state = toy.model.ToyTransformer(toy.specs.TOY.transformer).state_dict()
    for rules in toy.family.Toy.parts["transformer"].layouts.values():
        back = translate(rules, translate(rules, state, back=True))
        assert {name: weight.shape for name, weight in back.items()} == {n: w.shape for n, w in state.items()}
    assert (
        toy.family.infer_config({name: tuple(weight.shape) for name, weight in state.items()}) == toy.specs.ToyConfig()
    )


def test_packed_weights_draw_nearly_the_same(folder, model):
    packed = load(folder, Machine("cpu", "fp32"))
    transformer: Any = packed.family.transformer  # type: ignore[attr-defined]
    state = transformer.state_dict()
    held = {
        k: pack("int8", w) if k.startswith("layers") and w.ndim == 2 and "modulation" not in k else w
        for k, w in state.items()
    }
    transformer.load_state_dict(place(transformer, held, torch.float32), assign=True)
    (ours,), (expected,) = draw(packed, [(wish(model), NOTHING)]), draw(model, [(wish(model), NOTHING)])
    assert 30 <= decibels(expected, ours) < 100


def test_steps_of_training_lower_the_loss_and_reach_every_weight(folder):
    model = load(folder, Machine("cpu", "fp32"))
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    transformer.requires_grad_(True)
    image, noise = (torch.randn(model.family.latent_shape(64, 64)) for _ in range(2))
    cond = model.family.encode("a fox")
    optimizer = torch.optim.Adam(transformer.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        (prepared,) = model.family.prepare(cond, 64, 64, ())
        (v,) = model.family.answer([Sample(add_noise(image, noise, 0.5), 0.5, prepared)])
        loss = F.mse_loss(v, noise - image)
        optimizer.zero_grad()
        loss.backward()
        assert [name for name, weight in transformer.named_parameters() if weight.grad is None] == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# Parity --------------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The toy as others would publish it: one sample at a time, queries, keys and values apart, angles as complex
    numbers, no packing, and nothing of ours but the sizes."""

    def __init__(self, c: Any):
        super().__init__()
        self.c = c
        self.patch_embed = nn.Linear(c.in_channels, c.dim)
        self.text_embedder = nn.Linear(c.text_dim, c.dim)
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))}
        )
        self.layers = nn.ModuleList(ReferenceBlock(c) for _ in range(c.n_layers))
        self.proj_out = nn.Linear(c.dim, c.in_channels)

    def forward(self, x: Tensor, t: float, text: Tensor) -> Tensor:  # (C, h, w), (L, text_dim) -> (C, h, w)
        _, h, w = x.shape
        places = [(0, r, c) for r in range(h) for c in range(w)] + [(1 + k, 0, 0) for k in range(len(text))]
        angles = [
            [place[a] * 256.0 ** (-2 * i / d) for a, d in enumerate(self.c.axes_dims) for i in range(d // 2)]
            for place in places
        ]
        turns = torch.polar(torch.ones(len(places), len(angles[0])), torch.tensor(angles))
        frequencies = 10_000.0 ** (-torch.arange(128) / 128)
        time = self.t_embedder["mlp"](torch.cat([(1000 * t * frequencies).cos(), (1000 * t * frequencies).sin()]))
        tokens = torch.cat([self.patch_embed(x.permute(1, 2, 0).reshape(h * w, -1)), self.text_embedder(text)])
        for layer in self.layers:
            tokens = layer(tokens, time, turns)
        return self.proj_out(tokens[: h * w]).reshape(h, w, -1).permute(2, 0, 1)


class ReferenceBlock(nn.Module):
    def __init__(self, c: Any):
        super().__init__()
        self.heads = c.n_heads
        self.modulation = nn.Linear(c.dim, 2 * c.dim)
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, 1e-6), nn.RMSNorm(c.dim, 1e-6)
        linears = {f"to_{one}": nn.Linear(c.dim, c.dim, bias=False) for one in "qkv"}
        norms = {f"{one}_norm": nn.RMSNorm(c.dim // c.n_heads, 1e-6) for one in "qk"}
        out = nn.ModuleList([nn.Linear(c.dim, c.dim, bias=False)])
        self.attention = nn.ModuleDict({**linears, **norms, "to_out": out})
        self.feed_forward = nn.ModuleDict(
            {"w1": nn.Linear(c.dim, 2 * c.dim, bias=False), "w2": nn.Linear(2 * c.dim, c.dim, bias=False),
             "w3": nn.Linear(c.dim, 2 * c.dim, bias=False)}
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, turns: Tensor) -> Tensor:
        scale, gate = self.modulation(time).chunk(2)
        a: Any = self.attention
        normed = self.norm1(x) * (1 + scale)
        q, k, v = (a[f"to_{one}"](normed).reshape(len(x), self.heads, -1).transpose(0, 1) for one in "qkv")
        q, k = (
            torch.view_as_real(torch.view_as_complex(norm(s).unflatten(-1, (-1, 2))) * turns).flatten(-2)
            for norm, s in ((a["q_norm"], q), (a["k_norm"], k))
        )
        seen = ((q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + gate * a["to_out"][0](seen.transpose(0, 1).flatten(1))
        f, y = self.feed_forward, self.norm2(x)
        return x + f["w2"](F.silu(f["w1"](y)) * f["w3"](y))


@torch.no_grad()
def test_it_equals_the_reference_on_the_references_own_weights(toy):
    config = replace(toy.specs.TOY.tiny.transformer, n_layers=3)
    torch.manual_seed(0)
    theirs = Reference(config)
    for name, weight in theirs.named_parameters():
        nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.1)
    ours = toy.model.ToyTransformer(config)
    ours.load_state_dict(translate(toy.keys.DIFFUSERS, theirs.state_dict()))
    xs, texts, times = (
        [torch.randn(16, 8, 8), torch.randn(16, 4, 12)],
        [torch.randn(5, 32), torch.randn(9, 32)],
        [0.3, 0.8],
    )
    samples = [Sample(x, t, ours.prepare([text], *x.shape[1:], (), NOTHING)[0]) for x, t, text in zip(xs, times, texts)]
    for got, *given in zip(ours(samples), xs, times, texts):
        assert decibels(theirs(*given), got) >= 90
