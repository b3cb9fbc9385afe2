"""inkstream as a contender. `inkstream bench` starts it as `python -m inkstream.bench.ours`."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import inkstream
from inkstream.bench.child import Draw, Order, Setup, Stages, attend, to_bytes
from inkstream.bench.random_model import write_tokenizer
from inkstream.engine.drawing.model import Model
from inkstream.engine.files.parts import Unset
from inkstream.engine.machine.install import Placement, install
from inkstream.engine.machine.loader import dtype_of, load
from inkstream.families import Part, family_of, parts_of
from inkstream.quant.pack import fits, pack
from inkstream.quant.packed import Weight
from inkstream.types import Machine, Request, Spec
from inkstream.weights.keymap import matches


def open_ours(setup: Setup) -> tuple[Draw, dict[str, str]]:
    case, compiled = setup.case, "compiled" in setup.how
    if case.weights == "memory":
        model = random_model(case.spec, setup.device, setup.dtype, "quant" in setup.how, compiled)
    else:
        place = "pocket" if case.weights == "package" else setup.folder
        dtype = str(setup.dtype).removeprefix("torch.")
        model = load(place, Machine(str(setup.device), dtype, compile=compiled))

    def draw(order: Order, stages: Stages) -> Tensor:
        case = order.case
        wish = {"prompt": order.prompt, "negative_prompt": order.negative, "steps": order.steps, "seed": 0}
        wish |= {name: getattr(case, name) for name in ("width", "height", "guidance", "count")}
        request = Request.model_validate(wish)
        noise = order.noise(model.family.latent_shape(case.width, case.height))
        cond = model.encode(request)
        stages.done("prompt")
        latents = model.sample(request, cond, noise)
        stages.done("steps")
        pixels = to_bytes(model.decode(latents))
        stages.done("pixels")
        return pixels

    return draw, {"inkstream": inkstream.__version__}


def random_model(
    spec: Spec, device: torch.device, dtype: torch.dtype, fp8: bool = False, compiled: bool = False
) -> Model:
    """Build a model with random weights directly on its device, with Pocket's tokenizer."""
    family = family_of(spec.family)
    modules = {
        name: random_part(
            name, part, getattr(spec, name), Placement(device, dtype_of(name, dtype, device)), fp8, compiled
        )
        for name, part in parts_of(spec).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizers = {name: read(Path(folder)) for name, read in family.tokenizers.items()}
    return Model(family(spec, modules, tokenizers), device, dtype)


def random_part(name: str, part: Part, config: object, placement: Placement, fp8: bool, compiled: bool) -> nn.Module:
    """Build one part with random weights. Matrices have a variance of 1 / (number of inputs), scales are one and
    biases are zero."""
    with torch.device("meta"), Unset():
        module = part.build(config)
    dtype, device = placement.dtype, placement.device
    state: dict[str, Weight] = {}
    for key, like in module.state_dict().items():
        if like.ndim < 2:
            state[key] = torch.full(like.shape, 0.0 if key.endswith("bias") else 1.0, dtype=dtype, device=device)
            continue
        weight = torch.randn(like.shape, dtype=dtype, device=device).mul_(like[0].numel() ** -0.5)
        packs = fp8 and any(matches(pattern, key) for pattern in part.packs) and fits("e4m3", tuple(like.shape))
        state[key] = pack("e4m3", weight, dynamic=True) if packs else weight
    return install(name, module, nullcontext(state), placement, machine=Machine(compile=compiled))


if __name__ == "__main__":
    attend(open_ours)
