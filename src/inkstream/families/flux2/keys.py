"""Key tables of the FLUX.2 transformer's published layouts. Our names are those of the single files."""

from __future__ import annotations

from dataclasses import replace

from inkstream.families.parts import FLUX_SINGLE_FILE as SINGLE_FILE
from inkstream.weights.keymap import Rule, fuse, rename

__all__ = ["CUT_SHORT", "DIFFUSERS", "SINGLE_FILE"]

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"

DIFFUSERS: tuple[Rule, ...] = (
    rename("x_embedder", "img_in"),
    rename("context_embedder", "txt_in"),
    rename("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    rename("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    rename("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    rename("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    rename("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
    rename("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
    rename("single_stream_modulation.linear", "single_stream_modulation.lin"),
    fuse(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), ours="double_blocks.{}.img_attn.qkv"),
    rename(f"{_DOUBLE}.attn.norm_q.weight", "double_blocks.{}.img_attn.norm.query_norm.scale"),
    rename(f"{_DOUBLE}.attn.norm_k.weight", "double_blocks.{}.img_attn.norm.key_norm.scale"),
    rename(f"{_DOUBLE}.attn.to_out.0", "double_blocks.{}.img_attn.proj"),
    rename(f"{_DOUBLE}.ff.linear_in", "double_blocks.{}.img_mlp.0"),
    rename(f"{_DOUBLE}.ff.linear_out", "double_blocks.{}.img_mlp.2"),
    fuse(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), ours="double_blocks.{}.txt_attn.qkv"),
    rename(f"{_DOUBLE}.attn.norm_added_q.weight", "double_blocks.{}.txt_attn.norm.query_norm.scale"),
    rename(f"{_DOUBLE}.attn.norm_added_k.weight", "double_blocks.{}.txt_attn.norm.key_norm.scale"),
    rename(f"{_DOUBLE}.attn.to_add_out", "double_blocks.{}.txt_attn.proj"),
    rename(f"{_DOUBLE}.ff_context.linear_in", "double_blocks.{}.txt_mlp.0"),
    rename(f"{_DOUBLE}.ff_context.linear_out", "double_blocks.{}.txt_mlp.2"),
    rename(f"{_SINGLE}.attn.to_qkv_mlp_proj", "single_blocks.{}.linear1"),
    rename(f"{_SINGLE}.attn.to_out", "single_blocks.{}.linear2"),
    rename(f"{_SINGLE}.attn.norm_q.weight", "single_blocks.{}.norm.query_norm.scale"),
    rename(f"{_SINGLE}.attn.norm_k.weight", "single_blocks.{}.norm.key_norm.scale"),
    rename("norm_out.linear", "final_layer.adaLN_modulation.1", swap=True),  # scale, shift there; shift, scale here
    rename("proj_out", "final_layer.linear"),
)

CUT_SHORT: tuple[Rule, ...] = tuple(
    replace(rule, theirs=tuple(name.replace("transformer_blocks", "sformer_blocks") for name in rule.theirs))
    for rule in DIFFUSERS
    if rule.theirs[0].startswith("transformer_blocks")
)
"""Names in adapters whose writer took a prefix off too much: `sformer_blocks` for `transformer_blocks`."""
