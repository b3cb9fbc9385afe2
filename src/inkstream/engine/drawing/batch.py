"""Requests drawn at once: each asks, as a solver does, and all that ask are answered in one packed forward.

What draws a request is a generator of its events. It yields an `Ask` wherever it needs the velocity at its run's query,
and goes on once that is answered. There is no thread of its own for this: whoever waits for an event drives all
requests until it comes, unless somebody else does so already. So a request alone runs in its caller's thread, step by
step as it is read; many callers' threads take turns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from inkstream.engine.drawing.model import Run, advance
from inkstream.families import Family
from inkstream.types import Conditioning, Done, Event, Step

TOKENS = 4096
"""Of one forward, unless a single picture has more: those of 1024 x 1024 pixels, enough to keep any device busy, so
that more at once would only make each wait longer."""
ABREAST = 16
"""Requests under way at most. Those that sit out a forward still hold their latents and what was prepared for them."""


@dataclass(frozen=True, eq=False)
class Ask:
    """The velocity at a run's query is wanted. tokens: of each entry that the query is put to, in a forward."""

    family: Family
    run: Run
    tokens: int

    @property
    def size(self) -> int:
        """Tokens in the next forward."""
        return self.tokens * len(self.run.entries())

    @property
    def work(self) -> int:
        """Tokens in all its forwards, from the first to the last, as if it were guided throughout."""
        return self.tokens * len(self.run.prepared) * self.run.evaluations


@dataclass(frozen=True)
class Alone:
    """What is to be done next changes the model, so all others must have ended. It lasts until the next Ask."""


Drawing = Generator[Event | Ask | Alone, None, None]
"""What draws one request. Where an answer fails, the error is raised at its `yield`."""
Admits = Callable[[Sequence[Ask], Ask], bool]
"""Whether a forward that answers some has room for one more."""


def tokens_of(run: Run, cond: Conditioning) -> int:
    """About as many as one entry of a run has: its picture, its text and what it looks at."""
    picture = run.request.width // 16 * (run.request.height // 16)
    pictures = sum(latents[0].numel() for latents in (run.estimate, *cond.references)) / run.estimate[0].numel()
    return round(picture * pictures) + max(cond.lengths)


def within(tokens: int) -> Admits:
    """Room for so many tokens in one forward."""
    return lambda group, ask: sum(one.size for one in group) + ask.size <= tokens


@dataclass(eq=False)
class Member:
    """A request under way, or waiting to be."""

    drawing: Drawing
    since: int  # when its picture was asked for, by the tokens that had been answered
    events: deque[Event] = field(default_factory=deque)  # not yet read
    begun: bool = False
    alone: bool = False  # it waits for all others to end, or does what it waited for
    ask: Ask | None = None  # not yet answered
    trouble: Exception | None = None  # instead of the answer
    error: BaseException | None = None  # that ended it
    ended: bool = False
    left: bool = False  # nobody reads it any more


