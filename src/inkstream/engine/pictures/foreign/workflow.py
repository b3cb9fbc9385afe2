"""Turns the graph of ComfyUI's page into the graph that it runs. The graph is untrusted.

Facts: the saved format of Comfy-Org's frontend, versions 0.4 and 1, and the order of the widgets in the nodes' source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from inkstream.types import as_list, as_object

Node = dict[str, Any]
"""{"class_type": str, "inputs": {name: value, or [id of another node, number of its output]}}"""

_NOTHING: Node = {}
"""A node or an input that does not exist."""

WIDGETS: Mapping[str, str] = {
    "BasicScheduler": "scheduler steps denoise",
    "CFGGuider": "cfg",
    "CheckpointLoaderSimple": "ckpt_name",
    "CLIPTextEncode": "text",
    "CLIPTextEncodeFlux": "clip_l t5xxl guidance",
    "ComfySwitchNode": "switch",
    "EmptyFlux2LatentImage": "width height batch_size",
    "EmptyLatentImage": "width height batch_size",
    "EmptySD3LatentImage": "width height batch_size",
    "Flux2Scheduler": "steps width height",
    "FluxGuidance": "guidance",
    "KSampler": "seed * steps cfg sampler_name scheduler denoise",
    "KSamplerAdvanced": "add_noise noise_seed * steps cfg sampler_name scheduler start_at_step end_at_step "
    "return_with_leftover_noise",
    "KSamplerSelect": "sampler_name",
    "LoadImage": "image",
    "LoraLoader": "lora_name strength_model strength_clip",
    "LoraLoaderModelOnly": "lora_name strength_model",
    "ModelSamplingAuraFlow": "shift",
    "ModelSamplingFlux": "max_shift base_shift width height",
    "ModelSamplingSD3": "shift",
    "NunchakuFluxDiTLoader": "model_path",
    "NunchakuZImageDiTLoader": "model_name",
    "PrimitiveBoolean": "value",
    "PrimitiveFloat": "value",
    "PrimitiveInt": "value",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "RandomNoise": "noise_seed",
    "SamplerCustom": "add_noise noise_seed * cfg",
    "StringConcatenate": "string_a string_b delimiter",
    "UNETLoader": "unet_name weight_dtype",
    "UnetLoaderGGUF": "unet_name",
    "UnetLoaderGGUFAdvanced": "unet_name",
}
"""Class -> its first widgets in the order of `widgets_values`. * is what the page does to the seed after a run."""
_CONTROL = ("fixed", "increment", "decrement", "randomize")
_VIRTUAL = ("PrimitiveNode", "Reroute", "GetNode", "SetNode", "Note", "MarkdownNote")
"""Classes of nodes that only the page has."""
_MUTED, _BYPASSED = 2, 4
_MOST_NODES = 5000
_DEEPEST = 10
"""The most levels of subgraphs."""
_CHAIN = 50
"""The most links that are followed from one input to its source."""


class Value(NamedTuple):
    """A value that an input gets from a widget elsewhere in the graph."""

    value: Any


@dataclass(frozen=True)
class Level:
    """The nodes of the page, or of one use of a subgraph, and their links."""

    prefix: str  # of its nodes' ids in the graph to run
    nodes: Mapping[str, Node]
    links: Mapping[str, tuple[str, int]]  # id of a link -> the node and the output that it comes from
    outputs: Mapping[int, str] = field(default_factory=dict[int, str])  # of a subgraph -> the link that leads there
    definition: Node = field(default_factory=dict[str, Any])  # of a subgraph
    outside: Level | None = None
    instance: Node = field(default_factory=dict[str, Any])  # the node outside that stands for the subgraph


def to_prompt(workflow: Mapping[str, Any]) -> dict[str, Node]:
    """The graph to run, with the same ids as ComfyUI gives. Muted nodes are left out, bypassed ones are passed by.

    Widgets of unknown classes are read where the node names all of them; otherwise only their links are.
    """
    definitions = {_id(sub.get("id")): sub for sub in _objects(as_object(workflow.get("definitions")), "subgraphs")}
    levels: dict[str, Level] = {}
    pending = [(_level(workflow, ""), 0)]
    count = 0
    while pending:
        level, depth = pending.pop()
        count += len(level.nodes)
        if count > _MOST_NODES:
            break
        levels[level.prefix] = level
        for key, node in level.nodes.items():
            definition = definitions.get(_id(node.get("type")))
            if definition is not None and depth < _DEEPEST and node.get("mode") not in (_MUTED, _BYPASSED):
                pending.append((_level(definition, f"{level.prefix}{key}:", level, node), depth + 1))
    return {
        f"{level.prefix}{key}": {"class_type": _id(node.get("type")), "inputs": _inputs(levels, level, node)}
        for level in levels.values()
        for key, node in level.nodes.items()
        if node.get("mode") not in (_MUTED, _BYPASSED)
        and _id(node.get("type")) not in _VIRTUAL
        and f"{level.prefix}{key}:" not in levels
    }


def _level(graph: Mapping[str, Any], prefix: str, outside: Level | None = None, instance: Node | None = None) -> Level:
    nodes = {_id(node.get("id")): node for node in _objects(graph, "nodes")}
    found = list(_links(graph))
    end = _id((as_object(graph.get("outputNode")) or {}).get("id"))
    return Level(
        prefix,
        nodes,
        {link: (origin, slot) for link, origin, slot, _, _ in found},
        {at: link for link, _, _, target, at in found if target == end} if outside else {},
        dict(graph) if outside else {},
        outside,
        instance or {},
    )


def _links(graph: Mapping[str, Any]) -> Iterator[tuple[str, str, int, str, int]]:
    """Id, origin, its output, target and its input of each link. A link is a list, or in newer files an object."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    links = graph.get("links")
    for given in as_list(links):
        link = as_object(given)
        parts = [link.get(name) for name in names] if link else given
        if isinstance(parts, list) and len(parts := cast("list[Any]", parts)) >= 5:
            id, origin, slot, target, at = parts[:5]
            if isinstance(slot, int) and isinstance(at, int):
                yield _id(id), _id(origin), slot, _id(target), at


