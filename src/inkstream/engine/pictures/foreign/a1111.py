"""Writes and reads the parameters text of A1111, and of the many programs that write one like it.

Read besides: Forge and its successors, SD.Next, stable-diffusion.cpp, Fooocus, Image Saver and other nodes of ComfyUI,
Civitai's generator. Facts: the source of each program's writer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inkstream.engine.pictures.foreign.reading import (
    A1111_SCHEDULES,
    A1111_SOLVERS,
    Reading,
    add_loras,
    find_model,
    find_schedule,
    find_solver,
    is_number,
    leftovers,
    take_loras,
    take_mask,
    take_size,
    take_variation,
)
from inkstream.families.names import named
from inkstream.types import LoraUse, Request, Variation, as_list, as_object

# Writing ------------------------------------------------------------------------------------------------------------


def write_a1111(request: Request, software: str, model: str | None = None) -> str:
    """The parameters text that A1111 and its successors show and read. Unset fields are left out.

    model: its name in the text; by default the request's; empty: none.
    """
    model = request.model if model is None else model
    spec = named(model)
    read = spec is not None and spec.guides == "read" and request.guidance is not None
    varied = None if request.variation is None else Variation.read(request.variation)
    pairs = {
        "Steps": request.steps,
        "Sampler": A1111_SOLVERS.get(request.solver or "", request.solver),
        "Schedule type": A1111_SCHEDULES.get(request.schedule or "", request.schedule),
        "CFG scale": 1 if read else request.guidance,
        "Distilled CFG Scale": request.guidance if read else None,
        "Shift": request.shift,
        "Seed": request.seed,
        "Variation seed": varied.seed if varied else None,
        "Variation seed strength": varied.strength if varied else None,
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Model": re.split(r"[/\\]", model.rstrip("/\\"))[-1],
        "Denoising strength": request.strength,
        "Version": software,
    }
    tags = [f"<lora:{Path(use.path).stem}:{use.strength:g}>" for use in map(LoraUse.read, request.loras)]
    lines = [" ".join([request.prompt, *tags])]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in pairs.items() if value not in (None, "")))
    return "\n".join(lines)


def _quote(value: Any) -> str:
    text = f"{value:.15g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


# Reading ------------------------------------------------------------------------------------------------------------

_NUMBERS = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Shift": "shift"}
_EMBEDDED = ("Distilled CFG Scale", "Guidance")
"""The guidance that a model reads as an input: in Forge, and in stable-diffusion.cpp."""
_TEMPLATES = ("Template:", "Negative template:", "Negative Template:")
"""Lines of extensions and of SD.Next between the prompts and the pairs, or behind the pairs."""
_UNUSED_STRENGTH = 0.75
"""stable-diffusion.cpp's default."""
_HARMLESS = re.compile(r"\bhash(es)?$|^(Version|App|Created Date|User)$", re.IGNORECASE)


def read_a1111(text: str) -> Reading | None:
    """Fields of a parameters text; None if the text is in another format.

    The format: a prompt of one or more lines, optionally a negative prompt, and a line of at least three `key: value`
    pairs. Behind it, there may be lines with the prompts' templates.
    """
    lines = text.rstrip().split("\n")
    split = _split(lines)
    if split is None:
        return None
    at, pairs = split
    reading = Reading()
    before = lines[:at]
    if "App" in pairs:  # SD.Next's templates may have several lines, and may equal the prompts
        first = next((index for index, line in enumerate(before) if line.startswith(_TEMPLATES)), at)
        before, templates = before[:first], "\n".join(before[first:])
    else:
        templates = "\n".join(lines[at + 1 :])
    _read_prompts(before, reading)
    if templates and templates.partition(":")[2].strip() != reading.fields["prompt"]:
        reading.ignored["template"] = templates
    for theirs, ours in {"Raw prompt": "prompt", "Raw negative prompt": "negative_prompt"}.items():
        if theirs in pairs:  # Fooocus: what the user typed; the text above has the styles' words too
            reading.fields[ours] = take_loras(str(pairs.pop(theirs)), reading)
    for theirs, ours in _NUMBERS.items():
        reading.fields[ours] = pairs.pop(theirs, None)
    if pairs.get("App") == "SD.Next":
        reading.both_scales(reading.fields["guidance"])
    for name in _EMBEDDED:
        if name in pairs:
            reading.embedded, reading.embedded_as = pairs.pop(name), name
    take_size(pairs.pop("Size", None), reading)
    take_variation(pairs, "Variation seed", "Variation seed strength", reading)
    take_mask(pairs, reading)
    if not any(key.startswith("Hires") for key in pairs):  # with Hires, the strength is that of the second pass
        reading.fields["strength"] = pairs.pop("Denoising strength", None)
    _read_names(pairs, reading)
    if details := as_object(pairs.pop("SDCPP", None)):
        _read_details(details, reading)
    add_loras([key[5:] for key in as_object(pairs.get("Hashes")) or {} if key.lower().startswith("lora:")], reading)
    leftovers({key: value for key, value in pairs.items() if not _HARMLESS.search(key)}, set(), reading)
    return reading


