"""More published files, whose readers were written before these tests: 10 of the 13 were read at the first try."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import random_states
from inkstream.engine.files.convert import convert
from inkstream.engine.files.sources import locate
from inkstream.engine.machine.loader import open_model
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.weights.files import write_state
from published_files import BF16, F16, F32, FILES, SIZES, State, ggml, tekken, write_file, write_gguf_file
from published_packings import E4M3, bnb, fp8_marked, plain
from test_published_files import companion, same, write, write_tokenizers

pytest.importorskip("gguf")
pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("no_hub")


def companions(models: Path, size: str, *but: str) -> None:
    """The plain parts of a model in a ComfyUI tree, without some."""
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        if part not in but and getattr(SIZES[size], part) is not None:
            write(models, companion(size, part), companion(size, part).build())


def whole(size: str, prefixes: dict[str, str]) -> tuple[State, dict[str, State]]:
    """All parts in one state dict; and what each means."""
    tensors: State = {}
    meant: dict[str, State] = {}
    for part, prefix in prefixes.items():
        built = replace(companion(size, part), prefix=prefix).build()
        tensors |= built.tensors
        meant[part] = built.meant
    return tensors, meant


def test_flux2_klein_in_one_file(tmp_path):
    """ComfyUI's CheckpointSave of klein: supported_models.py Flux2."""
    tensors, meant = whole("klein", {"transformer": "model.diffusion_model.", "vae": "vae.",
                                     "text_encoder": "text_encoders.qwen3_4b.transformer."})  # fmt: skip
    path = tmp_path / "models/checkpoints/flux-2-klein-4b-aio.safetensors"
    write_file(path, tensors)
    write_tokenizers(path.parent, "klein")
    source = locate(path)
    for part, state in meant.items():
        same(source.parts[part], state, True)
    assert source.spec.steps == KLEIN_4B.steps


def test_flux2_dev_in_one_file_with_its_tokenizer(tmp_path):
    """The tokenizer's bytes stand directly below text_encoders."""
    tensors, meant = whole("dev", {"transformer": "model.diffusion_model.", "vae": "vae.",
                                   "text_encoder": "text_encoders.mistral3_24b.transformer."})  # fmt: skip
    tensors["text_encoders.tekken_model"] = tekken()["tekken_model"]
    path = tmp_path / "models/checkpoints/flux2-dev-aio.safetensors"
    write_file(path, tensors)
    opened = open_model(path)
    for part, state in meant.items():
        same(opened.source.parts[part], state, True)
    assert opened.tokenizers["tokenizer"].token_to_id("[INST]") == 3


def test_forges_whole_files_with_first_stage_model(tmp_path):
    tensors, meant = whole("flux1", {"transformer": "model.diffusion_model.", "vae": "first_stage_model.",
                                     "text_encoder": "text_encoders.clip_l.transformer.",
                                     "text_encoder_2": "text_encoders.t5xxl.transformer."})  # fmt: skip
    path = tmp_path / "flux1-dev-forge.safetensors"
    write_file(path, tensors)
    write_tokenizers(tmp_path, "flux1")
    source = locate(path)
    for part, state in meant.items():
        same(source.parts[part], state, True)


def test_a_transformer_with_diffusers_names_and_the_prefix_transformer(tmp_path):
    """Full fine-tunes that trainers save with `transformer.` before diffusers' names."""
    file = replace(companion("flux1", "transformer"), layout="flux1-diffusers", prefix="transformer.",
                   place="diffusion_models/finetune.safetensors")  # fmt: skip
    built = file.build()
    companions(tmp_path, "flux1", "transformer")
    path = write(tmp_path, file, built)
    write_tokenizers(path.parent, "flux1")
    same(locate(path).parts["transformer"], built.meant, True)


