"""Drawing a picture again until its quoted texts and hex colours are right. No torch."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

from inkstream.engine.pictures.asked import asked_in
from inkstream.engine.pictures.checks import Checks, check_picture
from inkstream.engine.pictures.ocr import open_reader
from inkstream.types import Done, Event, Failed, Loading, Request, Step, singles

STRIDE = 10_000
"""How far the next seed is from a picture's. A request has at most so many pictures, so none has another one's seed."""

Events = Generator[Event, None, None]
Draw = Callable[[Request], Events]


def draw_until_verified(draw: Draw, request: Request) -> Events:
    """Yield the events of a request, whose pictures are drawn again until they pass, at most `until_verified` times.

    The best picture is kept if none passes. What is asked for is in the prompt that the model was told. Raises
    InputError if the reader of texts is needed and not installed.
    """
    asked = asked_in(request.prompt)
    if asked.texts or not asked.colours:  # a grammar finds texts without quotes too
        open_reader()
    if request.seed is None:
        request = request.model_copy(update={"seed": secrets.randbelow(2**32)})
    once = request.model_copy(update={"until_verified": 0})
    for index, one in enumerate(singles(once)):
        best: tuple[Checks, Done] | None = None
        seconds, drawn, done = 0.0, 0, None
        for again in range(request.until_verified + 1):
            wish = one if done is None else later(done.request)
            done = None
            with closing(draw(wish)) as events:
                for event in events:
                    if isinstance(event, Done):
                        done = event
                    elif isinstance(event, Failed):
                        yield event
                        return
                    else:
                        yield replace(event, index=index, count=request.count) if isinstance(event, Step) else event
            if done is None:
                return
            drawn, seconds = again + 1, seconds + done.seconds
            yield Loading("checking")
            checks = check_picture(done.image, asked_in(done.request.prompt, done.told or ""))
            if best is None or checks.rank > best[0].rank:
                best = checks, done
            if checks.passed:
                break
        assert best is not None
        kept = replace(best[1], index=index, count=request.count, seconds=seconds, checked=best[0].line)
        if best[0].line:
            yield Loading("checked", note=told(kept, drawn, best[0].passed))
        yield kept


def later(request: Request) -> Request:
    """The request of one picture with its next seed; of a variation, with the variation's next seed."""
    return next(singles(request.model_copy(update={"count": STRIDE + 1}), STRIDE))


def told(kept: Done, drawn: int, passed: bool) -> str:
    """One line that says which of a picture's drawings was kept."""
    picture = f"picture {kept.index + 1}: " if kept.count > 1 else ""
    if passed:
        how = "drawn once" if drawn == 1 else f"drawn {drawn} times"
    else:
        how = "drawn once, and it does not pass" if drawn == 1 else f"none of {drawn} drawings passes, kept the best"
    return f"{picture}{how}, seed {kept.request.seed}: {kept.checked}"
