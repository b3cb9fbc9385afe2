"""Test and time the GPU optimisations one by one: fused kernels, attention, a block, a recorded forward.

    python scripts/gpu_kernels.py --date 2026-11-21     # about four minutes; writes benchmarks/records/kernels-gpu.json
    python scripts/gpu_kernels.py --rehearse            # the same at tiny size on the CPU; writes no record

First the tests of the kernels run, compiled for this GPU. Then each operation is timed with every available method:
plain (torch's operations one by one), fused (our kernels), compiled (torch.compile), and so on. Sizes are those of
Z-Image-Turbo. Next to its time, each method shows its relative difference in norm from the plain method.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update({"TRITON_INTERPRET": "1"} if "--rehearse" in sys.argv else {})  # read when Triton is imported

import torch
from torch import Tensor, nn

from inkstream.bench.records import write_record
from inkstream.engine.machine.compile import compile_blocks
from inkstream.engine.machine.graphs import Recordings, forward_transformer, record
from inkstream.families.zimage.model import Block, ZImageTransformer, line
from inkstream.families.zimage.specs import TURBO
from inkstream.nn import attention, flux, gpu, layers, quant
from inkstream.nn import rope as ropes
from inkstream.nn.config import VAEConfig
from inkstream.nn.forward import Sample
from inkstream.nn.stack import Blocks
from inkstream.nn.vae import Autoencoder
from inkstream.quant.pack import pack

ROOT = Path(__file__).parent.parent
REHEARSE = "--rehearse" in sys.argv
DEVICE = torch.device("cpu" if REHEARSE else "cuda")
CONFIG = TURBO.tiny.transformer if REHEARSE else TURBO.transformer
DTYPE = torch.float32 if REHEARSE else torch.bfloat16
TOKENS = [8] if REHEARSE else [4096 + 128, 1024 + 128]  # pictures of 1024 and 512 pixels, a prompt of 128 tokens
EPS = 1e-5
FLUSH = 128 * 2**20
"""Bytes written between runs to flush the GPU's caches."""

Ways = dict[str, Callable[[], Any]]


def main() -> None:
    options = parse()
    began = time.perf_counter()
    check_kernels()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for case, ways in cases():
            rows += time_ways(case, ways, options.repeats)
    print(f"{time.perf_counter() - began:.0f} s in all")
    if not REHEARSE:
        command = "python " + " ".join(sys.argv)
        print(write_record("kernels-gpu", options.date, command, versions(), rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=not REHEARSE, help="date of the record")
    parser.add_argument("--rehearse", action="store_true", help="tiny size, on the CPU, without a record")
    parser.add_argument("--repeats", type=int, default=1 if REHEARSE else 30)
    return parser.parse_args()


def check_kernels() -> None:
    """Run the tests of the kernels and of the attention backends. Raises CalledProcessError if one fails."""
    files = [str(ROOT / "tests" / name) for name in ("fused_cases.py", "test_attention_backends.py")]
    chosen = ["-k", "activation"] if REHEARSE else []  # the test suite runs all of them
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *files, *chosen]
    subprocess.run(command, check=True, cwd=ROOT)


def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "attention": ", ".join(there())}


def there() -> Sequence[str]:
    return attention.backends_on(DEVICE)


# Timing -------------------------------------------------------------------------------------------------------------


def time_ways(case: str, ways: Ways, repeats: int) -> list[dict[str, Any]]:
    """Time each method and return one row for each. The first method is the reference for the others.

    A method that raises an exception is printed and left out.
    """
    rows: list[dict[str, Any]] = []
    exact = None
    for way, run in ways.items():
        try:
            out = as_tensor(run())
            seconds = [once(run) for _ in range(repeats + 2)][2:]
        except Exception as error:
            print(f"{case:<44} {way:<14} failed: {type(error).__name__} {str(error).partition(chr(10))[0]}")
            continue
        exact = out if exact is None else exact
        apart = ((out.double() - exact.double()).norm() / exact.double().norm()).item()
        took = median(seconds)
        row = {"case": case, "way": way, "milliseconds": round(took * 1e3, 4), "least": round(min(seconds) * 1e3, 4)}
        rows.append({**row, "ratio": round(took * 1e3 / (rows[0]["milliseconds"] if rows else took * 1e3), 4)})
        rows[-1]["apart"] = float(f"{apart:.3g}")
        print(
            f"{case:<44} {way:<14} {took * 1e3:9.4f} ms  ratio {rows[-1]['ratio']:.3f}  apart {apart:.2g}", flush=True
        )
    return rows


