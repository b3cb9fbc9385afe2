"""A ControlNet learns beside a frozen model, in any family that has a kind of them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import inkstream
from inkstream.engine.pictures.inputs import to_pixels
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import SPECS as FLUX2
from inkstream.families.zimage.specs import BASE
from inkstream.train.checkpoint import load_checkpoint
from inkstream.train.loop import Finished, Progress, Saved, train
from inkstream.train.models import start
from inkstream.train.objectives import flow_error
from inkstream.train.parallel import ALONE
from inkstream.train.reading import as_recipe
from inkstream.train.tasks import Flow
from inkstream.types import InputError, Request

GUIDED = [BASE, DEV, FLUX2["flux2-dev"]]


def pictures(folder):
    """Pictures with a square somewhere, of which the captions say nothing."""
    folder.mkdir()
    for i, place in enumerate([(8, 8), (24, 8), (8, 24), (24, 24)]):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste("blue", (*place, place[0] + 24, place[1] + 24))
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a square")
    return folder


def recipe(path, folder, tmp_path, /, **tables):
    own = {
        "model": {"from": str(path), "name": "mine", "train": ["control"]},
        "data": {"source": str(folder), "sizes": [[64, 64]], "cache": str(tmp_path / "cache"), "workers": 0},
        "optimiser": {"warmup": 0, "lr": 3e-3},
        "run": {"steps": 4, "batch": 4, "log": 1, "save": 2, "device": "cpu"},
    }
    return as_recipe({name: {**own.get(name, {}), **tables.get(name, {})} for name in {**own, **tables}})


@pytest.mark.parametrize("spec", GUIDED, ids=lambda spec: spec.name)
def test_a_net_learns_goes_on_to_the_bit_and_is_drawn_with(tmp_path, make_folder, spec):
    model = make_folder(tmp_path / "model", spec.tiny, seed=2)
    settings = recipe(model, pictures(tmp_path / "pictures"), tmp_path)
    told = list(train(settings, tmp_path / "whole"))
    half = train(settings, tmp_path / "halves")
    for message in half:
        if isinstance(message, Saved) and message.step == 2:
            break
    half.close()
    list(train(settings, tmp_path / "halves", resume=True))
    whole, halves = (load_checkpoint(tmp_path / run / "checkpoints") for run in ("whole", "halves"))
    assert all(key.startswith("control.") for key in whole.weights)
    assert all(torch.equal(whole.weights[key], halves.weights[key]) for key in whole.weights)
    path = tmp_path / "whole" / "mine.safetensors"
    assert next(message.model for message in told if isinstance(message, Finished)) == path
    engine = inkstream.Engine(inkstream.Machine("cpu", dtype="fp32"))
    edges = Image.new("RGB", (64, 64))
    edges.paste("white", (8, 8, 32, 32))
    edges.save(tmp_path / "edges.png")
    plain = {"model": str(model), "prompt": "a square", "width": 64, "height": 64, "seed": 1, "steps": 2}
    guided = {**plain, "control": (str(tmp_path / "edges.png"),)}
    drawn = [
        to_pixels(engine.generate(Request.model_validate(one)).images[0], 64, 64)
        for one in (plain, {**guided, "control_nets": (f"{path}:0",)}, {**guided, "control_nets": (f"{path}:1",)})
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("spec", GUIDED, ids=lambda spec: spec.name)
def test_a_new_net_changes_nothing_and_all_of_it_learns(tmp_path, make_folder, spec):
    model = make_folder(tmp_path / "model", spec.tiny, seed=2)
    task = Flow(
        settings := recipe(model, pictures(tmp_path / "p"), tmp_path), start(settings), torch.device("cpu"), ALONE
    )
    list(task.prepare())
    batch = task.data.load(task.data.place(0))
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.7, 0.5, 0.2])
    with torch.no_grad():
        alone = flow_error(task.family, batch, t, noise)
        assert torch.allclose(flow_error(task.family, batch, t, noise, follow=task.follow), alone, atol=1e-5)
    assert task.net is not None
    for weight in task.net.weights.parameters():  # behind hints of zero, nothing else has a gradient yet
        torch.nn.init.normal_(weight, std=0.1)
    flow_error(task.family, batch, t, noise, follow=task.follow).mean().backward()
    assert [name for name, weight in task.net.weights.named_parameters() if weight.grad is None] == []
    assert all(weight.grad is None for weight in task.family.transformer.parameters())


def test_the_loss_falls_by_what_the_edges_tell(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", BASE.tiny, seed=2)
    settings = recipe(model, pictures(tmp_path / "p"), tmp_path, run={"steps": 25, "save": 100})
    losses = [message.loss for message in train(settings, tmp_path / "run") if isinstance(message, Progress)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_given_maps_are_read_and_the_file_has_the_published_names(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", BASE.tiny, seed=2)
    folder = pictures(tmp_path / "pictures")
    maps = tmp_path / "maps"
    maps.mkdir()
    for path in folder.glob("*.png"):
        Image.new("RGB", (64, 64), "black").save(maps / path.name)
    settings = recipe(model, folder, tmp_path, control={"map": str(maps)}, run={"steps": 1})
    list(train(settings, tmp_path / "run"))
    names = set(load_file(tmp_path / "run" / "mine.safetensors"))
    assert {"control_all_x_embedder.2-1.weight", "control_layers.0.before_proj.weight"} <= names
    assert "control_noise_refiner.0.attention.to_q.weight" in names
    (maps / "2.png").unlink()
    with pytest.raises(InputError, match=r"\[control\] map = .* holds no 2.png: add it, the control picture of 2.png"):
        list(train(settings, tmp_path / "again"))


def test_scenes_teach_a_net_and_previews_follow_maps(tmp_path, make_folder):
    model = make_folder(tmp_path / "model", BASE.tiny, seed=2)
    settings = as_recipe({
        "model": {"from": str(model), "train": ["control"]},
        "data": {"count": 4, "sizes": [[64, 64]], "cache": str(tmp_path / "c"), "workers": 0},
        "run": {"steps": 1, "batch": 2, "device": "cpu", "preview": 1, "preview_count": 2, "held_out": 1,
                "held_out_count": 2},
    })  # fmt: skip
    list(train(settings, tmp_path / "run"))
    assert list((tmp_path / "run" / "previews").glob("*.png"))


@pytest.mark.parametrize(
    ("tables", "error"),
    [
        ({"model": {"train": ["control", "transformer"]}}, "the model stays while a control net learns"),
        ({"model": {"train": []}, "control": {"map": "gray"}}, r'add \[model\] train = \["control"\]'),
        ({"control": {"kind": "lite"}}, r"\[control\] kind = 'lite' is not known: take union"),
        ({"control": {"sizes": {"depth": 2}}}, r"\[model.control\] has no size depth"),
        ({"control": {"map": "edge"}}, r"\[control\] map = 'edge' is neither a map nor a folder"),
        ({"run": {"prompts": ["a cat"]}}, "previews follow held-out maps"),
        ({"adapter": {"kind": "lora"}}, "an adapter changes the transformer alone"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, make_folder, tables, error):
    model = make_folder(tmp_path / "model", BASE.tiny, seed=2)
    folder = pictures(tmp_path / "pictures")
    with pytest.raises(InputError, match=error):
        list(train(recipe(model, folder, tmp_path, **tables), tmp_path / "run"))
