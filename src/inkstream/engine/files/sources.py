"""Finds a model's parts from a name, repository, folder or file, and checks them. Only headers are read."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from inkstream.engine.files.cards import read_card
from inkstream.engine.files.licences import UNKNOWN, check_licence, known_as
from inkstream.engine.files.names import Progress, download, published, repository, resolve
from inkstream.engine.files.parts import (
    COMFYUI,
    Found,
    choose_part,
    find_part,
    is_transformer,
    locate_part,
    names_of,
    read_json,
    recognise,
)
from inkstream.engine.files.tokenizers import encoder_of, find_tokenizer
from inkstream.families import CARD, FAMILIES, Family, family_of
from inkstream.types import InputError, Loading, Spec
from inkstream.weights.files import list_weights

INDEX = "model_index.json"


@dataclass(frozen=True)
class Source:
    """A whole model on disk. No weights have been read."""

    family: type[Family]
    spec: Spec
    parts: Mapping[str, Found]
    tokenizers: Mapping[str, Path]  # folders, or text encoders' files that hold their own
    documents: Mapping[str, Mapping[str, Any]]  # JSON files of the folder, by their relative path in a published folder


def locate(
    name: Path | str,
    progress: Progress | None = None,
    commercial_only: bool = False,
    chosen: Mapping[str, str] | None = None,
) -> Source:
    """Finds and checks a model's parts. A model on the hub is downloaded if the cache lacks it.

    name: a known model; OWNER/NAME on the hub; or a path: a diffusers folder, a weight file of the transformer or of
    all parts, or a folder or ComfyUI models/ tree that holds one. commercial_only: refuse a licence that does not allow
    commercial use. chosen: text_encoder, vae -> a path to take instead (see `choose_part`). InputError if a part is
    missing or does not fit.
    """
    known = known_as(str(name))
    if commercial_only and repository(str(name)):
        check_licence(str(name), known)
    tell: Progress = progress or (lambda event: None)
    path, title = resolve(str(name), tell)
    path, title = _transformer_in(path, title)
    root = path.parent
    family, transformer = recognise(path)
    parts = {"transformer": transformer}
    for option, place in (chosen or {}).items():
        parts |= choose_part(family, option, place, transformer)
    for part, kind in family.parts.items():
        if part in parts:
            continue
        if kind.repo is None:
            parts[part] = find_part(family, part, transformer)
        elif known is None:  # a part from another repository is optional in a local model
            with suppress(InputError):
                parts[part] = find_part(family, part, transformer)
        elif getattr(known, part) is not None:
            folder = download(kind.repo, None, tell, published(part))
            parts[part] = locate_part(family, part, folder)
    documents = {
        f"{folder}/{file}": read_json(root / folder / file)
        for folder, file in (*((part, "config.json") for part in parts), ("scheduler", "scheduler_config.json"))
        if (root / folder / file).is_file()
    }
    if (root / INDEX).is_file():
        documents[INDEX] = read_json(root / INDEX)
    card: Mapping[str, Any] = {}
    if (root / CARD).is_file():
        documents[CARD] = read_json(root / CARD)
        card = read_card(documents[CARD], root / CARD)
    spec = family.recognise({part: found.config for part, found in parts.items()}, documents, title)
    parts = {part: parts[part] for part in family.parts if part in parts and getattr(spec, part) is not None}
    # The licence of a known model does not hold for another model with the same architecture.
    licence, commercial = (known.licence, known.commercial) if known else (UNKNOWN, False)
    spec = replace(spec, **{"licence": licence, "commercial": commercial, **card})
    if commercial_only:
        check_licence(spec.name, spec)
    if line := _unused(documents.get(INDEX, {}), {*parts, *family.tokenizers, "scheduler"}, title):
        tell(Loading("model", note=line))
    tokenizers = {name: find_tokenizer(family, spec, name, parts[encoder_of(name)], path) for name in family.tokenizers}
    return Source(family, spec, parts, tokenizers, documents)


def _unused(index: Mapping[str, Any], used: Container[str], title: str) -> str:
    """A line about the parts of a model_index.json that are not drawn with; empty if there are none."""
    declared = {name: cast("list[Any]", entry) for name, entry in index.items() if isinstance(entry, list)}
    parts = [
        f"{name} ({entry[1]})"
        for name, entry in declared.items()
        if len(entry) == 2 and entry[1] and name not in used and not name.endswith(("processor", "feature_extractor"))
    ]
    if parts:
        return f"{title} declares {', '.join(parts)}, which is not used: it draws as it does without"
    pipeline = str(index.get("_class_name", ""))
    return f"{title} declares {pipeline}, but no ControlNet is used" if "ControlNet" in pipeline else ""


# From a name to a path ----------------------------------------------------------------------------------------------


def _transformer_in(path: Path, title: str) -> tuple[Path, str]:
    """The transformer's folder or file at a path, and the model's title."""
    if not path.is_dir():
        return path, title
    if (path / "model_index.json").is_file():
        if (path / "transformer").exists():
            return path / "transformer", title
        apart = [part for family in map(family_of, FAMILIES) for part, kind in family.parts.items() if kind.repo]
        if parts := [part for part in apart if (path / part).is_dir()]:
            raise InputError(
                f"{path} holds {' and '.join(parts)} but no transformer: "
                f"put them into a model's folder, beside its transformer/"
            )
        return path / "transformer", title
    if (path / "config.json").is_file():  # the path is the transformer's folder
        return path, path.parent.name
    if list(path.glob("*.safetensors.index.json")):  # shards of one file
        return path, path.name
    trees = [root / name for root in (path, path / "models") for name in COMFYUI["transformer"]]
    files = sorted(file for tree in trees for file in list_weights(tree, deep=True)) or list_weights(path)
    known = [file for file in files if is_transformer(file)]
    if len(known) > 1:
        raise InputError(f"{path} holds {len(known)} models ({names_of(known, path)}): give the path of one")
    if len(files) == 1 and not known:
        recognise(files[0])  # raises the error that says what is wrong with the file
    if not known:
        seen = f" (not {names_of(files, path)})" if files else ""
        raise InputError(
            f"{path} holds no known model{seen}: give a diffusers folder, which has a model_index.json, "
            "or a folder with a transformer as a safetensors or GGUF file"
        )
    return known[0], known[0].stem
