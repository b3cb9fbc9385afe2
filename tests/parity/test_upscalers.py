"""Networks that enlarge pictures, at random tiny weights, beside those of spandrel: the same numbers from one file.

spandrel needs torchvision, which inkstream does not install: without both, these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inkstream.families.upscalers import build_upscaler

try:
    import spandrel
except (ImportError, RuntimeError) as error:  # torchvision of another build raises a RuntimeError
    pytest.skip(f"the reference spandrel is not there ({error})", allow_module_level=True)


def esrgan(**sizes: Any) -> nn.Module:
    from spandrel.architectures.ESRGAN import ESRGAN

    return ESRGAN(**{"num_filters": 16, "num_blocks": 2, **sizes})


def compact(**sizes: Any) -> nn.Module:
    from spandrel.architectures.Compact import Compact

    return Compact(**{"num_feat": 16, "num_conv": 3, **sizes})


REFERENCES: dict[str, Callable[[], nn.Module]] = {
    "ESRGAN 1x": lambda: esrgan(scale=1),
    "ESRGAN 2x": lambda: esrgan(scale=2),
    "ESRGAN 4x": lambda: esrgan(),
    "ESRGAN 8x": lambda: esrgan(scale=8),
    "ESRGAN+": lambda: esrgan(plus=True),
    "Real-ESRGAN 2x": lambda: esrgan(in_nc=12, shuffle_factor=2),
    "Real-ESRGAN 1x": lambda: esrgan(in_nc=48, shuffle_factor=4),
    "Compact 4x": lambda: compact(),
    "Compact 2x": lambda: compact(upscale=2),
    "Compact 1x": lambda: compact(upscale=1),
}


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights of about unit gain, so that each layer counts in the result."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        centre = 1.0 if "norm" in name and weight.ndim == 1 and name.endswith("weight") else 0.0
        weight.data = centre + torch.randn(weight.shape, generator=generator) / (
            10 if weight.ndim == 1 else fan_in**0.5
        )
    return dict(module.state_dict())


@pytest.mark.parametrize("name", REFERENCES)
@torch.inference_mode()
def test_a_file_of_each_architecture_gives_the_numbers_of_the_reference(name):
    reference = REFERENCES[name]().eval()
    state = random_state(reference)
    loaded = spandrel.ModelLoader().load_from_state_dict(dict(state))
    found, ours = build_upscaler(state)
    assert (found, ours.scale) == (loaded.architecture.id, loaded.scale)  # type: ignore[union-attr]
    x = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    expected, got = loaded.model(x), ours(x)
    assert got.shape == expected.shape == (2, 3, 24 * ours.scale, 20 * ours.scale)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert got.std() > 0.01


@pytest.mark.parametrize(("dense", "up", "hr", "body"), [
    ("body.{}.rdb{}.conv{}", "conv_up", "conv_hr", "conv_body"),
    ("RRDB_trunk.{}.RDB{}.conv{}", "upconv", "HRconv", "trunk_conv"),
])  # fmt: skip
@torch.inference_mode()
def test_the_newer_names_of_esrgan_are_read_as_the_reference_reads_them(dense, up, hr, body):
    old = random_state(esrgan())
    fixed = {"model.0": "conv_first", "model.1.sub.2": body, "model.3": f"{up}1", "model.6": f"{up}2", "model.8": hr,
             "model.10": "conv_last"}  # fmt: skip
    fixed |= {
        f"model.1.sub.{i}.RDB{j}.conv{k}.0": dense.format(i, j, k)
        for i in range(2)
        for j in (1, 2, 3)
        for k in range(1, 6)
    }
    state = {f"{fixed[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": weight for name, weight in old.items()}
    loaded = spandrel.ModelLoader().load_from_state_dict({name: weight.clone() for name, weight in state.items()})
    _, ours = build_upscaler({f"module.{name}": weight for name, weight in state.items()})
    x = torch.rand(1, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    expected = loaded.model(x)
    assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
