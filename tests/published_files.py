"""Published files at tiny sizes: their names, number types and ways of packing are those of the files themselves.

Every entry names its repository and file, and how its names are known: the lists of `published_names`, which say their
sources, and in `basis` what is special of the file. `inferred` marks what no source states in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import random_states
from inkstream.families import Spec, family_of
from inkstream.families.flux1.specs import DEV, FILL, KONTEXT, KREA, SCHNELL
from inkstream.families.flux2.specs import DEV as DEV2
from inkstream.families.flux2.specs import KLEIN_4B, KLEIN_BASE_4B
from inkstream.families.zimage.specs import BASE, TURBO
from inkstream.nn.config import CLIPTextConfig, Flux2VAEConfig, MistralConfig, Qwen3Config, T5Config, VAEConfig
from inkstream.weights.keymap import translate
from published_packings import (
    E4M3,
    E5M2,
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
    json_bytes,
    mxfp8,
    nvfp4,
    nvfp4_modelopt,
    packed_vector,
    plain,
    svdquant,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
State = dict[str, Tensor]

VAE = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
_QWEN = Qwen3Config(512, 128, 4, 2, 1, 64, 256)
ZIMAGE = replace(
    TURBO.tiny,
    transformer=replace(TURBO.transformer, dim=384, n_layers=1, n_refiner_layers=1, n_heads=3, cap_feat_dim=128),
    text_encoder=_QWEN,
    vae=VAE,
)
FLUX1 = replace(
    DEV.tiny,
    transformer=replace(
        DEV.transformer, num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=128,
        pooled_projection_dim=64,
    ),
    text_encoder=CLIPTextConfig(1000, 64, 1, 1, 128),
    text_encoder_2=T5Config(vocab_size=1000, d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4),
    vae=VAE,
)  # fmt: skip
_FLUX2 = replace(
    DEV2.transformer, num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=384,
)  # fmt: skip
_VAE2 = Flux2VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
KLEIN = replace(
    KLEIN_4B.tiny, transformer=replace(_FLUX2, guidance_embeds=False), text_encoder=_QWEN, vae=_VAE2,
)  # fmt: skip
DEV_2 = replace(
    DEV2.tiny, transformer=_FLUX2, text_encoder=MistralConfig(512, 128, 4, 2, 1, 128, 256), vae=_VAE2,
)  # fmt: skip
SCHNELL_1 = replace(FLUX1, transformer=replace(FLUX1.transformer, guidance_embeds=False))
FILL_1 = replace(FLUX1, transformer=replace(FLUX1.transformer, in_channels=384, out_channels=64))
SIZES: Mapping[str, Spec] = {
    "zimage": ZIMAGE, "flux1": FLUX1, "schnell": SCHNELL_1, "fill": FILL_1, "klein": KLEIN, "dev": DEV_2,
}  # fmt: skip

PACKED = re.compile(
    r"attention\.(qkv|out|to_)|feed_forward|_attn\.(qkv|proj)\.|_mlp\.|\.linear[12]\.|\.attn\.(to_|add_)"
    r"|\.ff(_context)?\.|proj_mlp|single_transformer_blocks\.\d+\.proj_out|self_attn\.[qkvo]_proj"
    r"|mlp\.(gate|up|down)_proj|blk\.\d+\.(attn_[qkvo]|attn_output|ffn_(gate|up|down))\.|SelfAttention\.[qkvo]\."
    r"|DenseReluDense"
)
"""Layers that published files pack."""


@lru_cache
def states(size: str) -> dict[str, State]:
    """Random weights of all parts in our names, at numbers that bfloat16 holds."""
    parts = random_states(SIZES[size])
    return {part: {name: w.bfloat16().float() for name, w in state.items()} for part, state in parts.items()}


@dataclass(frozen=True)
class Built:
    """A file's tensors, and what they mean in our names."""

    tensors: State
    meant: State


