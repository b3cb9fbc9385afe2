"""Our FLUX.1 and FLUX.2 transformers against the reference's, on its random tiny weights, through our key tables."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

from inkstream.families.flux1 import keys as flux1_keys
from inkstream.families.flux1 import specs as flux1
from inkstream.families.flux1.model import Flux1Transformer
from inkstream.families.flux2 import keys as flux2_keys
from inkstream.families.flux2 import specs as flux2
from inkstream.families.flux2.model import Flux2Transformer
from inkstream.nn.config import read_config
from inkstream.nn.flux import patchify, unpatchify
from inkstream.nn.forward import Sample
from inkstream.weights.keymap import translate
from rounding import agree, roundings

FLUX1 = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True, "axes_dims_rope": [4, 14, 14],
}  # fmt: skip
FLUX1_NARROW = {
    **FLUX1, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip
FLUX2 = {
    "in_channels": 128, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 24, "guidance_embeds": True, "axes_dims_rope": [8, 8, 8, 8],
}  # fmt: skip
FLUX2_NARROW = {**FLUX2, "num_layers": 3, "num_single_layers": 1, "num_attention_heads": 3, "mlp_ratio": 2.0}


def shake(model: torch.nn.Module, std: float) -> None:
    """Weights far from their neutral start, at which half of the network would not show."""
    for name, weight in model.named_parameters():
        is_norm = weight.ndim == 1 and "norm" in name and name.endswith(("q.weight", "k.weight"))
        torch.nn.init.normal_(weight, mean=1.0 if is_norm else 0.0, std=std)


def flux1_pair(sizes: dict, std: float = 0.1) -> tuple[FluxTransformer2DModel, Flux1Transformer]:
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**sizes).eval().requires_grad_(False)
    shake(theirs, std)
    ours = Flux1Transformer(read_config(flux1.Flux1Config, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(flux1_keys.DIFFUSERS, theirs.state_dict()))
    return theirs, ours


def flux2_pair(sizes: dict, std: float = 0.1) -> tuple[Flux2Transformer2DModel, Flux2Transformer]:
    torch.manual_seed(0)
    theirs = Flux2Transformer2DModel(**sizes).eval().requires_grad_(False)
    shake(theirs, std)
    ours = Flux2Transformer(read_config(flux2.Flux2Config, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(flux2_keys.DIFFUSERS, theirs.state_dict()))
    return theirs, ours


def grid(at: int, height: int, width: int, axes: int) -> torch.Tensor:
    """Position ids of a picture's tokens, counted one by one."""
    return torch.tensor([[at, r, c, 0][:axes] for r in range(height) for c in range(width)], dtype=torch.float32)


