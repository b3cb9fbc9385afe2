"""Published files are opened with the right numbers, or refused with the name of what they are and a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from conftest import MISTRALS, write_flux1_tokenizers, write_tokenizer
from inkstream.engine.files.parts import Found
from inkstream.engine.files.sources import locate
from inkstream.engine.machine.loader import open_model, weights_of
from inkstream.families.flux1.specs import DEV, SCHNELL
from inkstream.families.zimage.specs import TURBO
from inkstream.quant.packed import unpack
from inkstream.types import InputError, Spec
from inkstream.weights.dialects import MARKS, gather
from published_files import (
    BF16,
    F16,
    F32,
    FILES,
    SIZES,
    Built,
    File,
    State,
    tekken,
    write_file,
    write_gguf_file,
)
from published_names import NAMES, SOURCES, names_of
from published_packings import (
    E4M3,
    Packing,
    awq,
    bnb,
    bnb_int8,
    convrot_w4a4,
    fp8_marked,
    fp8_rows,
    fp8_scaled,
    int8_convrot,
    int8_rows,
    mxfp8,
    mxfp8_modelopt,
    nvfp4,
    nvfp4_modelopt,
    plain,
    svdquant,
)

pytest.importorskip("gguf")
pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("no_hub")


# Formats -------------------------------------------------------------------------------------------------------------

PACKINGS: Mapping[str, tuple[Packing, tuple[int, int]]] = {
    "fp8 with scale_weight": (fp8_scaled, (256, 384)),
    "fp8 with marks": (fp8_marked, (256, 384)),
    "fp8 with a scale a row": (fp8_rows, (256, 384)),
    "int8": (int8_rows, (256, 384)),
    "int8 convrot of 256": (int8_convrot, (128, 512)),
    "int8 convrot of 64": (int8_convrot, (128, 320)),
    "int4 convrot": (convrot_w4a4, (128, 512)),
    "nvfp4": (nvfp4, (200, 384)),
    "nvfp4 by Model Optimizer": (nvfp4_modelopt, (200, 384)),
    "mxfp8": (mxfp8, (200, 384)),
    "mxfp8 by Model Optimizer": (mxfp8_modelopt, (256, 384)),
    "nf4": (bnb("nf4", False), (256, 384)),
    "nf4 with double quantisation": (bnb("nf4", True), (256, 384)),
    "nf4 in blocks across rows": (bnb("nf4", True), (256, 96)),
    "fp4": (bnb("fp4", True), (256, 384)),
    "LLM.int8": (bnb_int8, (256, 384)),
    "SVDQuant int4": (svdquant(False), (384, 256)),
    "SVDQuant int4 after GELU": (svdquant(False, rank=32, after_gelu=lambda layer: True), (256, 384)),
    "SVDQuant fp4": (svdquant(True, later=True, rank=128), (384, 256)),
    "AWQ of 3": (awq, (768, 256)),
    "AWQ of 6": (awq, (1536, 256)),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_a_format_is_the_numbers_that_it_means(name):
    pack, shape = PACKINGS[name]
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    layer = "block.mlp_fc2" if "GELU" in name else "block.x"
    tensors, meant = pack(layer, w)
    assert 0 < (meant - w).abs().mean() < 0.012  # the packing itself is near
    got = gather(tensors, {})
    weight = got[f"{layer}.weight"]
    full = weight.float() if isinstance(weight, torch.Tensor) else unpack(weight)
    assert torch.allclose(full, meant, rtol=0.004 if isinstance(weight, torch.Tensor) else 0, atol=3e-8)
    assert {*got} <= {f"{layer}.weight", f"{layer}.bias"}
    if f"{layer}.bias" in got:
        assert got[f"{layer}.bias"].abs().max() < 0.002  # the packings give biases that mean zero
    foreseen = gather({k: v if k.endswith(MARKS) else v.to("meta") for k, v in tensors.items()}, {})
    assert {k: (tuple(v.shape), v.nbytes) for k, v in foreseen.items()} == {
        k: (tuple(v.shape), v.nbytes) for k, v in got.items()
    }


@pytest.mark.parametrize("name", PACKINGS)
def test_a_tensor_of_another_size_is_refused_in_one_line(name):
    """Each tensor beside the numbers is cut by one; nothing else than an InputError comes of it."""
    pack, shape = PACKINGS[name]
    tensors, _ = pack("x", torch.randn(shape))
    for key, tensor in tensors.items():
        if tensor.ndim == 0 or key.endswith((".weight", *MARKS)) or "orig" in key:
            continue
        damaged = {**tensors, key: tensor[:-1]}
        for state in (damaged, {k: v if k.endswith(MARKS) else v.to("meta") for k, v in damaged.items()}):
            with pytest.raises(InputError) as caught:
                gather(state, {})
            assert "\n" not in str(caught.value)
    for key, tensor in tensors.items():
        others = {k: v for k, v in tensors.items() if k != key}
        scalar, flat, ints = tensor.flatten()[0], tensor.flatten(), torch.ones_like(tensor, dtype=torch.int64)
        for damaged in ({}, {key: scalar}, {key: flat}, {key: ints}, {key: tensor[None]}):
            with suppress(InputError):
                gather({**others, **damaged}, {})


MARKED = {".comfy_quant": fp8_marked, ".weight.quant_state.bitsandbytes__nf4": bnb("nf4", True)}
SAID = ["[" * 2000, "{}", "[]", '{"shape": [1e9, 1], "blocksize": 64}', '{"shape": 3, "format": 3}', "\xff"]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("name", MARKED)
def test_a_mark_with_anything_in_it_is_refused_in_one_line(said, name):
    tensors, _ = MARKED[name]("x", torch.randn(128, 64))
    mark = torch.tensor(list(said.encode("latin-1")), dtype=torch.uint8)
    with pytest.raises(InputError) as caught:
        gather({**tensors, f"x{name}": mark}, {})
    assert "\n" not in str(caught.value)


# Files that are opened -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "zimage": {"transformer": "zimage", "text_encoder": "qwen3", "vae": "vae"},
    "flux1": {"transformer": "flux1", "text_encoder": "clip", "text_encoder_2": "t5", "vae": "vae"},
    "klein": {"transformer": "flux2", "text_encoder": "qwen3", "vae": "vae2"},
    "dev": {"transformer": "flux2", "text_encoder": "mistral-diffusers", "vae": "vae2"},
}
FOLDERS = {"text_encoder": "text_encoders", "text_encoder_2": "text_encoders", "vae": "vae"}


def companion(size: str, part: str) -> File:
    """The same part in 16 bits, of the layout that most have."""
    kind = size if size in LAYOUTS else "flux1"
    place = f"{FOLDERS.get(part, 'diffusion_models')}/plain_{part}_turbo_klein_4b.safetensors"
    return File("plain", place, size, LAYOUTS[kind][part], plain(BF16), part=part)


def write_tokenizers(folder: Path, size: str) -> None:
    if SIZES[size].family == "flux1":
        write_flux1_tokenizers(folder)
    else:
        write_tokenizer(folder / "tokenizer", *([MISTRALS] if size == "dev" else []))


def write(models: Path, file: File, build: Built) -> Path:
    path = models / file.place
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gguf":
        arch = {"zimage": "lumina2", "qwen3-gguf": "qwen3", "mistral-gguf": "llama", "t5-gguf": "t5encoder"}
        write_gguf_file(path, build.tensors, None if file.prefix else arch.get(file.layout, "flux"))
    else:
        write_file(path, build.tensors, file.metadata)
    return path


def tree(models: Path, file: File, build: Built) -> Path:
    """A ComfyUI tree with the file, and plain parts beside it. Returns the transformer's path."""
    path = write(models, file, build)
    spec = SIZES[file.size]
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        if part != file.part and getattr(spec, part) is not None:
            other = write(models, companion(file.size, part), companion(file.size, part).build())
            path = other if part == "transformer" else path
    write_tokenizers(path.parent, file.size)
    return path


