"""A1111's API, as far as its clients use it. A field that the server does not support is refused by its name."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any, get_args

from anyio import to_thread
from fastapi import APIRouter, Query, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic itself has no such name before 2.11

from inkstream.engine.files.loras import lora_folder, names_in
from inkstream.engine.files.upscalers import upscaler_folder, upscalers_in
from inkstream.engine.pictures.foreign.a1111 import write_a1111
from inkstream.engine.pictures.foreign.reading import (
    A1111_FILLS,
    A1111_SCHEDULES,
    A1111_SOLVERS,
    Reading,
    find_schedule,
    find_solver,
    repainting,
    take_loras,
)
from inkstream.engine.pictures.inputs import read_source
from inkstream.engine.pictures.metadata import SOFTWARE, read_request
from inkstream.serve import schema
from inkstream.serve.api.controlnet import Unit, follow, read_units
from inkstream.serve.api.loras import find_use
from inkstream.serve.api.openai import failure
from inkstream.serve.api.service import Parts, Service, Who
from inkstream.serve.errors import Refused, answers, explain_invalid
from inkstream.serve.queue.inputs import as_url, examine
from inkstream.serve.queue.store import Job, Upload
from inkstream.types import InputError, Request, ScheduleName, SolverName, Variation

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])

NOTE = "a1111"
"""Note of the jobs of this API. `progress` and `interrupt` concern only these jobs."""
OFF: dict[str, tuple[Any, ...]] = {
    "restore_faces": (False, None),
    "tiling": (False, None),
    "seed_resize_from_w": (-1, 0, None),
    "seed_resize_from_h": (-1, 0, None),
    "styles": ([], None),
    "refiner_checkpoint": ("", "None", None),
    "script_name": ("", "None", None),
    "script_args": ([], None),
    "clip_skip": (0, 1, None),
    "firstphase_width": (0, None),
    "firstphase_height": (0, None),
    "firstpass_image": ("", None),
    "latent_mask": (None,),
    "initial_noise_multiplier": (1, None),
    "infotext": ("", None),
    "s_churn": (0, None),
    "s_min_uncond": (0, None),
}
"""Unsupported field that would change the picture -> its values that mean "off". Other values are refused."""
NOISY = {"eta": ("euler_ancestral",), "s_noise": ("euler_ancestral", "lcm")}
"""A1111's factor for the noise that a solver adds -> our solvers that add noise. They only support the factor 1."""
HIRES: dict[str, tuple[Any, ...]] = {
    "hr_checkpoint_name": (None, "", "Use same checkpoint"),
    "hr_additional_modules": (None, [], ["Use same choices"]),
    "hr_sampler_name": (None, "", "Use same sampler"),
    "hr_scheduler": (None, "", "Use same scheduler"),
    "hr_prompt": ("", None),
    "hr_negative_prompt": ("", None),
}
"""Unsupported field of the second pass -> its values that mean "as in the first", as in OFF."""
UNHEEDED = (
    "enable_hr", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", *HIRES, "hr_cfg",
    "hr_distilled_cfg", "refiner_switch_at", "s_tmin", "s_tmax", "comments", "disable_extra_networks",
    "do_not_save_samples", "do_not_save_grid", "save_images", "force_task_id", "override_settings_restore_afterwards",
    "include_init_images", "image_cfg_scale",
)  # fmt: skip
"""Fields whose values are not checked with the others: those of the second pass, those of a feature that is off, and
those that never change the picture."""
LANCZOS = "Lanczos"
"""A1111's name of the upscaler that is no model."""
MASKED = (
    "mask_blur", "mask_blur_x", "mask_blur_y", "inpainting_mask_invert", "inpainting_fill", "inpaint_full_res",
    "inpaint_full_res_padding",
)  # fmt: skip
"""Options of masks. Clients also send them without a mask, where they do nothing."""
OURS = ("resize_mode", "mask_round")
"""Options of A1111 for things that this server always does in the same way. They are listed in `info` as ignored."""
SETTINGS: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (0, 1, None),
    "sd_vae": ("Automatic", "None", "", None),
    "forge_additional_modules": ([], None),
    "samples_format": ("png", None),
}
"""Unsupported setting -> its values that mean "off", as in OFF."""