def once(run: Callable[[], Any]) -> float:
    """Return the seconds of one run. On a GPU the caches are flushed first and CUDA events measure the time."""
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    flush.zero_()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


flush = torch.empty(1 if REHEARSE else FLUSH, dtype=torch.uint8, device=DEVICE)


def as_tensor(out: Any) -> Tensor:
    """Return a method's result as one tensor. Rows in 8 bits are dequantised."""
    if isinstance(out, quant.Rounded):
        return out.numbers.float() * out.scale
    return torch.cat([o.flatten() for o in out]) if isinstance(out, list | tuple) else out


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    before = set(gpu.fused_devices)
    gpu.fused_devices.clear()
    if on:
        gpu.fused_devices.add(DEVICE.type)
    try:
        yield
    finally:
        gpu.fused_devices.clear()
        gpu.fused_devices.update(before)


def ways_of(compute: Callable[[], Any]) -> Ways:
    """Return the methods plain, fused and compiled. The compiled method compiles the plain operations."""
    compiled = torch.compile(lambda: compute(), backend="eager" if REHEARSE else "inductor", dynamic=False)

    def switched(on: bool) -> Callable[[], Any]:
        def run() -> Any:
            with kernels(on):
                return compute()

        return run

    return {"plain": switched(False), "fused": switched(True), "compiled": compiled}


# What is timed ------------------------------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, Ways]]:
    for tokens in TOKENS:
        yield from kernel_cases(tokens)
    yield from attention_cases()
    for tokens in TOKENS:
        yield from block_cases(tokens)
    yield from forward_cases()
    yield from autoencoder_cases()


