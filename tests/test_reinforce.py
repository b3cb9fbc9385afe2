"""A model learns from rewards of its own pictures, by three methods, and rewards are named in a recipe."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import inkstream
from inkstream.evaluate.rewards import GRADERS, rewards_of
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_BASE_4B
from inkstream.families.zimage.specs import BASE
from inkstream.pocket.captions import caption
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar
from inkstream.train.checkpoint import load_checkpoint
from inkstream.train.loop import Progress, Saved, train
from inkstream.train.models import start
from inkstream.train.parallel import ALONE
from inkstream.train.pictures import Scenes
from inkstream.train.reading import as_recipe
from inkstream.train.recipe import Recipe
from inkstream.train.reinforce import Reinforcement
from inkstream.train.rewards import Asked, weights_of
from inkstream.types import InputError

SPECS = [BASE, DEV, KLEIN_BASE_4B]
CPU = torch.device("cpu")
OWN = {"steps": 3, "group": 3, "guidance": 1.0, "rewards": ["bright"]}
DPO = {"method": "dpo", "beta": 2000.0}


@pytest.fixture(scope="module")
def folders(make_folder, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {spec.family: make_folder(root / spec.family, spec.tiny, seed=2) for spec in SPECS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(folders, cache):
    def recipe(family: str = "zimage", **tables: dict[str, Any]) -> Recipe:
        own: dict[str, dict[str, Any]] = {
            "model": {"from": str(folders[family]), "name": "rewarded"},
            "data": {"sizes": [[32, 32]], "count": 6, "captions": 2, "cache": str(cache), "workers": 0, "pool": 1},
            "objective": {"kind": "reinforce"},
            "reinforce": OWN,
            "optimiser": {"warmup": 0, "lr": 1e-3, "decay": 0.0, "ema": 0.5},
            "run": {"steps": 2, "batch": 2, "device": "cpu", "log": 1, "save": 1},
        }
        return as_recipe({name: {**own.get(name, {}), **tables.get(name, {})} for name in {**own, **tables}})

    return recipe


def bright(pictures, asked):
    return {"bright": [float(np.asarray(picture).mean()) / 255 for picture in pictures]}


def same_files(one: Path, other: Path) -> bool:
    names = ("weights", "ema", "optimiser")
    return all((one / f"{n}.safetensors").read_bytes() == (other / f"{n}.safetensors").read_bytes() for n in names)


# Learning -----------------------------------------------------------------------------------------------------------


METHODS = [{"method": "nft", "stay": 0.1}, {"method": "grpo"}, {"method": "dpo", "beta": 2000.0}]


@pytest.mark.parametrize("family", ["zimage", "flux1", "flux2"])
@pytest.mark.parametrize("own", METHODS, ids=str)
def test_every_family_learns_by_every_method(make, family, own):
    recipe = make(family, reinforce={**OWN, "guidance": 2.0, **own})
    task = Reinforcement(recipe, start(recipe, CPU), CPU, ALONE, bright)
    list(task.prepare())
    learner = task.learners[0]
    before = {name: weight.clone() for name, weight in learner.weights.masters.items()}
    for step in range(2):
        ((_, loss),) = task.turns(step)
        learner.advance(step, loss)
    assert any(not torch.equal(before[name], weight) for name, weight in learner.weights.masters.items())
    assert task.notes().keys() == {"bright", "useful"}


@pytest.mark.parametrize("own", METHODS, ids=str)
def test_a_run_resumes_to_the_bit(tmp_path, make, own):
    recipe = make(reinforce={**OWN, **own})
    told = [m for m in train(recipe, tmp_path / "whole", reward=bright) if isinstance(m, Progress)]
    assert told[-1].notes.keys() == {"bright", "useful"}
    for message in (broken := train(recipe, tmp_path / "broken", reward=bright)):
        if isinstance(message, Saved):
            break
    broken.close()
    list(train(recipe, tmp_path / "broken", resume=True, reward=bright))
    last = "checkpoints/step-00000002"
    assert same_files(tmp_path / "whole" / last, tmp_path / "broken" / last)
    assert "guidance" in inkstream.load(tmp_path / "whole" / "model").spec.abilities


@pytest.mark.slow
@pytest.mark.parametrize(
    "own", [{"method": "nft"}, {"method": "grpo", "clip": 0.2}, {"method": "dpo", "beta": 2000.0}], ids=str
)
def test_pictures_get_what_is_rewarded(tmp_path, make, own):
    recipe = make(reinforce={"steps": 3, "group": 8, "guidance": 1.0, "rewards": ["bright"], **own},
                  run={"steps": 40, "batch": 2, "save": 40}, optimiser={"lr": 5e-3, "ema": 0.9})  # fmt: skip
    seen = [m.notes["bright"] for m in train(recipe, tmp_path, reward=bright) if isinstance(m, Progress)]
    assert sum(seen[-8:]) / 8 > sum(seen[:8]) / 8 + 0.015


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", ["zimage", "flux1"])
def test_grpos_probabilities_are_those_of_the_drawing_at_the_first_update(make, family, guidance):
    """The ratio is 1, so the loss is minus the mean advantage, which is 0; another model's is not."""
    recipe = make(family, reinforce={**OWN, "method": "grpo", "guidance": guidance, "clip": 100.0})
    task = Reinforcement(recipe, start(recipe, CPU), CPU, ALONE, bright)
    list(task.prepare())
    ((learner, loss),) = task.turns(0)
    assert abs(loss(slice(None)).item()) < 1e-5
    with torch.no_grad():
        for weight in learner.weights.masters.values():  # the averages, which draw, stay
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert abs(loss(slice(None)).item()) > 1e-4


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_a_reward_that_is_no_share_is_told_by_its_name(make, value):
    task = Reinforcement(make(), start(make(), CPU), CPU, ALONE, lambda p, asked: {"bright": [value] * len(p)})
    list(task.prepare())
    ((_, loss),) = task.turns(0)
    with pytest.raises(InputError, match=r"bright gave .+: it must give numbers from 0 to 1"):
        loss(slice(None))


