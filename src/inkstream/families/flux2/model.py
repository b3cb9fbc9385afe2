"""The FLUX.2 transformer: few double-stream and many single-stream blocks, modulation shared by kind, no biases.

Times and signs are ours: t = 1 is noise, the output is noise - image. Latents have 128 channels at 1/16 of the
picture's side. A token is one latent cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inkstream.families.flux2.specs import Flux2Config
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.flux import (
    FREQUENCIES,
    DoubleBlock,
    Embedder,
    FinalLayer,
    KeysValues,
    Modulation,
    Modulator,
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
from inkstream.nn.rope import Rope, rope
from inkstream.nn.sight import sight_of, texts_of
from inkstream.nn.stack import Blocks
from inkstream.types import Encoded

REFERENCE_SPACING = 10
"""The distance of references on the first rotary axis. The target is at 0."""
CLEAN = 0.0
"""The time of references that are read once: they have no noise."""


class Flux2Transformer(nn.Module):
    """Predicts noise - image at a point of the path. Build it on meta, then assign the weights."""

    attention_by = "auto"

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.config = c = config
        self.img_in = nn.Linear(c.in_channels, c.dim, bias=False)
        self.txt_in = nn.Linear(c.joint_attention_dim, c.dim, bias=False)
        self.time_in = Embedder(FREQUENCIES, c.dim, bias=False)
        self.guidance_in = Embedder(FREQUENCIES, c.dim, bias=False) if c.guidance_embeds else None
        self.double_stream_modulation_img = Modulator(c.dim, 6, bias=False)
        self.double_stream_modulation_txt = Modulator(c.dim, 6, bias=False)
        self.single_stream_modulation = Modulator(c.dim, 3, bias=False)
        sizes = (c.dim, c.num_attention_heads, round(c.mlp_ratio * c.dim))
        self.double_blocks = Blocks(
            DoubleBlock(*sizes, gated=True, bias=False, modulated=False) for _ in range(c.num_layers)
        )
        self.single_blocks = Blocks(
            SingleBlock(*sizes, gated=True, bias=False, modulated=False) for _ in range(c.num_single_layers)
        )
        self.final_layer = FinalLayer(c.dim, c.out_channels or c.in_channels, bias=False)

    # Once per prompt, size and schedule -----------------------------------------------------------------------------

    def prepare(
        self,
        texts: Sequence[Tensor],
        height: int,
        width: int,
        guidance: float | None = None,
        times: Sequence[float] = (),
        references: Sequence[Tensor] = (),
        read_once: bool = False,
        around: Around = NOTHING,
        regions: Sequence[Encoded] = (),
    ) -> list[Prepared]:
        """Computes what is constant over the steps of a picture, for each of several prompts.

        texts: the text encoder's states, each (L, joint_attention_dim). height, width: of the latents. guidance: a
        number for a guidance-distilled model, else None (InputError otherwise). times: the times to come. references:
        latents (C, h, w) of reference pictures. read_once, for weights trained so (klein 9B KV): the references attend
        only to each other, at time 0, and their KV cache for all steps is computed here. around: of the picture.
        regions: with texts of their own, of the first prompt's picture.
        """
        forward = Forward.ahead(around, self.attention_by)
        weight = self.img_in.weight
        grid, grids = (height, width), [(r.shape[1], r.shape[2]) for r in references]
        every = texts_of(texts, regions)
        lengths = [[len(text) for text in own] for own in every]
        tokens = torch.cat([text for own in every for text in own]).to(weight.dtype)
        embedded = linear(self.txt_in, tokens, forward, Rows.alone(len(tokens)))
        patches = [patchify(r, 1).to(weight.dtype) for r in references]
        rows = Rows.alone(sum(len(x) for x in patches))
        seen = linear(self.img_in, torch.cat(patches), forward, rows) if patches else embedded[:0]
        guided = embed_guidance(self.guidance_in, guidance, forward)
        embedding = weight.new_zeros(self.config.dim) if guided is None else guided[0]
        reference_rope = self._rope(reference_positions(grids))
        memory = self._read(seen, reference_rope, embedding, forward) if read_once and references else ()
        seen, reference_rope = (seen[:0], reference_rope[:0]) if memory else (seen, reference_rope)
        target_rope = self._rope(plane(0, *grid, axes=4))
        modulation = foresee(times, embedding, self.modulate, forward)
        cells, remembered = grid[0] * grid[1], len(memory[0][0]) if memory else 0

        def prepared(text: Tensor, lengths: list[int], regions: Sequence[Encoded]) -> Prepared:
            targets, count = range(len(text), len(text) + cells), len(text) + cells + len(seen)
            return Prepared(
                text=text,
                references=seen,
                rope=Rope.cat([*(self._rope(text_positions(n)) for n in lengths), target_rope, reference_rope]),
                grid=grid,
                embedding=embedding,
                memory=memory,
                modulation=modulation,
                sight=sight_of(regions, lengths, 0, targets, grid, count, count + remembered, weight.device),
            )

        entries = zip(embedded.split([sum(own) for own in lengths]), lengths)
        return [prepared(*entry, () if i else regions) for i, entry in enumerate(entries)]

    def modulate(self, times: Sequence[float], embeddings: Tensor, forward: Forward, rows: Rows) -> Modulation:
        """The modulation of every block at T times.

        embeddings: (T or 1, D), as `Prepared.embedding`. rows: the sample of each time.
        """
        vec = self.time_in.numbers(times, forward, rows) + embeddings
        text, picture = self.double_stream_modulation_txt, self.double_stream_modulation_img
        double = torch.stack((text(vec, forward, rows), picture(vec, forward, rows)), 1)
        single = self.single_stream_modulation(vec, forward, rows)
        return Modulation(
            double.unsqueeze(1).expand(-1, len(self.double_blocks), -1, -1, -1),
            single.unsqueeze(1).expand(-1, len(self.single_blocks), -1, -1),
            self.final_layer.modulation(vec, forward, rows),
        )

    def _read(self, references: Tensor, table: Rope, embedding: Tensor, forward: Forward) -> list[KeysValues]:
        """The KV cache of the references in every block; they attend only to each other. references: (R, D)"""
        nothing = references[:0]
        alone = Prepared(text=nothing, references=nothing, rope=table, grid=(1, len(references)), embedding=embedding)
        memory: list[KeysValues] = []
        modulation = self.modulate([CLEAN], embedding.unsqueeze(0), forward, Rows.alone(1))
        run_streams(self.double_blocks, self.single_blocks, references, [alone], modulation, forward, memory)
        return memory

    def _rope(self, positions: Tensor) -> Rope:
        return rope(positions, self.config.axes_dims_rope, self.config.rope_theta, self.img_in.weight.device)

    # Every step -----------------------------------------------------------------------------------------------------

    def forward(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Noisy latents, each (C, h, w) of its own size, at each one's time -> noise - image, shaped alike, float32."""
        forward = Forward.over(samples, self.attention_by)
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        patches = [patchify(sample.x, 1) for sample in samples]
        modulation = modulation_of(samples, self.modulate, forward)
        rows = Rows(tuple(Span(i, len(x), True) for i, x in enumerate(patches)))
        x = linear(self.img_in, torch.cat(patches).to(self.img_in.weight.dtype), forward, rows)
        x = run_streams(self.double_blocks, self.single_blocks, x, prepared, modulation, forward)
        out = self.final_layer(x, modulation.final, forward, rows).split(rows.lengths)
        return [unpatchify(o, *s.grid, 1).float() for o, s in zip(out, prepared)]


def text_positions(length: int) -> Tensor:
    """Text positions count along the last axis: (0, 0, 0, l). -> (length, 4)"""
    positions = torch.zeros(length, 4, dtype=torch.long)
    positions[:, 3] = torch.arange(length)
    return positions


def reference_positions(grids: Sequence[tuple[int, int]]) -> Tensor:
    """Positions of reference i, counted from 1: (10 i, row, column, 0). -> (R, 4)"""
    planes = [plane(REFERENCE_SPACING * i, *grid, axes=4) for i, grid in enumerate(grids, start=1)]
    return torch.cat([torch.zeros(0, 4, dtype=torch.long), *planes])
