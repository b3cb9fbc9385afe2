"""Weights that wait in MKL's layout multiply as plain ones do, by any number of rows, and nothing else is replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from inkstream.bench.cases import CASES
from inkstream.bench.random_model import write_random
from inkstream.engine.machine.loader import load
from inkstream.nn import prepacked
from inkstream.nn.prepacked import PrepackedLinear, prepack
from inkstream.nn.stack import Blocks
from inkstream.types import Machine, Request
from inkstream.weights.files import read_state, write_state

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of torch has no MKL")

WIDE = 1024


class Block(nn.Module):
    apart = ("modulation",)

    def __init__(self):
        super().__init__()
        self.modulation = nn.Sequential(nn.Linear(WIDE, WIDE))
        self.inner = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 8))

    def forward(self, x):
        return self.inner(x)


def stack(count=2, dtype=torch.float32):
    return nn.ModuleDict({"before": nn.Linear(WIDE, WIDE), "blocks": Blocks(Block() for _ in range(count))}).to(dtype)


def packed(module):
    return [name for name, layer in module.named_modules() if isinstance(layer, PrepackedLinear)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(64, 48), (2730, 1024), (1024, 3072)])
def test_it_multiplies_by_any_number_of_rows(bias, sizes):
    torch.manual_seed(0)
    plain = nn.Linear(*sizes, bias=bias).requires_grad_(False)
    fast = PrepackedLinear(plain)
    for rows in (0, 1, 7, 33, 288, 319, 320, 321, 1056, 2100):
        x = torch.randn(rows, sizes[0])
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=2e-5)
    x = torch.randn(3, 5, sizes[0])
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(fast(x[0, 0]), plain(x[0, 0]), rtol=1e-5, atol=2e-5)
    turned = torch.randn(sizes[0], 40).t()  # not contiguous
    torch.testing.assert_close(fast(turned), plain(turned), rtol=1e-5, atol=2e-5)


def test_only_large_layers_of_blocks_are_packed():
    model = stack()
    x = torch.randn(5, WIDE)
    with torch.no_grad():
        before = model["blocks"][1](x)
        prepack(model)
        torch.testing.assert_close(model["blocks"][1](x), before, rtol=1e-5, atol=1e-5)
    assert packed(model) == ["blocks.0.inner.0", "blocks.1.inner.0"]
    outline = model["blocks"][0].inner[0].weight
    assert (outline.shape, outline.dtype, outline.device.type) == ((WIDE, WIDE), torch.float32, "cpu")


def test_other_types_of_numbers_are_left_alone():
    model = stack(dtype=torch.bfloat16)
    prepack(model)
    assert packed(model) == []


def test_layers_whose_sums_others_share_are_left_alone():
    model = stack()
    model["blocks"][0].inner[0].register_forward_hook(lambda layer, given, out: out * 2)
    prepack(model)
    assert packed(model) == ["blocks.1.inner.0"]


def test_without_mkl_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model = stack()
    prepack(model)
    assert packed(model) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Z-Image with one block that is wide enough."""
    spec = CASES["tiny"].spec
    config = replace(
        spec.transformer, dim=WIDE, n_layers=1, n_refiner_layers=1, n_heads=WIDE // sum(spec.transformer.axes_dims)
    )
    spec = replace(spec, transformer=config)
    return write_random(spec, tmp_path_factory.mktemp("wide") / "model", torch.float32)


def test_a_model_that_stays_is_packed_and_draws_the_same(folder, monkeypatch):
    request = Request(prompt="a red fox", width=64, height=64, steps=2, seed=3)
    resident, streamed = load(folder, Machine("cpu")), load(folder, Machine("cpu", placement="streamed"))
    monkeypatch.setattr(prepacked, "LEAST", 2**40)
    plain = load(folder, Machine("cpu"))
    assert len(packed(resident.family.transformer)) == 5 * 3  # layer, noise refiner, context refiner
    assert packed(streamed.family.transformer) == packed(plain.family.transformer) == []
    one, two, three = (draw(model, request) for model in (resident, plain, streamed))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert torch.equal(two, three)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads memory as Linux tells it")
def test_weights_are_views_of_their_file_until_they_are_used(tmp_path, resident):
    path, size = tmp_path / "stack.safetensors", 4 * WIDE * WIDE
    write_state(path, {key: weight.detach() for key, weight in stack(1).state_dict().items()})
    model = stack(1).requires_grad_(False)
    model.load_state_dict(read_state(path), assign=True)
    prepack(model)
    x = torch.randn(2, WIDE)
    for plain in (model["before"], model["blocks"][0].modulation):
        plain(x)
    assert size * 2 <= resident(path) < size * 3  # plain ones were read
    model["blocks"][0](x)
    assert size * 2 <= resident(path) < size * 2.2  # what was packed has left


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # of inductor's import
def test_compiled_blocks_are_left_to_the_compiler(folder):
    assert packed(load(folder, Machine("cpu", compile=True)).family.transformer) == []


def draw(model, request):
    cond = model.encode(request)
    noise = torch.randn(1, *model.family.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    return model.sample(request, cond, noise)
