"""The keys and the metadata in adapters' files: a key is [prefix] path of a layer [.name of the adapter] suffix.

Torch is not imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TRIGGERS = ("modelspec.trigger_phrase", "trigger_word", "trigger", "ss_trigger")
BASES = ("ss_base_model_version", "modelspec.architecture", "base_model", "base_model_name_or_path")
"""Entries of the metadata, the best first."""

FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What PEFT and diffusers call the file in a folder."""

DOTTED = {
    "base_model.model.": "peft",
    "model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "unet.": "diffusers",
}
"""Prefixes of dotted paths, several of which may follow one another -> the dialect that begins with them.

comfyui is ai-toolkit's too.
"""

UNDERSCORED = {
    "lora_unet__": "kohya",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "lycoris",
}
"""Prefixes of paths with underscores -> the dialect. kohya is musubi's and OneTrainer's too."""

BARE = "bare"
"""The dialect of keys without a prefix: DiffSynth, and Black Forest Labs."""

TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoder(s|_\d)?\.|cond_stage_model\.|conditioner\.)")
"""Prefixes of the keys of text encoders."""

_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"
"""The name of the adapter, which PEFT may put before `.weight`."""

SUFFIXES: tuple[tuple[str, str], ...] = (
    (rf"[._]lora_A{_NAME}(?:\.weight)?|[._]lora_down(?:\.weight)?|[._]lora\.down\.weight", "down"),
    (rf"[._]lora_B{_NAME}(?:\.weight)?|[._]lora_up(?:\.weight)?|[._]lora\.up\.weight", "up"),
    (r"\.lora_linear_layer\.down\.weight|(?<=_lora\d)\.down\.weight", "down"),
    (r"\.lora_linear_layer\.up\.weight|(?<=_lora\d)\.up\.weight", "up"),
    (rf"[._]lora_B{_NAME}\.bias", "up_bias"),
    (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "magnitude"),
    (rf"\.(oft_R|boft_R|boft_s|ia3_l){_NAME}(?:\.weight)?", ""),
    (r"\.(a1|a2|b1|b2)\.weight", ""),
    (r"\.(bm|lora_mid)\.weight", ""),
    (rf"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t[12]){_NAME}", ""),
    (r"\.(alpha|dora_scale|oft_blocks|oft_diag|rescale|on_input|diff|diff_b|w_norm|b_norm)", ""),
    (r"\.(set_weight|set_bias|reshape_weight|weight)", ""),
)
"""(pattern of a suffix, role of its tensor); the role "" stands for the group in the pattern."""

_SUFFIX = [(re.compile(rf"(.+?)(?:{pattern})"), role) for pattern, role in SUFFIXES]


@dataclass(frozen=True)
class Key:
    """A key of a file in parts. path: of the layer, with dots or underscores. role: of the tensor, "" if unknown."""

    dialect: str
    path: str
    role: str


def read_key(key: str) -> Key:
    """The parts of a key."""
    for prefix, dialect in UNDERSCORED.items():
        if key.startswith(prefix):
            return _read_suffix(dialect, key.removeprefix(prefix))
    found = BARE
    while prefix := next((prefix for prefix in DOTTED if key.startswith(prefix)), ""):
        found = DOTTED[prefix] if found == BARE else found
        key = key.removeprefix(prefix)
    return _read_suffix(found, key)


def _read_suffix(dialect: str, rest: str) -> Key:
    for pattern, role in _SUFFIX:
        if match := pattern.fullmatch(rest):
            return Key(dialect, match[1], role or match[2])
    return Key(dialect, rest, "")
