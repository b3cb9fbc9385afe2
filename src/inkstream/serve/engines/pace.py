"""How long drawing takes: learnt from the pictures that were drawn, foreseen for those that wait."""

from __future__ import annotations

from collections.abc import Sequence

from inkstream.engine.drawing.options import guided
from inkstream.serve.engines.models import Offered
from inkstream.types import Request


class Pace:
    """Seconds for a unit of work, of each model. Work is steps times megapixels times predictions a step."""

    def __init__(self, models: dict[str, Offered]):
        self.models = models
        self._pace: dict[str, float] = {}

    def work(self, request: Request) -> float:
        """Of one picture."""
        model = self.models.get(request.model)
        spec = None if model is None else model.spec
        width = request.width or (spec.size[0] if spec else 1024)
        height = request.height or (spec.size[1] if spec else 1024)
        steps = request.steps or (spec.steps if spec else 8)
        twice = spec is not None and guided(request, spec)
        return steps * (width * height / 2**20) * (2 if twice else 1)

    def learn(self, request: Request, seconds: float, shared: float = 1.0) -> None:
        """One picture took so long while so many were drawn at once; later ones count more."""
        pace = seconds / shared / max(1e-6, self.work(request))
        known = self._pace.get(request.model)
        self._pace[request.model] = pace if known is None else 0.7 * known + 0.3 * pace

    def knows(self, model: str) -> bool:
        """Whether the model was timed."""
        return model in self._pace

    def seconds(self, model: str, work: float) -> float:
        """For some work alone; where the model was never timed, as if a unit took one."""
        return work * self._pace.get(model, 1.0)


def ends(running: Sequence[float], waiting: Sequence[float | None], slots: int) -> list[float | None]:
    """Seconds until each job ends, the running ones first.

    Both are seconds of drawing alone that are left, waiting ones in order; so many as there are slots share the engine
    evenly. None is not known, and leaves what comes after it unknown, too.
    """
    left = dict(enumerate(running))
    known = next((place for place, seconds in enumerate(waiting) if seconds is None), len(waiting))
    queue = [(len(running) + place, seconds) for place, seconds in enumerate(waiting[:known]) if seconds is not None]
    queue.reverse()
    found: list[float | None] = [None] * (len(running) + len(waiting))
    now = 0.0
    while left or queue:
        while queue and len(left) < slots:
            place, seconds = queue.pop()
            left[place] = seconds
        first = min(left, key=left.__getitem__)
        passed = left.pop(first)
        now += passed * (len(left) + 1)
        left = {place: seconds - passed for place, seconds in left.items()}
        found[first] = now
    return found
