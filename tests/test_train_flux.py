"""FLUX learns by the loop that Z-Image learns by: nothing in it knows a family."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import inkstream
from inkstream.families import SPECS, family_of
from inkstream.families.flux1.specs import DEV, FILL
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.flux2.specs import SPECS as FLUX2
from inkstream.nn.forward import ANY, PLAIN
from inkstream.train.loop import Preview, train
from inkstream.train.objectives import TAUGHT_GUIDANCE, Batch, flow_error
from inkstream.train.optim import is_block_matrix
from inkstream.train.reading import as_recipe
from inkstream.types import Conditioning, InputError

TRAINABLE = {
    spec.tiny.name: spec.tiny
    for spec in SPECS.values()
    if spec.family in ("flux1", "flux2") and not spec.abilities & {"fill", "map"}
}


def family_with_random_transformer(spec):
    """The family at tiny size; what encodes is left out, as it is when captions come from a cache."""
    kind = family_of(spec.family)
    transformer = kind.parts["transformer"].build(spec.transformer)
    generator = torch.Generator().manual_seed(0)
    for name, weight in transformer.named_parameters():
        is_norm = weight.ndim == 1 and "norm" in name
        torch.nn.init.normal_(weight, mean=1.0 if is_norm else 0.0, std=0.1, generator=generator)
    modules = dict.fromkeys(kind.parts) | {"transformer": transformer}
    return kind(spec, modules, dict.fromkeys(kind.tokenizers)), transformer


def batch_of(spec, family, count=2) -> tuple[Batch, torch.Tensor]:
    """Random latents with random states of their captions, and noise."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, *family.latent_shape(64, 32))
    images, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    tokens = torch.randn(count * 6, spec.transformer.joint_attention_dim, generator=generator)
    pooled = None
    if spec.family == "flux1":
        pooled = torch.randn(count, spec.transformer.pooled_projection_dim, generator=generator)
    return Batch(images, cond=Conditioning(tokens, (6,) * count, pooled)), noise


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_step_lowers_the_loss_of_every_model(name):
    spec = TRAINABLE[name]
    family, transformer = family_with_random_transformer(spec)
    batch, noise = batch_of(spec, family)
    t = torch.tensor([0.3, 0.8])
    optimiser = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    before = flow_error(family, batch, t, noise).mean()
    before.backward()
    silent = [key for key, weight in transformer.named_parameters() if weight.grad is None]
    assert silent == []
    optimiser.step()
    assert flow_error(family, batch, t, noise).mean() < 0.95 * before


@pytest.mark.parametrize("name", ["tiny-flux1-dev", "tiny-flux2-dev"])
def test_a_model_that_reads_its_guidance_is_told_one_while_it_learns(name):
    spec = TRAINABLE[name]
    family, transformer = family_with_random_transformer(spec)
    batch, noise = batch_of(spec, family, count=1)
    t = torch.tensor([0.5])
    heard = []
    transformer.guidance_in.in_layer.register_forward_hook(lambda module, given, out: heard.append(given[0]))
    flow_error(family, batch, t, noise)
    expected = transformer.guidance_in.numbers([TAUGHT_GUIDANCE], PLAIN, ANY)
    assert expected is not None
    assert torch.equal(heard[0], heard[1])


def test_layers_that_make_modulation_are_not_made_orthogonal():
    with torch.device("meta"):
        modules = [family_of(s.family).parts["transformer"].build(s.tiny.transformer) for s in (DEV, KLEIN_4B)]
    names = {name for m in modules for name, weight in m.named_parameters() if is_block_matrix(name, weight)}
    assert "double_blocks.0.img_attn.qkv.weight" in names
    assert "single_blocks.1.linear2.weight" in names
    assert not any("mod" in name for name in names)


def pictures(folder):
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (48, 40), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"all {colour}")
    return folder


@pytest.mark.parametrize("spec", [DEV, KLEIN_4B, FLUX2["flux2-dev"]], ids=lambda spec: spec.name)
def test_a_published_folder_is_trained_on_with_captions_encoded_once(tmp_path, make_folder, spec):
    folder = make_folder(tmp_path / "published", spec.tiny, seed=2)
    shown = str(pictures(tmp_path / "pictures"))
    settings = as_recipe({
        "model": {"from": str(folder), "name": "mine"},
        "data": {"source": shown, "sizes": [[32, 32]], "cache": str(tmp_path / "c"), "workers": 0},
        "run": {"steps": 2, "batch": 3, "device": "cpu", "preview": 2, "prompts": ["all red"], "log": 1},
        "optimiser": {"warmup": 0, "lr": 1e-3},
    })  # fmt: skip
    told = list(train(settings, tmp_path / "run"))
    assert any(isinstance(message, Preview) for message in told)
    (states,) = (tmp_path / "c").glob("states-*")
    assert (states / "pooled.npy").exists() == (spec.family == "flux1")
    before = inkstream.load(folder, inkstream.Machine("cpu", "fp32")).family
    after = inkstream.load(told[-1].model, inkstream.Machine("cpu", "fp32")).family
    assert (after.spec.guides, after.spec.guidance) == (spec.guides, spec.tiny.guidance)
    changed = {
        name: max((x - y).abs().max() for x, y in zip(one.parameters(), other.parameters()))
        for name, one, other in (
            (name, getattr(before, name), getattr(after, name))
            for name in ("transformer", "text_encoder", "clip", "t5", "vae") if hasattr(before, name)
        )
    }  # fmt: skip
    assert {name for name, amount in changed.items() if amount > 0} == {"transformer"}
    if spec is DEV:
        again = train(settings, tmp_path / "again")
        assert not any(getattr(message, "what", "") == "encoding captions" for message in again)


def test_a_model_that_draws_beside_a_picture_says_what_a_recipe_lacks(tmp_path, make_folder):
    folder = make_folder(tmp_path / "fill", FILL.tiny)
    settings = as_recipe({"model": {"from": str(folder)}, "data": {"source": str(pictures(tmp_path / "pictures"))}})
    with pytest.raises(InputError, match=r"fill needs an input picture \(fill\), which training cannot give"):
        list(train(settings, tmp_path / "run"))
