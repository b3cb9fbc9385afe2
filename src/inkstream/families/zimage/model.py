"""The S3-DiT: one stream of image and caption tokens (arXiv 2511.22699, section 3).

A batch is packed: tokens of several samples lie end to end, each sample attends to itself alone, so prompts and
pictures of any length and size share a batch without padding. What no step changes (refined caption, references,
rotary tables, the norms' weights at each time) is prepared once, in `Prepared`.

Module names are those of the single-file release, with q, k and v fused. Times and signs here are the release's own:
t = 0 is noise and 1 the image, the output is image - noise; `family.py` turns them into ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families.zimage.specs import ZImageConfig
from inkstream.nn.attention import attend
from inkstream.nn.layers import SwiGLU, TimestepEmbedder, add_norm, rms_norm_into, run_of_each, scale_runs
from inkstream.nn.quant import Rounded
from inkstream.nn.rope import Rope, norm_rope, rope
from inkstream.nn.stack import Blocks, run_blocks

PAD_MULTIPLE = 32
"""Captions and pictures are each filled up to a multiple of this with a learned token, which is attended."""
CLEAN = 1.0
"""The time of reference tokens: they carry no noise."""


@dataclass(frozen=True)
class Scales:
    """What a time does to the network.

    norms: (M, 4, D), the weights of the four norms of each of M modulated blocks; final: (D,), the last layer's scale.
    """

    norms: Tensor
    final: Tensor


@dataclass(frozen=True)
class Prepared:
    """What no step changes of one sample. Token order: target picture, references, context."""

    context: Tensor  # (P, D) refined caption tokens, and SigLIP's if any
    references: Tensor  # (R, D) embedded reference pictures with their pads
    rope: Rope  # of all tokens
    grid: tuple[int, int]  # rows and columns of the target's patches
    clean: Tensor | None = None  # (target + references + context) booleans: which tokens are modulated as clean ones
    scales: Mapping[float, Scales] = field(default_factory=dict)  # by the model's time, for the times foreseen

    @property
    def target_tokens(self) -> int:
        """Tokens of the target picture, pads included."""
        return padded(self.grid[0] * self.grid[1])


class Keep(NamedTuple):
    """Of each sample the first counts[i] tokens, from starts[i]; rows: of their norms' weights, as in `Block`."""

    starts: Sequence[int]
    counts: Sequence[int]
    rows: Tensor | None


