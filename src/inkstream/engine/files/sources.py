"""Where a model's parts lie: a name, a repository, a folder or a file becomes checked paths. Only headers are read."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, StrictBool, ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import inkstream
from inkstream.engine.files.licences import FREE, UNKNOWN, check_licence, known_as
from inkstream.families import CARD, FAMILIES, SPECS, Family, Part, family_of, parts_of
from inkstream.nn.config import read_config
from inkstream.quant.packed import Weight
from inkstream.types import GuidanceKind, InputError, Loading, Request, Spec
from inkstream.weights.files import few, list_weights, read_header, strip_prefix
from inkstream.weights.keymap import Rule, translate

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What single files put before every name of the transformer."""

FOLDERS = (
    "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler", "image_encoder",
    "image_embedder",
)  # fmt: skip
KINDS = ("safetensors", "json", "txt")
PUBLISHED = ("model_index.json", *(f"{folder}/*.{kind}" for folder in FOLDERS for kind in KINDS))
"""The files of a published repository that are needed."""

SCALES = ("scale_weight", "weight_scale", "comfy_quant", "pre_quant_scale", "qweight", "absmax", "quant_map")
"""Endings of names that only quantised files have, where nobody read them."""

INDEX = "model_index.json"

COMFYUI = {
    "transformer": ("diffusion_models", "unet"),
    **dict.fromkeys(("text_encoder", "text_encoder_2"), ("text_encoders", "clip")),
    "vae": ("vae",),
    "image_encoder": ("clip_vision",),
    "image_embedder": ("style_models",),
}
"""Where ComfyUI's models/ folder keeps the parts."""

Progress = Callable[[Loading], None]


@dataclass(frozen=True)
class Found:
    """A part's weights on disk, checked against its module: every name and shape is as it must be."""

    path: Path  # a safetensors or GGUF file, or a folder of shards
    config: Any
    module: nn.Module  # on meta
    rules: Sequence[Rule]  # from the layout on disk into our names
    tensors: Mapping[str, Weight]  # what the files hold, on meta, in our names; more than the module may read
    metadata: Mapping[str, str]  # of the files' headers


@dataclass(frozen=True)
class Source:
    """A whole model on disk, nothing of it read yet."""

    family: type[Family]
    spec: Spec
    parts: Mapping[str, Found]
    tokenizers: Mapping[str, Path]  # folders
    documents: Mapping[str, Mapping[str, Any]]  # the JSON files beside the parts, by their path in a published folder


def locate(name: Path | str, progress: Progress | None = None, commercial_only: bool = False) -> Source:
    """Find a model's parts and check them, downloading first if need be.

    name: of a known model; OWNER/NAME on the hub; or a path: a diffusers folder, a folder or ComfyUI models/ tree that
    holds one transformer as a safetensors file, or that file. commercial_only: whether a licence that does not allow
    commercial use is refused. InputError names what is missing or does not fit.
    """
    known = known_as(str(name))
    if commercial_only and repository(str(name)):
        check_licence(str(name), known)
    tell = progress or (lambda event: None)
    path, title = _resolve(str(name), tell)
    path, title = _transformer_in(path, title)
    root = path.parent
    family, transformer = _recognise(path)
    parts = {"transformer": transformer}
    for part, kind in family.parts.items():
        if part != "transformer" and kind.repo is None:
            parts[part] = _find_part(family, part, path, transformer.config)
        elif kind.repo is not None and known is None:  # a local model has it where it lies with it
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
    said: Mapping[str, Any] = {}
    if (root / CARD).is_file():
        documents[CARD] = _read_json(root / CARD)
        said = read_card(documents[CARD], root / CARD)
    spec = family.recognise({part: found.config for part, found in parts.items()}, documents, title)
    parts = {part: found for part, found in parts.items() if getattr(spec, part) is not None}
    # Another model is under a licence of its own, however alike it is.
    licence, commercial = (known.licence, known.commercial) if known else (UNKNOWN, False)
    spec = replace(spec, **{"licence": licence, "commercial": commercial, **said})
    if commercial_only:
        check_licence(spec.name, spec)
    tokenizers = {
        name: _find_tokenizer(spec, name, [root / name, parts[encoder_of(name)].path], path)
        for name in family.tokenizers
    }
    return Source(family, spec, parts, tokenizers, documents)


def encoder_of(tokenizer: str) -> str:
    """The part that reads a tokenizer's tokens, by their names: tokenizer_2's is text_encoder_2."""
    return tokenizer.replace("tokenizer", "text_encoder")


def write_card(spec: Spec) -> dict[str, Any]:
    """What a folder's other files do not say of a model, as JSON. `read_card` is the inverse."""
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
    """What a card says beside fields of a Request. What it leaves out is as in the model's family."""

    title: str | None = None
    licence: str | None = None
    commercial: StrictBool | None = None
    guides: GuidanceKind | None = None
    size: tuple[int, int] | None = None
    abilities: frozenset[str] | None = None
    writer: Literal["", "scenes"] | None = None