def _split(lines: list[str]) -> tuple[int, dict[str, Any]] | None:
    """The number of the line of pairs, and the pairs. It is the last line, or the last one before templates."""
    for at in range(len(lines) - 1, -1, -1):
        last = at == len(lines) - 1
        if (last or lines[at].startswith("Steps: ")) and len(pairs := dict(_pairs(lines[at]))) >= 3:
            return (at, pairs) if last or lines[at + 1].startswith(_TEMPLATES) else None
    return None


def _read_prompts(lines: list[str], reading: Reading) -> None:
    prompts: list[list[str]] = [[], []]
    negative = False
    for line in lines:
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:")
        prompts[negative].append(line.strip("\r"))
    for name, part in zip(("prompt", "negative_prompt"), prompts):
        reading.fields[name] = take_loras("\n".join(part).strip(), reading)


def _read_names(pairs: dict[str, Any], reading: Reading) -> None:
    """Reads the solver, the schedule and the model. Removes their pairs."""
    scheduler = str(pairs.pop("Scheduler", ""))  # a schedule, but in SD.Next a class of diffusers, which is a solver
    if scheduler.endswith("Scheduler"):
        find_solver(scheduler, reading)
    elif scheduler:
        find_schedule(scheduler, reading)
    for key, find in {"Sampler": find_solver, "Schedule type": find_schedule}.items():
        if key in pairs:
            find(pairs.pop(key), reading)
    names = [pairs.pop(key, None) for key in ("Unet", "UNet", "Model")]  # a transformer replaces the model's own
    names = [name for name in names if name][:1] + list(_checkpoints(pairs.get("Civitai resources")))
    if names:
        find_model(next((name for name in names if named(str(name))), names[0]), reading)


def _checkpoints(resources: Any) -> Iterator[str]:
    """The titles of the models in Civitai's list of resources: each with its version, then alone."""
    for entry in as_list(resources):
        resource = as_object(entry) or {}
        kind = resource.get("type") or (str(resource.get("air")).split(":") + [""] * 4)[3]
        title = str(resource.get("modelName", ""))
        if kind == "checkpoint" and title:
            yield f"{title} {resource.get('modelVersionName') or resource.get('versionName')}"
            yield title


def _read_details(details: Mapping[str, Any], reading: Reading) -> None:
    """Reads what stable-diffusion.cpp's JSON says beyond its text: the shift and the LoRAs.

    Every picture has a strength, also one without a start picture, and no picture says whether it had one.
    """
    sampling = as_object(details.get("sampling")) or {}
    if is_number(shift := sampling.get("flow_shift")):  # null: the model's own
        reading.fields["shift"] = shift
    if (strength := details.get("strength")) not in (None, _UNUSED_STRENGTH):
        reading.ignored["strength"] = strength
    entries = details.get("loras")
    loras = [as_object(entry) or {} for entry in as_list(entries)]
    add_loras([f"{lora.get('name')}:{lora.get('multiplier')}" for lora in loras], reading)


_KEY = re.compile(r"\s*([A-Za-z][^,:\"\n\[\]{}]{0,60}):\s*")


def _pairs(line: str) -> Iterator[tuple[str, Any]]:
    """The `key: value` pairs of a line, separated by commas. A value may be a JSON string, list or object."""
    at = 0
    while at < len(line):
        key = _KEY.match(line, at)
        end = line.find(",", key.end() if key else at)
        end = len(line) if end < 0 else end
        if key:
            value: Any = line[key.end() : end].strip()
            if value[:1] and value[0] in '"[{':
                try:
                    value, end = json.JSONDecoder().raw_decode(line, key.end())
                    end = line.find(",", end) if line.find(",", end) >= 0 else len(line)
                except (ValueError, RecursionError):
                    pass
            yield key.group(1).strip(), value
        at = end + 1
