"""Data types that all layers share: Request, Spec, Conditioning, Query, Event. Importing them does not need torch."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SolverName = Literal["euler", "heun", "dpmpp_2m", "res_multistep", "res_2s", "ralston_2s", "euler_ancestral", "lcm"]
GuidanceKind = Literal["twice", "read", "none"]
"""How a model is guided.

twice: classifier-free guidance with two predictions a step, one for the prompt and one for the negative prompt.
read: the guidance scale is an input of the model (distilled guidance). none: the model has no guidance.
"""
ShiftRule = Literal["fixed", "dynamic", "empirical"]
"""How the time shift depends on the picture's size. fixed: not at all; dynamic: FLUX.1's rule; empirical: FLUX.2's."""
CacheKind = Literal["none", "first-block", "taylor"]
"""Step cache: what replaces the output of blocks that a step skips.

none: no block is skipped. first-block: the residual of the last full step. taylor: the same residual, extrapolated.
"""
PlacementName = Literal["resident", "parked", "streamed"]
AttentionName = Literal["auto", "sdpa", "varlen", "flash2", "flash3", "sage"]
ScheduleName = Literal["simple", "sgm_uniform", "normal", "beta", "beta57", "linear_quadratic", "bong_tangent"]
MaskFill = Literal["original", "blur", "noise", "telea"]
"""What the repainted part holds before it is drawn.

original: the picture itself. blur: the colours around it, spread over it. noise: random colours. telea: its edge
continued inwards (Telea 2004).
"""


LONGEST = 8192
"""The longest side of a drawn picture, in pixels."""
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class InputError(ValueError):
    """The user's input is invalid or cannot be used. The message is one line that names the value and the remedy."""


def as_object(value: Any) -> dict[str, Any] | None:
    """Return a value of parsed JSON if it is an object, else None."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def as_list(value: Any) -> list[Any]:
    """Return a value of parsed JSON if it is a list, else an empty list."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def _picture_to_text(value: Any) -> Any:
    """Turn a PIL image or encoded bytes into a data URL, so that a Request is always JSON. A path stays a path."""
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


class LoraUse(NamedTuple):
    """How a request uses an adapter. As text: `PATH[:STRENGTH][@FROM-UNTIL][#BLOCKS=FACTOR,...]`.

    begins, ends: shares of the schedule's steps, from 0 to 1. blocks: patterns of blocks, such as `layers.0-14` or
    `single_blocks`, and the factors of the strength there; the last pattern that fits a layer counts.
    """

    path: str
    strength: float = 1.0
    begins: float = 0.0
    ends: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()

    @staticmethod
    def read(value: Any) -> LoraUse:
        """Read the text form, or an object with path, strength, from, until and blocks. Raises InputError."""
        if isinstance(value, LoraUse):
            return value
        if (given := as_object(value)) is not None:
            return LoraUse._of(given)
        if not isinstance(value, str | Path):
            raise InputError(f"lora {value!r} is not text or an object: write PATH[:STRENGTH][@FROM-UNTIL]")
        found = _LORA.fullmatch(str(value).strip())
        if found is None:
            raise InputError("a lora is empty: write PATH[:STRENGTH][@FROM-UNTIL]")
        pairs = (pair.rpartition("=") for pair in found["blocks"].split(",")) if found["blocks"] else ()
        return LoraUse(
            found["path"],
            float(found["strength"] or 1),
            float(found["begins"] or 0),
            float(found["ends"] or 1),
            tuple((pattern, float(factor)) for pattern, _, factor in pairs),
        )._checked()

    @staticmethod
    def _of(given: dict[str, Any]) -> LoraUse:
        _check_fields("a lora", given, ("path", "strength", "from", "until", "blocks"))
        factors = as_object(given.get("blocks") or {})
        if factors is None:
            raise InputError(f"blocks {given['blocks']!r} in a lora is no object: write it as {{'layers.0-14': 0.5}}")
        strength, begins, ends = _numbers("a lora", given, {"strength": 1, "from": 0, "until": 1})
        blocks = tuple(zip(map(str, factors), _numbers("a lora", factors, dict.fromkeys(factors, 1))))
        return LoraUse(str(given.get("path") or "").strip(), strength, begins, ends, blocks)._checked()

    def _checked(self) -> LoraUse:
        if not self.path:
            raise InputError("a lora has no path: write PATH[:STRENGTH][@FROM-UNTIL]")
        for factor in (self.strength, *(factor for _, factor in self.blocks)):
            if not -10 <= factor <= 10:
                raise InputError(f"lora strength {factor:g} is out of range: take -10 to 10")
        _check_steps("lora", self.begins, self.ends)
        return self

    def __str__(self) -> str:
        """Return the text that `read` reads as the same use, digit for digit."""
        strength, steps = f":{_digits(self.strength)}", f"@{_digits(self.begins)}-{_digits(self.ends)}"
        blocks = "#" + ",".join(f"{name}={_digits(factor)}" for name, factor in self.blocks) if self.blocks else ""
        short = f"{self.path}{strength if self.strength != 1 else ''}{steps if self[2:4] != (0, 1) else ''}{blocks}"
        # The end of a path may look like a strength or like steps: then all is written out.
        return short if LoraUse.read(short) == self else f"{self.path}{strength}{steps}{blocks}"


