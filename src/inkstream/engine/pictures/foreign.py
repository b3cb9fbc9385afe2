"""Reads the metadata of A1111, SwarmUI, InvokeAI, mflux and Fooocus as fields of a Request. All of it is untrusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard, get_args

from inkstream.families import SPECS
from inkstream.types import Request, ScheduleName, SolverName, as_object


class Reading(NamedTuple):
    """Fields for a Request, not yet validated; and ignored settings, by their name in the other program."""

    fields: dict[str, Any]
    ignored: dict[str, Any]


# Names --------------------------------------------------------------------------------------------------------------

A1111_SOLVERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "res_multistep": "Res Multistep",
    "lcm": "LCM",
}
A1111_SCHEDULES = {"simple": "Simple", "sgm_uniform": "SGM Uniform", "normal": "Normal", "beta": "Beta"}


def _plain(name: str) -> str:
    """A name in lower case without spaces and punctuation: `DPM++ 2M` and `dpmpp_2m` give the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


_SOLVERS: dict[str, str] = {
    **{_plain(name): name for name in get_args(SolverName)},
    **{_plain(theirs): ours for ours, theirs in A1111_SOLVERS.items()},
}
_SCHEDULES: dict[str, str] = {_plain(name): name for name in get_args(ScheduleName)}

_PRECISION = re.compile(
    r"[-_. ](bf16|fp16|fp32|fp8|nvfp4|int8|int4|e4m3fn|e5m2|scaled|mixed|convrot|q\d(_[01k](_[smlx]+)?)?)$"
)
"""Endings of file names that say in which precision a model is stored."""


def find_solver(name: Any, reading: Reading) -> None:
    """Sets `solver` to our solver of that name. A folder is dropped: `exponential/res_2s` is res_2s."""
    _find("solver", str(name).rpartition("/")[2], _SOLVERS, reading)


def find_schedule(name: Any, reading: Reading) -> None:
    """Sets `schedule` to our schedule of that name. "Automatic" leaves the field unset."""
    if _plain(str(name)) != "automatic":
        _find("schedule", str(name), _SCHEDULES, reading)


def _find(field: str, name: str, known: Mapping[str, str], reading: Reading) -> None:
    if _plain(name) in known:
        reading.fields[field] = known[_plain(name)]
    else:
        reading.ignored[field] = name


def find_model(name: Any, reading: Reading) -> None:
    """Sets `model` to the known model of that file or repository name, in any precision. A finetune does not match."""
    stem = re.split(r"[/\\]", str(name)[:1000])[-1].lower()
    stem = re.sub(r"\.(safetensors|sft|gguf|ckpt|pt)$", "", stem)
    while shorter := _PRECISION.search(stem):
        stem = stem[: shorter.start()]
    for spec in SPECS.values():
        names = (spec.name, (spec.repo or spec.name).rpartition("/")[2])
        if _plain(stem) in map(_plain, names):
            reading.fields["model"] = spec.name
            return
    reading.ignored["model"] = name


_LORA = re.compile(r"<lora:([^<>]{1,300})>")


def take_loras(prompt: Any, reading: Reading) -> Any:
    """Removes `<lora:name:weight>` tags from a prompt. The tags are noted as ignored."""
    if isinstance(prompt, str) and (found := _LORA.findall(prompt)):
        reading.ignored.setdefault("loras", []).extend(found)
        prompt = _LORA.sub("", prompt).strip()
    return prompt


