"""Time one evaluation of Z-Image's transformer with weights in each packed format and in float32, at its real width.

    python scripts/bench_quant.py --date 2026-11-21 [--kind w8a8 ...] [--repeats 5] [--record quant-speed-cpu]

The model has four layers and both refiners. It runs on the CPU at 512 pixels with a prompt of 64 tokens. All layers
share the random weights of one layer, so all contenders fit in memory together; one layer is larger than the CPU's
caches. The float32 weights are prepacked for MKL, as in a resident model. Contenders take turns; `ratio` is the median
of a format divided by that of float32.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import torch
from torch import Tensor

from inkstream.bench.records import write_record
from inkstream.bench.run import take_turns
from inkstream.engine.files.quantise import QUANTS, Quant
from inkstream.families.zimage.keys import PACKS
from inkstream.families.zimage.model import ZImageTransformer
from inkstream.families.zimage.specs import TURBO, ZImageConfig
from inkstream.nn.forward import Sample
from inkstream.nn.prepacked import prepack
from inkstream.nn.quant import place
from inkstream.quant.pack import pack
from inkstream.quant.packed import Weight
from inkstream.weights.keymap import matches

FULL = "fp32"
FLOAT32 = Quant((), dtype=torch.float32)
KINDS = ("bf16", "w8a8", "int8", "fp8", "q8_0", "q4_k", "nf4")
TIME = 0.5
"""The time t of the evaluation."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    config = replace(TURBO.transformer, n_layers=options.layers)
    side = options.pixels // TURBO.vae.downscale
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.in_channels, side, side, generator=generator)
    caption = torch.randn(options.tokens, config.cap_feat_dim, generator=generator)
    weights = random_weights(config, generator)
    contenders = {kind: evaluation(config, weights, kind, x, caption) for kind in (FULL, *(options.kind or KINDS))}
    true = contenders[FULL]()
    errors = {kind: float((run() - true).norm() / true.norm()) for kind, run in contenders.items()}
    times = take_turns(contenders, options.repeats, warmup=0)
    rows = [
        {
            "kind": kind,
            "ratio": round(own.median / times[FULL].median, 3),
            "seconds_median": round(own.median, 3),
            "seconds_least": round(own.least, 3),
            "seconds_most": round(own.most, 3),
            "error": float(f"{errors[kind]:.3g}"),
            "layers": options.layers,
            "pixels": options.pixels,
            "prompt_tokens": options.tokens,
            "repeats": options.repeats,
        }
        for kind, own in times.items()
    ]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows), file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--kind", action="append", choices=QUANTS, help=f"a format; default: {', '.join(KINDS)}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=512, help="side of the picture")
    parser.add_argument("--tokens", type=int, default=64, help="length of the prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    return parser.parse_args()


def random_weights(config: ZImageConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw random weights. All blocks share the weights of one.

    Matrices have a variance of 1 / (number of inputs), norms are one and biases are zero.
    """
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in ZImageTransformer(config).state_dict().items()}
    drawn: dict[str, Tensor] = {}
    weights = {}
    for name, shape in shapes.items():
        stack, _, rest = name.partition(".")
        own = rest.partition(".")[2] if stack in ("layers", "noise_refiner", "context_refiner") else name
        if own not in drawn:
            normal = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            drawn[own] = normal if len(shape) > 1 else torch.full(shape, float(not own.endswith("bias")))
        weights[name] = drawn[own]
    return weights


def evaluation(
    config: ZImageConfig, weights: dict[str, Tensor], kind: str, x: Tensor, caption: Tensor
) -> Callable[[], Tensor]:
    """Return a function that runs one evaluation with weights of this kind. The prompt is prepared before.

    Kind bf16 also computes in bfloat16.
    """
    quant = FLOAT32 if kind == FULL else QUANTS[kind]
    dtype = quant.dtype or torch.float32
    made: dict[int, Weight] = {}  # blocks share their weights, so each weight is packed once
    for name, weight in weights.items():
        if id(weight) not in made:
            packs = weight.ndim == 2 and any(matches(pattern, name) for pattern in PACKS) and quant.formats
            made[id(weight)] = pack(quant.formats[0], weight, quant.dynamic) if packs else weight.to(dtype)
    state = {name: made[id(weight)] for name, weight in weights.items()}
    with torch.device("meta"):
        model = ZImageTransformer(config)
    model.load_state_dict(place(model, state, dtype), assign=True)
    prepack(model)
    _, side, _ = x.shape
    prepared = replace(model.prepare(caption, side, side), scales=model.scales([TIME]))
    return lambda: model([Sample(x, TIME, prepared)])[0]


if __name__ == "__main__":
    main()
