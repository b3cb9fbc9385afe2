"""inkstream: text to image with Z-Image and FLUX. Names are loaded on first use, so that importing costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inkstream.clients.http import Client
    from inkstream.clients.remote.drawer import Remote
    from inkstream.clients.router import Router
    from inkstream.engine.drawing.model import Model
    from inkstream.engine.engine import Engine
    from inkstream.engine.machine.loader import load
    from inkstream.types import Conditioning, InputError, Machine, Request, Result, Spec

__version__ = "0.1.0"

_WHERE = {
    "Client": "inkstream.clients.http",
    "Remote": "inkstream.clients.remote.drawer",
    "Router": "inkstream.clients.router",
    "Engine": "inkstream.engine.engine",
    "load": "inkstream.engine.machine.loader",
    "Model": "inkstream.engine.drawing.model",
    "Conditioning": "inkstream.types",
    "InputError": "inkstream.types",
    "Machine": "inkstream.types",
    "Request": "inkstream.types",
    "Result": "inkstream.types",
    "Spec": "inkstream.types",
}
__all__ = [
    "Client",
    "Conditioning",
    "Engine",
    "InputError",
    "Machine",
    "Model",
    "Remote",
    "Request",
    "Result",
    "Router",
    "Spec",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'inkstream' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
