"""Reads the graph that ComfyUI writes into pictures as fields of a Request. The graph is untrusted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from inkstream.engine.pictures.foreign.reading import (
    Reading,
    as_number,
    find_model,
    find_schedule,
    find_solver,
    is_number,
    parse_json,
    take_loras,
)
from inkstream.engine.pictures.foreign.workflow import Node, to_prompt
from inkstream.types import as_list, as_object

_PROMPTS = ("text", "prompt", "user_prompt", "t5xxl", "text_g", "clip_l", "populated_text")
_VALUES = ("value", "text", "string", "int", "float", "number", "seed", "noise_seed", "populated_text", "prompt")
_JOINED = re.compile(r"(text|string|str|prompt)_?([a-h]|\d)")
"""The inputs of nodes that join texts."""
_REWRITES = re.compile(
    "replace|regex|generat|translat|caption|florence|interrogat|llm|trim|extract|format", re.IGNORECASE
)
"""Classes of nodes that give another text than they get."""
_MODELS = ("unet_name", "ckpt_name", "gguf_name", "model_name", "model_path", "base_ckpt_name")
_MODEL_FILE = re.compile(r"\.(safetensors|sft|gguf|ckpt)$", re.IGNORECASE)
_SAMPLER = frozenset((
    "steps", "cfg", "guidance", "seed", "noise_seed", "sampler", "sampler_name", "scheduler", "denoise", "add_noise",
    "start_at_step", "end_at_step", "return_with_leftover_noise", "control_after_generate", "preview_method",
    "vae_decode", "positive", "negative", "link_id", "image_output", "save_prefix",
))  # fmt: skip
"""The settings of a sampler that are read, and those that do not change the picture."""
_CHAIN = 1000
"""The most nodes that are followed along one chain of links."""
_PASSED = 100
"""The most nodes in a row that only pass a link on."""
_LONGEST_TEXT = 100_000
_DEFAULT_EMBEDDED = 3.5
"""What ComfyUI gives to a model that reads its guidance where the graph says nothing."""


def read_comfyui(data: Mapping[str, Any]) -> Reading | None:
    """Fields of a graph: follows the links from the saved picture back to the first sampler.

    data: the graph to run, which ComfyUI keeps under `prompt`; or the graph of its page, kept under `workflow`; or an
    object with either or both. None if no sampler is found. Samplers that work on the first sampler's result are noted
    as ignored.
    """
    for given in (data, data.get("prompt"), data.get("workflow")):
        graph = as_object(parse_json(given) if isinstance(given, str) else given) or {}
        if isinstance(graph.get("nodes"), list):
            graph = to_prompt(graph)
        if (reading := _read(graph)) is not None:
            return reading
    return None


def _read(graph: Mapping[str, Any]) -> Reading | None:
    found = {key: as_object(node) for key, node in graph.items()}
    nodes = {key: node for key, node in found.items() if node and as_object(node.get("inputs")) is not None}
    reading = Reading()
    sampler = _first_sampler(nodes, reading)
    if sampler is None:
        return None
    inputs = sampler["inputs"]
    guider = _linked(nodes, inputs.get("guider")) or {"inputs": {}}
    noise = _linked(nodes, inputs.get("noise")) or {"inputs": {}}
    settings = {**guider["inputs"], **noise["inputs"], **inputs}
    if "sigmas" in inputs:
        sigmas = next((n for n in _upstream(nodes, inputs["sigmas"]) if "steps" in n["inputs"]), None)
        if sigmas:
            settings = {**settings, **{k: sigmas["inputs"].get(k) for k in ("steps", "denoise", "scheduler")}}
            settings["scheduler"] = settings["scheduler"] or _class(sigmas)
        elif node := _linked(nodes, inputs["sigmas"]):
            reading.ignored["sigmas"] = _class(node)
    if chosen := _linked(nodes, inputs.get("sampler")):
        settings["sampler_name"] = chosen["inputs"].get("sampler_name", _class(chosen))
    elif isinstance(inputs.get("sampler"), str):
        settings["sampler_name"] = inputs["sampler"]
    pipe = inputs.get("pipe")  # of nodes that pass the model, the texts and the latents along one link
    if "guider" in inputs and "cfg" not in settings:
        settings["cfg"] = settings.get("cfg_conds", 1)
    if "cfg_cond2_negative" in settings:
        reading.ignored["guider"] = _class(guider)  # it has a second prompt and a second scale

    for theirs, ours in {"steps": "steps", "cfg": "guidance", "seed": "seed", "noise_seed": "seed"}.items():
        if theirs in settings:
            _read_value(nodes, settings[theirs], theirs, ours, reading)
    for theirs, find in {"sampler_name": find_solver, "scheduler": find_schedule}.items():
        if name := _value(nodes, settings.get(theirs), theirs):
            find(name, reading)
    positive = next((settings[name] for name in ("positive", "conditioning", "cond1") if name in settings), pipe)
    _read_embedded(nodes, sampler, positive, reading)
    for name, link in {"prompt": positive, "negative_prompt": settings.get("negative", pipe)}.items():
        # A text that is both prompts has its tags once.
        noted = Reading({}) if name == "negative_prompt" and link == positive else reading
        reading.fields[name] = take_loras(_prompt(nodes, link, name, reading), noted)
    if reading.fields["prompt"] is None and (chain := list(_conditionings(nodes, positive))):
        texts = [node for key in _PROMPTS if (node := _linked(nodes, chain[-1]["inputs"].get(key)))]
        reading.ignored["prompt"] = f"a text from {_class((texts or chain[-1:])[0])} that could not be followed"
    elif reading.fields["prompt"] is None:
        reading.ignored["prompt"] = f"a text for {_class(sampler)} that could not be found"
    first, last = (as_number(_value(nodes, settings.get(name), name)) for name in ("start_at_step", "end_at_step"))
    if first:
        reading.ignored["start_at_step"] = first
    if last is not None and last < (as_number(reading.fields.get("steps")) or math.inf):
        reading.ignored["end_at_step"] = last
    start = inputs.get("latent_image", pipe)
    _read_start(nodes, start, as_number(_value(nodes, settings.get("denoise"), "denoise")), reading)
    _read_model(nodes, settings.get("model", pipe), reading)
    for name, value in inputs.items():
        if name not in _SAMPLER and not isinstance(value, list) and value not in (None, "", False):
            reading.ignored.setdefault(name, value)
    return reading


def _class(node: Node) -> str:
    return str(node.get("class_type", "?"))


def _follow(nodes: Mapping[str, Node], value: Any) -> tuple[Node, Any] | None:
    """The node that a link points to, and its output, behind nodes that only pass the link on.

    None if `value` is not a link or the node does not exist.
    """
    for _ in range(_PASSED):
        link = as_list(value)
        node = nodes.get(str(link[0])) if len(link) == 2 and isinstance(link[0], str | int) else None
        if node is None:
            return None
        value = _passed(nodes, node)
        if value is None:
            return node, link[1]
    return None


def _linked(nodes: Mapping[str, Node], value: Any) -> Node | None:
    found = _follow(nodes, value)
    return found and found[0]


def _passed(nodes: Mapping[str, Node], node: Node) -> Any:
    """The link that a node passes on unchanged; None if the node does more than that, or its choice is not known."""
    kind, inputs = _class(node), node["inputs"]
    if "Reroute" in kind or kind == "Any Switch (rgthree)":
        return next((cast("list[Any]", value) for value in inputs.values() if isinstance(value, list)), None)
    if {"on_false", "on_true", "switch"} <= inputs.keys():
        switch = inputs["switch"]
        if isinstance(switch, list) and switch:
            source = nodes.get(str(switch[0])) if isinstance(switch[0], str | int) else None
            switch = source and source["inputs"].get("value")
        return inputs["on_true" if switch else "on_false"] if isinstance(switch, bool) else None
    return inputs.get(f"input{inputs['select']}") if is_number(inputs.get("select")) else None


def _upstream(nodes: Mapping[str, Node], *links: Any) -> Iterator[Node]:
    """Every node that the links depend on, once each, in depth-first order: the nearest node of a chain first."""
    seen: set[int] = set()
    pending = list(reversed(links))
    while pending:
        node = _linked(nodes, pending.pop())
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            yield node
            pending.extend(reversed(list(node["inputs"].values())))


def _first_sampler(nodes: Mapping[str, Node], reading: Reading) -> Node | None:
    """The sampler farthest upstream of the saved picture. Later samplers are noted as ignored."""

    def is_sampler(node: Node) -> bool:
        return "latent_image" in node["inputs"] or {"steps", "cfg", "sampler_name", "pipe"} <= node["inputs"].keys()

    def samplers(*links: Any) -> Iterator[Node]:
        return filter(is_sampler, _upstream(nodes, *links))

    saved = [node for node in nodes.values() if re.search("save|preview", _class(node), re.IGNORECASE)]
    links = [value for node in saved for value in node["inputs"].values()]
    anywhere = filter(is_sampler, nodes.values())
    chain = [sampler] if (sampler := next(samplers(*links), None) or next(anywhere, None)) else []
    while 0 < len(chain) < 20:
        before = next(samplers(chain[-1]["inputs"].get("latent_image")), None)
        if before is None or any(before is node for node in chain):
            break
        chain.append(before)
    if chain[:-1]:
        reading.ignored["later_samplers"] = [_class(node) for node in chain[:-1]]
    return chain[-1] if chain else None


def _value(nodes: Mapping[str, Node], value: Any, name: str) -> Any:
    """A setting's value, followed through nodes that only pass a value on; None if its source cannot be read."""
    for _ in range(_CHAIN):
        if not isinstance(value, list):
            return None if isinstance(value, dict) else value
        node = _linked(nodes, value)
        value = next((node["inputs"][k] for k in (name, *_VALUES) if k in node["inputs"]), None) if node else None
    return None


