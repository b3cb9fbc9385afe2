"""Finds a model's parts from a name, repository, folder or file, and checks them. Only headers are read."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, StrictBool, ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import inkstream
from inkstream.engine.files.licences import FREE, UNKNOWN, check_licence, known_as
from inkstream.families import CARD, FAMILIES, SPECS, Family, Part, family_of, parts_of
from inkstream.nn.config import read_config
from inkstream.quant.packed import Weight
from inkstream.types import GuidanceKind, InputError, Loading, Request, Spec, as_object
from inkstream.weights.files import few, list_weights, read_header, strip_prefix
from inkstream.weights.keymap import Rule, translate

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Prefixes that single files put before every weight name of the transformer."""

FOLDERS = (
    "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler", "image_encoder",
    "image_embedder",
)  # fmt: skip
KINDS = ("safetensors", "json", "txt")
PUBLISHED = ("model_index.json", *(f"{folder}/*.{kind}" for folder in FOLDERS for kind in KINDS))
"""Patterns of the files to download from a published repository."""

SCALES = ("scale_weight", "weight_scale", "comfy_quant", "pre_quant_scale", "qweight", "absmax", "quant_map")
"""Endings of weight names that mean a file is quantised in a format that is not read here."""

INDEX = "model_index.json"

COMFYUI = {
    "transformer": ("diffusion_models", "unet"),
    **dict.fromkeys(("text_encoder", "text_encoder_2"), ("text_encoders", "clip")),
    "vae": ("vae",),
    "image_encoder": ("clip_vision",),
    "image_embedder": ("style_models",),
}
"""Part -> the folders in ComfyUI's models/ tree that hold it."""

Progress = Callable[[Loading], None]


@dataclass(frozen=True)
class Found:
    """A part's weights on disk. Every name and shape matches the part's module."""

    path: Path  # a safetensors or GGUF file, or a folder of shards
    config: Any
    module: nn.Module  # on meta
    rules: Sequence[Rule]  # from the layout on disk into our names
    tensors: Mapping[str, Weight]  # all weights of the files, in our names, on meta; the module may read only some
    metadata: Mapping[str, str]  # from the file header


@dataclass(frozen=True)
class Source:
    """A whole model on disk. No weights have been read."""

    family: type[Family]
    spec: Spec
    parts: Mapping[str, Found]
    tokenizers: Mapping[str, Path]  # folders
    documents: Mapping[str, Mapping[str, Any]]  # JSON files of the folder, by their relative path in a published folder


def locate(name: Path | str, progress: Progress | None = None, commercial_only: bool = False) -> Source:
    """Finds and checks a model's parts. A model on the hub is downloaded if the cache lacks it.

    name: a known model; OWNER/NAME on the hub; or a path: a diffusers folder, a transformer's weight file, or a folder
    or ComfyUI models/ tree that holds one. commercial_only: refuse a licence that does not allow commercial use.
    InputError if a part is missing or does not fit.
    """
    known = known_as(str(name))
    if commercial_only and repository(str(name)):
        check_licence(str(name), known)
    tell: Progress = progress or (lambda event: None)
    path, title = _resolve(str(name), tell)
    path, title = _transformer_in(path, title)
    root = path.parent
    family, transformer = _recognise(path)
    parts = {"transformer": transformer}
    for part, kind in family.parts.items():
        if part != "transformer" and kind.repo is None:
            parts[part] = _find_part(family, part, path, transformer.config)
        elif kind.repo is not None and known is None:  # a part from another repository is optional in a local model
            with suppress(InputError):
                parts[part] = _find_part(family, part, path, transformer.config)
        elif kind.repo is not None and getattr(known, part) is not None:
            folder = _download(kind.repo, None, tell, published(part))
            parts[part] = locate_part(family, part, folder)
    documents = {
        f"{folder}/{file}": _read_json(root / folder / file)
        for folder, file in (*((part, "config.json") for part in parts), ("scheduler", "scheduler_config.json"))
        if (root / folder / file).is_file()
    }
    if (root / INDEX).is_file():
        documents[INDEX] = _read_json(root / INDEX)
    shift = documents.get("scheduler/scheduler_config.json", {}).get("shift")
    if not isinstance(shift, int | float | None):
        raise InputError(f"{root}/scheduler/scheduler_config.json says shift is {shift!r}: expected a number like 3.0")
    card: Mapping[str, Any] = {}
    if (root / CARD).is_file():
        documents[CARD] = _read_json(root / CARD)
        card = read_card(documents[CARD], root / CARD)
    spec = family.recognise({part: found.config for part, found in parts.items()}, documents, title)
    parts = {part: found for part, found in parts.items() if getattr(spec, part) is not None}
    # The licence of a known model does not hold for another model with the same architecture.
    licence, commercial = (known.licence, known.commercial) if known else (UNKNOWN, False)
    spec = replace(spec, **{"licence": licence, "commercial": commercial, **card})
    if commercial_only:
        check_licence(spec.name, spec)
    tokenizers = {
        name: _find_tokenizer(spec, name, [root / name, parts[encoder_of(name)].path], path)
        for name in family.tokenizers
    }
    return Source(family, spec, parts, tokenizers, documents)