def same(found: Found, meant: State, exact: bool) -> None:
    """The weights that a module gets are those that the file means."""
    with weights_of(found, torch.float32, packed=False) as state:
        assert state.keys() == found.module.state_dict().keys()
        for name, weight in state.items():
            expected = meant[name].reshape(weight.shape)
            error = (weight.float() - expected).abs().max()
            near = 1e-6 * expected.abs().max() + 1e-7 if exact else 0.008 * expected.abs().max() + 0.006
            assert error <= near, (name, float(error))


def base_names(file: File, names: State) -> set[str]:
    """The names in a file without prefix, and without what packing puts beside a weight."""
    beside = (".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale", ".comfy_quant",
              ".SCB", ".weight_format", ".wcscales", ".wtscale")  # fmt: skip
    plain_names = {name.removeprefix(file.prefix) for name in names}
    return {n for n in plain_names if ".weight." not in n and not n.endswith(("scaled_fp8", *beside))}


BLOCKS = {"model.layers": 4, "language_model": 4, "blk.": 4, "": 1}


@pytest.mark.parametrize("file", FILES, ids=[file.id for file in FILES])
def test_a_published_file_is_opened_with_the_right_numbers(file, tmp_path):
    build = file.build()
    expected = names_of(file.layout, BLOCKS)
    if not getattr(SIZES[file.size].transformer, "guidance_embeds", True):
        expected = {name for name in expected if "guidance_in." not in name and "guidance_embedder." not in name}
    optional = {"text_model.embeddings.position_ids", "text_projection.weight", "logit_scale"}
    assert base_names(file, build.tensors) - optional == expected
    path = tree(tmp_path / "models", file, build)
    source = locate(path)
    found = source.parts[file.part]
    assert found.path == tmp_path / "models" / file.place
    same(found, build.meant, file.exact)
    for part in source.parts.keys() - {file.part}:
        same(source.parts[part], companion(file.size, part).build().meant, True)
    if file.known is not None:
        check_defaults(source.spec, file.known, path.stem)
    opened = open_model(path)
    assert all(tokenizer is not None for tokenizer in opened.tokenizers.values())


