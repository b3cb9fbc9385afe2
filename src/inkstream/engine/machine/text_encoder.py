"""The text encoders of a model alone, for machines that draw without them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
from safetensors.torch import save

from inkstream.engine.machine.encoding import fingerprint, text_parts
from inkstream.engine.machine.install import Placement
from inkstream.engine.machine.loader import open_model, read
from inkstream.types import InputError, Machine

KEPT = 64
"""Prompts whose states are kept."""
MOST_TOKENS = 4096
"""Most tokens of a prompt."""


class TextEncoder:
    """The text encoders of a model, ready to encode. Its other weights are not read.

    Raises InputError as `load` does.
    """

    def __init__(self, name: str, machine: Machine):
        opened = open_model(name, machine)
        source = opened.source
        away = text_parts(source)
        if not away:
            raise InputError(f"{name} has no text encoder: give another --model")
        modules = {
            part: read(found, Placement(opened.device, opened.dtypes[part], rules=found.rules), part=part)
            if part in away
            else found.module
            for part, found in source.parts.items()
        }
        self.family = source.family(source.spec, modules, opened.tokenizers)
        self.dtype = str(opened.dtypes[away[0]]).removeprefix("torch.")
        self.mark = fingerprint(source)
        self._turn = threading.Lock()
        self._encode_once = lru_cache(KEPT)(self._encode_once)

    def encode(self, tokens: Sequence[int], mark: str, dtype: str) -> bytes:
        """The states of a prompt as safetensors. Raises InputError if the asker has other text encoders, or a type."""
        if mark != self.mark:
            name = self.family.spec.name
            raise InputError(f"the server encodes for {name}, whose text encoders are others: start it with your model")
        if dtype != self.dtype:
            raise InputError(f"the server encodes in {self.dtype}, not in {dtype}: start it with --dtype {dtype}")
        if not 0 < len(tokens) <= MOST_TOKENS:
            raise InputError(f"{len(tokens)} tokens are no prompt: send 1 to {MOST_TOKENS}")
        with self._turn:
            return self._encode_once(tuple(tokens))

    def _encode_once(self, tokens: tuple[int, ...]) -> bytes:
        try:
            with torch.no_grad():
                cond = self.family.encode_tokens([tokens])
        except (IndexError, ValueError):
            raise InputError("the tokens are not those of this model: take the same model on both sides") from None
        tensors = {"tokens": cond.tokens, "lengths": torch.tensor(cond.lengths)}
        if cond.pooled is not None:
            tensors["pooled"] = cond.pooled
        return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
