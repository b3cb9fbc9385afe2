"""What an adapter's training needs is computed before anything is read, and presets keep within their cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from inkstream.cli import main
from inkstream.cli.train import Wish, command_of, continuing
from inkstream.engine.machine.memory import SPARE, count_weights
from inkstream.engine.machine.placement import BESIDE
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_BASE_4B
from inkstream.families.zimage.specs import BASE, POCKET
from inkstream.train.plan import Foreseen, foresee
from inkstream.train.presets import PRESETS, preset_for, quick_recipe, with_preset
from inkstream.train.reading import as_recipe
from inkstream.train.speed import counting
from inkstream.types import InputError, Spec

CUDA = torch.device("cuda")


def plan(spec: Spec = BASE, preset: int | None = None, side: int = 1024, **tables: Any) -> Foreseen:
    own = {
        "model": {"from": spec.name},
        "adapter": {"kind": "lora", "rank": 32},
        "data": {"source": "photos", "sizes": [[side, side]]},
        "run": {"batch": 1, "dtype": "bf16"},
    }
    own = {name: {**table, **tables.get(name, {})} for name, table in own.items()}
    return foresee(as_recipe(own if preset is None else with_preset(own, preset)), spec, CUDA)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_step_of_the_6b_model_keeps_within_its_card(preset):
    """Rank 32 at 1024 x 1024, with the share of memory that planning leaves to drivers."""
    found = plan(preset=preset)
    assert found.numbers == 70_041_600
    assert found.peak <= SPARE * preset * 2**30
    assert found.peak == found.base + found.learners + found.step


@pytest.mark.slow
def test_the_parts_of_a_plan_are_what_they_are_by_hand():
    numbers = count_weights(BASE)["transformer"]
    plain = plan(side=256)
    assert plain.base == pytest.approx(2 * numbers, rel=0.01)
    assert plain.learners == plain.numbers * (4 + 4 + 8 + 2 + 4)  # master, gradient, Adam, bfloat16, average
    tokens = 256 + 128
    products = 2 * numbers * tokens  # of one pass
    assert plain.flops == pytest.approx(2 * products, rel=0.1)  # forward, and the gradients of the inputs
    again = plan(side=256, run={"checkpointing": True})
    assert again.flops == pytest.approx(3 * products, rel=0.1)
    assert again.step < 0.3 * plain.step
    streamed = plan(side=256, adapter={"stream": True})
    assert streamed.step == again.step
    assert streamed.base < 0.1 * again.base


@pytest.mark.slow
def test_streamed_blocks_on_a_cpu_count_by_how_they_are_at_home():
    """Packed when they are read: all of them, and no copies. In the files' bfloat16: the pages and a copy of one."""
    dim, layers = 3840, 1
    spec = replace(BASE, transformer=replace(BASE.transformer, n_layers=layers, n_refiner_layers=1))
    found = {
        base: foresee(
            as_recipe({
                "model": {"from": spec.name}, "data": {"source": "photos", "sizes": [[64, 64]]},
                "adapter": {"kind": "lora", "rank": 4, "base": base, "stream": True}, "run": {"dtype": "fp32"},
            }),
            spec,
            torch.device("cpu"),
        ).base
        for base in ("", "int8")
    }  # fmt: skip
    block = 12 * dim**2  # numbers in the products of a block
    always = 4 * (BASE.transformer.cap_feat_dim + 256) * dim  # the embedder of captions and of the time
    modulation = 256 * 4 * dim * (2 + 4)  # of one block: pages in bfloat16, and a copy
    assert found[""] == pytest.approx(BESIDE + always + block * (2 + 4), rel=0.02)
    assert found["int8"] == pytest.approx(BESIDE + always + (layers + 2) * block + modulation, rel=0.02)


@pytest.mark.parametrize("spec", [BASE, DEV, KLEIN_BASE_4B], ids=lambda spec: spec.family)
def test_every_family_is_planned_with_every_base(spec):
    small = replace(spec.tiny, name=spec.name)
    peaks = {base: plan(small, side=64, adapter={"rank": 4, "base": base}).base for base in ("", "int8", "fp8")}
    assert peaks["int8"] < peaks[""]
    assert peaks["fp8"] < peaks[""]
    more = plan(small, side=64, adapter={"rank": 4}, run={"batch": 4})
    assert more.step > 2 * plan(small, side=64, adapter={"rank": 4}).step


@pytest.mark.parametrize("spec", [BASE, KLEIN_BASE_4B], ids=lambda spec: spec.family)
def test_references_count_in_the_memory_and_the_work_of_a_step(spec):
    small = replace(spec.tiny, name=spec.name)
    one, two, three = (
        plan(small, side=64, adapter={"rank": 4}, data={"references": ["before"] * count}) for count in range(3)
    )
    assert one.step < two.step < three.step
    assert one.flops < two.flops < three.flops
    assert one.learners == two.learners
    edits = plan(small, side=64, adapter={"rank": 4}, data={"source": "edits"})
    assert edits == two


def test_the_counter_of_operations_keeps_no_activations():
    layer, seen = torch.nn.Linear(8, 8), []
    with counting() as counter:
        x = torch.ones(4, 8, requires_grad=True)
        out = layer(x)
        out.register_hook(lambda gradient: seen.append(1))
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 8 * 8
    assert counter.mod_tracker.parents == {"Global"}


def test_the_preset_of_a_memory_is_the_largest_that_is_not_larger():
    assert [preset_for(int(size * 2**30)) for size in (7.6, 11.9, 15.7, 23.6, 47, 139)] == [8, 12, 16, 24, 24, 80]
    with pytest.raises(InputError, match="6 GiB of memory are less than the smallest preset, 8 GiB"):
        preset_for(6 * 2**30)
    with pytest.raises(InputError, match="--preset 10 is not known: take 8, 12, 16, 24, 80"):
        with_preset({}, 10)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(((200, 150), (150, 200), (180, 180))):
        Image.new("RGB", size, "purple").save(folder / f"{number}.png")
    return folder


