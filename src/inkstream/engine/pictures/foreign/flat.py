"""Reads settings that lie flat in JSON or in texts of their own: SwarmUI, InvokeAI, mflux, Draw Things and others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from inkstream.engine.pictures.foreign.reading import (
    Reading,
    add_loras,
    find_model,
    is_number,
    leftovers,
    parse_json,
    take,
    take_size,
    take_variation,
)
from inkstream.families.names import named
from inkstream.types import as_list, as_object

_SIZED = {"prompt": "prompt", "seed": "seed", "steps": "steps", "width": "width", "height": "height"}
_SECTIONS = re.compile(r"<(segment|object|region|refiner|base|video|extend)[:>]", re.IGNORECASE)
"""Where SwarmUI's prompt turns to another part of the picture or another pass."""


def read_swarmui(data: Mapping[str, Any]) -> Reading | None:
    """Fields of SwarmUI's object `sui_image_params`. Its cfgscale is our guidance; its creativity is our strength."""
    params = as_object(data.get("sui_image_params"))
    if params is None:
        return None
    reading = Reading()
    names = {
        **_SIZED,
        "negativeprompt": "negative_prompt",
        "cfgscale": "guidance",
        "sigmashift": "shift",
        "initimagecreativity": "strength",
        "sampler": "solver",
        "comfyuisampler": "solver",
        "scheduler": "schedule",
        "comfyuischeduler": "schedule",
        "model": "model",
    }
    params = dict(params)
    take_variation(params, "variationseed", "variationseedstrength", reading)
    take(params, names, reading)
    prompt = reading.fields.get("prompt")
    if isinstance(prompt, str) and (section := _SECTIONS.search(prompt)):
        reading.fields["prompt"] = prompt[: section.start()].rstrip()
        reading.ignored["prompt_sections"] = prompt[section.start() :]
    if "fluxguidancescale" in params:
        reading.embedded, reading.embedded_as = params["fluxguidancescale"], "fluxguidancescale"
    harmless = {"aspectratio", "images", "imageformat", "nopreviews", "swarm_version", "date", "generation_time"}
    harmless |= {"automaticvae", "wildcardseed", "fluxguidancescale", "loras", "loraweights"}
    loras, weights = (as_list(params.get(key)) for key in ("loras", "loraweights"))
    add_loras([f"{lora}:{weight}" for lora, weight in zip_longest(loras, weights[: len(loras)], fillvalue=1)], reading)
    leftovers(params, set(names) | harmless, reading)
    return reading


def read_invokeai(data: Mapping[str, Any]) -> Reading | None:
    """Fields of InvokeAI's chunk `invokeai_metadata`. The model reads its `guidance`; its cfg_scale is our guidance.

    A name of a scheduler is a solver's.
    """
    if not {"positive_prompt", "app_version", "generation_mode"} & data.keys():
        return None
    reading = Reading()
    names = {
        **_SIZED,
        "positive_prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "cfg_scale": "guidance",
        "strength": "strength",
        "scheduler": "solver",
    }
    take(data, names, reading)
    if is_number(shift := data.get("z_image_shift")):  # otherwise "auto"
        reading.fields["shift"] = shift
    if data.get("guidance") is not None:
        reading.embedded, reading.embedded_as = data["guidance"], "guidance"
    model = data.get("model")
    if described := as_object(model):
        model = described.get("name") or described.get("model_name")
    if model:
        find_model(model, reading)
    off = {f"z_image_seed_variance_{name}" for name in ("enabled", "strength")}
    if data.get("z_image_seed_variance_enabled"):
        reading.fields["seed_variance"] = data.get("z_image_seed_variance_strength")
    if not data.get("z_image_seed_variance_enabled") or data.get("z_image_seed_variance_randomize_percent") == 50:
        off |= {"z_image_seed_variance_randomize_percent"}
    off |= {"dype_preset"} if data.get("dype_preset") == "off" else set()
    harmless = {"app_version", "generation_mode", "rand_device", "model", "canvas_v2_metadata", "guidance", "loras"}
    for lora in map(as_object, as_list(data.get("loras"))):
        file = as_object((lora or {}).get("model") or (lora or {}).get("lora")) or {}
        add_loras([f"{file.get('name') or file.get('model_name')}:{(lora or {}).get('weight', 1)}"], reading)
    leftovers(data, set(names) | harmless | off | {"z_image_shift"}, reading)
    return reading


def read_mflux(data: Mapping[str, Any]) -> Reading | None:
    """Fields of the JSON in mflux's EXIF comment.

    image_strength is the share of the start picture that stays: our strength is 1 - image_strength. With Z-Image, a
    guidance g above 1 is our guidance g + 1, because mflux adds g times the difference to the prompt's prediction; any
    other g means no guidance. With the other models, mflux means by guidance what the model does.
    """
    if "mflux_version" not in data:
        return None
    reading = Reading()
    names = {**_SIZED, "negative_prompt": "negative_prompt", "model": "model"}
    take(data, names, reading)
    guidance, kept = data.get("guidance"), data.get("image_strength")
    spec = named(str(data.get("model")))
    if is_number(guidance) and spec is not None and (spec.repo or "").startswith("Tongyi-MAI/"):
        reading.fields["guidance"] = guidance + 1 if guidance > 1 else 1
    elif is_number(guidance):
        reading.both_scales(guidance)
    if is_number(kept):
        reading.fields["strength"] = round(1 - kept, 6)
    harmless = {"mflux_version", "base_model", "guidance", "precision", "generation_time_seconds", "created_at"}
    leftovers(data, set(names) | harmless | {"image_strength"}, reading)
    return reading


