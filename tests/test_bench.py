"""Timing and its records: what is run how often and in which order, and what a record holds. Never how long it took."""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inkstream
from inkstream.bench import turns
from inkstream.bench.cases import CASES, find, rehearsed
from inkstream.bench.child import Order, Setup, Stages
from inkstream.bench.ours import open_ours
from inkstream.bench.records import read_record, write_record
from inkstream.bench.run import take_turns
from inkstream.bench.tables import fill
from inkstream.cli import cores_allowed
from inkstream.types import InputError
from inkstream.weights.files import write_state

ROOT = Path(__file__).parent.parent


def test_contenders_take_turns_after_an_untimed_warm_up():
    calls = []
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"
    assert list(found) == ["a", "b"]
    for times in found.values():
        assert 0 < times.least <= times.median <= times.most


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


CHILD = """
import json, sys
given = json.loads(sys.argv[1])
who = given["how"]["by"]
if who == "nobody":
    print("nobody is installed", file=sys.stderr); sys.exit(3)
print(json.dumps({"versions": {who: "1.0"}}), flush=True)
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    with open(given["log"], "a") as log:
        print(who, asked["number"], asked["warm"], file=log)
    if who == "faller" and number == 3:
        print("it fell", file=sys.stderr); sys.exit(1)
    seconds = {"prompt": 0.5, "steps": 2.0 if who == "ours" else 3.0, "pixels": 0.5}
    print(json.dumps({"seconds": seconds, "peak_bytes": 7}), flush=True)
"""
CASE = replace(CASES["turbo-1024"], device="cpu", contenders=("ours", "faller", "nobody", "peer"), warm=2, repeats=3)


@pytest.fixture
def contenders(tmp_path, monkeypatch):
    """Processes that answer as contenders do, and the file in which they note what they were asked."""
    (tmp_path / "child.py").write_text(CHILD)
    kinds = ("ours", "faller", "nobody", "peer")
    monkeypatch.setattr(turns, "COMMANDS", dict.fromkeys(kinds, (str(tmp_path / "child.py"),)))
    monkeypatch.setattr(turns, "CONTENDERS", {kind: {"by": kind} for kind in kinds})
    log = tmp_path / "log"
    found = [turns.Contender(name, {"case": "turbo-1024", "log": str(log)}) for name in kinds]
    yield found, log
    for contender in found:
        contender.__exit__()


def test_contenders_draw_in_turn_and_who_fails_or_is_not_there_is_named_and_left_out(contenders, tmp_path):
    found, log = contenders
    ready = [contender for contender in found if contender.opened()]
    assert [contender.name for contender in ready] == ["ours", "faller", "peer"]
    assert found[2].trouble == "nobody is installed"
    said = []
    rows = turns.run_case(CASE, ready, itertools.count(1), tmp_path, False, None, said.append)
    assert said == ["turbo-1024: faller failed: it fell"]
    asked = [line.split() for line in log.read_text().splitlines()]
    assert [who for who, _, warm in asked if warm == "True"] == ["ours"] * 2 + ["faller"] * 2 + ["peer"] * 2
    timed = [who for who, _, warm in asked if warm == "False"]
    assert timed == ["ours", "faller", "peer", "ours", "faller", "peer", "ours", "peer"]
    assert [row["contender"] for row in rows] == ["ours", "faller", "peer"]
    numbers = {contender: [number for who, number, _ in asked if who == contender] for contender in ("ours", "peer")}
    assert len(set(numbers["peer"])) == 5  # no prompt comes twice


def test_the_ratio_is_to_the_first_contender_who_is_not_us(contenders, tmp_path):
    ours, _, _, peer = contenders[0]
    assert ours.opened()
    assert peer.opened()
    case = replace(CASE, contenders=("ours", "peer"))
    rows = turns.run_case(case, [ours, peer], itertools.count(1), tmp_path, False, 2, print)
    assert [(row["contender"], row["ratio"], row["median"]) for row in rows] == [
        ("ours", 0.75, 3.0),
        ("peer", 1.0, 4.0),
    ]
    assert turns.describe(rows[0]).startswith("ratio   0.750  turbo-1024")
    assert (rows[0]["steps_median"], rows[0]["peak_bytes"], rows[0]["repeats"]) == (2.0, 7, 2)


