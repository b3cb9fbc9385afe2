"""The figures of advice, read strictly from a TOML file: prices, watts, times, uses. Each has a source and a date."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inkstream.types import InputError

FILE = Path(__file__).with_name("figures.toml")
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Figure(BaseModel):
    """A figure, who says so, and when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Text
    date: datetime.date


class Electricity(Figure):
    price: Amount  # of a kWh


class Owning(Figure):
    years: Positive
    host_watts: Amount


class Renting(Figure):
    sessions: Amount  # a month
    minutes: Amount  # of each session, beside drawing


class CardPrice(Figure):
    name: Text
    price: Positive
    watts: Positive


class Rent(Figure):
    card: Text
    provider: Text
    hour: Positive


class Api(Figure):
    model: Text
    provider: Text
    first: Amount
    further: Amount


class Time(Figure):
    model: Text
    card: Text
    seconds: Positive


class Use(Figure):
    name: Text
    models: tuple[str, ...] = Field(min_length=1)
    why: Text


class Language(Figure):
    name: Text
    models: tuple[str, ...] = Field(min_length=1)


class Figures(BaseModel):
    """A file of figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    electricity: Electricity
    owning: Owning
    renting: Renting
    card: tuple[CardPrice, ...] = ()
    rent: tuple[Rent, ...] = ()
    api: tuple[Api, ...] = ()
    time: tuple[Time, ...] = ()
    use: tuple[Use, ...] = ()
    language: tuple[Language, ...] = ()


def read_figures(path: Path = FILE) -> Figures:
    """Read a file of figures. Raises InputError that names the figure and what is wrong."""
    try:
        return Figures.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise InputError(f"figures {path} cannot be read ({error.strerror}): copy {FILE}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"figures {path} are not TOML ({error}): correct the file") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(str(part) for part in wrong["loc"])
        raise InputError(f"figures {path}: {place}: {wrong['msg']}: correct it, as in {FILE}") from None
