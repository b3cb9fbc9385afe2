"""The contract of a model family, and the table of families and known models. Importable without torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from inkstream.families.flux1 import specs as flux1
from inkstream.families.flux2 import specs as flux2
from inkstream.families.flux3 import specs as flux3
from inkstream.families.qwenimage import specs as qwenimage
from inkstream.families.zimage import specs as zimage
from inkstream.types import Conditioning, ControlUse, Spec

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from inkstream.nn.around import Around
    from inkstream.nn.forward import Sample
    from inkstream.weights.keymap import Rule
    from inkstream.weights.lora.names import Names

SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        *zimage.SPECS,
        *flux1.SPECS.values(),
        *flux2.SPECS.values(),
        *flux3.SPECS.values(),
        *qwenimage.SPECS.values(),
    )
}
"""Every known model by name."""

RECOMMENDED = ("z-image-turbo", "flux2-klein-4b", "pocket")
"""The models to suggest to users without a preference, the best first. They may be used for any purpose."""

FAMILIES: dict[str, str] = {
    "zimage": "inkstream.families.zimage.family:ZImage",
    "flux1": "inkstream.families.flux1.family:Flux1",
    "flux2": "inkstream.families.flux2.family:Flux2",
    "flux3": "inkstream.families.flux3.family:Flux3",
    "qwenimage": "inkstream.families.qwenimage.family:QwenImage",
}
"""Family name -> path of its class, which is imported when a model of the family is loaded."""

Shapes = Mapping[str, tuple[int, ...]]
Documents = Mapping[str, Mapping[str, Any]]
"""JSON files of a model's folder: path in the folder -> content."""
CARD = "inkstream.json"
"""The JSON file that only inkstream writes. It holds what the others lack: defaults for drawing, and the licence."""


ADAPTER_DIALECTS = {
    "kohya": "native",
    "comfyui": "native",
    "diffusers": "diffusers",
    "peft": "diffusers",
    "lycoris": "diffusers",
}
"""Dialect of an adapter's file -> the layout whose names programs write for a FLUX model."""
WIDTHS = {
    3840: "Z-Image",
    3072: "FLUX.1, FLUX.2 klein 4B or FLUX.3 klein",
    4096: "FLUX.2 klein 9B or Qwen-Image 2.1",
    6144: "FLUX.2 dev",
}
"""Width of the transformer -> the models that have it. A test compares it with SPECS."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a request, and the size in pixels to draw at.

    references: RGB, unchanged. image: the part of the start picture that is drawn, RGB, and mask: mode L, white areas
    are repainted; both at the size to draw at, and None unless a part is repainted.
    """

    width: int
    height: int
    references: Sequence[Image] = ()
    image: Image | None = None
    mask: Image | None = None


@dataclass(frozen=True)
class Part:
    """One set of weights of a model. Its name is the Spec field of its config and its folder in diffusers layout."""

    build: Callable[[Any], nn.Module]  # config -> module; called under torch.device("meta")
    config: type  # the frozen dataclass of its sizes; the most usual kind, if there are several
    layouts: Mapping[str, Sequence[Rule]]  # published layout -> rules into our names
    infer: Callable[[Shapes], Any]  # shapes -> config, for files without one; KeyError where shapes do not fit
    unread: Callable[[Any], Sequence[str]] = lambda config: ()
    """config -> name prefixes of weights that published files hold but the module does not (an encoder's last layer).

    The layouts do not depend on sizes, so these keys pass through them and `infer` sees them. The loader counts them as
    known, never reads them, and accepts files without them.
    """
    neutral: Callable[[Any], Mapping[str, Tensor]] = lambda config: {}
    """config -> neutral values for the unread weights, in our names, so that files we write are complete for others."""
    count: Callable[[Any], int] | None = None
    """config -> the parameter count, for parts that take long to build."""
    packs: Sequence[str] = ()
    """Patterns, as in key tables, of the layers to quantise in a quantised model. Other layers keep high precision."""
    gguf: str = ""
    """The architecture name in GGUF files. Their layout has this name, or else is `native`."""
    repo: str | None = None
    """Its own repository on the hub, if it is not published with the model. Such a part is optional in the family."""
    writer: Part | None = None
    """For a text encoder: the rest of its files' weights, which make it a language model. Builds a Writer."""
    comfyui: Callable[[Any], str] = lambda config: ""
    """For a text encoder: config -> where ComfyUI's program keeps its tokenizer, below the program's folder, or ""."""
    phases: Sequence[str] = ("prompt",)
    """The phases of a request in which the part works: prompt, steps or picture."""
    others: Mapping[str, type] = field(default_factory=dict)
    """Other kinds of this part: `model_type` in config.json -> the dataclass of its sizes."""
    adapter_layouts: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    """Layouts that only the files of adapters have, beside `native` and `diffusers` -> rules into our names."""
    adapter_dialects: Mapping[str, str] = field(default_factory=lambda: ADAPTER_DIALECTS)
    """Dialect of an adapter's file -> the layout whose names it writes."""


