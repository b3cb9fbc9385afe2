"""Plain lines on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_facts(facts: Mapping[str, Any], indent: str = "", width: int = 0) -> None:
    """Print one `name: value` a line. A nested mapping is indented below its name. width: of the names, at least."""
    width = max(width, *(len(name) for name in facts)) if facts else 0
    for name, value in facts.items():
        label = name.replace("_", " ") + ":"
        if isinstance(value, Mapping):
            print(f"{indent}{label}")
            print_facts(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            print(f"{indent}{label:{width + 1}} {text}")


def in_gigabytes(count: int) -> str:
    """Return a number of bytes as text: 32.9 GB, 410 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def in_gibibytes(count: int) -> str:
    """Return a number of bytes of memory as text, in the unit of GPUs: 3.71 GiB."""
    return f"{count / 2**30:.2f} GiB"
