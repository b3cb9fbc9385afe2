"""Finds the parts of a model on disk, and checks names, shapes and sizes of their weights. Only headers are read."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inkstream.engine.files.names import existing
from inkstream.families import FAMILIES, Family, Part, family_of
from inkstream.families.foreign import describe
from inkstream.nn.config import read_config
from inkstream.quant.packed import Weight
from inkstream.types import InputError, as_object
from inkstream.weights.files import few, in_section, list_weights, read_header, sections
from inkstream.weights.keymap import Rule, translate

SCALES = ("scale_weight", "weight_scale", "comfy_quant", "pre_quant_scale", "qweight", "absmax", "quant_map")
"""Endings of weight names that mean a file is quantised in a format that is not read here."""

COMFYUI = {
    "transformer": ("diffusion_models", "unet", "checkpoints"),
    **dict.fromkeys(("text_encoder", "text_encoder_2"), ("text_encoders", "clip")),
    "vae": ("vae",),
    "image_encoder": ("clip_vision",),
    "image_embedder": ("style_models",),
}
"""Part -> the folders in ComfyUI's models/ tree that hold it. In checkpoints/ are files that hold a whole model."""

SECTIONS = {
    **dict.fromkeys(("text_encoder", "text_encoder_2"), ("text_encoders.",)),
    "vae": ("vae.", "first_stage_model."),
}
"""Part -> beginnings of the sections that hold it in a file with several parts."""


@dataclass(frozen=True)
class Found:
    """A part's weights on disk. Every name and shape matches the part's module."""

    path: Path  # a safetensors or GGUF file, or a folder of shards
    config: Any
    module: nn.Module  # on meta
    rules: Sequence[Rule]  # from the layout on disk into our names
    tensors: Mapping[str, Weight]  # all weights of the files, in our names, on meta; the module may read only some
    metadata: Mapping[str, str]  # from the file header
    section: str = ""  # of a file with several parts: the prefix of the part's names there


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


def recognise(path: Path) -> tuple[type[Family], Found]:
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
        raise _named(path, "transformer") or errors[0]
    return family, _checked(match, "transformer", family.parts["transformer"])


def _named(path: Path, name: str, section: str = "") -> InputError | None:
    """The error that says what a file is instead of a part; None if its names tell nothing."""
    with suppress(InputError):
        header = read_header(path)
        if kind := describe(in_section(header.tensors, section), name):
            return InputError(f"{path} is {kind[0]}, not a {name} that is known here: {kind[1]}")
    return None


def is_transformer(path: Path) -> bool:
    try:
        return any(_match(family_of(name).parts["transformer"], path).named for name in FAMILIES)
    except InputError:
        return False


def _match(part: Part, path: Path, section: str = "", by_shapes: bool = False) -> _Match:
    """Reads a file by the layout that names every key, else by the one with the fewest unknown keys.

    by_shapes: a config in the folder or in the file's header is not read. InputError if the file is damaged or its
    config is invalid.
    """
    header = read_header(path)
    raw = in_section(header.tensors, section)
    stated = None if section or by_shapes else _stated_config(part, path, header.metadata)
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
            matches.append(_Match(Found(path, None, nn.Module(), rules, tensors, {}, section), list(tensors)))
            continue
        unread = tuple(part.unread(config))
        expected = module.state_dict()
        unknown = [name for name in tensors if name not in expected and not name.startswith(unread)]
        matches.append(_Match(Found(path, config, module, rules, tensors, header.metadata, section), unknown))
        if matches[-1].named and not matches[-1].missing:
            break
    if errors and not any(match.named for match in matches):
        raise errors[0]
    return min(matches, key=lambda match: (len(match.unknown), len(match.missing)))


def _checked(match: _Match, name: str, part: Part) -> Found:
    """The Found of a match. InputError if a weight is unknown, missing, of another shape or quantised."""
    found = match.found
    path, tensors = found.path, found.tensors
    if (found.config is None or match.unknown) and (error := _named(path, name, found.section)):
        raise error
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
    words = {name.split(".")[0] for name in in_section(read_header(found.path).tensors, found.section)}
    theirs = list(translate(found.rules, missing, back=True))
    return theirs if theirs[0].split(".")[0] in words else list(missing)


def locate_part(family: type[Family], name: str, path: Path | str) -> Found:
    """Finds and checks one part. path: a weight file, a folder of shards, or the folder of a model with the part."""
    path = existing(name, path)
    return _check(family, name, path / name if (path / name).is_dir() else path)


def locate_control(family: type[Family], model: str, path: Path) -> Found:
    """Finds and checks a control net, by the family's kind of nets whose layouts name every key.

    model: its name, for the error. InputError if the file is something else, or a net for another family.
    """
    matches: list[tuple[Part, str, _Match]] = []
    errors: list[InputError] = []
    for kind, part in family.controls.items():
        try:
            matches.append((part, kind, _match(part, path, by_shapes=True)))
        except InputError as error:
            errors.append(error)
    part, kind, match = min(
        matches, key=lambda one: (len(one[2].unknown), len(one[2].missing)), default=(None, "", None)
    )
    if part is not None and match is not None and match.named:
        return _checked(match, f"{kind} control net", part)
    others = [other for other in map(family_of, FAMILIES) if other is not family]
    if any(_is_named(part, path) for other in others for part in other.controls.values()):
        raise InputError(f"{path} is a control net for another family of models: take one made for {model}")
    header = read_header(path)
    if found := describe(in_section(header.tensors, ""), "control net"):
        raise InputError(f"{path} is {found[0]}, not a control net that {model} takes: take one made for {model}")
    if errors:
        raise errors[0]
    raise InputError(f"{path} is not a control net, it holds {few(list(header.tensors))}: take one made for {model}")


