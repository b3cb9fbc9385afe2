"""Repositories on the Hugging Face hub, as local folders. Cache, mirror and offline mode are huggingface_hub's own
(HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE)."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm

from inkstream.types import InputError

OFFICIAL = "huggingface.co"
"""The only host that is ever sent the user's token."""


class Offer(NamedTuple):
    """What a download would be: bytes not here yet, bytes in all, and the licence the repository states."""

    missing: int
    total: int
    licence: str | None


def cached(repo: str, patterns: Sequence[str]) -> Path | None:
    """The repository's folder in the cache, if all its files that match are there. Asks nobody."""
    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def cached_file(repo: str, name: str) -> Path | None:
    """One file of a repository, if it is in the cache. Asks nobody."""
    path = try_to_load_from_cache(repo, name)
    return Path(path) if isinstance(path, str) else None


def offer(repo: str, patterns: Sequence[str]) -> Offer:
    """Ask the hub what a download of the files that match would be. InputError as `fetch`."""
    try:
        info = HfApi(token=_token()).model_info(repo, files_metadata=True)
    except Exception as error:  # the network has many ways to fail
        _explain(repo, error)
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = {name: files[name] for name in filter_repo_objects(files, allow_patterns=list(patterns))}
    here = {name for name in files if isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)}
    licence = info.card_data.get("license") if info.card_data is not None else None
    return Offer(sum(n for name, n in files.items() if name not in here), sum(files.values()), licence)


def fetch(repo: str, patterns: Sequence[str], progress: Callable[[int], None] | None = None) -> Path:
    """Download the files that match into the cache and return their folder; a complete one there is taken as it is.

    Files that are whole are never fetched twice, and a broken connection is taken up where it broke. progress: told the
    bytes received so far. InputError, one line with the remedy, where the repository is not there, is gated, the hub
    cannot be reached, or the disk is full.
    """
    folder = cached(repo, patterns)
    if folder is not None:
        return folder
    try:
        return Path(
            snapshot_download(
                repo,
                allow_patterns=list(patterns),
                token=_token(),
                tqdm_class=_bar(progress or (lambda done: None)),  # type: ignore[arg-type]
            )
        )
    except Exception as error:  # the network has many ways to fail
        _explain(repo, error)


def check_space(repo: str, needed: int) -> None:
    """InputError where the cache's disk has no room for so many bytes."""
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{repo} takes {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "make room, or set HF_HOME to a folder on another disk"
        )


def _token() -> bool | None:
    """None lets huggingface_hub send the token it finds; False keeps it back from a mirror."""
    endpoint = urlsplit(constants.ENDPOINT)
    return None if (endpoint.scheme, endpoint.hostname) == ("https", OFFICIAL) else False


def _bar(progress: Callable[[int], None]) -> type[tqdm]:
    """A bar that draws nothing and tells how many bytes have come. huggingface_hub keeps one or two such bars."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "file": _Nowhere(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            # Downloads run in threads that the interpreter waits for: without this, Ctrl-C ends with the last file.
            if not threading.main_thread().is_alive():
                raise KeyboardInterrupt
            shown = super().update(n)
            if self.unit == "B":
                progress(int(self.n))
            return shown

    return Bar


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _explain(repo: str, error: Exception) -> NoReturn:
    """The same failure as one line with its remedy."""
    where = constants.ENDPOINT
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if isinstance(error, HFValidationError):
        text = f"{repo} is no repository's name: it reads OWNER/NAME"
    elif any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        text = f"{repo} is not whole in the cache and HF_HUB_OFFLINE is set: unset it once, or give a local path"
    elif any(isinstance(e, GatedRepoError) for e in chain):
        text = f"{repo} is gated: accept its terms at {where}/{repo}, then log in with `hf auth login`"
    elif any(isinstance(e, RepositoryNotFoundError) for e in chain):
        text = f"{where} has no repository {repo}, or it is private: check the name, or log in with `hf auth login`"
    elif any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        text = f"the disk with {constants.HF_HUB_CACHE} is full: make room, or set HF_HOME to a folder on another disk"
    elif any(isinstance(e, HfHubHTTPError) for e in chain):
        text = f"{where} refused {repo} ({reason}): try again later"
    else:
        text = f"{repo} could not be fetched from {where} ({reason}): check the connection and try again"
    raise InputError(text) from error