def test_a_group_of_equal_rewards_leaves_the_model_as_it_is(tmp_path, make):
    recipe = make(optimiser={"lr": 1e-3, "weight_decay": 0.0}, reinforce={"steps": 2, "group": 3, "rewards": ["same"]})
    before = start(recipe, CPU).modules["transformer"].state_dict()
    list(train(recipe, tmp_path, reward=lambda pictures, asked: {"same": [0.5] * len(pictures)}))
    after = load_checkpoint(tmp_path / "checkpoints").weights
    # the halves of NFT's loss pull apart with equal strength while the model is the one that drew
    first = "layers.0.feed_forward.w1.weight"
    assert (after[f"transformer.{first}"] - before[first]).abs().max() < 3e-3


def test_an_adapter_learns_from_rewards(tmp_path, make):
    recipe = make(
        adapter={"kind": "lora", "rank": 4}, reinforce={"steps": 2, "group": 3, "rewards": ["bright"], "stay": 0.1}
    )
    list(train(recipe, tmp_path, reward=bright))
    assert (tmp_path / "rewarded.safetensors").is_file()


def test_rewards_get_the_caption_that_each_picture_was_drawn_for(make):
    heard: list[Asked] = []

    def listen(pictures, asked):
        heard.extend(asked)
        return bright(pictures, asked)

    task = Reinforcement(make(), start(make(), CPU), CPU, ALONE, listen)
    list(task.prepare())
    ((_, loss),) = task.turns(0)
    loss(slice(None))
    assert len(heard) == 2 * 3
    assert [one.prompt for one in heard[:3]] == [heard[0].prompt] * 3
    tokens = {task.family.tokens(one.prompt) for one in heard}
    place = task.data.place(0)
    assert tokens == {task.data.captions[int(i)] for i in place.captions}