def _read_value(nodes: Mapping[str, Node], value: Any, theirs: str, ours: str, reading: Reading) -> None:
    """Sets a field to a setting's value. If it comes from a node that cannot be read, this is noted as ignored."""
    reading.fields[ours] = _value(nodes, value, theirs)
    if reading.fields[ours] is None and (node := _linked(nodes, value)):
        reading.ignored[ours] = f"a value from {_class(node)} that could not be followed"


def _text(
    nodes: Mapping[str, Node], value: Any, known: dict[int, str | None] | None = None, depth: int = 0
) -> str | None:
    """A text, followed through string nodes and concatenations.

    known: cache of texts by node id. None if the source cannot be read, is nested too deep or gives too long a text.
    """
    known = {} if known is None else known
    if isinstance(value, str):
        return value
    node = _linked(nodes, value)
    if node is None or depth > 100:
        return None
    if id(node) not in known:
        inputs = node["inputs"]
        joined = sorted(key for key in inputs if _JOINED.fullmatch(key))
        if len(joined) > 1:
            parts = [_text(nodes, inputs[key], known, depth + 1) for key in joined]
            between = inputs.get("delimiter", inputs.get("separator", ""))
            text = None if None in parts else str(between).join(part for part in parts if part)
        else:
            given = [inputs[key] for key in (*_PROMPTS, *_VALUES) if key in inputs]
            given = given or (list(inputs.values()) if len(inputs) == 1 else [])
            followed = given and not _REWRITES.search(_class(node))
            text = _text(nodes, given[0], known, depth + 1) if followed else None
        known[id(node)] = text if text is not None and len(text) <= _LONGEST_TEXT else None
    return known[id(node)]


