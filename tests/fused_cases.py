"""What test_fused.py runs in a process of its own: the fused kernels beside the plain operations they stand in for.

    TRITON_INTERPRET=1 pytest tests/fused_cases.py    # on the CPU, in Triton's interpreter
    pytest tests/fused_cases.py                       # compiled, on a GPU

The interpreter cuts numbers off where a GPU rounds them to bfloat16, and misses carries on the way to 8 bits, so there
those two types are held to less.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from inkstream.families.flux2.model import Flux2Transformer
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.model import Block, Targets, line
from inkstream.families.zimage.specs import TURBO
from inkstream.nn import flux, fused, gpu, layers, quant, qwen3, vae
from inkstream.nn import rope as ropes
from inkstream.nn.config import Qwen3Config
from inkstream.nn.forward import PLAIN, Rows, Sample, Span
from inkstream.quant.pack import pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Triton's interpreter


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def both(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the kernels and without."""
    gpu.fused_devices.add(DEVICE.type)
    try:
        ours = compute()
        gpu.fused_devices.clear()
        return ours, compute()
    finally:
        gpu.fused_devices.clear()


def assert_near(ours: torch.Tensor, plain: torch.Tensor, roundings: float = 1) -> None:
    """Apart by no more than that many roundings of the largest number, and of the right kind."""
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    step = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[plain.dtype]
    roundings *= 2 if INTERPRETED and plain.dtype == torch.bfloat16 else 1
    apart, size = (ours.double() - plain.double()).abs(), plain.double().abs()
    assert torch.isfinite(ours).all()
    assert not (apart > roundings * step * (size + 0.3 * size.max())).any(), apart.max()


@pytest.mark.parametrize("tokens", [None, (0, 2, 2, 1, 0, 1)], ids=["runs", "rows"])
@pytest.mark.parametrize("width", [45, 64] if DEVICE.type == "cuda" else [45])
@dtypes
def test_a_norm_of_tokens_that_differ_in_its_weight(dtype, width, tokens):
    x, weight = normal(6, width, dtype=dtype) * 3, normal(3, 4, width, dtype=dtype, seed=1)[:, 1]  # rows far apart
    rows = None if tokens is None else torch.tensor(tokens, device=DEVICE)
    assert_near(*both(lambda: layers.rms_norm(x, weight, 1e-5, rows)), roundings=2)
    y = normal(6, width, dtype=dtype, seed=2)
    assert_near(*both(lambda: layers.add_norm(y, x, weight, 1e-5, rows)), roundings=3)


@dtypes
def test_a_norm_whose_weight_all_tokens_share(dtype):
    x, weight = normal(5, 40, dtype=dtype), normal(40, dtype=dtype, seed=1)
    assert_near(*both(lambda: layers.rms_norm(x, weight, 1e-5)))
    assert_near(*both(lambda: layers.rms_norm(x, weight[None], 1e-5)))
    assert_near(*both(lambda: layers.rms_norm(1e-4 * x, weight, 1e-5)))  # where eps counts
    assert torch.equal(*both(lambda: layers.rms_norm(x[:0], weight, 1e-5)))


@pytest.mark.parametrize(("runs", "lengths"), [(1, None), (3, None), (3, [1, 3, 2])], ids=["one", "equal", "mixed"])
@dtypes
def test_a_modulated_layer_norm(dtype, runs, lengths):
    x, modulation = normal(6, 45, dtype=dtype) + 5, normal(runs, 2, 3, 45, dtype=dtype, seed=1)[:, 1]
    rows, linear = lengths and layers.run_of_each(lengths, DEVICE), torch.nn.Linear(45, 45)
    assert_near(*both(lambda: flux.modulate(x, modulation, rows, [linear])), roundings=2)


@pytest.mark.parametrize(("heads", "width"), [(3, 32), (1, 6)])
@dtypes
def test_queries_normed_and_turned(dtype, heads, width):
    q, k, v = normal(5, 3 * heads * width, dtype=dtype).unflatten(-1, (3, heads, width)).unbind(1)
    table = ropes.rope(torch.arange(5)[:, None] + 1, (width,), 100.0, DEVICE)
    weight = normal(width, dtype=dtype, seed=1)
    for x in (q, k):
        assert_near(*both(lambda x=x: ropes.norm_rope(x, weight, table, 1e-5)), roundings=2)
    halves = qwen3.rope([3, 2], width, 100.0, DEVICE)
    norm = torch.nn.RMSNorm(width, 1e-5)
    norm.weight = torch.nn.Parameter(weight)
    assert_near(*both(lambda: qwen3.norm_rope(v, norm, halves)), roundings=2)


@dtypes
def test_a_gated_activation(dtype):
    gate, up = (normal(5, 90, dtype=dtype) * 4).chunk(2, dim=-1)
    assert_near(*both(lambda: layers.silu_times(gate, up)), roundings=2)


@dtypes
def test_group_norms_of_pictures(dtype):
    """More positions than one program takes, and none of them a multiple of what it takes at a time."""
    norm = vae.GroupNorm(4, 12).to(DEVICE, dtype)
    norm.weight.copy_(normal(12, seed=1))
    norm.bias.copy_(normal(12, seed=2))
    wide = 300 if DEVICE.type == "cuda" else 11
    x = (normal(2, 12, 5, wide) * 2 + 40).to(dtype).contiguous(memory_format=torch.channels_last)
    mean, deviation = x.float().mean(), x.float().std()
    assert mean > 15 * deviation
    assert_near(*both(lambda: norm(x)), roundings=4)
    assert_near(*both(lambda: norm.silu(x)), roundings=4)
    assert_near(*both(lambda: torch.cat(norm.scale_and_shift(x, None))), roundings=8)


