"""From a use, a card or a budget, and a number of pictures to a model, a precision, a placement and the costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from inkstream.advice.costs import Cost, break_even, by_api, own, rented
from inkstream.advice.figures import CardPrice, Figures, Rent, Use
from inkstream.engine.machine.cards import Card, find_card
from inkstream.engine.machine.fit import Fit, fits
from inkstream.engine.machine.memory import SPARE
from inkstream.families import SPECS
from inkstream.types import InputError, Spec

PATIENT = 60.0
"""Seconds for a picture. A card that needs longer is not advised to be bought or rented."""


@dataclass(frozen=True)
class Wish:
    """What somebody wants to draw, and with what. card: owned; budget: to buy a card with; both None: either."""

    use: str = "photos"
    pictures: int = 500  # a month
    card: str | None = None
    budget: float | None = None
    commercial: bool = False
    languages: tuple[str, ...] = ("en",)


@dataclass(frozen=True)
class Place:
    """A model on a card. measured: who has measured the time; empty: it is this program's estimate."""

    card: str
    fit: Fit
    seconds: float
    measured: str = ""


@dataclass(frozen=True)
class Advice:
    """The advised model, where it runs, the costs of each way, and the cheapest way."""

    wish: Wish
    spec: Spec
    why: str
    left_out: tuple[str, ...]  # models that were not taken, and why
    place: Place | None  # on the owned card, or the one to buy
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def best(self) -> Cost | None:
        return min(self.costs, key=lambda cost: cost.month(self.wish.pictures), default=None)

    @property
    def break_evens(self) -> dict[str, float | None]:
        """Pairs of ways -> the pictures a month from which the first one is the cheaper one; None: never."""
        found: dict[str, float | None] = {}
        for at, a in enumerate(self.costs):
            for b in self.costs[at + 1 :]:
                dear, cheap = (a, b) if a.fixed >= b.fixed else (b, a)
                found[f"{dear.way} against {cheap.way}"] = break_even(a, b)
        return found

    def to_json(self) -> dict[str, Any]:
        pictures = self.wish.pictures
        return {
            "wish": asdict(self.wish),
            "model": self.spec.name,
            "licence": self.spec.licence,
            "commercial": self.spec.commercial,
            "why": self.why,
            "left_out": list(self.left_out),
            "place": None if self.place is None else asdict(self.place),
            "costs": [
                {**asdict(cost), "month": cost.month(pictures), "each": cost.month(pictures) / pictures}
                for cost in self.costs
            ],
            "best": None if self.best is None else self.best.way,
            "break_even_pictures_a_month": self.break_evens,
            "notes": list(self.notes),
            "sources": list(self.sources),
        }


def advise(wish: Wish, figures: Figures) -> Advice:
    """Advise. Raises InputError if no model is for this use, languages and licence, or the card is not known."""
    if wish.pictures < 1:
        raise InputError(f"--pictures {wish.pictures} is out of range: give 1 or more a month")
    if wish.card is not None and wish.budget is not None:
        raise InputError(f"--card {wish.card} and --budget {wish.budget:g} were both given: give one of them")
    if wish.budget is not None and not wish.budget > 0:
        raise InputError(f"--budget {wish.budget:g} buys nothing: give dollars above 0")
    use = _use(wish, figures)
    mine = None if wish.card is None else _known_card(wish.card)
    left_out: list[str] = []
    for name in use.models:
        why_not = _why_not(SPECS.get(name), wish, figures)
        if not why_not and mine is not None and _place(SPECS[name], *mine, figures) is None:
            why_not = f"does not fit {mine[0]}"
        if not why_not:
            return _advice(SPECS[name], use, wish, figures, mine, tuple(left_out))
        left_out.append(f"{name}: {why_not}")
    raise InputError(f"no model is for {use.name} in this way: {'; '.join(left_out)}")


def _use(wish: Wish, figures: Figures) -> Use:
    for use in figures.use:
        if use.name == wish.use:
            return use
    raise InputError(f"--use {wish.use} is not known: take {', '.join(use.name for use in figures.use)}")