def _declare(document: dict[str, Any]) -> None:
    """Add the accepted fields that are not fields of the model to its JSON schema."""
    accepted = {name: {} for name in (*UNHEEDED, *OURS, *MASKED)}
    off = {name: {"enum": list(values)} for name, values in OFF.items()}
    document["properties"] = accepted | off | document["properties"]


class Settings(BaseModel):
    """Settings that a client can change: only the model."""

    model_config = ConfigDict(extra="forbid")

    sd_model_checkpoint: str | None = Field(None, max_length=200, description="A title or name from /sd-models.")

    @model_validator(mode="before")
    @classmethod
    def _drop_off(cls, fields: Any) -> Any:
        return _without(fields, SETTINGS)


class Hires(BaseModel):
    """The fields of A1111's second pass. Its steps, sampler and guidance are those of the first."""

    hr_scale: float = Field(2, ge=1, le=16)
    hr_resize_x: int = Field(0, ge=0, le=8192)
    hr_resize_y: int = Field(0, ge=0, le=8192)
    hr_upscaler: str | None = Field(None, max_length=500)

    def upscale(self, width: int, height: int) -> str:
        """Our field `upscale`. width, height: of the first pass. Of two sides, one may be left out."""
        across, down = self.hr_resize_x, self.hr_resize_y
        if not across and not down:
            return f"{self.hr_scale:g}x"
        return f"{across or round(down * width / height)}x{down or round(across * height / width)}"


class Drawing(BaseModel):
    """The fields of A1111's txt2img. A missing field has the model's default, not A1111's."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_declare)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, lt=2**63, description="-1 means a random seed.")
    subseed: int | None = Field(None, ge=-1, lt=2**63, description="Seed of the variation; -1 means a random seed.")
    subseed_strength: float | None = Field(
        None, ge=0, le=1, description="Strength of the variation. Above 0, all pictures have one seed, as in A1111."
    )
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field(None, max_length=100, description="Old name of sampler_name.")
    scheduler: str | None = Field(None, max_length=100)
    batch_size: int = Field(1, ge=1, le=64)
    n_iter: int = Field(1, ge=1, le=64, description="The number of pictures is batch_size times n_iter.")
    steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    distilled_cfg_scale: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="Guidance of models that read it as an input."
    )
    width: int | None = Field(None, ge=16, le=8192)
    height: int | None = Field(None, ge=16, le=8192)
    denoising_strength: float | None = Field(None, ge=0, le=1)
    eta: float | None = Field(None, ge=0, le=1, description="Noise of Euler a: 1, or 0 for none.")
    s_noise: float | None = Field(None, description="Factor for the noise of solvers that add noise: only 1.")
    override_settings: Settings | None = None
    send_images: bool = True
    alwayson_scripts: dict[str, Any] | None = Field(None, description="Only ControlNet: {controlnet: {args: [units]}}.")

    _ignored: list[str] = PrivateAttr(default_factory=list)  # given fields that have no effect
    _hires: Hires | None = PrivateAttr(None)  # the second pass, if it is on
    _units: list[Unit] = PrivateAttr(default_factory=list[Unit])  # of ControlNet

    @model_validator(mode="wrap")
    @classmethod
    def _drop_off(cls, fields: Any, handler: ModelWrapValidatorHandler[Drawing]) -> Drawing:
        if not _is_object(fields):
            return handler(fields)
        unmasked = MASKED if fields.get("mask") is None else ()
        known = {name: value for name, value in fields.items() if name not in (*UNHEEDED, *OURS, *unmasked)}
        drawing = handler(_without(known, OFF))
        drawing._units = read_units(drawing.alwayson_scripts)
        masked = OURS if not unmasked else ("resize_mode",)
        drawing._ignored = [name for name in masked if fields.get(name) is not None]
        if fields.get("enable_hr"):
            given = {name: value for name, value in _without(fields, HIRES).items() if value is not None}
            try:
                drawing._hires = Hires.model_validate(given)
            except ValidationError as error:
                raise explain_invalid(error) from None
            beside = ("hr_second_pass_steps", "hr_cfg", "hr_distilled_cfg")
            drawing._ignored += [name for name in beside if given.get(name)]
        return drawing


class FromPicture(Drawing):
    """The fields of A1111's img2img."""

    init_images: list[str] = Field(min_length=1, max_length=1, description="Base64 or a data URL.")
    mask: str | None = Field(None, description="White areas are repainted, black areas are kept.")
    mask_blur: int | None = Field(None, ge=0, le=256, description="Softness of the mask's edge, to both sides.")
    mask_blur_x: int | None = Field(None, ge=0, le=256, description="As mask_blur. The larger one counts.")
    mask_blur_y: int | None = Field(None, ge=0, le=256, description="As mask_blur. The larger one counts.")
    inpainting_mask_invert: bool | None = None
    inpainting_fill: int | None = Field(None, ge=0, le=2, description="0: blur, 1: original, 2: noise.")
    inpaint_full_res: bool | None = Field(None, description="Draw only the mask's surroundings.")
    inpaint_full_res_padding: int | None = Field(
        None, ge=0, le=4096, description="Pixels around the mask; 32 if left out."
    )

    def repainting(self) -> dict[str, Any]:
        """Our fields for those of the mask."""
        blurs = [blur for blur in (self.mask_blur, self.mask_blur_x, self.mask_blur_y) if blur is not None]
        padding = 32 if self.inpaint_full_res_padding is None else self.inpaint_full_res_padding
        fields = repainting(max(blurs, default=None), padding if self.inpaint_full_res else None)
        if self.inpainting_mask_invert:
            fields["mask_invert"] = True
        if self.inpainting_fill is not None:
            fields["mask_fill"] = [*A1111_FILLS.values()][self.inpainting_fill]
        return fields


