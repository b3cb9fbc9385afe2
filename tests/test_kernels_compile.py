"""Every Triton kernel is compiled for the GPUs it is meant for, at the sizes of real models. No GPU is needed.

What the wrappers of `nn/fused.py` launch is compiled as it is launched, by the ptxas inside Triton's wheel. Registers
and stack are read from what ptxas made.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import inkstream

pytest.importorskip("triton", reason="Triton is for Linux", exc_type=ImportError)
from triton import __version__ as TRITON
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompilationError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from inkstream.nn import flux, fused, layers, quant
from inkstream.quant.pack import pack
from pretend import Machine

TARGETS = (80, 86, 89, 90, 100, 120)
"""Ten times the compute capability: A100, RTX 30, RTX 40, H100, B200, RTX 50."""
QUICK = (80, 89, 90, 120)
"""A generation each; the others are compiled among the slow tests."""
WITH_FP8 = tuple(target for target in TARGETS if target >= 89)
OLDER = tuple(int(number) for number in TRITON.split(".")[:2]) < (3, 7)
"""Whether Triton is one of those that come with torch 2.11 and 2.12. Their code takes a few registers more."""
REGISTERS = {
    torch.bfloat16: 80 if OLDER else 64,
    torch.float16: 80 if OLDER else 64,
    torch.float32: 80 if OLDER else 72,
}
"""Of a thread, at most, by the type computed with: with 64, two programs of 512 threads share the 65536 of an SM."""
STACK = dict.fromkeys([("_moments", 120)] + [("_norm_rows", target) for target in TARGETS if OLDER], 8)
"""Bytes of a thread that a kernel keeps in memory, for want of registers. None where a kernel is not named."""
E4M3 = torch.float8_e4m3fn
PACKAGE = Path(inkstream.__file__).parent


def launches(x: torch.dtype, into: torch.dtype | None = None, device: str = "meta") -> Mapping[str, Callable[[], Any]]:
    """Calls that launch kernels on tensors of type x; with `into`, those that write rows of 8-bit floats.

    Widths: 3840 of Z-Image, 10240 of its feed-forward, 6144 of FLUX.2 dev. Heads: 30 of Z-Image, 48 of FLUX.2 dev, 32
    of Qwen3. Channels of decoders: 512.
    """

    def new(*shape: int, dtype: torch.dtype = x) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def turn(heads: int, angles: int, halves: bool = False) -> torch.Tensor:
        table = new(64, 1, angles, dtype=torch.float32)
        return fused.norm_rope(new(64, heads, 128), new(128), table, table, 1e-6, halves)

    y, wide, hidden = (new(64, width) for width in (3840, 6144, 10240))
    one, two = new(1, 6144), new(2, 6144)
    rows = new(64, dtype=torch.int64)
    calls: dict[str, Callable[[], Any]] = {
        "norm": lambda: fused.rms_norm(y, one[:, :3840], 1e-5, into=into),
        "norm by rows": lambda: fused.rms_norm(y, two[:, :3840], 1e-5, rows, into=into),
        "modulated norm": lambda: fused.modulated_norm(wide, one, one, 1e-6, into=into),
        "modulated norm by rows": lambda: fused.modulated_norm(wide, two, two, 1e-6, rows, into=into),
        "activation": lambda: fused.swiglu(hidden, hidden, into=into),
    }
    if into is not None:
        return {**calls, "rounding": lambda: fused.round_rows(hidden, into)}
    scale, picture = new(1, 512, dtype=torch.float32), new(1, 4096, 512)
    return {
        **calls,
        "residual and norm": lambda: fused.rms_norm(y, one[:, :3840], 1e-5, add=y),
        "residual and norm by rows": lambda: fused.rms_norm(y, two[:, :3840], 1e-5, rows, add=y),
        "queries of Z-Image": lambda: turn(30, 128),
        "queries of FLUX.2": lambda: turn(48, 128),
        "queries of Qwen3": lambda: turn(32, 64, halves=True),
        "moments": lambda: fused.moments(picture),
        "group norm": lambda: fused.scale_shift(picture, scale, scale, silu=False),
        "group norm and SiLU": lambda: fused.scale_shift(picture, scale, scale, silu=True),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def build(monkeypatch, cache) -> Callable[[int, Callable[[], Any]], list[Any]]:
    """`build(target, call)`: the kernels that a call launches, compiled for a target and not run."""
    built: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        built.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    def build(target: int, call: Callable[[], Any]) -> list[Any]:
        pretend = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", target, 32),
            get_current_device=lambda: target,  # Triton keeps what it compiled by device
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(driver, "_active", pretend)
        built.clear()
        call()
        return [*built]

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    for kernel in kernels_of(fused).values():
        kernel.device_caches.clear()
    return build


def kernels_of(module: Any) -> dict[str, JITFunction]:
    return {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}


def usage(kernel: Any, folder: Path) -> dict[str, int]:
    """What a thread of a compiled kernel takes: REG, registers; STACK and LOCAL, bytes of memory for want of them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def assert_fits(kernel: Any, target: int, dtype: torch.dtype, folder: Path) -> None:
    used = usage(kernel, folder)
    assert used.keys() == {"REG", "STACK", "LOCAL"}
    assert used["REG"] <= REGISTERS[dtype], (kernel.name, used)
    assert used["STACK"] + used["LOCAL"] <= STACK.get((kernel.name, target), 0), (kernel.name, used)


