"""Parts that families share: the autoencoder, the Qwen3 text encoder, its tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from inkstream.families import Family, Part, Pictures, Shapes
from inkstream.nn.config import Qwen3Config, VAEConfig
from inkstream.nn.offload import where_it_computes
from inkstream.nn.qwen3 import Layer, Qwen3
from inkstream.nn.vae import Autoencoder, Flux2Autoencoder, tile_for
from inkstream.types import InputError
from inkstream.weights.keymap import Rule, drop, rename
from inkstream.weights.vocabulary import QWEN_PIECES

PROMPT_TOKENS = 512
"""Z-Image was trained on prompts truncated to this length, template included."""


def chat_prompt(text: str) -> str:
    """Qwen3's chat template: one user turn, then the start of the answer; no system turn, thinking allowed."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def tokenize(tokenizer: Tokenizer, prompt: str, limit: int = PROMPT_TOKENS) -> list[int]:
    """The first `limit` tokens of a prompt in its template. Special tokens in the prompt are parsed as such."""
    return tokenizer.encode(prompt, add_special_tokens=False).ids[:limit]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Reads Qwen's tokenizer from a folder with tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json.

    Raises InputError if both are missing, if one is unreadable, or if the chat template's tokens are missing.
    """
    folder = Path(path)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _from_vocabulary(folder)
        else:
            raise InputError(
                f"{folder} holds no tokenizer.json, nor vocab.json and merges.txt: copy the model's tokenizer there"
            )
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise InputError(f"the tokenizer in {folder} cannot be read ({error}): download it again") from error
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.token_to_id(token) is None:
            raise InputError(f"the tokenizer in {folder} has no {token}: it is not Qwen3's, or lacks its added tokens")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_vocabulary(folder: Path) -> Tokenizer:
    """Byte-level BPE over Qwen's pieces. tokenizer_config.json gives the numbers of the added tokens."""
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(QWEN_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    config = folder / "tokenizer_config.json"
    added = json.loads(config.read_text("utf-8")).get("added_tokens_decoder", {}) if config.is_file() else {}
    for number, token in sorted(added.items(), key=lambda item: int(item[0])):
        tokenizer.add_tokens([AddedToken(**token)])
        if tokenizer.token_to_id(token["content"]) != int(number):
            raise InputError(
                f"{config} gives {token['content']} number {number}, which does not follow vocab.json: copy both again"
            )
    return tokenizer


def infer_autoencoder(shapes: Shapes) -> VAEConfig:
    """Sizes from the shapes of the weights. Shapes do not show norm groups and scale: FLUX.1's are assumed."""
    blocks = _count(shapes, "encoder.down_blocks.")
    widths = tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(blocks))
    if any(width % VAEConfig.norm_num_groups for width in widths):
        raise KeyError("norm_num_groups")
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=widths,
        layers_per_block=_count(shapes, "encoder.down_blocks.0.resnets."),
        mid_block_add_attention=_count(shapes, "encoder.mid_block.attentions.") > 0,
    )


def infer_qwen3(shapes: Shapes) -> Qwen3Config:
    """Sizes from the shapes of the weights; the other values are the same for all Qwen3 models.

    Raises KeyError without the final norm, which our module leaves out. A file without it lacks layers too, and the
    state to read is counted from the last layer.
    """
    _ = shapes["norm.weight"]
    vocabulary, width = shapes["embed_tokens.weight"]
    (head,) = shapes["layers.0.self_attn.q_norm.weight"]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=_count(shapes, "layers."),
        num_attention_heads=shapes["layers.0.self_attn.q_proj.weight"][0] // head,
        num_key_value_heads=shapes["layers.0.self_attn.k_proj.weight"][0] // head,
        head_dim=head,
        intermediate_size=shapes["layers.0.mlp.gate_proj.weight"][0],
    )


def _count(shapes: Shapes, prefix: str) -> int:
    """How many different name segments follow the prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


_TRANSFORMERS: tuple[Rule, ...] = (
    rename("model.embed_tokens", "embed_tokens"),
    rename("model.layers", "layers"),
    rename("model.norm", "norm"),
    drop("lm_head"),  # a copy of the embedding; a text encoder does not generate
)

LLAMA_CPP = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names in a layer of a language model -> transformers'."""

_LLAMA_CPP: tuple[Rule, ...] = (
    rename("token_embd", "embed_tokens"),
    *(
        rename(f"blk.{{}}.{theirs}", f"layers.{{}}.{ours}")
        for theirs, ours in {
            **LLAMA_CPP,
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
        }.items()
    ),
    rename("output_norm", "norm"),
    drop("output"),  # the same as lm_head
)

_LEVELS = 4  # of every published file; its decoder counts levels from the pixels, ours counts from the latents

