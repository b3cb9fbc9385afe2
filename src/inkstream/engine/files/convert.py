"""`convert`: writes a model in another layout, and optionally in another precision. Works on state dicts alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from inkstream.disk import whole_file, whole_folder
from inkstream.engine.files.cards import write_card
from inkstream.engine.files.merging import open_merge
from inkstream.engine.files.names import Progress
from inkstream.engine.files.parts import Found
from inkstream.engine.files.quantise import QUANTS, Quant, in_safetensors, plan, prepare, weights
from inkstream.engine.files.sources import Source, locate
from inkstream.engine.files.tokenizers import read_words
from inkstream.families import CARD, Part
from inkstream.quant import QuantName
from inkstream.quant.packed import Weight
from inkstream.types import InputError, Loading, LoraUse
from inkstream.weights.files import write_state, write_stream
from inkstream.weights.gguf import FILE_TYPES, write_gguf
from inkstream.weights.keymap import Rule
from inkstream.weights.lora.merge import Merge

Layout = Literal["diffusers", "native"]

SHARD_BYTES = 5_000_000_000
"""A diffusers folder's weight file that is larger is split into shards of at most this size."""


def convert(
    src: Path | str,
    dst: Path | str,
    to: Layout | None = None,
    progress: Progress | None = None,
    quant: QuantName | None = None,
    chosen: Mapping[str, str] | None = None,
    loras: Sequence[LoraUse] = (),
    lora_folder: Path = Path(),
) -> Path:
    """Writes the model `src` (anything `load` takes) as the folder `dst`, which `load` takes too.

    to: "diffusers" (the default) is the published layout, which diffusers' pipeline loads as well; "native" (the
    default with `quant`) is the transformer as one file beside the folders of the other parts. quant: the precision of
    the transformer's and text encoders' weights; None keeps them unchanged. A GGUF precision (q4_k) writes GGUF files.
    chosen: as in `locate`. loras: adapters to merge into the transformer's weights, in float32, before they are packed;
    a note says how much of their change is kept. lora_folder: where adapters are that can be named.
    `dst` appears once it is complete. InputError if it exists, the disk has too little space, or `load` would fail.
    """
    to = to or ("native" if quant else "diffusers")
    if to not in get_args(Layout):
        raise InputError(f"layout {to} is not known: take {' or '.join(get_args(Layout))}")
    if quant is not None and quant not in QUANTS:
        raise InputError(f"quant {quant} is not known: take {', '.join(QUANTS)}")
    if quant is not None and QUANTS[quant].gguf and to == "diffusers":
        raise InputError(f"quant {quant} is a GGUF precision, and diffusers reads no GGUF: leave out --to diffusers")
    dst = Path(dst).expanduser().absolute()
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise InputError(f"{dst} already exists: take another name, or remove it first")
    tell: Progress = progress or (lambda event: None)
    source = locate(src, tell, chosen=chosen)
    merge = open_merge(loras, lora_folder, source) if loras else None
    writes = [_plan_part(source, part, to, quant, merge if part == "transformer" else None) for part in source.parts]
    needed = sum(weight.nbytes for write in writes for weight in write.plan.values())
    _check_space(dst, needed)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(dst) as temporary:
        _write(source, temporary, to, writes, tell, needed, [str(use) for use in loras])
    if merge:
        tell(Loading("transformer", note=merge.line()))
    return dst


@dataclass(frozen=True)
class _Write:
    """How one part is written."""

    name: str
    part: Part
    found: Found
    rules: Sequence[Rule]  # from our names into the layout
    quant: Quant | None
    plan: Mapping[str, Weight]  # on meta
    merge: Merge | None = None


def _plan_part(source: Source, name: str, to: Layout, quant: QuantName | None, merge: Merge | None) -> _Write:
    part, found = source.family.parts[name], source.parts[name]
    wanted = QUANTS[quant] if quant is not None and part.packs else None
    rules = part.layouts.get(to, ())
    if wanted is not None and wanted.gguf:
        if part.gguf:
            rules = part.layouts.get("gguf", rules)
        else:
            wanted = in_safetensors(wanted)
    if merge:
        merge.check(prepare(found.tensors, part, wanted))
    return _Write(name, part, found, rules, wanted, plan(found, part, wanted, rules, merge), merge)


