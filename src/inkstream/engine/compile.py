"""Regional compilation: of one block of each kind what lies before and after its attention, once, for all sizes."""

from __future__ import annotations

import torch
from torch import nn

from inkstream.nn.stack import Blocks


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile the regions of every block in a model's stacks; returns how many there are that differ.

    A region is a function of tensors whose sizes are unknowns to the compiler, and blocks of a kind share what is
    compiled of it: another prompt, size or number of pictures compiles nothing anew. Attention, which goes by how long
    each sequence is, stays outside; so do streaming and caching.
    """
    blocks = [block for stack in model.modules() if isinstance(stack, Blocks) for block in stack]
    kinds = {(type(block), name) for block in blocks for name in getattr(block, "regions", ())}
    for block in blocks:
        for name in getattr(block, "regions", ()):
            setattr(block, name, torch.compile(getattr(block, name), backend=backend, dynamic=True))
    return len(kinds)
