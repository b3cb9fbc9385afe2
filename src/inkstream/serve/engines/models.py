"""The models that a server offers, their descriptions, and the forms of their options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from inkstream.clients.remote.catalogue import is_remote, offer_of
from inkstream.engine.drawing.enhancer import able
from inkstream.engine.drawing.options import options
from inkstream.engine.drawing.writing import writes_out
from inkstream.engine.files.licences import check_licence, is_commercial_only
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.families import SPECS
from inkstream.families.fits import Sizes, sizes_of
from inkstream.serve.errors import Refused
from inkstream.serve.limits import Limits
from inkstream.serve.schema import Details, Field_, Form, Model
from inkstream.types import REPAINTING, InputError, Machine, Request, Spec

GROUPS = {
    "prompt": "prompt", "negative_prompt": "prompt", "upsample": "prompt", "loras": "prompt",
    "regions": "prompt",
    "width": "size", "height": "size", "count": "size", "tile": "size",
    "upscale": "size", "upscaler": "size", "upscale_strength": "size",
    "steps": "sampling", "seed": "sampling", "solver": "sampling", "schedule": "sampling", "shift": "sampling",
    "variation": "sampling", "seed_variance": "sampling", "until_verified": "sampling",
    "guidance": "guidance", "cfg_normalization": "guidance", "cfg_truncation": "guidance", "guidance_from": "guidance",
    "guidance_until": "guidance",
    "image": "pictures", **dict.fromkeys(REPAINTING, "pictures"), "strength": "pictures", "reference": "pictures",
    "control": "pictures", "control_nets": "pictures",
}  # fmt: skip
"""Field -> its group in the form. A field that is missing here belongs to the group `more`."""
STEPS = {"guidance": 0.1, "shift": 0.1, "strength": 0.01, "cfg_truncation": 0.05, "guidance_from": 0.05,
         "guidance_until": 0.05, "cfg_normalization": 0.1, "seed_variance": 0.05, "upscale_strength": 0.05}  # fmt: skip


ANY = Machine()


@dataclass
class Offered:
    """A model that requests may name.

    spec, sizes: None until the engine has read its files. error: why the model cannot be used, else empty.
    """

    name: str
    source: str  # name or path of the model for the engine
    spec: Spec | None
    error: str = ""
    sizes: Sizes | None = None

    def __post_init__(self) -> None:
        if self.spec is not None and not self.remote:
            self.sizes = sizes_of(self.spec)

    @property
    def remote(self) -> bool:
        """Whether somebody else draws with it."""
        return self.spec is not None and self.spec.takes is not None


def offer(asked: Sequence[str], machine: Machine = ANY) -> dict[str, Offered]:
    """The offered models by name. The first is the default.

    asked: known names, paths, NAME=PATH, or names of remote models; empty for all known models that are downloaded.
    Raises InputError if one does not exist or its licence is not allowed.
    """
    only = is_commercial_only(machine.commercial_only)
    if not asked:
        here = [spec for spec in SPECS.values() if is_here(spec) and (spec.commercial or not only)]
        here.sort(key=lambda spec: spec.folder is None)  # the model in the package comes first and is the default
        return {spec.name: Offered(spec.name, spec.name, able(spec, machine)) for spec in here}
    models: dict[str, Offered] = {}
    for one in asked:
        model = _offered(one)
        if model.name in models:
            raise InputError(f"two models are called {model.name}: rename one, as in --model other=PATH")
        if model.spec is not None:
            if only:
                check_licence(model.name, model.spec)
            model.spec = able(model.spec, machine)
        models[model.name] = model
    return models


def read_aliases(given: Sequence[str], models: dict[str, Offered]) -> dict[str, str]:
    """Alias -> name of its model. given: NAME=MODEL. Raises InputError if one is not valid."""
    aliases: dict[str, str] = {}
    for one in given:
        name, equals, model = (word.strip() for word in one.partition("="))
        if not (name and equals):
            raise InputError(f"--alias {one} has no name or no model: write it as NAME=MODEL")
        if model not in models:
            raise InputError(f"--alias {one}: {model} is not offered, take {', '.join(models)}")
        if name in models or name in aliases:
            raise InputError(f"--alias {one}: {name} is already taken, take another name")
        aliases[name] = model
    return aliases


def is_here(spec: Spec) -> bool:
    """Whether a known model is already on this machine. Makes no network request."""
    from inkstream.weights import hub

    return spec.folder is not None or bool(spec.repo and hub.cached(spec.repo, ["*.safetensors"]))


def choose(models: dict[str, Offered], request: Request) -> tuple[Request, Offered]:
    """The request with the name of its model, and the model. Raises Refused if the model is not offered or not usable.

    A request without a model gets the first model. A repository's name means the known model from it.
    """
    if "model" not in request.model_fields_set:
        name = next(iter(models))
    else:
        name = request.model
        for model in models.values():
            if model.spec is not None and model.spec.repo == request.model:
                name = model.name
    if name not in models:
        known = ", ".join(models)
        message = f"model {name[:100]} is not offered: take {known}"
        raise Refused(404, message, param="model", code="model_not_found")
    if models[name].error:
        raise Refused(503, f"model {name} cannot be used: {models[name].error}", param="model")
    return request.model_copy(update={"model": name}), models[name]


def describe(model: Offered, created: float, loaded: bool) -> Model:
    """The model's entry in the list of models. created: unix seconds."""
    spec = model.spec
    if spec is None:
        details = Details(title=model.name, licence="unknown", commercial=False, abilities=[], size=[1024, 1024],
                          multiple=16, defaults={}, loaded=loaded, ready=False)  # fmt: skip
    else:
        defaults = {
            "width": spec.size[0], "height": spec.size[1], "steps": spec.steps, "guidance": spec.guidance,
            "solver": spec.solver, "schedule": spec.schedule, "strength": spec.strength,
            "shift": spec.shift if spec.shift_rule == "fixed" else None,
        }  # fmt: skip
        details = Details(
            title=spec.title or model.name, licence=spec.licence, commercial=spec.commercial,
            abilities=sorted(spec.abilities), size=list(spec.size), multiple=spec.multiple, defaults=defaults,
            loaded=loaded, ready=True,
        )  # fmt: skip
    return Model(id=model.name, created=int(created), owned_by=_owner(spec), inkstream=details)