def test_a_quick_recipe_needs_photos_and_words_alone(photos):
    numbers = count_weights(BASE)["transformer"]
    large = quick_recipe(photos, "sks mug", "z-image", BASE, numbers, 12)
    assert (large.run.dtype, large.adapter.base, large.adapter.rank, large.optimiser.lr) == ("bf16", "fp8", 32, 1e-4)
    assert large.run.steps == 1000
    small = quick_recipe(
        photos, "sks mug", "pocket", POCKET, count_weights(POCKET)["transformer"], None, ["run.steps=7"]
    )
    assert (small.run.dtype, small.adapter.base, small.data.sizes) == ("fp32", "", ((128, 128),))
    assert small.run.steps == 7
    assert small.model.name == "sks-mug"
    assert small.run.prompts[0] == "sks mug"


def distillation(spec: Spec = POCKET, processes: int = 1, adapter: str = "none", **run: Any) -> Foreseen:
    own = {
        "model": {"from": spec.name},
        "adapter": {} if adapter == "none" else {"kind": adapter, "rank": 32},
        "data": {"source": "photos", "sizes": [[128, 128]]},
        "objective": {"kind": "distil"},
        "run": {"batch": 8, "dtype": "bf16", **run},
    }
    return foresee(as_recipe(own), spec, CUDA, processes=processes)


def test_a_distillation_has_a_teacher_a_student_and_a_critic():
    numbers = count_weights(POCKET)["transformer"]
    whole = distillation()
    assert (whole.numbers, whole.base) == (numbers, 2 * numbers)
    assert whole.learners == 2 * numbers * (4 + 4 + 8 + 2 + 4)  # master, gradient, Adam, bfloat16, average
    beside = distillation(adapter="lora")
    assert beside.base == pytest.approx(2 * numbers, rel=0.01)
    assert beside.learners == 2 * beside.numbers * (4 + 4 + 8 + 2 + 4)
    assert beside.peak < whole.peak / 2


def test_shards_share_what_learns_and_not_the_teacher():
    one, four = distillation(parallel="fsdp"), distillation(parallel="fsdp", processes=4)
    assert one.base == four.base
    assert one.learners / 4 < four.learners < one.learners / 2
    assert four.flops == pytest.approx(one.flops / 4, rel=0.01)


def test_pieces_of_a_batch_take_less_memory_and_the_same_work():
    whole, pieces = distillation(), distillation(accumulate=4)
    assert pieces.step < whole.step / 2
    assert pieces.flops == pytest.approx(whole.flops, rel=0.01)


@pytest.mark.slow
def test_quick_teaches_pocket_and_leaves_an_adapter(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "quick", str(photos), "--trigger", "sks mug", "--set", "run.steps=2", "--set", "run.batch=1"]
    assert main([*words, "--set", "run.preview=0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "runs/sks-mug/sks-mug.safetensors"
    assert (tmp_path / document["model"]).is_file()


def test_a_dry_run_tells_memory_and_time_and_reads_nothing(photos, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nfrom = "pocket"\n[adapter]\nkind = "lora"\n[data]\nsource = "{photos}"\ntrigger = "x"\n'
    )
    words = ["train", str(recipe), "--set", "run.batch=2", "--dry-run", "--for", "RTX 3060"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["peak_bytes"] == found["base_bytes"] + found["learners_bytes"] + found["step_bytes"]
    assert found["seconds"] == pytest.approx(1000 * found["seconds_per_step"])
    assert main(words) == 0
    assert "RTX 3060 12GB\n  model:" in capsys.readouterr().out
    assert main([*words[:-1], "0.01GiB"]) == 2
    assert "it does not fit" in capsys.readouterr().out


def test_a_dry_run_of_a_distillation_tells_of_several_cards(photos, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\nfrom = "pocket"\n[objective]\nkind = "distil"\n[data]\nsource = "{photos}"\n')
    words = ["train", str(recipe), "--set", "run.batch=8", "--set", "run.parallel=fsdp", "--dry-run", "--for"]
    assert main([*words, "8x h100"]) == 0
    told = capsys.readouterr().out
    assert "8 processes, each on H100 80GB" in told
    assert "2 times (student and critic)" in told
    assert main([*words, "0x h100"]) == 2
    assert "--for 0x is no card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["quick"], "quick needs pictures and words for them"),
        (["quick", "nothing", "--trigger", "sks"], "is not a folder: give a folder of pictures"),
        (["recipe.toml", "--trigger", "sks"], "--trigger sks is for `inkstream train quick`"),
        (["recipe.toml", "--for", "T4"], "--for T4 is for --dry-run"),
        (["quick", "nowhere", "--trigger", "sks"], "inkstream: nowhere is not a folder: give a folder of pictures"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(words, line, capsys):
    assert main(["train", *words]) == 2
    assert line in capsys.readouterr().err


def test_a_quick_run_is_continued_from_its_folder_and_begun_again_by_its_own_words():
    quick = Wish(
        "quick", "my mugs", "sks mug", None, None, False, False, None, False, None, ["run.steps=3"], False, False
    )
    assert command_of(quick) == "inkstream train quick 'my mugs' --trigger 'sks mug' --set run.steps=3"
    assert continuing(quick, Path("runs/x")) == "inkstream train runs/x/recipe.toml -o runs/x --resume"
    of_recipe = replace(quick, recipe="r.toml", photos=None, trigger=None, preset=12)
    assert continuing(of_recipe, Path("runs/r")) == "inkstream train r.toml --preset 12 --set run.steps=3 --resume"