class ControlUse(NamedTuple):
    """How a request uses a control net. As text: `PATH[:SCALE][@FROM-UNTIL][#MODE]`.

    begins, ends: shares of the schedule's steps, from 0 to 1. mode: the kind of control picture, such as canny, for
    nets that are told it.
    """

    path: str
    scale: float = 0.75
    begins: float = 0.0
    ends: float = 1.0
    mode: str = ""

    @staticmethod
    def read(value: Any) -> ControlUse:
        """Read the text form, or an object with path, scale, from, until and mode. Raises InputError."""
        if isinstance(value, ControlUse):
            return value
        if (given := as_object(value)) is not None:
            return ControlUse._of(given)
        if not isinstance(value, str | Path):
            raise InputError(f"control net {value!r} is not text or an object: write PATH[:SCALE][@FROM-UNTIL][#MODE]")
        found = _CONTROL.fullmatch(str(value).strip())
        if found is None:
            raise InputError("a control net is empty: write PATH[:SCALE][@FROM-UNTIL][#MODE]")
        return ControlUse(
            found["path"],
            float(found["scale"] or ControlUse._field_defaults["scale"]),
            float(found["begins"] or 0),
            float(found["ends"] or 1),
            found["mode"] or "",
        )._checked()

    @staticmethod
    def _of(given: dict[str, Any]) -> ControlUse:
        _check_fields("a control net", given, ("path", "scale", "from", "until", "mode"))
        usual = {"scale": ControlUse._field_defaults["scale"], "from": 0, "until": 1}
        scale, begins, ends = _numbers("a control net", given, usual)
        path, mode = str(given.get("path") or "").strip(), str(given.get("mode", ""))
        return ControlUse(path, scale, begins, ends, mode)._checked()

    def _checked(self) -> ControlUse:
        if not self.path:
            raise InputError("a control net has no path: write PATH[:SCALE][@FROM-UNTIL][#MODE]")
        if not 0 <= self.scale <= 10:
            raise InputError(f"control scale {self.scale:g} is out of range: take 0 to 10, usually 0.4 to 1")
        _check_steps("control", self.begins, self.ends)
        if self.mode and not re.fullmatch(_MODE, self.mode):
            raise InputError(f"control mode {self.mode!r} is not a word or a number: take one such as canny")
        return self

    def __str__(self) -> str:
        """Return the text that `read` reads as the same use, digit for digit."""
        scale, steps = f":{_digits(self.scale)}", f"@{_digits(self.begins)}-{_digits(self.ends)}"
        mode = f"#{self.mode}" if self.mode else ""
        usual = ControlUse(self.path, mode=self.mode)
        short = (
            f"{self.path}{scale if self.scale != usual.scale else ''}{steps if self[2:4] != usual[2:4] else ''}{mode}"
        )
        # The end of a path may look like a scale or like steps: then all is written out.
        return short if ControlUse.read(short) == self else f"{self.path}{scale}{steps}{mode}"


class Region(NamedTuple):
    """A box of the picture with a text of its own. As text: `X,Y,WxH[*STRENGTH]:TEXT`.

    x, y, width, height: in pixels, or as shares of the picture if none of them is above 1. strength: the weight of the
    text in the attention of the box's tokens; 0 hides the text from them.
    """

    text: str
    x: float
    y: float
    width: float
    height: float
    strength: float = 1.0

    @staticmethod
    def read(value: Any) -> Region:
        """Read the text form, or an object with text, x, y, width, height and strength. Raises InputError."""
        if isinstance(value, Region):
            return value
        if (given := as_object(value)) is not None:
            names = ("x", "y", "width", "height")
            _check_fields("a region", given, ("text", *names, "strength"))
            if missing := [name for name in names if name not in given]:
                raise InputError(f"a region has no {missing[0]}: give x, y, width and height of its box")
            numbers = _numbers("a region", given, {**dict.fromkeys(names, 0), "strength": 1})
            x, y, width, height, strength = numbers
            return Region(str(given.get("text") or "").strip(), x, y, width, height, strength)._checked()
        found = _REGION.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            raise InputError(f"region {_shown(value)} is not X,Y,WxH:TEXT: write it like '0,0,512x1024:a red circle'")
        x, y, width, height = (float(found[name]) for name in ("x", "y", "width", "height"))
        return Region(found["text"].strip(), x, y, width, height, float(found["strength"] or 1))._checked()

    def _checked(self) -> Region:
        box = self[1:5]
        if not self.text:
            raise InputError(f"region {self.place} has no text: write what to draw there behind a colon")
        if not (min(box) >= 0 and min(self.width, self.height) > 0 and max(box) <= 8192):
            raise InputError(f"region {self.place} is no box: take x and y from 0, width and height above 0")
        if not self.in_shares and any(number % 1 for number in box):
            raise InputError(f"region {self.place} mixes shares and pixels: take numbers up to 1, or whole pixels")
        if self.in_shares and max(self.x + self.width, self.y + self.height) > 1 + 1e-6:
            raise InputError(f"region {self.place} leaves the picture: take x + width and y + height up to 1")
        if not 0 <= self.strength <= 10:
            raise InputError(f"region strength {self.strength:g} is out of range: take 0 to 10, usually 1")
        return self

    @property
    def in_shares(self) -> bool:
        return max(self[1:5]) <= 1

    @property
    def place(self) -> str:
        """The box as text."""
        x, y, width, height = map(_digits, self[1:5])
        return f"{x},{y},{width}x{height}"

    def as_shares(self, width: int, height: int) -> Region:
        """Return the same region in shares of a picture, which is of this size in pixels."""
        if self.in_shares:
            return self
        return Region(
            self.text, self.x / width, self.y / height, self.width / width, self.height / height, self.strength
        )

    def on_grid(self, width: int, height: int, unit: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom in units of so many pixels. width, height: of the picture, in pixels.

        Edges are rounded to the nearest unit. Raises InputError if the box leaves the picture, or is less than a unit.
        """
        wide, high = (width, height) if self.in_shares else (1, 1)
        edges = self.x * wide, self.y * high, (self.x + self.width) * wide, (self.y + self.height) * high
        if edges[2] > width + 0.5 or edges[3] > height + 0.5:
            raise InputError(f"region {self.place} leaves the picture, which is {width}x{height}: take a smaller box")
        left, top, right, bottom = (int(edge / unit + 0.5) for edge in edges)
        if left == right or top == bottom:
            raise InputError(f"region {self.place} is too small: the model sees units of {unit}x{unit} pixels")
        return left, top, right, bottom

    def __str__(self) -> str:
        """Return the text that `read` reads as the same region, digit for digit."""
        strength = f"*{_digits(self.strength)}" if self.strength != 1 else ""
        return f"{self.place}{strength}:{self.text}"


def _shown(value: Any) -> str:
    """Return the beginning of a value, for an error of one line."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:100])


def _check_fields(what: str, given: dict[str, Any], names: Sequence[str]) -> None:
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"{what} has no field {unknown[0]}: its fields are {', '.join(names)}")


