"""Benchmark cases as data: the model, the settings and the contenders. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.specs import POCKET, TURBO, ZImageConfig
from inkstream.nn.config import Qwen3Config, VAEConfig
from inkstream.types import InputError, Spec

Weights = Literal["package", "folder", "memory"]
"""Source of the weights.

package: Pocket's own weights. folder: random weights in a folder that all contenders read, so their pictures can be
compared. memory: random weights that each contender draws for itself, for large models.
"""
WORDS = 2048
"""Vocabulary size of Pocket's tokenizer, which all random models use."""


@dataclass(frozen=True)
class Case:
    """One benchmark case. The first contender is inkstream; all contenders draw in turn."""

    name: str
    spec: Spec
    width: int
    height: int
    steps: int
    guidance: float = 1.0
    count: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    weights: Weights = "folder"
    contenders: tuple[str, ...] = ("ours", "diffusers")  # keys of CONTENDERS
    warm: int = 1
    repeats: int = 5

    @property
    def evaluations(self) -> int:
        """Number of transformer evaluations for one picture."""
        return self.steps * (2 if self.guidance > 1 and self.spec.guides == "twice" else 1)

    @property
    def home(self) -> tuple[object, ...]:
        """The model that a contender must open. Cases with equal homes are drawn by the same processes."""
        return (self.spec.name, self.device, self.dtype, self.weights)


CONTENDERS: Mapping[str, Mapping[str, str]] = {
    "ours": {"by": "ours"},
    "ours compiled": {"by": "ours", "compiled": "blocks"},
    "ours fp8": {"by": "ours", "quant": "fp8"},
    "diffusers": {"by": "diffusers"},
    "diffusers compiled": {"by": "diffusers", "compiled": "blocks"},
    "sd.cpp": {"by": "sd"},
}
"""Contender -> the program that draws (`by`) and its options."""

_TINY = replace(
    TURBO,
    name="tiny",
    transformer=ZImageConfig(dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, axes_dims=(8, 12, 12)),
    text_encoder=Qwen3Config(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=64,
    ),
    vae=VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
)  # fmt: skip
_MEDIUM = replace(
    TURBO,
    name="medium",
    transformer=ZImageConfig(dim=1024, n_layers=12, n_heads=8, cap_feat_dim=512),
    text_encoder=Qwen3Config(
        vocab_size=WORDS, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, intermediate_size=1536,
    ),
    vae=VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=8),
)  # fmt: skip
_REAL_WIDTH = replace(
    _MEDIUM, name="real-width", transformer=ZImageConfig(n_layers=4, n_refiner_layers=1, cap_feat_dim=512)
)

_GPU = Case("", TURBO, 1024, 1024, 8, device="cuda", dtype="bf16", weights="memory", warm=5, repeats=20,
            contenders=("ours", "ours fp8", "diffusers", "diffusers compiled"))  # fmt: skip

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("tiny", _TINY, 256, 256, 8, repeats=25),
        Case("tiny-guided", _TINY, 256, 256, 8, 5.0, repeats=25),
        Case("medium", _MEDIUM, 256, 256, 8, repeats=9),
        Case("medium-guided", _MEDIUM, 256, 256, 8, 5.0),
        Case("real-width", _REAL_WIDTH, 512, 512, 2, repeats=9),
        Case("pocket", POCKET, 128, 128, 16, 4.0, weights="package"),
        replace(_GPU, name="turbo-1024", contenders=(*_GPU.contenders, "ours compiled", "sd.cpp")),
        replace(_GPU, name="turbo-512-batch-8", width=512, height=512, count=8, warm=2, repeats=8),
        replace(_GPU, name="base-1024", steps=50, guidance=5.0, repeats=2),
        replace(_GPU, name="klein-1024", spec=KLEIN_4B, steps=4),
    )
}
"""All cases by name. CPU cases are small; GPU cases have the published sizes. base-1024 uses Turbo's spec, because Base
has the same architecture."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(name for name, case in CASES.items() if case.device == device)
    for group, device in (("cpu", "cpu"), ("gpu", "cuda"))
}


def find(names: Sequence[str]) -> list[Case]:
    """Return the cases of these names; a group's name stands for all its cases. Raises InputError for an unknown
    name."""
    chosen = dict.fromkeys(name for given in names for name in GROUPS.get(given, (given,)))
    for name in chosen:
        if name not in CASES:
            raise InputError(f"there is no case {name}: take {', '.join((*CASES, *GROUPS))}")
    return [CASES[name] for name in chosen]


def rehearsed(case: Case) -> Case:
    """Return the case with 2 blocks of width 64, at 64 pixels, on the CPU, to test a GPU case in seconds."""
    tiny = case.spec.tiny or case.spec
    spec = replace(tiny, name=case.spec.name, text_encoder=replace(tiny.text_encoder, vocab_size=WORDS))
    return replace(
        case, spec=spec, width=64, height=64, steps=min(case.steps, 3), device="cpu", dtype="fp32", warm=1, repeats=2
    )
