"""Benchmark adapters: four requests with four adapters together and one by one, and what one adapter adds to a forward.

    python scripts/bench_loras.py --date 2026-11-30 [--repeats 5] [--record loras-cpu]

The four requests are drawn with Pocket: two ranks, two strengths, and one request without an adapter. Before the
timing, each picture is compared with the same picture drawn alone. The forward is that of two blocks of Z-Image's full
width, 3840, with a picture of 512 x 512 pixels, in float32; the adapter has rank 32 on all layers of the blocks. All
compared ways take turns.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from PIL import Image

from inkstream import Engine, Request
from inkstream.bench.ours import random_model
from inkstream.bench.records import write_record
from inkstream.engine.drawing.adapters import Adapters
from inkstream.families import SPECS, adapter_names
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.forward import Sample
from inkstream.types import Conditioning, LoraUse, Machine, Spec
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.write import write_lora

FOUR = (
    {"prompt": "a red circle", "loras": ["rank8:0.8"]},
    {"prompt": "a blue square above a green triangle", "loras": ["rank32:0.5"]},
    {"prompt": "three yellow stars", "loras": ["rank8:0.3", "rank32:0.4"]},
    {"prompt": "a purple ring"},
)
"""Fields of the four requests. The names are those of the adapters in the folder."""
TEXT = 64  # tokens of the prompt of the wide forward
SIDE = 64  # of its latents, which is a picture of 512 x 512 pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [time_four(Path(folder), options.repeats), time_wide(Path(folder), options.repeats)]
    for row in rows:
        print(row)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows), file=sys.stderr)


def random_lora(spec: Spec, rank: int, seed: int) -> Lora:
    """Return an adapter of all layers in the main blocks. Its changes are small, so pictures stay pictures."""
    by = torch.Generator().manual_seed(seed)
    layers = {
        path: LowRank(torch.randn(rank, i, generator=by), torch.randn(o, rank, generator=by), 0.05 / (i * rank) ** 0.5)
        for path, (o, i) in adapter_names(spec).layers.items()
        if path.startswith("layers.") and "adaLN" not in path
    }
    return Lora({path: LayerChange([Part(change)]) for path, change in layers.items()})


def time_four(folder: Path, repeats: int) -> dict[str, object]:
    """Compare the four pictures drawn together with those drawn one by one, then time both ways."""
    spec = SPECS["pocket"]
    for rank in (8, 32):
        write_lora(folder / f"rank{rank}.safetensors", random_lora(spec, rank, rank), adapter_names(spec), "diffusers")
    engine = Engine(Machine("cpu", lora_folder=str(folder)))
    requests = [Request(seed=i, **fields) for i, fields in enumerate(FOUR)]
    least = min(apart(a, b) for a, b in zip(one_by_one(engine, requests), at_once(engine, requests)))
    if least < 48:
        raise SystemExit(f"a picture drawn together with others differs too much: PSNR {least:.1f} dB")
    times: dict[str, list[float]] = {"together": [], "one_by_one": []}
    for _ in range(repeats):
        for way, draw in (("together", at_once), ("one_by_one", one_by_one)):
            times[way].append(timed(lambda draw=draw: draw(engine, requests)))
    together, alone = (median(times[way]) for way in ("together", "one_by_one"))
    note = f"least PSNR of the pictures {least:.0f} dB; medians of {repeats}, in turn"
    return {"what": "four requests with four adapters, seconds", "together": together, "one_by_one": alone,
            "ratio": alone / together, "note": note}  # fmt: skip


def one_by_one(engine: Engine, requests: Sequence[Request]) -> list[Image.Image]:
    return [engine.generate(request).images[0] for request in requests]


def at_once(engine: Engine, requests: Sequence[Request]) -> list[Image.Image]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda request: engine.generate(request).images[0], requests))


def apart(one: Image.Image, other: Image.Image) -> float:
    """Return the PSNR of two pictures in dB; infinite if all pixels are equal."""
    a, b = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double() for image in (one, other))
    error = float((a - b).square().mean())
    return float("inf") if error == 0 else 10 * float(torch.log10(torch.tensor(255**2 / error)))


@torch.inference_mode()
def time_wide(folder: Path, repeats: int) -> dict[str, object]:
    """Time a forward of full width with an adapter and without one."""
    tiny = SPECS["z-image-turbo"].tiny
    assert tiny is not None
    config = SPECS["z-image-turbo"].transformer
    spec = replace(tiny, transformer=replace(config, n_layers=2, n_refiner_layers=1, cap_feat_dim=32))
    model = random_model(spec, torch.device("cpu"), torch.float32)
    path = write_lora(folder / "wide.safetensors", random_lora(spec, 32, 0), adapter_names(spec), "comfyui")
    held = Adapters(model.family.transformer, spec, model.device, model.dtype, folder)
    around = Around(adapters=(held.get(LoraUse(str(path))),))
    cond = Conditioning(torch.randn(TEXT, 32), (TEXT,))
    latents = torch.randn(16, SIDE, SIDE)
    samples = {}
    for name, what in (("plain", NOTHING), ("adapted", around)):
        (prepared,) = model.family.prepare(cond, 8 * SIDE, 8 * SIDE, [0.5], what)
        samples[name] = Sample(latents, 0.5, prepared, what)
        model.family.answer([samples[name]])
    times: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(repeats):
        for name, sample in samples.items():
            times[name].append(timed(lambda sample=sample: model.family.answer([sample])))
    plain, adapted = median(times["plain"]), median(times["adapted"])
    note = f"rank 32 on all layers; medians of {repeats}, in turn"
    return {"what": "a forward of width 3840, seconds", "plain": plain, "adapted": adapted,
            "overhead": adapted / plain - 1, "note": note}  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


if __name__ == "__main__":
    main()
