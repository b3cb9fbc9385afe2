"""A1111's extension ControlNet: its units in requests, and its routes, for A1111's clients."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from inkstream.engine.files.controls import control_folder
from inkstream.engine.files.loras import names_in
from inkstream.engine.pictures.foreign.reading import files_named
from inkstream.engine.pictures.inputs import open_picture
from inkstream.engine.pictures.maps import MAPS, missing
from inkstream.serve.api.controls import draw_picture
from inkstream.serve.api.service import Parts, Service, Who
from inkstream.serve.errors import Refused, answers, explain_invalid
from inkstream.serve.queue.inputs import as_url, decode
from inkstream.types import ControlUse, InputError, Request

router = APIRouter(prefix="/controlnet", tags=["a1111"])

Size = tuple[int, int]

MODULES = {
    "none": "", "canny": "canny", "mlsd": "lines", "lineart": "lineart", "lineart_realistic": "lineart",
    "lineart_coarse": "lineart", "lineart_standard": "lineart", "scribble_xdog": "scribble",
    "scribble_pidinet": "scribble", "scribble_hed": "scribble", "softedge_hed": "hed", "softedge_hedsafe": "hed",
    "hed": "hed", "blur_gaussian": "blur", "tile_resample": "tile", "recolor_luminance": "grey",
}  # fmt: skip
"""Name of a preprocessor in A1111 -> our map; empty: the picture is the map."""
THRESHOLDS: dict[str, dict[str, tuple[str, float]]] = {
    "canny": {"threshold_a": ("low", 255), "threshold_b": ("high", 255)},
    "tile": {"threshold_a": ("factor", 1)},
    "blur": {"threshold_a": ("sigma", 1)},
}
"""Map -> field of a unit -> our setting, and by what the field's value is divided."""
OFF: dict[str, tuple[Any, ...]] = {
    "mask": (None, ""),
    "mask_image": (None, ""),
    "effective_region_mask": (None, ""),
    "advanced_weighting": (None, []),
    "ipadapter_input": (None, [], ""),
    "guessmode": (False, None),
    "inpaint_crop_input_image": (False, True, None),
}
"""Unsupported field of a unit -> its values that mean "off". Other values are refused."""
RESIZES = {"Just Resize": 0, "Crop and Resize": 1, "Resize and Fill": 2, "Scale to Fit (Inner Fit)": 1,
           "Envelope (Outer Fit)": 2, "Inner Fit (Scale to Fit)": 1, "Outer Fit (Shrink to Fit)": 2}  # fmt: skip
"""Name of a resize mode, in this and in older versions -> its number."""
BALANCED = (0, "Balanced")
KINDS = {"openpose": "pose", "depth": "depth", "hard edge": "canny", "tile": "tile", "blur": "blur"}
"""Union control type -> the mode of a union net."""


class Unit(BaseModel):
    """One unit of ControlNet: a picture, what is made of it, and the net that reads it. Other fields do nothing."""

    model_config = ConfigDict(extra="ignore")

    enabled: bool = True
    image: str | dict[str, Any] | None = None
    input_image: str | dict[str, Any] | None = None
    module: str | None = Field("none", max_length=100)
    model: str | None = Field("None", max_length=500)
    weight: float | None = Field(None, ge=0, le=10)
    resize_mode: int | str | None = None
    threshold_a: float | None = None
    threshold_b: float | None = None
    guidance_start: float | None = Field(None, ge=0, le=1)
    guidance_end: float | None = Field(None, ge=0, le=1)
    control_mode: int | str | None = None
    union_control_type: str | None = Field(None, max_length=100)

    @model_validator(mode="before")
    @classmethod
    def _refuse_on(cls, fields: Any) -> Any:
        given = fields if isinstance(fields, dict) else {}
        for name, neutral in OFF.items():
            if name in given and given[name] not in neutral:
                raise Refused(400, f"{name} of ControlNet is not supported: leave it out", param=name)
        return fields

    @property
    def picture(self) -> str:
        """The control picture in base64; empty if there is none."""
        given = self.image or self.input_image or ""
        return str(given.get("image") or "") if isinstance(given, dict) else given


class Detect(BaseModel):
    """Pictures, and the preprocessor to apply to them."""

    model_config = ConfigDict(extra="ignore")

    controlnet_module: str = Field("none", max_length=100)
    controlnet_input_images: list[str] = Field([], max_length=16, description="Base64 or data URLs.")
    controlnet_images: list[str] = Field([], max_length=16, description="An older name of controlnet_input_images.")
    controlnet_threshold_a: float | None = None
    controlnet_threshold_b: float | None = None