def _read_embedded(nodes: Mapping[str, Node], sampler: Node, link: Any, reading: Reading) -> None:
    """Reads the guidance that nodes give to the model: the nearest to the sampler counts."""
    reading.embedded = _DEFAULT_EMBEDDED
    for node in (sampler, *_conditionings(nodes, link)):
        if "DisableGuidance" in _class(node):
            reading.embedded, reading.ignored["guidance"] = None, f"{_class(node)}: the model reads none"
            return
        if "guidance" in node["inputs"]:
            reading.embedded, reading.embedded_as = _value(nodes, node["inputs"]["guidance"], "guidance"), _class(node)
            return


def _conditionings(nodes: Mapping[str, Node], link: Any) -> Iterator[Node]:
    """The nodes of a chain of conditionings, from the sampler to the text. Only the first of several inputs counts."""
    for _ in range(_CHAIN):
        found = _follow(nodes, link)
        if found is None:
            return
        node, output = found
        yield node
        inputs = node["inputs"]
        if any(_text(nodes, inputs.get(key)) is not None for key in _PROMPTS):
            return
        if {"positive", "negative"} <= inputs.keys():  # both pass through this node: output 1 is the negative
            link = inputs["negative" if output == 1 else "positive"]
        else:
            link = next((v for k, v in inputs.items() if k.startswith("cond") and _linked(nodes, v)), None)