def parse_json(text: str) -> Any:
    """The value of a JSON text; None if the text is not JSON or is nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leftovers(data: Mapping[str, Any], known: set[str], reading: Reading) -> None:
    """Notes every setting outside `known` that has a value as ignored."""
    for key, value in data.items():
        if key not in known and value not in (None, "", [], {}, False):
            reading.ignored.setdefault(key, value)


# A1111, Forge, SD.Next, sd.cpp ---------------------------------------------------------------------------------------


def write_a1111(request: Request, software: str) -> str:
    """The parameters text that A1111 and its successors show and read. Unset fields are left out."""
    pairs = {
        "Steps": request.steps,
        "Sampler": A1111_SOLVERS.get(request.solver or "", request.solver),
        "Schedule type": A1111_SCHEDULES.get(request.schedule or "", request.schedule),
        "CFG scale": request.guidance,
        "Shift": request.shift,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Model": re.split(r"[/\\]", request.model.rstrip("/\\"))[-1],
        "Denoising strength": request.strength,
        "Version": software,
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in pairs.items() if value not in (None, "")))
    return "\n".join(lines)


def _quote(value: Any) -> str:
    text = f"{value:.15g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def read_a1111(text: str) -> Reading | None:
    """Fields of a parameters text; None if the text is in another format.

    The format: a prompt of one or more lines, optionally a negative prompt, and a last line of at least three
    `key: value` pairs.
    """
    lines = text.rstrip().split("\n")
    pairs = dict(_pairs(lines[-1]))
    if len(pairs) < 3:
        return None
    prompts: list[list[str]] = [[], []]
    negative = False
    for line in lines[:-1]:
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:")
        prompts[negative].append(line.strip("\r"))
    reading = Reading({}, {})
    for name, part in zip(("prompt", "negative_prompt"), prompts):
        reading.fields[name] = take_loras("\n".join(part).strip(), reading)
    for theirs, ours in {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Shift": "shift"}.items():
        reading.fields[ours] = pairs.pop(theirs, None)
    if size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(pairs.get("Size"))):
        reading.fields["width"], reading.fields["height"] = size.groups()
        del pairs["Size"]
    if not any(key.startswith("Hires") for key in pairs):  # with Hires, the strength is that of the second pass
        reading.fields["strength"] = pairs.pop("Denoising strength", None)
    for key, find in {"Sampler": find_solver, "Schedule type": find_schedule, "Model": find_model}.items():
        if key in pairs:
            find(pairs.pop(key), reading)
    _leftovers({k: v for k, v in pairs.items() if not re.search(r"\bhash(es)?$|^Version$", k)}, set(), reading)
    return reading


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


# Flat JSON: SwarmUI, InvokeAI, mflux, Fooocus -------------------------------------------------------------------------


def _take(data: Mapping[str, Any], names: Mapping[str, str], reading: Reading) -> None:
    """Copies the settings that have a value, under our names."""
    for theirs, ours in names.items():
        if data.get(theirs) is not None:
            reading.fields[ours] = take_loras(data[theirs], reading)


_SIZED = {"prompt": "prompt", "seed": "seed", "steps": "steps", "width": "width", "height": "height"}


def read_swarmui(data: Mapping[str, Any]) -> Reading | None:
    """Fields of SwarmUI's object `sui_image_params`. Its cfgscale is our guidance; its creativity is our strength."""
    params = as_object(data.get("sui_image_params"))
    if params is None:
        return None
    reading = Reading({}, {})
    names = {**_SIZED, "negativeprompt": "negative_prompt", "cfgscale": "guidance", "sigmashift": "shift"}
    _take(params, {**names, "initimagecreativity": "strength"}, reading)
    finders = {
        "sampler": find_solver,
        "comfyuisampler": find_solver,
        "scheduler": find_schedule,
        "comfyuischeduler": find_schedule,
        "model": find_model,
    }
    for key, find in finders.items():
        if params.get(key):
            find(params[key], reading)
    harmless = {
        "aspectratio",
        "images",
        "imageformat",
        "nopreviews",
        "swarm_version",
        "date",
        "generation_time",
        "automaticvae",
        "initimagecreativity",
        "wildcardseed",
    }
    _leftovers(params, set(names) | set(finders) | harmless, reading)
    return reading


def read_invokeai(data: Mapping[str, Any]) -> Reading | None:
    """Fields of InvokeAI's chunk `invokeai_metadata`. Its cfg_scale is our guidance for every model."""
    if not {"positive_prompt", "app_version", "generation_mode"} & data.keys():
        return None
    reading = Reading({}, {})
    names = {**_SIZED, "positive_prompt": "prompt", "negative_prompt": "negative_prompt", "cfg_scale": "guidance"}
    _take(data, {**names, "strength": "strength"}, reading)
    if data.get("scheduler"):
        find_solver(data["scheduler"], reading)
    model = data.get("model")
    if named := as_object(model):
        find_model(named.get("name") or named.get("model_name"), reading)
    elif model:
        find_model(model, reading)
    harmless = {"app_version", "generation_mode", "rand_device", "scheduler", "model", "strength", "canvas_v2_metadata"}
    _leftovers(data, set(names) | harmless, reading)
    return reading


def read_mflux(data: Mapping[str, Any]) -> Reading | None:
    """Fields of the JSON in mflux's EXIF comment.

    image_strength is the share of the start picture that stays: our strength is 1 - image_strength. With Z-Image, a
    guidance g above 1 is our guidance g + 1, because mflux adds g times the difference to the prompt's prediction; any
    other g means no guidance. With other models mflux's guidance means something else and is ignored.
    """
    if "mflux_version" not in data:
        return None
    reading = Reading({}, {})
    names = {**_SIZED, "negative_prompt": "negative_prompt"}
    _take(data, names, reading)
    model, guidance, kept = data.get("model"), data.get("guidance"), data.get("image_strength")
    if model:
        find_model(model, reading)
    if is_number(guidance):
        if _plain(str(model)).startswith("tongyimaizimage"):
            reading.fields["guidance"] = guidance + 1 if guidance > 1 else 1
        else:
            reading.ignored["guidance"] = guidance
    if is_number(kept):
        reading.fields["strength"] = round(1 - kept, 6)
    harmless = {
        "mflux_version",
        "model",
        "base_model",
        "guidance",
        "precision",
        "generation_time_seconds",
        "created_at",
        "image_strength",
    }
    _leftovers(data, set(names) | harmless, reading)
    return reading


def read_fooocus(data: Mapping[str, Any]) -> Reading | None:
    """Fields of the JSON that Fooocus keeps under `parameters`."""
    if not {"adm_guidance", "metadata_scheme", "base_model"} & data.keys():
        return None
    reading = Reading({}, {})
    names = {**_SIZED, "negative_prompt": "negative_prompt", "guidance_scale": "guidance"}
    _take(data, names, reading)
    if size := re.fullmatch(r"\(?(\d{1,6}), ?(\d{1,6})\)?", str(data.get("resolution"))):
        reading.fields["width"], reading.fields["height"] = size.groups()
    for key, find in {"sampler": find_solver, "scheduler": find_schedule, "base_model": find_model}.items():
        if data.get(key):
            find(data[key], reading)
    harmless = {"resolution", "sampler", "scheduler", "base_model", "metadata_scheme", "version", "created_by"}
    harmless |= {"full_prompt", "full_negative_prompt", "base_model_hash", "refiner_model"}
    _leftovers(data, set(names) | harmless, reading)
    return reading
