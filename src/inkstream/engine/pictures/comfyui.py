"""Reads the graph that ComfyUI writes into pictures as fields of a Request. The graph is untrusted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from inkstream.engine.pictures.foreign import Reading, find_model, find_schedule, find_solver, is_number, take_loras
from inkstream.types import as_object

Node = dict[str, Any]
"""{"class_type": str, "inputs": {name: value, or [id of another node, number of its output]}}"""

_PROMPTS = ("text", "prompt", "user_prompt", "t5xxl", "text_g", "clip_l", "populated_text")
_VALUES = ("value", "text", "string", "int", "float", "number", "seed", "noise_seed", "populated_text", "prompt")
_CHAIN = 1000
"""The most nodes that are followed along one chain of links."""
_LONGEST_TEXT = 100_000


def read_comfyui(graph: Mapping[str, Any]) -> Reading | None:
    """Fields of the graph under `prompt`: follows the links from the saved picture back to the first sampler.

    None if no sampler is found. Samplers that work on the first sampler's result are noted as ignored.
    """
    graph = as_object(graph.get("prompt")) or graph
    found = {key: as_object(node) for key, node in graph.items()}
    nodes = {key: node for key, node in found.items() if node and as_object(node.get("inputs")) is not None}
    reading = Reading({}, {})
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
    if chosen := _linked(nodes, inputs.get("sampler")):
        settings["sampler_name"] = chosen["inputs"].get("sampler_name", _class(chosen))
    if "guider" in inputs and "cfg" not in settings:
        settings["cfg"] = 1

    for theirs, ours in {"steps": "steps", "cfg": "guidance", "seed": "seed", "noise_seed": "seed"}.items():
        if theirs in settings:
            reading.fields[ours] = _value(nodes, settings[theirs], theirs)
    for theirs, find in {"sampler_name": find_solver, "scheduler": find_schedule}.items():
        if name := _value(nodes, settings.get(theirs), theirs):
            find(name, reading)
    positive = settings.get("positive", settings.get("conditioning"))
    for name, link in {"prompt": positive, "negative_prompt": settings.get("negative")}.items():
        reading.fields[name] = take_loras(_prompt(nodes, link, reading), reading)
    if reading.fields["prompt"] is None and (node := _linked(nodes, positive)):
        reading.ignored["prompt"] = f"a text from {_class(node)} that could not be followed"
    if start := _value(nodes, settings.get("start_at_step"), "start_at_step"):
        reading.ignored["start_at_step"] = start
    _read_start(nodes, inputs.get("latent_image"), _value(nodes, settings.get("denoise"), "denoise"), reading)
    _read_model(nodes, settings.get("model"), reading)
    return reading


def _class(node: Node) -> str:
    return str(node.get("class_type", "?"))


def _linked(nodes: Mapping[str, Node], value: Any) -> Node | None:
    """The node that a link points to; None if `value` is not a link or the node does not exist."""
    link = cast("list[Any]", value) if isinstance(value, list) else []
    return nodes.get(str(link[0])) if len(link) == 2 and isinstance(link[0], str | int) else None


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

    def samplers(*links: Any) -> Iterator[Node]:
        return (node for node in _upstream(nodes, *links) if "latent_image" in node["inputs"])

    saved = [node for node in nodes.values() if re.search("save|preview", _class(node), re.IGNORECASE)]
    links = [value for node in saved for value in node["inputs"].values()]
    anywhere = (node for node in nodes.values() if "latent_image" in node["inputs"])
    chain = [sampler] if (sampler := next(samplers(*links), None) or next(anywhere, None)) else []
    while 0 < len(chain) < 20:
        before = next(samplers(chain[-1]["inputs"]["latent_image"]), None)
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
        if {"string_a", "string_b"} <= inputs.keys():
            parts = [_text(nodes, inputs[key], known, depth + 1) for key in ("string_a", "string_b")]
            text = None if None in parts else str(inputs.get("delimiter", "")).join(parts)  # type: ignore[arg-type]
        else:
            text = _text(nodes, next((inputs[k] for k in (*_PROMPTS, *_VALUES) if k in inputs), None), known, depth + 1)
        known[id(node)] = text if text is not None and len(text) <= _LONGEST_TEXT else None
    return known[id(node)]


def _prompt(nodes: Mapping[str, Node], link: Any, reading: Reading) -> str | None:
    """The text of a conditioning, followed through nodes that change or combine conditionings."""
    for _ in range(_CHAIN):
        node = _linked(nodes, link)
        if node is None or "ZeroOut" in _class(node):
            return None
        inputs = node["inputs"]
        for key in _PROMPTS:
            if key in inputs and (text := _text(nodes, inputs[key])) is not None:
                return text
        if {"positive", "negative"} <= inputs.keys():  # both pass through this node: output 1 is the negative
            link = inputs["negative" if link[1] == 1 else "positive"]
        else:
            link = next((v for k, v in inputs.items() if k.startswith("cond") and _linked(nodes, v)), None)
        reading.ignored.setdefault("conditioning", []).append(_class(node))
    return None


def _read_start(nodes: Mapping[str, Node], link: Any, denoise: Any, reading: Reading) -> None:
    """Reads the size of an empty latent, or the name and strength of the start picture."""
    for node in _upstream(nodes, link):
        inputs = node["inputs"]
        if "empty" in _class(node).lower() and {"width", "height"} <= inputs.keys():
            for side in ("width", "height"):
                reading.fields[side] = _value(nodes, inputs[side], side)
            batch = _value(nodes, inputs.get("batch_size"), "batch_size")
            if batch not in (None, 1):
                reading.ignored["batch_size"] = batch
            if is_number(denoise) and denoise < 1:
                reading.ignored["denoise"] = denoise
            return
        if "LoadImage" in _class(node):
            reading.ignored["image"] = _value(nodes, inputs.get("image"), "image")
            reading.fields["strength"] = denoise
            return


def _read_model(nodes: Mapping[str, Node], link: Any, reading: Reading) -> None:
    """Reads the model, the shift, and the names of LoRAs and patches on the way to the model."""
    for _ in range(_CHAIN):
        node = _linked(nodes, link)
        if node is None:
            return
        inputs = node["inputs"]
        names = [inputs[key] for key in ("unet_name", "ckpt_name", "gguf_name", "model_name") if key in inputs]
        if "lora" in _class(node).lower():
            given = [as_object(value) or {} for value in inputs.values()]
            loras: list[Any] = [value["lora"] for value in given if value.get("on") and "lora" in value]
            loras += [f"{inputs['lora_name']}:{inputs.get('strength_model', 1)}"] if "lora_name" in inputs else []
            reading.ignored.setdefault("loras", []).extend(loras)
        elif names:
            find_model(_value(nodes, names[0], "model_name"), reading)
            return
        elif "shift" in inputs:
            reading.fields.setdefault("shift", _value(nodes, inputs["shift"], "shift"))
        else:
            reading.ignored.setdefault("model_patches", []).append(_class(node))
        link = inputs.get("model")
