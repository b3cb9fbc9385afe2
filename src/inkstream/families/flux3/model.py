"""The FLUX.3 transformer: blocks for each mode of tokens alone, then blocks for all tokens together, no biases.

Times and signs are ours: t = 1 is noise, the output is noise - image. A token is one latent cell, of 16 x 16 pixels.
The modes are text, the picture being drawn, and reference pictures. All blocks are alike: attention and a SwiGLU in
parallel, behind one norm that is modulated by mode. Text and references are modulated for time 0. So their own blocks
are computed once, before the steps, except in a flow map, where the time that a step goes to modulates them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from inkstream.families.flux3.specs import Flux3Config
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.attention import attend
from inkstream.nn.flux import (
    FREQUENCIES,
    Embedder,
    FinalLayer,
    Modulator,
    QKNorm,
    add_gated,
    modulate,
    patchify,
    plane,
    unpatchify,
    weave,
)
from inkstream.nn.forward import Forward, Rows, Sample, Span, run_blocks
from inkstream.nn.layers import run_of_each, silu_times
from inkstream.nn.linear import linear
from inkstream.nn.rope import Rope, rope
from inkstream.nn.sight import Sight, sight_of, texts_of
from inkstream.nn.stack import Blocks
from inkstream.types import Encoded

MODES = ("txt", "image", "image_cond")
TEXT, PICTURE, REFERENCES = range(3)
CLEAN = 0.0
"""The time of text and references: they have no noise."""
CELL = 0.5
"""The distance of neighbouring tokens of a picture on the rotary axes of rows and columns."""

Jump = tuple[float, float | None]
"""The time of a point, and the time that a step goes to from there. None: the model is no flow map."""


@dataclass(frozen=True)
class Modulation:
    """The modulation of all blocks in R rows: one for each sample, or one for all samples.

    own: (R, 3, 3, D), of the blocks of each mode. joint: alike, of the blocks for all tokens. Axis 1: the mode. Axis 2:
    shift, scale, gate. final: (R, 2, D): shift, scale.
    """

    own: Tensor
    joint: Tensor
    final: Tensor

    def rows(self, chosen: Sequence[int]) -> Modulation:
        """The modulation with some of the rows, or as it is if it has one row for all samples."""
        if len(self.final) == 1 or len(self.final) == len(chosen):
            return self
        return Modulation.cat([Modulation(self.own[i, None], self.joint[i, None], self.final[i, None]) for i in chosen])

    @staticmethod
    def cat(rows: Sequence[Modulation]) -> Modulation:
        return Modulation(*(torch.cat([getattr(m, name) for m in rows]) for name in ("own", "joint", "final")))


@dataclass(frozen=True)
class Prepared:
    """The parts of one sample that are constant over its steps. Token order: text, target picture, references."""

    text: Tensor  # (T, D) embedded prompt, then the texts of regions; of a base model, behind their own blocks
    references: Tensor  # (R, D), alike
    texts: tuple[int, ...]  # the length of each text
    rope: Rope  # rotary table of all tokens
    grid: tuple[int, int]  # rows and columns of the target's tokens
    modulation: Mapping[Jump, Modulation] = field(default_factory=dict)  # one row for each foreseen jump
    sight: Sight | None = None  # what each token sees in joint blocks, if not all see all
    to: float | None = None  # the time that the step goes to, for a flow map

    def at(self, t: float) -> Prepared | None:
        """This sample for the jump from time t alone, or None if that was not foreseen."""
        found = self.modulation.get((t, self.to))
        return None if found is None else replace(self, modulation={(t, None): found}, to=None)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """The number of tokens of each mode."""
        return len(self.text), self.grid[0] * self.grid[1], len(self.references)

    def table(self, mode: int) -> Rope:
        """The rotary table of the tokens of a mode."""
        start = sum(self.lengths[:mode])
        return self.rope[start : start + self.lengths[mode]]


class Stream(NamedTuple):
    """The tokens of one mode of one sample."""

    x: Tensor  # (N, D)
    lengths: Sequence[int]  # of the sequences, each of which attends only to itself
    table: Rope


class Layout(NamedTuple):
    """How the tokens of some samples lie, for one kind of blocks."""

    modulation: Tensor  # (R, 3, D)
    which: Tensor | None  # (N,) the modulation's row of each token; None: one for all, or equal runs
    table: Rope
    lengths: Sequence[int]
    sights: Sequence[Sight | None] = ()


class Flux3Transformer(nn.Module):
    """Predicts noise - image at a point of the path. Build it on meta, then assign the weights."""

    attention_by = "auto"

    def __init__(self, config: Flux3Config):
        super().__init__()
        self.config = c = config
        widths = {"image": c.in_channels, "image_cond": c.cond_in_channels}
        sizes = (c.dim, c.num_attention_heads, round(c.mlp_ratio * c.dim))
        self.emb_in = nn.ModuleDict({mode: nn.Linear(width, c.dim, bias=False) for mode, width in widths.items()})
        self.txt_in = nn.Linear(c.joint_attention_dim, c.dim, bias=False)
        self.time_in = Embedder(FREQUENCIES, c.dim, bias=False)
        self.ref_time_in = Embedder(FREQUENCIES, c.dim, bias=False) if c.flow_map else None
        self.early_stream_modulations = nn.ModuleDict({mode: Modulator(c.dim, 3, bias=False) for mode in MODES})
        self.single_stream_modulations = nn.ModuleDict({mode: Modulator(c.dim, 3, bias=False) for mode in MODES})
        self.content_mode_blocks = nn.ModuleDict(
            {mode: Blocks(Block(*sizes) for _ in range(c.num_layers)) for mode in widths}
        )
        self.txt_mode_blocks = Blocks(Block(*sizes) for _ in range(c.num_layers))
        self.single_blocks = Blocks(Block(*sizes) for _ in range(c.num_single_layers))
        self.final_layer = nn.ModuleDict({"image": FinalLayer(c.dim, c.in_channels, bias=False)})

    # Once per prompt, size and schedule -----------------------------------------------------------------------------

    def prepare(
        self,
        texts: Sequence[Tensor],
        height: int,
        width: int,
        times: Sequence[float] = (),
        references: Sequence[Tensor] = (),
        around: Around = NOTHING,
        regions: Sequence[Encoded] = (),
    ) -> list[Prepared]:
        """Computes what is constant over the steps of a picture, for each of several prompts.

        texts: the text encoder's states, each (L, joint_attention_dim). height, width: of the latents. times: the times
        to come; of a flow map, each step is foreseen to go to the next of them, the last one to 0. references: latents
        (C, h, w) of reference pictures. around: of the picture. regions: with texts of their own, of the first prompt's
        picture.
        """
        forward, weight = Forward.ahead(around, self.attention_by), self.txt_in.weight
        grid, grids = (height, width), [(r.shape[1], r.shape[2]) for r in references]
        every = texts_of(texts, regions)
        lengths = [len(text) for own in every for text in own]
        tokens = torch.cat([text for own in every for text in own]).to(weight.dtype)
        embedded = linear(self.txt_in, tokens, forward, Rows.alone(len(tokens)))
        patches = [patchify(r, 1).to(weight.dtype) for r in references]
        rows = Rows.alone(sum(map(len, patches)))
        seen = linear(self.emb_in["image_cond"], torch.cat(patches), forward, rows) if patches else embedded[:0]
        text_rope = {n: self._rope(text_positions(n)) for n in set(lengths)}
        target_rope, seen_rope = self._rope(picture_positions([grid], 0)), self._rope(picture_positions(grids, -1))
        jumps = [(t, to if self.config.flow_map else None) for t, to in zip(times, [*times[1:], 0.0])]
        modulation = self._foresee(jumps, forward)
        if not self.config.flow_map:
            still = next(iter(modulation.values()), None) or self.modulate([(CLEAN, None)], forward, Rows.alone(1))
            text = Stream(embedded, lengths, Rope.cat([text_rope[n] for n in lengths]))
            (embedded,) = self._own_blocks(TEXT, {0: text}, still, forward).values()
            (seen,) = self._own_blocks(REFERENCES, {0: Stream(seen, [len(seen)], seen_rope)}, still, forward).values()

        def prepared(text: Tensor, texts: Sequence[Tensor], regions: Sequence[Encoded]) -> Prepared:
            own = [len(one) for one in texts]
            targets = range(len(text), len(text) + grid[0] * grid[1])
            count = targets.stop + len(seen)
            sight = sight_of(regions, own, 0, targets, grid, count, count, weight.device)
            table = Rope.cat([*(text_rope[n] for n in own), target_rope, seen_rope])
            return Prepared(text, seen, tuple(own), table, grid, modulation, sight)

        entries = zip(embedded.split([sum(map(len, own)) for own in every]), every)
        return [prepared(*entry, () if i else regions) for i, entry in enumerate(entries)]

    def modulate(self, jumps: Sequence[Jump], forward: Forward, rows: Rows) -> Modulation:
        """The modulation of every block for T jumps, in T rows. rows: the sample of each."""
        moving = self.time_in.numbers([t for t, _ in jumps], forward, rows)
        first = rows if self.ref_time_in is not None or len(rows.samples) > 1 else rows[:1]  # time 0 is one row for all
        still = self.time_in.numbers([CLEAN] * len(first), forward, first)
        if self.ref_time_in is not None:
            jump = self.ref_time_in.numbers([t if to is None else to for t, to in jumps], forward, rows)
            moving, still = moving + jump, still + jump
        of_each = ((still, first), (moving, rows), (still, first))

        def all_modes(modulators: nn.ModuleDict) -> Tensor:
            made = [modulators[mode](vec, forward, own) for mode, (vec, own) in zip(MODES, of_each)]
            return torch.stack([one.expand(len(moving), -1, -1) for one in made], dim=1)

        final = cast(FinalLayer, self.final_layer["image"]).modulation(moving, forward, rows)
        return Modulation(all_modes(self.early_stream_modulations), all_modes(self.single_stream_modulations), final)

    def _foresee(self, jumps: Sequence[Jump], forward: Forward) -> dict[Jump, Modulation]:
        """The modulation of each jump, computed in one pass."""
        jumps = list(dict.fromkeys(jumps))
        found = self.modulate(jumps, forward, Rows.alone(len(jumps))) if jumps else None
        rows = [] if found is None else [found.rows([i]) for i in range(len(jumps))]
        return dict(zip(jumps, rows))

    def _rope(self, positions: Tensor) -> Rope:
        return rope(positions, self.config.axes_dims_rope, self.config.rope_theta, self.txt_in.weight.device)

    # Every step -----------------------------------------------------------------------------------------------------

    def forward(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Noisy latents, each (C, h, w) of its own size, at each one's time -> noise - image, shaped alike, float32.

        A flow map answers for the jump from the sample's time to its `prepared.to`.
        """
        forward = Forward.over(samples, self.attention_by)
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        modulation = self._modulation(samples, forward)
        firsts = alike(samples)
        chosen = tuple(dict.fromkeys(firsts))
        patches = [patchify(samples[i].x, 1) for i in chosen]
        rows = Rows(tuple(Span(i, len(x), True) for i, x in zip(chosen, patches)))
        x = linear(self.emb_in["image"], torch.cat(patches).to(self.txt_in.weight.dtype), forward, rows)
        embedded = dict(zip(chosen, x.split(rows.lengths)))
        pictures = self._own_blocks(PICTURE, self._streams(PICTURE, embedded, prepared), modulation, forward)
        texts, references = ({i: getattr(s, name) for i, s in enumerate(prepared)} for name in ("text", "references"))
        if self.config.flow_map:
            texts = self._own_blocks(TEXT, self._streams(TEXT, texts, prepared), modulation, forward)
            streams = self._streams(REFERENCES, references, prepared)
            references = self._own_blocks(REFERENCES, streams, modulation, forward)
        x = weave(texts.values(), [pictures[i] for i in firsts], references.values())
        rows = Rows(
            tuple(Span(i, n, mode == PICTURE) for i, s in enumerate(prepared) for mode, n in enumerate(s.lengths))
        )
        x = self._joint_blocks(x, rows, prepared, modulation, forward)
        out = self.final_layer["image"](x, modulation.final, forward, rows.targets).split(rows.targets.lengths)
        return [unpatchify(o, *s.grid, 1).float() for o, s in zip(out, prepared)]

    def _modulation(self, samples: Sequence[Sample], forward: Forward) -> Modulation:
        """One modulation row for each sample, or a single shared row: as foreseen, else computed."""
        jumps: list[Jump] = [(sample.t, sample.prepared.to) for sample in samples]
        own: list[Any] = [sample.prepared.modulation.get(jump) for sample, jump in zip(samples, jumps)]
        if any(one is None for one in own):
            return self.modulate(jumps, forward, Rows(tuple(Span(i, 1) for i in range(len(samples)))))
        return own[0] if all(one is own[0] for one in own) else Modulation.cat(own)

    def _streams(self, mode: int, tokens: Mapping[int, Tensor], prepared: Sequence[Prepared]) -> dict[int, Stream]:
        """The streams of a mode. tokens: of some samples, by number."""
        own = {i: prepared[i] for i in tokens}
        lengths = {i: s.texts if mode == TEXT else (s.lengths[mode],) for i, s in own.items()}
        return {i: Stream(tokens[i], lengths[i], s.table(mode)) for i, s in own.items()}

    def _own_blocks(
        self, mode: int, streams: Mapping[int, Stream], modulation: Modulation, forward: Forward
    ) -> dict[int, Tensor]:
        """Runs the streams of a mode, by sample, through its own blocks. A stream may be empty."""

        @cache
        def layout(samples: tuple[int, ...]) -> Layout:
            own = [streams[i] for i in samples]
            counts = [len(stream.x) for stream in own]
            rows = modulation.rows(samples).own[:, mode]
            which = None if len(rows) == 1 or len(set(counts)) == 1 else run_of_each(counts, rows.device)
            lengths = [n for stream in own for n in stream.lengths if n]
            return Layout(rows, which, Rope.cat([stream.table for stream in own]), lengths)

        def call(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
            return block(x, layout(rows.samples), forward, rows) if len(x) else x

        name = "txt_mode_blocks" if mode == TEXT else f"content_mode_blocks.{MODES[mode]}"
        blocks = cast(Blocks, self.get_submodule(name))
        rows = Rows(tuple(Span(i, len(stream.x), mode == PICTURE) for i, stream in streams.items()))
        x = torch.cat([stream.x for stream in streams.values()])
        if len(rows) or forward.pictures:  # a step cache foretells all stacks, also empty ones
            x = run_blocks(name, blocks, x, call, forward, rows)
        return dict(zip(streams, x.split([len(stream.x) for stream in streams.values()])))

    def _joint_blocks(
        self, x: Tensor, rows: Rows, prepared: Sequence[Prepared], modulation: Modulation, forward: Forward
    ) -> Tensor:
        """Runs all tokens, (N, D), through the joint blocks -> (M, D), of the pictures being drawn."""

        @cache
        def layout(samples: tuple[int, ...]) -> Layout:
            own = [prepared[i] for i in samples]
            chosen = modulation.rows(samples).joint.flatten(0, 1)  # rows of each sample: text, picture, references
            which = run_of_each([n for s in own for n in s.lengths], x.device) % len(chosen)
            lengths, sights = [sum(s.lengths) for s in own], [s.sight for s in own]
            return Layout(chosen, which, Rope.cat([s.rope for s in own]), lengths, sights)

        last = len(self.single_blocks) - 1

        def call(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
            # Only the target rows of the last block are read, so only they run through its second half.
            return block(x, layout(rows.samples), forward, rows, i == last)

        return run_blocks("single_blocks", self.single_blocks, x, call, forward, rows, narrows=True)


class Block(nn.Module):
    """Attention and SwiGLU in parallel, from one modulated norm; each has layers of its own."""

    # Functions of tensors, to compile or to share out; the numbers are the arguments with a row for each token.
    regions: ClassVar = {"enter": (0, 2, 3, 5), "leave": (0, 1, 2, 4, 6)}
    shares: ClassVar = {  # for tensor parallelism, as `nn.parallel.Shares`
        "q_proj": ("out", "heads"),
        "k_proj": ("out", "heads"),
        "v_proj": ("out", "heads"),
        "attn_out": ("in", "heads"),
        "mlp_in": ("out", "hidden", "hidden"),
        "mlp_out": ("in", "hidden"),
    }

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm = QKNorm(dim // heads)
        self.mlp_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, layout: Layout, forward: Forward, rows: Rows, targets_only: bool = False) -> Tensor:
        """x: (N, D) -> alike, or only the targets' rows."""
        modulation, which, table, lengths, sights = layout
        q, k, v, hidden = self.enter(x, modulation, which, table, forward, rows)
        counts = lengths
        if targets_only:
            x, q, hidden = (rows.targets_of(each) for each in (x, q, hidden))
            which = None if which is None else rows.targets_of(which)
            rows, sights = rows.targets, [sight and sight.targets for sight in sights]
            counts = rows.lengths
        seen = attend(q, k, v, counts, lengths, by=forward.attention_by, sights=sights).flatten(1)
        return self.leave(x, seen, hidden, modulation, which, forward, rows)

    def enter(
        self, x: Tensor, modulation: Tensor, which: Tensor | None, table: Rope, forward: Forward, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, E), and the input of the activation, (N, F)."""
        layers = (self.q_proj, self.k_proj, self.v_proj, self.mlp_in)
        normed = modulate(x, modulation, which, forward.unadapted(*layers))
        q, k, v, hidden = (linear(layer, normed, forward, rows) for layer in layers)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in (q, k, v))
        return *self.norm(q, k, table), v, hidden

    def leave(
        self,
        x: Tensor,  # (N, D)
        seen: Tensor,  # (N, D)
        hidden: Tensor,  # (N, F)
        modulation: Tensor,
        which: Tensor | None,
        forward: Forward,
        rows: Rows,
    ) -> Tensor:
        """The block's output, from its input x and the attention's output seen."""
        gate, up = hidden.chunk(2, dim=-1)
        active = silu_times(gate, up, forward.unadapted(self.mlp_out))
        out = linear(self.attn_out, seen, forward, rows) + linear(self.mlp_out, active, forward, rows)
        return add_gated(x, out, modulation, which)


def alike(samples: Sequence[Sample]) -> list[int]:
    """For each sample, the first with the same picture tokens until text joins them, as in classifier-free guidance."""
    keys = [(id(s.x), s.t, s.prepared.to, id(s.around)) for s in samples]
    return [keys.index(key) for key in keys]


def text_positions(length: int) -> Tensor:
    """Text positions count along the last axis: (0, 0, 0, l). -> (length, 4)"""
    positions = torch.zeros(length, 4, dtype=torch.float64)
    positions[:, 3] = torch.arange(length)
    return positions


def picture_positions(grids: Sequence[tuple[int, int]], first: int) -> Tensor:
    """Positions of pictures: (0, row / 2, column / 2, first - i) for picture i. -> (N, 4)"""
    planes = [torch.zeros(0, 4, dtype=torch.float64)]
    for i, grid in enumerate(grids):
        positions = CELL * plane(0, *grid, axes=4).double()
        positions[:, 3] = first - i
        planes.append(positions)
    return torch.cat(planes)