_LDM: tuple[Rule, ...] = (
    *(
        rule
        for theirs, ours in (
            ("encoder.down.{}", "encoder.down_blocks.{}"),
            *((f"decoder.up.{_LEVELS - 1 - i}", f"decoder.up_blocks.{i}") for i in range(_LEVELS)),
        )
        for rule in (
            rename(f"{theirs}.block.{{}}.nin_shortcut", f"{ours}.resnets.{{}}.conv_shortcut"),
            rename(f"{theirs}.block", f"{ours}.resnets"),
            rename(f"{theirs}.downsample", f"{ours}.downsamplers.0"),
            rename(f"{theirs}.upsample", f"{ours}.upsamplers.0"),
        )
    ),
    *(
        rule
        for side in ("encoder", "decoder")
        for rule in (
            rename(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"),
            rename(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"),
            rename(f"{side}.mid.attn_1.norm", f"{side}.mid_block.attentions.0.group_norm"),
            rename(f"{side}.mid.attn_1.q", f"{side}.mid_block.attentions.0.to_q", conv1x1=True),
            rename(f"{side}.mid.attn_1.k", f"{side}.mid_block.attentions.0.to_k", conv1x1=True),
            rename(f"{side}.mid.attn_1.v", f"{side}.mid_block.attentions.0.to_v", conv1x1=True),
            rename(f"{side}.mid.attn_1.proj_out", f"{side}.mid_block.attentions.0.to_out.0", conv1x1=True),
            rename(f"{side}.norm_out", f"{side}.conv_norm_out"),
        )
    ),
)

FLUX_SINGLE_FILE: tuple[Rule, ...] = tuple(
    rename(f"{block}.norm.{norm}.{theirs}", f"{block}.norm.{norm}.scale")
    for theirs in ("scale", "weight")  # most files use the first name, some newer files the second
    for block in ("double_blocks.{}.img_attn", "double_blocks.{}.txt_attn", "single_blocks.{}")
    for norm in ("query_norm", "key_norm")
)
"""Key rules for FLUX.1's and FLUX.2's single files. All other names there are ours."""


def decode(vae: Autoencoder | Flux2Autoencoder, latents: Tensor) -> Tensor:
    """Implements `Family.decode`."""
    batch, _, h, w = latents.shape
    tile = tile_for(batch, h, w, vae.config.downscale)
    pixels = vae.decode(latents.to(where_it_computes(vae)[1]), tile)
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def encode(vae: Autoencoder | Flux2Autoencoder, pixels: Tensor) -> Tensor:
    """Implements `Family.encode_image`."""
    batch, _, height, width = pixels.shape
    cell = vae.config.downscale
    tile = tile_for(batch, height // cell, width // cell, cell)
    return vae.encode((pixels * 2 - 1).to(where_it_computes(vae)[1]), tile).float().contiguous()


def to_pixels(picture: Image.Image) -> Tensor:
    """A picture as (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def latents_to_follow(family: Family, pictures: Pictures) -> Tensor:
    """The latents (C, h, w) of the only reference, a control picture, resized to the exact size of the drawing."""
    (control,) = pictures.references
    resized = control.resize((pictures.width, pictures.height), Image.Resampling.LANCZOS)
    device, _ = where_it_computes(family.transformer)
    return family.encode_image(to_pixels(resized).to(device)[None])[0]


def inpainting_to_follow(family: Family, pictures: Pictures) -> tuple[Tensor, Tensor] | None:
    """What a control net sees of an inpainting, or None without one.

    First a mask of the pixels to keep, (1, H, W) of 0 and 1. Then the latents (C, h, w) of the start picture, which is
    grey where it is repainted.
    """
    if pictures.image is None or pictures.mask is None:
        return None
    device, _ = where_it_computes(family.transformer)
    pixels, mask = (to_pixels(picture).to(device) for picture in (pictures.image, pictures.mask))
    kept = (mask[:1] < 0.5).float()
    return kept, family.encode_image(((pixels * 2 - 1) * kept / 2 + 0.5)[None])[0]


def neutral_layer(config: Qwen3Config) -> dict[str, Tensor]:
    """Weights of a last Qwen3 layer that adds nothing to its input, and of the final norm."""
    with torch.device("meta"):
        layer = Layer(config)
    last = f"layers.{config.num_hidden_layers - 1}."
    weights = {
        last + key: torch.ones(tensor.shape) if "norm" in key else torch.zeros(tensor.shape)
        for key, tensor in layer.state_dict().items()
    }
    return {**weights, "norm.weight": torch.ones(config.hidden_size)}


AUTOENCODER = Part(
    phases=("prompt", "picture"),
    build=Autoencoder,
    config=VAEConfig,
    layouts={"diffusers": (), "ldm": _LDM},
    infer=infer_autoencoder,
)
"""FLUX.1's and Z-Image's autoencoder. "ldm" is the layout of ae.safetensors."""

QWEN3 = Part(
    build=Qwen3,
    config=Qwen3Config,
    layouts={"transformers": _TRANSFORMERS, "gguf": _LLAMA_CPP},
    infer=infer_qwen3,
    unread=lambda config: (f"layers.{config.num_hidden_layers - 1}.", "norm."),
    neutral=neutral_layer,
    packs=("layers", "embed_tokens"),
    gguf="qwen3",
    comfyui=lambda config: "comfy/text_encoders/qwen25_tokenizer",
)
"""Z-Image's text encoder: Qwen3 without its last layer. Files may have the `model.` prefix or not."""
