"""Advice names a model, a precision and a placement, and its costs are arithmetic that anybody can repeat."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from inkstream.advice.advise import Wish, advise
from inkstream.advice.costs import break_even, by_api, hourly, money, own, rented
from inkstream.advice.figures import FILE, read_figures
from inkstream.cli import main
from inkstream.engine.machine.cards import Card, find_card
from inkstream.families import SPECS
from inkstream.types import InputError

FIGURES = read_figures()
"""The figures that come along."""


def card(name: str, **changes):
    return next(one for one in FIGURES.card if one.name == name).model_copy(update=changes)


def api(model: str, provider: str):
    return next(one for one in FIGURES.api if (one.model, one.provider) == (model, provider))


# The worked example: a studio that draws 500 pictures a month with Z-Image Turbo, and has an RTX 5090 or thinks of one


def test_the_studio_of_500_pictures_a_month_is_reproduced():
    """By hand: 2500 / 36 = 69.44 a month; (575 + 90) W x 2.492 s = 0.460 Wh, x 0.30 = 0.000138 a picture.

    500 pictures: 69.51 of one's own; 8 x 10 min x 0.34 = 0.4533, + 500 x 0.34 / 3600 x 2.77 = 0.58 rented; 2.50 by API.
    """
    advice = advise(Wish("photos", 500, card="RTX 5090", commercial=True), FIGURES)
    assert advice.spec.name == "z-image-turbo"
    assert advice.spec.licence == "apache-2.0"
    assert advice.place is not None
    assert (advice.place.fit.precision, advice.place.fit.placement) == ("bf16", "resident")
    assert advice.place.seconds == 2.492
    assert advice.place.measured == "sglang 0.5.23, perf_baselines: bf16, 8 steps"
    mine, rent, remote = advice.costs
    assert (mine.way, rent.way, remote.way) == ("own RTX 5090 32GB", "rented RTX 4090 24GB (RunPod)", "fal API")
    assert mine.fixed == pytest.approx(69.44, abs=0.01)
    assert mine.picture == pytest.approx(0.000138, rel=0.01)
    assert mine.month(500) == pytest.approx(69.51, abs=0.01)
    assert mine.month(500) / 500 == pytest.approx(0.139, abs=0.001)
    assert rent.month(500) == pytest.approx(0.58, abs=0.03)
    assert remote.month(500) == pytest.approx(2.50)
    assert advice.best is rent
    assert advice.break_evens[f"{mine.way} against {remote.way}"] == pytest.approx(69.44 / (0.005 - 0.000138), rel=0.01)
    assert advice.break_evens[f"{rent.way} against {remote.way}"] == pytest.approx(
        0.4533 / (0.005 - 0.000262), rel=0.03
    )


def test_published_costs_are_reproduced_within_five_percent():
    bare = FIGURES.model_copy(update={"owning": FIGURES.owning.model_copy(update={"host_watts": 0})})
    for name, watts, seconds, published in (  # of 1000 pictures, at 0.30 a kWh
        ("RTX 5090 32GB", 550, 2.5, 0.114), ("RTX 4090 24GB", 430, 3.0, 0.108), ("RTX 3060 12GB", 165, 20, 0.275)
    ):  # fmt: skip
        assert 1000 * own(card(name, watts=watts), seconds, bare).picture == pytest.approx(published, rel=0.05)
    ours = card("RTX 5090 32GB")
    assert hourly(ours, FIGURES, busy=0.2) == pytest.approx(0.48, rel=0.05)
    assert 1000 * hourly(ours, FIGURES, busy=0.2) * 2.5 / 3600 == pytest.approx(0.33, rel=0.05)
    saved = api("z-image-turbo", "fal").first - own(ours, 2.5, FIGURES).picture
    assert ours.price / saved == pytest.approx(500_000, rel=0.05)  # pictures until the card has paid for itself


# Costs


def test_an_api_bills_each_further_megapixel():
    klein = api("flux2-klein-9b", "BFL")
    assert by_api(klein, 1024, 1024).picture == pytest.approx(0.015)
    assert by_api(klein, 512, 512).picture == pytest.approx(0.015)
    assert by_api(klein, 1024, 1025).picture == pytest.approx(0.017)
    assert by_api(klein, 2048, 2048).picture == pytest.approx(0.015 + 3 * 0.002)


def test_at_the_break_even_both_ways_cost_the_same():
    mine, remote = own(card("RTX 5070 12GB"), 8.0, FIGURES), by_api(api("z-image-turbo", "fal"), 1024, 1024)
    count = break_even(mine, remote)
    assert count is not None
    assert mine.month(count) == pytest.approx(remote.month(count))
    assert mine.month(count * 1.1) < remote.month(count * 1.1)
    assert break_even(remote, mine) == count


def test_a_way_that_is_dearer_in_all_never_breaks_even():
    mine = own(card("RTX 3060 12GB"), 36.0, FIGURES)
    assert break_even(mine, rented(FIGURES.rent[1], 2.8, FIGURES)) is None


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(0, "$0.00"), (69.444, "$69.44"), (0.139, "$0.14"), (0.014, "$0.014"), (0.005, "$0.0050"), (0.000138, "$0.00014")],
)
def test_amounts_have_two_significant_digits(amount, shown):
    assert money(amount) == shown


# Choices


def test_commercial_use_and_languages_leave_models_out():
    assert advise(Wish("editing"), FIGURES).spec.name == "flux2-klein-4b"
    assert advise(Wish("variety", languages=("en", "zh")), FIGURES).spec.name == "z-image"
    figures = FIGURES.model_copy(
        update={"use": (FIGURES.use[0].model_copy(update={"models": ("flux1-dev", "z-image-turbo")}),)}
    )
    advice = advise(Wish("photos", commercial=True), figures)
    assert advice.spec.name == "z-image-turbo"
    assert "does not allow commercial use" in advice.left_out[0]


def test_a_card_too_small_for_a_model_gets_another_one():
    figures = FIGURES.model_copy(
        update={"use": (FIGURES.use[0].model_copy(update={"models": ("flux2-dev", "z-image-turbo")}),)}
    )
    advice = advise(Wish("photos", card="4GiB"), figures)
    assert advice.spec.name == "z-image-turbo"
    assert advice.left_out == ("flux2-dev: does not fit 4GiB",)
    assert "name a card for times and costs" in advice.notes[0]


def test_a_budget_buys_the_card_that_costs_the_least_in_a_month():
    few, many = (advise(Wish(pictures=count, budget=3000), FIGURES) for count in (100, 2_000_000))
    assert few.place is not None
    assert many.place is not None
    prices = {one.name: one.price for one in FIGURES.card}
    assert prices[few.place.card] == min(prices.values())
    assert prices[many.place.card] > prices[few.place.card]
    assert "no card of $100 or less" in advise(Wish(budget=100), FIGURES).notes[0]


@pytest.mark.parametrize(
    ("wish", "line"),
    [
        (Wish("poems"), "--use poems is not known: take photos, posters"),
        (Wish(pictures=0), "--pictures 0 is out of range: give 1 or more a month"),
        (Wish(card="RTX 9999"), "RTX 9999 is not a card that is known here"),
        (Wish(card="RTX 5090", budget=5), "were both given: give one of them"),
        (Wish(budget=-1), "--budget -1 buys nothing"),
        (Wish(languages=("fr",)), "--language fr is not known: take en, zh"),
        (Wish("editing", languages=("zh",)), "no model is for editing in this way: flux2-klein-4b: is not made for"),
    ],
)
def test_wrong_wishes_are_told_in_one_line(wish, line):
    with pytest.raises(InputError) as caught:
        advise(wish, FIGURES)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


# The figures


def test_every_figure_that_comes_along_names_a_card_or_model_that_is_known():
    for name in [*(one.name for one in FIGURES.card), *(one.card for one in (*FIGURES.rent, *FIGURES.time))]:
        found = find_card(name)
        assert isinstance(found, Card)
        assert found.title == name
    for name in [
        *(one.model for one in (*FIGURES.api, *FIGURES.time)),
        *(m for use in FIGURES.use for m in use.models),
    ]:
        assert name in SPECS


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("price = 0.30", "price = -1", "electricity.price: Input should be greater than or equal to 0"),
        ("price = 0.30", "prise = 0.30", "electricity.price: Field required"),
        ("[electricity]", "[electricity", "are not TOML"),
        ('source = "an assumption: a household in Western Europe"', 'source = ""', "electricity.source: String should"),
    ],
)
def test_a_wrong_figure_is_named(old, new, line, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FILE.read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(InputError, match=line.replace(".", r"\.")):
        read_figures(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_figures(tmp_path / "none.toml")


def test_figures_of_ones_own_change_the_costs(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(FILE.read_text("utf-8").replace("first = 0.005", "first = 0.0001"), "utf-8")
    assert main(["advise", "--figures", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"] == "fal API"
    assert main(["advise", "--card", "RTX 5090", "--pictures", "500"]) == 0
    shown = capsys.readouterr().out
    assert "$2500.00 / 36 months = $69.44 a month" in shown
    assert "cheapest:   rented RTX 4090 24GB (RunPod)" in shown
    assert "fal.ai/models/fal-ai/z-image/turbo (2026-11-29)" in shown


def test_the_break_evens_name_each_pair_once():
    advice = advise(Wish(card="RTX 5090"), FIGURES)
    assert len(advice.break_evens) == 3
    assert len(replace(advice, costs=advice.costs[:1]).break_evens) == 0
