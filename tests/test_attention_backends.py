"""Whoever computes attention is asked for what it can do, in its own way, and gives the same numbers."""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_BASE_4B
from inkstream.families.zimage.model import ZImageTransformer
from inkstream.families.zimage.specs import BASE
from inkstream.nn import attention
from inkstream.nn.attention import BACKENDS, attend, attend_evenly, attend_in_one_pass, backend_for, choose_attention
from inkstream.types import InputError, Request

ALL = tuple(BACKENDS)
CPU = torch.device("cpu")


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lengths: list[int], k_lengths: list[int]):
    """Each sequence by itself, in float64. q: (L, H, E)"""
    out = []
    for q1, k1, v1 in zip(q.double().split(q_lengths), k.double().split(k_lengths), v.double().split(k_lengths)):
        scores = torch.einsum("ihe,jhe->hij", q1, k1) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hij,jhe->ihe", scores.softmax(-1), v1))
    return torch.cat(out)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "one": ([5], [5]),
    "equal": ([3, 3], [3, 3]),
    "mixed": ([2, 5, 5, 1], [2, 5, 5, 1]),
    "more keys than queries": ([2, 3], [7, 4]),
    "long": ([attention.LONG + 1], [attention.LONG + 1]),
}
cases = pytest.mark.parametrize(("q_lengths", "k_lengths"), CASES.values(), ids=CASES)


def drawn(q_lengths: list[int], k_lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = [(sum(q_lengths), 3, 8), *[(sum(k_lengths), 3, 8)] * 2]
    return tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes))  # type: ignore[return-value]


@cases
def test_torchs_own_attends_within_each_sequence(q_lengths, k_lengths):
    q, k, v = drawn(q_lengths, k_lengths)
    with torch.inference_mode():
        out = attend(q, k, v, q_lengths, k_lengths)
    assert torch.allclose(out.double(), exact(q, k, v, q_lengths, k_lengths), atol=1e-5)


def stand_in(called: str, compute) -> ModuleType:
    """A package that is not installed here, computing what its documentation says."""
    name, _, function = called.rpartition(".")
    module = ModuleType(name)
    setattr(module, function, compute)
    return module


def by_ends(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """The contract of every kernel for packed sequences."""
    lengths = [[b - a for a, b in pairwise(ends.tolist())] for ends in (cu_seqlens_q, cu_seqlens_k)]
    assert (cu_seqlens_q.dtype, cu_seqlens_k.dtype) == (torch.int32, torch.int32)
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths[0]), max(lengths[1]))
    return exact(q, k, v, *lengths).to(q.dtype)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("varlen", "torch.nn.attention.varlen.varlen_attn"),
        ("flash2", "flash_attn.flash_attn_varlen_func"),
        ("flash3", "flash_attn_interface.flash_attn_varlen_func"),
    ],
)
@cases
def test_kernels_for_packed_sequences_are_told_where_these_end(monkeypatch, name, called, q_lengths, k_lengths):
    monkeypatch.setitem(sys.modules, called.rpartition(".")[0], stand_in(called, by_ends))
    q, k, v = drawn(q_lengths, k_lengths)
    out = attend_in_one_pass(name, q, k, v, q_lengths, k_lengths)
    assert torch.allclose(out, attend(q, k, v, q_lengths, k_lengths), atol=1e-5)