def read_draw_things(data: Mapping[str, Any]) -> Reading | None:
    """Fields of Draw Things' JSON. `v2` holds the whole configuration of the app, also of what is off.

    scale is also read by the model, unless the app's speed-up is off: then the model reads `guidanceEmbed`.
    """
    if not {"c", "uc", "seed_mode"} <= data.keys():
        return None
    reading = Reading()
    names = {"c": "prompt", "uc": "negative_prompt", "seed": "seed", "steps": "steps", "sampler": "solver"}
    take(data, {**names, "shift": "shift", "model": "model"}, reading)
    whole = as_object(data.get("v2")) or {}
    reading.both_scales(data.get("scale"))
    if whole.get("speedUpWithGuidanceEmbed") is False:
        reading.embedded, reading.embedded_as = whole.get("guidanceEmbed"), "guidanceEmbed"
    spec = named(str(data.get("model")))
    if whole.get("resolutionDependentShift") is True and spec is not None and spec.shift_rule != "fixed":
        reading.fields.pop("shift", None)  # the model's own rule, not the number, was used
    take_size(data.get("size"), reading)
    if is_number(strength := data.get("strength")) and strength < 1:  # 1 starts from noise alone
        reading.fields["strength"] = strength
    harmless = {"v2", "scale", "size", "strength", "seed_mode", "shift", "model", "profile"}
    leftovers(data, set(names) | harmless, reading)
    return reading


def read_fooocus(data: Mapping[str, Any]) -> Reading | None:
    """Fields of the JSON that Fooocus keeps under `parameters`, or in EXIF. Its prompt is without the styles' words."""
    if not {"adm_guidance", "metadata_scheme", "base_model"} & data.keys():
        return None
    reading = Reading()
    names = {
        **_SIZED,
        "negative_prompt": "negative_prompt",
        "guidance_scale": "guidance",
        "sampler": "solver",
        "scheduler": "schedule",
        "base_model": "model",
    }
    take(data, names, reading)
    take_size(data.get("resolution"), reading)
    harmless = {"resolution", "metadata_scheme", "version", "created_by", "full_prompt", "full_negative_prompt"}
    harmless |= {"base_model_hash", "refiner_model_hash"}
    loras = [str(value) for key, value in data.items() if key.startswith("lora_combined_")]
    if loras:
        add_loras(loras, reading)
        harmless |= {key for key in data if key.startswith("lora")}
    if data.get("refiner_model") == "None":
        harmless |= {"refiner_model", "refiner_switch"}
    leftovers(data, set(names) | harmless, reading)
    return reading


def read_civitai(data: Mapping[str, Any]) -> Reading | None:
    """Fields of `extraMetadata`, which Civitai's ComfyUI keeps beside a graph. It names models by number alone."""
    given = data.get("extraMetadata")
    extra = as_object(parse_json(given) if isinstance(given, str) else given)
    if extra is None or "prompt" not in extra:
        return None
    reading = Reading()
    names = {
        **_SIZED,
        "negativePrompt": "negative_prompt",
        "cfgScale": "guidance",
        "sampler": "solver",
        "scheduler": "schedule",
    }
    take(extra, names, reading)
    if is_number(denoise := extra.get("denoise")) and denoise < 1:
        reading.fields["strength"] = denoise
    leftovers(extra, set(names) | {"denoise", "workflow", "workflowId"}, reading)
    return reading


def read_ruined_fooocus(data: Mapping[str, Any]) -> Reading | None:
    """Fields of RuinedFooocus' JSON under `parameters`."""
    if data.get("software") != "RuinedFooocus":
        return None
    reading = Reading()
    names = {
        **_SIZED,
        "Prompt": "prompt",
        "Negative": "negative_prompt",
        "cfg": "guidance",
        "sampler_name": "solver",
        "scheduler": "schedule",
        "base_model_name": "model",
        "denoise": "strength",
    }
    take(data, names, reading)
    leftovers(data, set(names) | {"software", "base_model_hash", "start_step"}, reading)
    if data.get("start_step"):
        reading.ignored["start_step"] = data["start_step"]
    return reading


_ONE_EACH = {
    **_SIZED,
    "negative_prompt": "negative_prompt",
    "negative-prompt": "negative_prompt",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "scale": "guidance",
    "prompt_strength": "strength",
    "sampler_name": "solver",
    "sampler": "solver",
    "scheduler_name": "schedule",
    "use_stable_diffusion_model": "model",
}
"""Name of a text -> our field: of Easy Diffusion, and of sd-scripts."""


def read_texts_of_settings(texts: Mapping[str, str]) -> Reading | None:
    """Fields of a picture with one text for each setting, as Easy Diffusion and sd-scripts write them."""
    if not {"prompt", "seed"} <= texts.keys() or not {"steps", "num_inference_steps"} & texts.keys():
        return None
    reading = Reading()
    take(texts, _ONE_EACH, reading)
    if "distilled_guidance_scale" in texts:
        reading.embedded, reading.embedded_as = texts["distilled_guidance_scale"], "distilled_guidance_scale"
    harmless = {"distilled_guidance_scale", "used_random_seed", "num_outputs", "vram_usage_level", "output_format"}
    none = {key: value for key, value in texts.items() if value not in ("None", "False", "[]")}
    leftovers(none, set(_ONE_EACH) | harmless, reading)
    return reading


def read_makers_tags(texts: Mapping[str, str]) -> Reading | None:
    """The prompt and the model in the EXIF tags of Black Forest Labs' own programs. They say no more."""
    if texts.get("Make") != "Black Forest Labs":
        return None
    reading = Reading({"prompt": texts.get("ImageDescription", "")})
    if model := texts.get("Model"):
        find_model(model, reading)
    return reading
