"""The engine's whole path on GPUs that are not there, and each rule of `pretend.py` finds what breaks it."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inkstream import types
from inkstream.engine.engine import Engine
from inkstream.engine.files.convert import convert
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.families import SPECS, adapter_names
from inkstream.nn import gpu, offload
from inkstream.sampling import solvers
from inkstream.types import Done, Event, Request
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.factors import Dora
from inkstream.weights.lora.write import write_lora
from pretend import Fault, Graph, Machine

LONG = "anything but a ball: no boxes, no cones, no rings, no words, no frames, nothing out of focus"
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "plain": ("z-image-turbo", None, {}),
    "guidance": ("z-image", None, {"negative_prompt": LONG, "guidance": 4.0}),
    "inpaint": ("z-image-turbo", None, {"image": "start.png", "mask": "mask.png"}),
    "references": ("flux2-klein-4b", None, {"reference": ("start.png",)}),
    "nf4": ("z-image-turbo", "nf4", {}),
    "adapter": ("z-image-turbo", None, {"loras": ("dora.safetensors:0.5@0-0.5",)}),
}
"""Name -> a model, how its weights are packed, and what is asked for."""
EIGHT_BITS = {"fp8": ("z-image-turbo", "fp8", {}), "w8a8": ("z-image-turbo", "w8a8", {})}
SLOW: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "step cache": ("z-image-turbo", None, {"cache": "taylor", "cache_threshold": 0.3, "steps": 8}),
    "flux1": ("flux1-dev", None, {}),
    "flux2-dev": ("flux2-dev", None, {}),
}
plans = pytest.mark.parametrize("plan", ["resident", pytest.param("parked", marks=pytest.mark.slow), "streamed"])


def tiny_turbo() -> types.Spec:
    """With blocks enough that streaming uses its rooms again."""
    spec = SPECS["z-image-turbo"].tiny
    return replace(spec, transformer=replace(spec.transformer, n_layers=5))


@pytest.fixture(scope="module")
def wish(make_folder, tmp_path_factory) -> Callable[..., Request]:
    """`wish(case)`: a request, of a tiny model on disk."""
    place = tmp_path_factory.mktemp("pretended")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(place / "start.png")
    Image.fromarray(np.repeat(np.array([[255], [0]], np.uint8), 32, 0).repeat(64, 1)).save(place / "mask.png")

    names, by = adapter_names(tiny_turbo()), torch.Generator().manual_seed(0)
    changes = {
        path: Dora(LowRank(torch.randn(2, i, generator=by), torch.randn(o, 2, generator=by) / i), torch.ones(o, 1))
        for path, (o, i) in names.layers.items()
        if path.startswith("layers.")
    }
    dora = Lora({path: LayerChange([Part(change)]) for path, change in changes.items()})
    write_lora(place / "dora.safetensors", dora, names, "comfyui")

    @cache
    def folder(name: str, quant: str | None) -> Path:
        if quant:
            return convert(folder(name, None), place / f"{name}-{quant}", quant=quant)
        return make_folder(place / name, tiny_turbo() if name == "z-image-turbo" else SPECS[name].tiny)

    def wish(case: str) -> Request:
        name, quant, fields = {**CASES, **EIGHT_BITS, **SLOW}[case]
        pictures = {key: str(place / value) for key, value in fields.items() if key in ("image", "mask")}
        pictures |= {"reference": (str(place / "start.png"),)} if "reference" in fields else {}
        pictures |= {"loras": [str(place / lora) for lora in fields.get("loras", ())]}
        common = {"prompt": "a red ball", "width": 64, "height": 64, "steps": 4, "seed": 5}
        return Request(**{**common, **fields, **pictures, "model": str(folder(name, quant))})

    return wish


@pytest.fixture(scope="module")
def on_cpu(wish) -> Callable[..., np.ndarray]:
    """`on_cpu(case, dtype)`: its picture as the CPU draws it."""
    return cache(lambda case, dtype="fp32": drawn(Engine(types.Machine("cpu", dtype)).submit(wish(case))))


@pytest.fixture(autouse=True)
def no_kernels_of_our_own(monkeypatch) -> None:
    """Nothing here could run them."""
    monkeypatch.setattr(gpu, "fused_devices", set())


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Two GPUs like an H100."""
    with Machine().plugged_in() as machine:
        yield machine


@contextmanager
def found(what: str) -> Iterator[Machine]:
    """On such a machine a fault is found."""
    machine = Machine()
    with pytest.raises(Fault, match=what), machine.plugged_in():
        yield machine


def drawn(events: Any) -> np.ndarray:
    """The last picture of a request, (H, W, 3)."""
    last: Event | None = None
    for event in events:
        last = event
    assert isinstance(last, Done), last
    return np.asarray(last.image, np.float64)


