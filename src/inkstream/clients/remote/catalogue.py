"""The remote models, from models.toml and the user's own remote.toml: what each takes, its sizes and its price."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from inkstream.types import InputError, Request, Spec

OWN = "remote.toml"
"""The user's file in the data folder of inkstream."""
MEGAPIXEL = 1024 * 1024
LARGEST = 4 * MEGAPIXEL
"""Most pixels of a picture without a size whose reference is larger."""
NEAR = 0.03
"""How far a picture's ratio may be from one that the provider has."""
ROUGH = 0.3
"""How far the number of pixels may be from that of a resolution."""
PROVIDERS = ("bfl", "openai", "dashscope", "fal", "replicate", "together")
"""The providers, each a module beside this one."""
NAME = re.compile(rf"(?:{'|'.join(PROVIDERS)}):.*")


@dataclass(frozen=True)
class Price:
    """What pictures cost, in US dollars. The fields are those of models.toml."""

    picture: float | None = None
    first: float | None = None
    further: float = 0.0
    reference: float = 0.0
    resolutions: Mapping[str, float] = field(default_factory=dict[str, float])
    text: float = 0.0
    image: float = 0.0
    output: float = 0.0
    about: float | None = None
    expanded: float = 1.0

    def estimate(
        self,
        size: tuple[int, int],
        references: Sequence[tuple[int, int]] = (),
        resolution: str = "",
        upsample: bool = False,
    ) -> float:
        """The price of one picture. It is rounded up where the provider's way of rounding is not known."""
        pixels = size[0] * size[1]
        if self.picture is not None:
            price = self.picture
        elif resolution:
            price = self.resolutions[resolution]
        elif self.first is not None:
            more = max(0, math.ceil(pixels / MEGAPIXEL) - 1)
            price = self.first + more * self.further
        else:
            price = (self.about or 0.0) * max(1.0, pixels / MEGAPIXEL)
        price += sum(math.ceil(w * h / MEGAPIXEL) * self.reference for w, h in references)
        return price * (self.expanded if upsample else 1.0)

    def of_tokens(self, text: int, image: int, output: int) -> float | None:
        """The price of so many tokens; None if the model is not billed by tokens."""
        if not self.output:
            return None
        return (text * self.text + image * self.image + output * self.output) / 1e6


