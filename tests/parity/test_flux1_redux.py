"""Redux against diffusers' prior and FLUX.1 pipelines: same folder, same noise."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from safetensors.torch import load_file, save_file

import inkstream
from inkstream import Request
from inkstream.families.flux1.redux import REDUX, SIGLIP, to_tokens
from inkstream.families.flux1.specs import REDUX_DEV, ReduxConfig, SiglipConfig
from inkstream.types import InputError
from rounding import agree, pictures_agree, roundings


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    return make_folder(tmp_path_factory.mktemp("redux") / "flux1-dev", REDUX_DEV.tiny, seed=1)


@pytest.fixture(scope="module")
def theirs(folder):
    """The prior and the pipeline, of the same encoders."""
    tokens = {
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder_2": transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        "tokenizer_2": transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
    }
    side = REDUX_DEV.tiny.image_encoder.image_size
    encoder = transformers.SiglipVisionModel.from_pretrained(folder / "image_encoder")
    prior = FluxPriorReduxPipeline(
        image_encoder=encoder,
        feature_extractor=transformers.SiglipImageProcessorPil(
            size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        image_embedder=ReduxImageEncoder.from_pretrained(folder / "image_embedder"),
        **tokens,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
        **tokens,
    )
    pipeline.set_progress_bar_config(disable=True)
    return prior, pipeline


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def draw(model, request: Request, noise: torch.Tensor) -> torch.Tensor:
    return model.decode(model.sample(request, model.encode(request), noise))


@pytest.mark.parametrize("prompt", ["", "a red cat on the wall"])
def test_a_reference_and_a_prompt_give_the_same_picture(folder, theirs, prompt):
    prior, pipeline = theirs
    shown = picture(120, 96)
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(1))
    embedded = prior(shown, prompt=prompt)
    expected = pipeline(
        prompt_embeds=embedded.prompt_embeds, pooled_prompt_embeds=embedded.pooled_prompt_embeds, height=80, width=64,
        num_inference_steps=4, guidance_scale=2.5, latents=FluxPipeline._pack_latents(noise, *noise.shape),
        output_type="pt",
    ).images  # fmt: skip
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    request = Request(prompt=prompt, width=64, height=80, steps=4, guidance=2.5, seed=0, reference=(shown,))
    own = draw(ours, request, noise)
    pictures_agree(own, expected, pipeline)
    plain = draw(ours, request.model_copy(update={"reference": ()}), noise)
    assert (own - plain).abs().max() * 255 > 2  # or the comparison would not see a reference that is not read


def test_the_tokens_of_a_picture_are_those_of_the_prior(folder, theirs):
    prior, _ = theirs
    family = inkstream.load(folder, inkstream.Machine("cpu", "fp32")).family
    for size in ((120, 96), (20, 200)):
        expected = prior.image_embedder(prior.encode_image(picture(*size), "cpu", 1)).image_embeds[0]
        got = to_tokens(family.image_encoder, family.image_embedder, picture(*size))
        agree(got, expected, roundings(prior.image_encoder, prior.image_embedder))


def test_several_references_stand_one_behind_the_other(folder):
    model = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    shown = [picture(64, 64, seed) for seed in range(2)]
    base = Request(prompt="a cat", width=64, height=64, seed=0)
    texts, one, two = (
        model.encode(base.model_copy(update={"reference": tuple(model_pictures)}))
        for model_pictures in ([], Request(reference=shown[:1]).reference, Request(reference=shown).reference)
    )
    count = REDUX_DEV.tiny.image_encoder.patches
    assert [cond.lengths for cond in (texts, one, two)] == [(512,), (512 + count,), (512 + 2 * count,)]
    assert torch.equal(two.tokens[: 512 + count], one.tokens)
    assert torch.equal(one.tokens[:512], texts.tokens)


def test_the_published_sizes_and_names_are_the_references():
    with torch.device("meta"):
        encoder, embedder = SIGLIP.build(SiglipConfig()), REDUX.build(ReduxConfig())
        whole = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
            patch_size=14))  # fmt: skip
        reference = ReduxImageEncoder()
    assert SiglipConfig().patches == 729
    assert sum(w.numel() for w in encoder.parameters()) == 412_987_248 == SIGLIP.count(SiglipConfig())
    assert sum(w.numel() for w in whole.parameters()) == 428_225_600
    assert sum(w.numel() for w in embedder.parameters()) == 64_503_808
    assert embedder.state_dict().keys() == reference.state_dict().keys()
    names = {f"vision_model.{name.removeprefix('vision_model.')}" for name in whole.state_dict()}
    assert {name for name in names if not name.startswith("vision_model.head.")} == encoder.state_dict().keys()
    shapes = {name: tuple(w.shape) for name, w in encoder.state_dict().items()}
    assert SIGLIP.infer(shapes) == SiglipConfig()
    assert REDUX.infer({name: tuple(w.shape) for name, w in embedder.state_dict().items()}) == ReduxConfig()


def test_the_single_file_of_the_release_is_read_from_where_comfyui_keeps_it(folder, tmp_path):
    tree = tmp_path / "models"
    places = {
        "diffusion_models/flux1-dev": "transformer", "clip/clip_l": "text_encoder", "clip/t5xxl": "text_encoder_2",
        "vae/ae": "vae", "clip_vision/sigclip": "image_encoder", "style_models/flux1-redux-dev": "image_embedder",
    }  # fmt: skip
    for place, part in places.items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        (file,) = (folder / part).glob("*.safetensors")
        config = (folder / part / "config.json").read_text()
        save_file(load_file(file), tree / f"{place}.safetensors", {"config": config})
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tree / "diffusion_models" / name)
    model, published = (inkstream.load(path, inkstream.Machine("cpu", "fp32")) for path in (tree, folder))
    assert "references" in model.spec.abilities
    shown = picture(64, 64)
    ours, theirs = (to_tokens(m.family.image_encoder, m.family.image_embedder, shown) for m in (model, published))
    assert torch.equal(ours, theirs)
    (tree / "clip_vision" / "sigclip.safetensors").unlink()
    assert inkstream.load(tree, inkstream.Machine("cpu", "fp32")).spec.image_embedder is None


def test_redux_alone_says_where_it_belongs(folder, tmp_path):
    for part in ("image_encoder", "image_embedder"):
        shutil.copytree(folder / part, tmp_path / "redux" / part)
    (tmp_path / "redux" / "model_index.json").write_text('{"_class_name": "FluxPriorReduxPipeline"}')
    with pytest.raises(
        InputError, match=r"image_encoder and image_embedder but no transformer: .* beside its transformer/"
    ):
        inkstream.load(tmp_path / "redux")


def test_a_model_with_redux_is_converted_with_it(folder, tmp_path):
    from inkstream.engine.files.convert import convert

    written = convert(folder, tmp_path / "copy", "diffusers")
    one, other = (inkstream.load(path, inkstream.Machine("cpu", "fp32")) for path in (folder, written))
    for part in ("image_encoder", "image_embedder"):
        ours, theirs = (getattr(m.family, part).state_dict() for m in (one, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
