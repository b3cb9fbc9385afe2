"""Several learners take turns, old checkpoints are gone on from, a run tells its speed and what its pictures show."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import inkstream
from inkstream.cli import main
from inkstream.evaluate.judge import grade_drawings
from inkstream.evaluate.suites import open_suite, thin
from inkstream.nn.attention import attend
from inkstream.train import optim
from inkstream.train.checkpoint import list_checkpoints, load_checkpoint
from inkstream.train.kinds import TASKS
from inkstream.train.learner import Learner
from inkstream.train.loop import Finished, Graded, Preparing, Progress, Resumed, Saved, train
from inkstream.train.objectives import mix
from inkstream.train.plot import plot
from inkstream.train.reading import as_recipe, read_recipe
from inkstream.train.recipe import Optimiser, as_tables, as_toml
from inkstream.train.speed import ON_CPU, FlopCounterMode, count_flops, measure_peak
from inkstream.types import InputError

SIZES = {
    "transformer": {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "axes_dims": [8, 12, 12]},
    "text_encoder": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                     "head_dim": 16, "intermediate_size": 64},
    "vae": {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
}  # fmt: skip
OLD = Path(__file__).parent / "checkpoints" / "before_learners"


def recipe(cache: Path, **tables):
    """A tiny recipe of scenes at 32 pixels; tables of the same names are laid over it."""
    own = {
        "model": {**SIZES, "train": ["transformer", "text_encoder"], "steps": 2, "guidance": 2.0},
        "data": {"sizes": [[32, 32]], "count": 12, "captions": 2, "workers": 0, "pool": 2, "cache": str(cache)},
        "optimiser": {"kind": "muon", "warmup": 5},
        "run": {"steps": 4, "batch": 4, "log": 2, "device": "cpu"},
    }
    if tables.get("objective", {}).get("kind") == "autoencoder":
        del own["model"]["train"]
    return as_recipe({name: {**own.get(name, {}), **tables.get(name, {})} for name in {**own, **tables}})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def same_files(one: Path, other: Path) -> bool:
    names = ("weights", "ema", "optimiser")
    return all((one / f"{n}.safetensors").read_bytes() == (other / f"{n}.safetensors").read_bytes() for n in names)


class Duel:
    """A critic learns what a student says, in more turns; the student learns what a frozen teacher says, through it."""

    learns = ("transformer",)
    tables = {"critic": Optimiser}  # noqa: RUF012
    through = True
    """Whether the student's loss passes through the critic itself, or through a frozen copy of it."""

    def __init__(self, recipe, begun, device, team, reward=None):
        self.recipe, self.begun, self.device, self.team = recipe, begun, device, team

    def prepare(self):
        yield Preparing("a teacher")
        student = self.begun.modules["transformer"].requires_grad_(False).x_embedder
        torch.nn.init.zeros_(student.weight)
        self.teacher = copy.deepcopy(student)
        torch.nn.init.eye_(self.teacher.weight)
        critic = nn.Linear(64, 64)
        torch.nn.init.eye_(critic.weight)
        torch.nn.init.zeros_(critic.bias)
        make = partial(Learner, recipe=self.recipe, device=self.device, team=self.team)
        self.learners = [
            make("student", {"transformer.x_embedder": student}),
            make("critic", {"critic": critic}, settings=self.recipe.own["critic"]),
        ]
        self.student, self.critic = student, critic

    def turns(self, step):
        student, critic = self.learners
        for turn in range(2 + step % 2):
            yield critic, partial(self._critic_loss, step, turn)
        yield student, partial(self._student_loss, step)

    def samples(self, step):
        return self.recipe.run.batch

    def _inputs(self, step, turn):
        generator = torch.Generator().manual_seed(mix(step, turn))
        return torch.randn(self.recipe.run.batch, 64, generator=generator)

    def _critic_loss(self, step, turn, piece):
        said = self.student(self._inputs(step, turn)[piece]).detach()
        return F.mse_loss(self.critic(said), said)

    def _student_loss(self, step, piece):
        x = self._inputs(step, 9)[piece]
        critic = self.critic if self.through else copy.deepcopy(self.critic).requires_grad_(False)
        with torch.no_grad():
            wanted = self.teacher(x)
        return F.mse_loss(critic(self.student(x)), wanted)

    def measure(self):
        return {"far": (self.student.weight - self.teacher.weight).abs().mean().item()}

    def notes(self):
        return {}

    def model(self):
        return None

    def finish(self):
        return self.begun.spec


