"""Softmax attention over packed sequences of any length. Each sequence attends only to itself.

`attend` runs torch's attention, or on GPUs a faster backend that is installed: see `BACKENDS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.sight import Sight
from inkstream.types import InputError

BACKENDS = {
    "sdpa": "torch's scaled dot-product attention",
    "varlen": "torch's variable-length attention: needs torch 2.10 or newer and a GPU of Ampere or newer",
    "flash2": "FlashAttention 2: needs `pip install flash-attn` and a GPU of Ampere or newer",
    "flash3": "FlashAttention 3: needs its flash_attn_interface, built from its sources, and a GPU of Hopper",
    "sage": "SageAttention: needs `pip install sageattention` and a GPU of Ampere or newer; rounds to 8 bits",
}
"""The attention backends and what each needs. Only sage gives other numbers than sdpa."""
FOR_EQUAL = ("flash3", "sdpa")
FOR_MIXED = ("flash3", "flash2", "varlen", "sdpa")
"""The order of preference of "auto": for sequences of one length, and of several lengths."""
SAGE_WIDTHS = (64, 96, 128)
LONG = 1024
"""Queries from which each head's tokens are made contiguous on a CPU: a third faster at 2000, slower for fewer."""


def choose_attention(transformer: nn.Module, name: str, device: torch.device) -> None:
    """Sets the attention backend of a transformer. "auto": the fastest one here that gives the same numbers.

    torch's attention runs where the chosen backend cannot (float32, training). Raises as `check_attention` does.
    """
    check_attention(name, device)
    transformer.attention_by = name  # type: ignore[assignment]


def check_attention(name: str, device: torch.device) -> None:
    """Raises InputError for an unknown backend or one that is not available."""
    if name not in ("auto", *BACKENDS):
        raise InputError(f"attention {name} is not known: take auto, {', '.join(BACKENDS)}")
    if name != "auto" and name not in backends_on(device):  # backends are tried out only if one is asked for
        raise InputError(f"attention {name} is not available on {device}: {BACKENDS[name]}. Or take auto")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: Sequence[int],
    k_lengths: Sequence[int],
    causal: bool = False,
    by: str = "auto",
    sights: Sequence[Sight | None] = (),
) -> Tensor:
    """Attention within each sequence. q: (sum(q_lengths), H, E); k, v: (sum(k_lengths), G, E) -> like q.

    k and v may have fewer heads than q: G divides H (grouped-query attention). The scale is 1 / sqrt(E). by: the
    backend, as in `choose_attention`. sights: what the tokens of each sequence see, if not all of them see all.
    """
    if any(sights):
        return attend_in_sight(q, k, v, q_lengths, k_lengths, by, sights)
    runs = [(n, len(list(run))) for n, run in groupby(zip(q_lengths, k_lengths, strict=True))]
    plain = causal or not q.is_cuda or torch.is_grad_enabled() or q.shape[1] != k.shape[1]
    name = "sdpa" if plain else backend_for(q.dtype, q.shape[-1], len(runs) > 1, backends_on(q.device), by)
    if name in ("varlen", "flash2", "flash3"):
        return attend_in_one_pass(name, q, k, v, q_lengths, k_lengths)
    # Neighbours of equal length run as one batch. A trainer sorts its samples by length for this.
    queries, keys = [n * b for (n, _), b in runs], [n * b for (_, n), b in runs]
    parts = [
        attend_evenly(name, some_q, some_k, some_v, b, causal)
        for some_q, some_k, some_v, (_, b) in zip(q.split(queries), k.split(keys), v.split(keys), runs)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_in_sight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: Sequence[int],
    k_lengths: Sequence[int],
    by: str,
    sights: Sequence[Sight | None],
) -> Tensor:
    """`attend` where some sequences have a sight. The others are attended to as they are without them."""
    qs, ks, vs = q.split(list(q_lengths)), k.split(list(k_lengths)), v.split(list(k_lengths))
    parts: list[Tensor] = []
    for sight, run in groupby(range(len(sights)), key=lambda i: sights[i]):
        first, *others = run
        if sight is None:
            own = slice(first, first + 1 + len(others))
            some = torch.cat(qs[own]), torch.cat(ks[own]), torch.cat(vs[own])
            parts.append(attend(*some, q_lengths[own], k_lengths[own], by=by))
        else:
            parts += [attend_in_groups(sight, qs[i], ks[i], vs[i], by) for i in (first, *others)]
    return torch.cat(parts)


