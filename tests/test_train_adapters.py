"""Adapters are trained beside a frozen model, packed or streamed, and come out as files that other programs read."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import inkstream
from inkstream.engine.files.sources import locate
from inkstream.families import adapter_names
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_BASE_4B
from inkstream.families.zimage.specs import BASE, TURBO
from inkstream.nn.quant import PackedLinear
from inkstream.train.adapterfile import write_adapter
from inkstream.train.adapters import Slot, slots_of
from inkstream.train.checkpoint import load_checkpoint
from inkstream.train.few_steps import softened
from inkstream.train.loop import Preview, Resumed, Warned, export_last, train
from inkstream.train.models import start
from inkstream.train.objectives import flow, flow_error, velocity_of
from inkstream.train.parallel import ALONE
from inkstream.train.reading import as_recipe
from inkstream.train.recipe import Adapter, Recipe
from inkstream.train.tasks import Flow
from inkstream.types import InputError, Request
from inkstream.weights.lora.read import read_lora

SPECS = [BASE, DEV, KLEIN_BASE_4B]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (48, 40), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"all {colour}")
    return folder


@pytest.fixture(scope="module")
def folders(make_folder, tmp_path_factory) -> dict[str, Path]:
    """A tiny published model of each family."""
    root = tmp_path_factory.mktemp("published")
    return {spec.family: make_folder(root / spec.family, spec.tiny, seed=2) for spec in SPECS}


def recipe(folder: Path, shown: Path, cache: Path, /, **tables: dict[str, Any]) -> Recipe:
    own: dict[str, dict[str, Any]] = {
        "model": {"from": str(folder), "name": "mine", "steps": 2},
        "adapter": {"kind": "lora", "rank": 4},
        "data": {"source": str(shown), "sizes": [[32, 32]], "cache": str(cache), "workers": 0},
        "objective": {},
        "optimiser": {"warmup": 0, "lr": 1e-2, "decay": 0.0},
        "run": {"steps": 4, "batch": 3, "device": "cpu", "log": 1},
    }
    return as_recipe({name: {**table, **tables.get(name, {})} for name, table in own.items()})


def prepared(settings: Recipe) -> Flow:
    task = Flow(settings, start(settings, CPU), CPU, ALONE)
    list(task.prepare())
    return task


def gradients(task: Flow) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the first step, and the gradients of the adapter. Its `up` is not zero, so all weights have one."""
    (learner,) = task.learners
    generator = torch.Generator().manual_seed(5)
    for name, weight in learner.weights.live.items():
        if name.endswith("up"):
            weight.data = torch.randn(weight.shape, generator=generator).to(weight) * 0.1
    ((_, loss),) = task.turns(0)
    learner.weights.forget()
    value = loss(slice(None))
    value.backward()
    return value.detach(), {
        name: weight.grad for name, weight in learner.weights.live.items() if weight.grad is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zimage", "flux1", "flux2"])
@pytest.mark.parametrize(("base", "dtype"), [("", "fp32"), ("int8", "bf16")])
def test_streamed_blocks_give_the_gradients_of_resident_ones(tmp_path, folders, pictures, family, base, dtype):
    found = {}
    for stream in (False, None, True):  # None: resident, but computed again
        adapter = {"base": base, "stream": bool(stream)}
        run = {"dtype": dtype, "checkpointing": stream is None}
        settings = recipe(folders[family], pictures, tmp_path, adapter=adapter, run=run)
        task = prepared(settings)
        assert any(isinstance(layer, PackedLinear) for layer in task.begun.modules["transformer"].modules()) == bool(
            base
        )
        found[stream] = gradients(task)
    expected, resident = found[False]
    for loss, ours in (
        found[None],
        found[True],
        gradients(task),
    ):  # the last: once more, streamed
        assert torch.equal(loss, expected)
        assert ours.keys() == resident.keys() == set(task.learners[0].weights.live)
        for name, gradient in ours.items():
            assert gradient.abs().sum() > 0, name
            assert torch.equal(gradient, resident[name]), name


# What is trained ----------------------------------------------------------------------------------------------------


def slots(folder: Path, **adapter: Any) -> list[Slot]:
    return slots_of(locate(folder).spec, Adapter(kind="lora", **adapter))


def test_q_k_and_v_have_changes_of_their_own_and_refiners_have_none(folders):
    sizes = locate(folders["zimage"]).spec.transformer
    found, width = slots(folders["zimage"]), sizes.dim
    assert [(slot.name, slot.rows) for slot in found[:4]] == [
        ("layers.0.attention.to_q", slice(0, width)),
        ("layers.0.attention.to_k", slice(width, 2 * width)),
        ("layers.0.attention.to_v", slice(2 * width, 3 * width)),
        ("layers.0.attention.to_out.0", slice(0, width)),
    ]
    assert len(found) == 7 * sizes.n_layers
    queries = slots(folders["zimage"], layers=("*.to_q",))
    assert {slot.path.split(".")[0] for slot in queries} == {"layers", "noise_refiner", "context_refiner"}
    assert all(slot.rows == slice(0, width) for slot in queries)
    fused = slots(folders["zimage"], layers=("layers.1.attention.qkv",))
    assert [slot.name for slot in fused] == [f"layers.1.attention.to_{letter}" for letter in "qkv"]


@pytest.mark.parametrize("spec", [DEV, KLEIN_BASE_4B], ids=lambda spec: spec.family)
def test_attention_and_feed_forward_of_flux_change_and_modulation_does_not(folders, spec):
    found = slots(folders[spec.family])
    paths = {slot.path for slot in found}
    assert {"double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.1.linear2"} <= paths
    assert not any("mod" in path for path in paths)
    apart = slots(folders[spec.family], format="diffusers", layers=("transformer_blocks.0.attn.to_q",))
    assert [slot.path for slot in apart] == ["double_blocks.0.img_attn.qkv"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zimage", "flux1", "flux2"])
@pytest.mark.parametrize(
    ("kind", "form"),
    [("lora", "comfyui"), ("rslora", "kohya"), ("dora", "diffusers"), ("dora", "comfyui"), ("lokr", "lycoris")],
)
def test_the_file_of_an_adapter_gives_the_velocities_of_its_training(tmp_path, folders, pictures, family, kind, form):
    adapter = {"kind": kind, "format": form, "rank": 2, "alpha": 3.0}
    settings = recipe(folders[family], pictures, tmp_path, adapter=adapter)
    task = prepared(settings)
    (learner,) = task.learners
    for step in range(3):
        learner.advance(step, task.turns(step)[0][1])
    path = write_adapter(tmp_path / "a.safetensors", settings, task.begun, learner.weights.masters, 3)
    lora = read_lora(path, adapter_names(task.begun.spec))
    batch, t = task._move(task.data.load(task.data.place(0))), torch.tensor([0.3, 0.5, 0.7])
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(1))
    transformer = task.begun.modules["transformer"]
    with torch.no_grad():
        ours = flow_error(task.family, batch, t, noise, task.around)
        plain = flow_error(task.family, batch, t, noise)
        for layer, change in lora.layers.items():
            weight = transformer.get_submodule(layer).weight
            own = weight.clone()
            for part in change.parts:
                weight[part.rows] += part.change.delta(own[part.rows])
        merged = flow_error(task.family, batch, t, noise)
    assert torch.allclose(ours, merged, rtol=1e-4)
    assert not torch.allclose(ours, plain, rtol=1e-2)
    assert lora.metadata["modelspec.architecture"].endswith("/lora")
    assert as_recipe(tomllib.loads(lora.metadata["inkstream.recipe"])) == settings


def test_the_loss_is_the_weighted_error_inside_the_mask(tmp_path, folders, pictures):
    """With a mask of one half and a weight of 0.5; the error outside the mask does not count."""
    task = prepared(recipe(folders["zimage"], pictures, tmp_path))
    batch = task._move(task.data.load(task.data.place(0)))
    t, noise = torch.tensor([0.3, 0.5, 0.7]), torch.randn(batch.images.shape)
    mask = torch.zeros(batch.images[:, 0].shape)
    mask[:, :, :2] = 1
    half = replace(batch, weights=torch.full((3,), 0.5), masks=mask)
    with torch.no_grad():
        found = flow(task.family, half, t, noise, task.recipe.objective)
        exact = flow_error(task.family, batch, t, noise)
        both = [flow_error(task.family, replace(batch, masks=each), t, noise) for each in (mask, 1 - mask)]
    assert torch.allclose(found, 0.5 * both[0])
    assert torch.allclose((both[0] + both[1]) / 2, exact)


@pytest.mark.parametrize("family", ["zimage", "flux1", "flux2"])
def test_pictures_of_the_prior_teach_what_the_model_answers_without_the_adapter(tmp_path, folders, pictures, family):
    """Before the first step nothing is to be learned from them. Later the error is the distance to that answer."""
    data = {"prior": str(pictures), "prior_by": "model", "trigger": "sks"}
    task = prepared(recipe(folders[family], pictures, tmp_path, data=data))
    assert task.data.stress is not None
    assert task.data.stress.prior.tolist() == [False] * 3 + [True] * 3
    batch = replace(task._move(task.data.load(task.data.place(0))), prior=torch.tensor([True, False, True]))
    t, noise = torch.tensor([0.3, 0.5, 0.7]), torch.randn(batch.images.shape)
    ways = {"kept": (task.around, task.before), "plain": (task.around, None)}
    with torch.no_grad():
        first = {name: flow_error(task.family, batch, t, noise, *way) for name, way in ways.items()}
    assert first["kept"][[0, 2]].max() == 0
    assert first["kept"][1] == first["plain"][1] > 0
    for step in range(4):
        ((learner, loss),) = task.turns(step)
        learner.advance(step, loss)
    cond = batch.cond if task.family.spec.guides != "read" else replace(batch.cond, guidance=1.0)
    points = torch.lerp(batch.images, noise, t.view(-1, 1, 1, 1))
    with torch.no_grad():
        later = {name: flow_error(task.family, batch, t, noise, *way) for name, way in ways.items()}
        answers = [velocity_of(task.family, points, t, [cond], [around]) for around in (task.around, task.before)]
    distance = (answers[0] - answers[1]).square().mean((1, 2, 3))
    assert distance.min() > 0
    assert torch.allclose(later["kept"][[0, 2]], distance[[0, 2]], rtol=1e-3)
    assert torch.allclose(later["kept"][1], later["plain"][1])


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lokr"])
def test_steps_with_an_adapter_lower_the_loss_and_leave_the_model(tmp_path, folders, pictures, kind):
    task = prepared(recipe(folders["zimage"], pictures, tmp_path, adapter={"kind": kind}))
    transformer = task.begun.modules["transformer"]
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    losses = []
    for _ in range(12):  # the same batch, times and noise
        ((learner, loss),) = task.turns(0)
        losses.append(learner.advance(0, loss)[0].item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_an_adapter_resumes_to_the_bit_while_the_model_stays(tmp_path, folders, pictures):
    run = {"steps": 6, "save": 3, "keep": 1, "preview": 6, "prompts": ["all red"]}
    settings = recipe(folders["zimage"], pictures, tmp_path / "cache", run=run)
    whole = list(train(settings, tmp_path / "whole"))
    list(train(recipe(folders["zimage"], pictures, tmp_path / "cache", run={**run, "until": 3}), tmp_path / "halves"))
    resumed = list(train(settings, tmp_path / "halves", resume=True))
    assert Resumed(3, ("run.until",)) in resumed
    one, other = (load_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "halves"))
    for part in ("weights", "ema", "optimiser"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert all("adapter." in key for key in ours)
    assert whole[-1].model == tmp_path / "whole" / "mine.safetensors"
    files = [whole[-1].model, resumed[-1].model, *(tmp_path / "halves" / "adapters").iterdir()]
    assert len(files) == 3
    tensors = [path.read_bytes() for path in files]
    assert tensors[0][-1000:] == tensors[1][-1000:] == tensors[2][-1000:]
    (tmp_path / "whole" / "mine.safetensors").unlink()
    assert export_last(settings, tmp_path / "whole") == (6, tmp_path / "whole" / "mine.safetensors")
    assert (tmp_path / "whole" / "mine.safetensors").read_bytes() == tensors[0]


def test_previews_come_before_the_first_step_and_every_n_with_the_same_seeds(tmp_path, folders, pictures):
    run = {"steps": 4, "preview": 2, "prompts": ["all red", "all blue"]}
    told = list(train(recipe(folders["zimage"], pictures, tmp_path / "cache", run=run), tmp_path / "run"))
    assert [message.step for message in told if isinstance(message, Preview)] == [0, 2, 4]
    assert not any(isinstance(message, Warned) for message in told)
    task = prepared(recipe(folders["zimage"], pictures, tmp_path / "cache", run=run))
    before = np.asarray(task.sheet())  # up is zero
    with Image.open(tmp_path / "run" / "previews" / "step-00000000.png") as sheet:
        assert np.array_equal(np.asarray(sheet), before)
    request = Request.model_validate({"prompt": "all blue", "seed": 1, "width": 32, "height": 32, "steps": 2})
    served = inkstream.load(folders["zimage"], inkstream.Machine("cpu", "fp32"))
    pixels = served.decode(served.sample(request, served.encode(request)))[0]
    drawn = torch.from_numpy(before[:, 34:66].copy()).permute(2, 0, 1) / 255
    assert (drawn - pixels).abs().max() < 0.01


def test_an_assistant_is_on_while_training_and_left_out_of_previews_and_result(tmp_path, folders, pictures):
    plain = recipe(folders["zimage"], pictures, tmp_path)
    task = prepared(plain)
    gradients(task)  # gives `up` numbers
    own = task.learners[0].weights.live
    path = write_adapter(tmp_path / "assistant.safetensors", plain, task.begun, own, 1)
    helped = prepared(recipe(folders["zimage"], pictures, tmp_path, adapter={"assistant": str(path)}))
    batch, t = task._move(task.data.load(task.data.place(0))), torch.tensor([0.3, 0.5, 0.7])
    noise = torch.randn(batch.images.shape)
    with torch.no_grad():
        assert torch.allclose(
            flow_error(helped.family, batch, t, noise, helped.around),
            flow_error(task.family, batch, t, noise, task.around),
        )
        assert torch.equal(
            flow_error(helped.family, batch, t, noise, helped.drawing), flow_error(task.family, batch, t, noise)
        )
    assert helped.learners[0].weights.masters.keys() == own.keys()
    with pytest.raises(InputError, match=r"nothing\.safetensors"):
        prepared(recipe(folders["zimage"], pictures, tmp_path, adapter={"assistant": "nothing.safetensors"}))


def test_a_distilled_model_is_warned_of_and_the_base_is_checked_on_it(tmp_path, folders, pictures, make_folder):
    turbo = make_folder(tmp_path / "turbo", TURBO.tiny, seed=2)
    run = {"steps": 1, "prompts": ["all red"]}
    model = {"from": str(turbo), "name": "mine"}
    told = list(train(recipe(turbo, pictures, tmp_path, model=model, run=run), tmp_path / "on-turbo"))
    assert ["distilled to 2 steps, and training unlearns this" in m.text for m in told if isinstance(m, Warned)] == [
        True
    ]
    adapter = {"transfer": str(turbo), "kind": "dora"}
    told = list(train(recipe(folders["zimage"], pictures, tmp_path, adapter=adapter, run=run), tmp_path / "on-base"))
    (weak,) = [message.text for message in told if isinstance(message, Warned)]
    assert "changes the pictures of turbo by" in weak
    with Image.open(tmp_path / "on-base" / "previews" / "transfer.png") as sheet:
        assert sheet.size == (32, 66)
    assert told[-1].model == tmp_path / "on-base" / "mine.safetensors"


def test_pictures_that_lost_their_edges_are_warned_of():
    sharp = Image.effect_noise((64, 64), 60).convert("RGB")
    soft = sharp.filter(ImageFilter.GaussianBlur(2))
    assert softened(sharp, sharp) == ""
    assert "as sharp as without the adapter: drawing in few steps breaks" in softened(soft, sharp)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"adapter": {"transfer": "z-image-turbo"}}, r"give some in \[run\] prompts"),
        ({"adapter": {"kind": "none", "rank": 4}}, r'\[adapter\] has rank but no kind.*add kind = "lora"'),
        ({"model": {"from": ""}}, r"\[adapter\] needs a model to change: name one in \[model\] from"),
        ({"model": {"train": ["text_encoder"]}}, r"an adapter changes the transformer alone"),
        ({"optimiser": {"kind": "muon"}}, r"take adamw for an adapter"),
        ({"run": {"parallel": "fsdp"}}, r"take ddp"),
        ({"adapter": {"kind": "lokr", "format": "diffusers"}}, r"take comfyui, kohya or lycoris"),
        ({"run": {"compile": True}, "adapter": {"stream": True}}, r"set one to false"),
        ({"data": {"prior_by": "model"}}, r"name a folder in prior"),
        ({"data": {"prior_by": "model", "prior": "class"}, "adapter": {"kind": "none"}}, r"train an \[adapter\]"),
        ({"objective": {"kind": "autoencoder"}, "model": {"train": []}}, r"remove \[adapter\]"),
    ],
)
def test_a_recipe_that_an_adapter_does_not_go_with_is_refused(pictures, table, message):
    with pytest.raises(InputError, match=message):
        recipe(Path("model"), pictures, Path("cache"), **table)


def test_layers_that_are_not_there_and_ranks_that_are_too_large_are_named(tmp_path, folders, pictures):
    with pytest.raises(
        InputError, match=r"'blocks.\*' matches no layer of this model, which has such as layers.0.attention.to_q"
    ):
        start(recipe(folders["zimage"], pictures, tmp_path, adapter={"layers": ["blocks.*"]}))
    with pytest.raises(
        InputError, match=r"rank = 4000 is more than layers.0.attention.to_q's sides \(64, 64\): lower it"
    ):
        start(recipe(folders["zimage"], pictures, tmp_path, adapter={"rank": 4000}))
