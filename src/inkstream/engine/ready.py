"""The last touch to a model's parts when they are where they stay: each in the way that is fastest there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from inkstream.engine.compile import compile_blocks
from inkstream.engine.graphs import replay_small
from inkstream.nn.prepacked import prepack


def make_ready(modules: Mapping[str, nn.Module], compiled: bool) -> None:
    """compiled: compile the transformer's blocks when it first draws; a compiler packs as it likes."""
    if compiled:
        compile_blocks(modules["transformer"])
    else:
        prepack(modules["transformer"])
    replay_small(modules)