def ask_flux1(theirs, x, text, pooled, t, guidance, channels=None, references=()) -> torch.Tensor:
    """The reference's answer for one sample, packed as its pipelines pack. -> (16, h, w)"""
    _, h, w = x.shape
    target = patchify(x if channels is None else torch.cat((x, channels)), 2)
    sizes = [(h // 2, w // 2), *((r.shape[1] // 2, r.shape[2] // 2) for r in references)]
    out = theirs(
        hidden_states=torch.cat([target, *(patchify(r, 2) for r in references)])[None],
        encoder_hidden_states=text[None],
        pooled_projections=pooled[None],
        timestep=torch.tensor([t]),
        guidance=None if guidance is None else torch.tensor([guidance]),
        img_ids=torch.cat([grid(i, *size, 3) for i, size in enumerate(sizes)]),
        txt_ids=torch.zeros(len(text), 3),
        return_dict=False,
    )[0]
    return unpatchify(out[0, : len(target)], h // 2, w // 2, 2)


def ask_flux2(theirs, x, text, t, guidance, references=()) -> torch.Tensor:
    """The reference's answer for one sample. -> (128, h, w)"""
    _, h, w = x.shape
    ids = [grid(0, h, w, 4), *(grid(10 + 10 * i, *r.shape[1:], 4) for i, r in enumerate(references))]
    out = theirs(
        hidden_states=torch.cat([patchify(p, 1) for p in (x, *references)])[None],
        encoder_hidden_states=text[None],
        timestep=torch.tensor([t]),
        guidance=None if guidance is None else torch.tensor([guidance]),
        img_ids=torch.cat(ids),
        txt_ids=text_ids(len(text)),
        return_dict=False,
    )[0]
    return unpatchify(out[0, : h * w], h, w, 1)


def text_ids(length: int) -> torch.Tensor:
    return torch.tensor([[0, 0, 0, i] for i in range(length)], dtype=torch.float32)


@pytest.mark.parametrize("name", ["flux1-schnell", "flux1-dev", "flux1-fill-dev", "flux2-dev", "flux2-klein-4b"])
def test_full_models_have_the_references_keys_and_shapes(name):
    config = {**flux1.SPECS, **flux2.SPECS}[name].transformer
    first = isinstance(config, flux1.Flux1Config)
    with torch.device("meta"):
        theirs = (FluxTransformer2DModel if first else Flux2Transformer2DModel)(**vars(config)).state_dict()
        ours = Flux1Transformer(config) if first else Flux2Transformer(config)
    translated = translate((flux1_keys if first else flux2_keys).DIFFUSERS, ours.state_dict(), back=True)
    assert {key: t.shape for key, t in translated.items()} == {key: t.shape for key, t in theirs.items()}


def test_patches_are_the_references():
    x = torch.randn(16, 6, 10)
    assert torch.equal(patchify(x, 2), FluxPipeline._pack_latents(x[None], 1, *x.shape)[0])
    # FLUX.2 unshuffles pixels into channels before it counts tokens
    unshuffled = Flux2Pipeline._patchify_latents(x[None])[0]
    assert torch.equal(patchify(unshuffled, 1), patchify(x, 2))
    assert torch.equal(patchify(unshuffled, 1), Flux2Pipeline._pack_latents(unshuffled[None])[0])


@pytest.mark.parametrize("guidance", [None, 3.5], ids=["schnell", "dev"])
@pytest.mark.parametrize(
    ("sizes", "std"), [(FLUX1, 0.1), (FLUX1_NARROW, 0.1), (FLUX1, 0.01)], ids=["small", "narrow", "faint"]
)
def test_flux1_equals_the_reference_on_mixed_prompts_and_sizes(sizes, std, guidance):
    """Faint weights make activations so small that the norms' epsilon is seen."""
    theirs, ours = flux1_pair({**sizes, "guidance_embeds": guidance is not None}, std)
    shapes, lengths, times = [(8, 12), (16, 4), (2, 2), (8, 12)], [5, 40, 1, 5], [1.0, 0.713, 0.25, 0.02]
    xs = [torch.randn(16, *shape) for shape in shapes]
    texts, pooled = [torch.randn(n, 24) for n in lengths], [torch.randn(20) for _ in lengths]
    prepared = [ours.prepare([s], [p], *shape, guidance)[0] for s, p, shape in zip(texts, pooled, shapes)]
    got = ours([Sample(*each) for each in zip(xs, times, prepared)])
    assert max(float(y.abs().max()) for y in got) > 5 * std  # the weights do something
    for x, text, vector, t, sample, y in zip(xs, texts, pooled, times, prepared, got):
        agree(y, ask_flux1(theirs, x, text, vector, t, guidance), roundings(theirs))
        agree(ours([Sample(x, t, sample)])[0], y, roundings(theirs))


def test_flux1_kontext_equals_the_reference_with_reference_pictures():
    theirs, ours = flux1_pair(FLUX1)
    x, text, pooled = torch.randn(16, 8, 12), torch.randn(9, 24), torch.randn(20)
    references = [torch.randn(16, 12, 6), torch.randn(16, 4, 4)]
    for given in (references[:1], references):
        (sample,) = ours.prepare([text], [pooled], 8, 12, 2.5, references=given)
        expected = ask_flux1(theirs, x, text, pooled, 0.6, 2.5, references=given)
        agree(ours([Sample(x, 0.6, sample)])[0], expected, roundings(theirs))


@pytest.mark.parametrize("channels", [16, 80], ids=["control", "fill"])
def test_flux1_fill_and_control_equal_the_reference_with_channels_beside_the_noise(channels):
    theirs, ours = flux1_pair({**FLUX1, "in_channels": 64 + 4 * channels, "out_channels": 64})
    xs, text, pooled = [torch.randn(16, 8, 4), torch.randn(16, 4, 4)], torch.randn(9, 24), torch.randn(20)
    beside = [torch.randn(channels, *x.shape[1:]) for x in xs]
    prepared = [ours.prepare([text], [pooled], *x.shape[1:], 30.0, channels=b)[0] for x, b in zip(xs, beside)]
    for x, b, y in zip(xs, beside, ours([Sample(x, 0.6, sample) for x, sample in zip(xs, prepared)])):
        agree(y, ask_flux1(theirs, x, text, pooled, 0.6, 30.0, channels=b), roundings(theirs))


@pytest.mark.parametrize("guidance", [None, 4.0], ids=["klein", "dev"])
@pytest.mark.parametrize(
    ("sizes", "std"), [(FLUX2, 0.1), (FLUX2_NARROW, 0.1), (FLUX2, 0.01)], ids=["small", "narrow", "faint"]
)
def test_flux2_equals_the_reference_on_mixed_prompts_sizes_and_references(sizes, std, guidance):
    theirs, ours = flux2_pair({**sizes, "guidance_embeds": guidance is not None}, std)
    shapes, lengths, times = [(4, 6), (8, 2), (1, 1), (4, 6)], [5, 40, 1, 5], [1.0, 0.713, 0.25, 0.02]
    xs, texts = [torch.randn(128, *shape) for shape in shapes], [torch.randn(n, 24) for n in lengths]
    references = [[], [torch.randn(128, 3, 5)], [torch.randn(128, 4, 4), torch.randn(128, 2, 6)], []]
    prepared = [
        ours.prepare([text], *shape, guidance, references=given)[0]
        for text, shape, given in zip(texts, shapes, references)
    ]
    got = ours([Sample(*each) for each in zip(xs, times, prepared)])
    assert max(float(y.abs().max()) for y in got) > 5 * std
    for x, text, t, given, sample, y in zip(xs, texts, times, references, prepared, got):
        agree(y, ask_flux2(theirs, x, text, t, guidance, given), roundings(theirs))
        agree(ours([Sample(x, t, sample)])[0], y, roundings(theirs))


@pytest.mark.parametrize("guidance", [None, 4.0], ids=["klein", "dev"])
def test_references_read_once_equal_the_references_kept_keys_and_values(guidance):
    """The reference reads them within its first step, [text, references, target], and keeps them for the later ones."""
    theirs, ours = flux2_pair({**FLUX2, "guidance_embeds": guidance is not None})
    for block in theirs.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in theirs.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    text, references = torch.randn(7, 24), [torch.randn(128, 3, 5), torch.randn(128, 4, 2)]
    first, later = torch.randn(128, 4, 6), torch.randn(128, 4, 6)
    common = {
        "encoder_hidden_states": text[None],
        "txt_ids": text_ids(7),
        "guidance": None if guidance is None else torch.tensor([guidance]),
    }
    seen = torch.cat([patchify(r, 1) for r in references])
    ids = [grid(10, 3, 5, 4), grid(20, 4, 2, 4), grid(0, 4, 6, 4)]
    extracted = theirs(
        hidden_states=torch.cat((seen, patchify(first, 1)))[None], img_ids=torch.cat(ids), timestep=torch.tensor([0.9]),
        kv_cache_mode="extract", num_ref_tokens=len(seen), **common,
    )  # fmt: skip
    cached = theirs(
        hidden_states=patchify(later, 1)[None], img_ids=ids[-1], timestep=torch.tensor([0.4]),
        kv_cache_mode="cached", kv_cache=extracted.kv_cache, **common,
    )  # fmt: skip
    (sample,) = ours.prepare([text], 4, 6, guidance, references=references, read_once=True)
    for x, t, expected in ((first, 0.9, extracted.sample), (later, 0.4, cached.sample)):
        agree(ours([Sample(x, t, sample)])[0], unpatchify(expected[0], 4, 6, 1), roundings(theirs))