@pytest.fixture
def duel(monkeypatch):
    monkeypatch.setitem(TASKS, "duel", Duel)


def duel_recipe(cache, steps=8, **tables):
    return recipe(
        cache, objective={"kind": "duel"}, model={"train": []}, optimiser={"kind": "adamw", "lr": 3e-2, "warmup": 0},
        run={"steps": steps, "batch": 256, "save": 4, "log": 2, "held_out": 4, **tables.pop("run", {})},
        critic={"lr": 2e-2, "ema": 0.0}, **tables,
    )  # fmt: skip


def stop_after(step, messages):
    next(message for message in messages if isinstance(message, Saved) and message.step == step)
    messages.close()


# Several learners ---------------------------------------------------------------------------------------------------


def test_two_learners_with_unequal_turns_resume_to_the_bit(tmp_path, cache, duel):
    told = list(train(duel_recipe(cache), tmp_path / "whole"))
    stop_after(4, train(duel_recipe(cache), tmp_path / "halves"))
    resumed = list(train(duel_recipe(cache), tmp_path / "halves", resume=True))
    assert Resumed(4, ()) in resumed
    assert same_files(*(tmp_path / name / "checkpoints" / "step-00000008" for name in ("whole", "halves")))
    saved = load_checkpoint(tmp_path / "whole" / "checkpoints")
    assert saved.optimiser["step.transformer.x_embedder.weight"] == 8
    assert saved.optimiser["step.critic.weight"] == 8 * 2 + 4
    assert {name.split(".")[0] for name in saved.weights} == {"transformer", "critic"}
    assert {name.split(".")[0] for name in saved.ema} == {"transformer"}
    progress = [message for message in told if isinstance(message, Progress)]
    assert progress[-1].loss < progress[0].loss
    assert progress[0].lr == 3e-2
    assert [list(message.others) for message in progress] == [["critic"]] * 4
    assert progress[0].others["critic"]["lr"] == 2e-2
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["others"]["critic"]["loss"] == progress[0].others["critic"]["loss"]


def test_what_is_exported_is_the_student_in_its_place_and_nothing_of_its_critic(tmp_path, cache, duel):
    *_, last = train(duel_recipe(cache), tmp_path)
    model = inkstream.load(last.model, inkstream.Machine("cpu", "fp32"))
    saved = load_checkpoint(tmp_path / "checkpoints").ema["transformer.x_embedder.weight"]
    assert saved.any()
    assert torch.equal(model.family.transformer.x_embedder.weight, saved)
    assert sorted(path.name for path in last.model.iterdir() if path.is_dir()) == [
        "scheduler", "text_encoder", "tokenizer", "transformer", "vae"
    ]  # fmt: skip


def test_gradients_that_pass_through_another_learner_are_not_its_own(tmp_path, cache, duel, monkeypatch):
    list(train(duel_recipe(cache), tmp_path / "through"))
    monkeypatch.setattr(Duel, "through", False)
    list(train(duel_recipe(cache), tmp_path / "beside"))
    assert same_files(*(tmp_path / name / "checkpoints" / "step-00000008" for name in ("through", "beside")))


def test_a_table_of_a_tasks_own_takes_from_the_optimiser_what_it_leaves_out(cache, duel):
    wanted = duel_recipe(cache)
    assert wanted.own == {"critic": Optimiser(kind="adamw", lr=2e-2, warmup=0, ema=0.0)}
    assert as_recipe(as_tables(wanted)) == wanted
    with pytest.raises(InputError, match=r"\[critic\] has no key lrr: did you mean lr\?"):
        as_recipe({"objective": {"kind": "duel"}, "critic": {"lrr": 1}})
    with pytest.raises(InputError, match=r"\[critic\] is not a table of a recipe"):
        as_recipe({"critic": {"lr": 1}})


@pytest.mark.parametrize("kind", ["dual", 5, ["flow"]])
def test_a_kind_of_objective_that_is_not_known_is_named_with_those_that_are(kind):
    with pytest.raises(InputError, match=r"\[objective\] kind = .+: take one of flow, autoencoder, distil, reinforce$"):
        as_recipe({"objective": {"kind": kind}})