def test_a_kernel_may_give_more_than_its_answer(monkeypatch):
    called = "flash_attn_interface.flash_attn_varlen_func"
    module = stand_in(called, lambda *args: (by_ends(*args), "the sums of exponentials"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    q, k, v = drawn([2, 3], [2, 3])
    assert torch.equal(attend_in_one_pass("flash3", q, k, v, [2, 3], [2, 3]), by_ends(q, k, v, *ends([2, 3]), 3, 3))


def ends(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    one = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return one, one


def test_sage_takes_sequences_of_one_length_side_by_side(monkeypatch):
    def sageattn(q, k, v, tensor_layout, is_causal):
        assert (q.shape, tensor_layout, is_causal) == ((2, 3, 3, 8), "NHD", False)  # (B, L, H, E)
        lengths = [q.shape[1]] * len(q)
        return exact(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), lengths, lengths).unflatten(0, (2, 3))

    monkeypatch.setitem(sys.modules, "sageattention", stand_in("sageattention.sageattn", sageattn))
    q, k, v = drawn([3, 3], [3, 3])
    out = attend_evenly("sage", q, k, v, 2, causal=False)
    assert torch.allclose(out.float(), attend(q, k, v, [3, 3], [3, 3]), atol=1e-5)


def test_the_fastest_that_is_there_is_taken_by_itself():
    def taken(there: tuple[str, ...]) -> list[str]:
        return [backend_for(torch.bfloat16, 128, mixed, there) for mixed in (False, True)]

    assert taken(ALL) == ["flash3", "flash3"]
    assert taken(("sdpa", "varlen", "flash2", "sage")) == ["sdpa", "flash2"]
    assert taken(("sdpa", "varlen")) == ["sdpa", "varlen"]
    assert taken(("sdpa",)) == ["sdpa", "sdpa"]
    assert backend_for(torch.float32, 128, True, ALL) == "sdpa"  # the others know 16 bits
    assert backend_for(torch.bfloat16, 512, True, ALL) == "sdpa"


def test_what_was_chosen_is_taken_wherever_it_can_be():
    assert backend_for(torch.bfloat16, 128, True, ALL, "sage") == "sage"
    assert backend_for(torch.bfloat16, 48, True, ALL, "sage") == "sdpa"
    assert backend_for(torch.float16, 128, False, ALL, "flash2") == "flash2"


@pytest.mark.parametrize("spec", [BASE, DEV, KLEIN_BASE_4B], ids=lambda spec: spec.family)
def test_a_choice_is_one_models_own_and_reaches_its_attention(build, spec, monkeypatch):
    asked: list[str] = []
    module = importlib.import_module("inkstream.nn.flux" if spec.family != "zimage" else ZImageTransformer.__module__)
    monkeypatch.setattr(module, "attend", lambda *given, by, **more: asked.append(by) or attend(*given, by=by, **more))
    with torch.no_grad():
        chosen, other = build(spec.tiny), build(spec.tiny)
    choose_attention(chosen.family.transformer, "sdpa", CPU)
    wish = Request(prompt="a fox", width=32, height=32, steps=1, guidance=1.0)
    for model, name in ((chosen, "sdpa"), (other, "auto")):
        asked.clear()
        model.sample(wish, model.encode(wish))
        assert set(asked) == {name}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flash9", "attention flash9 is not known: take auto, sdpa, varlen, flash2, flash3, sage"),
        ("flash2", "attention flash2 is not available on cpu: .*`pip install flash-attn`.* Or take auto"),
        ("flash3", "attention flash3 is not available on cpu: .*flash_attn_interface, built from its sources"),
        ("varlen", "attention varlen is not available on cpu: .*torch 2.10"),
        ("sage", "attention sage is not available on cpu: .*`pip install sageattention`"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_what_it_needs(name, said):
    transformer = torch.nn.Module()
    choose_attention(transformer, "sdpa", CPU)
    with pytest.raises(InputError, match=said):
        choose_attention(transformer, name, CPU)
    assert transformer.attention_by == "sdpa"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU whose backends could be compared")
@cases
def test_every_backend_on_this_gpu_gives_the_same_numbers(q_lengths, k_lengths):
    device = torch.device("cuda", 0)
    long = [[16 * n for n in lengths] for lengths in (q_lengths, k_lengths)]
    q, k, v = (normal(sum(n), 3, 128, seed=i).to(device, torch.bfloat16) for i, n in enumerate((*long, long[1])))
    for name in attention.backends_on(device):
        with torch.inference_mode():
            out = attend(q, k, v, *long, by=name)
        apart = (out.double() - exact(q, k, v, *long)).norm() / exact(q, k, v, *long).norm()
        assert apart < (0.05 if name == "sage" else 0.01), name