def _numbers(what: str, given: dict[str, Any], usual: dict[str, Any]) -> list[float]:
    """Return the fields that `usual` names, as numbers. Those that are not given have its values."""
    numbers: list[float] = []
    for name, default in usual.items():
        try:
            numbers.append(float(given.get(name, default)))
        except (TypeError, ValueError):
            raise InputError(f"{name} {given[name]!r} in {what} is not a number: give one such as 0.8") from None
    return numbers


def _check_steps(what: str, begins: float, ends: float) -> None:
    if not 0 <= begins < ends <= 1:
        raise InputError(f"{what} steps {begins:g}-{ends:g} are no range: take 0 <= FROM < UNTIL <= 1")


def _digits(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_LORA = re.compile(
    rf"(?P<path>.+?)(?::(?P<strength>[+-]?(?:{_NUMBER})))?(?:@(?P<begins>{_NUMBER})-(?P<ends>{_NUMBER}))?"
    rf"(?:#(?P<blocks>[\w.-]+=[+-]?(?:{_NUMBER})(?:,[\w.-]+=[+-]?(?:{_NUMBER}))*))?"
)
_MODE = r"[a-z][a-z-]*|\d+"
_CONTROL = re.compile(
    rf"(?P<path>.+?)(?::(?P<scale>[+-]?(?:{_NUMBER})))?(?:@(?P<begins>{_NUMBER})-(?P<ends>{_NUMBER}))?"
    rf"(?:#(?P<mode>{_MODE}))?"
)
_REGION = re.compile(
    rf"(?P<x>{_NUMBER})\s*,\s*(?P<y>{_NUMBER})\s*,\s*(?P<width>{_NUMBER})\s*x\s*(?P<height>{_NUMBER})\s*"
    rf"(?:\*\s*(?P<strength>{_NUMBER})\s*)?:(?P<text>.*)",
    re.DOTALL,
)
Lora = Annotated[
    str,
    BeforeValidator(lambda value: str(LoraUse.read(value))),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "description": "PATH[:STRENGTH][@FROM-UNTIL][#BLOCKS=FACTOR,...]"},
                {
                    "type": "object",
                    "properties": {
                        "path": {"type": "string"},
                        "strength": {"type": "number", "minimum": -10, "maximum": 10, "default": 1},
                        "from": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
                        "until": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
                        "blocks": {"type": "object", "additionalProperties": {"type": "number"}},
                    },
                    "required": ["path"],
                    "additionalProperties": False,
                },
            ]
        },
        mode="validation",
    ),
]
Control = Annotated[
    str,
    BeforeValidator(lambda value: str(ControlUse.read(value))),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "description": "PATH[:SCALE][@FROM-UNTIL][#MODE]"},
                {
                    "type": "object",
                    "properties": {
                        "path": {"type": "string"},
                        "scale": {"type": "number", "minimum": 0, "maximum": 10, "default": 0.75},
                        "from": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
                        "until": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
                        "mode": {"type": "string"},
                    },
                    "required": ["path"],
                    "additionalProperties": False,
                },
            ]
        },
        mode="validation",
    ),
]

RegionText = Annotated[
    str,
    BeforeValidator(lambda value: str(Region.read(value))),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "description": "X,Y,WxH[*STRENGTH]:TEXT"},
                {
                    "type": "object",
                    "properties": {
                        "text": {"type": "string"},
                        **{name: {"type": "number", "minimum": 0, "maximum": 8192} for name in ("x", "y")},
                        **{
                            name: {"type": "number", "exclusiveMinimum": 0, "maximum": 8192}
                            for name in ("width", "height")
                        },
                        "strength": {"type": "number", "minimum": 0, "maximum": 10, "default": 1},
                    },
                    "required": ["text", "x", "y", "width", "height"],
                    "additionalProperties": False,
                },
            ]
        },
        mode="validation",
    ),
]