def _is_named(part: Part, path: Path) -> bool:
    """Whether a part's layouts name every key of a file."""
    try:
        return _match(part, path, by_shapes=True).named
    except InputError:
        return False


def choose_part(family: type[Family], option: str, path: Path | str, transformer: Found) -> dict[str, Found]:
    """The part that a user chose, by its name; a text encoder is the one of the family's that the file fits.

    option: a part's name, or text_encoder for any text encoder. path: a weight file, or a folder of weight files, of
    which one fits. InputError if none fits, or several do.
    """
    names = [name for name in family.parts if name.startswith(option)]
    path = existing(option, path)
    chosen: dict[str, Found] = {}
    refused: list[InputError] = []
    for name in names:
        own = path / name if (path / name).is_dir() else path
        files = list_weights(own) if own.is_dir() and not any(own.glob("*.json")) else [own]
        if found := _only_fit(family, name, files, transformer, refused, f"give one of them as {option}"):
            chosen[name] = found
    if not chosen:
        raise refused[0] if refused else InputError(f"{path} holds no weight file: give the {option} as a file")
    return chosen


def find_part(family: type[Family], name: str, transformer: Found) -> Found:
    """Finds a part other than the transformer. InputError if no file fits or several do.

    Places, in order: the transformer's own file, the folder with the part's name beside it, files beside it, and
    ComfyUI's folders for the part.
    """
    path = transformer.path
    root = path.parent
    refused: list[InputError] = []
    for section in _sections(name, path):
        with _noted(refused):
            return _fitting(family, name, path, transformer, section)
    own = root / name
    inside = list_weights(own)
    if own.is_dir() and (len(inside) < 2 or any(own.glob("*.json"))):
        return _fitting(family, name, own, transformer)
    beside = [] if path.is_dir() else [file for file in list_weights(root) if file != path]
    places = [inside, beside]
    for tree in path.parents:
        if tree.name in COMFYUI["transformer"]:
            folders = [tree.parent / folder for folder in COMFYUI.get(name, ())]
            places.append([file for folder in folders for file in list_weights(folder, deep=True)])
    for files in places:
        option = "vae" if name == "vae" else "text-encoder" if name.startswith("text_encoder") else ""
        choice = f"choose one with --{option} PATH, or " if option else ""
        remedy = f"{choice}put or link the one to take into {own}/"
        if found := _only_fit(family, name, files, transformer, refused, remedy):
            return found
    if len(refused) == 1:
        raise refused[0]
    tried = f" (none of {len(refused)} files fits: {refused[0]})" if refused else ""
    raise InputError(f"{path} has no {name}{tried}: put the {name} published with it into {own}/")


def _only_fit(
    family: type[Family],
    name: str,
    files: Sequence[Path],
    transformer: Found,
    refused: list[InputError],
    remedy: str,
) -> Found | None:
    """The one file that fits as a part; None if none does. refused: gets the error of each file that does not fit."""
    fit: list[Found] = []
    for file in sorted(files):
        for section in _sections(name, file) or [""]:
            with _noted(refused):
                fit.append(_fitting(family, name, file, transformer, section))
    if len(fit) > 1:
        root = transformer.path.parent
        raise InputError(
            f"{names_of([found.path for found in fit], root)} all fit as {name} of {transformer.path.name}: {remedy}"
        )
    return fit[0] if fit else None


def _sections(name: str, path: Path) -> list[str]:
    """The sections of a file that may hold a part; none if the file holds one part, or is damaged."""
    starts = SECTIONS.get(name, ())
    with suppress(InputError):
        return [section for section in sections(read_header(path).tensors) if starts and section.startswith(starts)]
    return []


@contextmanager
def _noted(errors: list[InputError]) -> Generator[None]:
    """Appends an InputError to a list, and goes on."""
    try:
        yield
    except InputError as error:
        errors.append(error)


def _check(family: type[Family], name: str, path: Path, section: str = "") -> Found:
    part = family.parts[name]
    return _checked(_match(part, path, section), name, part)


def _fitting(family: type[Family], name: str, path: Path, transformer: Found, section: str = "") -> Found:
    """A part at a path, checked alone and against the transformer."""
    found = _check(family, name, path, section)
    _check_joints(family, name, found, transformer.config, transformer.path)
    return found


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


def _stated_config(part: Part, path: Path, metadata: Mapping[str, str]) -> Any:
    """The config from the folder's config.json or the file's header; None if there is none."""
    if (path / "config.json").is_file():
        return _config(part, read_json(path / "config.json"), path / "config.json")
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = as_object(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if data is None:
        raise InputError(f"{path} is not a JSON object: download it again")
    return data


def names_of(files: Sequence[Path], root: Path) -> str:
    return few([str(file.relative_to(root)) if file.is_relative_to(root) else str(file) for file in files])


def _shape(tensor: Weight) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def locate_writer(family: type[Family], encoder: Found, model: str) -> Found:
    """The weights in a text encoder's files that complete it to a language model. InputError if they are missing.

    model: its name, for the error.
    """
    part, path = family.parts["text_encoder"].writer, encoder.path
    if part is None:
        raise InputError(f"{model} cannot upsample a prompt: leave upsample out")
    match = _match(part, path, encoder.section)
    if match.missing:
        raise InputError(
            f"{path} holds only a text encoder, the language model's {few(sorted(match.missing))} is missing: "
            "leave upsample out, or take the file published with the model"
        )
    return _checked(match, "language model", part)
