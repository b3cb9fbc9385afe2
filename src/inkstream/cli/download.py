"""Nothing is downloaded before its size and licence were shown and somebody agreed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from inkstream.cli.lines import in_gigabytes
from inkstream.cli.terminal import Terminal
from inkstream.families import SPECS
from inkstream.types import InputError


def agree_to_download(name: str, yes: bool, terminal: Terminal) -> None:
    """Ask once, where the model of that name would have to be downloaded. InputError where nobody agrees."""
    from inkstream.engine.sources import PUBLISHED
    from inkstream.weights import hub

    repo = repository(name)
    if repo is None or hub.cached(repo, PUBLISHED) is not None:
        return
    if name in SPECS:
        size, licence = SPECS[name].download_bytes, SPECS[name].licence
    else:
        offer = hub.offer(repo, PUBLISHED)
        size, licence = offer.missing, offer.licence
    what = f"{repo}: {in_gigabytes(size or 0)}, licence {licence or 'not stated'}"
    if yes:
        terminal.say(f"downloading {what}")
    elif not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(f"{name} is not downloaded yet ({what}): add --yes to download it, or give -m a local path")
    elif not terminal.ask(f"Download {what}?"):
        raise InputError(f"{name} was not downloaded: give -m the path of a copy, or say y")


def repository(name: str) -> str | None:
    """The repository on the hub that a model's name means; None for a local path, and for what is neither."""
    if name in SPECS:
        return SPECS[name].repo
    is_local = Path(name).expanduser().exists()
    return name if not is_local and re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", name) else None
