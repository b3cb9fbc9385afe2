"""`Remote.submit(Request) -> Iterator[Event]`: the Drawer that draws with a model of somebody else, over its API.

A request leaves the machine only here, and only for a model whose name begins with its provider's, such as
`bfl:flux-2-pro`. What goes is the prompt, the references, and the options that the model takes.
"""

from __future__ import annotations

import base64
import importlib
import io
import os
import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from inkstream.clients.remote.budget import Budget, money
from inkstream.clients.remote.catalogue import Offer, offer_of
from inkstream.clients.remote.contract import Drawn, Order, Provider, Sketch, Waiting
from inkstream.engine.drawing.enhancer import ChatWriter, able, is_address
from inkstream.engine.drawing.options import options, refuse
from inkstream.engine.drawing.templates import filled, wildcard_folder
from inkstream.engine.files.licences import check_licence, is_commercial_only
from inkstream.engine.keys import key_of
from inkstream.engine.pictures.inputs import open_header, open_picture
from inkstream.engine.wire import Peer, open_peer
from inkstream.types import (
    Done,
    Event,
    Failed,
    InputError,
    Loading,
    Machine,
    Queued,
    Request,
    Result,
    Spec,
    Step,
    singles,
)

if TYPE_CHECKING:
    from PIL import Image

TIME = 900.0
"""Seconds after which a picture that does not come is given up."""
HERE = Machine()


def provider_of(name: str) -> Provider:
    """The provider of a remote model's name, or of its own name."""
    return importlib.import_module(f"inkstream.clients.remote.{name.partition(':')[0]}").PROVIDER


class Remote:
    """Draws with one remote model. It is a Drawer, as `Engine` is.

    name: such as bfl:flux-2-pro, see `inkstream models`. machine: its `max_cost`, `commercial_only` and `wildcards`
    hold. previews: ask for unfinished pictures, which may cost a little. budget: shared with other Drawers; default:
    the machine's `max_cost` for this one alone. Raises InputError for an unknown name. The key is read at each request.
    """

    def __init__(self, name: str, machine: Machine = HERE, previews: bool = False, budget: Budget | None = None):
        self.offer = offer_of(name)
        self.provider = provider_of(name)
        self.machine = machine
        self.previews = previews
        self.spec_here = able(self.offer.spec, machine)
        self.budget = budget or Budget(machine.max_cost)
        if is_commercial_only(machine.commercial_only):
            check_licence(name, self.offer.spec)

    def submit(self, request: Request) -> Iterator[Event]:
        """Yield the events of a request, and a Done for each picture. Closing the iterator cancels.

        A request that cannot be drawn ends with Failed; nothing is raised for it.
        """
        yield Queued(request)
        try:
            yield from self._draw(request)
        except InputError as error:
            yield Failed(str(error), "input")

    def generate(self, request: Request) -> Result:
        """Return all pictures of a request. Raises InputError if it cannot be drawn."""
        return Result.of(self.submit(request))

    def models(self) -> list[Spec]:
        """Return the model."""
        return [self.spec_here]

    def spec(self, name: str) -> Spec:
        """Return the Spec of the model. Raises InputError for another name."""
        if name != self.offer.name:
            raise InputError(f"model {name} is not drawn here: take {self.offer.name}")
        return self.spec_here

    def remarks(self, request: Request) -> list[str]:
        """Return one line for each option of the request that has no effect."""
        table = options(self.spec_here, request)
        return [
            f"{name.replace('_', ' ')} has no effect: {option.why}"
            for name, option in table.items()
            if option.effect == "ignores" and name in request.model_fields_set
        ]

    def ran_on(self, name: str) -> dict[str, str]:
        """Return the provider's host as the device."""
        return {"device": urlsplit(self.address).hostname or self.address}

    @property
    def address(self) -> str:
        """The address of the provider's API: its own, or the one that its variable names."""
        return os.environ.get(self.provider.address_variable, "").strip() or self.provider.address

    def check(self, request: Request) -> float:
        """The estimated cost of a request in US dollars. Nothing is sent.

        Raises InputError if the model cannot draw the request, or if it would cost more than is left of the budget.
        """
        if "model" in request.model_fields_set:
            self.spec(request.model)
        check_request(self.offer, self.spec_here, request, sizes_of(request))
        whole = request.count * self._estimate(request)
        self.budget.check(whole, self._what(request.count))
        return whole

    # Inside -----------------------------------------------------------------------------------------------------------

    def _draw(self, request: Request) -> Iterator[Event]:
        estimate = self.check(request)
        peer = self._peer()
        if request.seed is None:
            request = request.model_copy(update={"seed": secrets.randbelow(2**32)})
        pictures = [_encoded(open_picture(source)) for source in request.reference]
        yield Loading("remote", note=self._notice(peer, request.count, len(pictures), estimate))
        folder = wildcard_folder(self.machine)
        for index, one in enumerate(singles(request)):
            one = filled(one, folder)
            if one.prompt != request.prompt:
                yield Loading("prompt", text=one.prompt)
            if self.machine.enhancer is not None and one.upsample is not False:
                one = yield from self._enhanced(one, self.machine.enhancer, pictures)
            yield from self._draw_one(peer, one, pictures, index, request.count)

    def _draw_one(self, peer: Peer, one: Request, pictures: list[bytes], index: int, count: int) -> Iterator[Event]:
        """Draw one picture. A picture that fails counts with its estimate, because it may be billed."""
        began, estimate = time.perf_counter(), self._estimate(one)
        self.budget.take(estimate, self._what(1))
        size = self._size(one)
        order = Order(
            self.offer, one.prompt, size, one.seed or 0, pictures, one.steps, one.guidance, one.negative_prompt,
            bool(one.upsample), self.previews,
        )  # fmt: skip
        drawn, steps = None, 1
        with closing(self.provider.draw(peer, order)) as told:
            for news in told:
                if time.perf_counter() - began > TIME:
                    raise InputError(f"{peer.title} did not draw within {TIME:.0f} s: try again later")
                if isinstance(news, Waiting):
                    yield Loading(news.line) if news.ahead is None else Queued(one, news.ahead)
                elif isinstance(news, Sketch):
                    steps = news.of + 1
                    sketch = _small(self._opened(news.data))
                    passed = time.perf_counter() - began
                    yield Step(news.number, steps, index, count, 1 - news.number / steps, passed, sketch)
                else:
                    drawn = news
        assert isinstance(drawn, Drawn)  # or the provider's `draw` has raised
        cost = estimate if drawn.cost is None else drawn.cost
        self.budget.correct(estimate, cost)
        image = self._opened(drawn.data)
        seconds = time.perf_counter() - began
        yield Step(steps, steps, index, count, 0.0, seconds)
        done = one.model_copy(update={"model": self.offer.name, "width": size[0], "height": size[1]})
        yield Done(image, done, index, count, seconds, drawn.told, cost=round(cost, 6))

    def _enhanced(self, one: Request, enhancer: str, references: Sequence[bytes]) -> Generator[Event, None, Request]:
        """Write a request's prompt out by the enhancer. What the provider's own expansion would do is done then."""
        if not is_address(enhancer):
            raise InputError(f"enhancer {enhancer} is a model here: for remote models, give the address of a server")
        prompt = one.prompt
        for text in ChatWriter(enhancer, self.machine.enhancer_model).write(one.prompt, references, one.seed or 0):
            prompt = text or prompt
            yield Loading("prompt", text=text)
        return one.model_copy(update={"prompt": prompt, "upsample": False})

    def _peer(self) -> Peer:
        provider = self.provider
        key = key_of(provider.title, provider.key_variable)
        remedy = f"check {provider.key_variable}"
        return open_peer(provider.title, self.address, remedy, key, provider.authorise(key), provider.moderated)

    def _size(self, request: Request) -> tuple[int, int]:
        return self.offer.size_of(request, sizes_of(request))

    def _estimate(self, request: Request) -> float:
        return estimate(self.offer, request)

    def _notice(self, peer: Peer, count: int, references: int, cost: float) -> str:
        """The line that says what leaves the machine, where to, and what it costs."""
        goes = "the prompt goes"
        if references:
            goes = f"the prompt and {references} picture{'s' if references > 1 else ''} go"
        price = f"about {money(cost)} (prices of {self.offer.date}, {self.offer.source})"
        return f"{goes} to {urlsplit(peer.address).hostname}; {self._what(count)}: {price}"

    def _what(self, count: int) -> str:
        return f"{count} pictures of {self.offer.name}" if count > 1 else f"a picture of {self.offer.name}"

    def _opened(self, data: bytes) -> Image.Image:
        """The picture of a file. Raises InputError if it cannot be read: somebody else made it."""
        try:
            return open_picture("data:;base64," + base64.b64encode(data).decode())
        except InputError:
            what = f"a file of {len(data)} bytes that is no whole picture"
            raise InputError(f"{self.provider.title} sent {what}: ask for it again") from None


