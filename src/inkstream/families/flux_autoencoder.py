"""The autoencoder of FLUX.2 and FLUX.3 as a Part: both published layouts, full or small decoder, known by shapes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inkstream.families import Part, Shapes, parts
from inkstream.nn.config import Flux2VAEConfig
from inkstream.nn.vae import Flux2Autoencoder
from inkstream.weights.keymap import drop, rename


def infer_autoencoder(shapes: Shapes) -> Flux2VAEConfig:
    """Sizes from the shapes of the weights. Shapes do not show norm groups and epsilon: FLUX.2's are assumed."""
    _ = shapes["bn.running_mean"]
    sizes = asdict(parts.infer_autoencoder(shapes))
    del sizes["scaling_factor"], sizes["shift_factor"]
    levels = range(len(sizes["block_out_channels"]))
    widths = tuple(shapes[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels)[::-1]
    if any(width % Flux2VAEConfig.norm_num_groups for width in widths):
        raise KeyError("norm_num_groups")
    return Flux2VAEConfig(
        **sizes,
        decoder_block_out_channels=None if widths == sizes["block_out_channels"] else widths,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


_UNCOUNTED = drop("bn.num_batches_tracked")  # the number of batches behind the statistics; not needed

AUTOENCODER = Part(
    phases=("prompt", "picture"),
    build=Flux2Autoencoder,
    config=Flux2VAEConfig,
    layouts={
        "diffusers": (_UNCOUNTED,),
        "ldm": (
            _UNCOUNTED,
            rename("encoder.quant_conv", "quant_conv"),
            rename("decoder.post_quant_conv", "post_quant_conv"),
            *parts.AUTOENCODER.layouts["ldm"],
        ),
    },
    infer=infer_autoencoder,
)
"""The autoencoder with the full or the small decoder. "ldm" is ae.safetensors and ComfyUI's flux2-vae."""


def document(config: Flux2VAEConfig) -> dict[str, Any]:
    """The autoencoder's config.json."""
    sizes = asdict(config)
    if config.decoder_block_out_channels is None:
        del sizes["decoder_block_out_channels"]
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKLFlux2",
        **sizes,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
        "sample_size": 1024,
    }
