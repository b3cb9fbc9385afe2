"""A student learns to draw in few steps without guidance, in every family, as a full model and as an adapter."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import inkstream
from inkstream.engine.drawing.model import Model
from inkstream.families.flux1.specs import DEV, SCHNELL
from inkstream.families.flux2.specs import KLEIN_BASE_4B
from inkstream.families.zimage.specs import BASE
from inkstream.train.checkpoint import load_checkpoint
from inkstream.train.distil import Distillation
from inkstream.train.loop import Finished, Graded, HeldOut, Progress, Saved, Warned, export_last, train
from inkstream.train.models import start
from inkstream.train.parallel import ALONE
from inkstream.train.reading import as_recipe
from inkstream.train.recipe import Recipe, as_tables, as_toml
from inkstream.train.signs import SIGNS, signs_in
from inkstream.types import InputError, Request

SPECS = [BASE, DEV, KLEIN_BASE_4B]
CPU = torch.device("cpu")
PATHS = {"steps": 2, "teacher_steps": 4, "guidance": 3.0, "pictures": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green"), ("d", "white")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"all {colour}")
    return folder


@pytest.fixture(scope="module")
def folders(make_folder, tmp_path_factory) -> dict[str, Path]:
    """A tiny published model of each family."""
    root = tmp_path_factory.mktemp("published")
    return {spec.family: make_folder(root / spec.family, spec.tiny, seed=2) for spec in SPECS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(folders, pictures, cache):
    def recipe(family: str = "zimage", **tables: dict[str, Any]) -> Recipe:
        own: dict[str, dict[str, Any]] = {
            "model": {"from": str(folders[family]), "name": "few"},
            "data": {"source": str(pictures), "sizes": [[32, 32]], "cache": str(cache), "workers": 0},
            "objective": {"kind": "distil"},
            "distil": {**PATHS, "critic_turns": 1},
            "optimiser": {"warmup": 0, "lr": 1e-3, "decay": 0.0, "ema": 0.9},
            "critic": {"lr": 2e-3},
            "run": {"steps": 2, "batch": 4, "device": "cpu", "log": 1, "save": 1},
        }
        return as_recipe({name: {**own.get(name, {}), **tables.get(name, {})} for name in {**own, **tables}})

    return recipe


def prepared(recipe: Recipe) -> Distillation:
    task = Distillation(recipe, start(recipe, CPU), CPU, ALONE)
    list(task.prepare())
    return task


def same_files(one: Path, other: Path) -> bool:
    names = ("weights", "ema", "optimiser")
    return all((one / f"{n}.safetensors").read_bytes() == (other / f"{n}.safetensors").read_bytes() for n in names)


# Every family -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zimage", "flux1", "flux2"])
@pytest.mark.parametrize("method", ["direct", "trajectory"])
def test_a_students_error_to_its_teacher_falls(tmp_path, make, family, method):
    recipe = make(family, distil={**PATHS, "method": method}, run={"steps": 30, "save": 30})
    losses = [m.loss for m in train(recipe, tmp_path) if isinstance(m, Progress)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zimage", "flux1", "flux2"])
def test_a_student_learns_what_guidance_adds(tmp_path, make, family):
    optimiser = {"warmup": 0, "lr": 1e-4, "decay": 0.0}
    own = {**PATHS, "method": "guidance", "times": (0.5, 0.51)}  # errors of one time can be compared
    recipe = make(family, distil=own, run={"steps": 40, "save": 40}, optimiser=optimiser)
    losses = [m.loss for m in train(recipe, tmp_path) if isinstance(m, Progress)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_student_without_guidance_to_learn_has_nothing_to_learn(make):
    losses = []
    for guidance in (1.0001, 3.0):
        task = prepared(make(distil={"method": "guidance", "guidance": guidance}))
        [(_, loss)] = task.turns(0)
        losses.append(loss(slice(None)).item())
    assert losses[0] < 1e-6 < losses[1]


def test_a_student_from_an_earlier_stage_has_the_first_teacher(tmp_path, make):
    """The student of the second stage differs from its teacher from the start, so distribution matching speaks."""
    first = make(distil={**PATHS, "method": "guidance"}, run={"steps": 6})
    list(train(first, tmp_path / "first"))
    second = {"from": str(tmp_path / "first" / "model"), "name": "fewer"}
    with pytest.raises(InputError, match="has none to distil: take another model"):
        prepared(make(model=second))
    task = prepared(make(model=second, distil={"steps": 2, "teacher": first.model.from_, "guidance": 3.0}))
    ours, theirs = (voice.family.transformer for voice in (task.student, task.teacher))
    wanted = start(first, CPU).modules["transformer"].state_dict()
    assert all(torch.equal(theirs.state_dict()[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(ours.state_dict()[key], wanted[key]) for key in wanted)


def test_a_teacher_that_is_no_relative_is_refused(make, folders, make_folder, tmp_path):
    stranger = make_folder(tmp_path / "stranger", BASE.tiny, seed=3)
    with pytest.raises(InputError, match="its text_encoder is not the student's; take a relative of it"):
        prepared(make(distil={"teacher": str(stranger)}))
    own = {"kind": "lora", "rank": 2}
    with pytest.raises(InputError, match="an adapter's teacher is its base; leave teacher out"):
        prepared(make(adapter=own, distil={"teacher": str(folders["zimage"])}))


def test_held_out_pictures_are_measured_against_the_teachers(tmp_path, make):
    """The teacher itself, in as many steps and with guidance 1 + a little, has almost no error."""
    scenes = {"source": "scenes", "count": 4, "captions": 1}
    recipe = make(data=scenes, distil={"steps": 2, "teacher_steps": 2, "guidance": 1.0001},
                  run={"held_out": 2, "held_out_count": 3})  # fmt: skip
    assert prepared(recipe).measure()["error"] < 1e-4
    assert [m.step for m in train(recipe, tmp_path) if isinstance(m, HeldOut)] == [2]


@pytest.mark.parametrize("family", ["zimage", "flux1", "flux2"])
def test_three_models_of_every_family_take_turns(tmp_path, make, family):
    recipe = make(family)
    messages = list(train(recipe, tmp_path))
    told = [m for m in messages if isinstance(m, Progress)]
    assert told[-1].others.keys() == {"critic"}
    assert {"dm", "ca", "lag", "cosine", "spread", "drift", "extremes", "ratio"} == told[-1].notes.keys()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["notes"]["ca"] > 0
    model = inkstream.load(tmp_path / "model")
    assert (model.spec.steps, model.spec.guidance) == (2, 1.0)
    assert "guidance" not in model.spec.abilities
    cond = model.encode(request := Request(prompt="all red", width=32, height=32))
    assert len(cond) == 1
    assert model.sample(request, cond).isfinite().all()


def test_teacher_and_critic_are_one_at_the_start_so_only_guidance_teaches(make):
    task = prepared(make())
    (_, loss), *_ = task.turns(0)
    loss(slice(None))
    notes = task.notes()
    assert notes["dm"] == 0
    assert notes["cosine"] == pytest.approx(1, abs=1e-5)
    assert notes["ca"] > 0


def test_distribution_matching_looks_at_no_training_picture(make):
    """Student and critic learn from the student's own pictures; the training pictures only tell what is healthy."""
    found = []
    for blank in (False, True):
        task = prepared(make())
        if blank:
            task.data.samples = [dataclasses.replace(one, images=one.images * 0) for one in task.data.samples]
        found.append([loss(slice(None)).item() for _, loss in task.turns(0)])
    assert found[0] == found[1]
    assert all(value > 0 for value in found[0])


