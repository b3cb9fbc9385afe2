"""Download repositories of the Hugging Face hub into local folders.

The cache, the mirror and the offline mode are those of huggingface_hub: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_cached_repo_tree,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from tqdm.auto import tqdm

from inkstream.types import InputError
from inkstream.weights.transfer import transfer

OFFICIAL = "huggingface.co"
"""The only host that receives the user's token."""

LARGE = 1 << 24
"""Size in bytes from which an interrupted download of a file is resumed."""


class Offer(NamedTuple):
    """Size of a download in bytes, missing and total, and the licence that the repository states."""

    missing: int
    total: int
    licence: str | None


def cached(repo: str, patterns: Sequence[str]) -> Path | None:
    """Return the repository's folder in the cache if it holds all matching files, else None. Uses no network.

    If the cache has no list of the repository's files, the cached files count as complete only in offline mode.
    """
    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
        if not constants.HF_HUB_OFFLINE:
            get_cached_repo_tree(repo)
    except (LocalEntryNotFoundError, CachedRepoTreeNotFoundError, HFValidationError):
        return None
    return folder


def cached_file(repo: str, name: str) -> Path | None:
    """Return the path of one file of a repository if it is in the cache, else None. Uses no network."""
    path = try_to_load_from_cache(repo, name)
    return Path(path) if isinstance(path, str) else None


def offer(repo: str, patterns: Sequence[str]) -> Offer:
    """Ask the hub for the size and the licence of the matching files. Raises InputError as `fetch` does."""
    try:
        info, sizes, missing = _ask(repo, patterns)
    except Exception as error:  # network errors have many types
        _explain(repo, error)
    licence = info.card_data.get("license") if info.card_data is not None else None
    return Offer(sum(missing.values()), sum(sizes.values()), licence)


def names(repo: str, pattern: str) -> list[str]:
    """Ask the hub for the names of the matching files. Raises InputError as `fetch` does."""
    try:
        return [*_ask(repo, [pattern])[1]]
    except Exception as error:  # network errors have many types
        _explain(repo, error)


def fetch(repo: str, patterns: Sequence[str], progress: Callable[[int], None] | None = None) -> Path:
    """Download the matching files into the cache and return their folder. A complete cached folder is used as it is.

    A later call resumes an interrupted download, also in the middle of a large file. progress: called with the number
    of bytes received so far, out of those that `offer` calls missing; an exception that it raises ends the download.
    Raises InputError, one line with the remedy, if the repository does not exist or is gated, if the hub cannot be
    reached, or if the disk is full.
    """
    folder = cached(repo, patterns)
    if folder is not None:
        return folder
    try:
        info, _, missing = _ask(repo, patterns)
        count = _counter(progress or (lambda done: None))
        large = sorted((name for name in missing if missing[name] >= LARGE), key=lambda name: -missing[name])
        transfer(repo, str(info.sha), large, token(), count)
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns), token=token(), tqdm_class=_Silent))
        count(sum(size for name, size in missing.items() if name not in large))
        return folder
    except Exception as error:  # network errors have many types
        _explain(repo, error)


def token() -> bool | None:
    """Return the `token` argument for huggingface_hub: None sends the user's token, False (for a mirror) sends none."""
    endpoint = urlsplit(constants.ENDPOINT)
    return None if (endpoint.scheme, endpoint.hostname) == ("https", OFFICIAL) else False


def check_space(repo: str, needed: int) -> None:
    """Raise InputError if the cache's disk has fewer than `needed` bytes free."""
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{repo} needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "make room, or set HF_HOME to a folder on another disk"
        )


def _ask(repo: str, patterns: Sequence[str]) -> tuple[ModelInfo, dict[str, int], dict[str, int]]:
    """Return the hub's information on a repository, the sizes of the matching files, and the sizes of those that are
    not in the cache. Sizes are name -> bytes."""
    info = HfApi(token=token()).model_info(repo, files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    sizes = {name: files[name] for name in filter_repo_objects(files, allow_patterns=list(patterns))}
    missing = {
        name: size
        for name, size in sizes.items()
        if not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)
    }
    return info, sizes, missing


def _counter(progress: Callable[[int], None]) -> Callable[[int], None]:
    """Return a function that several threads call with byte counts. It passes the sum to `progress`."""
    total, lock = 0, threading.Lock()

    def count(size: int) -> None:
        nonlocal total
        with lock:
            total += size
            progress(total)

    return count


class _Silent(tqdm):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "disable": True})


def _explain(repo: str, error: Exception) -> NoReturn:
    """Raise an InputError that states the failure and its remedy in one line. An InputError is raised unchanged."""
    where = constants.ENDPOINT
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)

    def met(kind: type[BaseException]) -> bool:
        return any(isinstance(e, kind) for e in chain)

    if met(InputError):
        raise error
    if met(HFValidationError):
        text = f"{repo} is not a valid repository name: write it as OWNER/NAME"
    elif met(OfflineModeIsEnabled):
        text = f"{repo} is not complete in the cache and HF_HUB_OFFLINE is set: unset it once, or give a local path"
    elif met(GatedRepoError):
        text = f"{repo} is gated: accept its terms at {where}/{repo}, then log in with `hf auth login`"
    elif met(RepositoryNotFoundError):
        text = f"{where} has no repository {repo}, or it is private: check the name, or log in with `hf auth login`"
    elif any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        text = f"the disk with {constants.HF_HUB_CACHE} is full: make room, or set HF_HOME to a folder on another disk"
    elif met(HfHubHTTPError):
        text = f"{where} refused {repo} ({reason}): try again later"
    else:
        text = f"{repo} could not be downloaded from {where} ({reason}): check the connection and try again"
    raise InputError(text) from error