def _write(
    source: Source,
    folder: Path,
    to: Layout,
    writes: Sequence[_Write],
    tell: Progress,
    total: int,
    merged: Sequence[str],
) -> None:
    """Writes all files of the new folder. The weights come last. merged: adapters, for the model's card."""
    made = {**source.family.documents(source.spec), CARD: write_card(source.spec)}
    documents = {name: {**content, **_kept(source, name)} for name, content in made.items()}
    if merged:
        documents[CARD]["merged"] = [*documents[CARD].get("merged", []), *merged]
    words = {name: read_words(place) for name, place in source.tokenizers.items()}
    for name, files in words.items():
        documents["model_index.json"] |= tokenizer_class(name, files.get("tokenizer_config.json", b"{}"))
    alone = to == "native"
    for name, content in documents.items():
        if not (alone and name in ("model_index.json", "transformer/config.json")):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for tokenizer, files in words.items():
        (folder / tokenizer).mkdir()
        for name, content in files.items():
            (folder / tokenizer / name).write_bytes(content)

    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        tell(Loading(f"writing {part}", done, total))

    for write in writes:
        part = write.name
        if alone and part == "transformer":
            stem = folder / source.spec.name.rpartition("/")[2]
            config = documents["transformer/config.json"]
        else:
            library = documents["model_index.json"][part][0]
            stem = folder / part / ("model" if library == "transformers" else "diffusion_pytorch_model")
            config = None
        _write_part(write, stem, _header(source, write, config), count)


def _header(source: Source, write: _Write, config: Mapping[str, Any] | None) -> dict[str, str]:
    """The metadata in a weight file's header: origin and licence, and the config of a file without a config.json."""
    said = {"licence": source.spec.licence, "origin": source.spec.name}
    if config is not None:
        return {**said, **write.found.metadata, "config": json.dumps(config)}
    return said if write.quant else {}


def _write_part(write: _Write, stem: Path, header: Mapping[str, str], count: Callable[[int], None]) -> None:
    incoming = weights(write.found, write.part, write.quant, write.rules, write.merge)
    if write.quant is None:
        write_state(stem.with_name(f"{stem.name}.safetensors"), dict(incoming), header, SHARD_BYTES, count)
    elif not write.quant.gguf:
        write_stream(stem.with_name(f"{stem.name}.safetensors"), write.plan, incoming, header, count)
    else:
        form = write.quant.formats[0]
        values: dict[str, str | int] = {
            "general.architecture": write.part.gguf,
            "general.name": header["origin"],
            "general.license": header["licence"],
            "general.quantization_version": 2,
            "general.file_type": FILE_TYPES[form],
            **{key: value for key, value in header.items() if key in ("licence", "origin", "config")},
        }
        with whole_file(stem.with_name(f"{stem.name}-{form.upper()}.gguf")) as temporary:
            write_gguf(temporary, write.plan, incoming, values, count)


def tokenizer_class(tokenizer: str, config: bytes) -> dict[str, list[str]]:
    """A tokenizer's entry in model_index.json: the class that its tokenizer_config.json names; {} if it names none.

    The class matters: transformers' Qwen2Tokenizer splits words in its own way, regardless of tokenizer.json.
    """
    try:
        name = json.loads(config).get("tokenizer_class")
    except (ValueError, AttributeError):
        name = None
    return {tokenizer: ["transformers", name]} if isinstance(name, str) else {}


def _kept(source: Source, name: str) -> Mapping[str, Any]:
    """The entries of a JSON file of the source, without its class names, which belong to the source's layout."""
    return {k: v for k, v in source.documents.get(name, {}).items() if k not in ("_class_name", "architectures")}


def _check_space(dst: Path, needed: int) -> None:
    folder = dst.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{dst} needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free: make room")
