"""Variations of a seed's picture, and noise on the prompt for more variety from seed to seed."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from inkstream.engine.drawing.complete import complete
from inkstream.engine.pictures.foreign.a1111 import read_a1111, write_a1111
from inkstream.families import SPECS
from inkstream.sampling.variety import SHARE, varied_noise, varied_prompt
from inkstream.types import Conditioning, Request, Variation, singles

SPEC = SPECS["z-image-turbo"].tiny
WISH = {"prompt": "a fox", "width": 32, "height": 32, "steps": 2, "seed": 3}


def latents(model, **fields) -> torch.Tensor:
    request = Request(**WISH | fields)
    return model.sample(request, model.encode(request))


def test_noise_turns_from_its_own_to_the_other_and_stays_as_long():
    noise = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(1))
    other = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(varied_noise(noise, Variation(2, 0.0)), noise, atol=1e-6)
    assert torch.allclose(varied_noise(noise, Variation(2, 1.0)), other, atol=1e-6)
    for strength in (0.1, 0.5, 0.9):
        turned = varied_noise(noise, Variation(2, strength))
        assert turned.std() == pytest.approx(1, abs=0.01)
        cosine = torch.cosine_similarity(turned.flatten(), noise.flatten(), dim=0).item()
        assert cosine == pytest.approx(torch.cos(torch.tensor(strength * torch.pi / 2)).item(), abs=0.02)
    assert torch.allclose(varied_noise(noise, Variation(1, 0.5)), noise, atol=1e-5)


@torch.no_grad()
def test_a_variation_leads_from_the_seed_s_picture_to_the_other_seed_s(build):
    model = build(SPEC)
    own, other = latents(model), latents(model, seed=8)
    assert torch.allclose(latents(model, variation="8:0"), own, atol=1e-4)
    assert torch.allclose(latents(model, variation="8:1"), other, atol=1e-4)
    distances = [(latents(model, variation=f"8:{strength}") - own).norm().item() for strength in (0.05, 0.2, 0.6)]
    assert distances == sorted(distances)
    assert distances[0] > 0


@torch.no_grad()
def test_with_a_count_the_variation_s_seed_counts_up_and_the_seed_stays(build):
    model = build(SPEC)
    both = latents(model, variation="8:0.3", count=2)
    assert torch.equal(both[:1], latents(model, variation="8:0.3"))
    assert torch.equal(both[1:], latents(model, variation="9:0.3"))
    asked = [(one.seed, one.variation, one.count) for one in singles(Request(seed=3, count=2, variation="8:0.3"))]
    assert asked == [(3, "8:0.3", 1), (3, "9:0.3", 1)]


@torch.no_grad()
def test_seed_variance_changes_the_picture_and_not_the_cached_prompt(build):
    model = build(SPEC)
    plain = latents(model)
    little, much = (latents(model, seed_variance=strength) for strength in (0.1, 1.0))
    assert 0 < (little - plain).norm() < (much - plain).norm()
    assert torch.equal(latents(model, seed_variance=0.1), little)
    assert torch.equal(latents(model), plain)
    both = latents(model, seed_variance=0.1, count=2)
    assert torch.equal(both[:1], little)
    assert torch.equal(both[1:], latents(model, seed_variance=0.1, seed=4))


def test_noise_on_the_prompt_changes_a_share_of_its_numbers_and_leaves_the_negative_prompt():
    tokens = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    cond = Conditioning(tokens, (40, 10), pooled=torch.ones(2, 8))
    varied = varied_prompt(cond, 5, 0.5)
    assert varied.tokens.dtype == torch.bfloat16
    assert varied.lengths == (40, 10)
    assert torch.equal(varied.tokens[40:], tokens[40:])
    change = (varied.tokens[:40] - tokens[:40]).float()
    assert (change != 0).float().mean() == pytest.approx(SHARE, abs=0.05)
    assert change.abs().max() <= 0.51 * tokens[:40].float().std() + 0.02
    assert not torch.equal(varied_prompt(cond, 6, 0.5).tokens, varied.tokens)


@pytest.mark.parametrize("given", ["x", "1", "1:2", "-1:0.5", "1:nan", "", "9223372036854775808:1", {"seed": 1}, 5])
def test_a_variation_that_is_none_is_told_in_one_line(given):
    with pytest.raises(ValidationError, match=r"is not SEED:STRENGTH: give a seed and 0 to 1, such as 7:0.2"):
        Request(variation=given)


def test_a_variation_is_a_text_or_an_object():
    assert Request(variation={"seed": 7, "strength": 0.25}).variation == "7:0.25"
    assert Request(variation=" 7:.25 ").variation == "7:0.25"
    with pytest.raises(ValidationError, match="variation has no field size"):
        Request(variation={"seed": 7, "strength": 0.25, "size": 1})


def test_a1111_reads_and_writes_a_variation_as_its_own():
    request = complete(Request(**WISH, variation="8:0.25"), SPECS["z-image"])
    text = write_a1111(request, "inkstream")
    assert "Variation seed: 8, Variation seed strength: 0.25" in text
    reading = read_a1111(text)
    assert reading is not None
    assert reading.fields["variation"] == "8:0.25"
    assert "Variation seed" not in reading.ignored
    off = read_a1111(text.replace("strength: 0.25", "strength: 0"))
    assert off is not None
    assert "variation" not in off.fields
