"""A reference pipeline at random tiny weights, made and saved by diffusers, for ours to load and be compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from inkstream.families import adapter_names
from inkstream.types import Spec
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.factors import Dora
from inkstream.weights.lora.write import write_lora

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""The part of Qwen3's template that one user turn goes through."""


def byte_tokenizer() -> Qwen2Tokenizer:
    """One token a byte and a few merges, with Qwen's specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "re", "he", "ed"])}
    merges = [("r", "e"), ("h", "e"), ("e", "d")]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def reference() -> ZImagePipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=0.1)
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=512, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=64, initializer_range=0.2,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=False, shift=3.0)
    pipeline = ZImagePipeline(scheduler, vae.eval(), text_encoder.eval(), byte_tokenizer(), transformer.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def reference_folder(reference, tmp_path_factory) -> Path:
    """The reference pipeline as it saves itself: a diffusers folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-turbo"
    reference.save_pretrained(folder)
    return folder


@pytest.fixture
def save_lora(tmp_path) -> Callable[[Spec, bool], Path]:
    """`save_lora(spec, dora)` writes a LoRA, or a DoRA, of all layers in blocks, under diffusers' names."""

    def save(spec: Spec, dora: bool = False) -> Path:
        names, generator = adapter_names(spec), torch.Generator().manual_seed(5)
        layers = {}
        for path, (height, width) in names.layers.items():
            if "layers" in path or "blocks" in path or "refiner" in path:
                down = torch.randn(4, width, generator=generator) / width**0.5
                change = LowRank(down, 0.3 * torch.randn(height, 4, generator=generator), 0.5)
                norms = 0.5 + torch.rand(height, 1, generator=generator)
                layers[path] = LayerChange((Part(Dora(change, norms) if dora else change),))
        return write_lora(tmp_path / "mine.safetensors", Lora(layers), names, "diffusers")

    return save


@pytest.fixture
def reschedule(tmp_path) -> Callable[..., Path]:
    """`reschedule(pipeline, folder, **entries)` gives a pipeline another scheduler for this test.

    Returns a copy of its folder with the same scheduler_config.json.
    """
    before = []

    def change(pipeline, folder: Path, **entries) -> Path:
        before.append((pipeline, pipeline.scheduler))
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**entries)
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy, copy_function=lambda source, target: Path(target).symlink_to(source))
        config = copy / "scheduler" / "scheduler_config.json"
        config.unlink()
        config.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", **entries}))
        return copy

    yield change
    for pipeline, scheduler in reversed(before):
        pipeline.scheduler = scheduler
