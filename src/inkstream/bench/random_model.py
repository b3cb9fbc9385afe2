"""Write models with random weights, of any size, to measure time and memory, which do not depend on the values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from inkstream.engine.files.parts import Unset
from inkstream.engine.files.sources import locate
from inkstream.families import family_of, parts_of
from inkstream.types import Spec
from inkstream.weights.files import write_stream

BUFFER = 1 << 24
"""Number of normal random numbers that are drawn once. All matrices are filled from them."""


def write_random(
    spec: Spec, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:  # fmt: skip
    """Write a model of random weights that `load` can read, with Pocket's tokenizer. One weight is in memory at a time.

    Weights have our names, so loading fuses nothing. Matrices have a variance of 1 / (number of inputs), scales are one
    and biases are zero, so numbers stay finite at any depth. progress: called with the bytes of each written weight.
    """
    write_documents(spec, folder)
    numbers = torch.randn(BUFFER, generator=torch.Generator().manual_seed(seed))
    for name, part in parts_of(spec).items():
        with torch.device("meta"), Unset():
            module = part.build(getattr(spec, name))
        plan = {key: tensor.to(dtype) for key, tensor in module.state_dict().items()}
        (folder / name).mkdir(exist_ok=True)
        write_stream(folder / name / "model.safetensors", plan, _draw(module, numbers, dtype), None, progress)
    return folder


def write_documents(spec: Spec, folder: Path) -> Path:
    """Write a model's folder without the weights: the JSON files of a published folder, and Pocket's tokenizer."""
    folder.mkdir(parents=True)
    for name, content in family_of(spec.family).documents(spec).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for tokenizer in family_of(spec.family).tokenizers:
        write_tokenizer(folder / tokenizer)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write Pocket's tokenizer, with the tokens of thoughts that FLUX.2 klein's template holds too."""
    shutil.copytree(locate("pocket").tokenizers["tokenizer"], folder, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def _draw(module: nn.Module, numbers: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            rows = numbers.repeat(-(-tensor.numel() // BUFFER))[: tensor.numel()].view(tensor.shape)
            yield key, (rows / (tensor[0].numel() ** 0.5)).to(dtype)
        else:
            yield key, (torch.zeros if key.endswith("bias") else torch.ones)(tensor.shape).to(dtype)