class Drawn(BaseModel):
    """The answer of txt2img and img2img."""

    images: list[str] = Field(description="PNGs as base64.")
    parameters: dict[str, JsonValue] = Field(description="The fields of the request.")
    info: str = Field(description="JSON text: seeds, sizes and the text in each picture's metadata.")


class Picture(BaseModel):
    """A picture whose metadata is read."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="Base64 or a data URL.")


class Extras(BaseModel):
    """Common fields of A1111's extras: upscaling and face restoration. There is no face restoration."""

    model_config = ConfigDict(extra="forbid")

    upscaler_1: str = Field("None", max_length=500, description="A name from /upscalers. None changes nothing.")
    upscaler_2: str = Field("None", max_length=500, description="Only None, unless its visibility is 0.")
    gfpgan_visibility: float = Field(0, ge=0, le=1, description="Only 0: there is no face restoration.")
    codeformer_visibility: float = Field(0, ge=0, le=1, description="Only 0: there is no face restoration.")
    codeformer_weight: float = 0
    resize_mode: int = Field(0, ge=0, le=1, description="0: by upscaling_resize; 1: to a width and height.")
    show_extras_results: bool = True
    upscaling_resize: float = Field(2, ge=1, le=16)
    upscaling_resize_w: int = Field(512, ge=16, le=32_768)
    upscaling_resize_h: int = Field(512, ge=16, le=32_768)
    upscaling_crop: bool = Field(True, description="With a width and height: crop another aspect ratio, or fit it in.")
    extras_upscaler_2_visibility: float = 0
    upscale_first: bool = False


class ExtrasOfOne(Extras):
    """Extras for one picture."""

    image: str = Field(description="Base64 or a data URL.")


class Named(BaseModel):
    """One picture of a batch."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="Base64 or a data URL.")
    name: str = Field("", max_length=500)


class ExtrasOfMany(Extras):
    """Extras for a batch of pictures."""

    imageList: list[Named] = Field(max_length=64)


class Enlarged(BaseModel):
    """The enlarged picture."""

    html_info: str = ""
    image: str


class AllEnlarged(BaseModel):
    """The enlarged pictures."""

    html_info: str = ""
    images: list[str]


class Info(BaseModel):
    """A picture's metadata."""

    info: str
    items: dict[str, str]
    parameters: dict[str, JsonValue]


