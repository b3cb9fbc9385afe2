"""Write src/inkstream/engine/machine/foreseen.json: the predicted memory of every model, in every precision and plan.

    python scripts/foresee.py [MODEL ...]

The table has the bytes of each phase at the model's default size, on a GPU (computing in bfloat16) and on a CPU (in
float32), the bytes that are streamed for one evaluation, and the floating-point operations of each phase, at that size
and at half of its sides. The script
downloads and allocates no weights. With MODEL names it updates only these models.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.flow import way_of
from inkstream.engine.drawing.model import Model
from inkstream.engine.files.parts import Found, Unset
from inkstream.engine.files.quantise import QUANTS, in_safetensors, prepare
from inkstream.engine.files.sources import Source
from inkstream.engine.machine import fit
from inkstream.engine.machine.loader import dtype_of
from inkstream.engine.machine.memory import typical
from inkstream.engine.machine.placement import add_up, at_home, on_meta, weigh, working
from inkstream.families import SPECS, family_of, parts_of
from inkstream.types import Request, Spec

TABLE = Path(fit.__file__).with_name("foreseen.json")
PRECISIONS = ("bf16", "fp8", "w8a8", "q8_0", "q6_k", "q5_k", "q4_k", "nf4")
TOKENS = {"zimage": 128, "flux1": 77 + 512, "flux2": 512, "flux3": 160, "qwenimage": 128}
"""Family -> tokens of a typical prompt."""
COMPUTES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for spec in SPECS.values():
        if spec.name in sys.argv[1:] or (len(sys.argv) == 1 and (spec.repo or spec.folder)):
            print(spec.name, file=sys.stderr, flush=True)
            table[spec.name] = foresee(spec)
            TABLE.write_text(json.dumps(table, indent=1) + "\n")


def foresee(spec: Spec) -> dict[str, Any]:
    request = complete(typical(spec).model_copy(update={"seed": 0}), spec)
    half = request.model_copy(update={"width": request.width // 2, "height": request.height // 2})
    found: dict[str, Any] = {
        "text_tokens": TOKENS[spec.family],
        "flops": count_products(spec, request),
        "flops_half": count_products(spec, half),
    }
    for kind, dtype in COMPUTES.items():
        device = torch.device(kind)
        dtypes = {part: dtype_of(part, dtype, device) for part in parts_of(spec)}
        work = working(build(as_source(spec, "bf16"), dtypes), request)
        found[kind] = {}
        for precision in PRECISIONS:
            source = as_source(spec, precision)
            modules = {part: at_home(source, part, dtypes[part]) for part in source.parts}
            weights = weigh(source, modules, device, dtypes)
            found[kind][precision] = {
                name: dict(add_up(name, count, work, device).phases) for name, count in weights.items()
            } | {"transformer": sum(t.nbytes for t in modules["transformer"].state_dict().values())}
    return found


def count_products(spec: Spec, request: Request) -> dict[str, int]:
    """Count the floating-point operations of each phase. A multiplication and an addition count as two."""
    model = build(as_source(spec, "bf16"), dict.fromkeys(parts_of(spec), torch.float32))
    counts = {}
    for phase, compute in way_of(model.family).phases(model, request).items():
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), Undecided():
            compute()
        counts[phase] = counter.get_total_flops()
    return counts


class Undecided(TorchDispatchMode):
    """Makes tensors without data return False when code reads a value to decide whether it can skip a computation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def build(source: Source, dtypes: dict[str, torch.dtype]) -> Model:
    modules = {part: at_home(source, part, dtypes[part]) for part in source.parts}
    tokenizer = SimpleNamespace(token_to_id=len, encode=lambda text, **_: SimpleNamespace(ids=[0]))
    tokenizers = dict.fromkeys(source.family.tokenizers, tokenizer)
    model = on_meta(source, modules, tokenizers, dtypes, {}, Path())
    model.family.tokens = lambda prompt, references=0: (1,) * TOKENS[source.spec.family]  # type: ignore[method-assign]
    return model


def as_source(spec: Spec, precision: str) -> Source:
    """Return the model on meta, with weights as files of this precision hold them."""
    family, quant = family_of(spec.family), QUANTS[precision]
    parts = {}
    for name, part in parts_of(spec).items():
        with torch.device("meta"), Unset():
            module = part.build(getattr(spec, name))
        tensors = {key: tensor.to(torch.bfloat16) for key, tensor in module.state_dict().items()}
        own = (quant if part.gguf else in_safetensors(quant)) if part.packs else None
        packed = prepare(tensors, part, own)
        parts[name] = Found(Path(), getattr(spec, name), module, (), packed, {})
    return Source(family, replace(spec), parts, {}, {})


if __name__ == "__main__":
    main()
