"""Shared parts of FLUX.1 and FLUX.2: double-stream blocks, then single-stream blocks, over a packed batch.

Text and picture tokens attend together. Double blocks have separate weights for text and picture. Single blocks treat
all tokens alike and run attention and MLP in parallel. Tokens of several samples lie end to end. Each sample attends
only to itself. The caller passes the modulation by time (`Modulation`): FLUX.1 computes it per block, FLUX.2 once for
all blocks of a kind. Module names are those of the single-file releases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.attention import attend
from inkstream.nn.forward import Forward, Rows, Sample, Span, run_blocks
from inkstream.nn.gpu import kernels_for
from inkstream.nn.layers import run_of_each, silu_times
from inkstream.nn.linear import Chain, linear
from inkstream.nn.quant import E4M3, Rounded, all_multiply_fp8
from inkstream.nn.rope import Rope, norm_rope
from inkstream.nn.sight import Sight
from inkstream.nn.stack import Blocks
from inkstream.types import InputError

EPS = 1e-6
FREQUENCIES = 256
QKV = ("heads", "heads", "heads")
KeysValues = tuple[Tensor, Tensor]
"""Keys, with rotary embedding, and values of some tokens in one block, each (L, H, E)."""


@dataclass(frozen=True)
class Modulation:
    """The modulation of all blocks by time, in R rows: one per sample, or one for all samples.

    double: (R, blocks, 2, 6, D). Axis 2: text, picture. Axis 3: shift, scale, gate of attention, then of the MLP.
    single: (R, blocks, 3, D): shift, scale, gate. final: (R, 2, D): shift, scale.
    """

    double: Tensor
    single: Tensor
    final: Tensor

    def row(self, index: int) -> Modulation:
        """The modulation with only one row."""
        rows = slice(index, index + 1)
        return Modulation(self.double[rows], self.single[rows], self.final[rows])

    def of(self, samples: Sequence[int]) -> Modulation:
        """The rows of some samples, or the single row if it is for all samples."""
        if len(self.final) in (1, len(samples)):
            return self
        return Modulation.cat([self.row(i) for i in samples])

    @staticmethod
    def cat(rows: Sequence[Modulation]) -> Modulation:
        """Concatenates the rows of several modulations."""
        return Modulation(*(torch.cat([getattr(m, name) for m in rows]) for name in ("double", "single", "final")))


@dataclass(frozen=True)
class Prepared:
    """The parts of one sample that are constant over its steps. Token order: text, target picture, references."""

    text: Tensor  # (T, D) embedded prompt, then the texts of regions
    references: Tensor  # (R, D) embedded reference pictures that run in every step
    rope: Rope  # rotary table of all tokens
    grid: tuple[int, int]  # rows and columns of the target's patches
    embedding: Tensor  # (D,) of guidance and pooled text; the time embedding is added to it
    channels: Tensor | None = None  # (rows * columns, C') features appended to the target's channels at every step
    memory: Sequence[KeysValues] = ()  # KV cache by block, of references that are read once, before the first step
    modulation: Mapping[float, Modulation] = field(default_factory=dict)  # one row for each foreseen time
    sight: Sight | None = None  # what each token sees, if not all see all

    def at(self, t: float) -> Prepared | None:
        """This sample for time t alone, or None if t was not foreseen."""
        return replace(self, modulation={t: self.modulation[t]}) if t in self.modulation else None

    @property
    def target_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Packing:
    """The layout of the tokens of some samples of a forward, with their KV caches. record: collects keys and values."""

    texts: Rows
    pictures: Rows  # for each sample the target, then its references
    rope: Rope  # in sample order
    memories: list[Sequence[KeysValues]]
    modulation: Modulation
    record: list[KeysValues] | None = None
    sights: Sequence[Sight | None] = ()

    @staticmethod
    def of(
        prepared: Sequence[Prepared],
        modulation: Modulation,
        record: list[KeysValues] | None,
        samples: tuple[int, ...],
    ) -> Packing:
        """Builds the packing of `samples`. prepared, modulation: for all samples of the forward."""
        own = [(i, prepared[i]) for i in samples]
        texts = Rows(tuple(Span(i, len(s.text)) for i, s in own))
        pairs = [(Span(i, s.target_tokens, True), Span(i, len(s.references))) for i, s in own]
        pictures = Rows(tuple(span for pair in pairs for span in pair))
        table = Rope.cat([s.rope for _, s in own])
        memories, sights = [s.memory for _, s in own], [s.sight for _, s in own]
        return Packing(texts, pictures, table, memories, modulation.of(samples), record, sights)

    @cached_property
    def streams(self) -> Rows:
        """The layout for double blocks: all texts, then all pictures."""
        return Rows(self.texts.spans + self.pictures.spans)

    @cached_property
    def woven(self) -> Rows:
        """The layout for single blocks: sample by sample, text before pictures."""
        pairs = zip(self.texts.spans, self.pictures.spans[::2], self.pictures.spans[1::2])
        return Rows(tuple(span for sample in pairs for span in sample))

    def which(self, rows: Rows) -> Tensor | None:
        """The modulation row of each token. None: one row for all, or all samples have equally many tokens."""
        alike = len(self.modulation.final) == 1 or len(set(rows.lengths)) == 1
        return None if alike else run_of_each(rows.lengths, self.rope.cos.device)

    @cached_property
    def stream_which(self) -> tuple[Tensor | None, Tensor | None]:
        """`which` of texts and of pictures."""
        return self.which(self.texts), self.which(self.pictures)

    @cached_property
    def woven_which(self) -> Tensor | None:
        """`which` of samples."""
        return self.which(self.woven)

    @cached_property
    def ropes(self) -> tuple[Rope, Rope]:
        """The rotary tables of all texts, and of all pictures."""
        lengths = [n for sample in zip(self.texts.lengths, self.pictures.lengths) for n in sample]
        cos, sin = self.rope.cos.split(lengths), self.rope.sin.split(lengths)
        pieces = [Rope(*piece) for piece in zip(cos, sin)]
        return Rope.cat(pieces[::2]), Rope.cat(pieces[1::2])

    def remembered(self, block: int) -> list[KeysValues | None]:
        """The KV cache of each sample in a block, or None. Empty where no sample has one.

        Block numbers count double blocks first, then single blocks.
        """
        return [m[block] if m else None for m in self.memories] if any(self.memories) else []


Modulate = Callable[[Sequence[float], Tensor, Forward, Rows], Modulation]
"""(T times, (T or 1, D) embeddings to add to theirs, forward, rows) -> T rows; rows tells the sample of each."""


def foresee(times: Sequence[float], embedding: Tensor, modulate: Modulate, forward: Forward) -> dict[float, Modulation]:
    """Computes the modulation at all these times in one pass. embedding: (D,)"""
    times = list(dict.fromkeys(times))
    rows = modulate(times, embedding.unsqueeze(0), forward, Rows.alone(len(times))) if times else None
    return {t: rows.row(i) for i, t in enumerate(times)} if rows else {}


def modulation_of(samples: Sequence[Sample], modulate: Modulate, forward: Forward) -> Modulation:
    """One modulation row for each sample, or a single shared row: as foreseen, else computed."""
    known = [s.prepared.modulation[s.t] for s in samples if s.t in s.prepared.modulation]
    if len(known) < len(samples):
        rows = Rows(tuple(Span(i, 1) for i in range(len(samples))))
        return modulate([s.t for s in samples], torch.stack([s.prepared.embedding for s in samples]), forward, rows)
    return known[0] if all(m is known[0] for m in known) else Modulation.cat(known)


def run_streams(
    double_blocks: Blocks,
    single_blocks: Blocks,
    targets: Tensor,
    prepared: Sequence[Prepared],
    modulation: Modulation,
    forward: Forward,
    record: list[KeysValues] | None = None,
) -> Tensor:
    """Runs all blocks over a batch. targets: (M, D) embedded patches of the target pictures -> (M, D).

    record: collects each block's keys and values of all tokens. A record of references alone is a `Prepared.memory`.
    """

    @cache
    def pack(samples: tuple[int, ...]) -> Packing:
        return Packing.of(prepared, modulation, record, samples)

    batch = pack(tuple(range(len(prepared))))
    first, last = len(double_blocks), len(single_blocks) - 1

    def call_double(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        own = pack(rows.samples)
        return block(x, own.modulation.double[:, i], own, own.remembered(i), forward)

    def call_single(i: int, block: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        # Only the target rows of the last block are read, so only they run through its second half.
        own = pack(rows.samples)
        return block(x, own.modulation.single[:, i], own, own.remembered(first + i), forward, i == last)

    pictures = weave(targets.split(batch.pictures.targets.lengths), [s.references for s in prepared])
    x = torch.cat([*(s.text for s in prepared), pictures])
    x = run_blocks("double_blocks", double_blocks, x, call_double, forward, batch.streams)
    text, pictures = x.split([len(batch.texts), len(batch.pictures)])
    x = weave(text.split(batch.texts.lengths), pictures.split(batch.pictures.lengths))
    return run_blocks("single_blocks", single_blocks, x, call_single, forward, batch.woven, narrows=True)


class DoubleBlock(nn.Module):
    """Joint attention of text and picture, each with its own weights."""

    apart = ("img_mod", "txt_mod")  # called before the steps
    # Functions of tensors, to compile or to share out; the numbers are the arguments with a row for each token.
    regions: ClassVar = {"enter": (0, 2, 3, 5), "leave": (0, 1, 4, 6)}

    def __init__(self, dim: int, heads: int, hidden: int, gated: bool, bias: bool, modulated: bool):
        """gated: the MLP is a SwiGLU, else a GELU. modulated: the block has its own modulation weights."""
        super().__init__()
        if modulated:
            self.img_mod = Modulator(dim, 6, bias)
            self.txt_mod = Modulator(dim, 6, bias)
        self.img_attn = StreamAttention(dim, heads, bias)
        self.txt_attn = StreamAttention(dim, heads, bias)
        self.img_mlp = mlp(dim, hidden, gated, bias)
        self.txt_mlp = mlp(dim, hidden, gated, bias)
        self.shares = {  # for tensor parallelism, as `nn.parallel.Shares`
            f"{stream}_{layer}": parts
            for stream in ("img", "txt")
            for layer, parts in (
                ("attn.qkv", ("out", *QKV)),
                ("attn.proj", ("in", "heads")),
                ("mlp.0", ("out", *hidden_of(gated))),
                ("mlp.2", ("in", "hidden")),
            )
        }

    def forward(
        self,
        x: Tensor,  # (N, D): the texts of all samples, then their pictures
        modulation: Tensor,  # (R, 2, 6, D)
        batch: Packing,
        remembered: Sequence[KeysValues | None],
        forward: Forward,
    ) -> Tensor:
        rows = batch.texts, batch.pictures
        streams = x.split([len(each) for each in rows])
        of_attention, of_mlp = modulation.chunk(2, dim=2)  # each (R, 2, 3, D)
        text_qkv, picture_qkv = self.enter(streams, of_attention, batch.stream_which, batch.ropes, forward, rows)
        lengths = [each.lengths for each in rows]
        q, k, v = (weave(a.split(lengths[0]), b.split(lengths[1])) for a, b in zip(text_qkv, picture_qkv))
        seen = attend_together(q, k, v, batch, remembered, forward.attention_by)
        pieces = seen.split([n for sample in zip(*lengths) for n in sample])
        seen_by = torch.cat(pieces[::2]), torch.cat(pieces[1::2])
        return self.leave(streams, seen_by, of_attention, of_mlp, batch.stream_which, forward, rows)

    def enter(
        self,
        streams: Sequence[Tensor],  # text and picture, each (L, D)
        modulation: Tensor,  # (R, 2, 3, D)
        which: Sequence[Tensor | None],
        ropes: Sequence[Rope],
        forward: Forward,
        rows: Sequence[Rows],
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of each stream, (L, H, E)."""
        out = []
        for i, (x, attention) in enumerate(zip(streams, (self.txt_attn, self.img_attn))):
            normed = modulate(x, modulation[:, i], which[i], forward.unadapted(attention.qkv))
            out.append(attention.project(normed, ropes[i], forward, rows[i]))
        return out

    def leave(
        self,
        streams: Sequence[Tensor],
        seen: Sequence[Tensor],  # attention output of each stream, (L, D)
        of_attention: Tensor,
        of_mlp: Tensor,
        which: Sequence[Tensor | None],
        forward: Forward,
        rows: Sequence[Rows],
    ) -> Tensor:
        """The block's output, text before picture: (N, D)."""
        out = []
        for i, (attention, mlp) in enumerate(((self.txt_attn, self.txt_mlp), (self.img_attn, self.img_mlp))):
            attended = linear(attention.proj, seen[i], forward, rows[i])
            x = add_gated(streams[i], attended, of_attention[:, i], which[i])
            normed = modulate(x, of_mlp[:, i], which[i], forward.unadapted(mlp[0]))
            out.append(add_gated(x, mlp(normed, forward, rows[i]), of_mlp[:, i], which[i]))
        return torch.cat(out)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over all tokens, with one input layer and one output layer for both."""

    apart = ("modulation",)
    regions: ClassVar = {"enter": (0, 2, 3, 5), "leave": (0, 1, 2, 4, 6)}

    def __init__(self, dim: int, heads: int, hidden: int, gated: bool, bias: bool, modulated: bool):
        """Arguments as in `DoubleBlock`."""
        super().__init__()
        self.heads = heads
        self.width = dim // heads
        if modulated:
            self.modulation = Modulator(dim, 3, bias)
        self.linear1 = nn.Linear(dim, 3 * dim + (2 * hidden if gated else hidden), bias)
        self.linear2 = nn.Linear(dim + hidden, dim, bias)
        self.norm = QKNorm(self.width)
        self.activation = activation(gated)
        self.shares = {"linear1": ("out", *QKV, *hidden_of(gated)), "linear2": ("in", "heads", "hidden")}

    def forward(
        self,
        x: Tensor,  # (N, D), sample by sample
        modulation: Tensor,  # (R, 3, D)
        batch: Packing,
        remembered: Sequence[KeysValues | None],
        forward: Forward,
        targets_only: bool = False,  # compute only the targets' rows
    ) -> Tensor:
        which, rows = batch.woven_which, batch.woven
        q, k, v, hidden = self.enter(x, modulation, which, batch.rope, forward, rows)
        seen = attend_together(q, k, v, batch, remembered, forward.attention_by, targets_only)
        if targets_only:
            x, hidden, rows = rows.targets_of(x), rows.targets_of(hidden), rows.targets
            which = batch.which(rows)
        return self.leave(x, seen, hidden, modulation, which, forward, rows)

    def enter(
        self, x: Tensor, modulation: Tensor, which: Tensor | None, table: Rope, forward: Forward, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, H, E), and the input of the activation, (N, F)."""
        width = 3 * self.heads * self.width
        normed = modulate(x, modulation, which, forward.unadapted(self.linear1))
        both = linear(self.linear1, normed, forward, rows)
        qkv, hidden = both.split([width, both.shape[-1] - width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
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
        out = linear(self.linear2, torch.cat((seen, self.activation(hidden)), dim=-1), forward, rows)
        return add_gated(x, out, modulation, which)


class FinalLayer(nn.Module):
    """Modulated norm, then projection to patches."""

    def __init__(self, dim: int, out: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(dim, out, bias)
        self.adaLN_modulation = Chain(nn.SiLU(), nn.Linear(dim, 2 * dim, bias))

    def modulation(self, vec: Tensor, forward: Forward, rows: Rows) -> Tensor:
        """vec: (T, D) -> shift, scale: (T, 2, D)."""
        return self.adaLN_modulation(vec, forward, rows).unflatten(-1, (2, -1))

    def forward(self, x: Tensor, modulation: Tensor, forward: Forward, rows: Rows) -> Tensor:
        """x: (N, D), each sample's rows end to end. modulation: (R, 2, D), a row for each sample, or one for all."""
        which = None if len(modulation) == 1 else run_of_each(rows.lengths, x.device)
        return linear(self.linear, modulate(x, modulation, which, forward.unadapted(self.linear)), forward, rows)


class StreamAttention(nn.Module):
    """The projections of one stream into the joint attention and out of it."""

    def __init__(self, dim: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.norm = QKNorm(dim // heads)
        self.proj = nn.Linear(dim, dim, bias)

    def project(self, x: Tensor | Rounded, table: Rope, forward: Forward, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """x: (L, D) -> q and k, after norm and rotation, and v, each (L, H, E)."""
        q, k, v = linear(self.qkv, x, forward, rows).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return *self.norm(q, k, table), v


class QKNorm(nn.Module):
    """RMS norms of queries and keys over each head's features, then rotary embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.query_norm = Scale(width)
        self.key_norm = Scale(width)

    def forward(self, q: Tensor, k: Tensor, table: Rope) -> tuple[Tensor, Tensor]:
        return norm_rope(q, self.query_norm.scale, table, EPS), norm_rope(k, self.key_norm.scale, table, EPS)


class Scale(nn.Module):
    """The weight of an RMS norm, under the name in the releases."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class Modulator(nn.Module):
    """Time embedding to shifts, scales and gates. vec: (T, D) -> (T, parts, D)."""

    def __init__(self, dim: int, parts: int, bias: bool):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dim, parts * dim, bias)

    def forward(self, vec: Tensor, forward: Forward, rows: Rows) -> Tensor:
        return linear(self.lin, F.silu(vec), forward, rows).unflatten(-1, (self.parts, -1))


class Embedder(nn.Module):
    """Two linear layers around a SiLU, for times, guidance and pooled text."""

    def __init__(self, width: int, dim: int, bias: bool):
        super().__init__()
        self.in_layer = nn.Linear(width, dim, bias)
        self.out_layer = nn.Linear(dim, dim, bias)

    def forward(self, x: Tensor, forward: Forward, rows: Rows) -> Tensor:  # (T, width) -> (T, D)
        hidden = linear(self.in_layer, x.to(self.in_layer.weight.dtype), forward, rows)
        return linear(self.out_layer, F.silu(hidden), forward, rows)

    def numbers(self, values: Sequence[float], forward: Forward, rows: Rows) -> Tensor:
        """Embeds times or guidance: sinusoids of 1000 * value, cosines first, through the layers. -> (T, D)"""
        half = FREQUENCIES // 2
        device = self.in_layer.weight.device
        thousandths = torch.tensor([1000 * value for value in values], dtype=torch.float32, device=device)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=device) / half)
        angle = thousandths[:, None] * frequencies
        return self(torch.cat((angle.cos(), angle.sin()), dim=-1), forward, rows)


class SwiGLU(nn.Module):
    """silu(first half) * second half."""

    def forward(self, x: Tensor) -> Tensor | Rounded:  # (N, 2 D) -> (N, D)
        gate, up = x.chunk(2, dim=-1)
        return silu_times(gate, up)


def embed_guidance(embedder: Embedder | None, guidance: float | None, forward: Forward) -> Tensor | None:
    """Returns (1, D), or None for a model without guidance.

    Raises InputError if the guidance is missing, or is given to a model without guidance.
    """
    if embedder is None:
        if guidance is not None:
            raise InputError(f"guidance {guidance} is given, but this model takes none: give None")
        return None
    if guidance is None:
        raise InputError("guidance is None, but this model needs one: give a number, such as 3.5")
    return embedder.numbers([guidance], forward, Rows.alone(1))


def hidden_of(gated: bool) -> tuple[str, ...]:
    """The parts of an activation's input, as in `nn.parallel.Shares`."""
    return ("hidden", "hidden") if gated else ("hidden",)


def activation(gated: bool) -> nn.Module:
    return SwiGLU() if gated else nn.GELU(approximate="tanh")


def mlp(dim: int, hidden: int, gated: bool, bias: bool) -> Chain:
    first = nn.Linear(dim, 2 * hidden if gated else hidden, bias)
    return Chain(first, activation(gated), nn.Linear(hidden, dim, bias))


def attend_together(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Packing,
    remembered: Sequence[KeysValues | None],
    by: str,
    targets_only: bool = False,
) -> Tensor:
    """Attention within each sample and to its KV cache.

    q, k, v: (N, H, E), sample by sample -> (N, D), or only the targets' rows. Cached keys come after a sample's own
    keys. The releases may order them otherwise, but the order of keys does not change attention. by: as in `attend`.
    """
    if batch.record is not None:
        batch.record.append((k, v.contiguous()))  # v may be a view that would keep the whole projection alive
    lengths = visible = batch.woven.lengths
    if remembered:
        keys, values = ([None if kv is None else kv[i] for kv in remembered] for i in (0, 1))
        k, v = weave(k.split(lengths), keys), weave(v.split(lengths), values)
        visible = [n if past is None else n + len(past) for n, past in zip(lengths, keys)]
    sights = batch.sights
    if targets_only:
        q, lengths = batch.woven.targets_of(q), batch.woven.targets.lengths
        sights = [sight and sight.targets for sight in sights]
    return attend(q, k, v, lengths, visible, by=by, sights=sights).flatten(1)


def weave(*streams: Iterable[Tensor | None]) -> Tensor:
    """Interleaves streams sample by sample. A stream has for each sample a tensor (L, ...), or None."""
    return torch.cat([piece for sample in zip(*streams, strict=True) for piece in sample if piece is not None])


def modulate(x: Tensor, modulation: Tensor, which: Tensor | None, readers: Sequence[nn.Module]) -> Tensor | Rounded:
    """Layer norm, then scale and shift. x: (N, D); modulation: (R, 2 or 3, D): shift, scale.

    which: the row of each token, as from `Packing.which`. readers: the layers that take the result; it is rounded to 8
    bits if all of them multiply 8-bit floats.
    """
    shift, scale = modulation[:, 0], modulation[:, 1]
    if fused := kernels_for(x):
        if all_multiply_fp8(readers, x):
            return Rounded(x.dtype, *fused.modulated_norm(x, shift, scale, EPS, which, into=E4M3))
        return fused.modulated_norm(x, shift, scale, EPS, which)
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(spread(shift, which, len(x)), normed, 1 + spread(scale, which, len(x)))


def add_gated(x: Tensor, out: Tensor, modulation: Tensor, which: Tensor | None) -> Tensor:
    """x + gate * out. x, out: (N, D); modulation: (R, 3, D), the gate last; which: as in `modulate`."""
    return torch.addcmul(x, spread(modulation[:, 2], which, len(x)), out)


def spread(values: Tensor, which: Tensor | None, count: int) -> Tensor:
    """A row for each of `count` tokens. values: (R, D) -> (count, D); a single row is returned as it is."""
    if which is not None:
        return values.index_select(0, which)
    if len(values) == 1:
        return values
    return values.unsqueeze(1).expand(-1, count // len(values), -1).flatten(0, 1)


def patchify(x: Tensor, p: int) -> Tensor:
    """(C, h, w) -> (h/p * w/p, C*p*p): patches row by row; within a patch channel, row, column, with column fastest."""
    c, h, w = x.shape
    return x.reshape(c, h // p, p, w // p, p).permute(1, 3, 0, 2, 4).reshape(-1, c * p * p)


def unpatchify(x: Tensor, rows: int, columns: int, p: int) -> Tensor:
    """The inverse of patchify. (rows * columns, C*p*p) -> (C, rows * p, columns * p)."""
    return x.reshape(rows, columns, -1, p, p).permute(2, 0, 3, 1, 4).reshape(-1, rows * p, columns * p)


def plane(at: int, rows: int, columns: int, axes: int) -> Tensor:
    """Positions (at, r, c, 0 ...) for all r and c, row by row. -> (rows * columns, axes)"""
    positions = torch.zeros(rows, columns, axes, dtype=torch.long)
    positions[..., 0] = at
    positions[..., 1] = torch.arange(rows)[:, None]
    positions[..., 2] = torch.arange(columns)
    return positions.flatten(0, 1)