def _why_not(spec: Spec | None, wish: Wish, figures: Figures) -> str:
    """Why a model is not for a wish; empty if it is."""
    if spec is None:
        return "is not known here"
    if wish.commercial and not spec.commercial:
        return f"its licence, {spec.licence}, does not allow commercial use"
    known = {language.name: language.models for language in figures.language}
    for language in wish.languages:
        if language != "en" and language not in known:
            raise InputError(f"--language {language} is not known: take {', '.join(['en', *known])}")
        if spec.name not in known.get(language, (spec.name,)):
            return f"is not made for texts in {language}"
    return ""


def _known_card(asked: str) -> tuple[str, int, Card | None]:
    """The name of a card, its bytes of memory, and the card if it is not a size only."""
    found = find_card(asked)
    return (found.title, found.memory_bytes, found) if isinstance(found, Card) else (asked, found, None)


def _place(spec: Spec, name: str, memory: int, card: Card | None, figures: Figures) -> Place | None:
    """How a model runs on a card; None if it does not fit."""
    found = fits(spec, "cuda", int(SPARE * memory), None if card is None else card.speed())
    if not found:
        return None
    for time in figures.time:
        if (time.model, time.card) == (spec.name, name):
            plain = next((fit for fit in found if (fit.precision, fit.placement) == ("bf16", "resident")), None)
            if plain is not None:
                return Place(name, plain, time.seconds, time.source)
    return Place(name, found[0], found[0].seconds or 0.0)


def _advice(
    spec: Spec,
    use: Use,
    wish: Wish,
    figures: Figures,
    mine: tuple[str, int, Card | None] | None,
    left_out: tuple[str, ...],
) -> Advice:
    used: list[Any] = [use, figures.electricity, figures.owning]
    notes: list[str] = []
    costs: list[Cost] = []
    place = None if mine is None else _place(spec, *mine, figures)
    if mine is not None and mine[2] is None:
        notes.append("a size of memory has no speed: name a card for times and costs")
    priced = [card for card in figures.card if mine is None or card.name == mine[0]]
    if wish.budget is not None:
        priced = [card for card in priced if card.price <= wish.budget]
    if bought := _cheapest(priced, spec, wish, figures, own, lambda card: card.name):
        place = bought[1]
        costs.append(bought[2])
        used.append(bought[0])
    elif place is not None and place.seconds:
        notes.append(f"the price of {place.card} is not among the figures: add it, for the costs of an own card")
    elif wish.budget is not None:
        least = min((card.price for card in figures.card), default=0)
        notes.append(f"no card of ${wish.budget:g} or less draws with {spec.name}; the cheapest one costs ${least:g}")
    if rent := _cheapest(figures.rent, spec, wish, figures, rented, lambda card: card.card):
        costs.append(rent[2])
        used += [rent[0], figures.renting]
    offers = [(by_api(api, *spec.size), api) for api in figures.api if api.model == spec.name]
    if offers:
        cost, api = min(offers, key=lambda offer: offer[0].picture)
        costs.append(cost)
        used.append(api)
    for one in [place, *(found[1] for found in (rent,) if found)]:
        if one is not None and one.measured:
            used += [time for time in figures.time if (time.model, time.card) == (spec.name, one.card)]
    sources = dict.fromkeys(f"{_called(figure)}: {figure.source} ({figure.date})" for figure in used)
    return Advice(wish, spec, use.why, left_out, place, tuple(costs), tuple(notes), tuple(sources))


def _cheapest(
    offers: Any, spec: Spec, wish: Wish, figures: Figures, cost_of: Callable[..., Cost], name: Callable[[Any], str]
) -> tuple[CardPrice | Rent, Place, Cost] | None:
    """The card that costs the least in a month, among those on which a picture takes at most PATIENT."""
    found = []
    for offer in offers:
        place = _place(spec, *_known_card(name(offer)), figures)
        if place is not None and 0 < place.seconds <= PATIENT:
            found.append((offer, place, cost_of(offer, place.seconds, figures)))
    return min(found, key=lambda one: one[2].month(wish.pictures), default=None)


def _called(figure: Any) -> str:
    """What a figure is about."""
    kind = type(figure).__name__.lower().replace("cardprice", "price").replace("time", "time of")
    names = [getattr(figure, name) for name in ("name", "provider", "model", "card") if hasattr(figure, name)]
    return " ".join([kind, *names])
