"""The scripts that compare trainings of Pocket: trials of equal CPU time, and the table of scores over core-hours."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from inkstream.train.reading import read_recipe

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot_pocket, try_pocket = script("plot_pocket"), script("try_pocket")


def test_each_trial_differs_from_the_one_that_it_is_compared_with():
    recipes = {name: read_recipe(try_pocket.RECIPE, changes) for name, changes in try_pocket.TRIALS.items()}
    for name, recipe in recipes.items():
        compared = "new" if name.startswith("new") else "grown"
        assert (recipe == recipes[compared]) == (name == compared), name
    assert recipes["new-wide"].model.transformer["dim"] == 256
    assert recipes["grown"].model.from_ == "pocket"
    assert recipes["new"].model.from_ == ""


def test_every_trial_stands_on_the_page():
    page = (ROOT / "docs" / "pocket.md").read_text()
    assert [name for name in try_pocket.TRIALS if f"`{name}`" not in page] == []


def test_a_trial_ends_after_its_cpu_time_from_the_first_step(monkeypatch):
    times = iter([100.0, 130.0, 160.0, 160.1])
    monkeypatch.setattr(try_pocket, "cpu_seconds", lambda: next(times))
    over = try_pocket.after(60)
    assert [over() for _ in range(4)] == [False, False, False, True]


def test_an_unknown_trial_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["try_pocket.py", "adamz"])
    with pytest.raises(SystemExit, match="no trial 'adamz': take grown, adamw"):
        try_pocket.main()


def test_the_trend_gains_equally_much_with_each_doubling_of_the_hours(monkeypatch):
    monkeypatch.setattr(plot_pocket, "MORE", 30.0)  # 10 hours, doubled twice
    assert plot_pocket.gain(0.4, 0.5, (5.0, 10.0)) == pytest.approx(0.2)
    assert plot_pocket.gain(0.5, 0.9, (5.0, 10.0)) == pytest.approx(0.1)  # at most 100%
    assert plot_pocket.gain(0.6, 0.5, (5.0, 10.0)) == pytest.approx(-0.2)


def test_the_table_of_hours_is_that_of_the_records():
    last = json.loads(plot_pocket.LANDED.read_text())[-1]
    for suite in ("people", "people2"):
        assert {group: tuple(found) for group, found in last[suite].items()} == plot_pocket.scores(suite)
    assert plot_pocket.table() in (ROOT / "docs" / "pocket.md").read_text()
