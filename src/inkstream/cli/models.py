"""The models that are known by name, as `inkstream models` lists them."""

from __future__ import annotations

from typing import Any

from inkstream.cli.lines import in_gigabytes
from inkstream.families import SPECS


def list_models() -> list[dict[str, Any]]:
    """What is known of each model, as JSON."""
    from inkstream.weights.hub import cached

    return [
        {
            "name": spec.name,
            "title": spec.title,
            "repository": spec.repo,
            "licence": spec.licence,
            "commercial": spec.commercial,
            "download_bytes": spec.download_bytes,
            "here": spec.folder is not None or bool(spec.repo and cached(spec.repo, ["*.safetensors"])),
            "abilities": sorted(spec.abilities),
            "defaults": {
                "steps": spec.steps,
                "guidance": spec.guidance,
                "shift": spec.shift,
                "width": spec.size[0],
                "height": spec.size[1],
                "solver": spec.solver,
                "schedule": spec.schedule,
                "strength": spec.strength,
            },
        }
        for spec in SPECS.values()
    ]


def print_models(known: list[dict[str, Any]]) -> None:
    """A paragraph for each model."""
    for model in known:
        defaults = model["defaults"]
        size = in_gigabytes(model["download_bytes"]) if model["download_bytes"] else ""
        place = "here" if model["here"] else f"{size} to download" if size else "cannot be downloaded"
        print(f"{model['name']}  ({place}, {model['licence']})")
        print(f"  {model['title']}")
        size = f"{defaults['width']}x{defaults['height']}"
        print(f"  {size}, {defaults['steps']} steps, guidance {defaults['guidance']:g}, shift {defaults['shift']:g}")
        print(f"  takes {', '.join(['prompt', *model['abilities']])}")
