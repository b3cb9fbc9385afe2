"""The keys of providers: from the environment, or from the system's keyring if the package keyring is installed."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from typing import Any

from inkstream.types import InputError

SERVICE = "inkstream"
"""The name under which the keyring keeps the keys: `keyring set inkstream BFL_API_KEY`."""


def find_key(variable: str) -> str:
    """The key of that name; empty if there is none."""
    if key := os.environ.get(variable, "").strip():
        return key
    with suppress(Exception):  # not installed, or the system has no keyring
        keyring: Any = import_module("keyring")
        return str(keyring.get_password(SERVICE, variable) or "").strip()
    return ""


def key_of(title: str, variable: str) -> str:
    """The key of a provider. Raises InputError if there is none, or if no header can carry it."""
    key = find_key(variable)
    if not key:
        raise InputError(f"there is no key for {title}: set {variable}, or run keyring set {SERVICE} {variable}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"the key in {variable} has characters that no key has: copy it again")
    return key
