"""Key tables of the Qwen-Image 2.1 transformer's published layouts. Our names are those of the release."""

from __future__ import annotations

from inkstream.weights.keymap import Rule, rename, split

_MLP = "transformer_blocks.{}.img_mlp"

DIFFUSERS: tuple[Rule, ...] = (
    rename("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    rename("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
)
COMFYUI: tuple[Rule, ...] = (*DIFFUSERS, split(f"{_MLP}.gate_up", (f"{_MLP}.gate_layer", f"{_MLP}.proj")))
"""ComfyUI's files hold the two layers before the activation as one."""