class MaskSource(NamedTuple):
    """What a mask is made from. As text: `alpha`, `colour:#00ff00[~TOLERANCE]`, `text` or `text:WORDS`.

    alpha: the picture's transparent pixels. colour: the pixels of a colour, in which no channel differs by more than
    the tolerance. text: all written text, or some words.
    """

    kind: Literal["alpha", "colour", "text"]
    value: str = ""
    tolerance: int = 24

    @staticmethod
    def read(text: str) -> MaskSource:
        """Read the text form. Raises InputError."""
        kind, _, value = (part.strip() for part in text.partition(":"))
        if kind == "alpha" and not value:
            return MaskSource("alpha")
        if kind == "text":
            return MaskSource("text", value)
        if kind == "colour":
            found = re.fullmatch(r"#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})(?:~(\d{1,3}))?", value)
            if found is None or int(found[2] or 0) > 255:
                raise InputError(f"colour {value[:40]!r} of a mask is not like #00ff00 or #0f0~40 (tolerance 0 to 255)")
            digits = found[1] if len(found[1]) == 6 else "".join(2 * digit for digit in found[1])
            return MaskSource(
                "colour", f"#{digits}", MaskSource._field_defaults["tolerance"] if found[2] is None else int(found[2])
            )
        raise InputError(f"a mask is not made from {text[:40]!r}: write alpha, colour:#00ff00, text or text:WORDS")


