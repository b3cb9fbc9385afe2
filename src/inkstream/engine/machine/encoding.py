"""Text encoders on another machine: tokens go there, and the states come back as safetensors, bit for bit.

A model that is loaded with the machine's `text_encoder_server` leaves its text encoders out, and its family's
`encode_tokens` asks that server, which runs a `text_encoder.TextEncoder`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from inkstream.engine.files.sources import Source
from inkstream.engine.keys import find_key
from inkstream.engine.wire import Peer, ask_bytes, open_peer
from inkstream.quant.packed import Weight
from inkstream.types import Conditioning, InputError
from inkstream.weights.files import in_section, read_state

KEY = "INKSTREAM_API_KEY"
"""The environment variable, or the name in the keyring, of the server's key."""
REACH = 15.0
"""Seconds of retries while the server cannot be reached. The person who waits is told nothing meanwhile."""
SMALL, SAMPLES = 65_536, 8
"""Bytes of the weights that are read to tell encoders apart, at most, and their number."""


def text_parts(source: Source) -> list[str]:
    """The parts of a model that encode prompts."""
    return [part for part in source.parts if part.startswith("text_encoder")]


def fingerprint(source: Source) -> str:
    """A hash of a model's text encoders: the names, shapes and types of all weights, and the values of a few."""
    hashed = hashlib.sha256()
    for part in text_parts(source):
        found = source.parts[part]
        raw = in_section(read_state(found.path), found.section)
        hashed.update(repr(sorted((name, tuple(w.shape), _kind(w)) for name, w in raw.items())).encode())
        plain = (name for name in sorted(raw) if isinstance(raw[name], Tensor) and raw[name].nbytes <= SMALL)
        for name in list(plain)[-SAMPLES:]:
            hashed.update(raw[name].contiguous().view(torch.uint8).numpy().tobytes())  # type: ignore[union-attr]
    return hashed.hexdigest()[:32]


def _kind(weight: Weight) -> str:
    """The type of a weight's numbers; of a packed one, the type and the number of its packed bytes."""
    if isinstance(weight, Tensor):
        return str(weight.dtype)
    return f"packed {weight.data.dtype} {weight.data.nbytes}"


class FarEncoder:
    """Asks a server for the states of prompts. Raises InputError for an address that is none."""

    def __init__(self, address: str, source: Source, device: torch.device, dtype: torch.dtype):
        key = find_key(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        peer = open_peer("the text encoder's server", address, f"check {KEY}", key, headers)
        self.peer = replace(peer, reach=REACH)
        self.device = device
        self.dtype = str(dtype).removeprefix("torch.")
        self.mark = fingerprint(source)

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        """As `Family.encode_tokens`. The family keeps the states of prompts by their tokens, as it keeps its own."""
        return Conditioning.pack([self._encode(tokens) for tokens in prompts])

    def _encode(self, tokens: tuple[int, ...]) -> Conditioning:
        asked = {"tokens": list(tokens), "mark": self.mark, "dtype": self.dtype}
        waiting = ask_bytes(self.peer, "v1/encode", asked)
        while True:
            try:
                next(waiting)
            except StopIteration as end:
                return read_states(end.value, self.device, self.peer)


def read_states(data: bytes, device: torch.device, peer: Peer) -> Conditioning:
    """A Conditioning of one prompt from a server's answer. Raises InputError if it is none."""
    try:
        found: Mapping[str, Any] = load(data)
        lengths = tuple(int(length) for length in found["lengths"])
        if found["tokens"].ndim != 2 or sum(lengths) != len(found["tokens"]):
            raise ValueError
    except Exception:  # safetensors has errors of its own
        raise InputError(f"{peer.title} sent no states: check its address {peer.address}") from None
    pooled = found["pooled"].to(device) if "pooled" in found else None
    return Conditioning(found["tokens"].to(device), lengths, pooled)
