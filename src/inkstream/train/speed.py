"""How much a run computes, how fast the device could, and the processor time that is used."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from inkstream.train.tasks import Task

COUNTED = 4
"""Steps of which a sample each is counted: captions, and so samples, differ in length."""


def _attention(q: Any, k: Any, v: Any, *others: Any, **named: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *others: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's counter does not know."""


def count_flops(task: Task, step: int) -> float:
    """Floating-point operations that a sample takes in all turns of a step, forward and backward.

    Those of matrix products, convolutions and attention, two for a multiplication with its addition; optimisers are
    left out, what `checkpointing` computes again is counted. A mean over a sample of each of COUNTED steps; nothing is
    changed.
    """
    total = 0
    for number in range(step, step + COUNTED):
        for _, loss in task.turns(number):
            with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
                loss(slice(0, 1)).backward()
            total += counter.get_total_flops()
    for learner in task.learners:
        learner.weights.forget()
    return total / COUNTED


def measure_peak(device: torch.device, dtype: torch.dtype, rounds: int = 8) -> float:
    """Floating-point operations a second of large matrix products on the device: the fastest of some."""
    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, generator=generator, device=device).to(dtype)
    fastest = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


def cpu_seconds() -> float:
    """Processor time of this process so far, and of its workers that have ended."""
    return sum(os.times()[:4])
