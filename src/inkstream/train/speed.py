"""Measures a run's operations (FLOPs), the device's peak speed, and CPU time."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from inkstream.train.tasks import Task

COUNTED = 4
"""Steps of which one sample each is counted. Several are needed because captions differ in length."""


def _attention(q: Any, k: Any, v: Any, *others: Any, **named: Any) -> int:
    """Operations of attention: scores and weighted sum. q: (B, H, L, E), k: (B, G, S, E), v: (B, G, S, F), as shapes.

    torch's own formulas take grouped heads only in newer versions.
    """
    batch, heads, length, width = q
    return 2 * batch * heads * length * k[2] * (width + v[3])


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *others: Any, **named: Any) -> int:
    """Operations of its backward pass: the scores again, and the gradients of weights, v, q and k."""
    batch, heads, length, width = q
    return 2 * batch * heads * length * k[2] * (3 * width + 2 * v[3])


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Formulas for operations that torch's counter does not know."""


def count_flops(task: Task, step: int) -> float:
    """Return the floating-point operations of one sample in all turns of a step, forward and backward.

    Matrix products, convolutions and attention are counted, and a multiply-add counts as two operations. Recomputation
    by `checkpointing` is counted, optimisers are not. The result is the mean over one sample of each of COUNTED steps.
    Weights do not change.
    """
    total = 0
    for number in range(step, step + COUNTED):
        for _, loss in task.turns(number):
            with counting() as counter:
                loss(slice(0, 1)).backward()
            total += counter.get_total_flops()
    for learner in task.learners:
        learner.weights.forget()
    return total / COUNTED


def counting() -> FlopCounterMode:
    """Return torch's counter of operations, without its record of modules, whose hooks keep all activations alive."""
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    return counter


class _Nowhere:
    """A record of modules that holds none."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def measure_peak(device: torch.device, dtype: torch.dtype, rounds: int = 8) -> float:
    """Return FLOP/s of a large matrix product on the device: the fastest of `rounds` rounds."""
    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, generator=generator, device=device).to(dtype)
    fastest = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # .item() waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


def cpu_seconds() -> float:
    """Return the CPU time in seconds of this process and of its workers that have ended."""
    return sum(os.times()[:4])