def check_defaults(spec: Spec, known: Spec, name: str) -> None:
    assert spec.name == name
    fields = ("family", "steps", "guidance", "guides", "shift", "shift_rule", "abilities", "size", "schedule", "solver")
    assert {f: getattr(spec, f) for f in fields} == {f: getattr(known, f) for f in fields}


def test_the_lists_of_names_have_the_published_lengths():
    """As the published headers have them: 30 layers and 2 + 2 refiners; 19 + 38 blocks; 8 + 48, 5 + 20 blocks."""
    zimage = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}
    flux1 = {"double_blocks": 19, "single_blocks": 38, "transformer_blocks": 19, "single_transformer_blocks": 38}
    assert len(names_of("zimage", zimage)) == 453
    assert len(names_of("zimage-diffusers", zimage)) == 521
    assert len(names_of("flux1", flux1)) == 780
    assert len(names_of("flux1-diffusers", flux1)) == 1160
    assert len(names_of("qwen3", {"": 36})) == 398
    assert NAMES.keys() == SOURCES.keys()


# Files and folders with a whole model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A file with all parts, as ComfyUI's `CheckpointSave` writes it."""

    repo: str
    name: str
    size: str
    known: Spec
    transformer: Packing
    encoders: torch.dtype
    basis: str = ""
    inferred: bool = False


SECTIONS = {
    "zimage": {"text_encoder": "text_encoders.qwen3_4b.transformer."},
    "flux1": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
}
WHOLE = (
    Whole("Comfy-Org/flux1-dev", "flux1-dev-fp8.safetensors", "flux1", DEV, plain(E4M3), E4M3,
          "ComfyUI sd.py save_checkpoint, supported_models.py; plain fp8"),
    Whole("Comfy-Org/flux1-schnell", "flux1-schnell-fp8.safetensors", "schnell", SCHNELL, plain(E4M3), E4M3),
    Whole("SeeSee21/Z-Image-Turbo-AIO", "z-image-turbo-bf16-aio.safetensors", "zimage", TURBO, plain(BF16), BF16,
          "ComfyUI supported_models.py ZImage", True),
    Whole("SeeSee21/Z-Image-Turbo-AIO", "z-image-turbo-fp8-aio.safetensors", "zimage", TURBO, plain(E4M3), E4M3,
          "ComfyUI supported_models.py ZImage", True),
    Whole("community", "z-image-turbo-fp8-scaled-aio.safetensors", "zimage", TURBO, fp8_marked, BF16, "", True),
    Whole("lllyasviel/flux1-dev-bnb-nf4", "flux1-dev-bnb-nf4.safetensors", "flux1", DEV, bnb("nf4", True), E4M3,
          "bitsandbytes functional.py QuantState"),
    Whole("lllyasviel/flux1-dev-bnb-nf4", "flux1-dev-bnb-nf4-v2.safetensors", "flux1", DEV, bnb("nf4", False), E4M3),
)  # fmt: skip


