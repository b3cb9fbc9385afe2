"""Edit models learn from pairs of pictures: references, and an instruction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

import inkstream
from inkstream.families.flux1.specs import KONTEXT
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.specs import BASE, OMNI
from inkstream.train.checkpoint import load_checkpoint
from inkstream.train.data import Preparing
from inkstream.train.loop import Progress, Saved, train
from inkstream.train.models import start
from inkstream.train.objectives import flow_error
from inkstream.train.parallel import ALONE
from inkstream.train.reading import as_recipe
from inkstream.train.tasks import Flow
from inkstream.types import InputError, Request

COLOURS = {"a": "red", "b": "blue", "c": "green", "d": "yellow"}
SMALL = {spec.name: spec.tiny for spec in (OMNI, BASE, KLEIN_4B)}
"""Models whose references have their own size. Kontext scales them to a megapixel."""


def pairs(folder, references=1):
    """A folder of pictures with instructions, and folders of the pictures that they are drawn from."""
    (folder / "after").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(folder / "after" / f"{name}.png")
        (folder / "after" / f"{name}.txt").write_text("swap the halves")
        for number in range(references):
            (folder / f"before-{number}").mkdir(exist_ok=True)
            before = Image.new("RGB", (64, 64), colour)
            before.paste("black", (0, 0, 64, 32 * (number + 1) // references))
            before.save(folder / f"before-{number}" / f"{name}.png")
    return folder


def recipe(path, folder, tmp_path, references=1, **tables):
    own = {
        "model": {"from": str(path), "name": "mine"},
        "data": {
            "source": str(folder / "after"), "sizes": [[64, 64]], "cache": str(tmp_path / "cache"), "workers": 0,
            "references": [str(folder / f"before-{n}") for n in range(references)],
        },
        "objective": {"dropout": 0.25},
        "optimiser": {"warmup": 0, "lr": 3e-3},
        "run": {"steps": 4, "batch": 4, "log": 1, "save": 2, "device": "cpu"},
    }  # fmt: skip
    return as_recipe({name: {**table, **tables.get(name, {})} for name, table in own.items()})


def begun(settings):
    task = Flow(settings, start(settings), torch.device("cpu"), ALONE)
    for message in task.prepare():
        assert isinstance(message, Preparing)
    return task


@pytest.mark.parametrize("name", SMALL)
def test_a_model_learns_from_pairs_and_goes_on_to_the_bit(tmp_path, make_folder, name):
    model = make_folder(tmp_path / "model", SMALL[name], seed=2)
    settings = recipe(model, pairs(tmp_path / "pairs"), tmp_path)
    list(train(settings, tmp_path / "whole"))
    half = train(settings, tmp_path / "halves")
    for message in half:
        if isinstance(message, Saved) and message.step == 2:
            break
    half.close()
    list(train(settings, tmp_path / "halves", resume=True))
    whole, halves = (load_checkpoint(tmp_path / run / "checkpoints") for run in ("whole", "halves"))
    assert all(torch.equal(whole.weights[key], halves.weights[key]) for key in whole.weights)
    trained = inkstream.load(str(tmp_path / "whole" / "model"), inkstream.Machine("cpu"))
    assert "references" in trained.spec.abilities
    seen = str(tmp_path / "pairs" / "before-0" / "a.png")
    drawn = [
        trained.encode(Request(prompt="swap the halves", reference=reference, steps=1, seed=0)).references
        for reference in ((), (seen,))
    ]
    assert (len(drawn[0]), len(drawn[1])) == (0, 1)


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_on_pairs_falls(tmp_path, make_folder, name):
    model = make_folder(tmp_path / "model", SMALL[name], seed=2)
    settings = recipe(model, pairs(tmp_path / "pairs"), tmp_path, run={"steps": 25, "save": 100})
    losses = [message.loss for message in train(settings, tmp_path / "run") if isinstance(message, Progress)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("spec", [OMNI, KLEIN_4B, KONTEXT], ids=lambda spec: spec.name)
def test_the_references_change_what_is_predicted(tmp_path, make_folder, spec):
    model = make_folder(tmp_path / "model", spec.tiny, seed=2)
    task = begun(recipe(model, pairs(tmp_path / "pairs"), tmp_path, run={"batch": 2}))
    batch = task.data.load(task.data.place(0))
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.5])
    other = replace(batch, references=list(batch.references)[::-1])
    with torch.no_grad():
        errors = [flow_error(task.family, one, t, noise) for one in (batch, other)]
    assert (errors[0] - errors[1]).abs().min() > 0


def test_a_batch_equals_its_samples_though_their_references_differ(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", OMNI.tiny, seed=2)
    task = begun(recipe(model, pairs(tmp_path / "pairs", 2), tmp_path, references=2))
    place = task.data.place(0)
    batch = task.data.load(place)
    assert [len(seen) for seen in batch.references] == [2] * 4
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.7, 0.5, 0.2])
    with torch.no_grad():
        whole = flow_error(task.family, batch, t, noise)
        for i in range(4):
            one = task.data.load(place, slice(i, i + 1))
            assert torch.allclose(flow_error(task.family, one, t[i : i + 1], noise[i : i + 1]), whole[i], atol=1e-5)


def test_training_sees_the_references_that_drawing_sees(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", OMNI.tiny, seed=2)
    folder = pairs(tmp_path / "pairs")
    settings = recipe(model, folder, tmp_path, run={"steps": 1})
    task = begun(settings)
    batch = task.data.load(task.data.place(0))
    list(train(settings, tmp_path / "run"))
    trained = inkstream.load(str(tmp_path / "run" / "model"), inkstream.Machine("cpu", dtype="fp32"))
    names = sorted(COLOURS)
    rows = task.data.samples[0].indices[task.data.place(0).rows]
    seen = str(folder / "before-0" / f"{names[rows[0]]}.png")
    cond = trained.encode(Request(prompt="swap the halves", reference=(seen,), seed=0, guidance=1.0))
    assert torch.allclose(cond.references[0], batch.references[0][0], atol=2e-3)  # the cache is float16
    if len(batch.cond[0].tokens) == len(cond.tokens):  # not the empty caption
        assert torch.allclose(cond.tokens, batch.cond[0].tokens, atol=2e-2)


def test_only_some_weights_learn_if_the_recipe_says_so(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", OMNI.tiny, seed=2)
    settings = recipe(
        model, pairs(tmp_path / "pairs"), tmp_path, run={"steps": 1},
        model={"only": ["layers.*.attention.*"]},
    )  # fmt: skip
    list(train(settings, tmp_path / "run"))
    before, after = (
        inkstream.load(str(path), inkstream.Machine("cpu", dtype="fp32")).family.transformer.state_dict()
        for path in (model, tmp_path / "run" / "model")
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(".attention." in key and key.startswith("layers.") for key in changed)
    with pytest.raises(InputError, match="names no weight: take a pattern such as layers"):
        list(train(recipe(model, tmp_path / "pairs", tmp_path, model={"only": ["blocks.*"]}), tmp_path / "none"))


def test_scenes_are_edited_as_the_instruction_says(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", OMNI.tiny, seed=2)
    settings = as_recipe({
        "model": {"from": str(model)},
        "data": {"source": "edits", "count": 6, "sizes": [[64, 64]], "cache": str(tmp_path / "c"), "workers": 0,
                 "grammar": {"tidy": True, "faces": ["mono"]}},
        "run": {"steps": 1, "batch": 3, "device": "cpu", "preview": 1, "preview_count": 2, "held_out": 1,
                "held_out_count": 3},
    })  # fmt: skip
    list(train(settings, tmp_path / "run"))
    (sheet,) = (tmp_path / "run" / "previews").glob("*.png")
    with Image.open(sheet) as image:
        assert image.size == (6 * 66 - 2, 64)


def test_what_is_wrong_with_pairs_is_said_in_one_line(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", OMNI.tiny, seed=2)
    folder = pairs(tmp_path / "pairs")
    with pytest.raises(InputError, match="previews draw held-out pairs"):
        recipe(model, folder, tmp_path, run={"prompts": ["red"]})
    with pytest.raises(InputError, match="prior holds pictures without references"):
        recipe(model, folder, tmp_path, data={"prior": str(folder)})
    (folder / "before-0" / "c.png").rename(folder / "before-0" / "x.png")
    with pytest.raises(InputError, match=r"holds no c.png: add it, the picture that c.png is drawn from"):
        list(train(recipe(model, folder, tmp_path), tmp_path / "run"))
