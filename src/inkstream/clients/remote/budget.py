"""What remote models may cost in a run."""

from __future__ import annotations

import threading

from inkstream.types import InputError


class Budget:
    """The US dollars that a run may take, shared by its Drawers. A picture under way counts with its estimate.

    most: None for no limit. Raises InputError if it is not a sum of money.
    """

    def __init__(self, most: float | None = None):
        if most is not None and not 0 <= most < float("inf"):
            raise InputError(f"max_cost {most:g} is not a sum of money: give US dollars, such as 0.50")
        self.most = most
        self.spent = 0.0
        self._turn = threading.Lock()

    def take(self, estimate: float, what: str) -> None:
        """Count what is about to be spent. Raises InputError if that is too much."""
        with self._turn:
            self.check(estimate, what)
            self.spent += estimate

    def correct(self, estimate: float, actual: float) -> None:
        """Replace an estimate by what was spent."""
        with self._turn:
            self.spent += actual - estimate

    def check(self, estimate: float, what: str) -> None:
        """Raise InputError if something would cost more than is left."""
        if self.most is None or estimate <= self.most - self.spent + 1e-9:
            return
        before = f", and {money(self.spent)} are spent" if self.spent else ""
        raise InputError(
            f"{what} would take about {money(estimate)}{before}: max_cost is {money(self.most)}, raise it or draw less"
        )


def money(dollars: float) -> str:
    """A sum of US dollars as text: $0.03, $0.0027, $12.50."""
    digits = 2 if dollars >= 1 or dollars == 0 else 4
    text = f"{dollars:.{digits}f}"
    while digits > 2 and text.endswith("0"):
        text, digits = text[:-1], digits - 1
    return f"${text}"
