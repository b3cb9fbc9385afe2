"""Finds a text encoder's tokenizer: a folder of files, or a weight file that holds the vocabulary too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inkstream.engine.files.parts import Found
from inkstream.families import SPECS, Family
from inkstream.types import InputError, Spec
from inkstream.weights.vocabulary import holds_vocabulary, read_vocabulary

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "spiece.model",
)  # fmt: skip


def encoder_of(tokenizer: str) -> str:
    """The name of the text encoder that a tokenizer belongs to: tokenizer_2 -> text_encoder_2."""
    return tokenizer.replace("tokenizer", "text_encoder")


def find_tokenizer(family: type[Family], spec: Spec, name: str, encoder: Found, transformer: Path) -> Path:
    """A tokenizer's folder, or the text encoder's file if that holds it. InputError if there is none.

    Places, in order: the folder `name` beside the text encoder or the transformer; the text encoder's folder; its file;
    a ComfyUI installation around them; a published model of the family in the hub's cache.
    """
    beside = [encoder.path.parent / name, transformer.parent / name, encoder.path]
    trees = [tree for path in (transformer, encoder.path) for tree in path.parents]
    kept = family.parts[encoder_of(name)].comfyui(encoder.config)
    installed = [tree / kept for tree in trees] if kept else []
    for place in (*beside, *installed):
        if any((place / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")):
            return place
        if place == encoder.path and holds_vocabulary(place):
            return place
    from inkstream.weights import hub

    alike = [s for s in SPECS.values() if isinstance(getattr(s, encoder_of(name), None), type(encoder.config))]
    repos = [s.repo for s in (spec, *alike) if s.family == spec.family and s.repo is not None]
    for repo in repos:
        if file := hub.cached_file(repo, f"{name}/tokenizer.json"):
            return file.parent
    raise InputError(
        f"{transformer} has no {name}: put one into {beside[0]}/, "
        f"or into the hub's cache with `hf download {repos[0]} --include '{name}/*'`"
    )


def read_words(place: Path) -> dict[str, bytes]:
    """A tokenizer's files by name. place: as `find_tokenizer` returns it."""
    files = {file: (place / file).read_bytes() for file in TOKENIZER if (place / file).is_file()}
    return files or read_vocabulary(place)


def open_tokenizer(read: Callable[[Path], Any], place: Path) -> Any:
    """A tokenizer at a place. read: a family's reader of a folder."""
    if any((place / file).is_file() for file in TOKENIZER):
        return read(place)
    return tokenizer_of(read, read_vocabulary(place), str(place))


def tokenizer_of(read: Callable[[Path], Any], words: Mapping[str, bytes], place: str = "the recipe") -> Any:
    """A tokenizer from its files by name. place: where they are from, for errors."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in words.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return read(Path(folder))
        except InputError as error:
            raise InputError(str(error).replace(folder, place)) from error
