"""Which models an adapter's file fits: the table of sizes against the layers of the models themselves."""

from __future__ import annotations

import pytest

from inkstream.families import SPECS, adapter_names
from inkstream.families.fits import Sizes, block_of, fits, sizes_of
from inkstream.families.zimage.specs import OMNI, TURBO
from inkstream.types import Spec

MODELS = {spec.name: spec for spec in (*SPECS.values(), TURBO.tiny, OMNI.tiny)}


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_the_sizes_of_a_model_are_those_of_its_layers(spec: Spec):
    layers, sizes = adapter_names(spec).layers, sizes_of(spec)
    blocks = {path: block for path in layers if (block := block_of(path))}
    counts = {stack: 1 + max(index for name, index in blocks.values() if name == stack) for stack, _ in blocks.values()}
    assert sizes.inputs == {width for _, width in layers.values()}
    assert sizes.inside == {layers[path][1] for path in blocks}
    assert {stack: sizes.blocks[stack] for stack in counts} == counts


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_file_for_all_layers_fits_the_models_with_its_sizes_and_no_others(spec: Spec):
    found = {name for name, other in SPECS.items() if fits(sizes_of(spec), sizes_of(other))}
    assert spec.name in found
    assert {SPECS[name].family for name in found} == {spec.family}
    assert {sizes_of(SPECS[name]).inside for name in found} == {sizes_of(spec).inside}


def test_a_file_fits_by_its_width_and_its_blocks():
    attention = Sizes(frozenset({3072}), frozenset({3072}), {"double_blocks": 19})  # of FLUX.1, and of no klein
    assert fits(attention, sizes_of(SPECS["flux1-dev"]))
    assert fits(attention, sizes_of(SPECS["flux2-klein-4b"])) is False
    width = Sizes(frozenset({4096}), frozenset({4096}), {"double_blocks": 8})  # FLUX.1 reads text of this width
    assert fits(width, sizes_of(SPECS["flux1-dev"])) is False
    assert fits(width, sizes_of(SPECS["flux2-klein-9b"]))


def test_a_file_without_widths_is_unknown_unless_its_blocks_speak_against_it():
    unknown = Sizes(frozenset(), frozenset(), {"layers": 30})
    assert fits(unknown, sizes_of(SPECS["z-image"])) is None
    assert fits(unknown, sizes_of(SPECS["pocket"])) is False  # 16 blocks
    assert fits(unknown, sizes_of(SPECS["flux1-dev"])) is False