@dataclass(frozen=True)
class File:
    """A published file that is opened. `place`: its path in ComfyUI's models/."""

    repo: str
    place: str
    size: str
    layout: str
    pack: Packing
    known: Spec | None = None  # whose defaults it has
    basis: str = ""
    inferred: bool = False
    part: str = "transformer"
    prefix: str = ""
    rest: torch.dtype = BF16  # of what is not packed
    extra: Callable[[], State] = dict
    metadata: Mapping[str, str] | None = None
    exact: bool = True  # the meaning is kept to the last bit

    @property
    def id(self) -> str:
        return f"{self.repo.rpartition('/')[2]}:{Path(self.place).name}"

    def build(self) -> Built:
        build = SPECIAL.get(self.layout, built)
        return build(self)


RULES = {
    "zimage": "native", "zimage-diffusers": "diffusers", "flux1": "native", "flux1-diffusers": "diffusers",
    "flux2": "native", "flux2-diffusers": "diffusers", "qwen3": "transformers", "qwen3-gguf": "gguf",
    "clip": "transformers", "t5": "diffusers", "t5-gguf": "gguf", "vae": "ldm", "vae-diffusers": "diffusers",
    "vae2": "ldm", "vae2-diffusers": "diffusers", "mistral": "transformers", "mistral-diffusers": "transformers",
}  # fmt: skip


def rules_of(file: File) -> list:
    layouts = family_of(SIZES[file.size].family).parts[file.part].layouts
    name = RULES[file.layout]
    for kind in ("", "klein ", "dev "):
        if f"{kind}{name}" in layouts and not (kind == "klein " and file.layout.startswith("mistral")):
            return list(layouts[f"{kind}{name}"])
    raise KeyError(name)


def whole_encoder(state: State, layout: str) -> State:
    """With the last layer of Mistral too, which is not read."""
    if not layout.startswith("mistral"):
        return state
    last = {k.replace("layers.0.", "layers.3."): w for k, w in state.items() if "layers.0." in k}
    return {**state, **last}


def built(file: File) -> Built:
    """A file whose layout has a key table: the names that it writes are compared with the published ones."""
    rules = rules_of(file)
    theirs = translate(rules, whole_encoder(states(file.size)[file.part], file.layout), back=True)
    if file.layout == "qwen3" or file.layout.startswith("mistral"):
        theirs = {re.sub(r"^(?=embed_tokens|layers|norm)", "model.", name): w for name, w in theirs.items()}
    if file.layout.startswith("mistral"):
        start = "language_model.model." if file.layout == "mistral-diffusers" else "model."
        theirs = {re.sub(r"^(language_model\.)?model\.", start, name): w for name, w in theirs.items()}
    tensors: State = {}
    meant: State = {}
    for name, w in theirs.items():
        layer = name.removesuffix(".weight")
        if PACKED.search(name) and w.ndim == 2 and layer != name:
            own, meant[name] = file.pack(layer, w)
            tensors |= own
        else:
            tensors[name] = w.to(file.rest)
            meant[name] = w.to(file.rest).float()
    return Built({file.prefix + k: v for k, v in tensors.items()} | file.extra(), translate(rules, meant))


# nunchaku's names, and llama.cpp's order of rows, written out ---------------------------------------------------------


