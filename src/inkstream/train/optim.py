"""Optimisers, the learning rate schedule, and averaged weights (EMA)."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from inkstream.train.parallel import cut, whole
from inkstream.train.recipe import Optimiser, Run
from inkstream.train.weights import Weights
from inkstream.types import InputError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan 2024, "Muon"): small singular values grow fast, but end only near 1."""
UPDATE_RMS = 0.2
"""RMS of Muon's updates. It is AdamW's usual RMS, so both can use similar learning rates (arXiv 2502.16982, eq. 4)."""


def make_optimiser(weights: Weights, settings: Optimiser) -> list[torch.optim.Optimizer]:
    """Return the optimiser of all weights; with Muon, that of the matrices inside blocks and AdamW for the rest.

    Raises InputError if a package of the extra `train` is missing.
    """
    names = [name for name, w in weights.live.items() if settings.kind == "muon" and is_block_matrix(name, w)]
    rest = {name: w for name, w in weights.masters.items() if name not in set(names)}
    decayed = [w for name, w in rest.items() if w.ndim >= 2 and not is_embedding(name)]
    others = [w for name, w in rest.items() if w.ndim < 2 or is_embedding(name)]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    found: list[torch.optim.Optimizer] = []
    if groups:
        found.append(_make(groups, settings))
    if names:
        masters, live = [weights.masters[name] for name in names], [weights.live[name] for name in names]
        found.append(Muon(masters, settings.lr_muon, settings.momentum, settings.weight_decay, live))
    return found


def _make(groups: list[dict[str, Any]], settings: Optimiser) -> torch.optim.Optimizer:
    if settings.kind == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.lr)
    if settings.kind == "prodigy":
        prodigy = _imported("prodigyopt", settings.kind).Prodigy
        careful = settings.warmup > 0  # as its author advises for diffusion models
        return prodigy(groups, lr=settings.lr, betas=settings.betas, safeguard_warmup=careful, use_bias_correction=True)
    if settings.kind == "adamw8bit":
        return _imported("bitsandbytes", settings.kind).optim.AdamW8bit(groups, lr=settings.lr, betas=settings.betas)
    return AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def _imported(package: str, kind: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"[optimiser] kind = {kind} needs {package}: pip install 'inkstream[train]'") from error


def is_block_matrix(name: str, weight: Tensor) -> bool:
    """Return whether a weight is a matrix or convolution in a numbered block, outside its modulation layers."""
    numbered = any(part.isdigit() for part in name.split(".")[:-2])
    return weight.ndim >= 2 and min(weight.shape[0], weight[0].numel()) > 1 and numbered and not reads_time(name)


def reads_time(name: str) -> bool:
    """Return whether a layer computes modulation from the time."""
    return any(word in name for word in ("adaLN", "img_mod", "txt_mod", "modulation"))


def is_embedding(name: str) -> bool:
    """Return whether a weight is an embedding. Weight decay would shrink the rows of rare tokens."""
    return "embed_tokens" in name or "pad_token" in name


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates: all directions of a matrix get an equal step.

    Convolutions count as (out, in * height * width) matrices. whose: the full weight of each parameter, which may be a
    shard of it; shards are gathered, because only a full matrix can be orthogonalised.
    """

    def __init__(
        self, params: Sequence[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
        whose: Sequence[Tensor] | None = None,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._whose = dict(zip(map(id, params), whose or params))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients = [p.grad for p in params]
            kept = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(kept, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, kept, group["momentum"])  # Nesterov
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            whole_ones = [whole(update, self._whose[id(p)]) for p, update in zip(params, ahead)]
            for some in alike(whole_ones):  # matrices of equal shape are one batch
                made = orthogonalise(torch.stack([whole_ones[i].flatten(1) for i in some]))
                for i, matrix in zip(some, made):
                    scale = UPDATE_RMS * math.sqrt(max(matrix.shape))
                    part = cut(matrix.view_as(whole_ones[i]), self._whose[id(params[i])])
                    params[i].add_(part, alpha=-group["lr"] * scale)


def alike(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Group the indices of matrices of equal shape."""
    found: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        found.setdefault(matrix.shape, []).append(place)
    return list(found.values())


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest matrices with singular values near 1 (0.7 to 1.2 after 5 steps). matrices: (B, n, m).

    The products are in bfloat16 if the device is faster with it than with float32: the iteration corrects rounding
    errors.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if fast_bfloat16(x.device) else x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device has hardware for bfloat16 products."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def rate(step: int, settings: Optimiser, run: Run) -> float:
    """Return the learning rate factor, 0 to 1, of a step: linear warmup, constant, linear decay. step: from 0."""
    rising = min(1.0, (step + 1) / max(settings.warmup, 1))
    falling = min(1.0, (run.steps - step) / max(settings.decay * run.steps, 1))
    return rising * falling


