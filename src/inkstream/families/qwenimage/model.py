"""The Qwen-Image 2.1 transformer: one stream of text, then the picture, no biases, one modulation for all blocks.

Times and signs are ours: t = 1 is noise, the output is noise - image. A token is one latent cell, of 16 x 16 pixels.
Text attends to the text before it, and the picture to everything. Text is modulated for time 0. So the keys and values
of the text are computed once, before the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families.qwenimage.specs import QwenImageConfig
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.attention import attend
from inkstream.nn.flux import (
    EPS,
    FREQUENCIES,
    Embedder,
    KeysValues,
    add_gated,
    modulate,
    patchify,
    plane,
    unpatchify,
    weave,
)
from inkstream.nn.forward import Forward, Rows, Sample, Span, run_blocks
from inkstream.nn.layers import rms_norm, run_of_each, silu_times
from inkstream.nn.linear import Chain, linear
from inkstream.nn.rope import Rope, norm_rope, rope
from inkstream.nn.stack import Blocks, visits

CLEAN = 0.0
"""The time of text: it has no noise."""


@dataclass(frozen=True)
class Modulation:
    """The modulation in R rows: one for each sample, or one for all samples.

    blocks: (R, 6, D), of each block: shift 0, scale and gate of attention, then of the MLP. final: (R, 2, D): shift 0,
    scale.
    """

    blocks: Tensor
    final: Tensor

    @staticmethod
    def cat(rows: Sequence[Modulation]) -> Modulation:
        return Modulation(torch.cat([m.blocks for m in rows]), torch.cat([m.final for m in rows]))


@dataclass(frozen=True)
class Prepared:
    """The parts of one sample that are constant over its steps."""

    memory: Sequence[KeysValues]  # the KV cache of the text in each block
    rope: Rope  # rotary table of the picture's tokens
    grid: tuple[int, int]  # rows and columns of the picture's tokens
    modulation: Mapping[float, Modulation] = field(default_factory=dict)  # one row for each foreseen time

    def at(self, t: float) -> Prepared | None:
        """This sample for time t alone, or None if t was not foreseen."""
        return replace(self, modulation={t: self.modulation[t]}) if t in self.modulation else None


class Layout(NamedTuple):
    """How the tokens of some samples lie."""

    modulation: Tensor  # (R, 6, D)
    which: Tensor | None  # (N,) the modulation's row of each token; None: one for all, or equal runs
    table: Rope
    memories: Sequence[Sequence[KeysValues]]


class QwenImageTransformer(nn.Module):
    """Predicts noise - image at a point of the path. Build it on meta, then assign the weights."""

    attention_by = "auto"

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.config = c = config
        self.img_in = nn.Linear(c.in_channels, c.dim, bias=False)
        self.txt_in = TextEmbedder(c.context_in_dim, c.dim)
        self.time_in = Embedder(FREQUENCIES, c.dim, bias=False)
        self.modulation = Chain(nn.SiLU(), nn.Linear(c.dim, 4 * c.dim, bias=False))
        self.transformer_blocks = Blocks(Block(c.dim, c.num_attention_heads, c.mlp_ratio) for _ in range(c.num_layers))
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(c.dim, c.dim, bias=False)})
        self.proj_out = nn.Linear(c.dim, c.out_channels or c.in_channels, bias=False)

    # Once per prompt, size and schedule -----------------------------------------------------------------------------

    def prepare(
        self, texts: Sequence[Tensor], height: int, width: int, times: Sequence[float] = (), around: Around = NOTHING
    ) -> list[Prepared]:
        """Computes what is constant over the steps of a picture, for each of several prompts.

        texts: the text encoder's states, each (L, context_in_dim). height, width: of the latents.
        """
        forward, lengths = Forward.ahead(around, self.attention_by), [len(text) for text in texts]
        tokens = torch.cat(list(texts)).to(self.img_in.weight.dtype)
        rows = Rows.alone(len(tokens))
        x = self.txt_in(tokens, forward, rows)
        still = self.modulate([CLEAN], forward, Rows.alone(1)).blocks
        table = Rope.cat([self._rope(text_positions(n)) for n in lengths])
        read: list[KeysValues] = []
        for i, block in visits(self.transformer_blocks):
            own = cast(Block, block)
            q, k, v = own.enter(x, still, None, table, forward, rows)
            read.append((k, v.contiguous()))
            if i + 1 < len(self.transformer_blocks):  # nobody reads the text behind the last block
                seen = attend(q, k, v, lengths, lengths, causal=True, by=forward.attention_by).flatten(1)
                x = own.leave(x, seen, still, None, forward, rows)
        memories = zip(*(zip(k.split(lengths), v.split(lengths)) for k, v in read))
        foreseen = self._foresee(list(dict.fromkeys(times)), forward)
        return [
            Prepared(list(memory), self._rope(picture_positions(n, height, width)), (height, width), foreseen)
            for n, memory in zip(lengths, memories)
        ]

    def modulate(self, times: Sequence[float], forward: Forward, rows: Rows) -> Modulation:
        """The modulation at T times, in T rows. rows: the sample of each."""
        vec = self.time_in.numbers(times, forward, rows)
        scale1, gate1, scale2, gate2 = self.modulation(vec, forward, rows).chunk(4, dim=-1)
        final, zero = linear(self.norm_out["linear"], F.silu(vec), forward, rows), torch.zeros_like(vec)
        blocks = torch.stack((zero, scale1, gate1.tanh(), zero, scale2, gate2.tanh()), dim=1)
        return Modulation(blocks, torch.stack((zero, final), dim=1))

    def _foresee(self, times: Sequence[float], forward: Forward) -> dict[float, Modulation]:
        """The modulation of each time, computed in one pass."""
        if not times:
            return {}
        found = self.modulate(times, forward, Rows.alone(len(times)))
        return {t: Modulation(found.blocks[i, None], found.final[i, None]) for i, t in enumerate(times)}

    def _rope(self, positions: Tensor) -> Rope:
        return rope(positions, self.config.axes_dims_rope, 10_000.0, self.img_in.weight.device)

    # Every step -----------------------------------------------------------------------------------------------------

    def forward(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Noisy latents, each (C, h, w) of its own size, at each one's time -> noise - image, shaped alike, float32."""
        forward = Forward.over(samples, self.attention_by)
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        modulation = self._modulation(samples, forward)
        patches = [patchify(sample.x, 1) for sample in samples]
        rows = Rows(tuple(Span(i, len(x), True) for i, x in enumerate(patches)))
        x = linear(self.img_in, torch.cat(patches).to(self.img_in.weight.dtype), forward, rows)

        @cache
        def layout(samples: tuple[int, ...]) -> Layout:
            own = [prepared[i] for i in samples]
            chosen = modulation.blocks if len(modulation.blocks) == 1 else modulation.blocks[list(samples)]
            counts = [s.grid[0] * s.grid[1] for s in own]
            which = None if len(chosen) == 1 or len(set(counts)) == 1 else run_of_each(counts, x.device)
            return Layout(chosen, which, Rope.cat([s.rope for s in own]), [s.memory for s in own])

        def call(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
            own = layout(rows.samples)
            return block(x, own, [memory[i] for memory in own.memories], forward, rows)

        x = run_blocks("transformer_blocks", self.transformer_blocks, x, call, forward, rows)
        which = None if len(modulation.final) == 1 else run_of_each(rows.lengths, x.device)
        normed = modulate(x, modulation.final, which, forward.unadapted(self.proj_out))
        out = linear(self.proj_out, normed, forward, rows).split(rows.lengths)
        return [unpatchify(o, *s.grid, 1).float() for o, s in zip(out, prepared)]

    def _modulation(self, samples: Sequence[Sample], forward: Forward) -> Modulation:
        """One modulation row for each sample, or a single shared row: as foreseen, else computed."""
        known = [s.prepared.modulation[s.t] for s in samples if s.t in s.prepared.modulation]
        if len(known) < len(samples):
            rows = Rows(tuple(Span(i, 1) for i in range(len(samples))))
            return self.modulate([s.t for s in samples], forward, rows)
        return known[0] if all(one is known[0] for one in known) else Modulation.cat(known)


class TextEmbedder(nn.Module):
    """RMS norm, whose weight is stored as its distance to 1, then two layers around a GELU."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.text_norm = nn.RMSNorm(width)
        self.in_layer = nn.Linear(width, dim, bias=False)
        self.out_layer = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, forward: Forward, rows: Rows) -> Tensor:  # (N, W) -> (N, D)
        normed = rms_norm(x, self.text_norm.weight + 1, EPS)
        hidden = F.gelu(linear(self.in_layer, normed, forward, rows), approximate="tanh")
        return linear(self.out_layer, hidden, forward, rows)


class Block(nn.Module):
    """Attention, then a SwiGLU, each behind a norm that the time scales, and gated by it."""

    # Functions of tensors, to compile or to share out; the numbers are the arguments with a row for each token.
    regions: ClassVar = {"enter": (0, 2, 3, 5), "leave": (0, 1, 3, 5)}
    shares: ClassVar = {  # for tensor parallelism, as `nn.parallel.Shares`
        "attn.to_q": ("out", "heads"),
        "attn.to_k": ("out", "heads"),
        "attn.to_v": ("out", "heads"),
        "attn.to_out.0": ("in", "heads"),
        "img_mlp.proj": ("out", "hidden"),
        "img_mlp.gate_layer": ("out", "hidden"),
        "img_mlp.out": ("in", "hidden"),
    }

    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.img_mlp = nn.ModuleDict(
            {
                "proj": nn.Linear(dim, ratio * dim, bias=False),
                "out": nn.Linear(ratio * dim, dim, bias=False),
                "gate_layer": nn.Linear(dim, ratio * dim, bias=False),
            }
        )

    def forward(self, x: Tensor, layout: Layout, memory: Sequence[KeysValues], forward: Forward, rows: Rows) -> Tensor:
        """x: (N, D), of pictures alone -> alike. memory: of the text of each sample."""
        q, k, v = self.enter(x, layout.modulation, layout.which, layout.table, forward, rows)
        lengths = rows.lengths
        keys, values = zip(*memory)
        k, v = weave(keys, k.split(lengths)), weave(values, v.split(lengths))
        visible = [n + len(past) for n, past in zip(lengths, keys)]
        seen = attend(q, k, v, lengths, visible, by=forward.attention_by).flatten(1)
        return self.leave(x, seen, layout.modulation, layout.which, forward, rows)

    def enter(
        self, x: Tensor, modulation: Tensor, which: Tensor | None, table: Rope, forward: Forward, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, E)."""
        layers = (self.attn.to_q, self.attn.to_k, self.attn.to_v)
        normed = modulate(x, modulation[:, :3], which, forward.unadapted(*layers))
        q, k, v = (linear(layer, normed, forward, rows).unflatten(-1, (self.attn.heads, -1)) for layer in layers)
        q = norm_rope(q, self.attn.norm_q.weight, table, EPS)
        return q, norm_rope(k, self.attn.norm_k.weight, table, EPS), v

    def leave(
        self, x: Tensor, seen: Tensor, modulation: Tensor, which: Tensor | None, forward: Forward, rows: Rows
    ) -> Tensor:
        """The block's output, from its input x and the attention's output seen, both (N, D)."""
        x = add_gated(x, linear(self.attn.to_out[0], seen, forward, rows), modulation[:, :3], which)
        proj, gate, out = (self.img_mlp[name] for name in ("proj", "gate_layer", "out"))
        normed = modulate(x, modulation[:, 3:], which, forward.unadapted(proj, gate))
        opened, up = linear(gate, normed, forward, rows), linear(proj, normed, forward, rows)
        mixed = linear(out, silu_times(opened, up, forward.unadapted(out)), forward, rows)
        return add_gated(x, mixed, modulation[:, 3:], which)


class Attention(nn.Module):
    """The layers of a block's attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = nn.RMSNorm(dim // heads)
        self.norm_k = nn.RMSNorm(dim // heads)


def text_positions(length: int) -> Tensor:
    """Text counts along all axes: (l, l, l). -> (length, 3)"""
    return torch.arange(length)[:, None].expand(-1, 3)


def picture_positions(text: int, rows: int, columns: int) -> Tensor:
    """(length of the text, row, column), with rows and columns counted from the picture's middle. -> (N, 3)"""
    return plane(text, rows, columns, axes=3) - torch.tensor([0, rows - rows // 2, columns - columns // 2])