def attend_in_groups(sight: Sight, q: Tensor, k: Tensor, v: Tensor, by: str) -> Tensor:
    """`attend` for one sequence with a sight."""
    parts: list[Tensor] = []
    for group in sight.groups:
        some_q, some_k, some_v = q[group.rows], k[group.sees], v[group.sees]
        if group.bias is None:
            parts.append(attend(some_q, some_k, some_v, [len(some_q)], [len(some_k)], by=by))
        else:
            parts.append(attend_evenly("sdpa", some_q, some_k, some_v, 1, False, group.bias))
    return torch.cat(parts)[sight.back]


def attend_evenly(
    name: str, q: Tensor, k: Tensor, v: Tensor, b: int, causal: bool, bias: Tensor | None = None
) -> Tensor:
    """`attend` for b sequences with equal q lengths and equal k lengths. bias: (Lk,), added to the scores; sdpa only"""
    q, k, v = (s.unflatten(0, (b, -1)) for s in (q, k, v))  # (B, L, H, E)
    if name == "sage":
        from sageattention import sageattn  # pyright: ignore[reportMissingImports]

        return sageattn(q, k, v, tensor_layout="NHD", is_causal=causal).flatten(0, 1)
    q, k, v = (s.transpose(1, 2) for s in (q, k, v))  # (B, H, L, E)
    if q.device.type == "cpu" and q.shape[2] >= LONG:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grouped = q.shape[1] != k.shape[1]
    # On a CPU, torch's bfloat16 attention takes four times as long in its backward pass as the float32 one.
    dtype = q.dtype
    if q.device.type == "cpu" and torch.is_grad_enabled():
        q, k, v = q.float(), k.float(), v.float()
    mask = None if bias is None else bias.to(q.dtype).expand(1, 1, 1, -1)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).to(dtype)
    return out.transpose(1, 2).flatten(0, 1)


def attend_in_one_pass(
    name: str, q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]
) -> Tensor:
    """`attend` by a variable-length kernel: one call for sequences of all lengths."""
    ends = ends_of(q_lengths, q.device), ends_of(k_lengths, q.device)
    longest = max(q_lengths), max(k_lengths)
    if name == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, *ends, *longest)
    elif name == "flash2":
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        out = flash_attn_varlen_func(q, k, v, *ends, *longest)
    else:
        from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        out = flash_attn_varlen_func(q, k, v, *ends, *longest)
    return out[0] if isinstance(out, tuple) else out  # older versions return more values


def backend_for(dtype: torch.dtype, width: int, mixed: bool, there: Sequence[str], chosen: str = "auto") -> str:
    """The backend to use, out of `there`. width: of a head; mixed: the sequences have several lengths."""
    if dtype not in (torch.float16, torch.bfloat16) or width > 256 or width % 8:
        return "sdpa"
    if chosen == "auto":
        return next(name for name in (FOR_MIXED if mixed else FOR_EQUAL) if name in there)
    return "sdpa" if chosen == "sage" and width not in SAGE_WIDTHS else chosen


@lru_cache
def backends_on(device: torch.device) -> tuple[str, ...]:
    """The backends that are installed and work on a device."""
    if device.type != "cuda":
        return ("sdpa",)
    capability = torch.cuda.get_device_capability(device)
    has_flash = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None  # not on Windows
    needs = {
        "varlen": find_spec("torch.nn.attention.varlen") and has_flash and capability >= (8, 0),
        "flash2": find_spec("flash_attn") and capability >= (8, 0),
        "flash3": find_spec("flash_attn_interface") and capability[0] == 9,
        "sage": find_spec("sageattention") and capability >= (8, 0),
    }
    return ("sdpa", *(name for name, there in needs.items() if there and works(name, device)))


def works(name: str, device: torch.device) -> bool:
    """Runs a backend once. If it fails, warns and returns False.

    A package is built for one version of torch and for some GPUs.
    """
    q = torch.zeros(2, 1, 64, dtype=torch.float16, device=device)
    try:
        if name == "sage":
            attend_evenly(name, q, q, q, 1, causal=False)
        else:
            attend_in_one_pass(name, q, q, q, [1, 1], [1, 1])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(f"attention {name} fails here and is not used ({reason}): reinstall it", stacklevel=2)
        return False
    return True


def ends_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Cumulative sequence lengths, 0 first: (len(lengths) + 1,) int32. Made on the device, so there is no host sync."""
    recorded = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return _ends(tuple(lengths), device) if recorded else _remembered_ends(tuple(lengths), device)


def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    counts = [torch.full((1,), n, dtype=torch.int32, device=device) for n in (0, *lengths)]
    return torch.cat(counts).cumsum(0, dtype=torch.int32)


_remembered_ends = lru_cache(256)(_ends)
