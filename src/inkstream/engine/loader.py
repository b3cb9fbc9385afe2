"""`load`: a model's name or path becomes a Model, its weights mapped from disk and moved tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inkstream.engine.licences import is_commercial_only
from inkstream.engine.model import Model
from inkstream.engine.sources import PREFIXES, Found, Progress, Source, encoder_of, locate, locate_writer
from inkstream.families import Writer
from inkstream.nn.quant import place, takes_packed
from inkstream.quant.packed import Weight, unpack
from inkstream.types import InputError, Loading
from inkstream.weights.files import read_state, strip_prefix
from inkstream.weights.keymap import translate

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load(
    name: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
    commercial_only: bool | None = None,
) -> Model:
    """A model ready to draw.

    name: of a known model, OWNER/NAME on the hub, or a path (see `sources.locate`). device, dtype: None takes the best
    there is. Weights of that dtype stay views of the files on disk. commercial_only: refuse a licence that does not
    allow commercial use; None follows the setting. InputError, before anything big is read, where a part is missing or
    does not fit.
    """
    tell = progress or (lambda event: None)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    source = locate(name, tell, is_commercial_only(commercial_only))
    tokenizers = {name: source.family.tokenizers[name](folder) for name, folder in source.tokenizers.items()}
    check_vocabulary(source, tokenizers)
    modules = {
        part: read(found, device, dtype_of(part, dtype, device), partial(_tell, tell, part))
        for part, found in source.parts.items()
    }

    def read_writer() -> Writer:
        writer: Any = read(locate_writer(source), device, dtype, lambda done, total: None)
        writer.attach(modules["text_encoder"], tokenizers["tokenizer"])
        return writer

    return Model(source.family(source.spec, modules, tokenizers), device, dtype, read_writer)


def check_vocabulary(source: Source, tokenizers: Mapping[str, Any]) -> None:
    """InputError where a tokenizer has more tokens than its text encoder knows."""
    for name, tokenizer in tokenizers.items():
        used, known = vocabulary_of(tokenizer), getattr(source.spec, encoder_of(name)).vocab_size
        if used > known:
            place = source.tokenizers[name]
            raise InputError(f"the tokenizer {place} has {used} tokens, the text encoder knows {known}")


def vocabulary_of(tokenizer: Any) -> int:
    """How many tokens it has; one of the tokenizers package, or of transformers."""
    return tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else len(tokenizer)


def read(
    found: Found, device: torch.device, dtype: torch.dtype, progress: Callable[[int, int], None], packed: bool = True
) -> nn.Module:
    """The part's module with its weights; progress is told the bytes done and in all.

    packed: weights that are packed in the file stay so where a layer can hold them; otherwise they are unpacked.
    """
    wanted = found.module.state_dict().keys()
    state = translate(found.rules, strip_prefix(read_state(found.path), PREFIXES))
    state = {key: tensor for key, tensor in state.items() if key in wanted}
    done, total = 0, sum(tensor.nbytes for tensor in state.values())
    progress(0, total)
    for key in state:
        size = state[key].nbytes
        state[key] = _move(found.module, key, state[key], device, dtype, packed)  # one at a time, so that it is freed
        if (done + size) * 100 // total > done * 100 // total:
            progress(done + size, total)
        done += size
    module = found.module
    module.load_state_dict(place(module, state, dtype), strict=True, assign=True)
    unset = [key for key, tensor in chain(module.named_parameters(), module.named_buffers()) if tensor.is_meta]
    assert not unset, f"no weights for {unset}"
    return module.eval().requires_grad_(False)


def _move(
    module: nn.Module, key: str, weight: Weight, device: torch.device, dtype: torch.dtype, packed: bool
) -> Weight:
    if isinstance(weight, Tensor):
        return weight.to(device, dtype)
    weight = weight.to(device)
    return weight if packed and takes_packed(module, key, weight) else unpack(weight, dtype)


def choose_device(name: torch.device | str | None = None) -> torch.device:
    """The device asked for, or the best there is. InputError where it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name} is not known: take cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps}
    if not there.get(device.type, False):
        best = choose_device()
        raise InputError(f"device {name} is not there or not supported by this build of torch: take {best}")
    return device


def choose_dtype(name: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the device's own: bfloat16 where it is computed in hardware, else float32.

    Not float16: activations of Z-Image leave its range.
    """
    if name is None:
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
        return torch.bfloat16 if fast else torch.float32
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {name} is not supported: take {', '.join(DTYPES)}")
    return dtype  # type: ignore[return-value]


def dtype_of(part: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A part's own dtype: the autoencoder overflows in float16, and on the CPU gains nothing from less than float32."""
    if part == "vae" and (device.type == "cpu" or dtype == torch.float16):
        return torch.float32
    return dtype


def _tell(progress: Progress, what: str, done: int, total: int) -> None:
    progress(Loading(what, done, total))
