"""Key tables of the Z-Image transformer's published layouts. Our names are those of the native single file."""

from __future__ import annotations

from inkstream.weights.keymap import Rule, drop, fuse, rename, split

_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}", "siglip_refiner.{}")

PACKS = tuple(f"{block}.{part}" for block in _BLOCKS for part in ("attention", "feed_forward"))
"""Layers to quantise: the 170 that published files quantise. Embedders, modulation and the last layer are not."""

NATIVE: tuple[Rule, ...] = (
    rename("x_pad_token", "x_pad_token", row=True),  # some files hold the pad tokens as (D,)
    rename("cap_pad_token", "cap_pad_token", row=True),
    drop("norm_final"),  # unused; left over from training in early files
)

DIFFUSERS: tuple[Rule, ...] = (
    rename("all_x_embedder.2-1", "x_embedder"),
    rename("all_final_layer.2-1", "final_layer"),
    *(
        rule
        for b in _BLOCKS
        for rule in (
            fuse(f"{b}.attention.to_q", f"{b}.attention.to_k", f"{b}.attention.to_v", ours=f"{b}.attention.qkv"),
            rename(f"{b}.attention.to_out.0", f"{b}.attention.out"),
            rename(f"{b}.attention.norm_q", f"{b}.attention.q_norm"),
            rename(f"{b}.attention.norm_k", f"{b}.attention.k_norm"),
        )
    ),
)

NUNCHAKU: tuple[Rule, ...] = (
    *(
        rule
        for b in _BLOCKS
        for rule in (
            rename(f"{b}.attention.to_qkv", f"{b}.attention.qkv"),
            split(f"{b}.feed_forward.net.0.proj", (f"{b}.feed_forward.w3", f"{b}.feed_forward.w1")),
            rename(f"{b}.feed_forward.net.2", f"{b}.feed_forward.w2"),
        )
    ),
    *DIFFUSERS,
)
"""Names of the blocks in nunchaku's files. Some files have diffusers' names in the refiners."""
