"""The processes that torchrun started, as its environment tells. Needs no torch."""

from __future__ import annotations

import os


def count_processes() -> int:
    """How many there are, this one among them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
