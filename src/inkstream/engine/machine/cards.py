"""Known graphics cards: memory and nominal speeds, for advice about a machine that is not this one.

Sources: the makers' data sheets and architecture papers. Dense products, with sums in float32. GeForce cards do twice
as many operations in bfloat16 as their shaders do in float32.
"""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from typing import NamedTuple

from inkstream.engine.machine.fit import ORDER, Speed
from inkstream.types import InputError, read_size

REACHED = 0.65
"""The share of the nominal operations that products of a transformer reach. Measured by others: 0.63 on H100."""
PCIE = 20e9
"""Bytes per second that a card gets from the memory of its machine: PCIe 4.0 with 16 lanes."""
TOUCHED = 4.5
"""Bytes that are moved for each weight that is unpacked: read packed, written and read again in bfloat16."""


class Card(NamedTuple):
    name: str
    memory: int  # GiB
    bandwidth: int  # GB/s
    bf16: float  # TFLOP/s; of float16, where the card has no bfloat16
    fp8: float | None = None  # TFLOP/s

    @property
    def title(self) -> str:
        return f"{self.name} {self.memory}GB"

    @property
    def memory_bytes(self) -> int:
        return self.memory * 2**30

    def speed(self) -> Speed:
        """The speed to plan with."""
        packed = {} if self.fp8 is None else {"fp8": REACHED * self.fp8 * 1e12}
        unpacked = dict.fromkeys((name for name in ORDER["cuda"] if name != "bf16"), self.bandwidth * 1e9 / TOUCHED)
        return Speed(REACHED * self.bf16 * 1e12, packed, unpacked, PCIE)


CARDS = [
    Card("T4", 16, 320, 65),
    Card("RTX 2060", 6, 336, 52),
    Card("RTX 2080 Ti", 11, 616, 108),
    Card("RTX 3050", 8, 224, 18),
    Card("RTX 3060", 12, 360, 25),
    Card("RTX 3060 Ti", 8, 448, 32),
    Card("RTX 3070", 8, 448, 41),
    Card("RTX 3070 Ti", 8, 608, 43),
    Card("RTX 3080", 10, 760, 60),
    Card("RTX 3080", 12, 912, 61),
    Card("RTX 3080 Ti", 12, 912, 68),
    Card("RTX 3090", 24, 936, 71),
    Card("RTX 3090 Ti", 24, 1008, 80),
    Card("RTX 4060", 8, 272, 30, 60),
    Card("RTX 4060 Ti", 8, 288, 44, 88),
    Card("RTX 4060 Ti", 16, 288, 44, 88),
    Card("RTX 4070", 12, 504, 58, 117),
    Card("RTX 4070 Super", 12, 504, 71, 142),
    Card("RTX 4070 Ti", 12, 504, 80, 160),
    Card("RTX 4070 Ti Super", 16, 672, 88, 176),
    Card("RTX 4080", 16, 717, 97, 195),
    Card("RTX 4080 Super", 16, 736, 104, 209),
    Card("RTX 4090", 24, 1008, 165, 330),
    Card("RTX 5060", 8, 448, 38, 77),
    Card("RTX 5060 Ti", 8, 448, 47, 95),
    Card("RTX 5060 Ti", 16, 448, 47, 95),
    Card("RTX 5070", 12, 672, 62, 123),
    Card("RTX 5070 Ti", 16, 896, 88, 176),
    Card("RTX 5080", 16, 960, 113, 225),
    Card("RTX 5090", 32, 1792, 210, 419),
    Card("RTX PRO 6000", 96, 1792, 500, 1000),
    Card("L4", 24, 300, 121, 242),
    Card("A10G", 24, 600, 70),
    Card("L40S", 48, 864, 362, 733),
    Card("A100", 40, 1555, 312),
    Card("A100", 80, 2039, 312),
    Card("H100", 80, 3350, 989, 1979),
    Card("H200", 141, 4800, 989, 1979),
    Card("B200", 180, 8000, 2250, 4500),
]
MAKERS = re.compile(r"\b(nvidia|geforce|tesla|quadro|graphics|card|gpu)\b")


def find_card(asked: str) -> Card | int:
    """The card of a name such as "RTX 3060", or the bytes of a size such as 8GiB.

    Raises InputError if there is no such card, or if it has several sizes of memory and the name does not say which.
    """
    with suppress(InputError):
        return read_size(asked)
    words = MAKERS.sub(" ", asked.lower().replace("-", " "))
    words = re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=ti\b|super\b)", " ", words)  # rtx3060ti
    size = re.search(r"\b(\d+) ?gi?b\b", words)
    plain = " ".join((words[: size.start()] + words[size.end() :] if size else words).split())
    named = [card for card in CARDS if _plain(card.name) == plain or _plain(card.name) == f"rtx {plain}"]
    found = [card for card in named if not size or card.memory == int(size[1])]
    if len(found) == 1:
        return found[0]
    if named:
        raise InputError(f"--for {asked}: name one of {', '.join(repr(card.title) for card in named)}")
    if not re.search("[a-z]", plain):
        return read_size(asked)  # a size that is not valid, and the error says so
    near = difflib.get_close_matches(plain, {_plain(card.name) for card in CARDS}, n=3)
    like = [card.name for card in CARDS if _plain(card.name) in near]
    hint = f"name one such as {', '.join(dict.fromkeys(like))}, or " if like else ""
    raise InputError(f"--for {asked} is not a card that is known here: {hint}give its memory, such as 8GiB")


def _plain(name: str) -> str:
    return " ".join(re.sub(r"(?<=[a-z])(?=\d)", " ", name.lower()).split())
