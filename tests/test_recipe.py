"""A recipe is read strictly: what is not understood is named, with what would be."""

from __future__ import annotations

from pathlib import Path

import pytest

from inkstream.train.models import read_sizes, start
from inkstream.train.reading import as_recipe, describe, read_recipe
from inkstream.train.recipe import Recipe, as_tables, differences
from inkstream.types import InputError

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_that_is_shipped_is_understood(path):
    recipe = read_recipe(path)
    assert recipe != Recipe()
    assert as_recipe(as_tables(recipe)) == recipe


def test_an_empty_file_is_the_recipe_of_the_defaults(tmp_path):
    (tmp_path / "r.toml").write_text("")
    assert read_recipe(tmp_path / "r.toml") == Recipe()


def test_from_is_a_key_though_it_is_a_word_of_pythons():
    recipe = as_recipe({"model": {"from": "z-image"}})
    assert recipe.model.from_ == "z-image"
    assert as_tables(recipe)["model"]["from"] == "z-image"


def test_a_whole_number_may_stand_for_a_fraction_but_not_the_other_way():
    assert as_recipe({"optimiser": {"lr": 1}}).optimiser.lr == 1.0
    with pytest.raises(InputError, match=r"\[run\] steps = 1.5: give a whole number"):
        as_recipe({"run": {"steps": 1.5}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"runn": {}}, "[runn] is not a table of a recipe: did you mean run?"),
        ({"steps": 5}, "[steps] is not a table of a recipe"),
        ({"run": 5}, "run = 5 is outside a table"),
        ({"run": {"stepz": 5}}, "[run] has no key stepz: did you mean steps?"),
        ({"run": {"colour": 5}}, "[run] has no key colour: it takes steps, batch"),
        ({"run": {"steps": "many"}}, "[run] steps = 'many': give a whole number"),
        ({"run": {"steps": True}}, "[run] steps = True: give a whole number"),
        ({"run": {"steps": 0}}, "[run] steps = 0 is out of range: give 1 or more"),
        ({"run": {"dtype": "fp8"}}, "[run] dtype = 'fp8': take fp32 or bf16"),
        ({"run": {"prompts": "a cat"}}, "[run] prompts = 'a cat': give a list, each a string"),
        ({"run": {"batch": 10, "accumulate": 3}}, "batch = 10 is not a multiple of accumulate = 3"),
        ({"objective": {"dropout": 2}}, "[objective] dropout = 2 is out of range: give from 0 to 1"),
        ({"objective": {"uniform": 0.6, "high": 0.6}}, "add up to more than 1"),
        ({"optimiser": {"betas": [0.9]}}, "[optimiser] betas = [0.9]: give a list of 2, each a number"),
        ({"data": {"sizes": [[100, 128]]}}, "sizes = [[100, 128]]: give multiples of 16"),
        ({"data": {"sizes": [128, 128]}}, "[data] sizes = [128, 128]: give a list, each a list of 2"),
        ({"data": {"crop": 20}}, "crop = 20: give a multiple of 16"),
        ({"data": {"count": 0}}, "count = 0 does not cache scenes, but flow needs cached scenes"),
        ({"model": {"train": ["vae"]}}, "train = ['vae']: flow takes transformer or text_encoder"),
        (
            {"model": {"train": ["transformer"]}, "objective": {"kind": "autoencoder"}},
            "train = ['transformer']: autoencoder takes vae or vae.decoder",
        ),
        (
            {"model": {"train": ["vae", "vae.decoder"]}, "objective": {"kind": "autoencoder"}},
            "train = ['vae', 'vae.decoder']: name only one",
        ),
        ({"model": {"from": "x", "transformer": {"dim": 64}}}, "from sets all sizes: remove [model.transformer]"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(table, message):
    with pytest.raises(InputError) as error:
        as_recipe(table)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_changes_set_single_keys_as_toml_or_as_plain_words(tmp_path):
    (tmp_path / "r.toml").write_text("[run]\nsteps = 5\nbatch = 8\n")
    changes = [
        "run.steps=50",
        "run.dtype=bf16",
        "data.sizes=[[64, 64]]",
        "model.vae.from=a folder",
        "optimiser.lr = 2e-3",
    ]
    recipe = read_recipe(tmp_path / "r.toml", changes)
    assert (recipe.run.steps, recipe.run.batch, recipe.run.dtype) == (50, 8, "bf16")
    assert (recipe.data.sizes, recipe.model.vae, recipe.optimiser.lr) == (((64, 64),), {"from": "a folder"}, 2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=50", "'steps=50' is not a change: write TABLE.KEY=VALUE"),
        ("run.steps", "'run.steps' is not a change"),
        ("run.stepz=50", "[run] has no key stepz: did you mean steps?"),
        ("run.steps=many", "[run] steps = 'many': give a whole number"),
        ("run.batch.size=5", "'run.batch.size=5' cannot be set: batch is not a table"),
    ],
)
def test_a_change_that_cannot_be_made_is_named(tmp_path, change, message):
    (tmp_path / "r.toml").write_text("[run]\nbatch = 8\n")
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "r.toml", [change])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("steps = = 1", "is not valid TOML"), ("\xff", "is not valid TOML")]
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"dimm": 64}, "[model.transformer] has no size dimm: it takes from, in_channels, dim"),
        ({"dim": "wide"}, "[model.transformer] dim = 'wide': give a value like 3840"),
        ({"axes_dims": 8}, "[model.transformer] axes_dims = 8: give a value like (32, 48, 48)"),
    ],
)
def test_a_size_that_the_family_does_not_have_is_named(table, message):
    from inkstream.families.zimage.family import ZImage

    with pytest.raises(InputError) as error:
        read_sizes(ZImage.parts["transformer"], "transformer", table, {})
    assert message in str(error.value)


def test_sizes_that_parts_share_follow_from_one_another_and_must_agree():
    tiny = {
        "transformer": {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "axes_dims": [8, 12, 12]},
        "text_encoder": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64},
        "vae": {"latent_channels": 8, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    }  # fmt: skip
    begun = start(as_recipe({"model": tiny}))
    assert begun.spec.transformer.cap_feat_dim == 48
    assert begun.spec.transformer.in_channels == 8
    assert begun.spec.text_encoder.vocab_size >= begun.tokenizers["tokenizer"].get_vocab_size()
    with pytest.raises(InputError, match="in_channels is 16, the vae's latent_channels is 8"):
        start(as_recipe({"model": {**tiny, "transformer": {**tiny["transformer"], "in_channels": 16}}}))
    with pytest.raises(InputError, match="is 99, but the tokenizer has"):
        start(as_recipe({"model": {**tiny, "text_encoder": {**tiny["text_encoder"], "vocab_size": 99}}}))


def test_keys_that_changed_between_two_recipes_are_named():
    before, now = as_recipe({}), as_recipe({"run": {"minutes": 5.0}, "data": {"grammar": {"text": 0.0}}})
    assert differences(as_tables(now), as_tables(before)) == ("data.grammar.text", "run.minutes")
    assert differences(as_tables(now), as_tables(now)) == ()


def test_the_page_on_training_shows_every_key():
    page = (ROOT / "docs" / "training.md").read_text()
    assert page.endswith(describe()), "run python scripts/render_docs.py"
