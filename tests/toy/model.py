"""One stream of picture and text tokens through blocks that the time scales and gates.

Times and signs here are the release's own: t = 0 is noise and 1 the image, the output is image - noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inkstream.nn.around import Around
from inkstream.nn.attention import attend
from inkstream.nn.forward import Forward, Rows, Sample, Span, run_blocks
from inkstream.nn.layers import SwiGLU, TimestepEmbedder, rms_norm, run_of_each
from inkstream.nn.linear import linear
from inkstream.nn.rope import Rope, norm_rope, rope
from inkstream.nn.stack import Blocks
from toy.specs import ToyConfig

EPS = 1e-6
THETA = 256.0


@dataclass(frozen=True)
class Prepared:
    """What no step changes of one sample. Token order: picture, text."""

    text: Tensor  # (L, D) embedded
    rope: Rope  # of all tokens
    times: Mapping[float, Tensor]  # by the model's time, (D,) embedded: those foreseen

    def at(self, t: float) -> Prepared | None:
        """For that time alone; None where it was not foreseen."""
        return replace(self, times={t: self.times[t]}) if t in self.times else None


class ToyTransformer(nn.Module):
    """Predicts image - noise at a point of the path. Build it on meta; weights are assigned."""

    attention_by = "auto"  # `attention.choose_attention` sets another

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.x_embedder = nn.Linear(config.in_channels, config.dim)
        self.text_embedder = nn.Linear(config.text_dim, config.dim)
        self.t_embedder = TimestepEmbedder(config.dim, config.dim)
        self.layers = Blocks(Block(config) for _ in range(config.n_layers))
        self.final_layer = nn.Linear(config.dim, config.in_channels)

    def prepare(
        self, texts: Sequence[Tensor], height: int, width: int, times: Sequence[float], around: Around
    ) -> list[Prepared]:
        """Of each prompt of one picture. texts: (L, text_dim) states; height, width of the latents."""
        forward = Forward.ahead(around, self.attention_by)
        embedded_times = dict(zip(times, self._embed(times, forward, Rows.alone(len(times))))) if times else {}
        prepared = []
        for text in texts:
            embedded = linear(self.text_embedder, text.to(self._dtype), forward, Rows.alone(len(text)))
            table = rope(positions(height, width, len(text)), self.config.axes_dims, THETA, embedded.device)
            prepared.append(Prepared(embedded, table, embedded_times))
        return prepared

    def forward(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Noisy latents, each (C, h, w) of its own size, at each one's time -> image - noise, shaped alike."""
        forward = Forward.over(samples, self.attention_by)
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        patches = [sample.x.flatten(1).T.to(self._dtype) for sample in samples]  # (h * w, C)
        pictures = Rows(tuple(Span(i, len(x), True) for i, x in enumerate(patches)))
        embedded = linear(self.x_embedder, torch.cat(patches), forward, pictures).split(pictures.lengths)
        x = torch.cat([tokens for picture, p in zip(embedded, prepared) for tokens in (picture, p.text)])
        texts = [Span(i, len(p.text)) for i, p in enumerate(prepared)]
        rows = Rows(tuple(span for pair in zip(pictures.spans, texts) for span in pair))
        times = torch.cat([self._time(i, sample, forward) for i, sample in enumerate(samples)])

        def call(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
            table = Rope.cat([prepared[sample].rope for sample in rows.samples])
            return block(x, times[list(rows.samples)], table, forward, rows)

        x = run_blocks("layers", self.layers, x, call, forward, rows)
        out = linear(self.final_layer, rows.targets_of(x), forward, rows.targets)
        return [one.T.reshape(s.x.shape).float() for one, s in zip(out.split(rows.targets.lengths), samples)]

    @property
    def _dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    def _time(self, i: int, sample: Sample, forward: Forward) -> Tensor:
        """The embedded time of a sample, (1, D), foreseen or not."""
        foreseen = sample.prepared.times.get(sample.t)
        return self._embed([sample.t], forward, Rows((Span(i, 1),))) if foreseen is None else foreseen.unsqueeze(0)

    def _embed(self, times: Sequence[float], forward: Forward, rows: Rows) -> Tensor:
        t = torch.tensor([1000 * t for t in times], dtype=torch.float32, device=self.x_embedder.weight.device)
        return self.t_embedder(t, forward, rows)


class Block(nn.Module):
    """Attention and SwiGLU behind norms; the time scales what enters attention and gates what leaves it."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.norm1 = nn.RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.n_heads)
        self.norm2 = nn.RMSNorm(config.dim)
        self.feed_forward = SwiGLU(config.dim, 2 * config.dim)

    def forward(self, x: Tensor, times: Tensor, table: Rope, forward: Forward, rows: Rows) -> Tensor:
        """x: (N, D), times: (S, D) of the samples that have rows -> (N, D)."""
        one_each = Rows(tuple(Span(sample, 1) for sample in rows.samples))
        which = run_of_each(rows.lengths, x.device)
        scale, gate = linear(self.modulation, times, forward, one_each)[which].chunk(2, dim=-1)
        normed = rms_norm(x, self.norm1.weight, EPS) * (1 + scale)
        x = x + gate * self.attention(normed, table, forward, rows)
        return x + self.feed_forward(rms_norm(x, self.norm2.weight, EPS), forward, rows)


class Attention(nn.Module):
    """Full attention of each sample to itself, with RMS-normed queries and keys and rotary positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = nn.RMSNorm(dim // heads)
        self.k_norm = nn.RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, table: Rope, forward: Forward, rows: Rows) -> Tensor:  # (N, D)
        q, k, v = linear(self.qkv, x, forward, rows).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (N, H, E)
        q, k = norm_rope(q, self.q_norm.weight, table, EPS), norm_rope(k, self.k_norm.weight, table, EPS)
        seen = attend(q, k, v, rows.lengths, rows.lengths, by=forward.attention_by)
        return linear(self.out, seen.flatten(1), forward, rows)


def positions(height: int, width: int, text: int) -> Tensor:
    """(0, row, column) of each cell of the picture, then (1 + k, 0, 0) of each token of the text. (N, 3)"""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack((torch.zeros_like(row), row, column), dim=-1).reshape(-1, 3)
    places = torch.zeros(text, 3, dtype=torch.long)
    places[:, 0] = torch.arange(1, text + 1)
    return torch.cat([picture, places])