class Detected(BaseModel):
    """The maps of pictures."""

    images: list[str] = Field(description="PNGs as base64.")
    info: str = "Success"


@router.get("/version", responses=answers())
async def get_controlnet_version(who: Who) -> dict[str, int]:
    """The version of the extension's API."""
    return {"version": 2}


@router.get("/settings", responses=answers())
async def get_controlnet_settings(who: Who) -> dict[str, int]:
    """The largest number of units."""
    return {"control_net_unit_count": 4}


@router.get("/model_list", responses=answers())
async def list_controlnet_models(parts: Parts, who: Who) -> dict[str, list[str]]:
    """The control nets of the server's folder."""
    return {"model_list": list(nets_of(parts))}


@router.get("/module_list", responses=answers())
async def list_controlnet_modules(who: Who) -> dict[str, JsonValue]:
    """The preprocessors that this server has."""
    return {"module_list": [*modules()], "module_detail": {}}


@router.get("/control_types", responses=answers())
async def list_control_types(parts: Parts, who: Who) -> dict[str, JsonValue]:
    """All preprocessors and nets, as one type."""
    every: dict[str, JsonValue] = {"module_list": [*modules()], "model_list": [*nets_of(parts)]}
    return {"control_types": {"All": {**every, "default_option": "none", "default_model": "None"}}}


@router.post("/detect", responses=answers(400, 503))
async def detect(parts: Parts, who: Who, body: Detect) -> Detected:
    """The maps of pictures."""
    images: list[str] = []
    for place, given in enumerate([*body.controlnet_input_images, *body.controlnet_images]):
        thresholds = {"threshold_a": body.controlnet_threshold_a, "threshold_b": body.controlnet_threshold_b}
        unit = Unit.model_validate({"image": given, "module": body.controlnet_module, **thresholds})
        images.append((await prepare(parts, unit, f"controlnet_input_images.{place}", None)).partition(",")[2])
    return Detected(images=images)


# Units --------------------------------------------------------------------------------------------------------------


def read_units(scripts: Any) -> list[Unit]:
    """The enabled units of `alwayson_scripts`. Raises Refused for another script and for what has no equivalent."""
    if scripts in (None, {}):
        return []
    if not isinstance(scripts, dict):
        raise Refused(400, "alwayson_scripts is not an object: leave it out", param="alwayson_scripts")
    units: list[Unit] = []
    for name, script in scripts.items():
        given = script.get("args") if isinstance(script, dict) else script
        if name.lower() != "controlnet":
            if given in (None, [], {}):
                continue
            line = f"alwayson_scripts {name[:100]} is not supported: leave it out"
            raise Refused(400, line, param="alwayson_scripts")
        for place, one in enumerate(given if isinstance(given, list) else []):
            try:
                unit = Unit.model_validate(one)
            except ValidationError as error:
                refusal = explain_invalid(error)
                raise _placed(refusal, place) from None
            except Refused as refusal:
                raise _placed(refusal, place) from None
            if unit.enabled:
                units.append(unit)
    return units


def _placed(refusal: Refused, place: int) -> Refused:
    """The refusal with the place of its field in the body."""
    refusal.param = f"alwayson_scripts.controlnet.args.{place}.{refusal.param or ''}".rstrip(".")
    return refusal


async def follow(parts: Service, units: list[Unit], start: str | None, size: Size | None) -> dict[str, Any]:
    """The fields `control` and `control_nets` for units. start: the start picture, for units without a picture.

    size: that of the drawing. Raises Refused, which names the unit.
    """
    if not units:
        return {}
    pictures: list[str] = []
    nets: list[str] = []
    known = await to_thread.run_sync(lambda: {*nets_of(parts)})
    for place, unit in enumerate(units):
        try:
            nets.append(str(use_of(unit, known)))
            if not unit.picture and start is None:
                raise Refused(400, f"unit {place} of ControlNet has no picture: give image", param="image")
            source = unit if unit.picture else unit.model_copy(update={"image": start})
            pictures.append(await prepare(parts, source, "image", size))
        except Refused as refusal:
            raise _placed(refusal, place) from None
    return {"control": pictures, "control_nets": nets}


