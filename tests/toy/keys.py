"""Where the transformer's weights are in each published layout. Ours are the native single file's names."""

from __future__ import annotations

from inkstream.weights.keymap import Rule, drop, fuse, rename

PACKS = ("layers.{}.attention", "layers.{}.feed_forward")
"""Layers that may be packed in fewer bits."""

NATIVE: tuple[Rule, ...] = (drop("ema_step"),)  # left over from training; nothing reads it

DIFFUSERS: tuple[Rule, ...] = (
    rename("patch_embed", "x_embedder"),
    rename("proj_out", "final_layer"),
    fuse(*(f"layers.{{}}.attention.to_{one}" for one in "qkv"), ours="layers.{}.attention.qkv"),
    rename("layers.{}.attention.to_out.0", "layers.{}.attention.out"),
)