class Extension(NamedTuple):
    """New space around a picture, in pixels. As text: `left=128,right=64`, or `1024x768@ANCHOR` for a whole size.

    anchor: the place of the picture in the whole.
    """

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0
    size: tuple[int, int] | None = None
    anchor: str = "center"

    @staticmethod
    def read(text: str) -> Extension:
        """Read the text form. Raises InputError."""
        if found := re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})(?:@([a-z-]+))?\s*", text):
            size, anchor = (int(found[1]), int(found[2])), found[3] or "center"
            if anchor not in ANCHORS:
                raise InputError(f"extend has no anchor {anchor[:40]!r}: take {', '.join(ANCHORS)}")
            if not all(16 <= side <= 8192 for side in size):
                raise InputError(f"extend {found[1]}x{found[2]} is out of range: take sides from 16 to 8192")
            return Extension(size=size, anchor=anchor)
        sides: dict[str, int] = {}
        for part in text.split(","):
            name, _, pixels = (piece.strip() for piece in part.partition("="))
            if name not in ("left", "top", "right", "bottom") or name in sides or not re.fullmatch(r"\d{1,5}", pixels):
                raise InputError(f"extend {text[:60]!r} is not like left=128,right=64 or 1024x768@center")
            sides[name] = int(pixels)
        if not 0 < max(sides.values()) <= 4096:
            raise InputError(f"extend {text[:60]!r} is out of range: take 1 to 4096 pixels a side")
        left, top, right, bottom = (sides.get(name, 0) for name in ("left", "top", "right", "bottom"))
        return Extension(left, top, right, bottom)

    def around(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the new pixels left, above, right and below of a picture. Raises InputError if it has no room."""
        if self.size is None:
            return self.left, self.top, self.right, self.bottom
        across, down = self.size[0] - width, self.size[1] - height
        if min(across, down) < 0 or across == down == 0:
            whole = "x".join(map(str, self.size))
            raise InputError(f"extend {whole} leaves no room around a picture of {width}x{height}: take a larger size")
        share = ANCHORS[self.anchor]
        left, top = (round(space * part) for space, part in zip((across, down), share))
        return left, top, across - left, down - top


ANCHORS = {
    "center": (0.5, 0.5), "left": (0.0, 0.5), "right": (1.0, 0.5), "top": (0.5, 0.0), "bottom": (0.5, 1.0),
    "top-left": (0.0, 0.0), "top-right": (1.0, 0.0), "bottom-left": (0.0, 1.0), "bottom-right": (1.0, 1.0),
}  # fmt: skip
"""Anchor of an Extension -> the share of the new space that is left of the picture, and above it."""


class Context(NamedTuple):
    """How much around a mask is drawn with it. As text: a factor of the mask's size such as `1.2`, or `32px`."""

    factor: float = 1.0
    pixels: int = 0

    @staticmethod
    def read(value: Any) -> Context:
        """Read the text form, or a number. Raises InputError."""
        text = str(value).strip()
        if found := re.fullmatch(r"(\d{1,4})px", text):
            return Context(pixels=int(found[1]))
        if not re.fullmatch(_NUMBER, text) or not 1 <= float(text) <= 100:
            raise InputError(
                f"crop {text[:40]!r} is neither a factor from 1 to 100, such as 1.2, nor pixels such as 32px"
            )
        return Context(factor=float(text))


class Enlargement(NamedTuple):
    """How large a picture becomes. As text: a factor such as `2x`, or a size such as `2048x1536`."""

    factor: float = 1.0
    size: tuple[int, int] | None = None

    @staticmethod
    def read(value: Any) -> Enlargement:
        """Read the text form, or a number. Raises InputError."""
        text = str(value).strip().lower()
        if found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text):
            size = int(found[1]), int(found[2])
            if not all(16 <= side <= 32_768 for side in size):
                raise InputError(f"size {text} is out of range: take sides from 16 to 32768")
            return Enlargement(size=size)
        if not re.fullmatch(rf"{_NUMBER}x?", text) or not 1 <= float(text.removesuffix("x")) <= 16:
            raise InputError(f"{text[:40]!r} is neither a factor from 1x to 16x, such as 2x, nor a size like 2048x1536")
        return Enlargement(float(text.removesuffix("x")))

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that a picture of this size gets."""
        return self.size or (round(width * self.factor), round(height * self.factor))

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]}" if self.size else f"{_digits(self.factor)}x"


def _context_to_text(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    Context.read(value)
    return str(value).strip()


def _enlargement_to_text(value: Any) -> Any:
    return value if value is None or isinstance(value, bool) else str(Enlargement.read(value))


def _read_by(read: Callable[[str], object]) -> Callable[[str], str]:
    """Return a validator: it gives a text back, without spaces around it, if `read` can read it."""

    def check(text: str) -> str:
        read(text)
        return text.strip()

    return check


class Variation(NamedTuple):
    """A little different start of a picture. As text: `SEED:STRENGTH`.

    seed: of other noise, to which the picture's own noise is turned. strength: from 0 (its own) to 1 (the other).
    """

    seed: int
    strength: float

    @staticmethod
    def read(value: Any) -> Variation:
        """Read the text form, or an object with seed and strength. Raises InputError."""
        if isinstance(value, Variation):
            return value
        if (given := as_object(value)) is not None:
            _check_fields("a variation", given, ("seed", "strength"))
            value = f"{given.get('seed')}:{given.get('strength')}"
        found = _VARIATION.fullmatch(str(value).strip())
        if found is None or int(found["seed"]) >= 2**63 or float(found["strength"]) > 1:
            raise InputError(f"variation {_shown(value)} is not SEED:STRENGTH: give a seed and 0 to 1, such as 7:0.2")
        return Variation(int(found["seed"]), float(found["strength"]))

    def __str__(self) -> str:
        return f"{self.seed}:{_digits(self.strength)}"


_VARIATION = re.compile(rf"(?P<seed>\d{{1,19}}):(?P<strength>{_NUMBER})")
VariationText = Annotated[
    str,
    BeforeValidator(lambda value: str(Variation.read(value))),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^\s*\d+:[\d.eE+-]+\s*$", "description": "SEED:STRENGTH"},
                {
                    "type": "object",
                    "properties": {
                        "seed": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63},
                        "strength": {"type": "number", "minimum": 0, "maximum": 1},
                    },
                    "required": ["seed", "strength"],
                    "additionalProperties": False,
                },
            ]
        },
        mode="validation",
    ),
]


class Request(BaseModel, frozen=True):
    """One drawing request: the prompt, the settings and the input pictures. None means the model's own default.

    The fields and their descriptions define the CLI's flags, the HTTP body and the metadata in the picture.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field("", description="What to draw, in plain words.")
    upsample: bool | None = Field(
        None,
        description="Expand the prompt before drawing; the seed chooses the words. The model's language model does "
        "this; for Pocket, a grammar does it, which is on by default unless the request starts from a picture.",
    )
    negative_prompt: str = Field("", description="What not to draw; works only with guidance above 1.")
    model: str = Field("pocket", description="A model's name, a repository on the hub, or a local path.")
    width: int | None = Field(None, ge=16, le=LONGEST, description="Width in pixels, a multiple of 16.")
    height: int | None = Field(None, ge=16, le=LONGEST, description="Height in pixels, a multiple of 16.")
    steps: int | None = Field(None, ge=1, le=1000, description="Number of solver steps.")
    guidance: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="Classifier-free guidance scale; 1 is off."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the first picture; random if not given.")
    count: int = Field(1, ge=1, le=10_000, description="Number of pictures; picture i has seed + i.")
    until_verified: int = Field(
        0,
        ge=0,
        le=100,
        description="Draw a picture again, at most this often, until the texts that the prompt quotes and the colours "
        "that it gives as hex codes are in it; the best one is kept. Texts need the extra ocr.",
    )
    variation: VariationText | None = Field(
        None,
        description="Vary a seed's picture, as SEED:STRENGTH: its noise is turned towards another seed's, by a "
        "strength of 0 to 1. With a count, all pictures have one seed, and picture i has variation seed + i.",
    )
    seed_variance: float = Field(
        0.0,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="More variety from seed to seed, for models whose pictures look alike: noise of this strength on "
        "the encoded prompt. 0.1 is subtle, 0.5 strong, 0 is off.",
    )
    solver: SolverName | None = Field(None, description="Method that integrates the flow.")
    schedule: ScheduleName | None = Field(None, description="Spacing of the noise levels.")
    shift: float | None = Field(
        None, gt=0, le=100, allow_inf_nan=False, description="Time shift; above 1 gives more steps to the layout."
    )
    cfg_normalization: float = Field(
        0.0,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="Limit the guided prediction's norm to this multiple of the unguided prediction's norm; 0 is off.",
    )
    cfg_truncation: float = Field(
        1.0, ge=0, le=1, description="Guidance is off while 1 - t is above this; 1 never turns it off."
    )
    guidance_from: float = Field(1.0, ge=0, le=1, description="Guidance is on for times t at or below this.")
    guidance_until: float = Field(0.0, ge=0, le=1, description="Guidance is on for times t at or above this.")
    cache: CacheKind = Field("none", description="Step cache: how a step reuses the results of earlier, similar steps.")
    cache_threshold: float = Field(
        0.1,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="Relative change of the first block's residual at which all blocks run again.",
    )
    image: Picture | None = Field(None, description="Picture to start from.")
    strength: float | None = Field(
        None, ge=0, le=1, description="How much the start picture is changed: 0 keeps it, 1 ignores it."
    )
    mask: Picture | None = Field(
        None, description="Picture whose white part is repainted; the black part is kept exactly."
    )
    mask_from: Annotated[str, AfterValidator(_read_by(MaskSource.read))] | None = Field(
        None,
        max_length=1000,
        description="Repaint a part of the start picture without a mask: alpha (its transparent pixels), "
        "colour:#00ff00[~TOLERANCE], text (all of it) or text:WORDS.",
    )
    mask_invert: bool = Field(False, description="Keep what the mask repaints, and repaint what it keeps.")
    mask_grow: int = Field(0, ge=-1024, le=1024, description="Grow the mask by so many pixels; below 0 shrinks it.")
    mask_blur: int = Field(
        8, ge=0, le=1024, description="Width in pixels of the fade to the repainted part, inside the mask's edge."
    )
    mask_soft: bool = Field(
        False, description="The mask's grey values, and its fade, are strengths: dark grey changes little."
    )
    mask_fill: MaskFill = Field(
        "original", description="What the repainted part holds before it is drawn; matters with strength below 1."
    )
    crop: Annotated[str, BeforeValidator(_context_to_text)] | None = Field(
        None,
        description="Draw only the mask's surroundings, at full resolution: a factor of the mask's size such as 1.2, "
        "or pixels around it such as 32px.",
    )
    extend: Annotated[str, AfterValidator(_read_by(Extension.read))] | None = Field(
        None,
        description="Draw beyond the start picture's edges: left=128,right=64 (pixels), or 1024x768@ANCHOR (the "
        "whole, and where the picture is in it).",
    )
    reference: tuple[Picture, ...] = Field(
        (), max_length=10, description="Reference picture, called 'image 1' in the prompt; repeat the option for more."
    )
    regions: tuple[RegionText, ...] = Field(
        (),
        max_length=16,
        description="Box of the picture with a text of its own, as X,Y,WxH[*STRENGTH]:TEXT, in pixels or in shares of "
        "the picture; strength 1 is the default; repeat the option for more.",
    )
    tile: int | None = Field(
        None,
        ge=64,
        le=8192,
        description="Draw a picture larger than this in overlapping square windows of this side in pixels, which each "
        "step blends; for a second pass over an enlarged picture, at a low strength.",
    )
    upscale: Annotated[str, BeforeValidator(_enlargement_to_text)] | None = Field(
        None,
        description="Enlarge the finished picture by a factor such as 2x, or to a size such as 2048x1536, and draw it "
        "again at a low strength, in windows.",
    )
    upscaler: str | None = Field(
        None,
        max_length=500,
        description="Upscaling model that enlarges pictures before they are drawn again: a name in the folder of "
        "upscaling models, or a file; Lanczos resampling without one.",
    )
    upscale_strength: float = Field(
        0.25, ge=0, le=1, description="How much the second pass changes the enlarged picture; 0 leaves it out."
    )
    loras: tuple[Lora, ...] = Field(
        (),
        max_length=16,
        description="LoRA or a relative, as PATH[:STRENGTH][@FROM-UNTIL]; strength 1 and all steps (0-1) are the "
        "defaults; repeat the option for more.",
    )
    control: tuple[Picture, ...] = Field(
        (),
        max_length=4,
        description="Control picture, such as edges, depths or a pose, that the picture follows by a control net; "
        "repeat the option for more.",
    )
    control_nets: tuple[Control, ...] = Field(
        (),
        max_length=4,
        description="ControlNet of each control picture, in the same order, as "
        "PATH[:SCALE][@FROM-UNTIL][#MODE]; scale 0.75 and all steps (0-1) are the defaults.",
    )

    @property
    def repaints(self) -> bool:
        """Whether a part of the start picture is repainted and the rest is kept."""
        return any(value is not None for value in (self.mask, self.mask_from, self.extend))

    @property
    def keeps_start(self) -> bool:
        """Whether the start picture is enlarged as it is: nothing is drawn before."""
        return self.upscale is not None and self.image is not None and self.strength == 0 and not self.repaints

    @property
    def only_enlarges(self) -> bool:
        """Whether the start picture is enlarged and nothing is drawn."""
        return self.keeps_start and self.upscale_strength == 0