def use_of(unit: Unit, known: Collection[str]) -> ControlUse:
    """How a unit uses a net. known: the names in the server's folder. Raises Refused."""
    name = re.sub(r"(\.safetensors)?( \[[0-9a-f]+\])?$", "", unit.model or "None")
    found = files_named(name, known)
    if len(found) != 1:
        problem = f"means {' and '.join(sorted(found))}" if found else "is not one of /controlnet/model_list"
        raise Refused(400, f"model {name[:100]} of ControlNet {problem}: give one name", param="model")
    if unit.control_mode not in (None, *BALANCED):
        line = f"control_mode {str(unit.control_mode)[:60]} is not supported: give Balanced, and another weight"
        raise Refused(400, line, param="control_mode")
    asked = (unit.union_control_type or "Unknown").lower()
    mode = KINDS.get(asked, "")
    if not mode and asked != "unknown":
        kinds = ", ".join(KINDS)
        line = f"union_control_type {asked[:60]} is not supported: take one of {kinds}"
        raise Refused(400, line, param="union_control_type")
    fields = {"scale": unit.weight, "from": unit.guidance_start, "until": unit.guidance_end, "mode": mode or None}
    try:
        return ControlUse.read({"path": found[0]} | {name: one for name, one in fields.items() if one is not None})
    except InputError as error:
        raise Refused(400, str(error), param="guidance_start") from None


async def prepare(parts: Service, unit: Unit, param: str, size: Size | None) -> str:
    """The control picture of a unit as a data URL: its picture, resized and turned into a map. Raises Refused."""
    name = map_for(unit.module or "none")
    taken = {
        ours: value / divisor
        for field, (ours, divisor) in THRESHOLDS.get(name, {}).items()
        if (value := getattr(unit, field)) is not None and value >= 0
    }
    mode = RESIZES.get(unit.resize_mode, -1) if isinstance(unit.resize_mode, str) else unit.resize_mode
    if mode not in (None, 0, 1, 2):
        line = f"resize_mode {str(unit.resize_mode)[:60]} is not known: give Crop and Resize"
        raise Refused(400, line, param="resize_mode")
    # Decoded and checked as a picture of a request is, before it is resized.
    request = Request.model_validate({"control": [as_url(unit.picture)]})
    try:
        [(data, _)] = (await to_thread.run_sync(decode, request, None, parts.settings.limits)).values()
    except Refused as refusal:
        refusal.message, refusal.param = refusal.message.replace("control.0", param), param
        raise
    source = "data:application/octet-stream;base64," + base64.b64encode(data).decode()

    def resize() -> Image.Image:
        try:
            return resized(open_picture(source), size, 1 if mode is None else mode)
        except InputError as error:
            raise Refused(400, f"{param}: {error}", param=param, code="invalid_image") from None

    picture = await to_thread.run_sync(resize)
    if name:
        return as_url(base64.b64encode(await draw_picture(parts, name, picture, None, taken)).decode())
    buffer = io.BytesIO()
    await to_thread.run_sync(picture.save, buffer, "PNG")
    return as_url(base64.b64encode(buffer.getvalue()).decode())


def map_for(module: str) -> str:
    """The map of a preprocessor of A1111, or one of ours by its own name; empty for none. Raises Refused."""
    key = module.lower().partition(" (")[0]
    name = MODULES.get(key, key if key in MAPS and MAPS[key].reads == "picture" else None)
    if name is None:
        line = f"module {module[:100]} is not here: take one of /controlnet/module_list, or send a ready map with none"
        raise Refused(400, line, param="module")
    if name and (lacking := missing(name)):
        raise Refused(400, lacking, param="module", code="not_installed")
    return name


def resized(picture: Image.Image, size: Size | None, mode: int) -> Image.Image:
    """A picture at a size. mode: 0 stretches it, 1 crops it, 2 adds space in the middle colour of its border."""
    if size is None or picture.size == size:
        return picture
    if mode == 0:
        return picture.resize(size, Image.Resampling.LANCZOS)
    if mode == 1:
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(int(value) for value in np.median(border, axis=0))
    return ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color=colour)


def modules() -> list[str]:
    """The names of preprocessors whose maps this server can draw."""
    return [name for name, own in MODULES.items() if not own or missing(own) is None]


def nets_of(parts: Service) -> list[str]:
    """The names of the control nets in the server's folder."""
    return [*names_in(control_folder(parts.settings.machine))]
