"""Maps of depth and of the directions of surfaces, from a depth map, or by a model of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.engine.pictures.inputs import fit_size, open_numbers, open_picture, short_name
from inkstream.types import InputError, as_object

Depth = NDArray[np.float32]  # (H, W) in [0, 1], near is 1

MODEL_SIDE = 518
"""The shorter side that a model sees, if its configuration names none."""
METRIC = ("glpn", "zoedepth", "depth_pro", "prompt_depth_anything")
"""Kinds of models that tell distances. The others tell nearness."""


def depth(source: str | Image.Image, model: str | None, invert: float) -> Image.Image:
    """Depth, near is white: a depth map stretched to its full range; with `model`, the depth of a picture."""
    return Image.fromarray((_depth(source, model, invert) * 255).round().astype(np.uint8)).convert("RGB")


def normal(source: str | Image.Image, model: str | None, invert: float, relief: float) -> Image.Image:
    """The directions of surfaces: red is left, green is up, blue is to the front, as in ControlNet 1.1's maps."""
    near = _depth(source, model, invert)
    dy, dx = np.gradient(near) if min(near.shape) > 1 else (np.zeros_like(near), np.zeros_like(near))
    height = relief * max(near.shape)
    directions = np.stack([dx * height, dy * height, np.ones_like(near)], axis=2)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    return Image.fromarray(((directions + 1) * 127.5).round().astype(np.uint8))


def _depth(source: str | Image.Image, model: str | None, invert: float) -> Depth:
    if model is None:
        values = _stretched(open_numbers(source) if isinstance(source, str) else np.asarray(source.convert("F")))
        return 1 - values if invert >= 0.5 else values
    picture = open_picture(source) if isinstance(source, str) else source.convert("RGB")
    return _seen(picture.resize(fit_size(picture, 1), Image.Resampling.LANCZOS), model)


def _stretched(values: NDArray[Any]) -> Depth:
    """Numbers from 0 to 1. A flat map is 0."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    least, most = float(values.min()), float(values.max())
    return ((values - least) / ((most - least) or 1)).astype(np.float32)


def _seen(picture: Image.Image, name: str) -> Depth:
    """The depth that a model of transformers sees. Its files must be on this machine already."""
    import torch

    try:
        import transformers
    except ImportError:
        raise InputError(
            f"depth by {short_name(name)} needs the package transformers: pip install transformers"
        ) from None
    folder = _folder(name)
    try:
        kind = cast("Any", transformers).AutoModelForDepthEstimation
        model = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
        processing: Any = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    except Exception as error:  # transformers raises errors of many types
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"depth model {short_name(name)} cannot be read ({reason}): give the folder of a depth model"
        ) from None
    with torch.inference_mode():
        near: Any = model(pixel_values=_pixels(picture, processing)).predicted_depth[:, None].float()
        if getattr(model.config, "depth_estimation_type", "") == "metric" or model.config.model_type in METRIC:
            near = 1 / near.clamp(min=1e-3)
        size, resize = (picture.height, picture.width), cast("Any", torch.nn.functional).interpolate
        near = resize(near, size=size, mode="bicubic", align_corners=False)[0, 0]
    return _stretched(near.numpy())


def _folder(name: str) -> Path:
    """The folder of a model: a path, or where huggingface_hub has downloaded a repository."""
    import huggingface_hub

    find = cast("Any", huggingface_hub).snapshot_download
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else Path(find(name, local_files_only=True))
    except Exception:  # huggingface_hub raises errors of many types for names and files, and a path may be no path
        remedy = "give a folder, or fetch it first with hf download"
        raise InputError(f"depth model {short_name(name)} is not on this machine: {remedy}") from None


def _pixels(picture: Image.Image, processing: Mapping[str, Any]) -> Any:
    """What a model sees, (1, 3, h, w), by the numbers of its preprocessor_config.json."""
    import torch

    given = as_object(processing.get("size")) or {}
    side = given.get("height") or given.get("shortest_edge") or MODEL_SIDE
    multiple = int(processing.get("ensure_multiple_of") or 32)
    scale = int(side) / min(picture.size)
    width, height = (max(multiple, round(length * scale / multiple) * multiple) for length in picture.size)
    small = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    mean, spread = processing.get("image_mean") or [0.5] * 3, processing.get("image_std") or [0.5] * 3
    values = (small - np.asarray(mean, np.float32)) / np.asarray(spread, np.float32)
    return torch.as_tensor(values.transpose(2, 0, 1).copy())[None]
