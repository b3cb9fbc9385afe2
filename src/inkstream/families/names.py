"""The known model of a published file's or repository's name. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from inkstream.families import SPECS
from inkstream.types import ShiftRule, Spec

ALIASES: Mapping[str, tuple[str, ...]] = {
    "z-image": ("z-image-base",),
    "z-image-omni": ("z-image-omni-base",),
    "flux1-schnell": ("flux-schnell",),
    "flux1-dev": ("flux-dev",),
    "flux1-krea-dev": ("flux1-dev-krea", "flux-krea-dev"),
    "flux1-kontext-dev": ("flux1-dev-kontext", "flux-kontext-dev", "flux-dev-kontext"),
    "flux1-fill-dev": ("flux1-dev-fill", "flux-fill-dev", "flux-dev-fill", "flux-fill"),
    "flux1-canny-dev": ("flux1-dev-canny", "flux-canny-dev", "flux-dev-canny"),
    "flux1-depth-dev": ("flux1-dev-depth", "flux-depth-dev", "flux-dev-depth"),
    "flux2-klein-base-4b": ("flux2-klein-4b-base",),
    "flux2-klein-base-9b": ("flux2-klein-9b-base",),
    "flux2-klein-9b-kv": ("flux2-klein-kv-9b",),
    "flux3-klein": ("flux-3-klein",),
    "flux3-klein-base": ("flux-3-klein-base", "flux3-image-klein-base"),
}
"""Known model -> further names of its files, beside its own name and that of its repository."""

SCHEDULES: Mapping[str, ShiftRule] = {"Flux2Scheduler": "empirical", "flux2": "empirical", "flux": "dynamic"}
"""Name of a schedule in ComfyUI or stable-diffusion.cpp -> the shift rule that it follows."""

_EXTENSION = re.compile(r"\.(safetensors|sft|gguf|ckpt|pth?|bin)$")
_HASH = re.compile(r"\s*\[[0-9a-f]{6,64}\]$")
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Z][a-z])|[^A-Za-z0-9]+")
_REPACKED = (
    r"(ud-)?(iq|tq|q)[1-8](-[01k])?(-(xxs|xs|nl|s|m|l|xl))?",  # GGUF: q8_0, q4_k_m, iq4_xs, ud-q4_k_xl
    r"q[1-8]p|i8x",  # Draw Things
    r"(bf|fp|f|b?float)(8|16|32)r?|(nv|mx)?fp[48]|nf4|u?int[48]|[2-8]-?bit|w[48]a(4|8|16)|df11",
    r"(fp[48]|nvfp4|int8)?-?(scaled|mixed|tensorwise)|(fp8)?e[45]m[23](fn)?(uz)?|convrot|r\d{2,3}|fast|kj",
    r"quant(iz|is)ed|svdq|nunchaku|sdnq|svd|dynamic|entropack|bnb|bitsandbytes|hqq|awq|gptq|autoround|torchao|quanto",
    r"mlx|mflux|gguf|imatrix|onnx|tensorrt|openvino|comfy(ui)?|diffusers|transformer|unet|dit|diffusion-model|model",
    r"checkpoint|single-file|pruned|aio|repack(aged)?|official|original|1-0",
)
"""What publishers add to a model's name: how the weights are stored, and by whom."""
_PACKED = "|".join(_REPACKED)
_ADDED = re.compile(rf"(?<![a-z0-9])(({_PACKED})(-v\d{{1,3}}(-\d)?)?|v1-?0?)(?![a-z0-9])")
"""A version behind such a word is the packing's. Otherwise it is the model's, and only the first is known."""


def named(name: str) -> Spec | None:
    """The known model of a file, repository or title, in any precision and packing. None for any other, as a finetune.

    A path's last part counts. Words of _REPACKED, case and punctuation do not.
    """
    last = re.split(r"[/\\]", name[:1000].strip())[-1]
    return _KNOWN.get(_core(_HASH.sub("", _EXTENSION.sub("", last.strip()))))


def _core(name: str) -> str:
    """A name without the words that publishers add, in lower case, without punctuation."""
    words = _ADDED.sub("", _WORDS.sub("-", name).lower()).split("-")
    kept = [word for word in words if word]
    return "".join(word for index, word in enumerate(kept) if index == 0 or word != kept[index - 1])


_KNOWN = {
    _core(name): spec
    for spec in SPECS.values()
    for name in ((spec.repo or spec.name).rpartition("/")[2], *ALIASES.get(spec.name, ()))
} | {_core(spec.name): spec for spec in SPECS.values()}
