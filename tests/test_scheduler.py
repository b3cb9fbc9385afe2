"""scheduler_config.json of a folder: what it says is honoured, or refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from inkstream.engine.drawing.complete import shift_for
from inkstream.families import SPECS, family_of
from inkstream.families.flux1.specs import CANNY, DEV, FILL, KONTEXT, REDUX_DEV, SCHNELL, UNDISTILLED
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.scheduler import SCHEDULER, read_scheduler, write_scheduler
from inkstream.families.zimage.specs import BASE, TURBO
from inkstream.types import InputError


def recognised(spec, documents=None, name="m", **configs):
    """The Spec that a folder of this model with these documents gets."""
    parts = {part: getattr(spec, part) for part in family_of(spec.family).parts if getattr(spec, part) is not None}
    return family_of(spec.family).recognise({**parts, **configs}, documents or {}, name)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_the_scheduler_that_we_write_reads_back(spec):
    for own in (spec, replace(spec, shift_rule="fixed", shift=2.5), replace(spec, solver="lcm")):
        assert read_scheduler(replace(spec, solver="euler"), {SCHEDULER: write_scheduler(own)}, spec.shift_rule) == own
    line = replace(spec, shift_rule="dynamic", shift_line=(16, 64, 0.3, 2.0))
    assert read_scheduler(spec, {SCHEDULER: write_scheduler(line)}) == line


def test_a_folder_without_scheduler_keeps_the_models_own():
    for spec in (DEV, SCHNELL, TURBO, BASE):
        name = "turbo" if spec is TURBO else "m"
        assert recognised(spec, name=name) == replace(spec, name=name)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"use_karras_sigmas": True}, ["use_karras_sigmas is True", "set it to False"]),
        ({"use_exponential_sigmas": True}, ["use_exponential_sigmas is True"]),
        ({"use_beta_sigmas": True}, ["use_beta_sigmas is True"]),
        ({"use_flow_sigmas": True}, ["use_flow_sigmas is True"]),
        ({"invert_sigmas": True}, ["invert_sigmas is True"]),
        ({"shift_terminal": 0.02}, ["shift_terminal is 0.02", "set it to None"]),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, ["time_shift_type is 'linear'", "'exponential'"]),
        ({"num_train_timesteps": 500}, ["num_train_timesteps is 500", "set it to 1000"]),
        ({"use_dynamic_shifting": "yes"}, ["use_dynamic_shifting is 'yes'", "true or false"]),
        ({"use_dynamic_shifting": True, "max_shift": None}, ["max_shift is None"]),
        ({"use_dynamic_shifting": True, "base_shift": math.nan}, ["base_shift is nan"]),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, ["both 256"]),
        ({"shift": 0}, ["shift is 0"]),
        ({"shift": True}, ["shift is True"]),
        ({"_class_name": "UniPCMultistepScheduler"}, ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("spec", [DEV, SCHNELL, KLEIN_4B, TURBO], ids=lambda spec: spec.name)
def test_what_is_not_implemented_is_refused_by_name(spec, said, words):
    with pytest.raises(InputError) as error:
        recognised(spec, {SCHEDULER: said}, name="my-klein")
    assert "\n" not in str(error.value)
    for word in ["my-klein", *words]:
        assert word in str(error.value)


def test_an_entry_that_has_no_effect_is_not_checked():
    said = {
        "shift": 2,
        "use_dynamic_shifting": None,
        "max_shift": None,
        "shift_terminal": 0,
        "time_shift_type": "linear",
    }
    assert recognised(DEV, {SCHEDULER: said}).shift == 2.0
    said = {"shift": None, "use_dynamic_shifting": True, "stochastic_sampling": False}
    assert recognised(DEV, {SCHEDULER: said}) == replace(DEV, name="m")


def test_the_class_in_model_index_is_the_one_that_counts():
    index = {"scheduler": ["diffusers", "LCMScheduler"]}
    with pytest.raises(InputError, match="LCMScheduler"):
        recognised(DEV, {SCHEDULER: {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "model_index.json": index})
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    assert recognised(DEV, {SCHEDULER: {"_class_name": "Other", "shift": 2}, "model_index.json": index}).shift == 2


@pytest.mark.parametrize(
    ("name", "documents", "expected"),
    [
        ("m", {}, SCHNELL),
        ("m", {SCHEDULER: {"shift": 3.0}}, SCHNELL),
        ("m", {SCHEDULER: {"use_dynamic_shifting": True}}, UNDISTILLED),
        ("flux-dev-de-distill_fp8", {}, UNDISTILLED),
        ("OpenFLUX.1", {SCHEDULER: {"shift": 1.0}}, UNDISTILLED),
        ("flux1-dedistilled-v2", {}, UNDISTILLED),
    ],
)
def test_a_model_without_guidance_input_is_schnell_unless_its_scheduler_or_name_says_otherwise(
    name, documents, expected
):
    spec = recognised(SCHNELL, documents, name)
    assert (spec.guides, spec.steps, spec.title) == (expected.guides, expected.steps, expected.title)


@pytest.mark.parametrize("spec", [DEV, SCHNELL, KONTEXT, FILL, CANNY, REDUX_DEV], ids=lambda spec: spec.name)
def test_a_flux_1_folder_is_recognised_whatever_its_name(spec):
    folder = family_of("flux1").documents(spec)
    found = recognised(spec, folder, "m")
    assert (found.abilities, found.guides, found.shift_rule) == (spec.abilities, spec.guides, spec.shift_rule)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("spec", [DEV, KLEIN_4B, BASE], ids=lambda spec: spec.name)
def test_tokens_are_counted_by_the_patch_and_the_autoencoders_scale(spec, levels):
    vae = replace(spec.vae, block_out_channels=(32,) * levels)
    entries = {"use_dynamic_shifting": True, "base_image_seq_len": 100, "max_image_seq_len": 900}
    own = recognised(spec, {SCHEDULER: entries}, "my-klein", vae=vae)
    side = 2**levels  # FLUX.1's and Z-Image's patches are 2 x 2 latents, FLUX.2's autoencoder packs 2 x 2 itself
    tokens = (192 // side) * (128 // side)
    if spec.family == "flux2":
        ten, two_hundred = 8.73809524e-05 * tokens + 1.89833333, 1.6927e-4 * tokens + 0.45666666
        mu = two_hundred if tokens > 4300 else two_hundred + (ten - two_hundred) * (200 - 20) / 190
    else:
        mu = 0.5 + (1.15 - 0.5) * (tokens - 100) / 800
    assert shift_for(own, 192, 128, 20) == pytest.approx(math.exp(mu), rel=1e-6, abs=1e-6)