def encoder_of(tokenizer: str) -> str:
    """The name of the text encoder that a tokenizer belongs to: tokenizer_2 -> text_encoder_2."""
    return tokenizer.replace("tokenizer", "text_encoder")


def write_card(spec: Spec) -> dict[str, Any]:
    """The fields of a Spec that the folder's other files do not hold, as JSON. `read_card` is the inverse."""
    return {
        "title": spec.title,
        "licence": spec.licence,
        "commercial": spec.commercial,
        "steps": spec.steps,
        "guides": spec.guides,
        "guidance": spec.guidance,
        "size": list(spec.size),
        "solver": spec.solver,
        "schedule": spec.schedule,
        "abilities": sorted(spec.abilities),
        **({"writer": spec.writer} if spec.writer else {}),
    }


class _Card(BaseModel):
    """The fields of a card that a Request does not have. For a missing field, the family's value holds."""

    title: str | None = None
    licence: str | None = None
    commercial: StrictBool | None = None
    guides: GuidanceKind | None = None
    size: tuple[int, int] | None = None
    abilities: frozenset[str] | None = None
    writer: Literal["", "scenes"] | None = None


def read_card(card: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A card's fields as fields of a Spec. InputError if a value is invalid.

    A licence in FREE implies `commercial`, unless the card says otherwise.
    """
    drawn = {name: card[name] for name in ("steps", "guidance", "solver", "schedule") if name in card}
    try:
        said = _Card.model_validate(card).model_dump(exclude_none=True)
        width, height = said.get("size", (None, None))
        request = Request(width=width, height=height, **drawn)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{first['loc'][0]} is {first['input']!r}"
        raise InputError(f"{path} is not a valid model card ({problem}): correct or remove it") from error
    if said.get("licence", "").lower() in FREE:
        said.setdefault("commercial", True)
    return {**said, **request.model_dump(include=set(drawn))}


def locate_part(family: type[Family], name: str, path: Path | str) -> Found:
    """Finds and checks one part. path: a weight file, a folder of shards, or the folder of a model with the part."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist: give the {name} as a file or folder")
    part = family.parts[name]
    return _checked(_match(part, path / name if (path / name).is_dir() else path), name, part)


def locate_writer(source: Source) -> Found:
    """The weights in a text encoder's files that complete it to a language model. InputError if they are missing."""
    part, path = source.family.parts["text_encoder"].writer, source.parts["text_encoder"].path
    if part is None:
        raise InputError(f"{source.spec.name} cannot upsample a prompt: leave upsample out")
    match = _match(part, path)
    if match.missing:
        raise InputError(
            f"{path} holds only a text encoder, the language model's {few(sorted(match.missing))} is missing: "
            "leave upsample out, or take the file published with the model"
        )
    return _checked(match, "language model", part)