def remote_drawers(names: Iterable[str], machine: Machine = HERE, previews: bool = False) -> dict[str, Remote]:
    """The Drawers of remote models, by name, for a Router. They share one budget. Raises InputError."""
    budget = Budget(machine.max_cost)
    return {name: Remote(name, machine, previews, budget) for name in dict.fromkeys(names)}


def check_request(offer: Offer, spec: Spec, request: Request, references: Sequence[tuple[int, int]] = ()) -> None:
    """Raise InputError, in one line which names the option, if a remote model cannot draw a request.

    spec: of the model on this machine. references: their sizes, if they are known.
    """
    refuse(request, spec)
    if len(request.reference) > offer.references:
        raise InputError(f"{len(request.reference)} references are too many for {offer.name}: give {offer.references}")
    if not request.prompt.strip():
        raise InputError("there is no prompt: say what to draw")
    offer.size_of(request, references)


def sizes_of(request: Request) -> list[tuple[int, int]]:
    """The sizes of a request's references. Raises InputError if one cannot be read."""
    return [open_header(source).size for source in request.reference]


def estimate(offer: Offer, request: Request) -> float:
    """The estimated cost of one picture of a request, in US dollars."""
    references = sizes_of(request)
    size = offer.size_of(request, references)
    resolution = offer.shape_of(size)[1] if offer.price.resolutions else ""
    expanded = bool(request.upsample) and "upsample" in offer.takes
    return offer.price.estimate(size, references, resolution, expanded)


def _encoded(image: Image.Image) -> bytes:
    """A reference as a PNG file without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _small(image: Image.Image) -> Image.Image:
    image.thumbnail((256, 256))
    return image


def describe(offer: Offer) -> dict[str, Any]:
    """The facts of a remote model as JSON, for lists."""
    provider = provider_of(offer.name)
    return {
        "name": offer.name,
        "title": offer.title,
        "provider": provider.title,
        "address": provider.address,
        "key": provider.key_variable,
        "licence": offer.licence,
        "commercial": offer.commercial,
        "price": offer.price.estimate(offer.size, (), offer.shape_of(offer.size)[1] if offer.price.resolutions else ""),
        "source": offer.source,
        "date": offer.date,
        "takes": list(offer.takes),
        "references": offer.references,
        "width": offer.size[0],
        "height": offer.size[1],
    }
