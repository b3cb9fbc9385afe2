"""Measure the speed-up of step caches and guidance intervals with Pocket, and the change of the pictures.

    python scripts/measure_caches.py --date 2026-11-21 [--prompts 40] [--steps 32] [--record cache-cpu]

One process draws every prompt with every setting in turn, on one thread. The speed-up of a setting is the median over
the prompts of the full drawing's CPU seconds divided by the setting's CPU seconds, measured in the same turn.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch

import inkstream
from inkstream import Request
from inkstream.bench.records import write_record
from inkstream.engine.pictures.inputs import to_image
from inkstream.evaluate.grades import grade
from inkstream.evaluate.measures import psnr
from inkstream.evaluate.report import Judged
from inkstream.evaluate.suites import Case, open_suite, thin
from inkstream.nn.stack import Blocks

THRESHOLDS = (0.05, 0.1, 0.2, 0.3)
SETTINGS: dict[str, dict[str, Any]] = {
    "in full": {},
    **{f"first-block {x:g}": {"cache": "first-block", "cache_threshold": x} for x in THRESHOLDS},
    **{f"taylor {x:g}": {"cache": "taylor", "cache_threshold": x} for x in THRESHOLDS},
    "guidance until 0.5": {"guidance_until": 0.5},
    "guidance until 0.8": {"guidance_until": 0.8},
    "guidance from 0.95": {"guidance_from": 0.95},
    "taylor 0.1, guidance until 0.8": {"cache": "taylor", "cache_threshold": 0.1, "guidance_until": 0.8},
}


@dataclass
class Found:
    """Measurements of one setting, one entry for each prompt."""

    ratios: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    decibels: list[float] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = inkstream.load("pocket", inkstream.Machine("cpu"))
    calls: list[int] = []
    for stack in (module for module in model.family.transformer.modules() if isinstance(module, Blocks)):
        for block in stack:
            block.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    found = {name: Found() for name in SETTINGS}
    for number, case in thin(open_suite("pocket"), options.prompts).items():
        draw_in_turn(model, number, case, options.steps, calls, found)
        print(f"prompt {number}", file=sys.stderr, flush=True)
    rows = [as_row(name, one) for name, one in found.items()]
    for row in rows:
        print(row)
    if options.record:
        settings = {"steps": options.steps, "prompts": options.prompts}
        command = shlex.join(["python", *sys.argv])
        print(write_record(options.record, options.date, command, {}, [settings | row for row in rows]))


def draw_in_turn(
    model: inkstream.Model, number: int, case: Case, steps: int, calls: list[int], found: dict[str, Found]
) -> None:
    """Draw one prompt with every setting and append the measurements to `found`."""
    first = Request(prompt=case.prompt, seed=1000 * number, steps=steps)
    cond = model.encode(first)
    model.sample(first.model_copy(update={"steps": 2}), cond)  # warm-up
    drawn, seconds, work = {}, {}, {}
    for name, fields in SETTINGS.items():
        request = first.model_copy(update=fields)
        calls.clear()
        began = time.process_time()
        latents = model.sample(request, cond)
        seconds[name], work[name] = time.process_time() - began, sum(calls)
        drawn[name] = to_image(model.decode(latents)[0])
    for name, one in found.items():
        one.ratios.append(seconds["in full"] / seconds[name])
        one.blocks.append(work[name] / work["in full"])
        one.decibels.append(psnr(drawn["in full"], drawn[name]) if name != "in full" else float("inf"))
        marks = None if case.scene is None else grade(drawn[name], case.scene, stated=case.stated)
        one.judged.append(Judged(Path(), number, 0, case.group, marks))


def as_row(name: str, found: Found) -> dict[str, Any]:
    objects = [j.marks.objects for j in found.judged if j.marks is not None and j.marks.objects is not None]
    exact = name == "in full"
    return {
        "setting": name,
        **SETTINGS[name],
        "speed_up": round(median(found.ratios), 3),
        "blocks": round(mean(found.blocks), 4),
        "psnr_median": None if exact else round(median(found.decibels), 2),
        "psnr_least": None if exact else round(min(found.decibels), 2),
        "all_right": round(mean(bool(j.right) for j in found.judged), 4),
        "objects": round(mean(objects), 4),
    }


if __name__ == "__main__":
    main()
