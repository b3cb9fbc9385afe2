"""Errors as one line, which names the value and the remedy, and an exit code."""

from __future__ import annotations

import difflib
from typing import Any

import cyclopts
import pydantic
from pydantic_core import ErrorDetails

from inkstream.types import InputError


def explain(error: Exception) -> tuple[str, int]:
    """Return the line to print and the exit code: 2 if the user can fix the error, 1 for an internal error."""
    cause = error.__cause__
    if isinstance(cause, pydantic.ValidationError):
        error = cause
    if isinstance(error, InputError):
        return one_line(str(error)), 2
    if isinstance(error, MemoryError) and str(error):
        return one_line(str(error)), 1
    if isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False)[0]
        return explain_value(first, "--" + str(first["loc"][0]).replace("_", "-")), 2
    if isinstance(error, cyclopts.UnusedCliTokensError):
        word = (error.unused_tokens or ["?"])[0]
        return one_line(f"{word} is not expected here: put a prompt of several words in quotes"), 2
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        name = name.lstrip("-").upper() if error.argument.index is not None else error.keyword or name
        return f"{name} is missing its value: see inkstream {' '.join(error.command_chain or [])} --help", 2
    if isinstance(error, cyclopts.RepeatArgumentError):
        return f"{error.token.keyword} is given twice: give it once", 2
    if isinstance(error, cyclopts.CycloptsError):
        line = one_line(str(error))
        remedy = " ".join(["inkstream", *(error.command_chain or []), "--help"])
        return line if "Did you mean" in line or "Choose from" in line else f"{line} See {remedy}", 2
    return one_line(f"{type(error).__name__}: {error} (internal error: --debug shows the traceback)"), 1


def explain_value(wrong: ErrorDetails, name: str) -> str:
    """Return a line about an invalid value of a Request: its name, the value and the remedy."""
    context: dict[str, Any] = wrong.get("ctx", {})
    bounds = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()}
    kind, value = wrong["type"], one_line(str(wrong["input"]))
    if isinstance(reason := context.get("error"), InputError):
        return str(reason)
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{name} {value} is not known: {hint}take one of {', '.join(choices)}"
    remedies = {
        "greater_than_equal": "is too small: give {ge} or more",
        "greater_than": "is too small: give more than {gt}",
        "less_than_equal": "is too large: give {le} or less",
        "less_than": "is too large: give less than {lt}",
        "int_parsing": "is not a whole number: give one such as 8",
        "int_from_float": "is not a whole number: give one such as 8",
        "int_parsing_size": "is too large a number: give a smaller one",
        "float_parsing": "is not a number: give one such as 0.6",
        "finite_number": "is not a finite number: give one such as 0.6",
    }
    return f"{name} {value} " + remedies.get(kind, "is not valid: " + wrong["msg"]).format(**bounds)


def one_line(text: str) -> str:
    """Return a text as one line of at most 500 characters, with single spaces."""
    text = " ".join(text.split())
    return text if len(text) <= 500 else text[:497] + "..."
