"""Download large files of a repository in parallel. A later run resumes a file that was interrupted.

huggingface_hub itself starts such a file again in each new process. A complete file is stored where its cache expects
the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import HfFileMetadata, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

CONNECTIONS = 4
CHUNK = 1 << 20
ATTEMPTS = 5
"""Number of consecutive failures without any new byte after which the download of a file fails."""


def transfer(repo: str, commit: str, names: Sequence[str], token: bool | None, progress: Callable[[int], None]) -> None:
    """Download files into huggingface_hub's cache as blobs.

    progress: called from any thread with the number of new bytes. Raises the exception of the first file that fails.
    Received bytes are kept, also when the process is killed.
    """
    waiting, failed, stop = list(reversed(names)), [], threading.Event()

    def work() -> None:
        try:
            while waiting and not stop.is_set():
                _fetch(repo, commit, waiting.pop(), token, progress, stop)
        except BaseException as error:  # raised again in the caller's thread
            failed.append(error)
            stop.set()

    # Daemon threads instead of a thread pool: the interpreter waits for a pool's threads, so Ctrl-C would take effect
    # only after the last file.
    threads = [threading.Thread(target=work, daemon=True) for _ in names[:CONNECTIONS]]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if failed:
        raise failed[0]


def _fetch(
    repo: str, commit: str, name: str, token: bool | None, progress: Callable[[int], None], stop: threading.Event
) -> None:
    """Download one file into the cache, with retries after connection errors."""
    url = hf_hub_url(repo, name, revision=commit)
    seen = 0  # bytes reported to `progress`
    failures = 0
    while not stop.is_set():
        before = seen
        try:
            file = get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # its links expire
            blob, lock = _places(repo, file)
            with WeakFileLock(lock):
                if blob.exists():
                    progress((file.size or 0) - seen)
                    return
                partial = blob.with_name(f"{blob.name}.partial")
                for size in _receive(file, partial, token):
                    progress(size - seen)
                    seen = size
                    if stop.is_set():
                        return
                _check(partial, file, name)
                os.replace(partial, blob)
                return
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            problem: Exception = error
        except OSError:
            raise
        except Exception as error:  # the HTTP library's own exceptions for all kinds of connection errors
            problem = error
        failures = 1 if seen > before else failures + 1
        if failures == ATTEMPTS:
            raise problem
        stop.wait(0.5 * failures)


def _receive(file: HfFileMetadata, partial: Path, token: bool | None) -> Iterator[int]:
    """Append the missing bytes to a partial file. Yields its size in bytes after each chunk."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as out:
        size = out.tell()
        yield size
        if size == file.size:
            return
        # Links to other hosts are signed and need no token, so the token is not sent there.
        own = urlsplit(file.location).netloc == urlsplit(constants.ENDPOINT).netloc
        headers = build_hf_headers(token=token if own else False)
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={size}-"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", file.location, headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and size:  # the server ignored the range and sends the whole file
                out.truncate(0)
                size = 0
            for chunk in response.iter_bytes(CHUNK):
                out.write(chunk)
                size += len(chunk)
                yield size


def _check(partial: Path, file: HfFileMetadata, name: str) -> None:
    """Check a file's size, and its SHA-256 if the etag is one. A longer or different file is removed.

    Raises EOFError if the file is incomplete or wrong.
    """
    size = partial.stat().st_size
    if file.size is not None and size < file.size:
        raise EOFError(f"{name} ended after {size:,} of {file.size:,} bytes")
    right = file.size in (None, size)
    if right and re.fullmatch(r"[0-9a-f]{64}", file.etag or ""):
        with partial.open("rb") as data:
            right = hashlib.file_digest(data, "sha256").hexdigest() == file.etag
    if not right:
        partial.unlink()
        raise EOFError(f"{name} was damaged during the download")


def _places(repo: str, file: HfFileMetadata) -> tuple[Path, Path]:
    """Return the path of a file's blob in huggingface_hub's cache, and the path of the lock that it uses."""
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    lock = cache / ".locks" / folder / f"{file.etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return cache / folder / "blobs" / str(file.etag), lock