def test_a_decoder_gives_the_same():
    config = TURBO.tiny.vae
    decoder = random(vae.Autoencoder(config))
    for latents in (normal(1, config.latent_channels, 1, 1), normal(1, config.latent_channels, 2, 2)[..., :1]):
        assert_near(*both(lambda latents=latents: decoder.decode(latents)), roundings=30)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "fp16"])
def test_rows_on_their_way_to_8_bits(dtype):
    """Before the last step, which the interpreter does not do as a GPU does, they equal the plain operations'."""
    x = normal(4, 45, dtype=dtype) * torch.tensor([[1.0], [1e-3], [100.0], [0.0]], device=DEVICE, dtype=dtype)
    weight, gate = normal(45, dtype=dtype, seed=1), normal(4, 45, dtype=dtype, seed=2)
    cases = [
        (fused.round_rows(x, torch.float32), x),
        (fused.rms_norm(x, weight, 1e-5, into=torch.float32), layers.rms_norm(x, weight, 1e-5)),
        (fused.swiglu(gate, x, into=torch.float32), layers.silu_times(gate, x)),
    ]
    for (numbers, scale), rows in cases:
        assert scale.shape == (4, 1)
        assert ((numbers.abs().amax(1) - 448).abs() < 1e-2)[:3].all()  # each uses the whole range but for zeros
        assert not numbers[3].any()
        assert_near(numbers * scale, rows.float(), roundings=1 if dtype == torch.float32 else 300)


def test_rows_of_8_bits():
    x = normal(4, 48, dtype=torch.bfloat16) * torch.tensor([[1.0], [1e-3], [100.0], [0.0]], device=DEVICE).bfloat16()
    ours, plain = both(lambda: torch.cat([n.float() for n in quant.round_rows(x)[1:]], 1))
    apart = (ours - plain).abs() > 1e-6 * plain.abs()
    assert apart.float().mean() < (0.1 if INTERPRETED else 1e-3)
    assert quant.round_rows(x).numbers.dtype == E4M3


# Models -------------------------------------------------------------------------------------------------------------


def random(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        is_norm = weight.ndim == 1 and "norm" in name
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1 + is_norm)
    return model.to(DEVICE, dtype).eval()


def packed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its matrices in 8-bit floats."""
    state = {
        name: pack("e4m3", weight.float(), dynamic=True) if weight.ndim == 2 else weight
        for name, weight in model.state_dict().items()
    }
    model.load_state_dict(quant.place(model, state, torch.bfloat16), strict=True, assign=True)
    return model.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_block_of_z_image_gives_the_same(dtype):
    """Two samples at two times, then the last block's way: only some tokens are computed."""
    block = random(Block(TURBO.tiny.transformer), dtype)
    x, table = normal(5, 64, dtype=dtype), ropes.rope(line(1, 5), (8, 12, 12), 256.0, DEVICE)
    weights = block.norm_weights(normal(2, 64, dtype=dtype, seed=1))
    rows = torch.tensor([0, 0, 1, 1, 1], device=DEVICE)
    assert_near(*both(lambda: block(x, weights, rows, table, [2, 3])), roundings=10)
    lie = Rows((Span(0, 1, True), Span(0, 1), Span(1, 1, True), Span(1, 2)))
    keep = Targets(lie.targets, None)
    assert_near(*both(lambda: block(x, weights, rows, table, [2, 3], keep, PLAIN, lie)), roundings=10)
    assert_near(*both(lambda: block(x[:4], weights, None, table[:4], [2, 2])), roundings=10)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else DTYPES, ids=str)
def test_flux_draws_the_same(dtype):
    config = KLEIN_4B.tiny.transformer
    model = random(Flux2Transformer(config), dtype)
    texts = [normal(n, config.joint_attention_dim, dtype=dtype, seed=n) for n in (1, 2)]
    prepared = [model.prepare([text], 1, 1)[0] for text in texts]
    xs = [normal(config.in_channels, 1, 1, seed=n) for n in (1, 2)]
    ours, plain = both(lambda: torch.stack(model([Sample(*each) for each in zip(xs, [0.5, 0.25], prepared)])))
    assert_near(ours.to(dtype), plain.to(dtype), roundings=20)


def test_prompts_are_encoded_the_same():
    config = Qwen3Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64,
    )  # fmt: skip
    model = random(qwen3.Qwen3(config))
    ids = torch.arange(3, device=DEVICE)
    assert_near(*both(lambda: model(ids, [2, 1])), roundings=10)


def test_a_block_in_8_bit_floats_rounds_once_for_all_that_read_it(monkeypatch, request):
    """Norms and activations hand on 8 bits. On the CPU, too, torch multiplies such, if it is let."""
    if INTERPRETED:
        request.getfixturevalue("row_scales")
        monkeypatch.setattr(quant, "has_fp8", lambda device: True)
    config = replace(TURBO.tiny.transformer, dim=48, n_heads=2)  # three times 16, as products ask
    block = packed(random(Block(config), torch.bfloat16))
    x, table = normal(5, 48, dtype=torch.bfloat16), ropes.rope(line(1, 5), (8, 8, 8), 256.0, DEVICE)
    weights = block.norm_weights(normal(1, 48, dtype=torch.bfloat16, seed=1))
    kinds = []
    for layer in (block.feed_forward, block.feed_forward.w2):
        layer.register_forward_pre_hook(lambda _, args: kinds.append(type(args[0])))
    ours, plain = both(lambda: block(x, weights, None, table, [5]))
    assert kinds == [quant.Rounded] * 2 + [torch.Tensor] * 2
    assert (ours - plain).norm() < (0.15 if INTERPRETED else 0.03) * plain.norm()
