"""Measure the quality loss of each packed format: Pocket's pictures, graded and compared with those of the full
weights, and the error of matrix products with Z-Image's widths.

    python scripts/quant_quality.py --date 2026-11-21 [--kind q4_k ...] [--prompts 60] [--record quant-pocket-cpu]

A row for each format has the grades, the PSNR of the pictures, the error of one evaluation, and the share of packed
numbers. Pictures stay in --folder and are not drawn again.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

import inkstream
from inkstream import Model
from inkstream.bench.records import write_record
from inkstream.engine.files.convert import convert
from inkstream.engine.files.quantise import QUANTS, Quant
from inkstream.evaluate.judge import judge
from inkstream.evaluate.measures import psnr
from inkstream.evaluate.report import shares
from inkstream.evaluate.run import Job, Settings, draw, open_picture, plan
from inkstream.evaluate.suites import Case, open_suite, thin
from inkstream.nn.quant import PackedLinear
from inkstream.quant import QuantName
from inkstream.quant.pack import pack
from inkstream.quant.packed import Packed
from inkstream.weights.files import read_state

FULL = "fp32"  # Pocket's own weights
MEASURES = {"all_right": "all right", "objects": "objects", "object_and_colour": "object and colour",
            "relation": "relation", "count": "count"}  # fmt: skip
"""Column of a row -> measure of the graders."""
FIRST = 8
"""Number of jobs whose first evaluation is compared."""
WIDTHS = ((3840, 3840), (10_240, 3840))
"""Rows and columns of the random matrices."""
TOKENS = 256


def main() -> None:
    options = parse()
    cases = thin(open_suite("pocket"), options.prompts)
    reference = inkstream.load("pocket", inkstream.Machine("cpu", "fp32"))
    jobs = plan(reference, cases, Settings(seeds=1))
    rows = [picture_row(FULL, "pocket", reference, reference, cases, jobs, options.folder)]
    print(rows[0], flush=True)
    kinds: Sequence[QuantName] = options.kind or get_args(QuantName)
    for kind in kinds:
        place = options.folder / kind / "model"
        if not place.exists():
            convert("pocket", place, quant=kind)
        model = inkstream.load(place, inkstream.Machine("cpu", "fp32"))
        row = picture_row(kind, place, model, reference, cases, jobs, options.folder)
        row |= {key: round(value, 4) for key, value in packed_shares(place, QUANTS[kind]).items()}
        rows.append(row | {f"product_{shape[0]}": product_error(QUANTS[kind], shape) for shape in WIDTHS})
        print(rows[-1], flush=True)
    if options.record:
        command = shlex.join(["python", *sys.argv])
        print(write_record(options.record, options.date, command, {}, rows), file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--kind", action="append", choices=QUANTS, help="a format; default: all formats")
    parser.add_argument("--prompts", type=int, default=60, help="number of prompts, evenly spread over the suite")
    parser.add_argument("--folder", type=Path, default=Path("evaluation/quant"), help="folder for models and pictures")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    return parser.parse_args()


# Pocket -------------------------------------------------------------------------------------------------------------


def picture_row(
    kind: str, name: str | Path, model: Model, reference: Model, cases: Mapping[int, Case], jobs: Sequence[Job],
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Draw and grade all jobs. PSNR in dB is relative to the pictures of the full weights, which are drawn first."""
    for _ in draw(model, jobs, folder / kind):
        pass
    judged = [judge(job.path(folder / kind), job.case, job.seed, cases[job.case]) for job in jobs]
    found = {row.measure: row for row in shares(judged) if row.group == "all"}
    row: dict[str, Any] = {"kind": kind, "pictures": len(jobs)}
    row |= {column: round(found[measure].value, 4) for column, measure in MEASURES.items()}
    if kind == FULL:
        return row
    apart = [psnr(open_picture(job.path(folder / FULL)), open_picture(job.path(folder / kind))) for job in jobs]
    ranked = sorted(min(value, 99.0) for value in apart)  # equal pictures have an infinite PSNR
    errors = [relative(first_answer(model, job), first_answer(reference, job)) for job in jobs[:FIRST]]
    return row | {
        "psnr_median": round(median(ranked), 2),
        "psnr_tenth": round(ranked[len(ranked) // 10], 2),  # nine of ten pictures have a higher PSNR
        "one_evaluation": float(f"{sum(errors) / len(errors):.3g}"),
    }


@torch.inference_mode()
def first_answer(model: Model, job: Job) -> Tensor:
    """Return the velocity at a job's first point, for the prompt without guidance.

    It contains the rounding errors of both the text encoder and the transformer.
    """
    run = model.start(job.request, model.encode(job.request), None)
    assert run.query is not None
    (velocity,) = model.family.answer(run.samples()[:1])
    run.close()
    return velocity


def relative(x: Tensor, true: Tensor) -> float:
    return float((x - true).norm() / true.norm())


def packed_shares(place: Path, quant: Quant) -> dict[str, float]:
    """Describe the packed files of the transformer and the text encoder.

    Returns the share of numbers in the requested format, their share in the next wider formats, the mean bits per
    number, and the files' size in MB.
    """
    every = [path for path in place.rglob("*") if path.suffix in (".safetensors", ".gguf")]
    files = [path for path in every if path.parent.name != "vae"]
    numbers: Counter[str] = Counter()
    size = 0
    for path in files:
        for weight in read_state(path).values():
            form = weight.format if isinstance(weight, Packed) else "full"
            numbers[form] += math.prod(weight.shape)
            size += weight.nbytes
    total = sum(numbers.values())
    asked = quant.formats[:1] or ("full",)
    wider = [form for form in quant.formats[1:] if form not in asked]
    return {
        "share": sum(numbers[form] for form in asked) / total,
        "wider": sum(numbers[form] for form in wider) / total,
        "bits": 8 * size / total,
        "megabytes": sum(path.stat().st_size for path in files) / 1e6,
    }


# Matrices -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def product_error(quant: Quant, shape: tuple[int, int]) -> float:
    """Return the relative error of a product of normal random numbers with a normal random matrix in this format."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(TOKENS, shape[1], generator=generator)
    if quant.formats:
        out = PackedLinear(pack(quant.formats[0], weight, quant.dynamic), None, torch.float32)(x)
    else:
        out = F.linear(x, weight.to(quant.dtype or weight.dtype).float())
    return float(f"{relative(out, F.linear(x, weight)):.3g}")


if __name__ == "__main__":
    main()