# Checkpoints of before ----------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_checkpoint_of_before_there_were_learners(tmp_path, monkeypatch):
    """Written at step 2 of 4 by the code of that time, and with it what that code came to at step 4."""
    monkeypatch.setattr(optim, "fast_bfloat16", lambda device: False)  # that code computed in float32
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("noise")
    shutil.copytree(OLD / "step-00000002", tmp_path / "run" / "checkpoints" / "step-00000002")
    tables = json.loads((OLD / "step-00000002" / "state.json").read_text())["recipe"]
    tables["data"] |= {"source": str(pictures), "cache": str(tmp_path / "cache")}
    told = list(train(as_recipe(tables), tmp_path / "run", resume=True))
    assert Resumed(2, ("data.source", "data.cache")) in told
    ours = load_checkpoint(tmp_path / "run" / "checkpoints").ema
    theirs = inkstream.weights.files.read_state(OLD / "ema-4.safetensors")
    before = inkstream.weights.files.read_state(OLD / "step-00000002" / "ema.safetensors")
    assert ours.keys() == theirs.keys()
    moved, far = (torch.cat([(theirs[name] - others[name]).flatten() for name in theirs]) for others in (before, ours))
    assert moved.abs().max() > 1e-3
    # Norms, because Adam makes full steps of gradients that are nothing but rounding, which processors do differently.
    assert far.norm() < 1e-2 * moved.norm()


# What is told -------------------------------------------------------------------------------------------------------


def test_the_operations_of_a_sample_are_those_of_its_matrix_products(cache, duel):
    from inkstream.train.models import start
    from inkstream.train.parallel import ALONE

    wanted = duel_recipe(cache)
    task = Duel(wanted, start(wanted), torch.device("cpu"), ALONE)
    list(task.prepare())
    product = 2 * 64 * 64
    critic = 3 * product  # the student's, its own, the gradient of its weight
    student = 6 * product  # the teacher's, its own, the critic's; gradients of both weights and through the critic
    assert count_flops(task, 0) == 2.5 * critic + student
    assert all(p.grad is None for p in (*task.student.parameters(), *task.critic.parameters()))


