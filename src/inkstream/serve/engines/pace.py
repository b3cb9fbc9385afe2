"""Drawing time: learnt from drawn pictures, estimated for waiting jobs."""

from __future__ import annotations

from collections.abc import Sequence

from inkstream.engine.drawing.options import guided
from inkstream.serve.engines.models import Offered
from inkstream.types import Request


class Pace:
    """Seconds for one unit of work, for each model. Work is steps x megapixels x predictions in a step."""

    def __init__(self, models: dict[str, Offered]):
        self.models = models
        self._pace: dict[str, float] = {}

    def work(self, request: Request) -> float:
        """The work of one picture."""
        model = self.models.get(request.model)
        spec = None if model is None else model.spec
        width = request.width or (spec.size[0] if spec else 1024)
        height = request.height or (spec.size[1] if spec else 1024)
        steps = request.steps or (spec.steps if spec else 8)
        twice = spec is not None and guided(request, spec)
        return steps * (width * height / 2**20) * (2 if twice else 1)

    def learn(self, request: Request, seconds: float, shared: float = 1.0) -> None:
        """Learn from one picture. Later pictures count more (a moving average).

        seconds: its drawing time. shared: mean number of jobs that were drawn at the same time.
        """
        pace = seconds / shared / max(1e-6, self.work(request))
        known = self._pace.get(request.model)
        self._pace[request.model] = pace if known is None else 0.7 * known + 0.3 * pace

    def knows(self, model: str) -> bool:
        """Whether at least one picture of the model was timed."""
        return model in self._pace

    def seconds(self, model: str, work: float) -> float:
        """Seconds for some work if nothing else is drawn. A model without timing counts 1 s for a unit of work."""
        return work * self._pace.get(model, 1.0)


def ends(running: Sequence[float], waiting: Sequence[float | None], slots: int) -> list[float | None]:
    """Seconds until each job ends: first the running jobs, then the waiting ones.

    running, waiting: seconds that each job needs if it is drawn alone; waiting jobs are in queue order. slots: number
    of jobs that share the engine evenly. None means unknown; the jobs after an unknown one are unknown, too.
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