def flux1_nunchaku(file: File) -> Built:
    ours = states(file.size)["transformer"]
    tensors: State = {}
    meant: State = {}

    def linear(theirs: str, name: str, w: Tensor) -> Tensor:
        own, value = file.pack(theirs, w)
        tensors.update(own)
        return value

    for i, (kind, context) in enumerate([("img", ""), ("txt", "_context")]):
        block, added = "transformer_blocks.0", "added_" if i else ""
        modulation = f"double_blocks.0.{kind}_mod.lin"
        own, meant[f"{modulation}.weight"] = awq(f"{block}.norm1{context}.linear", ours[f"{modulation}.weight"])
        tensors |= own
        meant[f"{modulation}.bias"] = torch.zeros_like(ours[f"{modulation}.bias"])
        for theirs, name in (
            (f"qkv_proj{context}", f"{kind}_attn.qkv"), (f"out_proj{context}", f"{kind}_attn.proj"),
            (f"mlp{context}_fc1", f"{kind}_mlp.0"), (f"mlp{context}_fc2", f"{kind}_mlp.2"),
        ):  # fmt: skip
            key = f"double_blocks.0.{name}"
            meant[f"{key}.weight"] = linear(f"{block}.{theirs}", key, ours[f"{key}.weight"])
            meant[f"{key}.bias"] = torch.zeros_like(ours[f"{key}.bias"])
        for letter, norm in (("q", "query"), ("k", "key")):
            key = f"double_blocks.0.{kind}_attn.norm.{norm}_norm.scale"
            tensors[f"{block}.norm_{added}{letter}.weight"] = ours[key].bfloat16()
            meant[key] = ours[key]
    block, key = "single_transformer_blocks.0", "single_blocks.0"
    own, meant[f"{key}.modulation.lin.weight"] = awq(f"{block}.norm.linear", ours[f"{key}.modulation.lin.weight"])
    tensors |= own
    meant[f"{key}.modulation.lin.bias"] = torch.zeros_like(ours[f"{key}.modulation.lin.bias"])
    dim = len(ours[f"{key}.linear2.weight"])
    qkv, up = ours[f"{key}.linear1.weight"].split([3 * dim, 4 * dim])
    attended, down = ours[f"{key}.linear2.weight"].split([dim, 4 * dim], 1)
    meant[f"{key}.linear1.weight"] = torch.cat(
        (linear(f"{block}.qkv_proj", key, qkv), linear(f"{block}.mlp_fc1", key, up))
    )
    meant[f"{key}.linear2.weight"] = torch.cat(
        (linear(f"{block}.out_proj", key, attended.contiguous()), linear(f"{block}.mlp_fc2", key, down.contiguous())), 1
    )
    # what is added to the zeros of the file's biases shows that both are read, and that they are added
    biases = {name: torch.linspace(-1, 1, size).bfloat16() for name, size in
              (("qkv_proj", 3 * dim), ("mlp_fc1", 4 * dim), ("out_proj", dim))}  # fmt: skip
    for name, bias in biases.items():
        tensors[f"{block}.{name}.bias"] = packed_vector(bias)
    meant[f"{key}.linear1.bias"] = torch.cat((biases["qkv_proj"], biases["mlp_fc1"])).float()
    meant[f"{key}.linear2.bias"] = biases["out_proj"].float()
    for letter, norm in (("q", "query"), ("k", "key")):
        tensors[f"{block}.norm_{letter}.weight"] = ours[f"{key}.norm.{norm}_norm.scale"].bfloat16()
        meant[f"{key}.norm.{norm}_norm.scale"] = ours[f"{key}.norm.{norm}_norm.scale"]
    others = {name: w for name, w in ours.items() if not name.startswith(("double_blocks", "single_blocks"))}
    tensors |= {k: w.bfloat16() for k, w in translate(family_rules("flux1", "diffusers"), others, back=True).items()}
    return Built(tensors, meant | others)


def zimage_nunchaku(file: File) -> Built:
    ours = states(file.size)["transformer"]
    tensors: State = {}
    meant: State = {}
    for name, w in ours.items():
        block, _, rest = name.partition(".0.")
        if rest in ("attention.qkv.weight", "attention.out.weight", "feed_forward.w2.weight"):
            theirs = {"attention.qkv": "attention.to_qkv", "attention.out": "attention.to_out.0",
                      "feed_forward.w2": "feed_forward.net.2"}[rest.removesuffix(".weight")]  # fmt: skip
            own, meant[name] = file.pack(f"{block}.0.{theirs}", w)
            tensors |= own
        elif rest == "feed_forward.w1.weight":  # diffusers' SwiGLU: the first half is multiplied by SiLU of the second
            both = torch.cat((ours[f"{block}.0.feed_forward.w3.weight"], w))
            own, joined = file.pack(f"{block}.0.feed_forward.net.0.proj", both)
            tensors |= own
            meant[f"{block}.0.feed_forward.w3.weight"], meant[name] = joined.chunk(2)
        elif rest != "feed_forward.w3.weight":
            (theirs,) = translate(family_rules("zimage", "diffusers"), {name: w}, back=True)
            tensors[theirs], meant[name] = w.bfloat16(), w
    biases = [name for name in tensors if name.endswith(".bias") and "wscales" in {*_beside(tensors, name)}]
    return Built({name: w for name, w in tensors.items() if name not in biases}, meant)


