"""What `inkstream bench` times beside us does what we do: the same picture of the same weights, from the same noise."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inkstream.bench import turns
from inkstream.bench.cases import CASES, rehearsed
from inkstream.bench.child import Order, Setup, Stages
from inkstream.bench.ours import open_ours

PEERS = Path(__file__).parent.parent.parent / "benchmarks" / "peers"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def with_diffusers():
    spec = importlib.util.spec_from_file_location("with_diffusers", PEERS / "with_diffusers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tiny", "tiny-guided"])
@torch.inference_mode()
def test_diffusers_draws_the_picture_that_we_draw(name, tmp_path, with_diffusers):
    case = replace(CASES[name], width=64, height=64, steps=3)
    folder = turns.prepare(case, tmp_path)
    drawn = []
    for open_contender in (open_ours, with_diffusers.open_diffusers):
        draw, versions = open_contender(Setup(case, {}, folder))
        assert versions
        stages = Stages(CPU)
        drawn.append(draw(Order(case, 1), stages).int())
        assert list(stages.seconds) == ["prompt", "steps", "pixels"]
    assert drawn[0].float().std() > 5
    assert (drawn[0] - drawn[1]).abs().max() <= turns.APART


@pytest.mark.slow
@pytest.mark.parametrize("name", ["turbo-512-batch-8", "klein-1024"])
@torch.inference_mode()
def test_diffusers_rehearses_the_cases_of_a_gpu(name, tmp_path, with_diffusers):
    case = rehearsed(CASES[name])
    draw, _ = with_diffusers.open_diffusers(Setup(case, {"compiled": "blocks"}, turns.prepare(case, tmp_path)))
    assert draw(Order(case, 1), Stages(CPU)).shape == (case.count, 3, 64, 64)
