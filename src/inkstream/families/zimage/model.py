"""The S3-DiT: one stream of image and caption tokens (arXiv 2511.22699, section 3).

Batches are packed: tokens of several samples lie end to end, and each sample attends only to itself. So prompts of any
length and pictures of any size share a batch without padding. What is constant over the steps (refined caption,
references, rotary tables, norm weights at each time) is computed once, in `Prepared`.

Module names are those of the single-file release, with q, k and v fused. Times and signs here are the release's: t = 0
is noise, t = 1 is the image, and the output is image - noise. `family.py` converts them to ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families.zimage.specs import ZImageConfig
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.attention import attend
from inkstream.nn.forward import ANY, PLAIN, Forward, Rows, Sample, Span, run_blocks
from inkstream.nn.layers import SwiGLU, TimestepEmbedder, add_norm, rms_norm_into, run_of_each, scale_runs
from inkstream.nn.linear import Chain, linear
from inkstream.nn.quant import Rounded
from inkstream.nn.rope import Rope, norm_rope, rope
from inkstream.nn.sight import Sight, sight_of, texts_of
from inkstream.nn.stack import Blocks
from inkstream.types import Encoded

PAD_MULTIPLE = 32
"""Captions and pictures are each padded to a multiple of this with a learned token that takes part in attention."""
CLEAN = 1.0
"""The time of reference tokens: they have no noise."""


@dataclass(frozen=True)
class Scales:
    """The modulation at one time.

    norms: (M, 4, D), the weights of the four norms of each of M modulated blocks. final: (D,), the last layer's scale.
    """

    norms: Tensor
    final: Tensor


@dataclass(frozen=True)
class Prepared:
    """The parts of one sample that are constant over its steps. Token order: target picture, references, context."""

    context: Tensor  # (P, D) refined caption tokens, then those of regions, then SigLIP's if any
    references: Tensor  # (R, D) embedded reference pictures with their pads
    rope: Rope  # rotary table of all tokens
    grid: tuple[int, int]  # rows and columns of the target's patches
    clean: Tensor | None = None  # (target + references + context) booleans: tokens modulated at time CLEAN
    scales: Mapping[float, Scales] = field(default_factory=dict)  # by the model's time, for foreseen times
    sight: Sight | None = None  # what each token sees, if not all see all

    def at(self, t: float) -> Prepared | None:
        """This sample for time t alone, or None if t was not foreseen."""
        if t not in self.scales:
            return None
        needed = (t,) if self.clean is None else (t, CLEAN)
        return replace(self, scales={one: self.scales[one] for one in needed})

    @property
    def target_tokens(self) -> int:
        """The number of tokens of the target picture, with pads."""
        return padded(self.grid[0] * self.grid[1])


class Targets(NamedTuple):
    """The tokens of the pictures being drawn."""

    rows: Rows
    which: Tensor | None  # (N,) the norm weights' row of each token, as in `Block`
    sights: Sequence[Sight | None] = ()


class Layout(NamedTuple):
    """The layout of the tokens of some samples, with their rotary table and norm weights."""

    rows: Rows
    table: Rope
    norms: Tensor  # (R, M, 4, D): norm weights at the times of these samples
    which: Tensor | None
    targets: Targets
    sights: Sequence[Sight | None] = ()


class ZImageTransformer(nn.Module):
    """Predicts image - noise at a point of the path. Build it on meta, then assign the weights."""

    attention_by = "auto"

    def __init__(self, config: ZImageConfig):
        super().__init__()
        self.config = c = config
        patch = c.patch_size**2 * c.in_channels
        self.x_embedder = nn.Linear(patch, c.dim)
        self.noise_refiner = Blocks(Block(c) for _ in range(c.n_refiner_layers))
        self.context_refiner = Blocks(Block(c, modulated=False) for _ in range(c.n_refiner_layers))
        self.t_embedder = TimestepEmbedder(min(c.dim, 256))
        self.cap_embedder = Chain(nn.RMSNorm(c.cap_feat_dim, c.norm_eps), nn.Linear(c.cap_feat_dim, c.dim))
        if c.siglip_feat_dim is not None:
            norm = nn.RMSNorm(c.siglip_feat_dim, c.norm_eps)
            self.siglip_embedder = Chain(norm, nn.Linear(c.siglip_feat_dim, c.dim))
            self.siglip_refiner = Blocks(Block(c, modulated=False) for _ in range(c.n_refiner_layers))
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.x_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, c.dim))
        self.layers = Blocks(Block(c) for _ in range(c.n_layers))
        self.final_layer = FinalLayer(c.dim, patch)

    # Once per prompt, size and schedule -----------------------------------------------------------------------------

    def prepare(self, caption: Tensor, height: int, width: int) -> Prepared:
        """Prepares one caption: (L, cap_feat_dim), the text encoder's states. height, width: of the latents, even."""
        return self.prepare_all([caption], height, width)[0]

    def prepare_all(
        self,
        captions: Sequence[Tensor],
        height: int,
        width: int,
        around: Around = NOTHING,
        regions: Sequence[Encoded] = (),
    ) -> list[Prepared]:
        """`prepare` for many captions of one picture, in one pass. regions: of the first caption.

        Positions on the axes (sequence, row, column): caption token k is at (1 + k, 0, 0), the picture's patch (r, c)
        at (1 + caption length, r, c), the picture's pads at 0. The length includes the caption's pads, but not in Omni.
        With regions, all their texts end where the longest does: each lies before the picture as it would alone.
        """
        grid = (height // self.config.patch_size, width // self.config.patch_size)
        texts = texts_of(captions, regions)
        lines: list[list[tuple[int, int]]] = []  # the first position of each text, and its length
        last: list[int] = []  # the position before the picture
        for own in texts:
            lengths = [padded(len(text)) for text in own]
            ends = lengths if self.config.siglip_feat_dim is None else [len(text) for text in own]
            last.append(max(ends))
            lines.append([(max(ends) - end + 1, n) for end, n in zip(ends, lengths)])
        every = [one for own in lines for one in own]
        caption_rope = {one: self._rope(line(*one)) for one in set(every)}
        picture_rope = {n: self._rope(with_pads(plane(n + 1, *grid))) for n in set(last)}
        keys = [(n, *own) for n, own in zip(last, lines)]
        whole = {key: Rope.cat([picture_rope[key[0]], *(caption_rope[one] for one in key[1:])]) for key in set(keys)}
        forward = Forward.ahead(around, self.attention_by)
        embedded = self._embed_caption([text for own in texts for text in own], forward)
        table = Rope.cat([caption_rope[one] for one in every])
        refined = self._refine("context_refiner", embedded, table, [n for _, n in every], forward)
        contexts = refined.split([sum(n for _, n in own) for own in lines])
        samples = [Prepared(context, context[:0], whole[key], grid) for context, key in zip(contexts, keys)]
        first, *others = samples
        targets, count = range(first.target_tokens), first.target_tokens + len(first.context)
        sight = sight_of(regions, [n for _, n in lines[0]], targets.stop, targets, grid, count, count, embedded.device)
        return [replace(first, sight=sight), *others]

    def prepare_omni(
        self,
        captions: Sequence[Tensor],
        references: Sequence[Tensor],
        siglip: Sequence[Tensor],
        height: int,
        width: int,
        around: Around = NOTHING,
    ) -> Prepared:
        """Several pictures in one stream: caption segment i, then reference i and its SigLIP grid; the target is last.

        captions: n + 1 or more segments (L, cap_feat_dim). references: n latents (C, h, w). siglip: n feature grids
        (h, w, siglip_feat_dim) or none. On the sequence axis each segment takes as many places as it has tokens. A
        picture follows one place after its segment, its SigLIP grid two places after, stretched over the picture's
        latent cells.
        """
        p = self.config.patch_size
        forward = Forward.ahead(around, self.attention_by)
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
                picture_positions.insert(0, with_pads(plane(at, *grid)))  # the target comes first in the packed order
            at += 2
        embedded = self._embed_caption(captions, forward)
        caption_rope = self._rope(torch.cat(caption_positions))
        context = [self._refine("context_refiner", embedded, caption_rope, [len(embedded)], forward)]
        context_rope = [caption_rope]
        if siglip:
            # The release flattens the grid with channels first, and its weights were trained on that order.
            flat = [s.permute(2, 0, 1).reshape(-1, s.shape[-1]) for s in siglip]
            embed = self.siglip_embedder
            features = torch.cat([fill(embed(f, forward, Rows.alone(len(f))), self.siglip_pad_token) for f in flat])
            # The target has no SigLIP features. PAD_MULTIPLE pads at position 0 take their place.
            features = torch.cat([features, self.siglip_pad_token.expand(PAD_MULTIPLE, -1)])
            siglip_rope = self._rope(torch.cat([*siglip_positions, torch.zeros(PAD_MULTIPLE, 3, dtype=torch.long)]))
            context.append(self._refine("siglip_refiner", features, siglip_rope, [len(features)], forward))
            context_rope.append(siglip_rope)
        clean = [torch.zeros(padded(grid[0] * grid[1]), dtype=torch.bool)]
        clean += [torch.ones(padded(r.shape[-2] * r.shape[-1] // p**2), dtype=torch.bool) for r in references]
        clean += [torch.full((padded(len(s)),), i < len(references)) for i, s in enumerate(captions)]
        clean += [torch.ones(padded(s.shape[0] * s.shape[1]), dtype=torch.bool) for s in siglip]
        clean += [torch.zeros(PAD_MULTIPLE if siglip else 0, dtype=torch.bool)]
        patches = [patchify(r, p).to(self.x_embedder.weight.dtype) for r in references]
        pictures = [fill(linear(self.x_embedder, x, forward, Rows.alone(len(x))), self.x_pad_token) for x in patches]
        return Prepared(
            context=torch.cat(context),
            references=torch.cat([embedded[:0], *pictures]),
            rope=Rope.cat([self._rope(torch.cat(picture_positions)), *context_rope]),
            grid=grid,
            clean=torch.cat(clean).to(embedded.device),
        )

    def scales(self, times: Sequence[float], around: Around = NOTHING) -> dict[float, Scales]:
        """The modulation of every block at each time, in one pass. times: the model's own, 0 noise to 1 image."""
        both = self._scales(times, Forward.ahead(around, self.attention_by), Rows.alone(len(times)))
        return {t: Scales(*each) for t, *each in zip(times, *both)}

    def _scales(self, times: Sequence[float], forward: Forward, rows: Rows) -> tuple[Tensor, Tensor]:
        """Norm weights (T, M, 4, D) and final scales (T, D). rows: the sample of each time."""
        device = self.x_pad_token.device
        t = torch.tensor([t * self.config.t_scale for t in times], dtype=torch.float32, device=device)
        c = self.t_embedder(t, forward, rows)
        blocks = cast(list[Block], [*self.noise_refiner, *self.layers])
        norms = torch.stack([block.norm_weights(c, forward, rows) for block in blocks], dim=1)
        return norms, self.final_layer.scale(c, forward, rows)

    # Every step -----------------------------------------------------------------------------------------------------

    def forward(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Noisy latents, each (C, h, w) of its own size, at each one's time -> image - noise, shaped alike."""
        p = self.config.patch_size
        forward = Forward.over(samples, self.attention_by)
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        norms, finals = self._modulation(samples, forward)
        picture_layout, whole_layout = (cache(partial(lay, prepared, norms, whole)) for whole in (False, True))
        first, last = len(self.noise_refiner), len(self.layers) - 1

        def call_refiner(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
            own = picture_layout(rows.samples)
            return block(x, own.norms[:, i], own.which, own.table, rows.lengths, None, forward, rows)

        def call_layer(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
            # Only the target rows of the last block are read, so only they are computed.
            own = whole_layout(rows.samples)
            keep = own.targets if i == last else None
            norms = own.norms[:, first + i]
            return block(x, norms, own.which, own.table, rows.lengths, keep, forward, rows, own.sights)

        firsts = alike(samples)
        chosen = tuple(dict.fromkeys(firsts))
        patches = [patchify(samples[i].x, p).to(self.x_embedder.weight.dtype) for i in chosen]
        rows = Rows(tuple(Span(i, len(x), True) for i, x in zip(chosen, patches)))
        embedded = linear(self.x_embedder, torch.cat(patches), forward, rows).split(rows.lengths)
        filled = [t for e, i in zip(embedded, chosen) for t in (fill(e, self.x_pad_token), prepared[i].references)]
        rows = picture_layout(chosen).rows
        refined = run_blocks("noise_refiner", self.noise_refiner, torch.cat(filled), call_refiner, forward, rows)
        pictures = dict(zip(chosen, refined.split(rows.lengths)))
        x = torch.cat([t for i, s in zip(firsts, prepared) for t in (pictures[i], s.context)])
        rows, _, _, _, targets, _ = whole_layout(tuple(range(len(samples))))
        x = run_blocks("layers", self.layers, x, call_layer, forward, rows, narrows=True)
        x = self.final_layer(x, finals if targets.which is None else finals[targets.which], forward, targets.rows)
        return [
            unpatchify(out[: s.grid[0] * s.grid[1]], *s.grid, p).float()
            for out, s in zip(x.split(targets.rows.lengths), prepared)
        ]

    def _modulation(self, samples: Sequence[Sample], forward: Forward) -> tuple[Tensor, Tensor]:
        """Norm weights (R, M, 4, D) and final scales (R, D).

        R is the number of samples: one row each. With clean tokens, one more row per sample follows for them. If one
        time serves all, there is a single row.
        """
        asked = [(sample.t, i) for i, sample in enumerate(samples)]
        if any(sample.prepared.clean is not None for sample in samples):
            asked += [(CLEAN, i) for i in range(len(samples))]
        if len({(t, samples[i].around.adapters) for t, i in asked}) == 1:
            asked = asked[:1]
        own = [samples[i].prepared.scales.get(t) for t, i in asked]
        if missing := [at for at, scales in zip(asked, own) if scales is None]:
            times, owners = zip(*missing)
            norms, finals = self._scales(times, forward, Rows(tuple(Span(i, 1) for i in owners)))
            if len(missing) == len(asked):  # as in training, where the gradient of rows stacked one by one is slow
                return norms, finals
            computed = map(Scales, norms, finals)
            own = [scales or next(computed) for scales in own]
        return torch.stack([scales.norms for scales in own]), torch.stack([scales.final for scales in own])

    def _embed_caption(self, segments: Sequence[Tensor], forward: Forward) -> Tensor:
        dtype, embed = self.cap_pad_token.dtype, self.cap_embedder
        states = [embed(s.to(dtype), forward, Rows.alone(len(s))) for s in segments]
        return torch.cat([fill(s, self.cap_pad_token) for s in states])

    def _refine(self, stack: str, x: Tensor, table: Rope, lengths: Sequence[int], forward: Forward) -> Tensor:
        """Runs one picture's caption or SigLIP tokens through the unmodulated blocks of a refiner."""

        def call(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
            return block(x, cast(Block, block).norm_weights(None), None, table, lengths, None, forward, rows)

        return run_blocks(stack, getattr(self, stack), x, call, forward, Rows.alone(len(x)))

    def _rope(self, positions: Tensor) -> Rope:
        return rope(positions, self.config.axes_dims, self.config.rope_theta, self.x_pad_token.device)


class Block(nn.Module):
    """Attention and SwiGLU, each with a norm before and after it.

    The time scales the input of each and gates its output by tanh. Both are factors of a norm's output, so they are
    folded into the norm's weight, once per time.
    """

    apart = ("adaLN_modulation",)  # called before the steps
    # Functions of tensors, to compile or to share out; the numbers are the arguments with a row for each token.
    regions: ClassVar = {"enter": (0, 2, 3, 5), "leave": (0, 1, 3, 5)}
    shares: ClassVar = {  # for tensor parallelism, as `nn.parallel.Shares`
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
        self.adaLN_modulation = Chain(nn.Linear(min(dim, 256), 4 * dim)) if modulated else None

    def norm_weights(self, c: Tensor | None, forward: Forward = PLAIN, rows: Rows = ANY) -> Tensor:
        """Weights of the norms before and after attention, before and after the feed-forward, at each time.

        c: (T, 256), the time embeddings -> (T, 4, D). c is None for a block without modulation -> (1, 4, D).
        """
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        own = torch.stack([norm.weight for norm in norms])
        if self.adaLN_modulation is None or c is None:
            return own.unsqueeze(0)
        scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(c, forward, rows).chunk(4, dim=-1)
        return own * torch.stack((1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()), dim=1)

    def forward(
        self,
        x: Tensor,  # (N, D) packed
        weights: Tensor,  # (R, 4, D) of the norms
        which: Tensor | None,  # (N,) the weights' row of each token; None: the tokens are R equal runs, one row each
        table: Rope,
        lengths: Sequence[int],  # of the sequences, each of which attends only to itself
        keep: Targets | None = None,  # compute only these tokens
        forward: Forward = PLAIN,
        rows: Rows = ANY,
        sights: Sequence[Sight | None] = (),
    ) -> Tensor:
        q, k, v = self.enter(x, weights, which, table, forward, rows)
        counts = lengths
        if keep is not None:
            x, q = rows.targets_of(x), rows.targets_of(q)
            rows, which, counts, sights = keep.rows, keep.which, keep.rows.lengths, keep.sights
        seen = attend(q, k, v, counts, lengths, by=forward.attention_by, sights=sights)
        return self.leave(x, seen, weights, which, forward, rows)

    def enter(
        self, x: Tensor, weights: Tensor, which: Tensor | None, table: Rope, forward: Forward, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, E)."""
        normed = rms_norm_into(forward.unadapted(self.attention.qkv), x, weights[:, 0], self.eps, which)
        return self.attention.project(normed, table, forward, rows)

    def leave(
        self, x: Tensor, seen: Tensor, weights: Tensor, which: Tensor | None, forward: Forward, rows: Rows
    ) -> Tensor:
        """The block's output, from its input x, (N, D), and the attention's output seen, (N, H, E)."""
        attended = linear(self.attention.out, seen.flatten(1), forward, rows)
        x = add_norm(x, attended, weights[:, 1], self.eps, which)
        readers = forward.unadapted(self.feed_forward.w1, self.feed_forward.w3)
        normed = rms_norm_into(readers, x, weights[:, 2], self.eps, which)
        return add_norm(x, self.feed_forward(normed, forward, rows), weights[:, 3], self.eps, which)


class Attention(nn.Module):
    """Full attention with RMS-normed queries and keys and rotary embedding."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.eps = eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(dim // heads)
        self.k_norm = nn.RMSNorm(dim // heads)

    def project(self, x: Tensor | Rounded, table: Rope, forward: Forward, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, E). x: (N, D)."""
        q, k, v = linear(self.qkv, x, forward, rows).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q = norm_rope(q, self.q_norm.weight, table, self.eps)
        return q, norm_rope(k, self.k_norm.weight, table, self.eps), v


class FinalLayer(nn.Module):
    """Layer norm, scaled by the time, then projection to patches."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.linear = nn.Linear(dim, patch)
        self.adaLN_modulation = Chain(nn.SiLU(), nn.Linear(min(dim, 256), dim))

    def scale(self, c: Tensor, forward: Forward, rows: Rows) -> Tensor:
        """c: (T, 256) -> (T, D)."""
        return 1 + self.adaLN_modulation(c, forward, rows)

    def forward(self, x: Tensor, scale: Tensor, forward: Forward, rows: Rows) -> Tensor:  # x: (N, D), scale: (R, D)
        return linear(self.linear, scale_runs(F.layer_norm(x, x.shape[-1:], eps=1e-6), scale), forward, rows)


def padded(length: int) -> int:
    """The length rounded up to the multiple that the model was trained with."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def fill(x: Tensor, pad: Tensor) -> Tensor:
    """Appends the learned pad token up to the multiple. x: (L, D), pad: (1, D)."""
    missing = padded(len(x)) - len(x)
    return torch.cat([x, pad.expand(missing, -1)]) if missing else x


def alike(samples: Sequence[Sample]) -> list[int]:
    """For each sample, the first sample with the same picture tokens, as in classifier-free guidance.

    Their picture tokens are equal until captions join them. Their positions differ by the caption's length, but all
    shift alike, which does not change attention among them. Pads stay at the origin, so pictures with pads do not
    qualify.
    """

    def key(i: int, sample: Sample) -> object:
        s: Prepared = sample.prepared
        stays = s.clean is not None or s.target_tokens > s.grid[0] * s.grid[1]
        return i if stays else (id(sample.x), sample.t, id(sample.around))

    keys = [key(i, sample) for i, sample in enumerate(samples)]
    return [keys.index(one) for one in keys]


def lay(prepared: Sequence[Prepared], norms: Tensor, whole: bool, samples: tuple[int, ...]) -> Layout:
    """The layout of some samples of a forward, with context if `whole`. norms: of the whole forward."""
    own = [prepared[i] for i in samples]
    behind = [len(s.references) + (len(s.context) if whole else 0) for s in own]
    spans = [(Span(i, s.target_tokens, True), Span(i, n)) for i, s, n in zip(samples, own, behind)]
    rows = Rows(tuple(span for pair in spans for span in pair))
    table = Rope.cat([s.rope if whole else s.rope[:n] for s, n in zip(own, rows.lengths)])
    if len(norms) > 1 and len(own) < len(prepared):
        norms = norms.unflatten(0, (-1, len(prepared)))[:, list(samples)].flatten(0, 1)
    sights = [s.sight for s in own] if whole else []
    of_targets = [sight and sight.targets for sight in sights]
    targets = Targets(rows.targets, rows_of(own, rows.targets.lengths, len(norms)), of_targets)
    return Layout(rows, table, norms, rows_of(own, rows.lengths, len(norms)), targets, sights)


def rows_of(prepared: Sequence[Prepared], counts: Sequence[int], rows: int) -> Tensor | None:
    """The modulation's row of each token, for the first counts[i] tokens of every sample.

    None where the tokens are `rows` equal runs, one row each.
    """
    if rows == 1 or (len(set(counts)) == 1 and rows == len(counts)):
        return None
    device = prepared[0].context.device
    owner = run_of_each(counts, device)
    if rows == len(counts):
        return owner
    noisy = torch.zeros(max(counts), dtype=torch.bool, device=device)
    clean = [(noisy if s.clean is None else s.clean)[:n] for s, n in zip(prepared, counts)]
    return owner + len(counts) * torch.cat(clean)


def patchify(x: Tensor, p: int) -> Tensor:
    """(C, h, w) -> (h/p * w/p, p*p*C): patches row by row; within a patch row, column, channel, channel fastest."""
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
    """Positions of a rows x columns grid stretched over a height x width grid, truncated to integers."""
    positions = plane(at, rows, columns).float()
    positions[:, 1] = positions[:, 1] / max(rows - 1, 1) * (height - 1)
    positions[:, 2] = positions[:, 2] / max(columns - 1, 1) * (width - 1)
    return positions.long()


def with_pads(positions: Tensor) -> Tensor:
    """Appends the positions of a picture's pads, which are at the origin."""
    return torch.cat([positions, positions.new_zeros(padded(len(positions)) - len(positions), 3)])
