"""What a month of pictures costs on an own card, on a rented card and by an API, with the arithmetic as text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from inkstream.advice.figures import Api, CardPrice, Figures, Rent

MEGAPIXEL = 1024 * 1024


@dataclass(frozen=True)
class Cost:
    """The costs of a month. fixed: of no picture; picture: of each one; arithmetic: how they are computed."""

    way: str
    fixed: float
    picture: float
    arithmetic: tuple[str, ...]

    def month(self, pictures: float) -> float:
        return self.fixed + self.picture * pictures


def own(card: CardPrice, seconds: float, figures: Figures) -> Cost:
    """The costs on a card that is bought: its price over the years, and electricity while it draws."""
    months, watts = figures.owning.years * 12, card.watts + figures.owning.host_watts
    fixed, energy = card.price / months, watts / 1000 * seconds / 3600
    picture = energy * figures.electricity.price
    return Cost(
        f"own {card.name}", fixed, picture,
        (
            f"{money(card.price)} / {months:g} months = {money(fixed)} a month",
            f"{watts:g} W x {seconds:.2f} s = {energy * 1000:.2f} Wh, x {money(figures.electricity.price)} a kWh = "
            f"{money(picture)} a picture",
        ),
    )  # fmt: skip


def rented(rent: Rent, seconds: float, figures: Figures) -> Cost:
    """The costs on a card that is rented by the hour, in so many sessions a month."""
    beside = figures.renting.sessions * figures.renting.minutes / 60
    fixed, picture = beside * rent.hour, rent.hour * seconds / 3600
    return Cost(
        f"rented {rent.card} ({rent.provider})", fixed, picture,
        (
            f"{figures.renting.sessions:g} sessions x {figures.renting.minutes:g} min = {beside:.2f} h, x "
            f"{money(rent.hour)} an hour = {money(fixed)} a month",
            f"{money(rent.hour)} an hour x {seconds:.2f} s / 3600 = {money(picture)} a picture",
        ),
    )  # fmt: skip


def by_api(api: Api, width: int, height: int) -> Cost:
    """The costs of an API that bills by the megapixel."""
    further = max(0, -(-width * height // MEGAPIXEL) - 1)
    picture = api.first + further * api.further
    return Cost(
        f"{api.provider} API", 0.0, picture,
        (f"{money(api.first)} + {further} x {money(api.further)} = {money(picture)} a picture of {width}x{height}",),
    )  # fmt: skip


def break_even(a: Cost, b: Cost) -> float | None:
    """The pictures a month from which the way with the higher fixed costs is the cheaper one; None if it never is."""
    dear, cheap = (a, b) if a.fixed >= b.fixed else (b, a)
    return (dear.fixed - cheap.fixed) / (cheap.picture - dear.picture) if cheap.picture > dear.picture else None


def hourly(card: CardPrice, figures: Figures, busy: float) -> float:
    """What an hour of drawing on an own card costs without electricity. busy: the share of all hours that it draws."""
    return card.price / (figures.owning.years * 365 * 24 * busy)


def money(amount: float) -> str:
    """An amount with two digits behind the point, or, below ten cents, two significant ones."""
    digits = 2 if amount == 0 or amount >= 0.1 else 1 - math.floor(math.log10(amount))
    return f"${amount:.{digits}f}"