class Progress(BaseModel):
    """Progress of the caller's drawing."""

    progress: float
    eta_relative: float
    state: dict[str, JsonValue]
    current_image: str | None
    textinfo: str | None


DRAWING = answers(400, 404, 409, 429, 500, 503)


@router.post("/txt2img", responses=DRAWING)
async def txt2img(parts: Parts, who: Who, http: HTTPRequest, body: Drawing) -> Drawn:
    """Draw pictures from a prompt. If the client disconnects before the answer, the job is cancelled."""
    strength, body = body.denoising_strength, body.model_copy(update={"denoising_strength": None})
    return await draw(parts, who, http, body, second_pass(parts, who, body, strength))


@router.post("/img2img", responses=DRAWING)
async def img2img(parts: Parts, who: Who, http: HTTPRequest, body: FromPicture) -> Drawn:
    """Draw from a picture. A mask limits the change to a part of it."""
    if body._hires is not None:
        raise Refused(400, "enable_hr is for txt2img: leave it out, and give width and height", param="enable_hr")
    fields = {"image": as_url(body.init_images[0])}
    if body.mask is not None:
        fields |= {"mask": as_url(body.mask), **body.repainting()}
    return await draw(parts, who, http, body, fields)


@router.get("/progress", responses=answers(400))
async def get_progress(
    parts: Parts, who: Who, skip_current_image: Annotated[bool, Query(description="Omit the preview.")] = False
) -> Progress:
    """Progress and preview of the caller's first drawing that has not ended."""
    job = next(iter(drawings(parts, who)), None)
    told = None if job is None else parts.jobs.tell(job)
    at = None if told is None else told.progress
    state = {
        "skipped": False,
        "interrupted": False,
        "job": "" if job is None else job.id,
        "job_count": 0 if job is None else job.total,
        "job_no": 0 if at is None else at.picture,
        "job_timestamp": "" if job is None else _stamp(job.created),
        "sampling_step": 0 if at is None else at.step,
        "sampling_steps": 0 if at is None else at.steps,
    }
    return Progress(
        progress=0.0 if at is None else round((at.picture + at.step / at.steps) / at.of, 4),
        eta_relative=0.0 if told is None else told.eta or 0.0,
        state=state,
        current_image=None if job is None or skip_current_image else await preview(parts, job),
        textinfo=None,
    )


@router.post("/interrupt", responses=answers(503))
async def interrupt(parts: Parts, who: Who) -> dict[str, JsonValue]:
    """Cancel the caller's drawings. Clients that wait for them get the finished pictures."""
    for job in drawings(parts, who):
        parts.jobs.cancel(job.id)
    return {}


@router.post("/skip", responses=answers(400))
async def skip(parts: Parts, who: Who) -> dict[str, JsonValue]:
    """Does nothing while nothing is drawn. Refused during a drawing: the server cannot skip one of its pictures."""
    if drawings(parts, who):
        raise Refused(400, "skip: one picture of a drawing cannot be skipped: cancel it with /sdapi/v1/interrupt")
    return {}


@router.get("/options", responses=answers())
async def get_options(parts: Parts, who: Who) -> dict[str, JsonValue]:
    """The settings."""
    neutral = {name: values[0] for name, values in SETTINGS.items()} | {"CLIP_stop_at_last_layers": 1}
    return {"sd_model_checkpoint": chosen(parts, who), **neutral}


@router.post("/options", responses=answers(400, 404, 503))
async def set_options(parts: Parts, who: Who, body: Settings) -> dict[str, JsonValue]:
    """Choose the model for later drawings of this key that do not name one."""
    if body.sd_model_checkpoint is not None:
        parts.store.put_setting(f"a1111.model.{who.name}", find_model(parts, body.sd_model_checkpoint))
    return {}


@router.get("/samplers", responses=answers())
async def list_samplers(who: Who) -> list[dict[str, JsonValue]]:
    """The solvers."""
    names = get_args(SolverName)
    return [{"name": A1111_SOLVERS.get(name, name), "aliases": [name], "options": {}} for name in names]


