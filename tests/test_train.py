"""Training learns, resumes to the bit, survives being killed, and gives models that draw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inkstream
from inkstream.cli import main
from inkstream.families.zimage.specs import BASE
from inkstream.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from inkstream.train.loop import Finished, HeldOut, Preview, Progress, Resumed, Saved, export_last, train
from inkstream.train.models import start
from inkstream.train.objectives import autoencode, draw_times, flow_error, measure_latents, mix, shift_time
from inkstream.train.parallel import ALONE
from inkstream.train.reading import as_recipe
from inkstream.train.recipe import Objective, as_tables, as_toml
from inkstream.train.tasks import Flow
from inkstream.types import InputError, Request

SIZES = {
    "transformer": {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "axes_dims": [8, 12, 12]},
    "text_encoder": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "head_dim": 16, "intermediate_size": 64},
    "vae": {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
}  # fmt: skip


def recipe(cache: Path, **tables):
    """A tiny recipe of scenes at 32 pixels; tables of the same names are laid over it."""
    own = {
        "model": {**SIZES, "train": ["transformer", "text_encoder"], "steps": 2, "guidance": 2.0},
        "data": {"sizes": [[32, 32]], "count": 24, "captions": 2, "workers": 0, "pool": 2, "cache": str(cache)},
        "objective": {},
        "optimiser": {"kind": "muon", "warmup": 5},
        "run": {"steps": 4, "batch": 4, "log": 2, "device": "cpu"},
    }
    if tables.get("objective", {}).get("kind") == "autoencoder":
        del own["model"]["train"]
    return as_recipe({name: {**table, **tables.get(name, {})} for name, table in own.items()})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def same_files(one: Path, other: Path) -> bool:
    names = ("weights", "ema", "optimiser")
    return all((one / f"{n}.safetensors").read_bytes() == (other / f"{n}.safetensors").read_bytes() for n in names)


# To the bit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "autoencoder"])
def test_twenty_steps_are_twice_ten_to_the_bit(tmp_path, cache, kind):
    tables = {"objective": {"kind": kind}, "run": {"steps": 20, "save": 10, "held_out": 7, "held_out_count": 4}}
    if kind == "autoencoder":
        tables["data"] = {"crop": 16}
    whole = list(train(recipe(cache, **tables), tmp_path / "whole"))
    half = train(recipe(cache, **tables), tmp_path / "halves")
    for message in half:
        if isinstance(message, Saved) and message.step == 10:
            break
    half.close()
    del half
    resumed = list(train(recipe(cache, **tables), tmp_path / "halves", resume=True))
    assert Resumed(10, ()) in resumed
    last = [tmp_path / name / "checkpoints" / "step-00000020" for name in ("whole", "halves")]
    assert same_files(*last)
    curves = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "halves")]
    losses = [[(m["step"], m.get("loss"), m.get("held_out")) for m in map(json.loads, lines)] for lines in curves]
    assert losses[0] == losses[1]
    measured = [(message.step, message.values) for message in whole if isinstance(message, HeldOut)]
    assert [step for step, _ in measured] == [7, 14, 20]
    assert measured == [(step, values) for step, _, values in losses[0] if values]


def test_accumulated_pieces_and_checkpointed_blocks_take_the_same_step(tmp_path, cache):
    def weights_after(name, **run):
        settings = {"optimiser": {"kind": "adamw", "lr": 1e-3, "warmup": 0}, "run": {"steps": 2, **run}}
        list(train(recipe(cache, **settings), tmp_path / name))
        return load_checkpoint(tmp_path / name / "checkpoints").ema

    plain = weights_after("plain")
    for name, run in (("pieces", {"accumulate": 2}), ("checkpointed", {"checkpointing": True})):
        other = weights_after(name, **run)
        assert max((plain[key] - other[key]).abs().max() for key in plain) < 2e-4, name


SHARED = """
import sys
import torch.distributed
from inkstream.train.loop import train
from inkstream.train.reading import read_recipe
torch.distributed.init_process_group("gloo")
for kind in ("ddp", "fsdp"):
    recipe = read_recipe(f"{sys.argv[1]}/{kind}.toml")
    list(train(recipe, f"{sys.argv[1]}/{kind}"))
    if kind == "fsdp":
        list(train(read_recipe(f"{sys.argv[1]}/more.toml"), f"{sys.argv[1]}/{kind}", resume=True))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path, cache):
    single = recipe(cache, run={"steps": 3})
    list(train(single, tmp_path / "alone"))
    list(train(recipe(cache, run={"steps": 5}), tmp_path / "longer"))
    for name, run in (("ddp", {"steps": 3}), ("fsdp", {"steps": 3, "parallel": "fsdp"}),
                      ("more", {"steps": 5, "parallel": "fsdp"})):  # fmt: skip
        (tmp_path / f"{name}.toml").write_text(as_toml(as_tables(recipe(cache, run=run))))
    (tmp_path / "run.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(tmp_path / "run.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, steps, wanted in (("ddp", 3, "alone"), ("fsdp", 5, "longer")):
        ours = load_checkpoint(tmp_path / wanted / "checkpoints")
        theirs = load_checkpoint(tmp_path / name / "checkpoints")
        assert theirs.step == steps
        for part in ("weights", "ema", "optimiser"):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert a.keys() == b.keys()
            if wanted == "alone" or part != "optimiser":  # the rate of a resumed run falls later
                far = max((a[key] - b[key]).abs().max() for key in a)
                assert far < (1e-4 if wanted == "alone" else 5e-3), (name, part)
    assert (tmp_path / "fsdp" / "model" / "model_index.json").is_file()


# What is on the disk ------------------------------------------------------------------------------------------------

KILLED = """
import sys, torch
from pathlib import Path
from inkstream.train.checkpoint import Checkpoint, save_checkpoint
folder = Path(sys.argv[1])
def saved(step):
    return Checkpoint(step, {"w": torch.full((24, 1024, 1024), float(step))}, {}, {}, {})
save_checkpoint(folder, saved(1), 1)
print("saved", flush=True)
save_checkpoint(folder, saved(2), 1)
print("too late", flush=True)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "saved\n"
        while not any(path.stat().st_size for path in tmp_path.glob(".*.part/.*.part")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert load_checkpoint(tmp_path).weights["w"].unique().tolist() == [1.0]
    save_checkpoint(tmp_path, Checkpoint(3, {"w": torch.zeros(1)}, {}, {}, {}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_last_checkpoints_are_kept_and_come_back_as_they_were(tmp_path):
    for step in (5, 10, 15):
        tensors = {"part.w": torch.arange(3) + step * 1.0}
        save_checkpoint(tmp_path, Checkpoint(step, tensors, {}, {"step.part.w": torch.tensor(2.0)}, {"a": {}}), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000015"]
    back = load_checkpoint(tmp_path)
    assert back.step == 15
    assert back.weights["part.w"].tolist() == [15, 16, 17]
    assert back.optimiser["step.part.w"] == 2
    assert back.recipe == {"a": {}}


def test_what_a_resumed_run_cannot_go_on_from_is_named(tmp_path, cache):
    with pytest.raises(InputError, match="holds no checkpoint: start without --resume"):
        list(train(recipe(cache), tmp_path, resume=True))
    list(train(recipe(cache, run={"steps": 1}), tmp_path))
    with pytest.raises(InputError, match="holds a run already: add --resume"):
        list(train(recipe(cache), tmp_path))
    with pytest.raises(InputError, match="the checkpoint's model is not the recipe's model"):
        list(train(recipe(cache, model={"train": ["transformer"]}), tmp_path, resume=True))
    with pytest.raises(InputError, match="kind differs from the checkpoint's"):
        list(train(recipe(cache, optimiser={"kind": "adamw"}), tmp_path, resume=True))
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state.json is damaged"):
        list(train(recipe(cache), tmp_path, resume=True))


def test_a_run_that_is_closed_or_out_of_time_saves_and_goes_on(tmp_path, cache):
    endless = recipe(cache, run={"steps": 10_000, "log": 1})
    run = train(endless, tmp_path)
    next(message for message in run if isinstance(message, Progress) and message.step == 3)
    run.close()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
    *_, saved, last = train(recipe(cache, run={"steps": 10_000, "minutes": 1e-9}), tmp_path, resume=True)
    assert isinstance(saved, Saved)
    assert last == Finished(4, None, "1e-09 minutes are over")
    *_, last = train(endless, tmp_path, resume=True, stop=lambda: True)
    assert last == Finished(5, None, "stopped")
    first = next(m for m in train(endless, tmp_path, resume=True) if isinstance(m, Resumed))
    assert first == Resumed(5, ())


def test_the_last_checkpoint_is_exported_as_the_end_of_the_run_would_be(tmp_path, cache):
    whole = recipe(cache)
    list(train(whole, tmp_path))
    at_the_end = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    for path in at_the_end:
        (tmp_path / path).unlink()
    step, model = export_last(whole, tmp_path)
    assert step == whole.run.steps
    assert {p.relative_to(tmp_path): p.read_bytes() for p in model.rglob("*") if p.is_file()} == at_the_end
    with pytest.raises(InputError, match="holds no checkpoint"):
        export_last(whole, tmp_path / "nothing")
    with pytest.raises(InputError, match="at the end of its run"):
        export_last(recipe(cache, objective={"kind": "autoencoder"}), tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, cache):
    wild = recipe(cache, optimiser={"kind": "adamw", "lr": 1e30, "warmup": 0, "clip": 0.0}, run={"steps": 20})
    with pytest.raises(InputError, match=r"the loss at step \d+ is (nan|inf)"):
        list(train(wild, tmp_path))
    assert list_checkpoints(tmp_path / "checkpoints") == []


# What comes out -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_a_curve_previews_and_a_model_that_draws(tmp_path, cache):
    prompts = ["a red circle", 'the word "A"']
    looks = {"preview": 4, "held_out": 4, "held_out_count": 4, "prompts": prompts}
    told = list(train(recipe(cache, run=looks), tmp_path))
    assert told[-1] == Finished(4, tmp_path / "model")
    assert [type(message) for message in told[-4:-1]] == [HeldOut, Preview, Saved]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    with Image.open(tmp_path / "loss.png") as curve:
        assert curve.size == (900, 420)
    with Image.open(tmp_path / "previews" / "step-00000004.png") as sheet:
        assert sheet.size == (66, 32)
    model = inkstream.load(tmp_path / "model", inkstream.Machine("cpu"))
    assert (model.spec.steps, model.spec.guidance) != (0, 0)
    request = Request.model_validate({"prompt": prompts[0], "width": 32, "height": 32, "steps": 2, "seed": 0})
    pixels = model.decode(model.sample(request, model.encode(request)))
    assert pixels.shape == (1, 3, 32, 32)
    saved = load_checkpoint(tmp_path / "checkpoints").ema
    assert torch.equal(model.family.transformer.state_dict()["x_pad_token"], saved["transformer.x_pad_token"])
    assert torch.equal(
        model.family.text_encoder.state_dict()["embed_tokens.weight"], saved["text_encoder.embed_tokens.weight"]
    )


def test_a_decoder_that_learns_alone_leaves_the_latents_as_they_are(tmp_path, cache):
    kind, crop = {"kind": "autoencoder"}, {"crop": 16}
    list(train(recipe(cache, objective=kind, data=crop), tmp_path / "whole"))
    on = {"from": str(tmp_path / "whole" / "model"), "train": ["vae.decoder"], "transformer": {}, "text_encoder": {}}
    list(train(recipe(cache, model=on, objective=kind, data=crop), tmp_path / "decoder"))
    before, after = (start(recipe(cache, model={"vae": {"from": str(tmp_path / n / "model")}}))
                     for n in ("whole", "decoder"))  # fmt: skip
    assert after.spec.vae == before.spec.vae
    old, new = before.modules["vae"].state_dict(), after.modules["vae"].state_dict()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder"}


def test_published_weights_are_trained_on_with_the_text_encoder_as_it_is(tmp_path, tiny_base_folder):
    """A folder of pictures, and no size stated anywhere: what LoRA's big brother, full fine-tuning, is asked for."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (48, 40), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"all {colour}")
    settings = as_recipe({
        "model": {"from": str(tiny_base_folder)},
        "data": {"source": str(tmp_path), "sizes": [[32, 32], [48, 32]], "cache": str(tmp_path / "c"), "workers": 0},
        "run": {"steps": 2, "batch": 2, "dtype": "bf16", "device": "cpu", "export": "bf16"},
    })  # fmt: skip
    *_, last = train(settings, tmp_path / "run")
    before = inkstream.load(tiny_base_folder, inkstream.Machine("cpu", "fp32")).family
    after = inkstream.load(last.model, inkstream.Machine("cpu", "fp32")).family
    assert after.spec.guidance == BASE.guidance
    assert not torch.equal(after.transformer.x_embedder.weight, before.transformer.x_embedder.weight)
    for name, weight in after.text_encoder.state_dict().items():
        assert torch.equal(weight, before.text_encoder.state_dict()[name].bfloat16().float()), name
    header = inkstream.weights.files.read_header(last.model / "text_encoder")
    assert f"layers.{after.spec.text_encoder.num_hidden_layers - 1}.mlp.up_proj.weight" in header.tensors


def test_an_autoencoder_comes_out_with_its_latents_measured(tmp_path, cache):
    *_, last = train(recipe(cache, objective={"kind": "autoencoder"}, run={"steps": 2, "preview": 2}), tmp_path)
    assert sorted(path.name for path in last.model.iterdir()) == ["vae"]
    begun = start(recipe(cache, model={"vae": {"from": str(last.model)}}))
    vae = begun.modules["vae"]
    source = next((cache).glob("pixels-*/32x32.npy"))
    pixels = torch.from_numpy(np.load(source)[:24]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels)
    assert latents.mean().abs() < 0.15
    assert latents.std() == pytest.approx(1, abs=0.15)


# The objectives -----------------------------------------------------------------------------------------------------


def test_a_model_that_says_nothing_errs_by_the_velocity_itself(cache):
    """A new model's last layer is zero, so its error is known: |noise - image|^2."""
    settings = recipe(cache)
    task = Flow(settings, start(settings), torch.device("cpu"), ALONE)
    list(task.prepare())
    batch = task.data.load(task.data.place(0))
    noise = torch.randn(batch.images.shape)
    error = flow_error(task.family, batch, torch.tensor([0.1, 0.4, 0.7, 1.0]), noise)
    assert torch.allclose(error, (noise - batch.images).square().mean((1, 2, 3)), rtol=1e-5)


def test_a_sample_errs_the_same_alone_and_among_others(cache):
    settings = recipe(cache)
    begun = start(settings)
    for weight in begun.modules["transformer"].parameters():
        torch.nn.init.normal_(weight, std=0.2)
    task = Flow(settings, begun, torch.device("cpu"), ALONE)
    list(task.prepare())
    place = task.data.place(0)
    batch = task.data.load(place)
    noise, t = torch.randn(batch.images.shape), torch.tensor([0.2, 0.5, 0.8, 0.9])
    with torch.no_grad():
        together = flow_error(task.family, batch, t, noise)
        for i in range(4):
            alone = flow_error(task.family, task.data.load(place, slice(i, i + 1)), t[i : i + 1], noise[i : i + 1])
            assert torch.allclose(alone[0], together[i], rtol=1e-3)


def test_times_are_drawn_in_the_shares_asked_for():
    generator = torch.Generator().manual_seed(0)
    t = draw_times(40_000, Objective(uniform=0.0, mean=0.0, std=1.0), generator)
    assert t.median() == pytest.approx(0.5, abs=0.01)
    assert ((t > 0.2689) & (t < 0.7311)).float().mean() == pytest.approx(0.6827, abs=0.01)  # one sigma of the logit
    t = draw_times(40_000, Objective(uniform=1.0), generator)
    assert t.quantile(torch.tensor([0.25, 0.75])).tolist() == pytest.approx([0.25, 0.75], abs=0.01)
    t = draw_times(40_000, Objective(uniform=0.0, std=0.0, mean=-2.0, high=0.3, high_from=0.9), generator)
    assert (t > 0.9).float().mean() == pytest.approx(0.3, abs=0.01)
    shifted = draw_times(40_000, Objective(uniform=0.0, shift=3.0), generator)
    assert shifted.median() == pytest.approx(0.75, abs=0.01)
    assert shift_time(torch.tensor(0.5), 3.0) == 0.75


def test_seeds_that_are_neighbours_draw_nothing_alike():
    draws = [torch.randn(1000, generator=torch.Generator().manual_seed(mix(0, 0, n))) for n in range(3)]
    assert all(abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.15 for pair in (draws[:2], draws[1:]))
    assert len({mix(a, b) for a in range(30) for b in range(30)}) == 900


def test_the_autoencoders_loss_is_what_its_parts_say(cache):
    vae = start(recipe(cache, objective={"kind": "autoencoder"})).modules["vae"]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.zeros(2, 16, 2, 2)
    loss, plain, seen = autoencode(vae, pixels, noise, Objective(gradient=0.0, kl=0.0))
    assert torch.equal(loss, plain)
    assert torch.allclose(plain, (seen - pixels).abs().mean((1, 2, 3)))
    heavier = autoencode(vae, pixels, noise, Objective(gradient=1.0, kl=1.0))[0]
    assert (heavier > loss).all()
    shift, scale = measure_latents(vae, [pixels])
    with torch.no_grad():
        latents = (vae.encode_moments(pixels)[0] - shift) * scale
    assert latents.mean().abs() < 1e-4
    assert latents.std() == pytest.approx(1, rel=1e-3)


# Learning -----------------------------------------------------------------------------------------------------------

GROUNDS = ["red", "blue", "black", "white"]


def test_half_a_minute_of_training_teaches_colours(tmp_path):
    """An autoencoder, then a transformer with its text encoder, learn to paint the ground in the colour told."""
    from inkstream.pocket.colours import COLOURS

    data = {
        "sizes": [[16, 16]], "count": 256, "pool": 4,
        "grammar": {"things": 1.0, "relation": 0.0, "count": 0.0, "emoji": 0.0, "text": 0.0, "objects": [1, 1],
                    "emoji_among_things": 0.0, "flat": 1.0, "gradient": 0.0, "split": 0.0, "grounds": GROUNDS,
                    "shapes": 3, "sizes": ["medium"]},
        "wording": {"dense": 0.0, "short": 0.0, "tags": 1.0, "english": 1.0, "plain": 1.0},
    }  # fmt: skip
    vae_sizes = {"block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 8}
    *_, vae = train(recipe(
        tmp_path / "cache", data=data, objective={"kind": "autoencoder"}, model={"vae": vae_sizes},
        optimiser={"lr": 4e-3, "lr_muon": 1e-2, "warmup": 10, "decay": 0.6, "ema": 0.9},
        run={"steps": 60, "batch": 8},
    ), tmp_path / "vae")  # fmt: skip
    told = list(train(recipe(
        tmp_path / "cache", data=data, model={"vae": {"from": str(vae.model)}, "steps": 8},
        objective={"high": 0.3, "high_from": 0.8, "uniform": 0.2},
        optimiser={"lr": 3e-3, "lr_muon": 1e-2, "warmup": 20, "decay": 0.5, "ema": 0.98},
        run={"steps": 150, "batch": 16, "log": 25},
    ), tmp_path / "dit"))  # fmt: skip
    losses = [message.loss for message in told if isinstance(message, Progress)]
    assert losses[0] > 1
    assert losses[-1] < 0.3

    model = inkstream.load(told[-1].model, inkstream.Machine("cpu", "fp32"))
    right = 0
    for i, name in enumerate(GROUNDS * 4):
        request = Request.model_validate({
            "prompt": f"{['green', 'yellow'][i % 2]} circle center, {name} background", "width": 16, "height": 16,
            "steps": 8, "guidance": 2.0, "seed": i,
        })  # fmt: skip
        pixels = model.decode(model.sample(request, model.encode(request)))[0]
        rim = torch.cat([pixels[:, :2].flatten(1), pixels[:, -2:].flatten(1)], dim=1).mean(1) * 255
        right += name == min(GROUNDS, key=lambda n: (rim - torch.tensor(COLOURS[n])).norm().item())
    assert right >= 14, f"{right} of 16 grounds are of the colour asked for"


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_trains_and_prints_where_the_model_is(tmp_path, cache, capsys):
    path = tmp_path / "small.toml"
    path.write_text(as_toml(as_tables(recipe(cache, run={"steps": 2}))))
    assert main(["train", str(path), "--output", str(tmp_path / "run"), "--json"]) == 0
    shown = capsys.readouterr()
    model = str(tmp_path / "run" / "model")
    assert json.loads(shown.out) == {"folder": str(tmp_path / "run"), "step": 2, "model": model}
    assert "step 2 of 2: loss" in shown.err
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 2
    assert "add --resume" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, cache, capsys):
    path, folder = tmp_path / "long.toml", tmp_path / "run"
    path.write_text(as_toml(as_tables(recipe(cache, run={"steps": 100_000, "log": 1}))))

    def interrupt():
        while not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["train", str(path), "--output", str(folder)]) == 130
    assert f"resume with: inkstream train {path} --output {folder} --resume" in capsys.readouterr().err
    assert len(list_checkpoints(folder / "checkpoints")) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_step_stops_at_once(tmp_path, capsys):
    path, folder = tmp_path / "long.toml", tmp_path / "run"
    path.write_text(as_toml(as_tables(recipe(tmp_path / "new", data={"count": 100_000}))))

    def interrupt():
        while not (tmp_path / "new").is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    assert main(["train", str(path), "--output", str(folder)]) == 130
    assert time.monotonic() - began < 30
    assert f"start again with: inkstream train {path} --output {folder}\n" in capsys.readouterr().err


def test_a_learner_moves_the_weights_of_what_the_recipe_trains_and_no_others(cache):
    settings = recipe(cache, model={"train": ["transformer"]})
    begun = start(settings)
    task = Flow(settings, begun, torch.device("cpu"), ALONE)
    list(task.prepare())
    (learner,) = task.learners
    assert all(name.startswith("transformer.") for name in learner.weights.masters)
    assert not any(p.requires_grad for p in begun.modules["text_encoder"].parameters())
