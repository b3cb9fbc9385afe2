"""Timing and its records: what is run how often and in which order, and what a record holds. Never how long it took."""

from __future__ import annotations

import torch

import inkstream
from inkstream.bench.records import read_record, write_record
from inkstream.bench.run import compare, median_seconds


def test_the_rivals_take_turns_after_a_warm_up_of_both():
    calls = []
    result = compare(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"
    for times in (result.ours, result.theirs):
        assert 0 < times.least <= times.median <= times.most
    assert result.ratio == result.ours.median / result.theirs.median


def test_the_warm_up_is_run_but_not_timed():
    calls = []
    assert median_seconds(lambda: calls.append(1), warmup=2, repeats=3) > 0
    assert len(calls) == 5


def test_a_record_says_what_ran_when_on_what_and_beside_whom(tmp_path):
    row = {"model": "tiny", "ratio": 0.5}
    path = write_record("one", "2026-01-02", "python bench.py", {"diffusers": "0.42"}, [row], folder=tmp_path / "new")
    assert path == tmp_path / "new" / "one.json"
    record = read_record("one", folder=tmp_path / "new")
    assert record["rows"] == [row]
    assert (record["name"], record["date"], record["command"]) == ("one", "2026-01-02", "python bench.py")
    assert record["peers"] == {"diffusers": "0.42"}
    machine = record["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["inkstream"] == inkstream.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] >= 1
    assert machine["cpu"]
