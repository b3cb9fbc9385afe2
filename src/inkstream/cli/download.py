"""Consent to downloads: the user sees size and licence, and agrees, before anything is downloaded."""

from __future__ import annotations

import sys

from inkstream.cli.lines import in_gigabytes
from inkstream.cli.terminal import Terminal
from inkstream.families import SPECS
from inkstream.types import InputError


def agree_to_download(name: str, yes: bool, terminal: Terminal, commercial_only: bool | None = None) -> None:
    """Ask for consent if the model must be downloaded. Raises InputError without consent.

    commercial_only: refuse a licence that does not allow commercial use; None: as the setting says.
    """
    from inkstream.engine.files.licences import check_licence, is_commercial_only, known_as
    from inkstream.engine.files.names import check_name, downloads, repository

    check_name(name)
    if not downloads(name):
        return
    from inkstream.weights import hub  # a slow import, only needed for downloads

    wanted = {repo: files for repo, files in downloads(name).items() if hub.cached(repo, files) is None}
    if not wanted:
        return
    if is_commercial_only(commercial_only):
        check_licence(name, known_as(name))
    if name in SPECS and repository(name) in wanted:
        size, licence = SPECS[name].download_bytes, SPECS[name].licence
    else:
        offers = [hub.offer(repo, files) for repo, files in wanted.items()]
        size, licence = sum(offer.missing for offer in offers), offers[0].licence
    what = f"{' and '.join(wanted)}: {in_gigabytes(size or 0)}, licence {licence or 'not stated'}"
    if yes:
        terminal.say(f"downloading {what}")
    elif not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(f"{name} is not downloaded yet ({what}): add --yes to download it, or give -m a local path")
    elif not terminal.ask(f"Download {what}?"):
        raise InputError(f"{name} was not downloaded: answer y, or give -m the path of a copy")


def is_downloaded(name: str) -> bool:
    """Return whether a known model is in the hub's cache, or ships with inkstream. Torch is not imported."""
    from inkstream.weights.hub import cached

    spec = SPECS[name]
    return spec.folder is not None or bool(spec.repo and cached(spec.repo, ["*.safetensors"]))