# Rewards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked() -> list[Asked]:
    from inkstream.train.pictures import _wording

    source = Scenes(((128, 128),), Grammar.from_table({"tidy": True}), _wording({}), 5)
    written = [i for i in range(40) if source.scene(i).writings]
    return [Asked(caption(source.scene(i)), i, source) for i in written[:4]]


def test_graders_give_a_true_picture_all_and_a_blank_one_less(asked):
    true = [render(one.source.scene(one.index), 128, 128) for one in asked]
    blank = [Image.new("RGB", (128, 128), (128, 128, 128))] * len(true)
    for name in GRADERS:
        value = rewards_of([name])
        assert np.mean(value(true, asked)[name]) > 0.95, name
    assert np.mean(rewards_of(["right"])(blank, asked)["right"]) < 0.5
    assert np.mean(rewards_of(["text"])(blank, asked)["text"]) < 0.1


def dark(picture, prompt):
    return 1 - float(np.asarray(picture).mean()) / 255


def test_a_function_is_named_by_its_module(asked, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "our_rewards", __import__("types").SimpleNamespace(dark=dark))
    picture = [Image.new("RGB", (8, 8))]
    assert rewards_of(["our_rewards:dark"])(picture, asked[:1]) == {"our_rewards:dark": [1.0]}


@pytest.fixture
def server():
    """Rewards the first picture of a request with what `answers` holds."""
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers.append(body)
            content = json.dumps(answers[0]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", answers
        running.shutdown()


def test_a_server_is_named_by_its_url(server, asked):
    url, answers = server
    answers.append({"rewards": [0.25]})
    assert rewards_of([url])([Image.new("RGB", (8, 8))], asked[:1]) == {url: [0.25]}
    assert answers[1]["prompts"] == [asked[0].prompt]


@pytest.mark.parametrize("answer", [{"rewards": [1, 2]}, {"reward": [1]}, {"rewards": ["high"]}, []])
def test_a_server_that_answers_something_else_is_told_in_one_line(server, asked, answer):
    url, answers = server
    answers.append(answer)
    with pytest.raises(InputError) as caught:
        rewards_of([url])([Image.new("RGB", (8, 8))], asked[:1])
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)


def test_weights_of_rewards():
    assert weights_of(["right", "text:2", "http://x:80/r:0.5"]) == {"right": 1, "text": 2, "http://x:80/r": 0.5}
    for wrong in ([], ["text:0"], ["text:-1"], [":2"]):
        with pytest.raises(InputError):
            weights_of(wrong)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"model": {"from": ""}}, "needs a model"),
        ({"reinforce": {"method": "dpo"}}, "too little for dpo"),
        ({"reinforce": {"rewards": []}}, "is empty"),
        ({"reinforce": {"method": "grpo", "noise": 0.0}}, "noise = 0 leaves grpo no stochastic step"),
        ({"reinforce": {"method": "grpo", "steps": 1}}, "steps = 1 leaves grpo no stochastic step"),
        ({"data": {"source": "edits"}}, "without references"),
    ],
)
def test_what_cannot_be_rewarded_is_refused_in_one_line(make, tables, words):
    with pytest.raises(InputError, match=words) as caught:
        make(**tables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["beauty", "no_such_module:f", "json:nothing", "json:__name__"])
def test_an_unknown_reward_is_refused_in_one_line(name):
    with pytest.raises(InputError) as caught:
        rewards_of([name])
    assert "\n" not in str(caught.value)


def test_graders_know_scenes_alone(asked):
    with pytest.raises(InputError, match="scenes"):
        rewards_of(["right"])([Image.new("RGB", (8, 8))], [Asked("a mug", 0, None)])


def test_reinforcement_without_a_reward_is_refused(tmp_path, make):
    with pytest.raises(InputError, match="needs rewards"):
        list(train(make(), tmp_path))