@dataclass(frozen=True)
class Offer:
    """A remote model. The fields are those of models.toml."""

    provider: str
    name: str
    title: str
    licence: str
    source: str
    date: str
    model: str
    price: Price
    commercial: bool = False
    takes: tuple[str, ...] = ()
    references: int = 0
    size: tuple[int, int] = (1024, 1024)
    multiple: int = 1
    least: int = 16
    most: int = 16_384
    area: tuple[int, int] = (1, 1 << 40)
    ratio: float = 1000.0
    sizes: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    resolutions: Mapping[str, float] = field(default_factory=dict[str, float])
    send: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def spec(self) -> Spec:
        """The Spec of the model. It has no parts, because nothing of it is here."""
        able = {"references"} if self.references else set[str]()
        able |= {"upsample"} if "upsample" in self.takes else set()
        return Spec(
            name=self.name, family="", transformer=None, text_encoder=None, vae=None, steps=1, guidance=1.0, shift=1.0,
            size=self.size, multiple=self.multiple, abilities=frozenset(able), licence=self.licence,
            commercial=self.commercial, title=self.title,
            takes=frozenset(("prompt", "model", "count", "width", "height", *self.takes)),
        )  # fmt: skip

    def size_of(self, request: Request, references: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The width and height to ask for. Raises InputError, with the nearest that can be had, for any other.

        references: their sizes. Without a size, the picture gets the shape of the first.
        """
        width, height = request.width, request.height
        if width is None and height is None and references:
            width, height = self._fit(*references[0])
        width, height = width or self.size[0], height or self.size[1]
        asked = f"{width}x{height}"
        if self.shapes:
            self.shape_of((width, height))
        elif self.sizes and asked not in self.sizes:
            raise InputError(f"{asked} is no size of {self.name}: take {', '.join(self.sizes)}")
        for side, value in (("width", width), ("height", height)):
            if not self.sizes and value % self.multiple:
                low = value // self.multiple * self.multiple
                near = f"{low} or {low + self.multiple}" if low else f"{self.multiple}"
                raise InputError(
                    f"{side} {value} is not a multiple of {self.multiple}, as {self.name} needs: take {near}"
                )
            if not self.least <= value <= self.most:
                raise InputError(f"{side} {value} is out of the range of {self.name}: take {self.least} to {self.most}")
        if not self.area[0] <= width * height <= self.area[1]:
            low, high = (round(pixels / MEGAPIXEL, 2) for pixels in self.area)
            raise InputError(f"{asked} is out of the range of {self.name}: take {low:g} to {high:g} megapixels")
        if max(width, height) > self.ratio * min(width, height):
            raise InputError(f"{asked} is too long for {self.name}: take sides up to 1:{self.ratio:g}")
        return width, height

    def shape_of(self, size: tuple[int, int]) -> tuple[str, str]:
        """The provider's names of a size: its ratio and its resolution. Raises InputError if it has none."""

        def far(shape: str) -> float:
            across, down = map(int, shape.split(":"))
            return abs(math.log(across / down * size[1] / size[0]))

        pixels = size[0] * size[1] / MEGAPIXEL
        shape = min(self.shapes, key=far)
        resolution = min(self.resolutions, key=lambda name: abs(math.log(self.resolutions[name] / pixels)))
        asked = f"{size[0]}x{size[1]}"
        if far(shape) > NEAR:
            raise InputError(f"{asked} has no ratio of {self.name}: take one of {', '.join(self.shapes)}")
        if abs(math.log(self.resolutions[resolution] / pixels)) > ROUGH:
            known = " or ".join(f"{value:g}" for value in self.resolutions.values())
            raise InputError(f"{asked} is no size of {self.name}: take about {known} megapixels")
        return shape, resolution

    def _fit(self, width: int, height: int) -> tuple[int, int]:
        """A size of the model with the shape of a picture, and about its number of pixels."""
        if self.sizes:
            known = [tuple(map(int, size.split("x"))) for size in self.sizes]
            return min(((w, h) for w, h in known), key=lambda one: abs(math.log(one[0] / one[1] * height / width)))
        if self.shapes:
            shape = min((tuple(map(int, one.split(":"))) for one in self.shapes),
                        key=lambda one: abs(math.log(one[0] / one[1] * height / width)))  # fmt: skip
            scale = math.sqrt(self.size[0] * self.size[1] / (shape[0] * shape[1]))
            return round(shape[0] * scale), round(shape[1] * scale)
        shape = min(self.ratio, max(1 / self.ratio, width / height))
        pixels = min(max(width * height, self.area[0] * 1.1), self.area[1], LARGEST)
        sides = (math.sqrt(pixels * shape), math.sqrt(pixels / shape))
        low, high = (-(-self.least // self.multiple) * self.multiple, self.most // self.multiple * self.multiple)
        across, down = (min(high, max(low, int(side / self.multiple) * self.multiple)) for side in sides)
        return across, down


def is_remote(name: str) -> bool:
    """Whether a model's name is that of a remote one: it begins with a provider's."""
    return NAME.fullmatch(name) is not None and not Path(name).exists()


def offers() -> dict[str, Offer]:
    """The known remote models by name. Raises InputError if the user's own file cannot be read."""
    found = _read(Path(__file__).with_name("models.toml"))
    if (own := own_file()).exists():
        found |= _read(own)
    return found


def offer_of(name: str) -> Offer:
    """The remote model of that name. Raises InputError if it is not known."""
    known = offers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or [one for one in known if one.startswith(name[:4])]
        raise InputError(f"{name[:100]} is not a known remote model: take {', '.join(near)}, or add it to {own_file()}")
    return known[name]


def own_file() -> Path:
    """The user's file of remote models. It need not exist."""
    from platformdirs import user_data_path

    return user_data_path("inkstream") / OWN


def _read(path: Path) -> dict[str, Offer]:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): correct it, or remove it") from None
    found: dict[str, Offer] = {}
    kind = TypeAdapter(Offer)
    for provider, models in tables.items():
        if provider not in PROVIDERS or not isinstance(models, dict):
            raise InputError(f"{path}: {provider} is not a provider: take {', '.join(PROVIDERS)}")
        for short, facts in models.items():
            name = f"{provider}:{short}"
            if not re.fullmatch(r"[\w.-]{1,60}", short, re.ASCII):
                raise InputError(f"{path}: {name} is not a name: write letters, digits, dots and dashes")
            try:
                given = {
                    "provider": provider,
                    "name": name,
                    "model": short,
                    **facts,
                    "date": str(facts.get("date", "")),
                }
                if unknown := given.keys() - Offer.__dataclass_fields__.keys():
                    raise InputError(f"{path}: {name} has the unknown field {min(unknown)}: see models.toml")
                found[name] = kind.validate_python(given)
            except (ValidationError, AttributeError, TypeError) as error:
                first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
                where = ".".join(map(str, first["loc"]))
                raise InputError(f"{path}: {name}: {where}: {first['msg']}: correct the file") from None
    return found