# From a name to a path ----------------------------------------------------------------------------------------------


def repository(name: str) -> str | None:
    """The repository on the hub that a model's name means; None for a local path and for any other text."""
    if name in SPECS:
        return SPECS[name].repo
    is_local = Path(name).expanduser().exists()
    return name if not is_local and re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.gguf)", name) else None


def _resolve(name: str, progress: Progress) -> tuple[Path, str]:
    """The local folder or file that a name means, downloaded if need be; and the model's title."""
    if name in SPECS:
        spec = SPECS[name]
        if spec.folder is not None:
            return Path(inkstream.__file__).parent / spec.folder, name
        if spec.repo is None:
            raise InputError(f"the weights of {name} are not published: give the path of a local copy")
        return _download(spec.repo, spec.licence, progress), name
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), path.resolve().name
    if path.exists():
        return path.absolute(), path.stem  # links stay: in the hub's cache, their targets have other names and folders
    if repo := repository(name):
        try:
            return _download(repo, None, progress), name
        except InputError as error:
            raise InputError(f"{name} is not a file or folder here, and {error}") from error
    near = difflib.get_close_matches(name.lower(), SPECS)
    known = ", ".join(SPECS)
    hint = f"did you mean {' or '.join(near)}?" if near else f"take {known}, OWNER/NAME on the hub, or a path"
    raise InputError(f"{name} is not a known model, file or folder: {hint}")


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


def _download(repo: str, licence: str | None, progress: Progress, patterns: Sequence[str] = PUBLISHED) -> Path:
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
    trees = [root / name for root in (path, path / "models") for name in COMFYUI["transformer"]]
    files = sorted(file for tree in trees for file in list_weights(tree, deep=True)) or list_weights(path)
    known = [file for file in files if _is_transformer(file)]
    if len(known) > 1:
        raise InputError(f"{path} holds {len(known)} models ({_names(known, path)}): give the path of one")
    if len(files) == 1 and not known:
        _recognise(files[0])  # raises the error that says what is wrong with the file
    if not known:
        seen = f" (not {_names(files, path)})" if files else ""
        raise InputError(
            f"{path} holds no known model{seen}: give a diffusers folder, which has a model_index.json, "
            "or a folder with a transformer as a safetensors or GGUF file"
        )
    return known[0], known[0].stem


# From a path to a checked part --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """A file read by one layout."""

    found: Found
    unknown: Sequence[str]  # names that neither the layout nor the module knows

    @property
    def missing(self) -> set[str]:
        """Names of the module that the file lacks."""
        return self.found.module.state_dict().keys() - self.found.tensors.keys()

    @property
    def named(self) -> bool:
        """Whether the module knows every name of the file. Some may be missing or have another shape."""
        return self.found.config is not None and not self.unknown


def _recognise(path: Path) -> tuple[type[Family], Found]:
    """The family whose layouts name every key of a transformer, and the checked transformer. InputError if none."""
    matches: list[tuple[type[Family], _Match]] = []
    errors: list[InputError] = []
    for family in map(family_of, FAMILIES):
        try:
            matches.append((family, _match(family.parts["transformer"], path)))
        except InputError as error:
            errors.append(error)
        if matches and matches[-1][1].named:  # trying the other families would only cost time
            break
    family, match = min(matches, key=lambda pair: len(pair[1].unknown), default=(None, None))
    # An error means that a layout knew the names, but some weights are missing.
    if family is None or match is None or (errors and not match.named):
        raise errors[0]
    return family, _checked(match, "transformer", family.parts["transformer"])


def _is_transformer(path: Path) -> bool:
    try:
        return any(_match(family_of(name).parts["transformer"], path).named for name in FAMILIES)
    except InputError:
        return False


