"""Several Drawers behind one: a request goes to the Drawer that has its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from inkstream.types import Drawer, Event, Request, Spec


class Router:
    """Sends each request to the Drawer of its model.

    drawers: model name -> the Drawer that draws with it. other: the Drawer of all other models, and of requests that
    name no model.
    """

    def __init__(self, other: Drawer, drawers: Mapping[str, Drawer]):
        self.other = other
        self.drawers = dict(drawers)

    def submit(self, request: Request) -> Iterator[Event]:
        """Yield the events of a request, as its Drawer does."""
        return self._find(request.model).submit(request)

    def models(self) -> list[Spec]:
        """Return the models of all Drawers, each model once, the default first."""
        own = [drawer.spec(name) for name, drawer in self.drawers.items()]
        return [*(spec for spec in self.other.models() if spec.name not in self.drawers), *own]

    def spec(self, name: str) -> Spec:
        """Return the Spec of a model. Raises InputError if its Drawer has no such model."""
        return self._find(name).spec(name)

    def remarks(self, request: Request) -> list[str]:
        """Return one line for each option of the request that has no effect or a poor one."""
        return self._find(request.model).remarks(request)

    def ran_on(self, name: str) -> dict[str, str]:
        """Return what is known about the device that drew with a model."""
        return self._find(name).ran_on(name)

    def _find(self, model: str) -> Drawer:
        return self.drawers.get(model, self.other)
