"""Key tables of the FLUX.3 transformer's published layouts. Our names are those of the single files."""

from __future__ import annotations

from inkstream.weights.keymap import Rule, drop, rename

SINGLE_FILE: tuple[Rule, ...] = (drop("repa_projectors"),)
"""repa_projectors were needed only to train the model."""

_BLOCKS = {
    "mode_blocks.{}.{}": "content_mode_blocks.{}.{}",
    "txt_mode_blocks.{}": "txt_mode_blocks.{}",
    "single_transformer_blocks.{}": "single_blocks.{}",
}
_LAYERS = {
    "attn.to_q": "q_proj",
    "attn.to_k": "k_proj",
    "attn.to_v": "v_proj",
    "attn.to_out.0": "attn_out",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "ff.linear_in": "mlp_in",
    "ff.linear_out": "mlp_out",
}
_TIMES = {"timestep_embedder": "time_in", "target_timestep_embedder": "ref_time_in"}

DIFFUSERS: tuple[Rule, ...] = (
    rename("x_embedders", "emb_in"),
    rename("context_embedder", "txt_in"),
    *(
        rename(f"{theirs}.linear_{i}", f"{ours}.{layer}")
        for theirs, ours in _TIMES.items()
        for i, layer in ((1, "in_layer"), (2, "out_layer"))
    ),
    *(
        rename(f"{stage}_stream_modulations.{{}}.linear", f"{stage}_stream_modulations.{{}}.lin")
        for stage in ("early", "single")
    ),
    *(
        rename(f"{theirs}.{layer}", f"{ours}.{own}")
        for theirs, ours in _BLOCKS.items()
        for layer, own in _LAYERS.items()
    ),
    rename("norm_out.linear", "final_layer.image.adaLN_modulation.1", swap=True),  # scale, shift there; shift, scale
    rename("proj_out", "final_layer.image.linear"),
)