def _match(part: Part, path: Path) -> _Match:
    """Reads a file by the layout that names every key, else by the one with the fewest unknown keys.

    InputError if the file is damaged or its config is invalid.
    """
    header = read_header(path)
    raw = strip_prefix(header.tensors, PREFIXES)
    stated = _stated_config(part, path, header.metadata)
    matches: list[_Match] = []
    errors: list[InputError] = []
    for rules in part.layouts.values():
        try:
            tensors = translate(rules, raw)
        except InputError as error:  # the layout fits, but some weights that it joins into one are missing
            errors.append(InputError(f"{path}: {error}"))
            continue
        try:
            config = stated or part.infer({name: tuple(tensor.shape) for name, tensor in tensors.items()})
            module = _build(part, config, path)
        except (KeyError, ValueError, IndexError):
            if stated:
                raise
            matches.append(_Match(Found(path, None, nn.Module(), rules, tensors, {}), list(tensors)))
            continue
        unread = tuple(part.unread(config))
        expected = module.state_dict()
        unknown = [name for name in tensors if name not in expected and not name.startswith(unread)]
        matches.append(_Match(Found(path, config, module, rules, tensors, header.metadata), unknown))
        if matches[-1].named and not matches[-1].missing:
            break
    if errors and not any(match.named for match in matches):
        raise errors[0]
    return min(matches, key=lambda match: (len(match.unknown), len(match.missing)))


def _checked(match: _Match, name: str, part: Part) -> Found:
    """The Found of a match. InputError if a weight is unknown, missing, of another shape or quantised."""
    found = match.found
    path, tensors = found.path, found.tensors
    plain = {key: weight for key, weight in tensors.items() if isinstance(weight, Tensor)}
    quantised = [key for key, tensor in plain.items() if key.endswith(SCALES) or not tensor.is_floating_point()]
    if quantised:
        raise InputError(f"{path} is quantised in an unknown format ({few(quantised)}): take the bf16 file")
    if found.config is None:
        remedy = "put its config.json into it" if path.is_dir() else "take a file with the published weight names"
        raise InputError(f"{path} is not a known {name}, it holds {few(list(tensors))}: {remedy}")
    if match.unknown:
        raise InputError(
            f"{path} holds {few(match.unknown)}, which no known {name} has: take another file, or download it again"
        )
    expected = found.module.state_dict()
    missing = {key: tensor for key, tensor in expected.items() if key not in tensors}
    if missing:
        raise InputError(f"{path} lacks {few(_as_in_file(found, missing))}: download it again")
    wrong = [
        f"{key} is {_shape(tensors[key])}, expected {_shape(tensor)}"
        for key, tensor in expected.items()
        if tensors[key].shape != tensor.shape
    ]
    if wrong:
        raise InputError(f"{path} does not fit its config, {few(wrong, 1)}: download both again")
    return found


def _as_in_file(found: Found, missing: Mapping[str, Tensor]) -> Sequence[str]:
    """Our names in the file's spelling. Of two spellings in a layout, the file's own first words decide."""
    words = {name.split(".")[0] for name in strip_prefix(read_header(found.path).tensors, PREFIXES)}
    theirs = list(translate(found.rules, missing, back=True))
    return theirs if theirs[0].split(".")[0] in words else list(missing)


def _find_part(family: type[Family], name: str, transformer: Path, config: Any) -> Found:
    """Finds a part other than the transformer. InputError if no file fits or several do.

    Places, in order: the folder with the part's name beside the transformer, files beside the transformer, and
    ComfyUI's folders for the part.
    """

    def check(path: Path) -> Found:
        part = family.parts[name]
        found = _checked(_match(part, path), name, part)
        _check_joints(family, name, found, config, transformer)
        return found

    root = transformer.parent
    own = root / name
    inside = list_weights(own)
    if own.is_dir() and (len(inside) < 2 or any(own.glob("*.json"))):
        return check(own)
    beside = [] if transformer.is_dir() else [file for file in list_weights(root) if file != transformer]
    places = [inside, beside]
    for tree in transformer.parents:
        if tree.name in COMFYUI["transformer"]:
            folders = [tree.parent / folder for folder in COMFYUI.get(name, ())]
            places.append([file for folder in folders for file in list_weights(folder, deep=True)])
    refused: list[InputError] = []
    for files in places:
        fit: list[Found] = []
        for file in sorted(files):
            try:
                fit.append(check(file))
            except InputError as error:
                refused.append(error)
        if len(fit) > 1:
            raise InputError(
                f"{_names([found.path for found in fit], root)} all fit as {name} of {transformer.name}: "
                f"put or link the one to take into {own}/"
            )
        if fit:
            return fit[0]
    if len(refused) == 1:
        raise refused[0]
    tried = f" (none of {len(refused)} files fits: {refused[0]})" if refused else ""
    raise InputError(f"{transformer} has no {name}{tried}: put the {name} published with it into {own}/")


