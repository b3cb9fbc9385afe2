"""`convert`: a model in any layout that is read becomes a folder in the one asked for. State dicts only, no modules."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from inkstream.engine.sources import CARD, PREFIXES, Found, Progress, Source, locate, write_card
from inkstream.types import InputError, Loading
from inkstream.weights.files import read_state, strip_prefix, write_state
from inkstream.weights.keymap import Rule, translate

Layout = Literal["diffusers", "native"]

SHARD_BYTES = 5_000_000_000
"""Files of a diffusers folder are cut at this size."""

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "spiece.model",
)  # fmt: skip


def convert(src: Path | str, dst: Path | str, to: Layout = "diffusers", progress: Progress | None = None) -> Path:
    """Write the model `src` (anything `load` takes) as the folder `dst`, which `load` takes too. Dtypes are kept.

    to "diffusers": the published folder, which diffusers' pipeline loads as well. to "native": the transformer as one
    safetensors file beside folders of the other parts. The folder appears when it is whole; InputError where it is
    there already, where the disk has no room, and as `load`.
    """
    if to not in get_args(Layout):
        raise InputError(f"layout {to} is not known: take {' or '.join(get_args(Layout))}")
    dst = Path(dst).expanduser().absolute()
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise InputError(f"{dst} is there already: take another name, or remove it first")
    tell = progress or (lambda event: None)
    source = locate(src, tell)
    needed = sum(tensor.nbytes for found in source.parts.values() for tensor in found.tensors.values())
    _check_space(dst, needed)
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = dst.with_name(f".{dst.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        _write(source, temporary, to, tell, needed)
        if dst.exists():
            dst.rmdir()
        os.replace(temporary, dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dst


def _write(source: Source, folder: Path, to: Layout, tell: Progress, total: int) -> None:
    """Everything of the new folder, weights last."""
    made = {**source.family.documents(source.spec), CARD: write_card(source.spec)}
    documents = {name: {**content, **_kept(source, name)} for name, content in made.items()}
    for name, place in source.tokenizers.items():
        config = place / "tokenizer_config.json"
        documents["model_index.json"] |= tokenizer_class(name, config.read_bytes() if config.is_file() else b"{}")
    alone = to == "native"
    for name, content in documents.items():
        if not (alone and name in ("model_index.json", "transformer/config.json")):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for tokenizer, place in source.tokenizers.items():
        (folder / tokenizer).mkdir()
        for name in TOKENIZER:
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / tokenizer / name)

    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        tell(Loading(f"writing {part}", done, total))

    for part, found in source.parts.items():
        state = _translated(found, source.family.parts[part].layouts.get(to, ()))
        if alone and part == "transformer":
            metadata = {
                "licence": source.spec.licence,
                "origin": source.spec.name,
                **found.metadata,
                "config": json.dumps(documents["transformer/config.json"]),
            }
            write_state(folder / f"{source.spec.name.rpartition('/')[2]}.safetensors", state, metadata, progress=count)
        else:
            library = documents["model_index.json"][part][0]
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            write_state(folder / part / f"{stem}.safetensors", state, shard_bytes=SHARD_BYTES, progress=count)


def tokenizer_class(tokenizer: str, config: bytes) -> dict[str, list[str]]:
    """What model_index.json must say of a tokenizer, from its own tokenizer_config.json: by which class it is read.

    transformers' Qwen2Tokenizer splits words its own way, whatever tokenizer.json says.
    """
    try:
        name = json.loads(config).get("tokenizer_class")
    except (ValueError, AttributeError):
        name = None
    return {tokenizer: ["transformers", name]} if isinstance(name, str) else {}


def _translated(found: Found, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """All tensors of a part in another layout, those that no module reads too."""
    ours = translate(found.rules, strip_prefix(read_state(found.path), PREFIXES))
    return translate(rules, ours, back=True)


def _kept(source: Source, name: str) -> Mapping[str, Any]:
    """What the source's own document says, but for the classes, which name the layout that is written."""
    return {k: v for k, v in source.documents.get(name, {}).items() if k not in ("_class_name", "architectures")}


def _check_space(dst: Path, needed: int) -> None:
    folder = dst.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{dst} takes {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: make room")