def test_early_steps_prefer_noisy_times(make):
    task = prepared(make(distil={**PATHS, "noisy_first": 100}))
    early, late = (task._matching_times((512, 16, 4, 4), s, torch.Generator().manual_seed(0)).mean() for s in (0, 100))
    assert early > late + 0.1


def test_a_critic_that_moved_makes_distribution_matching_speak(make):
    task = prepared(make())
    critic = task.learners[1]
    for step in range(3):
        (_, _), (_, loss) = task.turns(step)
        critic.advance(step, loss)
    (_, loss), *_ = task.turns(3)
    loss(slice(None))
    assert task.notes()["dm"] > 0


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        {"dm": 0.0}, {"ca": 0.0}, {"coupled": True}, {"ca_times": "all"}, {"moments": 0.1}, {"beyond": 0.5},
        {"levels": "random", "steps": 4}, {"rollout": "fresh", "steps": 3}, {"noisy_first": 2}, {"gan": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_each_option_takes_part_in_a_run_that_resumes_to_the_bit(tmp_path, make, own):
    recipe = make(distil={"steps": 2, "guidance": 3.0, "critic_turns": 1, **own})
    list(train(recipe, tmp_path / "whole"))
    for message in (broken := train(recipe, tmp_path / "broken")):
        if isinstance(message, Saved):
            break
    broken.close()
    list(train(recipe, tmp_path / "broken", resume=True))
    last = "checkpoints/step-00000002"
    assert same_files(tmp_path / "whole" / last, tmp_path / "broken" / last)
    plain = load_checkpoint(tmp_path / "whole" / "checkpoints").weights
    assert any(name.startswith("critic.") for name in plain) == (own.get("dm") != 0.0)
    assert any(name.startswith("discriminator.") for name in plain) == ("gan" in own)


def test_pieces_of_a_batch_add_up_to_the_batch(make):
    task = prepared(make(distil={"steps": 2, "guidance": 3.0, "critic_turns": 1, "rollout": "fresh", "beyond": 0.5}))
    for learner, loss in task.turns(1):
        learner.weights.forget()
        whole = loss(slice(None)).item()
        pieces = [loss(slice(piece, None, 2)).item() for piece in range(2)]
        assert sum(pieces) / 2 == pytest.approx(whole, rel=1e-4), learner.name


def test_augmentation_looks_only_at_times_cleaner_than_the_students(make):
    task = prepared(make())
    shape = (256, 16, 4, 4)
    below = torch.full((256,), 0.4)
    found = task._times(shape, torch.Generator().manual_seed(0), below)
    assert found.max() <= 0.4
    assert task._times(shape, torch.Generator().manual_seed(0)).max() > 0.9


def test_each_level_is_asked_equally_often_and_the_first_is_noise(make):
    task = prepared(make(distil={"steps": 4}))
    ladder, levels = task._levels((8, 16, 4, 4), torch.Generator().manual_seed(3))
    assert torch.bincount(levels).tolist() == [2, 2, 2, 2]
    assert ladder[0, 0] == 1
    assert ladder[0, -1] == 0
    random = prepared(make(distil={"steps": 4, "levels": "random"}))
    for seed in range(8):
        ladder, levels = random._levels((8, 16, 4, 4), torch.Generator().manual_seed(seed))
        assert (ladder[:, 0] == 1).all()
        assert (ladder[:, 1:-1] < 1).all()
        assert (ladder.diff(dim=1) <= 0).all()
        assert levels.max() < ladder.shape[1] - 1


def test_a_rollout_is_what_the_student_draws(make):
    """The points of backward simulation are those of the engine's own sampling."""
    task = prepared(make())
    batch = task._move(task.data.load(task.data.place(0)))
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    ladder = torch.tensor(task._schedule(noise.shape)[0]).expand(len(noise), -1)
    with torch.no_grad():
        handed = task.student.prepare(noise.shape, task._entries(batch))
        last, _ = task._rollout(handed, noise, ladder, torch.full((len(noise),), 2), ())
    model = task.model()
    request = Request(width=32, height=32, seed=0)
    drawn = model.sample(request, task._entries(batch)[0][0], noise[:1])
    assert torch.allclose(drawn[0], last[0], atol=1e-4)


def test_the_teachers_path_is_what_the_teacher_draws_with_guidance(make):
    task = prepared(make(distil={**PATHS, "method": "trajectory"}))
    batch = task._move(task.data.load(task.data.place(0)))
    path = task.paths[0]
    model = Model(task.begun.family(), CPU, torch.float32)
    cond = task._entries(batch)[0]
    both = type(cond).pack([cond[0], task._entries(batch, empty=True)[0][0]])
    drawn = model.sample(Request(width=32, height=32, steps=4, guidance=3.0), both, path[0][:1])
    assert torch.allclose(drawn[0], path[-1][0], atol=2e-2)  # paths are kept in float16
    assert torch.equal(task.paths[0], path)


def test_rewards_take_part_at_the_same_time(tmp_path, make):
    """DMDR: the student's pictures get brighter while distribution matching holds it."""
    rewards = {"rewards": ["bright"], "group": 3}
    recipe = make(distil={**PATHS, "critic_turns": 1, "reward": 0.5}, reinforce=rewards)

    def bright(pictures, asked):
        return {"bright": [float(np.asarray(picture).mean()) / 255 for picture in pictures]}

    told = [m for m in train(recipe, tmp_path, reward=bright) if isinstance(m, Progress)]
    assert {"ca", "dm", "bright", "useful"} <= told[-1].notes.keys()
    plain = list(train(make(), tmp_path / "plain"))
    assert isinstance(plain[-1], Finished)
    ours, theirs = (load_checkpoint(folder / "checkpoints").weights for folder in (tmp_path, tmp_path / "plain"))
    name = "transformer.layers.0.feed_forward.w1.weight"
    assert not torch.equal(ours[name], theirs[name])


# Adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "stream"), [("zimage", False), ("zimage", True), ("flux1", False)])
def test_student_and_critic_are_adapters_beside_one_frozen_model(tmp_path, make, family, stream):
    recipe = make(family, adapter={"kind": "lora", "rank": 4, "stream": stream})
    list(train(recipe, tmp_path))
    saved = load_checkpoint(tmp_path / "checkpoints").weights
    assert {name.partition(".")[0] for name in saved} == {"adapter", "critic"}
    ours, theirs = (sum(1 for name in saved if name.startswith(part)) for part in ("adapter.", "critic."))
    assert ours == theirs
    assert any(value.abs().sum() > 0 for name, value in saved.items() if name.startswith("critic.") and "up" in name)
    path = tmp_path / "few.safetensors"
    before = path.read_bytes()
    path.unlink()
    assert export_last(recipe, tmp_path)[1] == path
    assert path.read_bytes() == before


def test_the_teacher_of_adapters_does_not_see_them(make):
    task = prepared(make(adapter={"kind": "lora", "rank": 4}))
    assert task.teacher.around.adapters == ()
    assert len(task.student.around.adapters) == len(task.critic.around.adapters) == 1
    assert task.student.around.adapters != task.critic.around.adapters


# Several processes --------------------------------------------------------------------------------------------------

SHARED = """
import sys
import torch.distributed
from inkstream.train.loop import train
from inkstream.train.reading import read_recipe
torch.distributed.init_process_group("gloo")
for kind in ("ddp", "fsdp"):
    list(train(read_recipe(f"{sys.argv[1]}/{kind}.toml"), f"{sys.argv[1]}/{kind}"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_distil_as_one(tmp_path, make):
    list(train(make(), tmp_path / "alone"))
    for name in ("ddp", "fsdp"):
        (tmp_path / f"{name}.toml").write_text(as_toml(as_tables(make(run={"parallel": name}))))
    (tmp_path / "run.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(tmp_path / "run.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours = load_checkpoint(tmp_path / "alone" / "checkpoints").weights
    for name in ("ddp", "fsdp"):
        theirs = load_checkpoint(tmp_path / name / "checkpoints").weights
        assert ours.keys() == theirs.keys()
        assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 2e-3, name
        assert (tmp_path / name / "model" / "model_index.json").is_file()


# Signs, the best step, and what is refused --------------------------------------------------------------------------


def test_a_healthy_run_has_no_sign_and_each_sign_says_what_to_change():
    healthy = {"lag": 0.1, "ratio": 0.3, "spread": 1.0, "drift": 0.02, "extremes": 0.0}
    assert signs_in(healthy) == {}
    for name, value in (("lag", 0.9), ("ratio", 0.001), ("spread", 1.5), ("spread", 0.5), ("drift", 0.5),
                        ("extremes", 0.1)):  # fmt: skip
        (text,) = signs_in({**healthy, name: value}).values()
        assert ":" in text
        assert "{" not in text
    assert {sign.name for sign in SIGNS} == healthy.keys()


def test_a_sign_is_told_once_while_it_lasts(tmp_path, make):
    recipe = make(optimiser={"lr": 0.5}, run={"steps": 4})
    texts = [m.text.partition("(")[0] for m in train(recipe, tmp_path) if isinstance(m, Warned)]
    assert texts
    assert len(texts) < 4 * len(set(texts))


def test_the_best_grades_are_exported_and_a_run_that_gets_no_better_ends(tmp_path, make):
    grades = iter([0.2, 0.6, 0.5, 0.4, 0.9])
    recipe = make(run={"steps": 9, "graded": 1, "best": True, "patience": 2})
    messages = list(train(recipe, tmp_path, grade=lambda model: {"all right": next(grades)}))
    assert isinstance(messages[-1], Finished)
    assert len([m for m in messages if isinstance(m, Graded)]) == 4
    assert "2 gradings" in messages[-1].why
    assert messages[-1].step == 4
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-00000002.safetensors"]
    best = load_file(tmp_path / "best-00000002.safetensors")
    written = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "layers.0.feed_forward.w1.weight"
    assert torch.equal(written[name], best[f"transformer.{name}"])


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"model": {"from": ""}}, "needs a teacher"),
        ({"distil": {"dm": 0.0, "ca": 0.0}}, "teach nothing"),
        ({"distil": {"times": [0.9, 0.1]}}, "two rising times"),
        ({"distil": {"method": "direct", "levels": "random"}}, "levels = random"),
        ({"data": {"trigger": "mug"}}, "trigger"),
        ({"reinforce": {"group": 4}}, "no effect without a weight"),
        ({"distil": {"method": "direct", "reward": 0.1}}, "reward is for method dmd"),
        ({"run": {"best": True}}, "set graded"),
        ({"distil": {"method": "magic"}}, "magic"),
    ],
)
def test_what_cannot_be_distilled_is_refused_in_one_line(make, tables, words):
    with pytest.raises(InputError, match=words) as caught:
        make(**tables)
    assert "\n" not in str(caught.value)


def test_a_model_without_guidance_has_none_to_distil(make, make_folder, tmp_path):
    recipe = make(model={"from": str(make_folder(tmp_path / "schnell", SCHNELL.tiny))}, distil={"guidance": 0.0})
    with pytest.raises(InputError, match="none to distil"):
        prepared(recipe)
