"""PEFT's configuration of an adapter: a JSON file beside the weights, or an entry in their metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inkstream.types import InputError

FILE = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""The entry that diffusers writes. Its keys have the prefix of the model's part."""


@dataclass(frozen=True)
class Config:
    """What PEFT says of an adapter; nothing, if there is no configuration."""

    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.entries.get("peft_type", "LORA" if self.entries else ""))

    def scale(self, path: str, rank: int) -> float:
        """alpha / r of a layer, or alpha / sqrt(r) of rsLoRA; 1 if there is no alpha. rank: of its tensors."""
        alpha = self._of(path, "alpha_pattern", self.entries.get("lora_alpha", self.entries.get("alpha")))
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self.entries.get("use_rslora") else rank)

    def rank(self, path: str) -> int:
        """The configured rank of a layer, for a LoKr whose factors do not show it."""
        return int(self._of(path, "rank_pattern", self.entries.get("r", 1)))

    def _of(self, path: str, patterns: str, default: Any) -> Any:
        for pattern, value in (self.entries.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default


def read_config(file: Path, metadata: Mapping[str, str]) -> Config:
    """The configuration of an adapter's file. metadata: of the file. Raises InputError if it cannot be read."""
    beside = file.parent / FILE
    if METADATA in metadata:
        source, text = f"{METADATA} of {file}", metadata[METADATA]
    elif beside.is_file() and file.name == "adapter_model.safetensors":
        source, text = str(beside), beside.read_text("utf-8")
    else:
        return Config()
    try:
        entries = {str(key).removeprefix("transformer."): value for key, value in json.loads(text).items()}
        config = Config(entries)
        config.scale("layer", config.rank("layer"))
        numbers = [entries.get("eps", 0), entries.get("num_cayley_neumann_terms", 0)]
        for patterns in ("alpha_pattern", "rank_pattern"):
            numbers += (entries.get(patterns) or {}).values()
        for number in numbers:
            float(number)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise InputError(f"{source} is not PEFT's configuration of an adapter ({error}): download it again") from error
    return config


def write_config(ranks: Mapping[str, int], dora: bool) -> dict[str, Any]:
    """The configuration of a LoRA with scale 1. ranks: path of a layer -> rank. dora: whether all are DoRAs."""
    most = max(ranks.values(), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
    }
