"""The nouns that cross layers: Request, Spec, Conditioning, Query, Event. Importable without torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SolverName = Literal["euler", "heun", "dpmpp_2m", "res_multistep", "res_2s", "ralston_2s", "euler_ancestral", "lcm"]
GuidanceKind = Literal["twice", "read", "none"]
"""Two predictions a step, with the prompt and without; a number that the model reads; or neither."""
ShiftRule = Literal["fixed", "dynamic", "empirical"]
"""How the shift that suits a size follows: it does not; FLUX.1's rule; FLUX.2's."""
CacheKind = Literal["none", "first-block", "taylor"]
"""What stands in for blocks that a step leaves out: nothing does; what they added last; its course over the steps."""
ScheduleName = Literal["simple", "sgm_uniform", "normal", "beta", "beta57", "linear_quadratic", "bong_tangent"]


class InputError(ValueError):
    """What the user gave cannot be done. The message is one line that names the value and the remedy."""


def _picture_to_text(value: Any) -> Any:
    """A path stays a path; a PIL image or encoded bytes become a data URL, so that a Request is always JSON."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "save") and hasattr(value, "mode"):  # a PIL image, without importing PIL
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        value = buffer.getvalue()
    if isinstance(value, bytes | bytearray):
        return "data:image/png;base64," + base64.b64encode(bytes(value)).decode()
    return value


Picture = Annotated[str, BeforeValidator(_picture_to_text)]


class Request(BaseModel):
    """One wish: what to draw, how, and from what. A field left None takes the model's own default.

    The fields, with their descriptions, are the CLI's flags, the HTTP body and the metadata in the picture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    prompt: str = Field("", description="What to draw, in plain words.")
    upsample: bool | None = Field(
        None,
        description="Write the prompt out first, as the seed has it: by the model's language model, or by Pocket's "
        "grammar, which is on unless it is turned off or a picture is started from.",
    )
    negative_prompt: str = Field("", description="What to keep out; needs guidance above 1.")
    model: str = Field("pocket", description="A model's name, a repository on the hub, or a local path.")
    width: int | None = Field(None, ge=16, le=8192, description="Width in pixels, a multiple of 16.")
    height: int | None = Field(None, ge=16, le=8192, description="Height in pixels, a multiple of 16.")
    steps: int | None = Field(None, ge=1, le=1000, description="Steps of the solver.")
    guidance: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="Classifier-free guidance scale; 1 is off."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the first picture; drawn when left out.")
    count: int = Field(1, ge=1, le=10_000, description="How many pictures; picture i has seed + i.")
    solver: SolverName | None = Field(None, description="How the flow is integrated.")
    schedule: ScheduleName | None = Field(None, description="How the noise levels are spaced.")
    shift: float | None = Field(
        None, gt=0, le=100, allow_inf_nan=False, description="Time shift; above 1 spends more steps on layout."
    )
    cfg_normalization: float = Field(
        0.0,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="Cap the guided prediction's norm at this multiple of the unguided one's; 0 is off.",
    )
    cfg_truncation: float = Field(1.0, ge=0, le=1, description="Guidance stops once 1 - t exceeds this; 1 never stops.")
    guidance_from: float = Field(1.0, ge=0, le=1, description="Guidance is on for times t at or below this.")
    guidance_until: float = Field(0.0, ge=0, le=1, description="Guidance is on for times t at or above this.")
    cache: CacheKind = Field("none", description="What steps that are like the last ones take over from them.")
    cache_threshold: float = Field(
        0.1,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="How much the first block's answer may change, as a share of it, before all are run again.",
    )
    image: Picture | None = Field(None, description="Picture to start from.")
    strength: float | None = Field(
        None, ge=0, le=1, description="How far from the start picture: 0 keeps it, 1 ignores it."
    )
    mask: Picture | None = Field(None, description="Picture whose white part is repainted; black is kept exactly.")
    reference: tuple[Picture, ...] = Field(
        (), max_length=10, description="Picture to draw from, as 'image 1' in the prompt; give it again for more."
    )


@dataclass(frozen=True)
class Spec:
    """One known model: what it is, where its files are, how it likes to be run. Variants are `replace(TURBO, ...)`."""

    name: str
    family: str  # a key of families.FAMILIES
    transformer: Any  # the family's own frozen config
    text_encoder: Any
    vae: Any
    steps: int
    guidance: float  # standard scale: 1 is off; of kind `read`, the number that the model was taught with
    shift: float  # of rule `fixed`
    text_encoder_2: Any = None
    image_encoder: Any = None  # of models that read pictures as they read text, with what makes its states text
    image_embedder: Any = None
    guides: GuidanceKind = "twice"
    shift_rule: ShiftRule = "fixed"
    size: tuple[int, int] = (1024, 1024)  # width, height when the request names none
    multiple: int = 16  # pixels; every side is a multiple of it
    solver: SolverName = "euler"
    schedule: ScheduleName = "simple"
    strength: float = 0.6
    abilities: frozenset[str] = frozenset()  # of: guidance, image, mask, references, references_once, fill, map,
    # json (prompts), upsample, upsample_references
    writer: str = ""  # a key of engine.writing.WRITERS: prompts are written out by a grammar
    repo: str | None = None  # on the hub
    folder: str | None = None  # inside the package, of a model that ships with it
    download_bytes: int | None = None
    licence: str = "unknown"
    commercial: bool = False  # whether the licence lets a business draw with it, and sell what it draws
    title: str = ""
    tiny: Spec | None = field(default=None, repr=False, compare=False)  # the same at 2 blocks of width 64


@dataclass(frozen=True)
class Conditioning:
    """All that a model is told. Entry 0 is the prompt, entry 1 (if any) the negative one; the rest is for both.

    tokens: (sum(lengths), D) the text encoder's states, one prompt after the other, no padding.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor | None = None  # (len(lengths), P), a vector of each prompt, of families that read one
    guidance: float | None = None  # of models that read it
    references: tuple[Tensor, ...] = ()  # latents (C, h, w) of pictures to look at
    beside: Tensor | None = None  # (C', h, w) channels that stand beside the noise at every step

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Conditioning:
        """Entry `index` alone."""
        index = range(len(self.lengths))[index]
        start = sum(self.lengths[:index])
        length = self.lengths[index]
        pooled = None if self.pooled is None else self.pooled[index : index + 1]
        return replace(self, tokens=self.tokens[start : start + length], lengths=(length,), pooled=pooled)

    @staticmethod
    def pack(entries: Sequence[Conditioning]) -> Conditioning:
        """Prompts of one request; what is for all of them is the first one's."""
        import torch

        vectors = [e.pooled for e in entries if e.pooled is not None]
        return replace(
            entries[0],
            tokens=torch.cat([e.tokens for e in entries]),
            lengths=tuple(n for e in entries for n in e.lengths),
            pooled=torch.cat(vectors) if vectors else None,
        )


