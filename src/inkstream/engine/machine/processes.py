"""The number of processes that torchrun started, from its environment variables. Needs no torch."""

from __future__ import annotations

import os


def count_processes() -> int:
    """The number of processes, including this one; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