def read_card(card: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a card says, as fields of a Spec. InputError names what is not right.

    A licence that is known to allow commercial use need not say so.
    """
    drawn = {name: card[name] for name in ("steps", "guidance", "solver", "schedule") if name in card}
    try:
        said = _Card.model_validate(card).model_dump(exclude_none=True)
        width, height = said.get("size", (None, None))
        request = Request(width=width, height=height, **drawn)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{first['loc'][0]} is {first['input']!r}"
        raise InputError(f"{path} is no card of a model ({problem}): mend or remove it") from error
    if said.get("licence", "").lower() in FREE:
        said.setdefault("commercial", True)
    return {**said, **request.model_dump(include=set(drawn))}


def locate_part(family: type[Family], name: str, path: Path | str) -> Found:
    """One part's weights, checked: a safetensors file, a folder of shards, or a model's folder that holds it."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} is missing: give the {name} as a file or folder")
    part = family.parts[name]
    return _checked(_match(part, path / name if (path / name).is_dir() else path), name, part)


def locate_writer(source: Source) -> Found:
    """What a text encoder lacks to be a whole language model, in its own files. InputError where that is not there."""
    part, path = source.family.parts["text_encoder"].writer, source.parts["text_encoder"].path
    if part is None:
        raise InputError(f"{source.spec.name} has no language model that writes: leave upsample out")
    match = _match(part, path)
    if match.missing:
        raise InputError(
            f"{path} holds of its language model only what reads prompts, no {few(sorted(match.missing))}: "
            "leave upsample out, or take the one published with the model"
        )
    return _checked(match, "language model", part)


# From a name to a path ----------------------------------------------------------------------------------------------


def repository(name: str) -> str | None:
    """The repository on the hub that a model's name means; None for a local path, and for what is neither."""
    if name in SPECS:
        return SPECS[name].repo
    is_local = Path(name).expanduser().exists()
    return name if not is_local and re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.gguf)", name) else None


def _resolve(name: str, progress: Progress) -> tuple[Path, str]:
    """The local folder or file that a name means, and what to call the model."""
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
        return path.absolute(), path.stem  # a link in the hub's cache keeps its name and its neighbours
    if repo := repository(name):
        try:
            return _download(repo, None, progress), name
        except InputError as error:
            raise InputError(f"{name} is no file or folder here, and {error}") from error
    near = difflib.get_close_matches(name.lower(), SPECS)
    known = ", ".join(SPECS)
    hint = f"did you mean {' or '.join(near)}?" if near else f"take {known}, OWNER/NAME on the hub, or a path"
    raise InputError(f"{name} is no known model, and no file or folder here: {hint}")


def published(part: str) -> tuple[str, ...]:
    """The files of a published repository that are needed of one part."""
    return tuple(f"{part}/*.{kind}" for kind in KINDS)


def downloads(name: str) -> dict[str, tuple[str, ...]]:
    """What a model's name means on the hub: its repository, those of parts published apart -> the files needed."""
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
        raise InputError(f"{repo} holds no diffusers folder: download its safetensors file and give that path")
    hub.check_space(repo, offer.missing)
    what = f"download of {repo}, {offer.missing / 1e9:.1f} GB, licence {licence or offer.licence or 'not stated'}"
    progress(Loading(what, 0, offer.missing))
    return hub.fetch(repo, patterns, lambda done: progress(Loading(what, min(done, offer.missing), offer.missing)))


def _transformer_in(path: Path, title: str) -> tuple[Path, str]:
    """The transformer that a path means, folder or file, and what to call the model."""
    if not path.is_dir():
        return path, title
    if (path / "model_index.json").is_file():
        if (path / "transformer").exists():
            return path / "transformer", title
        apart = [part for family in map(family_of, FAMILIES) for part, kind in family.parts.items() if kind.repo]
        if parts := [part for part in apart if (path / part).is_dir()]:
            raise InputError(
                f"{path} holds {' and '.join(parts)} alone, which go with another model: "
                f"put them into that model's folder, beside its transformer/"
            )
        return path / "transformer", title
    if (path / "config.json").is_file():  # that folder itself
        return path, path.parent.name
    trees = [root / name for root in (path, path / "models") for name in COMFYUI["transformer"]]
    files = sorted(file for tree in trees for file in list_weights(tree, deep=True)) or list_weights(path)
    known = [file for file in files if _is_transformer(file)]
    if len(known) > 1:
        raise InputError(f"{path} holds {len(known)} models ({_names(known, path)}): give the path of one")
    if len(files) == 1 and not known:
        _recognise(files[0])  # says why not
    if not known:
        seen = f" (not {_names(files, path)})" if files else ""
        raise InputError(
            f"{path} holds no model that is known here{seen}: "
            "a diffusers folder has a model_index.json, others one transformer as a safetensors or GGUF file"
        )
    return known[0], known[0].stem


# From a path to a checked part --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """A layout tried on a file."""

    found: Found
    unknown: Sequence[str]  # names that the table and the module do not know

    @property
    def missing(self) -> set[str]:
        """Names that the module has and the file lacks."""
        return self.found.module.state_dict().keys() - self.found.tensors.keys()

    @property
    def named(self) -> bool:
        """Every key has a place, though some may be missing or of another shape."""
        return self.found.config is not None and not self.unknown