def _prompt(nodes: Mapping[str, Node], link: Any, name: str, reading: Reading) -> str | None:
    """The text of a conditioning. The nodes that change or combine it on its way are noted as ignored."""
    for node in _conditionings(nodes, link):
        if "ZeroOut" in _class(node):
            return None
        inputs = node["inputs"]
        texts = {key: text for key in _PROMPTS if (text := _text(nodes, inputs.get(key))) is not None}
        if texts:
            chosen = next(iter(texts.values()))
            reading.ignored |= {key: text for key, text in texts.items() if text not in (chosen, "")}
            return chosen
        both = inputs.get("positive" if name == "prompt" else "negative")
        if isinstance(both, str):  # a loader that encodes both texts
            return both
        for picture in _pictures(nodes, node):
            if picture not in (told := reading.ignored.setdefault("references", [])):
                told.append(picture)
        if "guidance" not in inputs:
            reading.ignored.setdefault("conditioning", []).append(_class(node))
    return None


def _pictures(nodes: Mapping[str, Node], node: Node) -> list[Any]:
    """The files whose latents a node adds to a conditioning, as references."""
    found = _upstream(nodes, node["inputs"].get("latent")) if "Reference" in _class(node) else ()
    return [_value(nodes, n["inputs"].get("image"), "image") for n in found if "LoadImage" in _class(n)]


def _read_start(nodes: Mapping[str, Node], link: Any, denoise: float | None, reading: Reading) -> None:
    """Reads the size of an empty latent, or the name and strength of the start picture."""
    for node in _upstream(nodes, link):
        inputs = node["inputs"]
        if {"width", "height"} <= inputs.keys() and "empty" in _class(node).lower():
            for side in ("width", "height"):
                _read_value(nodes, inputs[side], side, side, reading)
            batch = _value(nodes, inputs.get("batch_size"), "batch_size")
            if batch not in (None, 1):
                reading.ignored["batch_size"] = batch
            if denoise is not None and denoise < 1:
                reading.ignored["denoise"] = denoise
            return
        if {"empty_latent_width", "empty_latent_height"} <= inputs.keys():
            for side in ("width", "height"):
                _read_value(nodes, inputs[f"empty_latent_{side}"], side, side, reading)
            return
        if "LoadImage" in _class(node):
            reading.ignored["image"] = _value(nodes, inputs.get("image"), "image")
            if denoise is not None and denoise < 1:  # otherwise only the picture's size was used
                reading.fields["strength"] = denoise
            return
    if node := _linked(nodes, link):
        reading.ignored["size"] = f"a size from {_class(node)} that could not be followed"


def _read_model(nodes: Mapping[str, Node], link: Any, reading: Reading) -> None:
    """Reads the model, the shift, and the names of LoRAs and patches on the way to the model."""
    for _ in range(_CHAIN):
        node = _linked(nodes, link)
        if node is None:
            return
        inputs = node["inputs"]
        names = [inputs[key] for key in _MODELS if key in inputs]
        if not names and "model" not in inputs:  # a loader that is not known
            names = [value for value in inputs.values() if isinstance(value, str) and _MODEL_FILE.search(value)]
        given = [as_object(value) or {} for value in inputs.values()]
        loras: list[Any] = [value["lora"] for value in given if value.get("on") and "lora" in value]
        if (lora := inputs.get("lora_name")) not in (None, "None", ""):
            loras.append(f"{lora}:{inputs.get('strength_model', inputs.get('lora_model_strength', 1))}")
        if loras:
            reading.ignored.setdefault("loras", []).extend(loras)
        if names and not ("lora" in _class(node).lower() and "model" in inputs):
            find_model(_value(nodes, names[0], "model_name") or f"of a node {_class(node)}", reading)
            return
        if "shift" in inputs:
            if "shift" not in reading.fields:
                _read_value(nodes, inputs["shift"], "shift", "shift", reading)
        elif {"base_shift", "max_shift", "width", "height"} <= inputs.keys():
            _read_dynamic_shift(nodes, inputs, reading)
        elif not loras and "lora" not in _class(node).lower():
            reading.ignored.setdefault("model_patches", []).append(_class(node))
        link = inputs.get("model")


def _read_dynamic_shift(nodes: Mapping[str, Node], inputs: Mapping[str, Any], reading: Reading) -> None:
    """ModelSamplingFlux: e to the power of a line through base_shift at 256 tokens and max_shift at 4096."""
    numbers = [as_number(_value(nodes, inputs[name], name)) for name in ("base_shift", "max_shift", "width", "height")]
    low, high, width, height = (math.nan if number is None else number for number in numbers)
    exponent = low + (high - low) * (width * height / 256 - 256) / (4096 - 256)
    if -5 < exponent < 5:
        reading.fields.setdefault("shift", round(math.exp(exponent), 6))
    else:
        reading.ignored["shift"] = [inputs["base_shift"], inputs["max_shift"]]