def set_rate(optimisers: Sequence[torch.optim.Optimizer], share: float, settings: Optimiser) -> None:
    """Set the learning rate of all parameter groups to `share` of the optimiser's full rate."""
    for optimiser in optimisers:
        full = settings.lr_muon if isinstance(optimiser, Muon) else settings.lr
        for group in optimiser.param_groups:
            group["lr"] = full * share


def ema_decay(step: int, settings: Optimiser) -> float:
    """Return the EMA decay of a step. It starts low, so the average forgets the first steps. step: from 0."""
    return min(settings.ema, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weights, in place."""
    torch._foreach_lerp_(list(ema), list(weights), 1 - decay)


NEEDED: dict[str, set[str]] = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum"},
    "Adafactor": {"step", "variance"},
    "Prodigy": {"step", "s", "p0", "exp_avg", "exp_avg_sq", "group_d", "group_d_max", "group_d_numerator", "group_k"},
    "AdamW8bit": {"step", "state1", "state2"},
}
"""Class of an optimiser -> its state. `group_` stands before a number of a parameter group, kept with its weights."""
MORE = {"Adafactor": {"row_var", "col_var"}, "AdamW8bit": {"qmap1", "qmap2", "absmax1", "absmax2"}}
"""More state that large weights have, or matrices."""


def optimiser_state(optimisers: Sequence[torch.optim.Optimizer], weights: Weights) -> dict[str, Tensor]:
    """Return the optimisers' state, unsharded, by `kind.weight name`. All processes must call it.

    Integers and floats of Python become scalars of 64 bits.
    """
    names = {id(master): name for name, master in weights.masters.items()}
    found: dict[str, Tensor] = {}
    for optimiser in optimisers:
        numbers = sorted(key for key in NEEDED[type(optimiser).__name__] if key.startswith("group_"))
        for group in optimiser.param_groups:
            for master in group["params"]:
                own = dict(sorted(optimiser.state.get(master, {}).items()))
                own |= {key: group[key.removeprefix("group_")] for key in numbers if own}
                for what, value in own.items():
                    name = names[id(master)]
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=_wide(value))
                    found[f"{what}.{name}"] = whole(tensor, weights.live[name])
    return found


def _wide(number: float) -> torch.dtype:
    return torch.int64 if isinstance(number, int) else torch.float64


def load_optimiser_state(
    optimisers: Sequence[torch.optim.Optimizer], weights: Weights, state: Mapping[str, Tensor]
) -> None:
    """Restore a state of `optimiser_state`. Raises InputError if it is of another optimiser."""
    owners = {id(p): (optimiser, g) for optimiser in optimisers for g in optimiser.param_groups for p in g["params"]}
    seen: dict[str, set[str]] = {}  # class of an optimiser -> the state that is found
    for key, value in state.items():
        what, _, name = key.partition(".")
        master = weights.masters[name]
        owner, group = owners[id(master)]
        seen.setdefault(type(owner).__name__, set()).add(what)
        if what.startswith("group_"):
            group[what.removeprefix("group_")] = value.item()
        elif value.ndim == 0 and value.dtype in (torch.int64, torch.float64):
            owner.state[master][what] = value.item()
        else:
            part = cut(value, weights.live[name])
            on_device = what != "step" or master.is_cuda  # the fused kernel reads `step` on its own device
            owner.state[master][what] = part.to(master.device if on_device else "cpu", copy=True)
    for kind, found in seen.items():
        some = NEEDED[kind] - {"variance"} if kind == "Adafactor" else NEEDED[kind]
        if not some <= found <= NEEDED[kind] | MORE.get(kind, set()):
            raise InputError("[optimiser] kind differs from the checkpoint's: restore it, or start from the weights")
