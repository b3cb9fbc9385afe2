"""From a prompt to pixels, ours against diffusers' Z-Image pipelines: same folder, same noise, pixels within 1/255."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImageOmniPipeline, ZImageTransformer2DModel
from PIL import Image

import inkstream
from inkstream import Request
from inkstream.types import InputError
from rounding import pictures_agree

PROMPTS = ["a red cat on the wall", "写着“春”字的红色海报, with a very long tail of words " * 4]


@pytest.fixture(scope="module")
def model(reference_folder):
    return inkstream.load(reference_folder)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 96))
    return Image.fromarray(np.stack([across, down, (across + down) / 2], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 96), (128, 64)], ids=["tall", "wide"])
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["turbo", "guided"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["english", "mixed"])
def test_text_to_image_draws_the_same_pictures(reference, model, size, guidance, prompt):
    width, height = size
    noise = torch.randn(2, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    theirs = reference(
        prompt, height=height, width=width, num_inference_steps=4, guidance_scale=guidance - 1,
        negative_prompt="blurry", num_images_per_prompt=2, latents=noise.clone(), output_type="pt",
    ).images  # fmt: skip
    request = Request(
        prompt=prompt, negative_prompt="blurry", width=width, height=height, steps=4, guidance=guidance, count=2
    )
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, reference, guidance)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_draws_the_same_picture_with_an_adapter_that_we_write(reference, model, save_lora, dora):
    path = save_lora(model.spec, dora)
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(1))
    asked = {"height": 96, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt"}
    reference.load_lora_weights(str(path.parent), weight_name=path.name)
    try:
        theirs = reference("a fish", latents=noise.clone(), **asked).images
    finally:
        reference.unload_lora_weights()
    without = reference("a fish", latents=noise.clone(), **asked).images
    request = Request(prompt="a fish", width=64, height=96, steps=4, guidance=5, loras=(str(path),))
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, reference, 5)
    assert (theirs - without).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["plain", "guided"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["english", "mixed"])
def test_omni_draws_the_same_picture_from_text(reference, tmp_path, guidance, prompt):
    sizes = {name: size for name, size in reference.transformer.config.items() if not name.startswith("_")}
    transformer = ZImageTransformer2DModel(**{**sizes, "siglip_feat_dim": 24})
    torch.manual_seed(5)
    for name, weight in transformer.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=0.1)
    shared = {name: getattr(reference, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
    pipeline = ZImageOmniPipeline(**shared, transformer=transformer.eval(), siglip=None, siglip_processor=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    model = inkstream.load(tmp_path)
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        prompt=[prompt], height=96, width=64, num_inference_steps=4, guidance_scale=guidance - 1,
        negative_prompt=["blurry"], latents=noise.clone(), output_type="pt",
    ).images  # fmt: skip
    request = Request(prompt=prompt, negative_prompt="blurry", width=64, height=96, steps=4, guidance=guidance)
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, pipeline, guidance)


SCHEDULERS = [
    {"shift": 4.5, "use_dynamic_shifting": False},
    {},
    {"shift": 3.0, "use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 1024},
]


@pytest.mark.parametrize("entries", SCHEDULERS, ids=str)
def test_the_scheduler_of_the_folder_is_honoured(reference, reference_folder, reschedule, entries):
    model = inkstream.load(reschedule(reference, reference_folder, **entries))
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(1))
    theirs = reference(
        "a fish", height=96, width=64, num_inference_steps=5, guidance_scale=0.0, latents=noise.clone(),
        output_type="pt",
    ).images  # fmt: skip
    request = Request(prompt="a fish", width=64, height=96, steps=5, guidance=1)
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, reference)


def test_a_scheduler_that_samples_stochastically_is_honoured(reference, reference_folder, reschedule, monkeypatch):
    model = inkstream.load(reschedule(reference, reference_folder, shift=3.0, stochastic_sampling=True))
    assert model.spec.solver == "lcm"
    generator = torch.Generator().manual_seed(7)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor",
        lambda shape, **_: torch.randn(shape[1:], generator=generator)[None],
    )
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(1))
    theirs = reference(
        "a fish", height=96, width=64, num_inference_steps=5, guidance_scale=0.0, latents=noise.clone(),
        output_type="pt",
    ).images  # fmt: skip
    request = Request(prompt="a fish", width=64, height=96, steps=5, guidance=1, seed=7)
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, reference)


@pytest.mark.parametrize(("normalization", "truncation"), [(1.0, 1.0), (0.7, 1.0), (0.0, 0.5), (1.0, 0.3)])
def test_guidance_normalised_and_truncated_draws_the_same_picture(reference, model, normalization, truncation):
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    theirs = reference(
        "a fish", height=64, width=64, num_inference_steps=6, guidance_scale=6.0, negative_prompt="a bird",
        latents=noise.clone(), output_type="pt", cfg_normalization=normalization, cfg_truncation=truncation,
    ).images  # fmt: skip
    request = Request(
        prompt="a fish", negative_prompt="a bird", width=64, height=64, steps=6, guidance=7,
        cfg_normalization=normalization, cfg_truncation=truncation,
    )  # fmt: skip
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, reference, 7)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_draws_the_same_picture(reference, model, picture, strength):
    pipeline = ZImageImg2ImgPipeline.from_pipe(reference)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(3))
    # The VAE's posterior is sampled there with the same generator that draws the noise; its mode is what we compare.
    with mode_only(pipeline.vae), the_noise(noise):
        theirs = pipeline(
            "a lake", image=picture, strength=strength, height=96, width=64, num_inference_steps=10,
            guidance_scale=2.0, negative_prompt="grey", output_type="pt",
        ).images  # fmt: skip
    request = Request(prompt="a lake", negative_prompt="grey", guidance=3, image=picture, strength=strength, steps=10)
    request = request.model_copy(update={"width": 64, "height": 96})
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, reference, 3)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_draws_the_same_picture_before_the_paste(reference, model, picture, strength):
    mask = np.zeros((96, 64), np.uint8)
    mask[20:70, 10:50] = 255
    pipeline = ZImageInpaintPipeline.from_pipe(reference)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(4))
    with mode_only(pipeline.vae), the_noise(noise):
        theirs = pipeline(
            "a lake", image=picture, mask_image=Image.fromarray(mask), strength=strength, height=96, width=64,
            num_inference_steps=6, guidance_scale=0.0, output_type="pt",
        ).images  # fmt: skip
    request = Request(
        prompt="a lake", image=picture, mask=Image.fromarray(mask), strength=strength, steps=6, guidance=1
    )
    pictures_agree(model.decode(model.sample(request, model.encode(request), noise)), theirs, reference)


def test_the_reference_folder_is_known_as_turbo(model):
    assert (model.spec.steps, model.spec.shift, model.spec.guidance) == (8, 3.0, 1.0)


def test_a_folder_without_its_autoencoder_is_refused(reference_folder, tmp_path):
    import shutil

    folder = tmp_path / "half"
    shutil.copytree(reference_folder, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(InputError, match="vae"):
        inkstream.load(folder)


class mode_only:
    """For the length of a with-block a diffusers autoencoder gives the mode of its posterior."""

    def __init__(self, vae):
        self.vae = vae

    def __enter__(self):
        self.encode = self.vae.encode

        def encode(x, *args, **kwargs):
            posterior = self.encode(x, return_dict=False)[0]
            posterior.std = torch.zeros_like(posterior.std)
            return type("Encoded", (), {"latent_dist": posterior})()

        self.vae.encode = encode

    def __exit__(self, *_):
        del self.vae.encode


class the_noise:
    """For the length of a with-block the picture pipelines draw this noise."""

    def __init__(self, noise):
        self.noise = noise

    def __enter__(self):
        from diffusers.pipelines.z_image import pipeline_z_image_img2img as a
        from diffusers.pipelines.z_image import pipeline_z_image_inpaint as b

        self.modules, self.before = (a, b), a.randn_tensor
        for module in self.modules:
            module.randn_tensor = lambda shape, **_: self.noise.clone().reshape(shape)

    def __exit__(self, *_):
        for module in self.modules:
            module.randn_tensor = self.before