class Batch:
    """The requests under way, oldest first.

    A request that needs another model waits for those before it to end, and those behind it wait for it. Where a
    forward has no room for all, the first to be answered is who has waited longest for its size: an equal one that came
    later stands behind, a small one soon passes a large one, and a large one does not starve, since however small the
    others are, each begins anew.
    """

    def __init__(self, admits: Admits | None = None):
        self.admits = admits or within(TOKENS)
        self._members: list[Member] = []
        self._answered = 0  # tokens: the clock that waiting is measured by
        self._too_many: float = float("inf")  # tokens that could not be answered together
        self._driven = False  # by one thread at a time
        self._bell = threading.Condition()  # rings where there are events, and when nobody drives any more

    def ahead(self, shares: bool) -> int:
        """How many requests a new one would wait for before it is begun. shares: it wants the model that is loaded."""
        members = self._members
        joins = shares and all(member.begun and not member.alone for member in members) and len(members) < ABREAST
        return 0 if joins else len(members)

    def join(self, drawing: Drawing) -> Iterator[Event]:
        """The events of a drawing, drawn together with all others.

        Closing the iterator closes the drawing, at the next step where one is being made. What the drawing raises is
        raised here, and nowhere else.
        """
        member = Member(drawing, self._answered)
        with self._bell:
            if not self._members:
                self._too_many = float("inf")
            self._members = [*self._members, member]
        try:
            while (event := self._next(member)) is not None:
                yield event
        finally:
            with self._bell:
                member.left = True
                if not self._driven:
                    self._sweep()

    def _next(self, member: Member) -> Event | None:
        """A request's next event; None after its last."""
        with self._bell:
            self._bell.wait_for(lambda: member.events or member.ended or not self._driven)
            if drives := not (member.events or member.ended):
                self._driven = True
        if drives:
            try:
                while not (member.events or member.ended):
                    self._turn()
            finally:
                with self._bell:
                    self._driven = False
                    self._sweep()
                    self._bell.notify_all()
        if member.events:
            return member.events.popleft()
        if member.error is not None:
            raise member.error
        return None

    def _turn(self) -> None:
        """Let everybody who can go on do so to the next event or question; then answer one forward full of questions.

        Who has just told of a step will ask again at once, and is waited for. Others are not: who encodes a prompt or
        writes one out joins when it is done.
        """
        with self._bell:
            self._sweep()
            members = self._members
        told = [event for member in abreast(members) if member.ask is None and (event := self._go_on(member))]
        if told:
            with self._bell:
                self._bell.notify_all()
        asking = [member for member in members if member.ask is not None]
        if asking and not any(isinstance(event, Step) for event in told):
            self._answer(self._choose(asking))

    def _go_on(self, member: Member) -> Event | None:
        """Draw a request on until it tells of something, which is returned, or asks."""
        member.begun = True
        trouble, member.trouble = member.trouble, None
        try:
            thing = next(member.drawing) if trouble is None else member.drawing.throw(trouble)
        except StopIteration:
            member.ended = True
            return None
        except BaseException as error:
            member.ended, member.error = True, error
            if not isinstance(error, Exception):  # an interrupt is the driver's too
                raise
            return None
        if isinstance(thing, Alone):
            member.alone = True
            return None
        if isinstance(thing, Ask):
            member.ask, member.alone = thing, False
            return None
        member.events.append(thing)
        if isinstance(thing, Done):  # the next picture waits its own turn
            member.since = self._answered
        return thing

    def _choose(self, asking: Sequence[Member]) -> list[Member]:
        """Whom the next forward answers: the one that has waited longest for its size, and whom there is room for."""
        first, *others = sorted(asking, key=self._waited, reverse=True)
        group, size = [first], ask_of(first).size
        for member in others:
            ask = ask_of(member)
            fits = size + ask.size < self._too_many and ask.family is ask_of(first).family
            if fits and self.admits([ask_of(one) for one in group], ask):
                group.append(member)
                size += ask.size
        return group

    def _waited(self, member: Member) -> float:
        return (self._answered - member.since) / ask_of(member).work

    def _answer(self, group: Sequence[Member]) -> None:
        """One forward. Where it fails, each is asked alone, so that only those fail at which it lies; if at none, they
        were too many."""
        asks = [ask_of(member) for member in group]
        queries, size = [ask.run.query for ask in asks], sum(ask.size for ask in asks)
        trouble = None
        try:
            advance(asks[0].family, [ask.run for ask in asks])
        except Exception as error:
            # The frames of a traceback hold the tensors that there may have been no room for.
            trouble = error.with_traceback(None) if len(group) > 1 else error
        if trouble is None or len(group) == 1:
            self._answered += size
            for member in group:
                member.ask, member.trouble = None, trouble
            return
        for member, ask, query in zip(group, asks, queries):
            if ask.run.query is query:
                self._answer([member])
            else:  # answered before it failed
                member.ask = None
        if not any(member.trouble for member in group):
            self._too_many = size

    def _sweep(self) -> None:
        """Close what nobody reads any more, and forget what has ended."""
        for member in self._members:
            if member.left and not member.ended:
                member.ended = True
                member.drawing.close()
        self._members = [member for member in self._members if not member.ended]


def abreast(members: Sequence[Member]) -> Iterator[Member]:
    """Those that may go on, one after the other: whether there is another depends on what the last one did.

    Who wants to be alone goes on when nobody else is under way, and until it has, nobody is begun.
    """
    under_way = [member for member in members if member.begun and not member.alone]
    yield from under_way
    if not under_way:
        yield from [member for member in members if member.alone][:1]
    for count, member in enumerate((member for member in members if not member.begun), len(under_way)):
        if count == ABREAST or any(member.alone for member in members):
            return
        yield member


def ask_of(member: Member) -> Ask:
    """Of a member that asks."""
    assert member.ask is not None
    return member.ask
