"""The contract of a model family, and the table of families and known models. Importable without torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from inkstream.families.flux1 import specs as flux1
from inkstream.families.flux2 import specs as flux2
from inkstream.families.zimage import specs as zimage
from inkstream.types import Conditioning, Spec

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from inkstream.nn.around import Around
    from inkstream.nn.forward import Sample
    from inkstream.weights.keymap import Rule

SPECS: dict[str, Spec] = {spec.name: spec for spec in (*zimage.SPECS, *flux1.SPECS.values(), *flux2.SPECS.values())}
"""Every known model by name."""

RECOMMENDED = ("z-image-turbo", "flux2-klein-4b", "pocket")
"""To whoever has no wish of their own, the best first; anyone may use them for anything."""

FAMILIES: dict[str, str] = {
    "zimage": "inkstream.families.zimage.family:ZImage",
    "flux1": "inkstream.families.flux1.family:Flux1",
    "flux2": "inkstream.families.flux2.family:Flux2",
}
"""Family name -> where its class is; imported when a model of it is loaded."""

Shapes = Mapping[str, tuple[int, ...]]
Documents = Mapping[str, Mapping[str, Any]]
"""JSON files of a model's folder: path in it -> content."""
CARD = "inkstream.json"
"""The one among them that says what no other does: how the model likes to be drawn, and its licence. Ours alone."""


@dataclass(frozen=True)
class Pictures:
    """What a request shows a model, RGB pictures as they were given, and how large it will draw."""

    width: int
    height: int
    references: Sequence[Image] = ()
    image: Image | None = None
    mask: Image | None = None  # white is repainted


@dataclass(frozen=True)
class Part:
    """One set of weights of a model. Its name is the Spec field of its config and the diffusers folder it lies in."""

    build: Callable[[Any], nn.Module]  # config -> module; called under torch.device("meta")
    config: type  # the frozen dataclass of its sizes; of several kinds, the usual
    layouts: Mapping[str, Sequence[Rule]]  # published layout -> rules into our names
    infer: Callable[[Shapes], Any]  # config from the shapes, where a file carries none; KeyError if it cannot
    unread: Callable[[Any], Sequence[str]] = lambda config: ()
    """config -> prefixes of names that published files hold and the module leaves out (an encoder's last layer).

    Layouts are tables that know no sizes, so these keys pass through them, `infer` sees them, and the loader then skips
    them: they count as named, are never read, and a file may lack them.
    """
    neutral: Callable[[Any], Mapping[str, Tensor]] = lambda config: {}
    """config -> weights for what is unread, in our names, so that files of a model made here are whole for others."""
    count: Callable[[Any], int] | None = None
    """config -> how many numbers the weights are, where building the module takes long."""
    packs: Sequence[str] = ()
    """Patterns, as in key tables, of the layers whose weights are packed when a model is; all others stay high."""
    gguf: str = ""
    """What GGUF files call this architecture. Their layout is the one named so, or else `native`."""
    repo: str | None = None
    """Where on the hub it is published, if not with the model. Not every model of the family has such a part."""
    writer: Part | None = None
    """Of a text encoder: what else its files hold, that makes of it a model that writes; it builds a Writer."""
    others: Mapping[str, type] = field(default_factory=dict)
    """Other kinds of this part: what `model_type` in its config.json says -> the dataclass of its sizes."""


class Writer(Protocol):
    """What a text encoder lacks to be a whole language model."""

    def attach(self, encoder: nn.Module, tokenizer: Any) -> None:
        """Go on from the text encoder that is loaded, which is the first part of the model."""
        ...

    def write(self, prompt: str, references: Sequence[Image], seed: int) -> Iterator[str]:
        """A fuller prompt, as it grows; with references, what to do with them. The seed decides."""
        ...


class Family(Protocol):
    """A loaded model. Sign, time direction, packing and padding rules die inside it."""

    parts: Mapping[str, Part]  # class attribute: transformer, text_encoder, vae
    joints: Sequence[tuple[str, str]]  # class attribute: sizes that others share with the transformer: two "part.field"
    tokenizers: Mapping[str, Callable[[Path], Any]]  # class attribute: folder -> what reads it; InputError if it cannot
    spec: Spec

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]) -> None: ...

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """The Spec of a local model, from its parts' configs, its folder's documents and its folder's or file's name.

        InputError where they leave open which of several it is.
        """
        ...

    @staticmethod
    def documents(spec: Spec) -> Documents:
        """The JSON files of a published diffusers folder: path in the folder -> content."""
        ...

    def encode(self, prompt: str) -> Conditioning:
        """One prompt as a single entry; without gradients, and remembered."""
        ...

    def tokens(self, prompt: str) -> tuple[int, ...]:
        """The prompt as the text encoder reads it, template included: all that `encode_tokens` depends on."""
        ...

    def cut_at(self, prompt: str) -> int | None:
        """After how many tokens a prompt is cut; None where it is read whole."""
        ...

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        """Several prompts, given as `tokens` of each, in one pass; differentiable."""
        ...

    @staticmethod
    def size_for(spec: Spec, reference: tuple[int, int]) -> tuple[int, int]:
        """Width and height to draw at where none are asked for: from those of the first reference."""
        ...

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        """The conditioning with what the model takes from pictures. InputError where it cannot take them."""
        ...

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = ...
    ) -> list[Any]:
        """What no step changes, for each entry at one size in pixels: the `prepared` of samples with the same `around`,
        by default nothing. times: those that will be asked."""
        ...

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The velocity at each sample, shaped like its x: (C, h, w), float32. One forward; sizes may differ."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that many pixels."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w) float32 -> pixels (B, 3, H, W) float32 in [0, 1]."""
        ...

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W) float32 in [0, 1] -> latents (B, C, h, w) float32, the posterior's mode."""
        ...


def parts_of(spec: Spec) -> dict[str, Part]:
    """The parts that a model has: not every one of its family has all of them."""
    parts = family_of(spec.family).parts
    return {name: part for name, part in parts.items() if getattr(spec, name) is not None}


def family_of(name: str) -> type[Family]:
    """The class of a family, by its key in FAMILIES."""
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
