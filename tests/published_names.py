"""The names of the weights in published files, written out from their sources, not from the key tables under test.

`N` stands for the number of a block. Braces list alternatives. SOURCES says where each list can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

WB = "{weight,bias}"

SOURCES = {
    "zimage": "Comfy-Org/z_image_turbo; ComfyUI comfy/ldm/lumina/model.py, comfy/model_detection.py; 453 at full size",
    "zimage-diffusers": "Tongyi-MAI/Z-Image-Turbo transformer/*.index.json; diffusers transformer_z_image.py; 521",
    "zimage-nunchaku": "nunchaku models/transformers/transformer_zimage.py; nunchaku models/linear.py",
    "flux1": "black-forest-labs/flux src/flux/model.py and modules/layers.py; 780 of dev",
    "flux1-diffusers": "black-forest-labs/FLUX.1-dev transformer/*.index.json; diffusers transformer_flux.py; 1160",
    "flux1-nunchaku": "DeepCompressor backend/nunchaku/convert.py; nunchaku transformer_flux_v2.py",
    "flux2": "black-forest-labs/flux2 src/flux2/model.py",
    "flux2-diffusers": "diffusers transformer_flux2.py",
    "qwen3": "Qwen/Qwen3-4B model.safetensors.index.json; Comfy-Org qwen_3_4b",
    "qwen3-gguf": "llama.cpp gguf-py/gguf/constants.py, MODEL_ARCH.QWEN3",
    "mistral": "Comfy-Org/flux2-dev text_encoders; ComfyUI comfy/text_encoders/flux.py, llama.py",
    "mistral-diffusers": "black-forest-labs/FLUX.2-dev text_encoder/*.index.json (Mistral3ForConditionalGeneration)",
    "mistral-gguf": "llama.cpp gguf-py/gguf/constants.py, MODEL_ARCH.LLAMA",
    "clip": "comfyanonymous/flux_text_encoders clip_l.safetensors; transformers modeling_clip.py",
    "t5": "comfyanonymous/flux_text_encoders t5xxl_fp16.safetensors; transformers modeling_t5.py",
    "t5-gguf": "llama.cpp gguf-py/gguf/constants.py, MODEL_ARCH.T5ENCODER; ComfyUI-GGUF loader.py",
    "vae": "black-forest-labs/flux src/flux/modules/autoencoder.py (ae.safetensors)",
    "vae-diffusers": "black-forest-labs/FLUX.1-dev vae; diffusers autoencoder_kl.py",
    "vae2": "black-forest-labs/FLUX.2-dev ae.safetensors; black-forest-labs/flux2 src/flux2/autoencoder.py",
    "vae2-diffusers": "black-forest-labs/FLUX.2-dev vae; diffusers autoencoder_kl_flux2.py",
}

_ZIMAGE_TOP = [
    f"t_embedder.mlp.{{0,2}}.{WB}", "cap_embedder.0.weight", f"cap_embedder.1.{WB}", "{x,cap}_pad_token",
]  # fmt: skip
_ZIMAGE_REST = ["attention_norm{1,2}.weight", "ffn_norm{1,2}.weight"]
_ZIMAGE_FFN = "feed_forward.w{1,2,3}.weight"
_MODULATED, _BLOCKS = "{layers,noise_refiner}.N.", "{layers,noise_refiner,context_refiner}.N."
_QUANTISED = "{qweight,wscales,SMOOTH,SMOOTH_orig,DOWN,UP,bias}"
_LATER = _QUANTISED.replace("SMOOTH", "smooth_factor").replace("DOWN", "proj_down").replace("UP", "proj_up")
_EARLIER = _QUANTISED.replace("SMOOTH", "smooth").replace("DOWN", "lora_down").replace("UP", "lora_up")


def _llama(layer: str, *parts: str) -> list[str]:
    return [f"{layer}.{part}.weight" for part in parts]


_QWEN_LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.{q,k,v,o}_proj", "mlp.{gate,up,down}_proj",
)  # fmt: skip
_LLAMA_CPP = ("attn_norm", "attn_{q,k,v,output}", "ffn_{norm,gate,up,down}")
_T5 = (
    "0.layer_norm", "0.SelfAttention.{q,k,v,o}", "1.layer_norm", "1.DenseReluDense.{wi_0,wi_1,wo}",
)  # fmt: skip
_CLIP = (
    f"self_attn.{{q,k,v,out}}_proj.{WB}", f"layer_norm{{1,2}}.{WB}", f"mlp.fc{{1,2}}.{WB}",
)  # fmt: skip
_FLUX1_TOP = [f"{{img,txt}}_in.{WB}", f"{{time,vector}}_in.{{in,out}}_layer.{WB}", f"final_layer.linear.{WB}",
              f"final_layer.adaLN_modulation.1.{WB}"]  # fmt: skip
_FLUX1_DF_TOP = [
    f"{{x,context}}_embedder.{WB}", f"time_text_embed.{{timestep,text}}_embedder.linear_{{1,2}}.{WB}",
    f"norm_out.linear.{WB}", f"proj_out.{WB}",
]  # fmt: skip


_LDM_SIDE = [
    f"conv_in.{WB}", f"norm_out.{WB}", f"conv_out.{WB}",
    f"mid.block_{{1,2}}.{{norm1,conv1,norm2,conv2}}.{WB}", f"mid.attn_1.{{norm,q,k,v,proj_out}}.{WB}",
]  # fmt: skip
_DF_SIDE = [f"conv_in.{WB}", f"conv_norm_out.{WB}", f"conv_out.{WB}",
            f"mid_block.resnets.{{0,1}}.{{norm1,conv1,norm2,conv2}}.{WB}",
            f"mid_block.attentions.0.{{group_norm,to_q,to_k,to_v,to_out.0}}.{WB}"]  # fmt: skip
_LDM = [
    *(f"{side}.{name}" for side in ("encoder", "decoder") for name in _LDM_SIDE),
    f"encoder.down.{{0,1,2,3}}.block.{{0}}.{{norm1,conv1,norm2,conv2}}.{WB}",
    f"encoder.down.{{0,1,2}}.downsample.conv.{WB}",
    f"decoder.up.{{0,1,2,3}}.block.{{0,1}}.{{norm1,conv1,norm2,conv2}}.{WB}",
    f"decoder.up.{{1,2,3}}.upsample.conv.{WB}",
]
_DF_VAE = [
    *(f"{side}.{name}" for side in ("encoder", "decoder") for name in _DF_SIDE),
    f"encoder.down_blocks.{{0,1,2,3}}.resnets.{{0}}.{{norm1,conv1,norm2,conv2}}.{WB}",
    f"encoder.down_blocks.{{0,1,2}}.downsamplers.0.conv.{WB}",
    f"decoder.up_blocks.{{0,1,2,3}}.resnets.{{0,1}}.{{norm1,conv1,norm2,conv2}}.{WB}",
    f"decoder.up_blocks.{{0,1,2}}.upsamplers.0.conv.{WB}",
]
_BN = ["bn.running_{mean,var}"]

NAMES: Mapping[str, list[str]] = {
    "zimage": [
        *_ZIMAGE_TOP, f"x_embedder.{WB}", f"final_layer.linear.{WB}", f"final_layer.adaLN_modulation.1.{WB}",
        f"{_MODULATED}adaLN_modulation.0.{WB}",
        *(f"{_BLOCKS}{name}" for name in (
            "attention.{qkv,out,q_norm,k_norm}.weight", _ZIMAGE_FFN, *_ZIMAGE_REST)),
    ],
    "zimage-diffusers": [
        *_ZIMAGE_TOP, f"all_x_embedder.2-1.{WB}", f"all_final_layer.2-1.linear.{WB}",
        f"all_final_layer.2-1.adaLN_modulation.1.{WB}", f"{_MODULATED}adaLN_modulation.0.{WB}",
        *(f"{_BLOCKS}{name}" for name in (
            "attention.{to_q,to_k,to_v,to_out.0,norm_q,norm_k}.weight", _ZIMAGE_FFN, *_ZIMAGE_REST)),
    ],
    "zimage-nunchaku": [
        *_ZIMAGE_TOP, f"all_x_embedder.2-1.{WB}", f"all_final_layer.2-1.linear.{WB}",
        f"all_final_layer.2-1.adaLN_modulation.1.{WB}", f"{_MODULATED}adaLN_modulation.0.{WB}",
        *(f"{_BLOCKS}{name}" for name in (
            "attention.{norm_q,norm_k}.weight", *_ZIMAGE_REST,
            "{attention.to_qkv,attention.to_out.0,feed_forward.net.0.proj,feed_forward.net.2}."
            + _LATER.replace(",bias", ""))),
    ],
    "flux1": [
        *_FLUX1_TOP, f"guidance_in.{{in,out}}_layer.{WB}",
        *(f"double_blocks.N.{{img,txt}}_{name}" for name in (
            f"mod.lin.{WB}", f"attn.{{qkv,proj}}.{WB}", "attn.norm.{query,key}_norm.scale", f"mlp.{{0,2}}.{WB}")),
        *(f"single_blocks.N.{name}" for name in (
            f"{{linear1,linear2,modulation.lin}}.{WB}", "norm.{query,key}_norm.scale")),
    ],
    "flux1-diffusers": [
        *_FLUX1_DF_TOP, f"time_text_embed.guidance_embedder.linear_{{1,2}}.{WB}",
        *(f"transformer_blocks.N.{name}" for name in (
            f"{{norm1,norm1_context}}.linear.{WB}",
            f"attn.{{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out}}.{WB}",
            "attn.norm_{q,k,added_q,added_k}.weight", f"{{ff,ff_context}}.net.{{0.proj,2}}.{WB}")),
        *(f"single_transformer_blocks.N.{name}" for name in (
            f"{{norm.linear,proj_mlp,proj_out,attn.to_q,attn.to_k,attn.to_v}}.{WB}", "attn.norm_{q,k}.weight")),
    ],
    "flux1-nunchaku": [
        *_FLUX1_DF_TOP, f"time_text_embed.guidance_embedder.linear_{{1,2}}.{WB}",
        *(f"transformer_blocks.N.{name}" for name in (
            "{norm1,norm1_context}.linear.{qweight,wscales,wzeros,bias}", "norm_{q,k,added_q,added_k}.weight",
            "{qkv_proj,qkv_proj_context,out_proj,out_proj_context,mlp_fc1,mlp_fc2,mlp_context_fc1,mlp_context_fc2}."
            + _EARLIER)),
        *(f"single_transformer_blocks.N.{name}" for name in (
            "norm.linear.{qweight,wscales,wzeros,bias}", "norm_{q,k}.weight",
            f"{{qkv_proj,out_proj,mlp_fc1,mlp_fc2}}.{_EARLIER}")),
    ],
    "flux2": [
        "{img,txt}_in.weight", "time_in.{in,out}_layer.weight", "guidance_in.{in,out}_layer.weight",
        "double_stream_modulation_{img,txt}.lin.weight", "single_stream_modulation.lin.weight",
        "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight",
        *(f"double_blocks.N.{{img,txt}}_{name}" for name in (
            "attn.{qkv,proj}.weight", "attn.norm.{query,key}_norm.scale", "mlp.{0,2}.weight")),
        "single_blocks.N.{linear1,linear2}.weight", "single_blocks.N.norm.{query,key}_norm.scale",
    ],
    "flux2-diffusers": [
        "{x,context}_embedder.weight", "time_guidance_embed.{timestep,guidance}_embedder.linear_{1,2}.weight",
        "double_stream_modulation_{img,txt}.linear.weight", "single_stream_modulation.linear.weight",
        "norm_out.linear.weight", "proj_out.weight",
        *(f"transformer_blocks.N.{name}" for name in (
            "attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out}.weight",
            "attn.norm_{q,k,added_q,added_k}.weight", "{ff,ff_context}.linear_{in,out}.weight")),
        "single_transformer_blocks.N.attn.{to_qkv_mlp_proj,to_out,norm_q,norm_k}.weight",
    ],
    "qwen3": [
        "model.embed_tokens.weight", "model.norm.weight",
        *_llama("model.layers.N", *_QWEN_LAYER, "self_attn.{q,k}_norm"),
    ],
    "qwen3-gguf": ["token_embd.weight", "output_norm.weight", *_llama("blk.N", *_LLAMA_CPP, "attn_{q,k}_norm")],
    "mistral": ["model.embed_tokens.weight", "tekken_model", *_llama("model.layers.N", *_QWEN_LAYER)],
    "mistral-diffusers": [
        "language_model.model.embed_tokens.weight", "language_model.model.norm.weight", "language_model.lm_head.weight",
        *_llama("language_model.model.layers.N", *_QWEN_LAYER),
    ],
    "mistral-gguf": [
        "token_embd.weight", "output_norm.weight", "output.weight", *_llama("blk.N", *_LLAMA_CPP),
    ],
    "clip": [
        "text_model.embeddings.{token,position}_embedding.weight", f"text_model.final_layer_norm.{WB}",
        *(f"text_model.encoder.layers.N.{name}" for name in _CLIP),
    ],
    "t5": [
        "shared.weight", "encoder.embed_tokens.weight", "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        *(f"encoder.block.N.layer.{name}.weight" for name in _T5),
    ],
    "t5-gguf": [
        "token_embd.weight", "enc.output_norm.weight", "enc.blk.0.attn_rel_b.weight",
        *_llama("enc.blk.N", "attn_{q,k,v,o,norm}", "ffn_{norm,gate,up,down}"),
    ],
    "vae": _LDM,
    "vae-diffusers": _DF_VAE,
    "vae2": [*_LDM, f"encoder.quant_conv.{WB}", f"decoder.post_quant_conv.{WB}", *_BN, "bn.num_batches_tracked"],
    "vae2-diffusers": [*_DF_VAE, f"quant_conv.{WB}", f"post_quant_conv.{WB}", *_BN, "bn.num_batches_tracked"],
}  # fmt: skip


def expand(pattern: str) -> Iterator[str]:
    """All names of a pattern with braces."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    for choice in match[1].split(","):
        yield from expand(pattern[: match.start()] + choice + pattern[match.end() :])


def names_of(layout: str, counts: Mapping[str, int]) -> set[str]:
    """All names of a layout. counts: beginning of a name that holds N -> its number of blocks; "" is any other."""
    found: set[str] = set()
    for name in (name for pattern in NAMES[layout] for name in expand(pattern)):
        if ".N." not in name:
            found.add(name)
            continue
        count = next((n for start, n in counts.items() if start and name.startswith(start)), counts.get("", 0))
        found.update(name.replace(".N.", f".{i}.") for i in range(count))
    return found