def whole_parts(whole: Whole) -> dict[str, tuple[str, Built]]:
    """Part -> its prefix, and what is in the file."""
    kind = whole.size if whole.size in LAYOUTS else "flux1"
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae.", **SECTIONS[kind]}
    parts: dict[str, tuple[str, Built]] = {}
    for part, prefix in prefixes.items():
        pack = whole.transformer if part == "transformer" else plain(F32 if part == "vae" else whole.encoders)
        rest = BF16 if part == "transformer" else F32 if part == "vae" else F16 if whole.encoders == E4M3 else BF16
        file = replace(companion(whole.size, part), pack=pack, rest=rest, prefix=prefix)
        parts[part] = prefix, file.build()
    return parts


@pytest.mark.parametrize("whole", WHOLE, ids=[w.name for w in WHOLE])
def test_a_published_file_with_all_parts_is_opened_with_the_right_numbers(whole, tmp_path):
    parts = whole_parts(whole)
    tensors = {k: v for _, built in parts.values() for k, v in built.tensors.items()}
    for prefix, _ in parts.values():
        if prefix.startswith("text_encoders."):
            tensors[prefix.removesuffix("transformer.") + "logit_scale"] = torch.tensor(4.6055)
    path = tmp_path / "models" / "checkpoints" / whole.name
    write_file(path, tensors)
    write_tokenizers(path.parent, whole.size)
    for given in (path, tmp_path / "models"):
        source = locate(given)
        assert {found.path for found in source.parts.values()} == {path}
        check_defaults(source.spec, whole.known, path.stem)
    for part, (_, built) in parts.items():
        same(source.parts[part], built.meant, part != "transformer" or "nf4" not in whole.name)


def test_a_published_folder_packed_by_bitsandbytes_is_opened(tmp_path, make_folder):
    """diffusers/FLUX.1-dev-bnb-4bit: the transformer and T5 in NF4, with `quantization_config` in their configs."""
    folder = make_folder(tmp_path / "FLUX.1-dev-bnb-4bit", SIZES["flux1"])
    meant: dict[str, State] = {}
    for part, layout in (("transformer", "flux1-diffusers"), ("text_encoder_2", "t5")):
        (old,) = (folder / part).glob("*.safetensors")
        built = replace(companion("flux1", part), layout=layout, pack=bnb("nf4", True), rest=F16).build()
        write_file(old, built.tensors)
        meant[part] = built.meant
        config = json.loads((folder / part / "config.json").read_text())
        config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        (folder / part / "config.json").write_text(json.dumps(config))
    source = locate(folder)
    for part, state in meant.items():
        same(source.parts[part], state, False)


def test_nunchakus_earlier_folders_are_opened(tmp_path):
    """mit-han-lab/svdq-int4-flux.1-dev: config.json, transformer_blocks and unquantized_layers."""
    file = next(file for file in FILES if file.layout == "flux1-nunchaku")
    built = file.build()
    folder = tmp_path / "svdq-int4-flux.1-dev"
    blocks = {k: v for k, v in built.tensors.items() if "transformer_blocks" in k}
    write_file(folder / "transformer_blocks.safetensors", blocks)
    write_file(folder / "unquantized_layers.safetensors", {k: v for k, v in built.tensors.items() if k not in blocks})
    sizes = SIZES["flux1"].transformer
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 128,
              "pooled_projection_dim": 64, "guidance_embeds": sizes.guidance_embeds}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for part in ("text_encoder", "text_encoder_2", "vae"):
        other = companion("flux1", part)
        write_file(tmp_path / part / "model.safetensors", other.build().tensors)
    write_tokenizers(tmp_path, "flux1")
    same(locate(folder).parts["transformer"], built.meant, False)


# Files that are refused ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    repo: str
    name: str
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    said: str  # a pattern of the error
    base: str = ""  # a size of transformer that the file has too


def shapes(*names: str, dtype: torch.dtype = BF16, shape: tuple[int, ...] = (4, 4)) -> dict:
    return dict.fromkeys(names, (dtype, shape))