def form(model: Offered, limits: Limits) -> Form:
    """The fields of a model's form: for each its values, its default and its effect on this model."""
    return Form(model=model.name, fields=list(_fields(spec_of(model), limits)))


def spec_of(model: Offered) -> Spec:
    """The model's Spec. Raises Refused with 503 until the engine has described the model."""
    if model.spec is None:
        raise Refused(503, f"the engine has not described {model.name} yet: try again in 2 s", retry_after=2)
    return model.spec


def _fields(spec: Spec, limits: Limits) -> Iterator[Field_]:
    table = options(spec)
    sides = {"width": spec.size[0], "height": spec.size[1]}
    own = {**sides, "upsample": writes_out(Request.model_validate({}), spec) or "enhanced" in spec.abilities}
    most = {"count": limits.pictures, "steps": limits.steps}
    for name, field in Request.model_fields.items():
        if name == "model":
            continue
        kind, choices = _kind(name, field)
        low, high = _bounds(field)
        if name in most:
            high = min(most[name], high) if high is not None else most[name]
        default = getattr(spec, name, None) if field.default is None else field.default
        option = table[name]
        yield Field_(
            name=name,
            title=name.replace("_", " ").capitalize(),
            help=field.description or "",
            type=kind,
            default=own.get(name, list(default) if isinstance(default, tuple) else default),
            minimum=low,
            maximum=high,
            step=spec.multiple if name in sides else STEPS.get(name, 1 if kind == "integer" else None),
            choices=choices,
            group=GROUPS.get(name, "more"),  # type: ignore[arg-type]
            effect=option.effect,
            needed=option.needed,
            why=option.why,
        )


def _kind(name: str, field: FieldInfo) -> tuple[Any, list[str] | None]:
    """The type of a field, and its choices if it has a fixed list of them."""
    kind = next((k for k in get_args(field.annotation) if k is not type(None)), field.annotation)
    if name in PICTURE_FIELDS:
        return ("pictures" if field.default == () else "picture"), None
    if name in ("loras", "control_nets", "regions"):
        return name, None
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    plain = field.annotation if field.annotation in (bool, int, float, str) else kind
    if plain in (bool, int, float, str):
        return {bool: "boolean", int: "integer", float: "number", str: "text"}[plain], None
    words = get_args(kind) or get_args(field.annotation)
    return "choice", [word for word in words if isinstance(word, str)]


def _bounds(field: FieldInfo) -> tuple[float | None, float | None]:
    """The minimum and the maximum of a number. An exclusive minimum stays as it is, an exclusive maximum loses 1."""
    low = high = None
    for rule in field.metadata:
        if isinstance(rule, Ge | Gt):
            low = float(rule.ge if isinstance(rule, Ge) else rule.gt)  # type: ignore[arg-type]
        elif isinstance(rule, Le | Lt):
            high = float(rule.le if isinstance(rule, Le) else rule.lt - 1)  # type: ignore[arg-type,operator]
    return low, high


def _offered(asked: str) -> Offered:
    name, equals, path = asked.partition("=")
    if is_remote(path if equals else asked):
        spec = offer_of(path if equals else asked).spec
        return Offered(_slug(name) if equals else spec.name, spec.name, spec)
    if not equals and asked in SPECS:
        return Offered(asked, asked, SPECS[asked])
    source = Path(path if equals else asked).expanduser()
    if equals and path in SPECS:
        return Offered(_slug(name), path, SPECS[path])
    if not source.exists():
        raise InputError(f"--model {asked} is neither a known model nor a path: see inkstream models")
    own = source.name if source.is_dir() else source.stem
    return Offered(_slug(name if equals else own), str(source.resolve()), None)


def _slug(name: str) -> str:
    """The name with only those characters that need no escape in a URL, at most 64. InputError if none is left."""
    word = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")
    if not word:
        raise InputError(f"--model {name!r} has no usable name: write it as NAME=PATH with letters or digits")
    return word[:64]


def _owner(spec: Spec | None) -> str:
    return spec.repo.partition("/")[0] if spec is not None and spec.repo else "local"