REPAINTING = (
    "mask", "mask_from", "mask_invert", "mask_grow", "mask_blur", "mask_soft", "mask_fill", "crop", "extend",
)  # fmt: skip
"""Fields of a Request that say which part of the start picture is repainted, and how."""
Wish = TypeVar("Wish", bound=Request)


def singles(request: Wish, first: int = 0) -> Iterator[Wish]:
    """The requests that draw each picture of a request alone, from picture `first` on. The request has a seed.

    With a variation, it is the variation's seed that counts up.
    """
    varied = None if request.variation is None else Variation.read(request.variation)
    for index in range(first, request.count):
        own: dict[str, Any] = {"seed": (request.seed or 0) + index}
        if varied is not None:
            own = {"variation": str(varied._replace(seed=(varied.seed + index) % 2**63))}
        yield request.model_copy(update={**own, "count": 1})


@dataclass(frozen=True)
class Spec:
    """One known model: its architecture, where its files are, its default settings.

    Variants are written as `replace(TURBO, ...)`.
    """

    name: str
    family: str  # a key of families.FAMILIES
    transformer: Any  # the family's own frozen config
    text_encoder: Any
    vae: Any
    steps: int
    guidance: float  # standard scale, 1 is off; with guides `read`, the value that the model was trained with
    shift: float  # used with shift_rule `fixed`
    text_encoder_2: Any = None
    image_encoder: Any = None  # encodes reference pictures, for models that read them as they read text
    image_embedder: Any = None  # maps the image encoder's states to the text encoder's width
    guides: GuidanceKind = "twice"
    shift_rule: ShiftRule = "fixed"
    shift_line: tuple[float, float, float, float] = (
        256,
        4096,
        0.5,
        1.15,
    )  # with `dynamic`: two numbers of tokens, then
    # the log of the shift at each
    size: tuple[int, int] = (1024, 1024)  # default width and height in pixels
    multiple: int = 16  # pixels along a side of an image token; the width and the height must be multiples of it
    solver: SolverName = "euler"
    schedule: ScheduleName = "simple"
    table: int = 1000  # entries of the table of times behind most schedules
    times: tuple[float, ...] = ()  # the times of the default steps, for a model that was distilled to some of its own
    strength: float = 0.6
    abilities: frozenset[str] = frozenset()  # any of: guidance, image, mask, control (nets), source (with a mask, the
    # start picture is the first reference), references, references_once, fill, map, regions, json (prompts), upsample,
    # upsample_references
    writer: str = ""  # a key of engine.writing.WRITERS, the grammar that expands prompts; empty: no grammar
    repo: str | None = None  # repository on the Hugging Face hub
    folder: str | None = None  # folder inside the package, for a model that ships with it
    download_bytes: int | None = None
    licence: str = "unknown"
    commercial: bool = False  # True if the licence lets a business use the model and sell its pictures
    takes: frozenset[str] | None = None  # fields of a Request that a remote model reads; None: it is drawn with here
    title: str = ""
    tiny: Spec | None = field(default=None, repr=False, compare=False)  # the same model with 2 blocks of width 64


