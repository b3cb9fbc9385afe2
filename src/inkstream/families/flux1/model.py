"""The FLUX.1 transformer: 19 double-stream and 38 single-stream blocks, modulated by time, guidance and pooled text.

The pooled text is CLIP's. Times and signs are ours: t = 1 is noise, the output is noise - image. Latents have 16
channels at 1/8 of the picture's side. A token is a patch of 2 x 2 latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from inkstream.families.flux1.specs import Flux1Config
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.flux import (
    FREQUENCIES,
    DoubleBlock,
    Embedder,
    FinalLayer,
    Modulation,
    Prepared,
    SingleBlock,
    embed_guidance,
    foresee,
    modulation_of,
    patchify,
    plane,
    run_streams,
    unpatchify,
)
from inkstream.nn.forward import Forward, Rows, Sample, Span
from inkstream.nn.linear import linear
from inkstream.nn.rope import rope
from inkstream.nn.sight import sight_of, texts_of
from inkstream.nn.stack import Blocks
from inkstream.types import Encoded

PATCH = 2
MLP_RATIO = 4
THETA = 10_000.0


class Flux1Transformer(nn.Module):
    """Predicts noise - image at a point of the path. Build it on meta, then assign the weights."""

    attention_by = "auto"

    def __init__(self, config: Flux1Config):
        super().__init__()
        self.config = c = config
        self.img_in = nn.Linear(c.in_channels, c.dim)
        self.txt_in = nn.Linear(c.joint_attention_dim, c.dim)
        self.time_in = Embedder(FREQUENCIES, c.dim, bias=True)
        self.vector_in = Embedder(c.pooled_projection_dim, c.dim, bias=True)
        self.guidance_in = Embedder(FREQUENCIES, c.dim, bias=True) if c.guidance_embeds else None
        sizes = (c.dim, c.num_attention_heads, MLP_RATIO * c.dim)
        self.double_blocks = Blocks(
            DoubleBlock(*sizes, gated=False, bias=True, modulated=True) for _ in range(c.num_layers)
        )
        self.single_blocks = Blocks(
            SingleBlock(*sizes, gated=False, bias=True, modulated=True) for _ in range(c.num_single_layers)
        )
        self.final_layer = FinalLayer(c.dim, c.out_channels or c.in_channels, bias=True)

    # Once per prompt, size and schedule -----------------------------------------------------------------------------

    def prepare(
        self,
        texts: Sequence[Tensor],
        pooled: Sequence[Tensor],
        height: int,
        width: int,
        guidance: float | None = None,
        times: Sequence[float] = (),
        channels: Tensor | None = None,
        references: Sequence[Tensor] = (),
        around: Around = NOTHING,
        regions: Sequence[Encoded] = (),
    ) -> list[Prepared]:
        """Computes what is constant over the steps of a picture, for each of several prompts.

        texts: T5's states and any other text tokens, each (L, joint_attention_dim). pooled: CLIP's vector of each,
        (pooled_projection_dim,). height, width: of the latents, even. guidance: a number for a guidance-distilled
        model, else None (InputError otherwise). times: the times to come. channels: (C', height, width) latents
        appended to the target's channels at every step (Fill, Canny, Depth). references: latents (C, h, w) of reference
        pictures (Kontext). around: of the picture. regions: with texts of their own, of the first prompt's picture.
        """
        forward = Forward.ahead(around, self.attention_by)
        dtype, device = self.img_in.weight.dtype, self.img_in.weight.device
        grid, grids = grid_of(height, width), [grid_of(*r.shape[1:]) for r in references]
        every = texts_of(texts, regions)
        lengths = [[len(text) for text in own] for own in every]
        tokens = torch.cat([text for own in every for text in own]).to(dtype)
        embedded = linear(self.txt_in, tokens, forward, Rows.alone(len(tokens)))
        patches = [patchify(r, PATCH).to(dtype) for r in references]
        rows = Rows.alone(sum(len(x) for x in patches))
        seen = linear(self.img_in, torch.cat(patches), forward, rows) if patches else embedded[:0]
        embeddings = self.vector_in(torch.stack(list(pooled)), forward, Rows.alone(len(pooled)))
        guided = embed_guidance(self.guidance_in, guidance, forward)
        embeddings = embeddings if guided is None else embeddings + guided
        cells = grid[0] * grid[1]

        def prepared(text: Tensor, embedding: Tensor, lengths: list[int], regions: Sequence[Encoded]) -> Prepared:
            targets, count = range(len(text), len(text) + cells), len(text) + cells + len(seen)
            return Prepared(
                text=text,
                references=seen,
                rope=rope(positions(len(text), grid, grids), self.config.axes_dims_rope, THETA, device),
                grid=grid,
                embedding=embedding,
                channels=None if channels is None else patchify(channels, PATCH).to(dtype),
                modulation=foresee(times, embedding, self.modulate, forward),
                sight=sight_of(regions, lengths, 0, targets, grid, count, count, device),
            )

        entries = zip(embedded.split([sum(own) for own in lengths]), embeddings, lengths, strict=True)
        return [prepared(*entry, () if i else regions) for i, entry in enumerate(entries)]

    def modulate(self, times: Sequence[float], embeddings: Tensor, forward: Forward, rows: Rows) -> Modulation:
        """The modulation of every block at T times.

        embeddings: (T or 1, D), as `Prepared.embedding`. rows: the sample of each time.
        """
        vec = self.time_in.numbers(times, forward, rows) + embeddings
        doubles, singles = cast(list[DoubleBlock], self.double_blocks), cast(list[SingleBlock], self.single_blocks)
        pairs = [(b.txt_mod(vec, forward, rows), b.img_mod(vec, forward, rows)) for b in doubles]
        double = torch.stack([torch.stack(pair, dim=1) for pair in pairs], dim=1)
        single = torch.stack([b.modulation(vec, forward, rows) for b in singles], dim=1)
        return Modulation(double, single, self.final_layer.modulation(vec, forward, rows))

    # Every step -----------------------------------------------------------------------------------------------------

    def forward(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Noisy latents, each (C, h, w) of its own size, at each one's time -> noise - image, shaped alike, float32."""
        forward = Forward.over(samples, self.attention_by)
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        patches = [patchify(sample.x, PATCH).to(self.img_in.weight.dtype) for sample in samples]
        patches = [x if s.channels is None else torch.cat((x, s.channels), -1) for x, s in zip(patches, prepared)]
        modulation = modulation_of(samples, self.modulate, forward)
        rows = Rows(tuple(Span(i, len(x), True) for i, x in enumerate(patches)))
        x = linear(self.img_in, torch.cat(patches), forward, rows)
        x = run_streams(self.double_blocks, self.single_blocks, x, prepared, modulation, forward)
        out = self.final_layer(x, modulation.final, forward, rows).split(rows.lengths)
        return [unpatchify(o, *s.grid, PATCH).float() for o, s in zip(out, prepared)]


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches for latents of this size."""
    return height // PATCH, width // PATCH


def positions(text: int, grid: tuple[int, int], references: Sequence[tuple[int, int]]) -> Tensor:
    """(picture, row, column) of all tokens -> (N, 3): text at the origin, the target picture 0, references 1, 2 ...

    The release has one reference only. Counting on for further references is our choice.
    """
    pictures = [plane(i, *size, axes=3) for i, size in enumerate([grid, *references])]
    return torch.cat([torch.zeros(text, 3, dtype=torch.long), *pictures])