def test_pictures_of_the_same_weights_must_be_the_same(tmp_path):
    picture = torch.randint(0, 200, (1, 3, 8, 8), dtype=torch.uint8)
    paths = {}
    for who, pixels in (("ours", picture), ("near", picture + 1), ("far", picture + 9), ("flat", picture * 0)):
        paths[who] = tmp_path / f"{who}.safetensors"
        write_state(paths[who], {"pixels": pixels})
    assert turns.differences({who: paths[who] for who in ("ours", "near")}) == {"ours": 0, "near": 1}
    with pytest.raises(InputError, match="of far is 9/255 from ours"):
        turns.differences({who: paths[who] for who in ("ours", "far")})
    with pytest.raises(InputError, match="flat"):
        turns.differences({who: paths[who] for who in ("flat", "ours")})


@pytest.mark.parametrize("name", ["turbo-1024", "klein-1024"])
@torch.inference_mode()
def test_a_case_of_a_gpu_is_rehearsed_on_the_cpu(name, tmp_path):
    case = rehearsed(CASES[name])
    draw, versions = open_ours(Setup(case, {"by": "ours", "quant": "fp8"}, tmp_path))
    assert versions == {"inkstream": inkstream.__version__}
    stages = Stages(torch.device("cpu"))
    pixels = draw(Order(case, 1), stages)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 64, 64), torch.uint8)
    assert list(stages.seconds) == ["prompt", "steps", "pixels"]


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", "all")]
)
def test_a_containers_share_of_the_processor_sets_how_many_threads_there_are(tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores_allowed(tmp_path / "cpu.max") == (os.cpu_count() if cores == "all" else cores)
    assert cores_allowed(tmp_path / "nowhere") is None


def test_cases_are_found_by_name_and_by_group():
    assert [case.name for case in find(["medium", "tiny"])] == ["medium", "tiny"]
    assert {case.device for case in find(["gpu"])} == {"cuda"}
    assert find(["cpu", "tiny"]) == [case for case in CASES.values() if case.device == "cpu"]
    with pytest.raises(InputError, match="no case huge: take tiny"):
        find(["huge"])
    assert (CASES["base-1024"].evaluations, CASES["turbo-1024"].evaluations) == (100, 8)
    width = CASES["real-width"]
    assert (width.spec.transformer.dim, width.spec.transformer.n_layers, width.width) == (3840, 4, 512)


def test_a_page_shows_the_records_it_names_and_says_of_others_that_they_are_not_there(tmp_path):
    rows = [{"stage": "load", "seconds": 0.5, "cpu_seconds": 0.25}]
    write_record("start-here", "2026-01-02", "python x.py", {}, rows, folder=tmp_path)
    page = "A\n<!-- record start-here -->\nold\n<!-- end -->\nB\n<!-- record speed-gpu -->\n<!-- end -->\n"
    done = fill(page, tmp_path)
    assert "| load | 0.50 | 0.25 |" in done
    assert "`python x.py`" in done
    assert "old" not in done
    assert "Not measured yet." in done.partition("speed-gpu")[2]
    assert fill(done, tmp_path) == done


def test_stable_diffusion_cpp_tells_its_stages_in_its_log():
    spec = importlib.util.spec_from_file_location("with_sd", ROOT / "benchmarks" / "peers" / "with_sd.py")
    assert spec is not None
    assert spec.loader is not None
    with_sd = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(with_sd)
    log = (
        "[INFO ] stable-diffusion.cpp:3040 - get_learned_condition completed, taking 2141 ms\n"
        "[INFO ] stable-diffusion.cpp:3170 - sampling completed, taking 10.50s\n"
        "[INFO ] stable-diffusion.cpp:3170 - sampling completed, taking 9.50s\n"
        "[INFO ] stable-diffusion.cpp:3200 - decode_first_stage completed, taking 1.25s\n"
    )
    assert with_sd.times_told(log) == {"prompt": 2.141, "steps": 20.0, "pixels": 1.25}
    with pytest.raises(RuntimeError, match="no time of: pixels"):
        with_sd.times_told(log.rpartition("[INFO")[0])
