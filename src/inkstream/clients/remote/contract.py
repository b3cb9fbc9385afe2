"""What an adapter is: the facts of a provider, and a function that draws one picture and tells what happens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inkstream.clients.remote.catalogue import Offer
from inkstream.engine.wire import Peer


@dataclass(frozen=True)
class Order:
    """One picture to draw. Everything in it fits the model."""

    offer: Offer
    prompt: str
    size: tuple[int, int]
    seed: int
    references: Sequence[bytes] = ()  # PNG files
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    upsample: bool = False
    previews: bool = False

    def has(self, field: str) -> bool:
        """Whether the model reads a field of a request."""
        return field in self.offer.takes


@dataclass(frozen=True)
class Waiting:
    """The picture is waited for. ahead: the number of pictures before it, if the provider says so."""

    line: str
    ahead: int | None = None


@dataclass(frozen=True)
class Sketch:
    """An unfinished picture: number `number` of at most `of`."""

    data: bytes
    number: int
    of: int


@dataclass(frozen=True)
class Drawn:
    """The finished picture's file. cost: US dollars, if the provider says so. told: the prompt that it made of ours."""

    data: bytes
    cost: float | None = None
    told: str = ""


News = Generator[Waiting | Sketch | Drawn, Any, None]


@dataclass(frozen=True)
class Provider:
    """A provider of remote models, and its dialect."""

    title: str
    address: str  # of its API
    key_variable: str  # environment variables of the key, and of another address
    address_variable: str
    authorise: Callable[[str], Mapping[str, str]]  # the key -> headers
    moderated: Callable[[Any], bool]  # whether the body of an error says that the content is refused
    draw: Callable[[Peer, Order], News]  # ends with one Drawn; raises InputError


def waiting(lines: Iterator[str]) -> Generator[Waiting, None, Any]:
    """Yield the lines of a request of `engine.wire` as Waiting, and return its answer."""
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            return end.value
        yield Waiting(line)


def bearer(key: str) -> Mapping[str, str]:
    """The header of providers that take the key as a bearer token."""
    return {"Authorization": f"Bearer {key}"}