def kernel_cases(tokens: int) -> Iterator[tuple[str, Ways]]:
    dim, heads = CONFIG.dim, CONFIG.n_heads
    hidden, of = int(dim / 3 * 8), f"{tokens} tokens"
    x, y, weight = normal(tokens, dim), normal(tokens, dim, seed=1), normal(1, dim, seed=2)
    yield f"norm, scaled; {of}", ways_of(lambda: layers.rms_norm(x, weight, EPS))
    two = normal(2, dim, seed=3)
    rows = layers.run_of_each([tokens // 4, tokens - tokens // 4], DEVICE)
    yield f"norm, scaled by two rows; {of}", ways_of(lambda: layers.rms_norm(x, two, EPS, rows))
    yield f"residual and gated norm; {of}", ways_of(lambda: layers.add_norm(x, y, weight, EPS))
    q = normal(tokens, 3 * dim).unflatten(-1, (3, heads, -1))[:, 0]
    table, own = table_of(tokens), normal(dim // heads, seed=4)
    yield f"queries, normed and turned; {of}", ways_of(lambda: ropes.norm_rope(q, own, table, EPS))
    gate, up = normal(tokens, hidden), normal(tokens, hidden, seed=1)
    yield f"gated activation; {of}", ways_of(lambda: layers.silu_times(gate, up))
    modulation, linear = normal(1, 2, dim, seed=5), nn.Linear(1, 1)
    yield f"layer norm, modulated; {of}", ways_of(lambda: flux.modulate(x, modulation, None, [linear]))
    yield f"rounding to 8 bits; {of}", ways_of(lambda: quant.round_rows(x))
    if quant.has_fp8(DEVICE):
        reader = packed(nn.Linear(dim, 64, bias=False).to(DEVICE, DTYPE))
        ways = ways_of(lambda: layers.rms_norm_into([reader], x, weight, EPS))
        ways["plain"] = plainly(lambda: quant.round_rows(layers.rms_norm(x, weight, EPS)))
        yield f"norm and rounding to 8 bits; {of}", {name: ways[name] for name in ("plain", "fused")}
        second = packed(nn.Linear(hidden, 64, bias=False).to(DEVICE, DTYPE))
        ways = ways_of(lambda: layers.silu_times(gate, up, [second]))
        ways["plain"] = plainly(lambda: quant.round_rows(layers.silu_times(gate, up)))
        yield f"activation and rounding to 8 bits; {of}", {name: ways[name] for name in ("plain", "fused")}


def plainly(compute: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with kernels(False):
            return compute()

    return run


def attention_cases() -> Iterator[tuple[str, Ways]]:
    """Time attention for one picture, and for eight pictures of different sizes in one batch."""
    small, large = (8, 4) if REHEARSE else (4224, 1152)
    heads, width = CONFIG.n_heads, CONFIG.dim // CONFIG.n_heads
    for name, lengths in (("one sequence", [small]), ("eight of three lengths", [small, large, large // 2, large] * 2)):
        q, k, v = (normal(sum(lengths), heads, width, seed=i) for i in range(3))

        def ways(q=q, k=k, v=v, lengths=lengths) -> Ways:
            return {
                backend: lambda backend=backend: attention.attend(q, k, v, lengths, lengths, by=backend)
                for backend in there()
            }

        yield f"attention, {name}", ways()


def block_cases(tokens: int) -> Iterator[tuple[str, Ways]]:
    """Time one block of Z-Image, which has 30 such layers."""
    x, table = normal(tokens, CONFIG.dim), table_of(tokens)
    plain, compiled = random(Block(CONFIG)), random(Block(CONFIG))
    weights = plain.norm_weights(normal(1, min(CONFIG.dim, 256)))
    compile_block(compiled)
    ways = ways_of(lambda: plain(x, weights, None, table, [tokens]))
    ways["compiled"] = lambda: compiled(x, weights, None, table, [tokens])
    if quant.has_fp8(DEVICE):
        eight, compiled_eight = packed(random(Block(CONFIG))), packed(random(Block(CONFIG)))
        compile_block(compiled_eight)
        in_fp8 = ways_of(lambda: eight(x, weights, None, table, [tokens]))
        ways |= {"fp8 plain": in_fp8["plain"], "fp8 fused": in_fp8["fused"]}
        ways["fp8 compiled"] = lambda: compiled_eight(x, weights, None, table, [tokens])
    yield f"a block; {tokens} tokens", ways


def compile_block(block: Block) -> None:
    compile_blocks(Blocks([block]), backend="eager" if REHEARSE else "inductor")


def forward_cases() -> Iterator[tuple[str, Ways]]:
    """Time a transformer of eight layers at small sizes, where a GPU may wait for Python."""
    model = random(ZImageTransformer(replace(CONFIG, n_layers=min(8, CONFIG.n_layers))))
    for cells in [4] if REHEARSE else [32, 64, 128]:
        scales = model.scales([0.5])
        sample = model.prepare(normal(100, CONFIG.cap_feat_dim), cells, cells)
        sample = replace(sample, scales=scales)
        x = normal(CONFIG.in_channels, cells, cells).float()
        recordings = Recordings(rerun if REHEARSE else partial(record, DEVICE))
        ways = ways_of(lambda x=x, sample=sample: model.forward([Sample(x, 0.5, sample)])[0])
        ways = {name: ways[name] for name in (["plain"] if REHEARSE else ["plain", "fused"])}  # an interpreter is slow

        def replayed(x=x, sample=sample, recordings=recordings) -> Any:
            with kernels(not REHEARSE):
                return forward_transformer(recordings, model.forward, [Sample(x, 0.5, sample)])[0]

        for _ in range(2):
            replayed()
        yield f"a forward, 8 layers; {8 * cells} pixels", {**ways, "recorded": replayed}


def rerun(compute: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Replace `record` on the CPU, which has no CUDA graphs: `replay` computes again."""
    outputs = compute()

    def replay() -> None:
        for output, again in zip(outputs, compute()):
            output.copy_(again)

    return outputs, replay


def autoencoder_cases() -> Iterator[tuple[str, Ways]]:
    config = TURBO.tiny.vae if REHEARSE else VAEConfig()
    vae = random(Autoencoder(config))
    cells = 4 if REHEARSE else 128
    latents = normal(1, config.latent_channels, cells, cells)
    yield (
        f"decoding; {8 * cells} pixels",
        {name: way for name, way in ways_of(lambda: vae.decode(latents)).items() if name != "compiled"},
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(DTYPE)


def random(model: nn.Module) -> Any:
    """Set random weights whose scale keeps the numbers in range."""
    model = model.to(DEVICE, DTYPE).eval().requires_grad_(False)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        fan = weight[0].numel() if weight.ndim > 1 else 1
        weight.normal_(0.0, fan**-0.5 if weight.ndim > 1 else 0.05, generator=generator)
        if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
            weight.add_(1)
    return model


def packed(module: nn.Module) -> Any:
    """Return the module with its matrices in fp8, for fp8 matrix products."""
    if isinstance(module, nn.Linear):
        holder = nn.Sequential(module)
        return packed(holder)[0]
    state = {
        name: pack("e4m3", weight, dynamic=True) if weight.ndim == 2 else weight
        for name, weight in module.state_dict().items()
    }
    module.load_state_dict(quant.place(module, state, DTYPE), strict=True, assign=True)
    return module.to(DEVICE)


def table_of(tokens: int) -> ropes.Rope:
    return ropes.rope(line(1, tokens), CONFIG.axes_dims, CONFIG.rope_theta, DEVICE)


if __name__ == "__main__":
    main()