def test_attention_on_a_processor_is_counted():
    q, k, v = (torch.randn(6, 2, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        out = attend(q, k, v, (6,), (6,))
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * (2 * 6 * 6 * 8 * 2)  # both products, of two heads
    assert counter.get_total_flops() >= 3 * forward


def test_the_peak_is_what_matrix_products_reach():
    peak = measure_peak(torch.device("cpu"), torch.float32, rounds=2)
    assert 1e8 < peak < 1e15


def test_speed_and_processor_time_are_told_and_the_time_goes_on_after_a_pause(tmp_path, cache):
    def last_of(messages):
        return [message for message in messages if isinstance(message, Progress)][-1]

    first = last_of(train(recipe(cache, run={"until": 2, "log": 1}), tmp_path))
    assert first.gflops > 0
    assert 0 < first.peak < 1.5
    saved = load_checkpoint(tmp_path / "checkpoints").cpu_seconds
    assert saved >= first.cpu_seconds > 0
    second = last_of(train(recipe(cache, run={"log": 1}), tmp_path, resume=True))
    assert second.cpu_seconds > saved
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["cpu_seconds"] for line in lines] == sorted(line["cpu_seconds"] for line in lines)
    assert all(line["gflops"] > 0 and line["peak"] > 0 for line in lines)


# Grading ------------------------------------------------------------------------------------------------------------


def test_pictures_of_the_averaged_weights_are_graded_and_drawn_as_curves(tmp_path, cache):
    cases = thin(open_suite("pocket"), 3)
    wanted = recipe(cache, run={"graded": 2, "log": 2}, optimiser={"lr": 0.1, "lr_muon": 0.1, "ema": 0.5, "warmup": 0})
    seen = []

    def grade(model):
        seen.append(model.family.transformer.x_embedder.weight.clone())
        seen.append(model.family.encode(cases[next(iter(cases))].prompt).tokens.clone())
        return grade_drawings(model, cases)

    told = list(train(wanted, tmp_path, grade=grade))
    graded = [message for message in told if isinstance(message, Graded)]
    assert [message.step for message in graded] == [2, 4]
    assert next(iter(graded[0].values)) == "all right"
    assert all(0 <= share <= 1 for message in graded for share in message.values.values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["graded"] for line in lines if "graded" in line] == [message.values for message in graded]
    ema = load_checkpoint(tmp_path / "checkpoints").ema["transformer.x_embedder.weight"]
    assert torch.equal(seen[2], ema)
    assert not torch.equal(seen[1], seen[3]), "prompts are encoded with what the text encoder has become"


def test_grades_of_a_run_are_those_of_its_finished_model(tmp_path, cache):
    cases = thin(open_suite("pocket"), 4)
    told = list(train(recipe(cache, run={"graded": 4}), tmp_path, grade=lambda model: grade_drawings(model, cases)))
    (graded,) = (message for message in told if isinstance(message, Graded))
    assert grade_drawings(inkstream.load(told[-1].model, inkstream.Machine("cpu", "fp32")), cases) == graded.values


def test_the_command_grades_with_the_suite_of_the_recipe_and_tells_speed(tmp_path, cache, capsys):
    path = tmp_path / "small.toml"
    path.write_text(as_toml(as_tables(recipe(cache, run={"graded": 4, "graded_count": 2, "graded_suite": "text"}))))
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    assert re.search(r"step 4 graded: all right \d+%, background \d+%", shown)
    assert re.search(
        r"step 4 of 4: loss [\d.]+, [\d.]+ images/s, \d+ GFLOP/s \(\d+% of the peak\), 0:00:00 left", shown
    )
    assert main(["train", str(path), "--output", str(tmp_path / "other"), "--set", "run.graded_suite=texts"]) == 2
    assert "there is no suite texts: take pocket, text" in capsys.readouterr().err


def test_a_run_that_cannot_be_graded_says_so_before_its_first_step(tmp_path, cache):
    with pytest.raises(InputError, match=r"\[run\] graded = 2 needs a grader: give `train` one, or set it to 0"):
        list(train(recipe(cache, run={"graded": 2}), tmp_path))
    alone = recipe(cache, run={"graded": 2}, objective={"kind": "autoencoder"})
    with pytest.raises(InputError, match=r"\[run\] graded = 2 cannot grade autoencoder: set it to 0"):
        list(train(alone, tmp_path, grade=lambda model: {}))


def test_shares_are_drawn_on_an_axis_of_their_own(tmp_path):
    losses = {"loss": [(0, 1.0), (10, 0.1)]}
    plot(losses, {}, tmp_path / "without.png")
    plot(losses, {"all right": [(0, 0.0), (10, 1.0)]}, tmp_path / "with.png")
    with Image.open(tmp_path / "without.png") as one, Image.open(tmp_path / "with.png") as other:
        plain, shown = np.asarray(one), np.asarray(other)
    rising = (shown != plain).any(-1)
    assert rising.shape == (420, 900)
    left, right = rising[:, 80:200].any(1).nonzero()[0], rising[:, 600:680].any(1).nonzero()[0]
    assert left.mean() > right.mean() + 200, "the curve rises from the lower left to the upper right"


# The recipe ---------------------------------------------------------------------------------------------------------


def test_the_recipe_in_a_runs_folder_gives_the_run_again_to_the_bit(tmp_path, cache):
    list(train(recipe(cache, run={"prompts": ['the word "É\x7f" 红', "b\\c"]}), tmp_path / "first"))
    list(train(read_recipe(tmp_path / "first" / "recipe.toml"), tmp_path / "again"))
    assert same_files(*(tmp_path / name / "checkpoints" / "step-00000004" for name in ("first", "again")))


def test_a_run_whose_recipe_changed_on_the_way_is_had_again_by_stopping_there(tmp_path, cache):
    list(train(recipe(cache, run={"until": 2}), tmp_path / "first"))
    list(train(recipe(cache, optimiser={"lr": 5e-3}), tmp_path / "first", resume=True))
    kept = sorted(path.name for path in (tmp_path / "first").glob("*.toml"))
    assert kept == ["recipe-2.toml", "recipe.toml"]
    assert tomllib.loads((tmp_path / "first" / "recipe-2.toml").read_text())["optimiser"]["lr"] == 5e-3
    *_, last = train(read_recipe(tmp_path / "first" / "recipe.toml"), tmp_path / "again")
    assert last == Finished(2, None, "step 2 is reached")
    list(train(read_recipe(tmp_path / "first" / "recipe-2.toml"), tmp_path / "again", resume=True))
    assert same_files(*(tmp_path / name / "checkpoints" / "step-00000004" for name in ("first", "again")))
    assert len(list_checkpoints(tmp_path / "again" / "checkpoints")) == 2
