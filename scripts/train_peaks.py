"""Measure the memory of one training step of an adapter with streamed blocks, and compare it with the computed peak.

    python scripts/train_peaks.py --date 2026-11-30 --record train-cpu [--pixels 256] [--layers 3] [--rank 32]

The model has Z-Image's full width, few layers and random weights. Each number format runs in a separate process on the
CPU. Measured is the peak of one step with its optimiser over the process before the model is read. Pages of the files
that are mapped while the weights are packed do not count: the system takes them back at need.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from plan_peaks import peak, reset_peak
from torch import Tensor

from inkstream.bench.records import write_record
from inkstream.engine.files.parts import Unset, recognise
from inkstream.families import family_of
from inkstream.families.zimage.specs import BASE
from inkstream.nn.around import Around
from inkstream.nn.heap import give_back_freed_memory
from inkstream.train.adapters import AdapterWeights, slots_of
from inkstream.train.learner import Learner
from inkstream.train.models import read_frozen
from inkstream.train.objectives import Batch, flow
from inkstream.train.parallel import ALONE
from inkstream.train.plan import CAPTION, foresee
from inkstream.train.reading import as_recipe
from inkstream.train.stream import recompute_blocks
from inkstream.types import Conditioning, Spec
from inkstream.weights.files import write_state

CPU = torch.device("cpu")
WARM_UP = {"n_layers": 1, "n_refiner_layers": 1, "dim": 384, "n_heads": 3}


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(measure(options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_random(wide(options.layers), Path(folder) / "wide.safetensors")
        write_random(replace(BASE, transformer=replace(BASE.transformer, **WARM_UP)), Path(folder) / "warm.safetensors")
        for base in options.base or ["", "int8"]:
            words = [sys.executable, __file__, "--child", f"--file={path}", f"--base={base}", f"--rank={options.rank}"]
            words += [f"--pixels={options.pixels}", f"--layers={options.layers}"]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--record", help="name of the record to write")
    parser.add_argument("--pixels", type=int, default=256, help="side of the picture")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--base", action="append", help="as in [adapter] base; repeat the option for more")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def wide(layers: int) -> Spec:
    return replace(BASE, transformer=replace(BASE.transformer, n_layers=layers, n_refiner_layers=1))


def write_random(spec: Spec, path: Path) -> Path:
    """Write a transformer's file with random weights in bfloat16."""
    part = family_of(spec.family).parts["transformer"]
    with torch.device("meta"), Unset():
        module = part.build(spec.transformer)
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        spread = 1.0 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
        state[name] = (torch.randn(tensor.shape, generator=generator) * spread).bfloat16()
    write_state(path, state)
    return path


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Take one step. Returns the seconds, and the computed and the measured bytes."""
    step(Path(options.file).with_name("warm.safetensors"), recipe_of(options, pixels=64))
    recipe, spec = recipe_of(options), wide(options.layers)
    foreseen = foresee(recipe, spec, CPU)
    gc.collect()
    give_back_freed_memory()
    before = reset_peak(on_gpu=False)  # `step` resets it again once the model is read
    began = time.perf_counter()
    step(Path(options.file), recipe)
    measured = peak(on_gpu=False) - before
    return {
        "layers": options.layers, "rank": options.rank, "pixels": options.pixels, "base": options.base[0] or "bf16",
        "foreseen": foreseen.peak, "measured": measured, "error": foreseen.peak / measured - 1,
        "of_which": {"base": foreseen.base, "adapter": foreseen.learners, "step": foreseen.step},
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def recipe_of(options: argparse.Namespace, pixels: int = 0) -> Any:
    side = pixels or options.pixels
    return as_recipe({
        "model": {"from": "z-image"},
        "adapter": {"kind": "lora", "rank": options.rank, "base": options.base[0], "stream": True},
        "data": {"source": "photos", "sizes": [[side, side]]},
        "run": {"batch": 1, "dtype": "fp32"},
    })  # fmt: skip


def step(path: Path, recipe: Any) -> None:
    """Read a transformer and take one step with an adapter, its optimiser and its averages."""
    kind, found = recognise(path)
    spec = replace(BASE, transformer=found.config)
    transformer = read_frozen(kind, "transformer", found, recipe, CPU)
    give_back_freed_memory()
    reset_peak(on_gpu=False)
    adapter = AdapterWeights(transformer, slots_of(spec, recipe.adapter), recipe.adapter, 0)
    around = Around(adapters=(adapter.apply_to(transformer),))
    recompute_blocks(transformer, adapter.weights_in)
    family: Any = kind(spec, dict.fromkeys(kind.parts) | {"transformer": transformer}, {"tokenizer": None})
    learner = Learner("adapter", {"adapter": adapter}, recipe, CPU, ALONE)
    images = torch.randn(1, *family.latent_shape(*recipe.data.sizes[0]))
    cond = Conditioning(torch.randn(CAPTION, spec.transformer.cap_feat_dim), (CAPTION,))
    batch, noise, t = Batch(images, cond=cond), torch.randn(images.shape), torch.tensor([0.5])
    learner.advance(0, lambda piece: flow(family, batch, t, noise, recipe.objective, around).mean())


if __name__ == "__main__":
    main()