def _check_joints(family: type[Family], name: str, found: Found, config: Any, transformer: Path) -> None:
    """InputError if a part's sizes do not fit the transformer's config."""
    for ours, theirs in family.joints:
        part, _, field = theirs.partition(".")
        if part == name:
            wanted, got = getattr(config, ours.partition(".")[2]), getattr(found.config, field)
            if wanted != got:
                raise InputError(
                    f"the {name} {found.path} has {field} {got}, the transformer {transformer} wants {wanted}: "
                    f"take the {name} published with it"
                )


def _find_tokenizer(spec: Spec, name: str, folders: Sequence[Path], transformer: Path) -> Path:
    """A tokenizer's folder: the first of `folders` that holds one, else one of the same family in the hub's cache."""
    for folder in folders:
        if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")):
            return folder
    from inkstream.weights import hub

    repos = [s.repo for s in (spec, *SPECS.values()) if s.family == spec.family and s.repo is not None]
    for repo in repos:
        if file := hub.cached_file(repo, f"{name}/tokenizer.json"):
            return file.parent
    raise InputError(
        f"{transformer} has no {name}: put one into {folders[0]}/, "
        f"or into the hub's cache with `hf download {repos[0]} --include '{name}/*'`"
    )


def _stated_config(part: Part, path: Path, metadata: Mapping[str, str]) -> Any:
    """The config from the folder's config.json or the file's header; None if there is none."""
    if (path / "config.json").is_file():
        return _config(part, _read_json(path / "config.json"), path / "config.json")
    if "config" in metadata:
        try:
            data = as_object(json.loads(metadata["config"]))
        except ValueError:
            return None
        return None if data is None else _config(part, data, path)
    return None


def _config(part: Part, data: Mapping[str, Any], path: Path) -> Any:
    """The part's config from JSON. InputError if a value has another type than in the published config."""
    try:
        kind: Any = part.others.get(data.get("model_type", ""), part.config)
        config: Any = read_config(kind, data)
    except TypeError as error:
        raise InputError(f"{path} holds no known config ({error}): take the one published with the weights") from error
    for field in fields(config):
        value, published = getattr(config, field.name), field.default
        kinds = (int, float) if isinstance(published, float) else (cast("type", type(published)),)
        if published is not None and not isinstance(value, kinds):
            raise InputError(f"{path} says {field.name} is {value!r}: expected something like {published!r}")
    return config


def _build(part: Part, config: Any, path: Path) -> nn.Module:
    """The module on meta, without memory for its weights. InputError if the config's sizes are impossible."""
    try:
        with torch.device("meta"), Unset():
            return part.build(config)
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError) as error:
        raise InputError(f"the sizes in the config of {path} are impossible ({error}): download it again") from error


class Unset(TorchFunctionMode):
    """Skips the initialisation of weights: random ones on meta make torch import its tracer, which takes 1.6 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = getattr(func, "__module__", None) == nn.init.__name__
        return kwargs["tensor"] if drawn else func(*args, **kwargs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = as_object(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if data is None:
        raise InputError(f"{path} is not a JSON object: download it again")
    return data


def _names(files: Sequence[Path], root: Path) -> str:
    return few([str(file.relative_to(root)) if file.is_relative_to(root) else str(file) for file in files])


def _shape(tensor: Weight) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
