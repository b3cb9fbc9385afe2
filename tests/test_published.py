"""Calls into others' GPU functions are as these are published, and within their limits.

torch's are checked against the torch that is installed: by signature, and by what it computes of shapes alone, for
which it takes a GPU as given. FlashAttention cannot be installed without a GPU, so its signatures are written down.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from inkstream.nn import attention, quant
from inkstream.quant.packed import Packed
from pretend import Machine, by_sequences, here

E4M3 = torch.float8_e4m3fn
WIDTHS = [32, 64, 72, 128, 256]
"""Of heads; 72 are SigLIP2's."""


@dataclass(frozen=True)
class Published:
    """A function for packed sequences. Its first seven arguments are q, k, v, where sequences end, and the longest."""

    module: str
    source: str
    names: str
    multiple: int  # of a head's width
    capability: tuple[int, int]


FLASH = {
    "flash2": Published(
        "flash_attn",
        "https://github.com/Dao-AILab/flash-attention/blob/0053002/flash_attn/flash_attn_interface.py",
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 softmax_scale=None causal=False "
        "window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False "
        "block_table=None",
        1,  # it fills up what is no multiple of 8
        (8, 0),
    ),
    "flash3": Published(
        "flash_attn_interface",
        "https://github.com/Dao-AILab/flash-attention/blob/01afd16/hopper/flash_attn_interface.py",
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None seqused_k=None softmax_scale=None "
        "causal=False qv=None q_descale=None k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 "
        "softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False",
        8,
        (9, 0),
    ),
}
"""As published on the day of the commit. Limits: csrc/flash_attn/flash_api.cpp and hopper/flash_api.cpp there."""


def install(name: str, monkeypatch, calls: list[str]) -> None:
    """A package with that one function, which computes what it is asked for, and takes nothing else."""
    published = FLASH[name]
    head = ", ".join(published.names.split())
    signature = inspect.signature(eval(f"lambda {head}: None"))

    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        assert {*bound.arguments} == {*[*signature.parameters][:7]}  # the scale and all else are as they are by default
        check_packed(*args, multiple=published.multiple)
        calls.append(name)
        return here().compute(by_sequences, args, {})

    module = ModuleType(published.module)
    module.__spec__ = ModuleSpec(published.module, None)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, published.module, module)


def check_packed(
    q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, longest_q: Any, longest_k: Any, multiple: int
) -> None:
    """The limits of FlashAttention's kernels, and of torch's copy of them
    (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_fwd)."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert k.dtype == v.dtype == q.dtype
    assert all(x.is_cuda and x.ndim == 3 and x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[2] <= 256
    assert q.shape[2] % multiple == 0
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert all(e.dtype == torch.int32 and e.is_contiguous() and e.is_cuda and e.ndim == 1 for e in (ends_q, ends_k))
    assert isinstance(longest_q, int)
    assert isinstance(longest_k, int)


def packed_heads(width: int, lengths: list[int]) -> list[torch.Tensor]:
    """Queries, keys and values of one projection, as blocks give them: views of it."""
    qkv = torch.randn(sum(lengths), 3 * 2 * width, generator=torch.Generator().manual_seed(width)).bfloat16()
    return [*qkv.unflatten(-1, (3, 2, width)).unbind(1)]


@pytest.mark.parametrize("width", [*WIDTHS, 6, 320])
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_called_as_it_is_published(monkeypatch, name, width):
    calls: list[str] = []
    install(name, monkeypatch, calls)
    lengths = [5, 3, 3]
    q, k, v = packed_heads(width, lengths)
    with torch.inference_mode():
        plain = attention.attend(q, k, v, lengths, lengths)
        with Machine(capability=FLASH[name].capability, has_flash=False).plugged_in():
            assert attention.backends_on(torch.device("cuda", 0)) == ("sdpa", name)
            calls.clear()
            qkv = torch.stack((q, k, v), 1).to("cuda").unbind(1)
            out = attention.attend(*qkv, lengths, lengths).to("cpu")
    assert (out - plain).norm() < 0.01 * plain.norm()
    assert calls == ([name] if width in WIDTHS else [])


@pytest.mark.parametrize("name", FLASH)
def test_a_package_that_does_not_work_is_left_out_and_named(monkeypatch, tmp_path, name):
    folder = tmp_path / FLASH[name].module
    folder.mkdir()
    (folder / "__init__.py").write_text('raise ImportError("undefined symbol: _ZN3c105ErrorC2E")')
    monkeypatch.syspath_prepend(tmp_path)
    with Machine(capability=FLASH[name].capability, has_flash=False).plugged_in():
        with pytest.warns(UserWarning, match=rf"attention {name} fails here and is not used \(undefined symbol"):
            assert attention.backends_on(torch.device("cuda", 0)) == ("sdpa",)
        assert attention.backends_on(torch.device("cuda", 0)) == ("sdpa",)  # and not said again


def test_torchs_kernel_for_packed_sequences_is_asked_only_where_it_was_built():
    there = torch.device("cuda", 0)
    for has_flash, capability in ((True, (8, 0)), (False, (8, 0)), (True, (7, 5))):
        with Machine(capability=capability, has_flash=has_flash).plugged_in():
            assert attention.backends_on(there) == (
                ("sdpa", "varlen") if (has_flash, capability[0]) == (True, 8) else ("sdpa",)
            )


@pytest.mark.parametrize("width", WIDTHS)
def test_torchs_kernel_for_packed_sequences_is_called_as_this_torch_has_it(monkeypatch, width):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")
    signature, bound = inspect.signature(varlen.varlen_attn), []
    called: Callable[..., Any] = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: bound.append(signature.bind(*a, **k)) or called(*a, **k))
    q, k, v = (x.to("meta") for x in packed_heads(width, [5, 3]))
    out = attention.attend_in_one_pass("varlen", q, k, v, [5, 3], [5, 3])
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    given = bound[0].arguments
    assert [*given] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert (given["cu_seq_q"].shape, given["cu_seq_q"].dtype, given["max_q"]) == ((3,), torch.int32, 5)


def e4m3(outputs: int, inputs: int, scales: int, bias: bool) -> tuple[Packed, torch.Tensor | None]:
    """A weight without data, with a scale a row or one of all."""
    data = torch.empty(outputs, inputs, dtype=torch.uint8, device="meta")
    scale = torch.empty(scales, 1, device="meta")
    own = torch.empty(outputs, dtype=torch.bfloat16, device="meta") if bias else None
    return Packed("e4m3", data, (outputs, inputs), (scale,), dynamic=True), own


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (48, 80), (24, 32), (32, 24), (16, 20)])
@pytest.mark.parametrize("by_rows", [True, False])
def test_products_of_8_bit_floats_are_those_this_torch_takes(monkeypatch, outputs, inputs, by_rows, bias):
    """What torch refuses is not asked of it, and what it takes is."""
    monkeypatch.setattr(quant, "has_fp8", lambda device: True)
    weight, own = e4m3(outputs, inputs, outputs if by_rows else 1, bias)
    x = torch.empty(7, inputs, dtype=torch.bfloat16, device="meta")
    if quant.multiplies_fp8(weight, x):
        out = quant.multiply_fp8(x, weight, own)
        assert (out.shape, out.dtype) == ((7, outputs), torch.bfloat16)
    else:
        with pytest.raises(RuntimeError, match="divisible by 16"):
            quant.multiply_fp8(x, weight, own)
