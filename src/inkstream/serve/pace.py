"""How long drawing takes: learnt from the pictures that were drawn, foreseen for those that wait."""

from __future__ import annotations

from collections.abc import Sequence

from inkstream.engine.options import guided
from inkstream.serve.models import Offered
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

    def learn(self, request: Request, seconds: float) -> None:
        """One picture took so long; later ones count more."""
        pace = seconds / max(1e-6, self.work(request))
        known = self._pace.get(request.model)
        self._pace[request.model] = pace if known is None else 0.7 * known + 0.3 * pace

    def seconds(self, request: Request) -> float | None:
        """One picture will take so long; None where the model was never timed."""
        return self.work(request) * self._pace[request.model] if request.model in self._pace else None

    def knows(self, model: str) -> bool:
        """Whether the model was timed."""
        return model in self._pace

    def cost(self, model: str, work: float) -> float:
        """Seconds for some work, or the work itself where the model was never timed."""
        return work * self._pace.get(model, 1.0)


def ends(running: Sequence[float | None], waiting: Sequence[float | None], slots: int) -> list[float | None]:
    """Seconds until each waiting job ends.

    running: seconds each running one has left; waiting: seconds each will take, in order. What is not known makes all
    behind it unknown, too.
    """
    free: list[float] = []
    for left in running:
        if left is None:
            return [None] * len(waiting)
        free.append(left)
    free += [0.0] * (slots - len(free))
    foreseen: list[float | None] = []
    for seconds in waiting:
        if seconds is None:
            break
        first = min(range(len(free)), key=free.__getitem__)
        free[first] += seconds
        foreseen.append(free[first])
    return foreseen + [None] * (len(waiting) - len(foreseen))