def _inputs(levels: Mapping[str, Level], level: Level, node: Node) -> dict[str, Any]:
    """The inputs of a node in the graph to run."""
    inputs = _widgets(node)
    for entry in _objects(node, "inputs"):
        source = _source(levels, level, _id(entry.get("link"))) if entry.get("link") is not None else None
        name = str(entry.get("name"))[:200]
        if isinstance(source, Value):
            inputs[name] = source.value
        elif source is not None:
            inputs[name] = source
        elif entry.get("link") is not None and "widget" not in entry:
            inputs.pop(name, None)
    return inputs


def _widgets(node: Node) -> dict[str, Any]:
    """The values of a node's widgets, by name."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return dict(cast("dict[str, Any]", values))
    values = as_list(values)
    names = WIDGETS.get(_id(node.get("type")), "").split()
    if not names:
        named = [str(entry.get("name"))[:200] for entry in _objects(node, "inputs") if "widget" in entry]
        for name in named:
            control = names[-1:] in (["seed"], ["noise_seed"]) and values[len(names) : len(names) + 1]
            names += ["*", name] if control and control[0] in _CONTROL else [name]
        if len(names) + (values[-1:] != [] and values[-1] in _CONTROL) < len(values):
            return {}  # the node does not name all of them
    return {name: value for name, value in zip(names, values) if name != "*"}


def _source(levels: Mapping[str, Level], level: Level, link: str) -> list[Any] | Value | None:
    """Where a link comes from: [id of a node, number of its output], or a value. None if it comes from nowhere."""
    for _ in range(_CHAIN):
        origin, slot = level.links.get(link, ("", 0))
        if level.outside and origin == _id((as_object(level.definition.get("inputNode")) or {}).get("id")):
            entry = (list(_objects(level.definition, "inputs"))[slot : slot + 1] or [{}])[0]
            outer = _entry(level.instance, entry.get("name"))
            if outer.get("link") is None:
                return _promoted(level, slot)
            level, link = level.outside, _id(outer.get("link"))
            continue
        node = level.nodes.get(origin)
        if node is None or node.get("mode") == _MUTED:
            return None
        kind = _id(node.get("type"))
        inner = levels.get(f"{level.prefix}{origin}:")
        if kind == "PrimitiveNode":
            return Value(_first(node))
        if inner is not None:
            level, link = inner, inner.outputs.get(slot, "")
        elif kind == "GetNode":
            link = _id(_entry(_setter(level, node), None).get("link"))
        elif kind == "Reroute" or node.get("mode") == _BYPASSED:
            link = _id(_bypassed(node, slot).get("link"))
        else:
            return [f"{level.prefix}{origin}", slot]
    return None


def _promoted(level: Level, slot: int) -> Value | None:
    """The value that a use of a subgraph gives to the subgraph's input; None if its inner widget keeps its own.

    The values of a use are those of the inputs that lead to a widget, in the order of the inputs.
    """
    values = level.instance.get("widgets_values")
    values = as_list(values)
    wired = {_id(entry.get("link")) for node in level.nodes.values() for entry in _objects(node, "inputs")
             if "widget" in entry}  # fmt: skip
    shown: list[int] = []
    for index, entry in enumerate(_objects(level.definition, "inputs")):
        links = entry.get("linkIds")
        if isinstance(links, list) and any(_id(link) in wired for link in cast("list[Any]", links)):
            shown.append(index)
    at = shown.index(slot) if slot in shown else len(values)
    return Value(values[at]) if len(shown) == len(values) and at < len(values) else None


def _setter(level: Level, getter: Node) -> Node:
    """The SetNode with the same name as a GetNode."""
    setters = (node for node in level.nodes.values() if node.get("type") == "SetNode")
    return next((node for node in setters if _id(_first(node)) == _id(_first(getter))), _NOTHING)


def _first(node: Node) -> Any:
    """The value of a node's first widget."""
    values = node.get("widgets_values")
    return cast("list[Any]", values)[0] if isinstance(values, list) and values else None


def _bypassed(node: Node, slot: int) -> Node:
    """The input that a bypassed node passes on as an output: the one at its place, or the first of its type."""
    entries, outputs = list(_objects(node, "inputs")), list(_objects(node, "outputs"))
    kind = outputs[slot].get("type") if 0 <= slot < len(outputs) else None
    nearest = [*entries[slot : slot + 1], *entries] if slot >= 0 else entries
    return next((entry for entry in nearest if kind in (entry.get("type"), "*") or len(entries) == 1), _NOTHING)


def _entry(node: Node, name: Any) -> Node:
    """A node's input of that name; without a name, its first."""
    return next((entry for entry in _objects(node, "inputs") if name in (None, entry.get("name"))), _NOTHING)


def _objects(holder: Mapping[str, Any] | None, key: str) -> Iterator[Node]:
    """The objects in a list."""
    values = (holder or {}).get(key)
    for value in as_list(values):
        if (entry := as_object(value)) is not None:
            yield entry


def _id(value: Any) -> str:
    return str(value)[:200] if isinstance(value, str | int) else ""
