"""`inkstream models`: lists the known models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from inkstream.cli.doctor import advise, judge
from inkstream.cli.download import is_downloaded
from inkstream.cli.lines import in_gigabytes, print_facts
from inkstream.engine.drawing.options import options
from inkstream.engine.files.licences import in_words
from inkstream.families import SPECS

TELLING = ("negative_prompt", "guidance", "cache", "image", "strength", "mask", "reference")
"""Options by which models differ. Other options of guidance behave as the negative prompt does."""


def list_models() -> list[dict[str, Any]]:
    """Return the facts of each model as JSON, without `fits`. Torch is not imported."""
    return [
        {
            "name": spec.name,
            "title": spec.title,
            "repository": spec.repo,
            "licence": spec.licence,
            "commercial": spec.commercial,
            "download_bytes": spec.download_bytes,
            "here": is_downloaded(spec.name),
            "fits": None,
            "abilities": sorted(spec.abilities),
            "options": {
                name: {key: value for key, value in option._asdict().items() if value}
                for name, option in options(spec).items()
            },
            "defaults": {
                "steps": spec.steps,
                "guidance": spec.guidance,
                "shift": spec.shift if spec.shift_rule == "fixed" else None,
                "shift_rule": spec.shift_rule,
                "width": spec.size[0],
                "height": spec.size[1],
                "solver": spec.solver,
                "schedule": spec.schedule,
                "strength": spec.strength,
            },
        }
        for spec in SPECS.values()
    ]


def add_fits(known: list[dict[str, Any]]) -> None:
    """Add how each published model fits this machine. The speed of the machine is measured."""
    from inkstream.engine.machine.fit import fits, foreseen, here, measure_speed
    from inkstream.engine.machine.loader import choose_device, choose_dtype

    kind, budget = here()
    device = choose_device()
    speed = measure_speed(device, choose_dtype(None, device))
    for model in known:
        if model["name"] in foreseen():
            model["fits"] = [asdict(fit) for fit in fits(SPECS[model["name"]], kind, budget, speed)]


def print_models(known: list[dict[str, Any]]) -> None:
    """Print a paragraph for each model, then how each fits this machine, and the recommended model."""
    for model in known:
        defaults = model["defaults"]
        size = in_gigabytes(model["download_bytes"]) if model["download_bytes"] else ""
        place = "here" if model["here"] else f"{size} to download" if size else "cannot be downloaded"
        print(f"{model['name']}  ({place}, {in_words(model['licence'], model['commercial'])})")
        print(f"  {model['title']}")
        size = f"{defaults['width']}x{defaults['height']}"
        shift = "by the size" if defaults["shift"] is None else f"{defaults['shift']:g}"
        print(f"  {size}, {defaults['steps']} steps, guidance {defaults['guidance']:g}, shift {shift}")
        for word in ("needs", "takes", "bears", "ignores", "rejects"):
            names = [name for name in TELLING if in_a_word(model["options"][name]) == word]
            if names:
                words = ", ".join(name.replace("_", " ") for name in names)
                print(f"  {word} {words}" + (", though it was not made for that" if word == "bears" else ""))
    print("on this machine:", flush=True)
    add_fits(known)
    print_facts({model["name"]: judge(model["fits"], None) for model in known if model["fits"] is not None}, "  ")
    print(advise(known))


def list_remote() -> list[dict[str, Any]]:
    """Return the facts of each remote model as JSON. Nothing is sent."""
    from inkstream.clients.remote.catalogue import offers
    from inkstream.clients.remote.drawer import describe

    return [describe(offer) for offer in offers().values()]


def print_remote(known: list[dict[str, Any]]) -> None:
    """Print a line for each remote model: its price and its terms."""
    from inkstream.clients.remote.budget import money
    from inkstream.engine.keys import find_key

    print("\ndrawn by others, only if named; the prompt goes there (see docs/remote.md):")
    for provider in dict.fromkeys(model["provider"] for model in known):
        own = [model for model in known if model["provider"] == provider]
        there = "is set" if find_key(own[0]["key"]) else "is not set"
        terms = own[0]["licence"]
        print(f"  {provider}, {own[0]['address'].partition('//')[2]} ({own[0]['key']} {there}; {terms})")
        for model in own:
            free = ", commercial use allowed" if model["commercial"] else ""
            size = f"{model['width']}x{model['height']}"
            print(f"    {model['name']}: about {money(model['price'])} for {size} ({model['date']}){free}")


def in_a_word(option: Mapping[str, Any]) -> str:
    """Return what a model does with an option: needs, takes, bears, ignores or rejects."""
    if option["effect"] != "honours":
        return option["effect"]
    return "needs" if option.get("needed") else "bears" if option.get("why") else "takes"