@pytest.mark.parametrize("target", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_kernels_compile_for_every_gpu_and_keep_within_its_registers(build, tmp_path, target):
    dtype = torch.bfloat16
    calls = [*launches(dtype).items(), *(launches(dtype, E4M3).items() if target in WITH_FP8 else ())]
    for name, call in calls:
        kernels = build(target, call)
        assert kernels, name
        for kernel in kernels:
            assert_fits(kernel, target, dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_other_types_compile_too(build, tmp_path, target, dtype):
    for call in launches(dtype).values():
        for kernel in build(target, call):
            assert_fits(kernel, target, dtype, tmp_path)


@pytest.mark.parametrize("target", sorted({*TARGETS} - {*WITH_FP8}))
def test_8_bit_floats_do_not_compile_for_gpus_that_do_not_multiply_them(build, target):
    """So `quant.has_fp8` must keep them away."""
    for call in launches(torch.bfloat16, E4M3).values():
        with pytest.raises(CompilationError, match="fp8e4nv"):
            build(target, call)


def test_every_kernel_of_the_package_is_among_those_that_are_compiled(build):
    written: dict[str, JITFunction] = {}
    for file in PACKAGE.rglob("*.py"):
        if "triton.jit" in file.read_text("utf-8"):
            name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            written |= kernels_of(import_module(name))
    assert written
    calls = [*launches(torch.bfloat16).values(), *launches(torch.bfloat16, E4M3).values()]
    compiled: set[str] = set()
    for kernel in (kernel for call in calls for kernel in build(90, call)):
        called = re.findall(r"func private @[\w.]*\.(\w+?)__", kernel.asm["source"])
        compiled |= {kernel.name, *called}
    assert written.keys() <= compiled  # a kernel that is missing on the right needs a call in `launches`


# Where they are launched ---------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> list[tuple[int, list[torch.Tensor]]]:
    """The current device, and the tensors, of each launch on pretended GPUs. Nothing is computed."""
    seen: list[tuple[int, list[torch.Tensor]]] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((torch.cuda.current_device(), [arg for arg in args if isinstance(arg, torch.Tensor)]))

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def test_kernels_are_launched_on_the_device_of_their_tensors(launched):
    with Machine().plugged_in():
        for name, call in launches(torch.bfloat16, device="cuda:1").items():
            launched.clear()
            call()
            assert launched, name
            for device, tensors in launched:
                assert {tensor.device.index for tensor in tensors} == {device}, name


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)])
def test_only_gpus_that_multiply_8_bit_floats_are_given_such(launched, row_scales, capability, fp8):
    """Whoever may be handed 8 bits by norms and activations, and the layer itself."""
    weight = pack("e4m3", torch.randn(64, 64), dynamic=True)
    with Machine(capability=capability).plugged_in(), torch.inference_mode():
        scales = tuple(scale.to("cuda") for scale in weight.scales)
        there = replace(weight, data=weight.data.to("cuda"), scales=scales)
        reader = quant.PackedLinear(there, None, torch.bfloat16)
        x, modulation = (torch.ones(shape, dtype=torch.bfloat16, device="cuda") for shape in ((32, 64), (1, 3, 64)))
        calls: dict[str, Callable[[], Any]] = {
            "norm": lambda: layers.rms_norm_into([reader], x, modulation[:, 0], 1e-5),
            "activation": lambda: layers.silu_times(x, x, [reader]),
            "modulation": lambda: flux.modulate(x, modulation, None, [reader]),
            "product": lambda: reader(x),
        }
        for name, call in calls.items():
            launched.clear()
            call()
            kinds = {tensor.dtype for _, tensors in launched for tensor in tensors}
            assert (E4M3 in kinds) == fp8, name
