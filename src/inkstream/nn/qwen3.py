"""Qwen3 as a text encoder: prompts are packed end to end, and layers after the deepest state read are not built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.attention import attend
from inkstream.nn.config import Qwen3Config
from inkstream.nn.gpu import kernels_for
from inkstream.nn.layers import silu_times
from inkstream.nn.stack import Blocks, visits

Past = tuple[Tensor, Tensor]
"""The KV cache of one layer: keys and values (L, G, E) of the tokens so far."""


class Qwen3(nn.Module):
    """The decoder of Qwen3 (arXiv 2505.09388) without its head. It returns hidden states.

    `depths` are the states to return: 0 is the embedding, k is the output of layer k, before any final norm. Default:
    the last but one of the published layer count, as in Z-Image. Deeper layers are not built. pads_at: the position of
    all padding tokens; None: padding is counted on from the text.
    """

    def __init__(self, config: Qwen3Config, depths: Sequence[int] | None = None, pads_at: int | None = None):
        super().__init__()
        self.config = config
        self.pads_at = pads_at
        self.depths = tuple(depths) if depths is not None else (config.num_hidden_layers - 1,)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Blocks(Layer(config) for _ in range(max(self.depths)))

    def forward(self, ids: Tensor, lengths: Sequence[int], texts: Sequence[int] | None = None) -> Tensor:
        """ids: (sum(lengths),), prompts end to end -> (sum(lengths), D * len(depths)).

        A prompt's states do not depend on the prompts that it is packed with. texts: the number of text tokens of each
        prompt, at least one; the tokens after them are padding. Default: all tokens are text.
        """
        x = self.embed_tokens(ids)  # (L, D)
        counted = lengths if texts is None or self.pads_at is None else texts
        table = rope(lengths, self.config.head_dim, self.config.rope_theta, ids.device, counted, self.pads_at or 0)
        read = {0: x}  # hidden states by depth, only those to return
        for i, layer in visits(self.layers):
            x = layer(x, table, lengths, lengths if texts is None else texts)
            if i + 1 in self.depths:
                read[i + 1] = x
        return torch.cat([read[depth] for depth in self.depths], dim=-1)


class Layer(nn.Module):
    """Causal attention and SwiGLU, each after a norm and with a residual connection."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], lengths: Sequence[int], texts: Sequence[int]
    ) -> Tensor:  # x: (L, D)
        x = x + self.self_attn(self.input_layernorm(x), table, lengths, texts)
        return x + self.mlp(self.post_attention_layernorm(x))

    def extend(self, x: Tensor, table: tuple[Tensor, Tensor], past: Past | None) -> tuple[Tensor, Past]:
        """Runs one sequence with a KV cache: the whole prompt first (past is None), then one token a call."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), table)
        if past is not None:
            k, v = torch.cat((past[0], k)), torch.cat((past[1], v))
        out = attend(q, k, v, [len(q)], [len(k)], causal=past is None)
        x = x + self.self_attn.o_proj(out.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x)), (k, v)


class Attention(nn.Module):
    """Grouped-query causal attention; queries and keys get a norm per head, then rotary embedding."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (L, H, E), keys and values (L, G, E); queries and keys are rotated. x: (L, D)."""
        heads = (-1, self.head_dim)
        q = norm_rope(self.q_proj(x).unflatten(-1, heads), self.q_norm, table)
        k = norm_rope(self.k_proj(x).unflatten(-1, heads), self.k_norm, table)
        return q, k, self.v_proj(x).unflatten(-1, heads)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], lengths: Sequence[int], texts: Sequence[int]
    ) -> Tensor:  # x: (L, D)
        q, k, v = self.project(x, table)
        if tuple(texts) == tuple(lengths):
            out = attend(q, k, v, lengths, lengths, causal=True)
        else:
            out = attend_padded(q, k, v, lengths, texts)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """down(silu(gate x) * up x), no biases."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_times(self.gate_proj(x), self.up_proj(x), [self.down_proj]))


def attend_padded(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], texts: Sequence[int]) -> Tensor:
    """Causal attention for padded sequences: padding tokens attend to all of the text and to no padding token.

    A padding token does not see itself either. This equals a causal mask joined with a mask of the padded keys. Models
    trained on such states need it.
    """
    out = []
    for q_one, k_one, v_one, text in zip(*(x.split(list(lengths)) for x in (q, k, v)), texts, strict=True):
        k_text, v_text = k_one[:text], v_one[:text]
        out.append(attend(q_one[:text], k_text, v_text, [text], [text], causal=True))
        if padding := len(q_one) - text:
            out.append(attend(q_one[text:], k_text, v_text, [padding], [text]))
    return torch.cat(out)


def rope(
    lengths: Sequence[int],
    dim: int,
    theta: float,
    device: torch.device,
    counted: Sequence[int] | None = None,
    others_at: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token; each prompt's positions start at 0. Two of (L, 1, E / 2), float32.

    counted: how many tokens of each prompt are counted, by default all. Those after them are at position `others_at`.
    """
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    spans = zip(lengths, lengths if counted is None else counted, strict=True)
    pieces = [F.pad(torch.arange(n, device=device), (0, length - n), value=others_at) for length, n in spans]
    positions = torch.cat(pieces).float()
    angle = torch.outer(positions, frequencies).unsqueeze(1)
    return angle.cos(), angle.sin()


def norm_rope(x: Tensor, norm: nn.RMSNorm, table: tuple[Tensor, Tensor]) -> Tensor:
    """RMS norm of queries or keys over each head's features, then rotation. x: (L, H, E) -> the same."""
    if fused := kernels_for(x):
        return fused.norm_rope(x, norm.weight, *table, norm.eps, halves=True)
    return rotate(norm(x), table)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates each pair (i, i + E/2) of features by its angle, in float32. x: (L, H, E) -> the same."""
    cos, sin = table
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