def _recognise(path: Path) -> tuple[type[Family], Found]:
    """The family whose tables name every key of a transformer, and the transformer, checked."""
    matches: list[tuple[type[Family], _Match]] = []
    errors: list[InputError] = []
    for family in map(family_of, FAMILIES):
        try:
            matches.append((family, _match(family.parts["transformer"], path)))
        except InputError as error:
            errors.append(error)
        if matches and matches[-1][1].named:  # to try the others would build their models in vain
            break
    family, match = min(matches, key=lambda pair: len(pair[1].unknown), default=(None, None))
    if family is None or match is None or (errors and not match.named):  # a table knew the names, but one is missing
        raise errors[0]
    return family, _checked(match, "transformer", family.parts["transformer"])


def _is_transformer(path: Path) -> bool:
    try:
        return any(_match(family_of(name).parts["transformer"], path).named for name in FAMILIES)
    except InputError:
        return False


def _match(part: Part, path: Path) -> _Match:
    """The layout that names every key of a file, or the one that leaves fewest unknown. InputError if it is damaged."""
    header = read_header(path)
    raw = strip_prefix(header.tensors, PREFIXES)
    stated = _stated_config(part, path, header.metadata)
    matches: list[_Match] = []
    errors: list[InputError] = []
    for rules in part.layouts.values():
        try:
            tensors = translate(rules, raw)
        except InputError as error:  # it named keys, but not all the parts of one
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
    """What was matched, if nothing is unknown, missing, of another shape or quantised."""
    found = match.found
    path, tensors = found.path, found.tensors
    plain = {key: weight for key, weight in tensors.items() if isinstance(weight, Tensor)}
    quantised = [key for key, tensor in plain.items() if key.endswith(SCALES) or not tensor.is_floating_point()]
    if quantised:
        raise InputError(f"{path} is quantised ({few(quantised)}), in a way that is not read: take the bf16 file")
    if found.config is None:
        wanted = "a config.json beside it" if path.is_dir() else "names like those of a published file"
        raise InputError(f"{path} is no {name} that is known here: it holds {few(list(tensors))}; expected {wanted}")
    if match.unknown:
        raise InputError(
            f"{path} holds {few(match.unknown)}, which no {name} known here has: it is another model's, or damaged"
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
    """Names of ours as the file would have them; a table may allow two spellings, so the file's first words decide."""
    words = {name.split(".")[0] for name in strip_prefix(read_header(found.path).tensors, PREFIXES)}
    theirs = list(translate(found.rules, missing, back=True))
    return theirs if theirs[0].split(".")[0] in words else list(missing)


def _find_part(family: type[Family], name: str, transformer: Path, config: Any) -> Found:
    """A model's other part: in the folder of its name beside the transformer, beside it, or in ComfyUI's folders."""

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
                f"leave or link only the one to take in {own}/"
            )
        if fit:
            return fit[0]
    if len(refused) == 1:
        raise refused[0]
    tried = f" (of {len(refused)} files tried none fits: {refused[0]})" if refused else ""
    raise InputError(f"{transformer} has no {name}{tried}: put the one published with it into {own}/")


def _check_joints(family: type[Family], name: str, found: Found, config: Any, transformer: Path) -> None:
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
    """The config in the folder's config.json or in the file's header; None where there is none."""
    if (path / "config.json").is_file():
        return _config(part, _read_json(path / "config.json"), path / "config.json")
    if "config" in metadata:
        try:
            data = json.loads(metadata["config"])
        except ValueError:
            return None
        return _config(part, data, path) if isinstance(data, dict) else None
    return None


def _config(part: Part, data: Mapping[str, Any], path: Path) -> Any:
    """The part's config from JSON. InputError where a value is of another kind than the published ones."""
    try:
        config = read_config(part.others.get(data.get("model_type", ""), part.config), data)
    except TypeError as error:
        raise InputError(f"{path} is no config that is known here ({error})") from error
    for field in fields(config):
        value, published = getattr(config, field.name), field.default
        kinds = (int, float) if isinstance(published, float) else type(published)
        if published is not None and not isinstance(value, kinds):
            raise InputError(f"{path} says {field.name} is {value!r}: expected something like {published!r}")
    return config


def _build(part: Part, config: Any, path: Path) -> nn.Module:
    """The module without memory for its weights."""
    try:
        with torch.device("meta"), Unset():
            return part.build(config)
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError) as error:
        raise InputError(f"{path}: nothing can be built at the sizes its config gives ({error})") from error


class Unset(TorchFunctionMode):
    """Leaves weights as they are made. To draw normal ones on meta, torch would import its tracer, for 1.6 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = getattr(func, "__module__", None) == nn.init.__name__
        return kwargs["tensor"] if drawn else func(*args, **kwargs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object: download it again")
    return data


def _names(files: Sequence[Path], root: Path) -> str:
    return few([str(file.relative_to(root)) if file.is_relative_to(root) else str(file) for file in files])


def _shape(tensor: Weight) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
