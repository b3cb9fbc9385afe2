"""What a model's name means: a known model, a repository on the hub, or a path; and what must be downloaded for it.

Torch is not imported, so that a wrong name is told at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import inkstream
from inkstream.families import SPECS, parts_of
from inkstream.types import InputError, Loading

FOLDERS = (
    "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler", "image_encoder",
    "image_embedder",
)  # fmt: skip
KINDS = ("safetensors", "json", "txt")
PUBLISHED = ("model_index.json", *(f"{folder}/*.{kind}" for folder in FOLDERS for kind in KINDS))
"""Patterns of the files to download from a published repository."""

Progress = Callable[[Loading], None]


def repository(name: str) -> str | None:
    """The repository on the hub that a model's name means; None for a local path and for any other text."""
    if name in SPECS:
        return SPECS[name].repo
    is_local = Path(name).expanduser().exists()
    return name if not is_local and re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.gguf)", name) else None


def check_name(name: str) -> None:
    """Raise InputError for a name that means no known model, path or repository. Torch is not imported."""
    if name not in SPECS and not Path(name).expanduser().exists() and repository(name) is None:
        raise unknown(name)


def unknown(name: str) -> InputError:
    """Return the error for a name that means no model."""
    near = difflib.get_close_matches(name.lower(), SPECS)
    known = ", ".join(SPECS)
    hint = f"did you mean {' or '.join(near)}?" if near else f"take {known}, OWNER/NAME on the hub, or a path"
    return InputError(f"{name} is not a known model, file or folder: {hint}")


def resolve(name: str, progress: Progress) -> tuple[Path, str]:
    """The local folder or file that a name means, downloaded if need be; and the model's title."""
    if name in SPECS:
        spec = SPECS[name]
        if spec.folder is not None:
            return Path(inkstream.__file__).parent / spec.folder, name
        if spec.repo is None:
            raise InputError(f"the weights of {name} are not published: give the path of a local copy")
        return download(spec.repo, spec.licence, progress), name
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), path.resolve().name
    if path.exists():
        return path.absolute(), path.stem  # links stay: in the hub's cache, their targets have other names and folders
    if repo := repository(name):
        try:
            return download(repo, None, progress), name
        except InputError as error:
            raise InputError(f"{name} is not a file or folder here, and {error}") from error
    raise unknown(name)


def existing(part: str, path: Path | str) -> Path:
    """The path of a part, with the home folder in place of ~. Raises InputError if there is no such file or folder."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist: give the {part} as a file or folder")
    return path


def published(part: str) -> tuple[str, ...]:
    """Patterns of one part's files in a published repository."""
    return tuple(f"{part}/*.{kind}" for kind in KINDS)


def downloads(name: str) -> dict[str, tuple[str, ...]]:
    """The repositories that a model needs -> patterns of their files: its own, and those of parts published apart."""
    repo, spec = repository(name), SPECS.get(name)
    wanted: dict[str, tuple[str, ...]] = {} if repo is None else {repo: PUBLISHED}
    for part, kind in parts_of(spec).items() if spec is not None and wanted else ():
        if kind.repo is not None:
            wanted[kind.repo] = (*wanted.get(kind.repo, ()), *published(part))
    return wanted


def download(repo: str, licence: str | None, progress: Progress, patterns: Sequence[str] = PUBLISHED) -> Path:
    from inkstream.weights import hub

    if folder := hub.cached(repo, patterns):
        return folder
    offer = hub.offer(repo, patterns)
    if not offer.total:
        raise InputError(f"{repo} is not in the diffusers layout: download its safetensors file and give that path")
    hub.check_space(repo, offer.missing)
    what = f"download of {repo}, {offer.missing / 1e9:.1f} GB, licence {licence or offer.licence or 'not stated'}"
    progress(Loading(what, 0, offer.missing))
    return hub.fetch(repo, patterns, lambda done: progress(Loading(what, min(done, offer.missing), offer.missing)))