class Query(NamedTuple):
    """A point where a solver needs the velocity. x: any shape, float32; t: the time, from 1 (noise) to 0."""

    x: Tensor
    t: float


Solver = Generator[Query, "Tensor", "Tensor"]
"""Yields the points where it needs the velocity, is sent the answers, returns the result. It owns no model."""


@dataclass(frozen=True)
class Queued:
    """Accepted; `position` requests are ahead."""

    request: Request
    position: int = 0


@dataclass(frozen=True)
class Loading:
    """Something is being made ready before the first step: a download, weights, a prompt being encoded.

    text: of a prompt that is being written out, what it says so far; the last one is drawn. note: a line to tell.
    """

    what: str
    done_bytes: int | None = None
    total_bytes: int | None = None
    text: str = ""
    note: str = ""


@dataclass(frozen=True)
class Step:
    """Step `step` of `steps` of picture `index` of `count` is done. `preview` is a small RGB picture, if asked for."""

    step: int
    steps: int
    index: int
    count: int
    t: float
    seconds: float  # this step took
    preview: Image | None = None


@dataclass(frozen=True)
class Done:
    """Picture `index` of `count`, with the complete Request that draws it alone."""

    image: Image
    request: Request
    index: int
    count: int
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The request cannot go on. `kind` is `input` (the user can mend it) or `internal`."""

    error: str
    kind: Literal["input", "internal"] = "internal"


Event = Queued | Loading | Step | Done | Failed


@dataclass(frozen=True)
class Result:
    """What `Engine.generate` returns: pictures, and for each the complete Request that draws it alone."""

    images: list[Image]
    requests: list[Request]

    @staticmethod
    def of(events: Iterable[Event]) -> Result:
        """All pictures of a request's events. InputError if they end with Failed."""
        result = Result([], [])
        for event in events:
            if isinstance(event, Done):
                result.images.append(event.image)
                result.requests.append(event.request)
            elif isinstance(event, Failed):
                raise InputError(event.error)
        return result