def decibels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """PSNR. 48 are one step of 255 everywhere."""
    return 20 * np.log10(255 / max(np.sqrt(np.square(ours - theirs).mean()), 1e-3))


# What is drawn ------------------------------------------------------------------------------------------------------


@plans
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_plan_draws_on_a_gpu_what_the_cpu_draws(machine, wish, on_cpu, case, plan):
    engine = Engine(types.Machine("cuda", "fp32", placement=plan))
    assert decibels(drawn(machine.between_steps(engine.submit(wish(case)))), on_cpu(case)) > 55


@pytest.mark.parametrize(
    "plan", ["resident", *(pytest.param(name, marks=pytest.mark.slow) for name in [*PLACEMENTS][1:])]
)
@pytest.mark.parametrize("case", [*EIGHT_BITS, "guidance"])
def test_what_16_bits_ask_of_a_gpu_comes_near_to_what_they_ask_of_a_cpu(machine, wish, on_cpu, case, plan):
    """Products of 8-bit floats and integers, and attention over sequences of several lengths."""
    asked = []
    for name in ("aten::_scaled_mm", "aten::_int_mm", "torch_attn::_varlen_attn"):
        kernel = machine.kernels.get(name, getattr(torch, name.removeprefix("aten::"), None))
        machine.kernels[name] = lambda *args, n=name, f=kernel, **kwargs: asked.append(n) or f(*args, **kwargs)
    engine = Engine(types.Machine("cuda", "bf16", placement=plan))
    assert decibels(drawn(machine.between_steps(engine.submit(wish(case)))), on_cpu(case, "bf16")) > 34
    wanted = {"fp8": "aten::_scaled_mm", "w8a8": "aten::_int_mm"}.get(case, "torch_attn::_varlen_attn")
    assert asked.count(wanted) > 1  # the first may be a trial


@plans
def test_the_second_gpu_draws_what_the_cpu_draws(machine, wish, on_cpu, plan):
    """Whichever device is the current one."""
    engine = Engine(types.Machine("cuda:1", "fp32", placement=plan))
    assert decibels(drawn(machine.between_steps(engine.submit(wish("guidance")))), on_cpu("guidance")) > 55
    assert {stream.device.index for stream in machine.streams if stream.clock} == {1}


@pytest.mark.parametrize(
    "name", [n if n in ("euler_ancestral", "lcm") else pytest.param(n, marks=pytest.mark.slow) for n in solvers.SOLVERS]
)
def test_no_solver_waits_between_steps(machine, wish, name):
    request = wish("plain").model_copy(update={"solver": name})
    ours = drawn(machine.between_steps(Engine(types.Machine("cuda", "fp32")).submit(request)))
    assert decibels(ours, drawn(Engine(types.Machine("cpu", "fp32")).submit(request))) > 55


def test_requests_are_drawn_together_on_a_gpu(machine, wish, on_cpu):
    engine = Engine(types.Machine("cuda", "fp32"))
    events = zip_longest(*(engine.submit(wish(case)) for case in ("plain", "plain")))
    done = [event for pair in events for event in pair if isinstance(event, Done)]
    assert [decibels(drawn([event]), on_cpu("plain")) > 55 for event in done] == [True, True]


def test_small_pictures_are_replayed(machine, wish, on_cpu, monkeypatch):
    replay, replayed = Graph.replay, []
    monkeypatch.setattr(Graph, "replay", lambda graph: replayed.append(len(graph.operations)) or replay(graph))
    assert decibels(drawn(Engine(types.Machine("cuda", "fp32")).submit(wish("plain"))), on_cpu("plain")) > 55
    assert len(replayed) == 3  # the first of four steps is not recorded
    assert min(replayed) > 10


def test_a_forward_that_cannot_be_recorded_leaves_nothing_under_way(machine, wish, on_cpu):
    engine = Engine(types.Machine("cuda", "fp32"))
    list(engine.load(wish("plain").model))
    block = engine.model.family.transformer.layers[1]
    block.register_forward_pre_hook(lambda _, args: args[0].sum().item() and None)
    assert decibels(drawn(engine.submit(wish("plain"))), on_cpu("plain")) > 55


def draw_until_a_block_fails(request: Request) -> None:
    """Under the plan whose weights come meanwhile."""
    engine = Engine(types.Machine("cuda", "fp32", placement="streamed"))
    list(engine.load(request.model))

    def fail(block: torch.nn.Module, args: Any) -> None:
        raise RuntimeError("a block failed")

    engine.model.family.transformer.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a block failed"):
        drawn(engine.submit(request))


def test_a_block_that_fails_leaves_no_copy_under_way(machine, wish):
    draw_until_a_block_fails(wish("plain"))