def test_the_whole_t5_as_google_publishes_it(tmp_path):
    """google/t5-v1_1-xxl: with decoder and lm_head."""
    built = companion("flux1", "text_encoder_2").build()
    decoder = {f"decoder.block.0.layer.0.SelfAttention.{x}.weight": torch.ones(4, 4).to(BF16) for x in "qkvo"} | {
        "decoder.embed_tokens.weight": torch.ones(4, 4).to(BF16),
        "lm_head.weight": torch.ones(4, 4).to(BF16),
    }
    companions(tmp_path, "flux1", "text_encoder_2")
    write_file(tmp_path / "text_encoders/t5-v1_1-xxl.safetensors", built.tensors | decoder)
    write_tokenizers(tmp_path / "diffusion_models", "flux1")
    same(locate(tmp_path).parts["text_encoder_2"], built.meant, True)


def test_the_whole_t5_as_gguf(tmp_path):
    """llama.cpp's architecture t5: dec.* and enc.* in one file."""
    file = replace(companion("flux1", "text_encoder_2"), layout="t5-gguf", pack=ggml("Q8_0"), rest=F32)
    built = file.build()
    decoder = {f"dec.blk.0.{x}.weight": torch.ones(4, 32) for x in ("attn_q", "cross_attn_q", "ffn_up")}
    companions(tmp_path, "flux1", "text_encoder_2")
    path = tmp_path / "text_encoders/t5-v1_1-xxl-Q8_0.gguf"
    write_gguf_file(path, built.tensors | decoder | {"dec.output_norm.weight": torch.ones(32)}, "t5")
    write_tokenizers(tmp_path / "diffusion_models", "flux1")
    same(locate(tmp_path).parts["text_encoder_2"], built.meant, True)


def test_clip_with_its_vision_model(tmp_path):
    """zer0int/CLIP-GmP-ViT-L-14 in Hugging Face's layout: both halves of CLIP."""
    built = companion("flux1", "text_encoder").build()
    vision = {"vision_model.embeddings.class_embedding": torch.ones(4), "visual_projection.weight": torch.ones(4, 4),
              "vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4, 4), "logit_scale": torch.ones(()),
              "text_projection.weight": torch.ones(4, 4),
              "text_model.embeddings.position_ids": torch.arange(77)[None]}  # fmt: skip
    companions(tmp_path, "flux1", "text_encoder")
    write_file(tmp_path / "text_encoders/ViT-L-14-GmP-ft.safetensors", built.tensors | vision)
    write_tokenizers(tmp_path / "diffusion_models", "flux1")
    same(locate(tmp_path).parts["text_encoder"], built.meant, True)


def test_marked_fp8_of_separate_queries_keys_and_values(tmp_path):
    """Z-Image in diffusers' names, each matrix with a scale of its own."""
    file = replace(companion("zimage", "transformer"), layout="zimage-diffusers", pack=fp8_marked)
    built = file.build()
    companions(tmp_path, "zimage", "transformer")
    path = write(tmp_path, file, built)
    write_tokenizers(path.parent, "zimage")
    same(locate(path).parts["transformer"], built.meant, True)


def test_a_whole_model_in_one_gguf_file(tmp_path):
    """stable-diffusion.cpp's convert: all parts in one GGUF file."""
    tensors: State = {}
    meant: dict[str, State] = {}
    prefixes = {"transformer": "model.diffusion_model.", "vae": "first_stage_model.",
                "text_encoder": "text_encoders.clip_l.transformer.",
                "text_encoder_2": "text_encoders.t5xxl.transformer."}  # fmt: skip
    for part, prefix in prefixes.items():
        pack = plain(F32) if part == "vae" else ggml("Q8_0")
        built = replace(companion("flux1", part), prefix=prefix, pack=pack, rest=F32).build()
        tensors |= built.tensors
        meant[part] = built.meant
    path = tmp_path / "flux1-dev-q8_0-aio.gguf"
    write_gguf_file(path, tensors, None)
    write_tokenizers(tmp_path, "flux1")
    source = locate(path)
    for part, state in meant.items():
        same(source.parts[part], state, True)