@dataclass(frozen=True)
class Encoded:
    """The encoded text of a region. tokens: (L, D), the text encoder's states.

    box: left, top, right, bottom in image tokens. strength: as in `Region`.
    """

    tokens: Tensor
    box: tuple[int, int, int, int]
    strength: float = 1.0


@dataclass(frozen=True)
class Conditioning:
    """All conditions of a picture. Entry 0 is the prompt; entry 1, if there is one, is the negative prompt.

    tokens: (sum(lengths), D), the text encoder's states, packed one prompt after the other, without padding.
    The fields guidance, references, beside and controls hold for all entries, regions for entry 0 alone.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor | None = None  # (len(lengths), P), one pooled vector for each prompt, for families that use it
    guidance: float | None = None  # guidance scale, for models that take it as an input
    references: tuple[Tensor, ...] = ()  # latents (C, h, w) of the reference pictures
    beside: Tensor | None = None  # (C', h, w), channels concatenated to the noisy latents at every step
    controls: tuple[Tensor, ...] = ()  # what each control net sees of its picture
    regions: tuple[Encoded, ...] = ()  # the texts of boxes of the picture

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Conditioning:
        """Return a Conditioning with only the entry `index`."""
        index = range(len(self.lengths))[index]
        start = sum(self.lengths[:index])
        length = self.lengths[index]
        pooled = None if self.pooled is None else self.pooled[index : index + 1]
        regions = self.regions if index == 0 else ()
        tokens = self.tokens[start : start + length]
        return replace(self, tokens=tokens, lengths=(length,), pooled=pooled, regions=regions)

    @staticmethod
    def pack(entries: Sequence[Conditioning]) -> Conditioning:
        """Pack the prompts of one request. The fields that hold for all entries come from the first one."""
        import torch

        vectors = [e.pooled for e in entries if e.pooled is not None]
        return replace(
            entries[0],
            tokens=torch.cat([e.tokens for e in entries]),
            lengths=tuple(n for e in entries for n in e.lengths),
            pooled=torch.cat(vectors) if vectors else None,
        )


def read_size(text: str) -> int:
    """Return the bytes of a size like 4GiB, 3.5 GB or 800MiB. Raises InputError for other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise InputError(f"{text!r} is not a memory size: write it like 4GiB or 800MiB")
    return int(float(found[1]) * UNITS[found[2]])


