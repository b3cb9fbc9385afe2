"""Continuous batching: requests are drawn together, and one packed forward computes the velocities of several.

A request is drawn by a generator, its drawing. The drawing yields events, and an `Ask` wherever its run needs a
velocity. There is no background thread. A caller that waits for an event drives all drawings until its event comes; if
another caller's thread is driving already, it waits for that one. A single request thus runs in its caller's thread.
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
"""The most tokens of a forward, unless a single picture has more: those of 1024 x 1024 pixels. They keep any device
busy, so a larger forward would only add latency."""
ABREAST = 16
"""The most requests that are drawn at once. A request that waits for a forward still holds its latents in memory."""


@dataclass(frozen=True, eq=False)
class Ask:
    """A request for the velocity at a run's query. tokens: of one sample (one prompt) in the forward."""

    family: Family
    run: Run
    tokens: int

    @property
    def size(self) -> int:
        """The query's tokens in the next forward, over all its samples."""
        return self.tokens * len(self.run.entries())

    @property
    def work(self) -> int:
        """The picture's tokens over all its forwards, counted as if every step were guided."""
        return self.tokens * len(self.run.leg.prepared) * self.run.evaluations


@dataclass(frozen=True)
class Alone:
    """The drawing changes the model next: it resumes after all others have ended and runs alone until its next Ask."""


Drawing = Generator[Event | Ask | Alone, None, None]
"""Draws one request. If a forward fails, the error is raised at the drawing's `yield`."""
Admits = Callable[[Sequence[Ask], Ask], bool]
"""Whether a forward with the given Asks has room for one more."""


def tokens_of(run: Run, cond: Conditioning, side: int) -> int:
    """The tokens of one sample of a run, about: of its picture, text and references. side: of a token, in pixels."""
    picture = run.request.width // side * (run.request.height // side)
    if run.windows is not None:
        picture = picture * run.windows.side[0] * run.windows.side[1] // (run.windows.h * run.windows.w)
    pictures = sum(latents[0].numel() for latents in (run.estimate, *cond.references)) / run.estimate[0].numel()
    texts = cond.lengths[0] + sum(len(region.tokens) for region in cond.regions)
    return round(picture * pictures) + max(texts, *cond.lengths)


def within(tokens: int) -> Admits:
    """Admits Asks up to so many tokens in one forward."""
    return lambda group, ask: sum(one.size for one in group) + ask.size <= tokens


@dataclass(eq=False)
class Member:
    """A request in the batch."""

    drawing: Drawing
    since: int  # the value of Batch._answered when its picture arrived
    events: deque[Event] = field(default_factory=deque[Event])  # not yet read by the caller
    begun: bool = False
    alone: bool = False  # it has yielded Alone: it waits for the others to end, or runs alone
    ask: Ask | None = None  # not yet answered
    failure: Exception | None = None  # to be raised in the drawing instead of an answer
    error: BaseException | None = None  # the error that ended the drawing, raised to the caller
    ended: bool = False
    left: bool = False  # the caller has closed its iterator