@router.get("/schedulers", responses=answers())
async def list_schedulers(who: Who) -> list[dict[str, JsonValue]]:
    """The schedules."""
    labels = {"automatic": "Automatic"} | {name: A1111_SCHEDULES.get(name, name) for name in get_args(ScheduleName)}
    same: dict[str, JsonValue] = {"aliases": None, "default_rho": -1, "need_inner_model": False}
    return [{"name": name, "label": label, **same} for name, label in labels.items()]


@router.get("/sd-models", responses=answers())
async def list_sd_models(parts: Parts, who: Who) -> list[dict[str, JsonValue]]:
    """The offered models."""
    nothing: dict[str, JsonValue] = {"hash": None, "sha256": None, "config": None}
    return [{"title": name, "model_name": name, "filename": name, **nothing} for name in parts.models]


NONE: dict[str, JsonValue] = {
    "sd-vae": [],
    "sd-modules": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "latent-upscale-modes": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "extensions": [],
    "cmd-flags": {},
}
"""Lists that clients read when they start -> the empty answer: this server has none of these things."""
REFRESHED = ("refresh-checkpoints", "refresh-loras", "refresh-vae")
"""Routes that reload a list. They do nothing, because the models are fixed when the server starts."""


@router.get("/loras", responses=answers())
async def list_loras(parts: Parts, who: Who) -> list[dict[str, JsonValue]]:
    """The LoRA files of the server's folder. A prompt uses one as `<lora:NAME:STRENGTH>`."""
    names = names_in(lora_folder(parts.settings.machine))
    return [{"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}} for name in names]


@router.get("/upscalers", responses=answers())
async def list_upscalers(parts: Parts, who: Who) -> list[dict[str, JsonValue]]:
    """The upscaling models of the server's folder, and what enlarges without one."""
    names = await to_thread.run_sync(upscalers_in, upscaler_folder(parts.settings.machine))
    nothing: dict[str, JsonValue] = {"model_path": None, "model_url": None, "scale": None}
    return [
        {"name": name, "model_name": name if name in names else None, **nothing} for name in ("None", LANCZOS, *names)
    ]


def _constant_route(answer: JsonValue) -> Callable[[Who], Awaitable[Response]]:
    async def give(who: Who) -> Response:
        """Always the same answer: this server has none of these things."""
        return JSONResponse(answer)

    return give


for _path, _answer in NONE.items():
    _name = f"list_{_path.replace('-', '_')}"
    router.add_api_route(f"/{_path}", _constant_route(_answer), name=_name, responses=answers(), response_model=None)
for _path in REFRESHED:
    _name, _methods = _path.replace("-", "_"), ["POST"]
    router.add_api_route(
        f"/{_path}", _constant_route(None), name=_name, methods=_methods, responses=answers(), response_model=None
    )


@router.get("/memory", responses=answers())
async def get_memory(who: Who) -> dict[str, dict[str, JsonValue]]:
    """Bytes of the machine's memory. `/metrics` has the GPU memory in use."""
    ram: dict[str, JsonValue] = {"error": "this system does not report its memory"}
    if {"SC_AVPHYS_PAGES", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys():
        free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        ram = {"free": free, "used": total - free, "total": total}
    return {"ram": ram, "cuda": {"error": "see /metrics"}}


@router.post("/interrogate", responses=answers(400))
async def interrogate(who: Who) -> Response:
    """Refused: no model here describes pictures."""
    raise Refused(400, "interrogate: no model here describes pictures: read their metadata with /sdapi/v1/png-info")


@router.post("/extra-single-image", responses=DRAWING)
async def extra_single_image(parts: Parts, who: Who, http: HTTPRequest, body: ExtrasOfOne) -> Enlarged:
    """The enlarged picture. The upscaler None leaves it unchanged, as in A1111."""
    return Enlarged(image=(await enlarge(parts, who, http, body, {"image": body.image}))[0])


@router.post("/extra-batch-images", responses=DRAWING)
async def extra_batch_images(parts: Parts, who: Who, http: HTTPRequest, body: ExtrasOfMany) -> AllEnlarged:
    """The enlarged pictures. The upscaler None leaves them unchanged, as in A1111."""
    given = {f"imageList.{place}.data": one.data for place, one in enumerate(body.imageList)}
    return AllEnlarged(images=await enlarge(parts, who, http, body, given))


async def enlarge(parts: Service, who: Who, http: HTTPRequest, body: Extras, given: dict[str, str]) -> list[str]:
    """The enlarged pictures in base64, each drawn as a job. given: field -> picture.

    Raises Refused if a value is not a picture, or the request asks for another change.
    """
    if body.upscaler_2 not in ("", "None") and body.extras_upscaler_2_visibility:
        line = f"upscaler_2 {body.upscaler_2[:100]} is not supported: give None, and one upscaler as upscaler_1"
        raise Refused(400, line, param="upscaler_2")
    for name in ("gfpgan_visibility", "codeformer_visibility"):
        if visibility := getattr(body, name):
            raise Refused(400, f"{name} {visibility:g} is not supported: give 0", param=name)

    def examined(param: str, picture: str) -> tuple[bytes, Upload]:
        try:
            data = read_source(as_url(picture))
        except InputError as error:
            raise Refused(400, f"{param}: {error}", param=param, code="invalid_image") from None
        return data, examine(data, who.name, time.time(), parts.settings.limits, param)

    found = [await to_thread.run_sync(examined, param, picture) for param, picture in given.items()]
    if body.upscaler_1 in ("", "None"):
        return [base64.b64encode(data).decode() for data, _ in found]
    fields: dict[str, Any] = {
        "model": chosen(parts, who),
        "strength": 0,
        "upscale_strength": 0,
        "upscaler": find_upscaler(parts, body.upscaler_1, "upscaler_1"),
    }
    images: list[str] = []
    for picture, (_, upload) in zip(given.values(), found):
        own = fields | {"image": as_url(picture), "upscale": enlargement_of(body, upload.width, upload.height)}
        request = await parts.take_pictures(who, Request.model_validate(own))
        job = parts.jobs.submit(who, request, note=NOTE, waited=True)
        done = await parts.jobs.run(http, job)
        if done.state == "failed":
            raise failure(done)
        images += [await to_thread.run_sync(_read, parts, one) for one in done.pictures]
    return images


def enlargement_of(body: Extras, width: int, height: int) -> str:
    """Our field `upscale` for a picture of a size."""
    if body.resize_mode == 0:
        return f"{body.upscaling_resize:g}x"
    across, down = body.upscaling_resize_w, body.upscaling_resize_h
    if not body.upscaling_crop:
        share = min(across / width, down / height)
        across, down = (max(16, round(side * share)) for side in (width, height))
    return f"{across}x{down}"


def find_upscaler(parts: Service, name: str | None, param: str) -> str | None:
    """The upscaling model of that name; None for those that are no model. Raises Refused if there is none."""
    if name in (None, "", "None", LANCZOS):
        return None
    if name not in upscalers_in(upscaler_folder(parts.settings.machine)):
        raise Refused(400, f"{param} {name[:100]} is not known: take one of /sdapi/v1/upscalers", param=param)
    return name


@router.post("/png-info", responses=answers(400))
async def png_info(who: Who, body: Picture) -> Info:
    """The request in a picture's metadata, or empty fields if it has none."""
    try:
        found = await to_thread.run_sync(read_request, as_url(body.image))
    except InputError as error:
        if "carries no request" in str(error):
            return Info(info="", items={}, parameters={})
        raise Refused(400, f"image: {error}", param="image", code="invalid_image") from None
    request = found.request
    text = write_a1111(request, SOFTWARE, None if "model" in request.model_fields_set else "")
    fields = request.model_dump(mode="json", include=request.model_fields_set - {"image", "mask", "reference"})
    return Info(info=text, items={"parameters": text}, parameters=fields)


def second_pass(parts: Service, who: Who, body: Drawing, strength: float | None) -> dict[str, Any]:
    """Our fields of A1111's second pass; none if it is off. strength: A1111's `denoising_strength`."""
    if body._hires is None:
        return {}
    spec = parts.models[chosen(parts, who)].spec
    size = spec.size if spec else (1024, 1024)
    fields: dict[str, Any] = {
        "upscale": body._hires.upscale(body.width or size[0], body.height or size[1]),
        "upscaler": find_upscaler(parts, body._hires.hr_upscaler, "hr_upscaler"),
    }
    if strength is not None:
        fields["upscale_strength"] = strength
    return {name: value for name, value in fields.items() if value is not None}


# Reading requests ---------------------------------------------------------------------------------------------------


def to_request(parts: Service, who: Who, body: Drawing, start: dict[str, Any]) -> Request:
    """The Request for a body. Raises Refused for an unknown model, sampler, scheduler or LoRA.

    start: the fields of the start picture and its mask, or of the second pass.
    """
    fields = dict(start)
    reading = Reading(fields)
    for name, find, given in (
        ("sampler_name", find_solver, body.sampler_name or body.sampler_index),
        ("scheduler", find_schedule, body.scheduler),
    ):
        if given and given != "Automatic":
            find(given, reading)
            if reading.ignored:
                where = "samplers" if name == "sampler_name" else "schedulers"
                raise Refused(400, f"{name} {given[:100]} is not known: take one of /sdapi/v1/{where}", param=name)
    fields["prompt"] = take_loras(body.prompt, reading)
    if named_loras := reading.ignored.get("loras"):
        known = names_in(lora_folder(parts.settings.machine))
        fields["loras"] = [str(find_use(named, known)) for named in named_loras]
    same = {
        "negative_prompt": body.negative_prompt or None,
        "steps": body.steps,
        "guidance": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "strength": body.denoising_strength,
        "seed": None if body.seed < 0 else body.seed,
    }
    fields |= {name: value for name, value in same.items() if value is not None}
    if body.subseed_strength:
        subseed = body.subseed if body.subseed is not None and body.subseed >= 0 else secrets.randbelow(2**32)
        fields["variation"] = str(Variation(subseed, body.subseed_strength))
    settings = body.override_settings
    named = None if settings is None else settings.sd_model_checkpoint
    fields["model"] = find_model(parts, named) if named else chosen(parts, who)
    spec = parts.models[fields["model"]].spec
    if body.distilled_cfg_scale is not None and spec is not None and spec.guides == "read":
        fields["guidance"] = body.distilled_cfg_scale
    _take_noise(body, fields, "euler" if spec is None else spec.solver)
    try:
        return Request.model_validate({**fields, "count": body.batch_size * body.n_iter})
    except ValidationError as error:
        raise explain_invalid(error) from None


def _take_noise(body: Drawing, fields: dict[str, Any], default: SolverName) -> None:
    """Apply `eta` and `s_noise`. Euler a with eta 0 is Euler. For a solver that adds noise, only 1 is allowed."""
    solver = fields.get("solver", default)
    if solver == "euler_ancestral" and body.eta == 0:
        fields["solver"] = solver = "euler"
    for name, solvers in NOISY.items():
        value = getattr(body, name)
        if value is not None and solver not in solvers:
            body._ignored.append(name)
        elif value not in (None, 1):
            sampler = A1111_SOLVERS.get(solver, solver)
            raise Refused(
                400, f"{name} {value:g} is not supported with {sampler}: give 1, or another sampler", param=name
            )


def chosen(parts: Service, who: Who) -> str:
    """The model for drawings that do not name one: the one in the caller's options if it is offered, else the first."""
    name = parts.store.setting(f"a1111.model.{who.name}")
    return name if name in parts.models else next(iter(parts.models))


def find_model(parts: Service, title: str) -> str:
    """The model with that title. Programs may add `.safetensors` or a hash. Raises Refused if it is not offered."""
    name = re.sub(r"(\.safetensors)?( \[[0-9a-f]+\])?$", "", title)
    if name not in parts.models:
        known = ", ".join(parts.models)
        raise Refused(404, f"model {title[:100]} is not offered: take {known}", param="sd_model_checkpoint",
                      code="model_not_found")  # fmt: skip
    return name


def _is_object(fields: Any) -> bool:
    return isinstance(fields, dict)


def _without(fields: Any, off: dict[str, tuple[Any, ...]]) -> Any:
    """The fields without the unsupported ones. Raises Refused if an unsupported one is not off. off: as OFF."""
    if not _is_object(fields):
        return fields
    for name, neutral in off.items():
        if name in fields and fields[name] not in neutral:
            value = json.dumps(fields[name])[:100]
            raise Refused(400, f"{name} {value} is not supported: leave it out", param=name)
    return {name: value for name, value in fields.items() if name not in off}


# Answers ------------------------------------------------------------------------------------------------------------


async def draw(parts: Service, who: Who, http: HTTPRequest, body: Drawing, start: dict[str, Any]) -> Drawn:
    """Draw, and return the pictures when the job has ended or was interrupted. start: as for `to_request`.

    If the client disconnects, the job is cancelled.
    """
    request = await parts.take_pictures(who, await controlled(parts, body, to_request(parts, who, body, start)))
    job = parts.jobs.submit(who, request, note=NOTE, waited=True)
    done = await parts.jobs.run(http, job)
    if done.state == "failed":
        raise failure(done)
    images: list[str] = []
    if body.send_images:
        images = [await to_thread.run_sync(_read, parts, picture) for picture in done.pictures]
    asked = body.model_dump(mode="json", exclude_unset=True, exclude={"init_images", "mask", "alwayson_scripts"})
    return Drawn(images=images, parameters=asked, info=json.dumps(describe(done, body)))


async def controlled(parts: Service, body: Drawing, request: Request) -> Request:
    """The request with the control pictures and nets of the body's units of ControlNet."""
    if not body._units:
        return request
    spec = parts.models[request.model].spec
    own = None if spec is None or request.image is not None else spec.size
    size = own if request.width is None or request.height is None else (request.width, request.height)
    try:
        return Request.model_validate(
            request.model_dump(exclude_unset=True) | await follow(parts, body._units, request.image, size)
        )
    except ValidationError as error:
        raise explain_invalid(error) from None


def describe(done: schema.Job, body: Drawing) -> dict[str, JsonValue]:
    """The content of `info` in the answer."""
    requests = [Request.model_validate(picture.request) for picture in done.pictures]
    first = requests[0] if requests else Request.model_validate(done.request)
    varied = [None if one.variation is None else Variation.read(one.variation) for one in requests]
    return {
        "prompt": first.prompt,
        "all_prompts": [request.prompt for request in requests],
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [request.negative_prompt for request in requests],
        "seed": first.seed,
        "all_seeds": [request.seed for request in requests],
        "subseed": varied[0].seed if varied and varied[0] else -1,
        "all_subseeds": [-1 if one is None else one.seed for one in varied],
        "subseed_strength": varied[0].strength if varied and varied[0] else 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": A1111_SOLVERS.get(first.solver or "", first.solver),
        "cfg_scale": first.guidance,
        "steps": first.steps,
        "batch_size": body.batch_size,
        "sd_model_name": first.model,
        "denoising_strength": first.strength,
        "infotexts": [write_a1111(request, SOFTWARE) for request in requests],
        "job_timestamp": _stamp(done.created),
        "remarks": list(done.remarks),
        "ignored": list(body._ignored),
    }


def drawings(parts: Service, who: Who) -> list[Job]:
    """The caller's active jobs of this API: running ones first, then by age."""
    jobs = [job for job in parts.store.active() if job.note == NOTE and job.key == who.name]
    return sorted(jobs, key=lambda job: (job.state != "running", job.created))


async def preview(parts: Service, job: Job) -> str | None:
    """The last preview of a job, as base64."""
    async with aclosing(parts.jobs.follow(job.id)) as happenings:
        async for happening in happenings:
            if happening.name != "picture":
                return (happening.data.get("preview") or "").partition(",")[2] or None
    return None


def _read(parts: Service, picture: schema.Picture) -> str:
    """A picture's file as base64. Call it in a thread."""
    stored = parts.store.picture(picture.id)
    assert stored is not None
    return base64.b64encode((parts.store.pictures / stored.file).read_bytes()).decode()


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))