def lora(*layers: str, ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict:
    return shapes(*(f"{layer}.{end}" for layer in layers for end in ends))


REFUSED = (
    Refused("ostris/zimage_turbo_training_adapter", "zimage_turbo_training_adapter_v2.safetensors",
            lora("diffusion_model.layers.0.attention.to_q", "diffusion_model.layers.0.feed_forward.w1"), "is a LoRA"),
    Refused("ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-8steps-lora.safetensors",
            lora("transformer.transformer_blocks.0.attn.to_q", "transformer.proj_out"), "is a LoRA"),
    Refused("XLabs-AI/flux-lora-collection", "realism_lora_comfy_converted.safetensors",
            shapes("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
            "is a LoRA"),
    Refused("kohya", "flux_style_lora.safetensors",
            lora("lora_unet_double_blocks_0_img_attn_qkv", ends=("lora_down.weight", "lora_up.weight"))
            | shapes("lora_unet_double_blocks_0_img_attn_qkv.alpha", shape=()), "is a LoRA"),
    Refused("black-forest-labs/FLUX.1-Canny-dev-lora", "flux1-canny-dev-lora.safetensors",
            lora("img_in", "double_blocks.0.img_attn.qkv", ends=("lora_A.weight", "lora_B.weight"))
            | shapes("img_in.lora_B.bias", "double_blocks.0.img_attn.norm.query_norm.scale", shape=(4,)), "is a LoRA"),
    Refused("lycoris", "klein_lokr.safetensors", shapes("lycoris_double_blocks_0_img_attn_qkv.lokr_w1",
            "lycoris_double_blocks_0_img_attn_qkv.lokr_w2"), "is a LoRA"),
    Refused("alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union", "Z-Image-Turbo-Fun-Controlnet-Union.safetensors",
            shapes("control_all_x_embedder.2-1.weight", "control_layers.0.before_proj.weight"), "is a ControlNet"),
    Refused("InstantX/FLUX.1-dev-Controlnet-Union", "diffusion_pytorch_model.safetensors",
            shapes("controlnet_blocks.0.weight", "controlnet_x_embedder.weight",
                   "transformer_blocks.0.attn.to_q.weight"), "is a ControlNet"),
    Refused("XLabs-AI/flux-controlnet-canny-v3", "flux-canny-controlnet-v3.safetensors",
            shapes("controlnet_blocks.0.weight", "input_hint_block.0.weight", "double_blocks.0.img_attn.qkv.weight"),
            "is a ControlNet"),
    Refused("XLabs-AI/flux-ip-adapter", "ip_adapter.safetensors", shapes(
            "ip_adapter_proj_model.proj.weight", "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"),
            "is an IP-Adapter"),
    Refused("black-forest-labs/FLUX.1-Redux-dev", "flux1-redux-dev.safetensors",
            shapes("redux_up.weight", "redux_down.weight"), r"Redux's image embedder.*style_models/"),
    Refused("lodestones/Chroma", "chroma-unlocked-v50.safetensors",
            shapes("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"), "is Chroma"),
    Refused("stabilityai/sdxl", "sd_xl_base_1.0.safetensors", shapes(
            "conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.input_blocks.0.0.weight"),
            "is Stable Diffusion XL"),
    Refused("stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors", shapes(
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
            "model.diffusion_model.input_blocks.0.0.weight"), "is Stable Diffusion,"),
    Refused("stabilityai/sd3.5", "sd3.5_large.safetensors",
            shapes("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "is Stable Diffusion 3"),
    Refused("Comfy-Org/Qwen-Image_ComfyUI", "qwen_image_fp8_e4m3fn.safetensors",
            shapes("transformer_blocks.0.img_mod.1.weight", "img_in.weight"), "is Qwen-Image"),
    Refused("Comfy-Org/Wan_2.2", "wan2.2_t2v_14B.safetensors",
            shapes("blocks.0.cross_attn.q.weight", "patch_embedding.weight"), "is Wan"),
    Refused("Comfy-Org/Lumina_Image_2.0_Repackaged", "lumina_2_model_bf16.safetensors",
            shapes("layers.0.adaLN_modulation.1.weight", "cap_embedder.1.weight"), "is Lumina 2"),
    Refused("nunchaku-tech/nunchaku-t5", "awq-int4-flux.1-t5xxl.safetensors",
            shapes("encoder.block.0.layer.0.SelfAttention.q.qweight", dtype=torch.int16)
            | shapes("encoder.block.0.layer.0.SelfAttention.q.scaled_zeros"), r"AWQ.*t5xxl_fp16"),
    Refused("optimum-quanto", "flux1-dev-qint8.safetensors", shapes("transformer_blocks.0.attn.to_q.weight._data",
            "transformer_blocks.0.attn.to_q.weight._scale"), "optimum-quanto"),
    Refused("GPTQ", "qwen3-gptq.safetensors", shapes("model.layers.0.self_attn.q_proj.qweight",
            "model.layers.0.self_attn.q_proj.qzeros", dtype=torch.int32), "GPTQ or AWQ"),
    Refused("madebyollin/taef1", "taef1.safetensors", shapes("decoder.layers.0.weight", "encoder.layers.0.weight"),
            "tiny autoencoder"),
    Refused("ESRGAN", "4x-UltraSharp.safetensors", shapes("model.1.sub.0.RDB1.conv1.0.weight"), "an upscaler"),
    Refused("Comfy-Org", "qwen_3_4b.safetensors", shapes("model.layers.0.self_attn.q_proj.weight"),
            "a text encoder.*--text-encoder"),
    Refused("BFL", "ae.safetensors", shapes("decoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"),
            "an autoencoder.*--vae"),
)  # fmt: skip


@pytest.mark.parametrize("file", REFUSED, ids=[file.name for file in REFUSED])
def test_what_is_no_model_of_ours_is_refused_by_its_name(file, tmp_path):
    path = tmp_path / file.name
    write_file(path, {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in file.tensors.items()})
    with pytest.raises(InputError, match=file.said) as caught:
        locate(path)
    message = str(caught.value)
    assert "\n" not in message
    assert file.name in message
    assert any(word in message for word in ("take ", "give ", "put ")), message


@pytest.mark.parametrize("kind", ["IQ3_XXS", "IQ2_XS", "TQ1_0", "MXFP4"])
def test_formats_of_ggml_that_are_not_read_are_refused_by_their_names(kind, tmp_path):
    """unsloth's UD-IQ2_XXS and UD-IQ3_XXS of FLUX.2, and others."""
    import gguf
    import numpy as np

    form = gguf.GGMLQuantizationType[kind]
    data = np.zeros((4, gguf.GGML_QUANT_SIZES[form][1]), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "flux2-dev-UD.gguf", "flux")
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=rf"as {kind}, which is not supported: take a Q8_0, Q6_K or Q4_K file"):
        locate(tmp_path / "flux2-dev-UD.gguf")


@pytest.mark.parametrize("name", ["asym_w4a8_int8", "svdquant_w4a4", "awq_w4a16", "float8_blockwise"])
def test_formats_of_comfy_kitchen_that_are_not_read_are_refused_by_their_names(name, tmp_path):
    from published_packings import mark

    state = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4, dtype=torch.int8)}
    write_file(tmp_path / "x.safetensors", state | mark("double_blocks.0.img_attn.qkv", format=name))
    with pytest.raises(InputError, match=rf"is packed as {name} in int8, which is not supported: take another file"):
        locate(tmp_path / "x.safetensors")


def test_an_autoencoder_with_quant_conv_is_refused_by_that_name(tmp_path):
    file = next(file for file in FILES if file.id.endswith(":ae.safetensors"))
    built = file.build()
    for name in ("quant_conv", "post_quant_conv"):
        built.tensors[f"{name}.weight"] = torch.ones(32, 32, 1, 1)
    path = tree(tmp_path / "models", replace(file, size="zimage"), built)
    with pytest.raises(InputError, match=r"is an autoencoder with quant_conv, not a vae.*take ae\.safetensors"):
        locate(path)


def test_a_file_packed_by_mlx_is_refused_by_that_name(tmp_path):
    """mflux's folders: weights of 4 bits in 32-bit words, which safetensors calls U32."""
    words = torch.zeros(4, 4).to(torch.uint32)
    write_file(tmp_path / "x.safetensors", {"transformer_blocks.0.attn.to_q.weight": words})
    with pytest.raises(InputError, match=r"packed by MLX \(mflux\).*take"):
        locate(tmp_path / "x.safetensors")


def test_the_tokenizer_comes_from_the_text_encoders_file(tmp_path):
    file = next(file for file in FILES if file.layout == "mistral")
    path = tree(tmp_path / "models", file, file.build())
    shutil.rmtree(path.parent / "tokenizer")
    opened = open_model(path)
    assert opened.source.tokenizers["tokenizer"] == tmp_path / "models" / file.place
    assert opened.tokenizers["tokenizer"].token_to_id("[INST]") == 3
    assert tekken().keys() == {"tekken_model"}


def test_the_corpus_is_large_and_says_its_sources():
    assert len(FILES) + len(WHOLE) + len(REFUSED) >= 60
    assert len({file.id for file in FILES}) == len(FILES)
    assert all(file.layout in SOURCES for file in FILES)