def test_a_text_encoder_of_unsloths_dynamic_4_bits(tmp_path):
    """unsloth/Qwen3-4B-unsloth-bnb-4bit: NF4 but for some layers, in a folder with quantization_config."""
    file = replace(companion("zimage", "text_encoder"), pack=bnb("nf4", True))
    built, full = file.build(), companion("zimage", "text_encoder").build()
    mixed = {k: v for k, v in built.tensors.items() if "layers.0." not in k}
    mixed |= {k: v for k, v in full.tensors.items() if "layers.0." in k}
    meant = built.meant | {k: w for k, w in full.meant.items() if "layers.0." in k}
    companions(tmp_path, "zimage", "text_encoder")
    folder = tmp_path / "diffusion_models" / "text_encoder"
    write_file(folder / "model.safetensors", mixed)
    spec = SIZES["zimage"].text_encoder
    config = {"model_type": "qwen3", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
              **{name: getattr(spec, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim",
                 "num_attention_heads", "num_key_value_heads", "intermediate_size")}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizers(tmp_path / "diffusion_models", "zimage")
    same(locate(tmp_path).parts["text_encoder"], meant, False)


def test_flux2s_small_decoder(tmp_path):
    """Comfy-Org/flux2-klein-4B: full_encoder_small_decoder.safetensors."""
    spec = replace(SIZES["klein"], vae=replace(SIZES["klein"].vae, decoder_block_out_channels=(32, 32, 32, 64)))
    from inkstream.families import family_of
    from inkstream.weights.keymap import translate

    state = random_states(spec)["vae"]
    companions(tmp_path, "klein", "vae")
    file = tmp_path / "vae" / "full_encoder_small_decoder.safetensors"
    write_file(file, translate(family_of("flux2").parts["vae"].layouts["ldm"], state, back=True))
    write_tokenizers(tmp_path / "diffusion_models", "klein")
    source = locate(tmp_path)
    assert source.spec.vae.decoder_block_out_channels == (32, 32, 32, 64)
    same(source.parts["vae"], state, True)


def test_shards_of_a_single_file_with_an_index(tmp_path):
    """The published single file of FLUX.2 dev as shards of one folder, in ComfyUI's tree."""
    built = companion("dev", "transformer").build()
    companions(tmp_path, "dev", "transformer")
    folder = tmp_path / "diffusion_models" / "flux2-dev"
    folder.mkdir(parents=True)
    assert len(write_state(folder / "flux2-dev.safetensors", built.tensors, shard_bytes=2_000_000)) > 1
    write_tokenizers(tmp_path / "diffusion_models", "dev")
    same(locate(folder).parts["transformer"], built.meant, True)


def test_plain_fp8_of_all_parts_in_diffusers_folders(tmp_path, make_folder):
    """A diffusers folder whose weights were cast to fp8 without scales."""
    folder = make_folder(tmp_path / "z-image-turbo-fp8", SIZES["zimage"])
    (old,) = (folder / "transformer").glob("*.safetensors")
    built = replace(companion("zimage", "transformer"), layout="zimage-diffusers", pack=plain(E4M3), rest=F16).build()
    write_file(old, built.tensors)
    same(locate(folder).parts["transformer"], built.meant, True)


# Conversion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["svdq-int4_r32-z-image-turbo", "svdq-fp4_r32-flux.1-dev", "flux1-dev-bnb-4bit"])
def test_what_was_packed_by_others_is_converted(name, tmp_path):
    file = next(file for file in FILES if Path(file.place).stem == name)
    built = file.build()
    companions(tmp_path, file.size, "transformer")
    path = write(tmp_path, file, built)
    write_tokenizers(path.parent, file.size)
    made = convert(path, tmp_path / "made" / name, "diffusers")
    same(locate(made).parts["transformer"], built.meant, False)
