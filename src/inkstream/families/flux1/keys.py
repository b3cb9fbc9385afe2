"""Key tables of the FLUX.1 transformer's published layouts. Our names are those of the single files."""

from __future__ import annotations

from inkstream.families.parts import FLUX_SINGLE_FILE as SINGLE_FILE
from inkstream.weights.keymap import Rule, fuse, fuse_columns, rename

__all__ = ["DIFFUSERS", "NUNCHAKU", "SINGLE_FILE", "XLABS"]

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"

DIFFUSERS: tuple[Rule, ...] = (
    rename("x_embedder", "img_in"),
    rename("context_embedder", "txt_in"),
    rename("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    rename("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    rename("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    rename("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    rename("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    rename("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    rename(f"{_DOUBLE}.norm1.linear", "double_blocks.{}.img_mod.lin"),
    rename(f"{_DOUBLE}.norm1_context.linear", "double_blocks.{}.txt_mod.lin"),
    fuse(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv"), ours="double_blocks.{}.img_attn.qkv"),
    rename(f"{_DOUBLE}.attn.norm_q.weight", "double_blocks.{}.img_attn.norm.query_norm.scale"),
    rename(f"{_DOUBLE}.attn.norm_k.weight", "double_blocks.{}.img_attn.norm.key_norm.scale"),
    rename(f"{_DOUBLE}.attn.to_out.0", "double_blocks.{}.img_attn.proj"),
    rename(f"{_DOUBLE}.ff.net.0.proj", "double_blocks.{}.img_mlp.0"),
    rename(f"{_DOUBLE}.ff.net.2", "double_blocks.{}.img_mlp.2"),
    fuse(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv"), ours="double_blocks.{}.txt_attn.qkv"),
    rename(f"{_DOUBLE}.attn.norm_added_q.weight", "double_blocks.{}.txt_attn.norm.query_norm.scale"),
    rename(f"{_DOUBLE}.attn.norm_added_k.weight", "double_blocks.{}.txt_attn.norm.key_norm.scale"),
    rename(f"{_DOUBLE}.attn.to_add_out", "double_blocks.{}.txt_attn.proj"),
    rename(f"{_DOUBLE}.ff_context.net.0.proj", "double_blocks.{}.txt_mlp.0"),
    rename(f"{_DOUBLE}.ff_context.net.2", "double_blocks.{}.txt_mlp.2"),
    rename(f"{_SINGLE}.norm.linear", "single_blocks.{}.modulation.lin"),
    fuse(
        *(f"{_SINGLE}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        ours="single_blocks.{}.linear1",
        heights=(1, 1, 1, 4),
    ),
    rename(f"{_SINGLE}.proj_out", "single_blocks.{}.linear2"),
    rename(f"{_SINGLE}.attn.norm_q.weight", "single_blocks.{}.norm.query_norm.scale"),
    rename(f"{_SINGLE}.attn.norm_k.weight", "single_blocks.{}.norm.key_norm.scale"),
    rename("norm_out.linear", "final_layer.adaLN_modulation.1", swap=True),  # scale, shift there; shift, scale here
    rename("proj_out", "final_layer.linear"),
)

XLABS: tuple[Rule, ...] = (
    *(
        rename(f"double_blocks.{{}}.processor.{theirs}", f"double_blocks.{{}}.{ours}")
        for theirs, ours in (
            ("qkv_lora1", "img_attn.qkv"),
            ("qkv_lora2", "txt_attn.qkv"),
            ("proj_lora1", "img_attn.proj"),
            ("proj_lora2", "txt_attn.proj"),
        )
    ),
    # Theirs changes the queries, keys and values alone; the name of the rest of the layer occurs in no file.
    fuse("single_blocks.{}.processor.qkv", "single_blocks.{}.processor.mlp", ours="single_blocks.{}.linear1",
         heights=(3, 4)),
    rename("single_blocks.{}.processor.proj", "single_blocks.{}.linear2"),
)  # fmt: skip
"""Names in adapters by XLabs, of which 1 is the picture's side and 2 the text's."""

_NUNCHAKU = (
    ("norm1.linear", "img_mod.lin"),
    ("norm1_context.linear", "txt_mod.lin"),
    *(
        pair
        for ours, theirs, context in (("img", "", ""), ("txt", "_context", "added_"))
        for pair in (
            (f"qkv_proj{theirs}", f"{ours}_attn.qkv"),
            (f"norm_{context}q.weight", f"{ours}_attn.norm.query_norm.scale"),
            (f"norm_{context}k.weight", f"{ours}_attn.norm.key_norm.scale"),
            (f"out_proj{theirs}", f"{ours}_attn.proj"),
            (f"mlp{theirs}_fc1", f"{ours}_mlp.0"),
            (f"mlp{theirs}_fc2", f"{ours}_mlp.2"),
        )
    ),
)

NUNCHAKU: tuple[Rule, ...] = (
    *(rename(f"{_DOUBLE}.{theirs}", f"double_blocks.{{}}.{ours}") for theirs, ours in _NUNCHAKU),
    fuse(f"{_SINGLE}.qkv_proj", f"{_SINGLE}.mlp_fc1", ours="single_blocks.{}.linear1", heights=(3, 4)),
    fuse_columns(f"{_SINGLE}.out_proj", f"{_SINGLE}.mlp_fc2", ours="single_blocks.{}.linear2", widths=(1, 4)),
    rename(f"{_SINGLE}.norm_q.weight", "single_blocks.{}.norm.query_norm.scale"),
    rename(f"{_SINGLE}.norm_k.weight", "single_blocks.{}.norm.key_norm.scale"),
    *DIFFUSERS,
)
"""Names of the layers that nunchaku quantises; the others have diffusers' names."""