class ControlNet(Protocol):
    """A loaded control net, the module of a Part in `Family.controls`: weights beside a model's that guide it."""

    @staticmethod
    def sizes_for(transformer: Any) -> Any:
        """The config of a new net for a transformer with this config. Only nets that are trained here have this."""
        ...

    def begin(self, family: Any) -> None:
        """Sets the weights of a new net: copies of the model's blocks, and hints of zero, so that nothing changes.

        Only nets that are trained here have this.
        """
        ...

    def check(self, family: Any, use: ControlUse) -> None:
        """Raises InputError if the net is for a model of other sizes, or does not know the use's mode."""
        ...

    def look(self, family: Any, pictures: Pictures) -> Tensor:
        """What the net sees, once for each request: of the only reference, and of the inpainting if it can.

        A map at the latents' size, (C, h, w), is cut for windows. Anything else is the same for all windows.
        """
        ...

    def follow(
        self, family: Any, seen: Tensor, use: ControlUse, cond: Conditioning, times: Sequence[float], around: Around
    ) -> Around:
        """What the net does around the blocks of one picture: its residuals, and adapters if it has some.

        seen: from `look`. cond, times, around: as in `Family.prepare`; around is without this net.
        """
        ...


class Writer(Protocol):
    """The rest of a language model, without the layers that its text encoder has."""

    def attach(self, encoder: nn.Module, tokenizer: Any) -> None:
        """Attaches the loaded text encoder, which holds the first layers of the language model."""
        ...

    def write(self, prompt: str, references: Sequence[Image], seed: int) -> Iterator[str]:
        """Yields a fuller prompt as it grows; with references, an instruction for an edit. seed: of the sampling."""
        ...


class Way(Protocol):
    """How an engine draws with a family. A family without steps brings a way of its own."""

    def phases(self, model: Any, request: Any) -> Mapping[str, Callable[[], object]]:
        """Phase -> a function that computes the phase once. They are called in turn on meta, to count memory.

        model: an `engine.drawing.model.Model`; request: complete.
        """
        ...

    def draw(self, job: Any) -> Iterator[Any]:
        """Yield the Events of a request. job: an `engine.drawing.flow.Job`. Each Done is also appended to `job.drawn`.

        It starts behind the pictures that are already in `job.drawn`.
        """
        ...


class Family(Protocol):
    """A loaded model. It hides the release's sign, time direction, packing and padding rules."""

    parts: Mapping[str, Part]  # class attribute: transformer, text_encoder, vae
    joints: Sequence[tuple[str, str]]  # class attribute: pairs of "part.field" sizes that must be equal
    tokenizers: Mapping[str, Callable[[Path], Any]]  # class attribute: folder -> its reader, which may raise InputError
    controls: Mapping[str, Part]  # class attribute: kind of control net -> the part of its files, a ControlNet
    way: Way | None  # class attribute: how an engine draws with it; None: by flow, `engine.drawing.flow`
    spec: Spec
    transformer: nn.Module

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]) -> None: ...

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """The Spec of a local model, from its parts' configs, its folder's documents and its folder's or file's name.

        Raises InputError where these fit several models.
        """
        ...

    @staticmethod
    def documents(spec: Spec) -> Documents:
        """The JSON files of a published diffusers folder: path in the folder -> content."""
        ...

    def encode(self, prompt: str, references: int = 0) -> Conditioning:
        """Encodes one prompt as a single entry, without gradients. The result is cached. references: as in `tokens`."""
        ...

    def tokens(self, prompt: str, references: int = 0) -> tuple[int, ...]:
        """The prompt's token ids, template included. `encode_tokens` depends on nothing else.

        references: the number of reference pictures, for models whose template has a place for each.
        """
        ...

    def cut_at(self, prompt: str) -> int | None:
        """The number of tokens that a prompt is truncated to; None if it is not truncated."""
        ...

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        """Encodes several prompts, each as returned by `tokens`, in one pass, with gradients."""
        ...

    @staticmethod
    def size_for(spec: Spec, reference: tuple[int, int]) -> tuple[int, int]:
        """The default width and height to draw at, from those of the first reference."""
        ...

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        """The conditioning with the information from pictures added. Raises InputError where pictures do not fit."""
        ...

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = ...
    ) -> list[Any]:
        """Computes what is constant over the steps, for each entry at one size in pixels.

        The results are the `prepared` of samples with the same `around`, by default nothing. times: the times to come.
        """
        ...

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        """One forward: the velocity at each sample, shaped like its x, (C, h, w) float32. Sizes may differ."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of this size in pixels."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w) float32 -> pixels (B, 3 or 4, H, W) float32 in [0, 1].

        The fourth channel is the opacity, of models that draw it.
        """
        ...

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W) float32 in [0, 1] -> latents (B, C, h, w) float32, the mode of the posterior."""
        ...


def parts_of(spec: Spec) -> dict[str, Part]:
    """The parts of a model. Some parts of its family are optional."""
    parts = family_of(spec.family).parts
    return {name: part for name, part in parts.items() if getattr(spec, name) is not None}


def family_of(name: str) -> type[Family]:
    """The class of a family, by its key in FAMILIES."""
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def adapter_names(spec: Spec) -> Names:
    """The layers of a model's transformer, and their names in the files of adapters."""
    import torch
    from torch import nn

    from inkstream.weights.lora.names import COMMON, Names

    part = family_of(spec.family).parts["transformer"]
    with torch.device("meta"):
        model = part.build(spec.transformer)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return Names(
        layers={path: (layer.out_features, layer.in_features) for path, layer in layers.items()},
        vectors={
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[0] not in layers
        },
        layouts={**{name: part.layouts.get(name, ()) for name in COMMON}, **part.adapter_layouts},
        written=part.adapter_dialects,
        biased=frozenset(path for path, layer in layers.items() if layer.bias is not None),
        widths=WIDTHS,
    )