def in_time(seconds: float) -> str:
    """Return a duration as text, rounded to the precision of the estimate."""
    if seconds < 90:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Machine:
    """What a model runs on. The command line, the server, its workers and Ray all take these options.

    Parameters
    ----------
    device
        cpu, cuda, cuda:1 or mps; default: the best available device.
    dtype
        bf16, fp32 or fp16; default: the best for the device.
    memory
        Memory limit, such as 8GiB: of the model on a GPU, of the process on a CPU; default: the free memory.
    placement
        resident: all parts of the model stay on the device; parked: only parts in use; streamed: only layers in use;
        default: the fastest that fits the memory.
    attention
        Attention kernels of the transformer on GPUs; auto: the fastest that give the same numbers.
    compile
        Compile the transformer's blocks. The first picture takes longer; meant for GPUs.
    commercial_only
        Refuse models without commercial use in their licence; INKSTREAM_COMMERCIAL_ONLY=1 does so for all commands.
    text_encoder
        A text encoder's file to take instead of the model's own, or a folder of such files.
    vae
        An autoencoder's file or folder to take instead of the model's own.
    lora_folder
        Folder of LoRA files that requests can name; default: `loras` in the data folder of inkstream.
    control_folder
        Folder of control nets that requests can name; default: `controls` in the data folder of inkstream.
    upscaler_folder
        Folder of upscaling models that requests can name, or that of ComfyUI or A1111 with its models; default:
        `upscalers` in the data folder of inkstream.
    merge_lora
        LoRA to merge into the transformer's weights while they are read, as PATH[:STRENGTH]; repeat for more.
    wildcards
        Folder of text files that prompts can name as __FILE__; default: `wildcards` in the data folder of inkstream.
    text_encoder_server
        Address of an `inkstream serve --encode-only` with the same model, which encodes the prompts: its text encoders
        take no memory here. INKSTREAM_API_KEY is its key.
    enhancer
        What writes prompts out for --upsample, which is then on by default: the address of a chat server with OpenAI's
        API, such as http://127.0.0.1:8080/v1 (its key is INKSTREAM_ENHANCER_KEY), or a model here that can upsample,
        such as flux2-klein-4b.
    enhancer_model
        Name of the enhancer's model at its server; default: the first that the server lists.
    max_cost
        Most US dollars that remote models may take in this run; a request that would take more is refused.
    """

    device: str | None = None
    dtype: str | None = None
    memory: str | None = None
    placement: PlacementName | None = None
    attention: AttentionName = "auto"
    compile: bool = False
    commercial_only: bool | None = None  # None follows the setting INKSTREAM_COMMERCIAL_ONLY
    text_encoder: str | None = None
    vae: str | None = None
    lora_folder: str | None = None
    control_folder: str | None = None
    upscaler_folder: str | None = None
    merge_lora: tuple[str, ...] = ()
    wildcards: str | None = None
    text_encoder_server: str | None = None
    enhancer: str | None = None
    enhancer_model: str | None = None
    max_cost: float | None = None

    @property
    def chosen(self) -> dict[str, str]:
        """The parts of a model to take instead of its own: text_encoder, vae -> path."""
        paths = {"text_encoder": self.text_encoder, "vae": self.vae}
        return {part: path for part, path in paths.items() if path is not None}

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes. Raises InputError if it is not a size."""
        return None if self.memory is None else read_size(self.memory)


ProvenanceName = Literal["none", "basic", "eu", "cn"]


@dataclass(frozen=True)
class Saving:
    """What a picture's file carries beside the picture.

    Parameters
    ----------
    metadata
        full: the request, and the marks of --provenance; minimal: only the marks; none: nothing.
    provenance
        Marks that a model made the picture. basic: IPTC's digital source type; eu: also an invisible mark and a C2PA
        signature; cn: also an invisible mark, a visible label and the AIGC metadata of GB 45438-2025; none: no marks.
    """

    metadata: Literal["full", "minimal", "none"] = "full"
    provenance: ProvenanceName = "basic"


SAVING = Saving()
"""What files carry unless something else is asked for."""


class Query(NamedTuple):
    """A point where a solver needs the velocity. x: float32, any shape. t: the time, from 1 (noise) to 0 (image).

    to: the time that the solver follows the velocity to. A flow map answers with the mean velocity on the way there;
    other models do not read it.
    """

    x: Tensor
    t: float
    to: float | None = None


Solver = Generator[Query, "Tensor", "Tensor"]
"""A generator. It yields the points where it needs the velocity, receives the velocities through `send`, and returns
the final x. It has no reference to a model."""


@dataclass(frozen=True)
class Queued:
    """The request is accepted and waits; `position` requests are ahead of it."""

    request: Request
    position: int = 0


@dataclass(frozen=True)
class Loading:
    """The request is being prepared: a download, loading of weights, or encoding of the prompt.

    text: while a prompt is being expanded, the text so far; the last text is the one that is drawn.
    note: one line to show to the user.
    """

    what: str
    done_bytes: int | None = None
    total_bytes: int | None = None
    text: str = ""
    note: str = ""


@dataclass(frozen=True)
class Step:
    """Step `step` of `steps` of picture `index` of `count` is done.

    preview: a small RGB picture, if previews are on.
    """

    step: int
    steps: int
    index: int
    count: int
    t: float
    seconds: float  # duration of this step
    preview: Image | None = None


@dataclass(frozen=True)
class Done:
    """Picture `index` of `count` is finished. `request` is the complete Request that draws only this picture.

    told: the prompt that the model's grammar, or a remote model, made of the request's; empty if none did. checked:
    whether the asked texts and colours are in the picture; empty if nothing was checked. cost: US dollars that a remote
    model takes for the picture.
    """

    image: Image
    request: Request
    index: int
    count: int
    seconds: float
    told: str = ""
    checked: str = ""
    cost: float | None = None


@dataclass(frozen=True)
class Failed:
    """The request failed. `kind` is `input` (the user can fix it) or `internal` (an error in this program)."""

    error: str
    kind: Literal["input", "internal"] = "internal"


Event = Queued | Loading | Step | Done | Failed


class Drawer(Protocol):
    """Draws requests. `Engine` draws in this process, `Client` on a server. `Router` chooses a Drawer by the model."""

    def submit(self, request: Request) -> Iterator[Event]:
        """Yield the events of a request, and a Done for each picture. Closing the iterator cancels at the next step.

        A request that cannot be drawn ends with Failed; nothing is raised for it.
        """
        ...

    def models(self) -> list[Spec]:
        """Return the models that can be asked for, the default first. Raises InputError if a server is not there."""
        ...

    def spec(self, name: str) -> Spec:
        """Return the Spec of a model. Raises InputError if there is no such model."""
        ...

    def remarks(self, request: Request) -> list[str]:
        """Return one line for each option that has no effect or a poor one. Call it after the request's first Step."""
        ...

    def ran_on(self, name: str) -> dict[str, str]:
        """Return what is known about the device that drew with a model, such as its dtype. Call it after a Done."""
        ...


@dataclass(frozen=True)
class Result:
    """The result of `Engine.generate`: the pictures, and for each the complete Request that draws only this picture."""

    images: list[Image]
    requests: list[Request]

    @staticmethod
    def of(events: Iterable[Event]) -> Result:
        """Collect all pictures from a request's events. Raises InputError if a Failed event comes."""
        result = Result([], [])
        for event in events:
            if isinstance(event, Done):
                result.images.append(event.image)
                result.requests.append(event.request)
            elif isinstance(event, Failed):
                raise InputError(event.error)
        return result