class Batch:
    """The requests that are drawn together, oldest first.

    A request that needs another model waits until the requests before it have ended, and later requests wait for it.

    Scheduling, if one forward has no room for all: the highest (tokens answered since its picture arrived) / (total
    tokens of the picture) goes first. Equal requests are FIFO. Small requests soon pass large ones. Large requests do
    not starve: their priority only rises, and every new picture starts at 0.
    """

    def __init__(self, admits: Admits | None = None):
        self.admits = admits or within(TOKENS)
        self._members: list[Member] = []
        self._answered = 0  # tokens answered so far: the clock for waiting times
        self._too_many: float = float("inf")  # tokens of the smallest forward that was too large for the memory
        self._driven = False  # whether a thread drives the drawings; at most one does
        self._changed = threading.Condition()  # notified when there are new events, and when driving stops

    def ahead(self, shares: bool) -> int:
        """The number of requests that a new one waits for before it begins. shares: it uses the loaded model."""
        members = self._members
        joins = shares and all(member.begun and not member.alone for member in members) and len(members) < ABREAST
        return 0 if joins else len(members)

    def join(self, drawing: Drawing) -> Iterator[Event]:
        """Adds a drawing to the batch; yields its events.

        Closing the iterator closes the drawing; if a step is being computed, after that step. An error of the drawing
        is raised to this caller alone.
        """
        member = Member(drawing, self._answered)
        with self._changed:
            if not self._members:
                self._too_many = float("inf")
            self._members = [*self._members, member]
        try:
            while (event := self._next(member)) is not None:
                yield event
        finally:
            with self._changed:
                member.left = True
                if not self._driven:
                    self._sweep()

    def _next(self, member: Member) -> Event | None:
        """A request's next event; None after its last one. Drives all drawings unless another thread does."""
        with self._changed:
            self._changed.wait_for(lambda: member.events or member.ended or not self._driven)
            if drives := not (member.events or member.ended):
                self._driven = True
        if drives:
            try:
                while not (member.events or member.ended):
                    self._turn()
            finally:
                with self._changed:
                    self._driven = False
                    self._sweep()
                    self._changed.notify_all()
        if member.events:
            return member.events.popleft()
        if member.error is not None:
            raise member.error
        return None

    def _turn(self) -> None:
        """Resumes every drawing that can run, up to its next event or Ask; then computes one forward of open Asks.

        A drawing that has just yielded a Step will ask again at once, so the forward waits for it. The forward does not
        wait for a drawing that encodes or upsamples a prompt.
        """
        with self._changed:
            self._sweep()
            members = self._members
        events = [event for member in runnable(members) if member.ask is None and (event := self._resume(member))]
        if events:
            with self._changed:
                self._changed.notify_all()
        asking = [member for member in members if member.ask is not None]
        if asking and not any(isinstance(event, Step) for event in events):
            self._answer(self._choose(asking))

    def _resume(self, member: Member) -> Event | None:
        """Resumes a drawing until it yields or ends. Returns the event, if the drawing has yielded one."""
        member.begun = True
        failure, member.failure = member.failure, None
        try:
            item = next(member.drawing) if failure is None else member.drawing.throw(failure)
        except StopIteration:
            member.ended = True
            return None
        except BaseException as error:
            member.ended, member.error = True, error
            if not isinstance(error, Exception):  # an interrupt must also end the thread that drives
                raise
            return None
        if isinstance(item, Alone):
            member.alone = True
            return None
        if isinstance(item, Ask):
            member.ask, member.alone = item, False
            return None
        member.events.append(item)
        if isinstance(item, Done):  # the request's next picture has a waiting time of its own
            member.since = self._answered
        return item

    def _choose(self, asking: Sequence[Member]) -> list[Member]:
        """The members of the next forward: the one with the highest priority, then all others that fit, in order."""
        first, *others = sorted(asking, key=self._priority, reverse=True)
        group, size = [first], ask_of(first).size
        for member in others:
            ask = ask_of(member)
            fits = size + ask.size < self._too_many and ask.family is ask_of(first).family
            if fits and self.admits([ask_of(one) for one in group], ask):
                group.append(member)
                size += ask.size
        return group

    def _priority(self, member: Member) -> float:
        """Tokens answered since the member's picture arrived, over the picture's total tokens."""
        return (self._answered - member.since) / ask_of(member).work

    def _answer(self, group: Sequence[Member]) -> None:
        """Computes one forward. If it fails, each member is retried alone, so that only the faulty ones fail.

        If none fails alone, the forward was too large: later ones stay below its size.
        """
        asks = [ask_of(member) for member in group]
        queries, size = [ask.run.query for ask in asks], sum(ask.size for ask in asks)
        failure = None
        try:
            advance(asks[0].family, [ask.run for ask in asks])
        except Exception as error:
            # The frames of a traceback hold tensors, which would keep memory from the retries.
            failure = error.with_traceback(None) if len(group) > 1 else error
        if failure is None or len(group) == 1:
            self._answered += size
            for member in group:
                member.ask, member.failure = None, failure
            return
        for member, ask, query in zip(group, asks, queries):
            if ask.run.query is query:
                self._answer([member])
            else:  # this run got its answer before the failure
                member.ask = None
        if not any(member.failure for member in group):
            self._too_many = size

    def _sweep(self) -> None:
        """Closes the drawings whose callers have left, and removes the members that have ended."""
        for member in self._members:
            if member.left and not member.ended:
                member.ended = True
                member.drawing.close()
        self._members = [member for member in self._members if not member.ended]


def runnable(members: Sequence[Member]) -> Iterator[Member]:
    """The members that can run. The caller resumes each before it takes the next, which depends on the state by then.

    A member that has yielded Alone runs when no other has begun. Until then, no new member begins.
    """
    running = [member for member in members if member.begun and not member.alone]
    yield from running
    if not running:
        yield from [member for member in members if member.alone][:1]
    for count, member in enumerate((member for member in members if not member.begun), len(running)):
        if count == ABREAST or any(member.alone for member in members):
            return
        yield member


def ask_of(member: Member) -> Ask:
    """The open Ask of a member that has one."""
    assert member.ask is not None
    return member.ask