class ZImageTransformer(nn.Module):
    """Predicts image - noise at a point of the path. Build it on meta; weights are assigned."""

    def __init__(self, config: ZImageConfig):
        super().__init__()
        self.config = c = config
        patch = c.patch_size**2 * c.in_channels
        self.x_embedder = nn.Linear(patch, c.dim)
        self.noise_refiner = Blocks(Block(c) for _ in range(c.n_refiner_layers))
        self.context_refiner = Blocks(Block(c, modulated=False) for _ in range(c.n_refiner_layers))
        self.t_embedder = TimestepEmbedder(min(c.dim, 256))
        self.cap_embedder = nn.Sequential(nn.RMSNorm(c.cap_feat_dim, c.norm_eps), nn.Linear(c.cap_feat_dim, c.dim))
        if c.siglip_feat_dim is not None:
            norm = nn.RMSNorm(c.siglip_feat_dim, c.norm_eps)
            self.siglip_embedder = nn.Sequential(norm, nn.Linear(c.siglip_feat_dim, c.dim))
            self.siglip_refiner = Blocks(Block(c, modulated=False) for _ in range(c.n_refiner_layers))
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.x_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.layers = Blocks(Block(c) for _ in range(c.n_layers))
        self.final_layer = FinalLayer(c.dim, patch)

    # Once per prompt, size and schedule -----------------------------------------------------------------------------

    def prepare(self, caption: Tensor, height: int, width: int) -> Prepared:
        """caption: (L, cap_feat_dim) the text encoder's states; height, width of the latents, even."""
        return self.prepare_all([caption], height, width)[0]

    def prepare_all(self, captions: Sequence[Tensor], height: int, width: int) -> list[Prepared]:
        """As `prepare`, for many captions in one pass.

        Caption token k stands at (1 + k, 0, 0) on the axes (sequence, row, column), the picture's patch (r, c) at
        (1 + padded caption, r, c), the picture's pads at 0.
        """
        grid = (height // self.config.patch_size, width // self.config.patch_size)
        lengths = [padded(len(caption)) for caption in captions]
        caption_rope = {n: self._rope(line(1, n)) for n in set(lengths)}
        picture_rope = {n: self._rope(with_pads(plane(n + 1, *grid))) for n in set(lengths)}
        whole = {n: Rope.cat([picture_rope[n], caption_rope[n]]) for n in set(lengths)}
        table = Rope.cat([caption_rope[n] for n in lengths])
        context = self._refine(self.context_refiner, self._embed_caption(captions), table, lengths)
        return [Prepared(c, c[:0], whole[n], grid) for c, n in zip(context.split(lengths), lengths)]

    def prepare_omni(
        self,
        captions: Sequence[Tensor],
        references: Sequence[Tensor],
        siglip: Sequence[Tensor],
        height: int,
        width: int,
    ) -> Prepared:
        """Several pictures in one stream: caption segment i, then reference i and its SigLIP grid, the target last.

        captions: n + 1 or more segments (L, cap_feat_dim); references: n latents (C, h, w); siglip: n feature grids
        (h, w, siglip_feat_dim) or none. Segments count on along the sequence axis by their own length, a picture
        stands one past its segment, its SigLIP grid two past, stretched over the picture's latent cells.
        """
        p = self.config.patch_size
        grid = (height // p, width // p)
        caption_positions, picture_positions, siglip_positions, at = [], [], [], 1
        for i, segment in enumerate(captions):
            caption_positions.append(line(at, padded(len(segment))))
            at += len(segment)
            if i < len(references):
                h, w = references[i].shape[-2:]
                picture_positions.append(with_pads(plane(at, h // p, w // p)))
                if siglip:
                    rows, columns, _ = siglip[i].shape
                    siglip_positions.append(with_pads(stretched(at + 1, rows, columns, h, w)))
            elif i == len(references):
                picture_positions.insert(0, with_pads(plane(at, *grid)))  # the target leads the packed order
            at += 2
        embedded = self._embed_caption(captions)
        caption_rope = self._rope(torch.cat(caption_positions))
        context = [self._refine(self.context_refiner, embedded, caption_rope, [len(embedded)])]
        context_rope = [caption_rope]
        if siglip:
            # The release flattens the grid with channels first; its weights were trained on that order of numbers.
            flat = [s.permute(2, 0, 1).reshape(-1, s.shape[-1]) for s in siglip]
            features = torch.cat([fill(self.siglip_embedder(f), self.siglip_pad_token) for f in flat])
            # The target has no SigLIP features: a stretch of pads stands in its place, at position 0.
            features = torch.cat([features, self.siglip_pad_token.expand(PAD_MULTIPLE, -1)])
            siglip_rope = self._rope(torch.cat([*siglip_positions, torch.zeros(PAD_MULTIPLE, 3, dtype=torch.long)]))
            context.append(self._refine(self.siglip_refiner, features, siglip_rope, [len(features)]))
            context_rope.append(siglip_rope)
        clean = [torch.zeros(padded(grid[0] * grid[1]), dtype=torch.bool)]
        clean += [torch.ones(padded(r.shape[-2] * r.shape[-1] // p**2), dtype=torch.bool) for r in references]
        clean += [torch.full((padded(len(s)),), i < len(references)) for i, s in enumerate(captions)]
        clean += [torch.ones(padded(s.shape[0] * s.shape[1]), dtype=torch.bool) for s in siglip]
        clean += [torch.zeros(PAD_MULTIPLE if siglip else 0, dtype=torch.bool)]
        pictures = [fill(self.x_embedder(patchify(r, p)), self.x_pad_token) for r in references]
        return Prepared(
            context=torch.cat(context),
            references=torch.cat([embedded[:0], *pictures]),
            rope=Rope.cat([self._rope(torch.cat(picture_positions)), *context_rope]),
            grid=grid,
            clean=torch.cat(clean).to(embedded.device),
        )

    def scales(self, times: Sequence[float]) -> dict[float, Scales]:
        """The modulation of every block at each time, all in one pass. times: the model's own, 0 noise to 1 image."""
        return {t: Scales(*both) for t, *both in zip(times, *self._scales(times))}

    def _scales(self, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Norm weights (T, M, 4, D) and final scales (T, D)."""
        device = self.x_pad_token.device
        t = torch.tensor([t * self.config.t_scale for t in times], dtype=torch.float32, device=device)
        c = self.t_embedder(t)
        blocks = cast(list[Block], [*self.noise_refiner, *self.layers])
        norms = torch.stack([block.norm_weights(c) for block in blocks], dim=1)
        return norms, self.final_layer.scale(c)

    # Every step -----------------------------------------------------------------------------------------------------

    def forward(self, xs: Sequence[Tensor], times: Sequence[float], prepared: Sequence[Prepared]) -> list[Tensor]:
        """Noisy latents, each (C, h, w) of its own size, at each one's time -> image - noise, shaped alike."""
        p = self.config.patch_size
        norms, finals = self._modulation(times, prepared)
        counts = [s.target_tokens + len(s.references) for s in prepared]  # of picture tokens
        lengths = [n + len(s.context) for n, s in zip(counts, prepared)]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]

        firsts = alike(xs, times, prepared)
        chosen = list(dict.fromkeys(firsts))
        patches = [patchify(xs[i], p).to(self.x_embedder.weight.dtype) for i in chosen]
        embedded = self.x_embedder(torch.cat(patches)).split([len(t) for t in patches])
        own = norms if len(norms) == 1 or len(chosen) == len(xs) else norms[chosen]
        refined = self._refine_noise(embedded, [prepared[i] for i in chosen], own)
        pictures = [refined[chosen.index(i)] for i in firsts]
        x = torch.cat([t for picture, s in zip(pictures, prepared) for t in (picture, s.context)])
        table = Rope.cat([s.rope for s in prepared])
        targets = [s.target_tokens for s in prepared]
        rows, target_rows = (rows_of(prepared, n, len(norms)) for n in (lengths, targets))
        keep = Keep(starts, targets, target_rows)
        first, last = len(self.noise_refiner), len(self.layers) - 1

        def call(i: int, block: nn.Module, x: Tensor) -> Tensor:
            # Of the last block only the target's rows are read, so only they are computed.
            return block(x, norms[:, first + i], rows, table, lengths, keep if i == last else None)

        x = run_blocks(self.layers, x, call)
        x = self.final_layer(x, finals if target_rows is None else finals[target_rows])
        return [
            unpatchify(out[: s.grid[0] * s.grid[1]], *s.grid, p).float() for out, s in zip(x.split(targets), prepared)
        ]

    def _refine_noise(
        self, embedded: Sequence[Tensor], prepared: Sequence[Prepared], norms: Tensor
    ) -> tuple[Tensor, ...]:
        """Picture tokens through the blocks that see no caption. embedded: of each sample's patches, (N, D)."""
        counts = [s.target_tokens + len(s.references) for s in prepared]
        x = torch.cat([t for e, s in zip(embedded, prepared) for t in (fill(e, self.x_pad_token), s.references)])
        table = Rope.cat([s.rope[:n] for s, n in zip(prepared, counts)])
        rows = rows_of(prepared, counts, len(norms))
        x = run_blocks(self.noise_refiner, x, lambda i, block, x: block(x, norms[:, i], rows, table, counts))
        return x.split(counts)

    def _modulation(self, times: Sequence[float], prepared: Sequence[Prepared]) -> tuple[Tensor, Tensor]:
        """Norm weights (R, M, 4, D) and final scales (R, D): a row for each sample and behind them CLEAN's if there are
        clean tokens; a single row where one time serves all."""
        times = [*times, CLEAN] if any(s.clean is not None for s in prepared) else times
        times = times[:1] if len(set(times)) == 1 else times
        known = {t: s.scales[t] for s in prepared for t in times if t in s.scales}
        missing = [t for t in dict.fromkeys(times) if t not in known]
        if len(missing) == len(times):  # as in training, where the gradient of rows picked one by one would be slow
            return self._scales(times)
        known.update(self.scales(missing) if missing else {})
        return torch.stack([known[t].norms for t in times]), torch.stack([known[t].final for t in times])

    def _embed_caption(self, segments: Sequence[Tensor]) -> Tensor:
        dtype = self.cap_pad_token.dtype
        return torch.cat([fill(self.cap_embedder(s.to(dtype)), self.cap_pad_token) for s in segments])

    def _refine(self, blocks: Blocks, x: Tensor, table: Rope, lengths: Sequence[int]) -> Tensor:
        return run_blocks(
            blocks, x, lambda i, block, x: block(x, cast(Block, block).norm_weights(None), None, table, lengths)
        )

    def _rope(self, positions: Tensor) -> Rope:
        return rope(positions, self.config.axes_dims, self.config.rope_theta, self.x_pad_token.device)


class Block(nn.Module):
    """Sandwich-normed attention and SwiGLU. The timestep scales what enters each and tanh-gates what leaves it;
    both are factors of a norm's output, so they are folded into that norm's weight, once per time."""

    apart = ("adaLN_modulation",)  # called ahead of the steps
    # What may be compiled or shared out: functions of tensors, and which of these have a row for each token.
    regions: ClassVar = {"enter": (0, 2, 3), "leave": (0, 1, 3)}
    shares: ClassVar = {  # of several devices, as `nn.parallel.Shares`
        "attention.qkv": ("out", "heads", "heads", "heads"),
        "attention.out": ("in", "heads"),
        "feed_forward.w1": ("out", "hidden"),
        "feed_forward.w3": ("out", "hidden"),
        "feed_forward.w2": ("in", "hidden"),
    }

    def __init__(self, config: ZImageConfig, modulated: bool = True):
        super().__init__()
        dim = config.dim
        self.eps = config.norm_eps
        self.attention = Attention(dim, config.n_heads, config.norm_eps)
        self.feed_forward = SwiGLU(dim, int(dim / 3 * 8))
        self.attention_norm1 = nn.RMSNorm(dim)
        self.attention_norm2 = nn.RMSNorm(dim)
        self.ffn_norm1 = nn.RMSNorm(dim)
        self.ffn_norm2 = nn.RMSNorm(dim)
        self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, 256), 4 * dim)) if modulated else None

    def norm_weights(self, c: Tensor | None) -> Tensor:
        """Weights of the norms before and after attention, before and after the feed-forward, at each time.

        c: (T, 256) the embedded times -> (T, 4, D); None for a block without modulation -> (1, 4, D).
        """
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        own = torch.stack([norm.weight for norm in norms])
        if self.adaLN_modulation is None or c is None:
            return own.unsqueeze(0)
        scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(c).chunk(4, dim=-1)
        return own * torch.stack((1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()), dim=1)

    def forward(
        self,
        x: Tensor,  # (N, D) packed
        weights: Tensor,  # (R, 4, D) of the norms
        rows: Tensor | None,  # (N,) each token's row of weights; None: the tokens are R equal runs, a row each
        table: Rope,
        lengths: Sequence[int],
        keep: Keep | None = None,  # the tokens to compute
    ) -> Tensor:
        q, k, v = self.enter(x, weights, rows, table)
        counts = lengths
        if keep is not None:
            x, q = (take(s, keep.starts, keep.counts) for s in (x, q))
            rows, counts = keep.rows, keep.counts
        return self.leave(x, attend(q, k, v, counts, lengths), weights, rows)

    def enter(self, x: Tensor, weights: Tensor, rows: Tensor | None, table: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, E)."""
        normed = rms_norm_into([self.attention.qkv], x, weights[:, 0], self.eps, rows)
        return self.attention.project(normed, table)

    def leave(self, x: Tensor, seen: Tensor, weights: Tensor, rows: Tensor | None) -> Tensor:
        """What comes out, of what came in and what attention saw. x: (N, D), seen: (N, H, E)."""
        x = add_norm(x, self.attention.out(seen.flatten(1)), weights[:, 1], self.eps, rows)
        normed = rms_norm_into([self.feed_forward.w1, self.feed_forward.w3], x, weights[:, 2], self.eps, rows)
        return add_norm(x, self.feed_forward(normed), weights[:, 3], self.eps, rows)


class Attention(nn.Module):
    """Full attention with RMS-normed queries and keys and rotary positions."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.eps = eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(dim // heads)
        self.k_norm = nn.RMSNorm(dim // heads)

    def project(self, x: Tensor | Rounded, table: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, E). x: (N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q = norm_rope(q, self.q_norm.weight, table, self.eps)
        return q, norm_rope(k, self.k_norm.weight, table, self.eps), v


class FinalLayer(nn.Module):
    """Norm, the timestep's scale, projection to patches."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.linear = nn.Linear(dim, patch)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, 256), dim))

    def scale(self, c: Tensor) -> Tensor:
        """c: (T, 256) -> (T, D)."""
        return 1 + self.adaLN_modulation(c)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # x: (N, D), scale: (R, D)
        return self.linear(scale_runs(F.layer_norm(x, x.shape[-1:], eps=1e-6), scale))


def padded(length: int) -> int:
    """The length filled up to the multiple the model was trained with."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def fill(x: Tensor, pad: Tensor) -> Tensor:
    """Append the learned pad token up to the multiple. x: (L, D), pad: (1, D)."""
    missing = padded(len(x)) - len(x)
    return torch.cat([x, pad.expand(missing, -1)]) if missing else x


def alike(xs: Sequence[Tensor], times: Sequence[float], prepared: Sequence[Prepared]) -> list[int]:
    """For each sample the first whose picture tokens are the same until captions join them, as guidance asks twice.

    Where they stand differs with the caption's length, which attention among themselves does not show: all are moved
    alike. Pads are not, they stand at the origin.
    """
    if any(s.clean is not None or s.target_tokens > s.grid[0] * s.grid[1] for s in prepared):
        return [*range(len(xs))]
    keys = [(id(x), t) for x, t in zip(xs, times)]
    return [keys.index(key) for key in keys]


def rows_of(prepared: Sequence[Prepared], counts: Sequence[int], rows: int) -> Tensor | None:
    """Which of the modulation's rows is each token's, of the first counts[i] tokens of every sample; None where the
    tokens are `rows` equal runs, one a row."""
    clean = any(s.clean is not None for s in prepared)
    if rows == 1 or (len(set(counts)) == 1 and not clean):
        return None
    owner = run_of_each(counts, prepared[0].context.device)
    if not clean:
        return owner
    masks = [owner.new_zeros(n, dtype=torch.bool) if s.clean is None else s.clean[:n] for s, n in zip(prepared, counts)]
    return owner.masked_fill(torch.cat(masks), rows - 1)


def take(x: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The first counts[i] rows from starts[i], end to end; starts[0] is 0."""
    ends = [*starts[1:], len(x)]
    sizes = [n for start, count, end in zip(starts, counts, ends) for n in (count, end - start - count)]
    pieces = x.split(sizes)[::2]  # one split, not slices: the gradient of each slice would be as large as x
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def patchify(x: Tensor, p: int) -> Tensor:
    """(C, h, w) -> (h/p * w/p, p*p*C): patches row by row, inside one row, column, channel fastest."""
    c, h, w = x.shape
    return x.reshape(c, h // p, p, w // p, p).permute(1, 3, 2, 4, 0).reshape(-1, p * p * c)


def unpatchify(x: Tensor, rows: int, columns: int, p: int) -> Tensor:
    """The inverse of patchify. (rows * columns, p*p*C) -> (C, rows * p, columns * p)."""
    return x.reshape(rows, columns, p, p, -1).permute(4, 0, 2, 1, 3).reshape(-1, rows * p, columns * p)


def line(start: int, count: int) -> Tensor:
    """Positions (start + k, 0, 0). -> (count, 3)"""
    positions = torch.zeros(count, 3, dtype=torch.long)
    positions[:, 0] = torch.arange(start, start + count)
    return positions


def plane(at: int, rows: int, columns: int) -> Tensor:
    """Positions (at, r, c), row by row. -> (rows * columns, 3)"""
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((torch.full_like(r, at), r, c), dim=-1).reshape(-1, 3)


def stretched(at: int, rows: int, columns: int, height: int, width: int) -> Tensor:
    """Positions of a rows x columns grid spread over a height x width one, truncated to whole cells."""
    positions = plane(at, rows, columns).float()
    positions[:, 1] = positions[:, 1] / max(rows - 1, 1) * (height - 1)
    positions[:, 2] = positions[:, 2] / max(columns - 1, 1) * (width - 1)
    return positions.long()


def with_pads(positions: Tensor) -> Tensor:
    """Pads of a picture stand at the origin."""
    return torch.cat([positions, positions.new_zeros(padded(len(positions)) - len(positions), 3)])
