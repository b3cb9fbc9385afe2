"""`inkstream advise`: which model, on what, and what a picture costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from inkstream.cli.lines import in_gibibytes, print_json
from inkstream.types import in_time

if TYPE_CHECKING:
    from inkstream.advice.advise import Advice


def advise(
    *,
    use: str = "photos",
    pictures: int = 500,
    card: Annotated[str | None, Parameter(show_default=False)] = None,
    budget: Annotated[float | None, Parameter(show_default=False)] = None,
    commercial: Annotated[bool, Parameter(show_default=False)] = False,
    language: Annotated[tuple[str, ...], Parameter(negative=())] = ("en",),
    figures: Annotated[Path | None, Parameter(show_default=False)] = None,
    json: Annotated[bool, Parameter(show_default=False)] = False,
) -> None:
    """Advise a model, and compare the costs of an own card, a rented card and an API.

    Parameters
    ----------
    use
        What is drawn: photos, posters, editing, drafts or variety.
    pictures
        Number of pictures a month.
    card
        The card that you have, such as "RTX 3060", or its memory, such as 8GiB; default: the cheapest one.
    budget
        Most dollars for a card to buy, in place of --card.
    commercial
        Only models whose licence allows commercial use.
    language
        Language of the texts in pictures: en or zh; repeat the option for more.
    figures
        A TOML file of prices, watts and times, in place of the one that comes along.
    json
        Print one JSON document on stdout.
    """
    from inkstream.advice.advise import Wish, advise
    from inkstream.advice.figures import FILE, read_figures
    from inkstream.engine.files.licences import is_commercial_only

    path = figures or FILE
    wish = Wish(use, pictures, card, budget, commercial or is_commercial_only(), language)
    advice = advise(wish, read_figures(path))
    print_json(advice.to_json()) if json else show(advice, path)


def show(advice: Advice, path: Path) -> None:
    """Print the advice, the arithmetic and the sources."""
    from inkstream.advice.costs import money
    from inkstream.engine.files.licences import in_words

    wish, spec, place = advice.wish, advice.spec, advice.place
    print(f"model:      {spec.name} ({in_words(spec.licence, spec.commercial)}): {advice.why}")
    for line in advice.left_out:
        print(f"not taken:  {line}")
    if place is not None:
        time = f", {in_time(place.seconds)} a picture" if place.seconds else ""
        told = f" ({place.measured})" if place.measured else " (estimated)" if place.seconds else ""
        print(f"on:         {place.card}, {place.fit.precision} {place.fit.placement}, "
              f"{in_gibibytes(place.fit.peak)}{time}{told}")  # fmt: skip
    if advice.costs:
        print(f"\n{wish.pictures} pictures a month:")
        width = max(len(cost.way) for cost in advice.costs)
        for cost in sorted(advice.costs, key=lambda cost: cost.month(wish.pictures)):
            month = cost.month(wish.pictures)
            print(f"  {cost.way:{width}}  {money(month):>9} a month, {money(month / wish.pictures):>8} a picture")
            for line in cost.arithmetic:
                print(f"    {line}")
    if advice.break_evens:
        print("\nbreak-even:")
        for pair, count in advice.break_evens.items():
            print(f"  {pair}: {'never' if count is None else f'cheaper from {count:,.0f} pictures a month'}")
    if advice.best is not None:
        print(f"\ncheapest:   {advice.best.way}")
    for note in advice.notes:
        print(f"note:       {note}")
    print(f"\nfigures from {path}:")
    for source in advice.sources:
        print(f"  {source}")
