"""Large files of a repository, several at a time, each kept as far as it came: a later run goes on from there.

huggingface_hub starts a file anew in each process. What is whole here lies where its cache wants it.
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
"""Failures in a row, without a byte between them, after which a file is given up."""


def transfer(repo: str, commit: str, names: Sequence[str], token: bool | None, progress: Callable[[int], None]) -> None:
    """Bring files into huggingface_hub's cache as blobs. progress: told of more bytes here, from any thread.

    Raises what the first file to fail raised; what came is kept, also where the process is ended.
    """
    waiting, failed, stop = list(reversed(names)), [], threading.Event()

    def work() -> None:
        try:
            while waiting and not stop.is_set():
                _fetch(repo, commit, waiting.pop(), token, progress, stop)
        except BaseException as error:  # carried to the caller's thread
            failed.append(error)
            stop.set()

    # Not a thread pool: the interpreter would wait for its threads, and Ctrl-C end with the last file.
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
    """One file into the cache, trying again where the connection breaks."""
    url = hf_hub_url(repo, name, revision=commit)
    seen = 0  # bytes that progress knows of
    failures = 0
    while not stop.is_set():
        before = seen
        try:
            file = get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # links in it expire
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
        except Exception as error:  # the HTTP library's own, for all that a connection can do
            problem = error
        failures = 1 if seen > before else failures + 1
        if failures == ATTEMPTS:
            raise problem
        stop.wait(0.5 * failures)


def _receive(file: HfFileMetadata, partial: Path, token: bool | None) -> Iterator[int]:
    """Append to a partial file what it lacks, yielding its size."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as out:
        size = out.tell()
        yield size
        if size == file.size:
            return
        # Links elsewhere are signed, and no business of the token's.
        own = urlsplit(file.location).netloc == urlsplit(constants.ENDPOINT).netloc
        headers = build_hf_headers(token=token if own else False)
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={size}-"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", file.location, headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and size:  # the server sends it all again
                out.truncate(0)
                size = 0
            for chunk in response.iter_bytes(CHUNK):
                out.write(chunk)
                size += len(chunk)
                yield size


def _check(partial: Path, file: HfFileMetadata, name: str) -> None:
    """Large files are named by their SHA-256; one that is another, or longer, is thrown away."""
    size = partial.stat().st_size
    if file.size is not None and size < file.size:
        raise EOFError(f"{name} ended at {size:,} of {file.size:,} bytes")
    right = file.size in (None, size)
    if right and re.fullmatch(r"[0-9a-f]{64}", file.etag or ""):
        with partial.open("rb") as data:
            right = hashlib.file_digest(data, "sha256").hexdigest() == file.etag
    if not right:
        partial.unlink()
        raise EOFError(f"{name} was damaged on the way")


def _places(repo: str, file: HfFileMetadata) -> tuple[Path, Path]:
    """Where huggingface_hub looks for a file's blob, and the lock it holds meanwhile."""
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    lock = cache / ".locks" / folder / f"{file.etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return cache / folder / "blobs" / str(file.etag), lock