# What is found ------------------------------------------------------------------------------------------------------


def euler_with(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., solvers.Solver]:
    """Euler's steps, of which each velocity is changed."""

    def euler(x, ts, generator=None):
        for t, s in pairwise(ts):
            x = x + (s - t) * change((yield solvers.Query(x, t)))
        return x

    return euler


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda v: v.max().item(),
    "tolist": lambda v: v.tolist(),
    "cpu": lambda v: v.cpu(),
    "to": lambda v: v.to("cpu", torch.float64),
    "bool": lambda v: bool((v > 0).any()),
    "float": lambda v: float(v.sum()),
    "nonzero": lambda v: v.nonzero(),
    "a mask": lambda v: v[v > 0],
    "numbers brought": lambda v: torch.tensor([1.0, 2.0], device=v.device),
    "memory that is not pinned": lambda v: torch.zeros(9).to(v.device, non_blocking=True),
    "a copy that blocks": lambda v: torch.empty(v.shape, pin_memory=v.is_cuda).copy_(v),
    "synchronize": lambda v: torch.cuda.synchronize(),
    "a stream": lambda v: torch.cuda.current_stream().synchronize(),
}


def test_a_host_wait_between_steps_is_found(machine, wish, monkeypatch):
    steps = []

    def wait(v: torch.Tensor) -> torch.Tensor:
        steps.append(v.is_cuda)
        if sum(steps) == 2:
            for what in WAITS.values():
                with pytest.raises(Fault, match="the host waits: "):
                    what(v)
        return v

    monkeypatch.setitem(solvers.SOLVERS, "euler", euler_with(wait))
    drawn(machine.between_steps(Engine(types.Machine("cuda", "fp32")).submit(wish("plain"))))
    assert len(machine.faults) == len(WAITS)
    machine.faults.clear()


@plans
def test_a_host_wait_inside_a_block_is_found(wish, plan):
    with found("the host waits: ") as machine:
        engine = Engine(types.Machine("cuda", "fp32", placement=plan))
        list(engine.load(wish("plain").model))
        block = engine.model.family.transformer.layers[1]
        block.register_forward_pre_hook(lambda _, args: args[0].sum().item() and None)
        drawn(machine.between_steps(engine.submit(wish("plain"))))


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_a_mix_of_devices_is_found(wish, monkeypatch, other):
    def mix(v: torch.Tensor) -> torch.Tensor:
        return v + torch.ones(v.shape).to(other if v.is_cuda else v.device)

    monkeypatch.setitem(solvers.SOLVERS, "euler", euler_with(mix))
    with found(f"takes tensors of ({other} and cuda:0|cuda:0 and {other})"):
        drawn(Engine(types.Machine("cuda", "fp32", placement="streamed")).submit(wish("plain")))


STREAMING = textwrap.dedent(inspect.getsource(offload.Streamed._on_gpu))
ORDERING = [line for line in STREAMING.splitlines() if re.match(r" +\w+(\[.*\])?\.(wait_|record|synchronize)", line)]
"""The lines that order the copies of weights and what is computed with them. The last is for when it ends early."""
lines = pytest.mark.parametrize(
    "line", ORDERING, ids=[re.sub(r"\W+", "-", line.partition("#")[0]) for line in ORDERING]
)


def test_what_orders_the_copies_is_known():
    assert len(ORDERING) == 7


@lines
def test_a_wait_or_record_left_out_of_streaming_is_found(wish, monkeypatch, line):
    names: dict[str, Any] = {}
    assert STREAMING.count(line) == 1
    exec(STREAMING.replace(line, line[: len(line) - len(line.lstrip())] + "pass"), vars(offload), names)
    monkeypatch.setattr(offload.Streamed, "_on_gpu", names["_on_gpu"])
    with found("still in use|not yet written|memory is freed while another stream uses it"):
        drawn(Engine(types.Machine("cuda", "fp32", placement="streamed")).submit(wish("plain")))
        draw_until_a_block_fails(wish("plain"))


def test_memory_that_another_stream_uses_is_not_to_be_freed():
    machine = Machine()
    with machine.plugged_in():
        for waits in (True, False):
            room, here, aside = torch.empty(8, device="cuda"), torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                room.zero_()
            if waits:
                here.wait_stream(aside)
            del room
            assert machine.faults == ([] if waits else ["memory is freed while another stream uses it"])
        machine.faults.clear()


def test_what_a_non_blocking_copy_brings_is_there_after_an_event():
    machine = Machine()
    with machine.plugged_in():
        home, copied = torch.ones(8).to("cuda").to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
        with pytest.raises(Fault, match="reads what is not yet written"):
            home.sum()
        copied.synchronize()
        assert home.sum().item() == 8
        machine.faults.clear()
