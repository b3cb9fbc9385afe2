"""Optimisers do what their papers say, on matrices whose answer is known."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from inkstream.nn.layers import rms_norm
from inkstream.train import optim
from inkstream.train.optim import (
    UPDATE_RMS,
    Muon,
    ema_decay,
    is_block_matrix,
    load_optimiser_state,
    make_optimiser,
    optimiser_state,
    orthogonalise,
    rate,
    set_rate,
    update_ema,
)
from inkstream.train.recipe import Optimiser, Run
from inkstream.train.weights import Weights
from inkstream.types import InputError


def weights_of_a_small_model(dtype=torch.float32) -> tuple[nn.Module, Weights]:
    torch.manual_seed(0)
    model = nn.Module()
    model.embed_tokens = nn.Embedding(10, 8)
    model.layers = nn.ModuleList(nn.ModuleDict({"w": nn.Linear(8, 8), "norm": nn.RMSNorm(8)}) for _ in range(2))
    return model, Weights({"part": model}, dtype)


@pytest.mark.parametrize("shape", [(8, 8), (48, 16), (16, 48), (64, 2)])
def test_the_update_of_a_matrix_has_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    values = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize(("rounded", "bound"), [(False, 1e-3), (True, 2e-2)], ids=["float32", "bfloat16"])
def test_the_update_keeps_the_directions_of_the_gradient(monkeypatch, rounded, bound):
    """Of a matrix U S V' the nearest orthogonal one is U V', whatever S, and whatever its scale."""
    monkeypatch.setattr(optim, "fast_bfloat16", lambda device: rounded)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q for _ in range(2))
    for scale in (1e-4, 1.0, 1e4):
        near = orthogonalise((scale * u @ torch.linspace(0.3, 1, 16).diag() @ v.T)[None])[0]
        inner = u.T @ near @ v
        assert (inner - inner.diag().diag()).abs().max() < bound
        assert (inner.diag() - 1).abs().max() < 0.4


def test_an_update_of_muons_is_as_large_as_adams():
    p = torch.zeros(32, 128)
    optimiser = Muon([p], lr=0.5)
    p.grad = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * 1e-3
    optimiser.step()
    assert p.square().mean().sqrt() == pytest.approx(0.5 * UPDATE_RMS, rel=0.2)


def test_muon_finds_the_minimum_of_a_quadratic():
    target = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    p = torch.zeros(8, 24)
    optimiser = Muon([p], lr=0.1)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        p.grad = p - target
        optimiser.step()
    assert (p - target).abs().max() < 0.02


def test_muon_takes_matrices_inside_blocks_and_adamw_the_rest():
    _, weights = weights_of_a_small_model()
    adam, muon = make_optimiser(weights, Optimiser(kind="muon", weight_decay=0.5))
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in weights.masters.items() if id(p) in taken}
    assert names == {"part.layers.0.w.weight", "part.layers.1.w.weight"}
    assert sum(len(group["params"]) for group in adam.param_groups) == len(weights.masters) - 2
    assert len(make_optimiser(weights, Optimiser(kind="adamw"))) == 1


def test_norms_biases_and_embeddings_are_not_decayed():
    _, weights = weights_of_a_small_model()
    (adam,) = make_optimiser(weights, Optimiser(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in adam.param_groups for p in group["params"]}
    for name, master in weights.masters.items():
        assert decay[id(master)] == (0.5 if name.endswith("w.weight") else 0.0), name


def test_what_reads_the_time_is_no_matrix_of_muons():
    matrix = torch.zeros(4, 4)
    assert is_block_matrix("transformer.layers.3.attention.qkv.weight", matrix)
    assert not is_block_matrix("transformer.layers.3.adaLN_modulation.0.weight", matrix)
    assert not is_block_matrix("transformer.cap_embedder.1.weight", matrix)
    assert not is_block_matrix("transformer.layers.3.attention_norm1.weight", torch.zeros(4))


def test_the_rate_rises_stays_and_falls_to_nothing():
    settings, run = Optimiser(lr=2.0, warmup=10, decay=0.3), Run(steps=100)
    assert [rate(n, settings, run) for n in (0, 4, 9, 50, 70)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [rate(n, settings, run) for n in (85, 99)] == pytest.approx([0.5, 1 / 30])
    assert rate(0, Optimiser(warmup=0, decay=0), Run(steps=1)) == 1
    optimiser = torch.optim.AdamW([torch.zeros(1)], lr=9.0)
    set_rate([optimiser], 0.5, settings)
    assert optimiser.param_groups[0]["lr"] == 1.0


def test_the_average_is_the_closed_form():
    """With decay d, n steps of the constant c take a start of 0 to c (1 - d^n)."""
    ema, weights = [torch.zeros(3)], [torch.full((3,), 2.0)]
    for _ in range(10):
        update_ema(ema, weights, 0.9)
    assert ema[0].tolist() == pytest.approx([2 * (1 - 0.9**10)] * 3)


def test_the_average_forgets_its_first_steps_sooner():
    settings = Optimiser(ema=0.99)
    assert ema_decay(0, settings) == pytest.approx(0.1)
    assert ema_decay(90, settings) == pytest.approx(0.91)
    assert ema_decay(10_000, settings) == 0.99


def test_gradients_are_clipped_by_their_norm_together():
    model, weights = weights_of_a_small_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in model.parameters())
    assert weights.collect(clip=0.5) == pytest.approx(math.sqrt(count))
    assert sum(m.grad.square().sum() for m in weights.masters.values()).sqrt() == pytest.approx(0.5, rel=1e-4)
    assert all(p.grad is None for p in model.parameters() if p.dtype != torch.float32)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    model, weights = weights_of_a_small_model(torch.bfloat16)
    layer = model.layers[0]["w"]
    assert layer.weight.dtype == torch.bfloat16
    with torch.no_grad():
        weights.masters["part.layers.0.w.weight"].fill_(1.0)
        for _ in range(100):
            weights.masters["part.layers.0.w.weight"].add_(1e-3)  # bfloat16 has steps of 2^-7 at 1
            weights.publish()
    assert layer.weight[0, 0].item() == pytest.approx(1.1, abs=0.005)


def test_the_average_is_used_for_as_long_as_asked_and_no_longer():
    model, weights = weights_of_a_small_model()
    before = {name: p.detach().clone() for name, p in weights.live.items()}
    with weights.using({name: torch.zeros_like(p) for name, p in before.items()}):
        assert not any(p.any() for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in weights.live.items())


PACKAGES = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}
KINDS = ["adamw", "muon", "adafactor", "prodigy", pytest.param("adamw8bit", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_an_optimiser_goes_on_as_if_it_had_not_stopped(kind):
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind], reason=f"needs {PACKAGES[kind]}: pip install 'inkstream[train]'")

    def steps(weights, optimisers, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for master in weights.masters.values():
                master.grad = torch.randn(master.shape, generator=generator)
            for optimiser in optimisers:
                optimiser.step()

    settings = Optimiser(kind=kind, lr=1.0 if kind == "prodigy" else 1e-3)
    _, first = weights_of_a_small_model()
    optimisers = make_optimiser(first, settings)
    steps(first, optimisers, 3, seed=1)
    state = {name: value.clone() for name, value in optimiser_state(optimisers, first).items()}
    copy = {name: master.clone() for name, master in first.masters.items()}
    steps(first, optimisers, 3, seed=2)

    _, second = weights_of_a_small_model()
    again = make_optimiser(second, settings)
    second.load(copy)
    load_optimiser_state(again, second, state)
    steps(second, again, 3, seed=2)
    assert all(torch.equal(first.masters[name], second.masters[name]) for name in copy)


@pytest.mark.parametrize(("kind", "other"), [("adamw", "muon"), ("adafactor", "adamw"), ("adamw", "adafactor")])
def test_the_state_of_another_optimiser_is_refused(kind, other):
    _, weights = weights_of_a_small_model()
    optimisers = make_optimiser(weights, Optimiser(kind=kind))
    for master in weights.masters.values():
        master.grad = torch.ones(master.shape)
    for optimiser in optimisers:
        optimiser.step()
    with pytest.raises(InputError, match="kind differs from the checkpoint's"):
        load_optimiser_state(
            make_optimiser(weights, Optimiser(kind=other)), weights, optimiser_state(optimisers, weights)
        )


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(InputError, match=r"kind = prodigy needs prodigyopt: pip install 'inkstream\[train\]'"):
        make_optimiser(weights_of_a_small_model()[1], Optimiser(kind="prodigy", lr=1.0))


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_the_norm_has_torchs_value_and_gradient(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(rows, 8, generator=generator, requires_grad=True)
    ours = rms_norm(x, weight, 1e-5)
    plain = nn.functional.rms_norm(x, (8,), None, 1e-5) * weight.repeat_interleave(6 // rows, 0)
    assert torch.allclose(ours, plain, atol=1e-6)
    toward = torch.randn(6, 8, generator=generator)
    for got, wanted in zip(*(torch.autograd.grad(y, (x, weight), toward) for y in (ours, plain))):
        assert torch.allclose(got, wanted, atol=1e-5)
