"""Consent to downloads: the user sees size and licence, and agrees, before anything is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inkstream.cli.lines import in_gigabytes
from inkstream.cli.terminal import Terminal
from inkstream.families import SPECS
from inkstream.types import InputError, LoraUse, Machine


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
    _agree(name, what, "-m", yes, terminal)


def _agree(name: str, what: str, option: str, yes: bool, terminal: Terminal) -> None:
    """Ask for consent to a download. what: is downloaded. option: that takes a path too. Raises InputError without."""
    if yes:
        terminal.say(f"downloading {what}")
    elif not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(
            f"{name} is not downloaded yet ({what}): add --yes to download it, or give {option} a local path"
        )
    elif not terminal.ask(f"Download {what}?"):
        raise InputError(f"{name} was not downloaded: answer y, or give {option} the path of a copy")


def agree_to_loras(loras: Sequence[str], machine: Machine, yes: bool, terminal: Terminal) -> None:
    """Download the adapters that are named by their place on the hub, after consent as for models. Others are left.

    Raises InputError without consent, or if the hub has no such adapter.
    """
    from inkstream.engine.files.loras import find_lora, lora_folder, on_hub

    for name in dict.fromkeys(LoraUse.read(lora).path for lora in loras):
        if published := on_hub(name):
            try:
                find_lora(name, lora_folder(machine))
            except InputError:
                _download_lora(name, *published, yes, terminal)


def _download_lora(name: str, repo: str, file: str, yes: bool, terminal: Terminal) -> None:
    from inkstream.engine.files.loras import files_of
    from inkstream.weights import hub
    from inkstream.weights.lora.keys import FOLDERS

    def ask_hub(pattern: str) -> list[str]:
        try:
            return hub.names(repo, pattern)
        except InputError as error:
            raise InputError(f"lora {name} is not a file here, and {error}") from error

    there = ask_hub(file or "*.safetensors")
    usual = [one for one in FOLDERS if one in there]
    if not there:
        raise InputError(f"{repo} on the hub has no {file or 'safetensors file'}: look at its files there")
    if len(there) > 1 and not usual:
        some = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        raise InputError(f"{repo} has {len(there)} files ({some}): name one, such as --lora {repo}/{there[0]}")
    wanted = files_of((usual or there)[0])
    offer = hub.offer(repo, wanted)
    what = f"{repo}: {in_gigabytes(offer.missing)}, licence {offer.licence or 'not stated'}"
    _agree(name, what, "--lora", yes, terminal)
    hub.check_space(repo, offer.missing)
    title = f"download of {repo}"
    hub.fetch(repo, wanted, lambda done: terminal.wait(title, done, offer.missing))


def is_downloaded(name: str) -> bool:
    """Return whether a known model is in the hub's cache, or ships with inkstream. Torch is not imported."""
    from inkstream.weights.hub import cached

    spec = SPECS[name]
    return spec.folder is not None or bool(spec.repo and cached(spec.repo, ["*.safetensors"]))