def _beside(tensors: State, name: str) -> list[str]:
    """The last words of the names of a layer's tensors."""
    layer = name.rpartition(".")[0] + "."
    return [key.removeprefix(layer) for key in tensors if key.startswith(layer)]


def family_rules(family: str, layout: str) -> list:
    return list(family_of(family).parts["transformer"].layouts[layout])


def mistral_gguf(file: File) -> Built:
    """llama.cpp's rows of queries and keys: in each head, the two halves of the rotary pairs alternate."""
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.v_proj": "attn_v",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors: State = {"output.weight": torch.ones(4, 32), "output_norm.weight": torch.ones(128)}
    meant: State = {}
    own = states(file.size)["text_encoder"]
    for name, w in whole_encoder(own, file.layout).items():
        if name == "model.embed_tokens.weight":
            theirs = "token_embd.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            theirs = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        value = w
        if ".attn_q." in theirs or ".attn_k." in theirs:
            value = torch.cat([head[[i % 2 * 64 + i // 2 for i in range(128)]] for head in w.split(128)])
        if PACKED.search(theirs):
            packed, back = file.pack(theirs.removesuffix(".weight"), value)
            tensors |= packed
            if ".attn_q." in theirs or ".attn_k." in theirs:
                back = torch.cat([h[[*range(0, 128, 2), *range(1, 128, 2)]] for h in back.split(128)])
            meant[name] = back
        else:
            tensors[theirs], meant[name] = value, w
    return Built(tensors, {k: w for k, w in meant.items() if k in own})


SPECIAL: Mapping[str, Callable[[File], Built]] = {
    "flux1-nunchaku": flux1_nunchaku, "zimage-nunchaku": zimage_nunchaku, "mistral-gguf": mistral_gguf,
}  # fmt: skip


# GGUF, by ggml's own package -----------------------------------------------------------------------------------------


def ggml(kind: str, small: str = "Q8_0") -> Packing:
    """ggml's formats. K formats need rows of 256 numbers; other matrices are packed as `small`, as llama.cpp does.

    What ggml's package cannot quantise is random blocks, which it dequantises.
    """
    import gguf

    def pack(layer: str, w: Tensor) -> tuple[State, Tensor]:
        name = kind if w.shape[1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0 else small
        form = gguf.GGMLQuantizationType[name]
        try:
            data = gguf.quants.quantize(w.numpy(), form)
        except NotImplementedError:
            numbers, size = gguf.GGML_QUANT_SIZES[form]
            rng = np.random.default_rng(len(layer))
            blocks = rng.integers(0, 256, (w.numel() // numbers, size), dtype=np.uint8)
            for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2) if "K" in name else (0,)):
                blocks[:, at : at + 2] = np.full((len(blocks), 1), 0.001, np.float16).view(np.uint8)
            data = blocks.reshape(len(w), -1)
        own = torch.from_numpy(np.asarray(data))
        own.ggml = name  # type: ignore[attr-defined]
        return {f"{layer}.weight": own}, torch.from_numpy(gguf.quants.dequantize(data, form).copy())

    return pack


def write_gguf_file(path: Path, tensors: State, arch: str | None, words: Mapping[str, object] | None = None) -> None:
    """A GGUF file by ggml's own writer. arch: None leaves the architecture out, as stable-diffusion.cpp does."""
    import gguf

    writer = gguf.GGUFWriter(path, arch or "none")
    if arch is None:
        writer.kv_data[0].pop("general.architecture")
    for name, value in (words or {}).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, str(value))
    for name, tensor in tensors.items():
        if kind := getattr(tensor, "ggml", None):
            writer.add_tensor(name, tensor.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_file(path: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, dict(metadata or {"format": "pt"}))


# The files -----------------------------------------------------------------------------------------------------------

_COMFY, _NUN = "Comfy-Org/z_image_turbo", "nunchaku-tech/nunchaku-flux.1-dev"
_UNET, _ENCODERS, _VAES = "diffusion_models/", "text_encoders/", "vae/"
GELU = re.compile(r"mlp(_context)?_fc2$")


def _svd(floats: bool, later: bool = False, rank: int = 32) -> Packing:
    return svdquant(floats, later, rank, lambda layer: GELU.search(layer) is not None)


def _fp8_mark(numbers: int, prefix: str = "") -> Callable[[], State]:
    return lambda: {f"{prefix}scaled_fp8": torch.zeros(numbers, dtype=E4M3)}


def tekken() -> State:
    from test_vocabulary import tekken

    return {"tekken_model": json_bytes(tekken())}


def both_embeddings() -> State:
    """T5's files hold the embedding twice."""
    return {"encoder.embed_tokens.weight": torch.ones(4, 4).bfloat16()}


P = "model.diffusion_model."
FILES: tuple[File, ...] = (
    # Z-Image
    File(_COMFY, _UNET + "z_image_turbo_bf16.safetensors", "zimage", "zimage", plain(BF16), TURBO),
    File("Comfy-Org/z_image", _UNET + "z_image_bf16.safetensors", "zimage", "zimage", plain(BF16), BASE),
    File(_COMFY, _UNET + "z_image_turbo_nvfp4.safetensors", "zimage", "zimage", nvfp4, TURBO,
         "comfy-kitchen tensor/nvfp4.py; format marks"),
    File(_COMFY, _UNET + "z_image_turbo_int8_convrot.safetensors", "zimage", "zimage", int8_convrot, TURBO,
         "comfy-kitchen tensor/int8.py; a published listing of its names: marks of 202 layers, scales (rows, 1)"),
    File(_COMFY, _UNET + "z_image_turbo_mxfp8.safetensors", "zimage", "zimage", mxfp8, TURBO,
         "comfy-kitchen tensor/mxfp8.py; ComfyUI quant_ops.py", inferred=True),
    File("community", _UNET + "z-image-turbo-int8.safetensors", "zimage", "zimage", int8_rows, TURBO,
         "ComfyUI quant_ops.py int8_tensorwise with a scale a row", inferred=True),
    File("community", _UNET + "z-image-turbo-convrot-w4a4.safetensors", "zimage", "zimage", convrot_w4a4, TURBO,
         "comfy-kitchen tensor/convrot_w4a4.py", inferred=True),
    File("Kijai/Z-Image_comfy_fp8_scaled", _UNET + "z-image-turbo_fp8_scaled_e4m3fn_KJ.safetensors", "zimage",
         "zimage", fp8_scaled, TURBO, "ComfyUI's earlier fp8: scaled_fp8 and scale_weight", extra=_fp8_mark(2)),
    File("T5B/Z-Image-Turbo-FP8", _UNET + "z-image-turbo-fp8-e4m3fn.safetensors", "zimage", "zimage", plain(E4M3),
         TURBO, "a plain cast", rest=E4M3, inferred=True),
    File("T5B/Z-Image-Turbo-FP8", _UNET + "z-image-turbo-fp8-e5m2.safetensors", "zimage", "zimage", plain(E5M2), TURBO,
         "a plain cast", rest=E5M2, inferred=True),
    File("community", _UNET + "z-image-turbo-prefixed.safetensors", "zimage", "zimage", plain(BF16), TURBO,
         "ComfyUI's ModelSave writes this prefix", prefix=P),
    File("leejet/Z-Image-Turbo-GGUF", "unet/z_image_turbo-Q4_0.gguf", "zimage", "zimage", ggml("Q4_0"), TURBO,
         "stable-diffusion.cpp: no architecture, prefixed names", prefix=P, rest=F32),
    File("jayn7/Z-Image-Turbo-GGUF", "unet/z_image_turbo-Q8_0.gguf", "zimage", "zimage", ggml("Q8_0"), TURBO,
         "ComfyUI-GGUF tools/convert.py", rest=F32),
    File("unsloth/Z-Image-Turbo-GGUF", "unet/z-image-turbo-Q4_K_M.gguf", "zimage", "zimage", ggml("Q4_K", "Q5_0"),
         TURBO, "llama.cpp's fallback for rows that are not of 256", rest=F32),
    File("unsloth/Z-Image-GGUF", "unet/z-image-UD-IQ4_XS.gguf", "zimage", "zimage", ggml("IQ4_XS", "IQ4_NL"), BASE,
         "llama.cpp's fallback from IQ4_XS to IQ4_NL", rest=F32, inferred=True),
    File("nunchaku-tech/nunchaku-z-image-turbo", _UNET + "svdq-int4_r32-z-image-turbo.safetensors", "zimage",
         "zimage-nunchaku", _svd(False, True), TURBO, exact=False),
    File("nunchaku-tech/nunchaku-z-image-turbo", _UNET + "svdq-fp4_r32-z-image-turbo.safetensors", "zimage",
         "zimage-nunchaku", _svd(True, True), TURBO, exact=False),
    # FLUX.1
    File("black-forest-labs/FLUX.1-dev", _UNET + "flux1-dev.safetensors", "flux1", "flux1", plain(BF16), DEV),
    File("black-forest-labs/FLUX.1-schnell", _UNET + "flux1-schnell.safetensors", "schnell", "flux1", plain(BF16),
         SCHNELL),
    File("black-forest-labs/FLUX.1-Fill-dev", _UNET + "flux1-fill-dev.safetensors", "fill", "flux1", plain(BF16), FILL),
    File("black-forest-labs/FLUX.1-Kontext-dev", _UNET + "flux1-kontext-dev.safetensors", "flux1", "flux1",
         plain(BF16), KONTEXT),
    File("Comfy-Org/flux1-kontext-dev_ComfyUI", _UNET + "flux1-dev-kontext_fp8_scaled.safetensors", "flux1", "flux1",
         fp8_scaled, KONTEXT, extra=_fp8_mark(2)),
    File("Comfy-Org/FLUX.1-Krea-dev_ComfyUI", _UNET + "flux1-krea-dev_fp8_scaled.safetensors", "flux1", "flux1",
         fp8_scaled, KREA, extra=_fp8_mark(2, P), prefix=P),
    File("Kijai/flux-fp8", _UNET + "flux1-dev-fp8-e4m3fn.safetensors", "flux1", "flux1", plain(E4M3), DEV, rest=E4M3),
    File("city96/FLUX.1-dev-gguf", "unet/flux1-dev-Q4_K_S.gguf", "flux1", "flux1", ggml("Q4_K"), DEV, rest=F32),
    File("city96/FLUX.1-dev-gguf", "unet/flux1-dev-Q5_1.gguf", "flux1", "flux1", ggml("Q5_1"), DEV, rest=F32),
    File("city96/FLUX.1-dev-gguf", "unet/flux1-dev-Q2_K.gguf", "flux1", "flux1", ggml("Q2_K"), DEV, rest=F32),
    File("leejet/FLUX.1-schnell-gguf", "unet/flux1-schnell-q4_0.gguf", "schnell", "flux1", ggml("Q4_0"), SCHNELL,
         "stable-diffusion.cpp: no architecture", prefix=P, rest=F32),
    File(_NUN, _UNET + "svdq-int4_r32-flux.1-dev.safetensors", "flux1", "flux1-nunchaku", _svd(False), DEV,
         exact=False),
    File(_NUN, _UNET + "svdq-fp4_r32-flux.1-dev.safetensors", "flux1", "flux1-nunchaku", _svd(True), DEV, exact=False),
    File("nunchaku-tech/nunchaku-flux.1-kontext-dev", _UNET + "svdq-int4_r128-flux.1-kontext-dev.safetensors", "flux1",
         "flux1-nunchaku", _svd(False, rank=128), KONTEXT, "the rank in the name", exact=False),
    File("diffusers/FLUX.1-dev-bnb-4bit", _UNET + "flux1-dev-bnb-4bit.safetensors", "flux1", "flux1-diffusers",
         bnb("nf4", True), DEV, "diffusers quantizers/bitsandbytes; double quantisation", exact=False),
    File("diffusers/FLUX.1-dev-bnb-8bit", _UNET + "flux1-dev-bnb-8bit.safetensors", "flux1", "flux1-diffusers",
         bnb_int8, DEV, "bitsandbytes nn/modules.py Linear8bitLt", inferred=True),
    # FLUX.2
    File("black-forest-labs/FLUX.2-dev", _UNET + "flux2-dev.safetensors", "dev", "flux2", plain(BF16), DEV2),
    File("Comfy-Org/flux2-dev", _UNET + "flux2_dev_fp8mixed.safetensors", "dev", "flux2", fp8_marked, DEV2),
    File("black-forest-labs/FLUX.2-dev-NVFP4", _UNET + "flux2-dev-nvfp4-mixed.safetensors", "dev", "flux2",
         nvfp4_modelopt, DEV2, "NVIDIA's Model Optimizer", inferred=True),
    File("city96/FLUX.2-dev-gguf", "unet/flux2-dev-Q4_K_S.gguf", "dev", "flux2", ggml("Q4_K"), DEV2, rest=F32),
    File("black-forest-labs/FLUX.2-klein-4B", _UNET + "flux-2-klein-4b.safetensors", "klein", "flux2", plain(BF16),
         KLEIN_4B),
    File("black-forest-labs/FLUX.2-klein-base-4b-fp8", _UNET + "flux-2-klein-base-4b-fp8.safetensors", "klein",
         "flux2", fp8_marked, KLEIN_BASE_4B, "scalar weight_scale and input_scale", inferred=True),
    File("black-forest-labs/FLUX.2-klein-4b-nvfp4", _UNET + "flux-2-klein-4b-nvfp4.safetensors", "klein", "flux2",
         nvfp4, KLEIN_4B, inferred=True),
    File("unsloth/FLUX.2-klein-4B-GGUF", "unet/flux-2-klein-4b-Q4_K_M.gguf", "klein", "flux2", ggml("Q4_K", "Q5_0"),
         KLEIN_4B, rest=F32),
    File("community", _UNET + "flux-2-klein-4b-diffusers.safetensors", "klein", "flux2-diffusers", plain(BF16),
         KLEIN_4B, "the transformer of black-forest-labs/FLUX.2-klein-4B as one file"),
    # Text encoders
    File(_COMFY, _ENCODERS + "qwen_3_4b.safetensors", "zimage", "qwen3", plain(BF16), part="text_encoder"),
    File(_COMFY, _ENCODERS + "qwen_3_4b_fp8_mixed.safetensors", "zimage", "qwen3", fp8_marked, part="text_encoder",
         inferred=True),
    File("Comfy-Org/flux2-klein-4B", _ENCODERS + "qwen_3_4b_fp4_flux2.safetensors", "klein", "qwen3", nvfp4,
         part="text_encoder", inferred=True),
    File("unsloth/Qwen3-4B-GGUF", _ENCODERS + "Qwen3-4B-Q4_K_M.gguf", "zimage", "qwen3-gguf", ggml("Q4_K", "Q5_0"),
         part="text_encoder", rest=F32),
    File("unsloth/Qwen3-4B-GGUF", "clip/Qwen3-4B-IQ4_NL.gguf", "klein", "qwen3-gguf", ggml("IQ4_NL"),
         part="text_encoder", rest=F32),
    File("Comfy-Org/flux2-dev", _ENCODERS + "mistral_3_small_flux2_bf16.safetensors", "dev", "mistral", plain(BF16),
         part="text_encoder", extra=tekken, basis="30 layers, no last norm, the tokenizer as bytes"),
    File("Comfy-Org/flux2-dev", _ENCODERS + "mistral_3_small_flux2_fp8.safetensors", "dev", "mistral", fp8_marked,
         part="text_encoder", extra=tekken),
    File("black-forest-labs/FLUX.2-dev", _ENCODERS + "mistral-hf.safetensors", "dev", "mistral-diffusers", plain(BF16),
         part="text_encoder", basis="shards of text_encoder/ joined",
         extra=lambda: {"language_model.lm_head.weight": torch.ones(512, 128).bfloat16(),
                        "language_model.model.norm.weight": torch.ones(128).bfloat16()}),
    File("unsloth/Mistral-Small-3.2-24B-Instruct-2506-GGUF",
         _ENCODERS + "Mistral-Small-3.2-24B-Instruct-2506-Q4_K_M.gguf", "dev", "mistral-gguf", ggml("Q4_K", "Q5_0"),
         part="text_encoder", basis="llama.cpp convert_hf_to_gguf.py LlamaModel.permute", rest=F32),
    File("comfyanonymous/flux_text_encoders", "clip/clip_l.safetensors", "flux1", "clip", plain(F16),
         part="text_encoder", rest=F16,
         extra=lambda: {"text_model.embeddings.position_ids": torch.arange(77)[None],
                        "text_projection.weight": torch.ones(4, 4).half(), "logit_scale": torch.ones(())}),
    File("comfyanonymous/flux_text_encoders", "clip/t5xxl_fp16.safetensors", "flux1", "t5", plain(F16),
         part="text_encoder_2", rest=F16, extra=both_embeddings),
    File("comfyanonymous/flux_text_encoders", "clip/t5xxl_fp8_e4m3fn.safetensors", "flux1", "t5", plain(E4M3),
         part="text_encoder_2", rest=E4M3, extra=both_embeddings),
    File("comfyanonymous/flux_text_encoders", "clip/t5xxl_fp8_e4m3fn_scaled.safetensors", "flux1", "t5", fp8_scaled,
         part="text_encoder_2", rest=F16, extra=lambda: both_embeddings() | _fp8_mark(0)()),
    File("city96/t5-v1_1-xxl-encoder-gguf", "clip/t5-v1_1-xxl-encoder-Q8_0.gguf", "flux1", "t5-gguf", ggml("Q8_0"),
         part="text_encoder_2", rest=F32),
    File("city96/t5-v1_1-xxl-encoder-gguf", "clip/t5-v1_1-xxl-encoder-Q3_K_S.gguf", "flux1", "t5-gguf",
         ggml("Q3_K", "Q4_0"), part="text_encoder_2", rest=F32),
    # Autoencoders
    File("black-forest-labs/FLUX.1-schnell", _VAES + "ae.safetensors", "flux1", "vae", plain(F32), part="vae",
         rest=F32),
    File(_COMFY, _VAES + "ae_bf16.safetensors", "zimage", "vae", plain(BF16), part="vae", inferred=True),
    File("black-forest-labs/FLUX.1-dev", _VAES + "diffusion_pytorch_model.safetensors", "zimage", "vae-diffusers",
         plain(BF16), part="vae"),
    File("Comfy-Org/flux2-dev", _VAES + "flux2-vae.safetensors", "klein", "vae2", plain(F32), part="vae", rest=F32,
         extra=lambda: {"bn.num_batches_tracked": torch.tensor(3)}),
    File("black-forest-labs/FLUX.2-dev", _VAES + "flux2-diffusers.safetensors", "dev", "vae2-diffusers", plain(BF16),
         part="vae", extra=lambda: {"bn.num_batches_tracked": torch.tensor(3)}),
    File("community", _UNET + "flux1-dev-fp8-rows.safetensors", "flux1", "flux1", fp8_rows, DEV,
         "torchao's and SGLang's scale a row without marks", inferred=True),
)  # fmt: skip
