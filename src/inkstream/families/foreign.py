"""Names what a weight file is that no layout here fits: a LoRA, another model, another way of packing."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MODEL = "take a Z-Image, FLUX.1, FLUX.2 or FLUX.3 model"
_BF16 = "take the bf16 file, or one that is fp8, int8, NVFP4, NF4 or GGUF"
_WHOLE = "give the model's own file, with -m"
_NET = "give the model's own file with -m, and this one with --control-net"

KINDS: tuple[tuple[str, str, str], ...] = (
    (r"(\.|_)lora_(A|B|down|up)\b|\.lora\.(down|up)\.|\.(lokr|hada)_w\d|_lora\d\.|\.lora_[AB]\.", "a LoRA", _WHOLE),
    (r"(^|\.)(controlnet_|control_layers\.|control_(all_)?x_embedder|control_transformer_blocks\.|zero_convs\.)",
     "a ControlNet", _NET),
    (r"(^|\.)input_hint_block\.", "a ControlNet", _NET),
    (r"(^|\.)(ip_adapter|image_proj|double_blocks\.\d+\.processor\.ip_adapter)", "an IP-Adapter", _NET),
    (r"^redux_(up|down)\.", "FLUX.1 Redux's image embedder",
     "put it into a FLUX.1 model's image_embedder/, or into ComfyUI's style_models/"),
    (r"\._weight_qdata$|_weight_qdata\b", "packed by torchao", _BF16),
    (r"\.weight\._(data|scale)$|\.weight_qtype$", "packed by optimum-quanto", _BF16),
    (r"\.scaled_zeros$", "packed as AWQ for nunchaku's own text encoder", "take t5xxl_fp16 or t5xxl_fp8_e4m3fn"),
    (r"\.(qzeros|g_idx)$", "packed as GPTQ or AWQ", _BF16),
    (r"\.SVDQuant|\.svd_(up|down)$", "packed by SDNQ", _BF16),
    (r"(^|\.)distilled_guidance_layer\.", "Chroma", _MODEL),
    (r"(^|\.)joint_blocks\.\d+\.x_block\.", "Stable Diffusion 3", _MODEL),
    (r"^conditioner\.embedders\.|(^|\.)label_emb\.0\.", "Stable Diffusion XL", _MODEL),
    (r"(^|\.)input_blocks\.\d|^cond_stage_model\.|^down_blocks\.\d+\.attentions\.", "Stable Diffusion", _MODEL),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.1\.", "Qwen-Image", _MODEL),
    (r"(^|\.)txt_in\.individual_token_refiner\.", "HunyuanVideo", _MODEL),
    (r"(^|\.)blocks\.\d+\.cross_attn\.", "Wan", _MODEL),
    (r"(^|\.)double_stream_blocks\.\d+\.block\.", "HiDream", _MODEL),
    (r"(^|\.)layers\.\d+\.adaLN_modulation\.1\.", "Lumina 2", _MODEL),
    (r"(^|\.)(scale_shift_table|adaln_single)\b", "PixArt, Sana or LTX", _MODEL),
    (r"^(model\.|language_model\.)*(model\.)?layers\.\d+\.self_attn\.|^blk\.\d+\.attn_q|^enc\.blk\.", "a text encoder",
     "give the transformer's file with -m, and this one with --text-encoder"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.|^encoder\.block\.\d+\.layer\.", "a text encoder",
     "give the transformer's file with -m, and this one with --text-encoder"),
    (r"^(encoder|decoder)\.layers\.\d+\.(conv\.\d+\.)?weight$|^taesd_", "a tiny autoencoder for previews",
     "take the autoencoder published with the model, such as ae.safetensors"),
    (r"^(encoder\.)?quant_conv\.|^(decoder\.)?post_quant_conv\.", "an autoencoder with quant_conv",
     "take ae.safetensors for FLUX.1 and Z-Image, flux2-vae.safetensors for FLUX.2 and FLUX.3"),
    (r"^((vae|first_stage_model)\.)?decoder\.(up|up_blocks|mid|mid_block|conv_in)\.", "an autoencoder",
     "give the transformer's file with -m, and this one with --vae"),
    (r"^(model\.\d+\.sub\.|body\.\d+\.rdb|conv_first\.)", "an upscaler", _WHOLE),
)  # fmt: skip
"""(pattern of a name, what a file with such a name is, what to do), the most telling first."""


def describe(names: Iterable[str], wanted: str) -> tuple[str, str] | None:
    """What a file with these names is, and what to do instead; None if its names tell nothing.

    wanted: the name of the part that the file should be.
    """
    listed = list(names)
    own = "an autoencoder" if wanted == "vae" else "a text encoder" if wanted.startswith("text_encoder") else ""
    for pattern, title, remedy in KINDS:
        search = re.compile(pattern).search
        if title != own and any(search(name) for name in listed):
            return title, remedy
    return None
