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


def span(**sizes: Any) -> nn.Module:
    from spandrel.architectures.SPAN import SPAN

    return SPAN(**{"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 12, **sizes})


def plksr(real: bool = False, **sizes: Any) -> nn.Module:
    from spandrel.architectures.PLKSR import PLKSR, RealPLKSR

    return (RealPLKSR if real else PLKSR)(**{"dim": 16, "n_blocks": 2, "kernel_size": 5, **sizes})


def swinir(**sizes: Any) -> nn.Module:
    from spandrel.architectures.SwinIR import SwinIR

    small = {"img_size": 16, "embed_dim": 24, "depths": [2, 3], "num_heads": [2, 3], "window_size": 8, "mlp_ratio": 2.0}
    return SwinIR(**{**small, "upscale": 4, "upsampler": "nearest+conv", **sizes})


def hat(**sizes: Any) -> nn.Module:
    from spandrel.architectures.HAT import HAT

    small = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": 8, "mlp_ratio": 2.0}
    return HAT(**{**small, "compress_ratio": 3, "squeeze_factor": 6, "upscale": 4, **sizes})


def dat(**sizes: Any) -> nn.Module:
    from spandrel.architectures.DAT import DAT

    small = {"embed_dim": 32, "depth": [3, 2], "num_heads": [2, 4], "split_size": [4, 8], "expansion_factor": 2.0}
    return DAT(**{**small, "img_size": 16, "upscale": 4, **sizes})


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
    "SPAN 4x": lambda: span(),
    "SPAN 2x without a norm": lambda: span(upscale=2, norm=False),
    "PLKSR": lambda: plksr(),
    "PLKSR DCCM 2x": lambda: plksr(ccm_type="DCCM", use_ea=False, upscaling_factor=2),
    "PLKSR ICCM": lambda: plksr(ccm_type="ICCM"),
    "RealPLKSR": lambda: plksr(real=True),
    "RealPLKSR 2x with layer norm and DySample": lambda: plksr(
        real=True, layer_norm=True, dysample=True, upscaling_factor=2
    ),
    "RealPLKSR 3x with DySample": lambda: plksr(real=True, dysample=True, upscaling_factor=3),
    "SwinIR 4x": lambda: swinir(),
    "SwinIR 2x of three convolutions": lambda: swinir(upscale=2, resi_connection="3conv"),
    "SwinIR classical 3x": lambda: swinir(upsampler="pixelshuffle", upscale=3),
    "SwinIR lightweight 2x": lambda: swinir(upsampler="pixelshuffledirect", upscale=2),
    "SwinIR against JPEG": lambda: swinir(upsampler="", upscale=1, window_size=7, img_size=14),
    "DAT 4x": lambda: dat(),
    "DAT light 2x": lambda: dat(upscale=2, upsampler="pixelshuffledirect", resi_connection="3conv"),
    "HAT 4x": lambda: hat(),
    "HAT 2x": lambda: hat(upscale=2, overlap_ratio=0.25),
}


GAINS = {"SPAN 4x": 0.5}
"""Products of SPAN's results, which begin at 255, grow until rounding shows. With smaller weights they do not."""
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # in the references


def random_state(module: nn.Module, gain: float = 1.0) -> dict[str, Tensor]:
    """Weights of about unit gain, so that each layer counts in the result."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        centre = 1.0 if "norm" in name and weight.ndim == 1 and name.endswith("weight") else 0.0
        spread = 0.1 if weight.ndim == 1 else gain / fan_in**0.5
        weight.data = centre + spread * torch.randn(weight.shape, generator=generator)
    return dict(module.state_dict())


@pytest.mark.parametrize("name", REFERENCES)
@torch.inference_mode()
def test_a_file_of_each_architecture_gives_the_numbers_of_the_reference(name):
    reference = REFERENCES[name]().eval()
    state = random_state(reference, GAINS.get(name, 1.0))
    loaded = spandrel.ModelLoader().load_from_state_dict(dict(state))
    found, ours = build_upscaler(state)
    loaded.eval()
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
