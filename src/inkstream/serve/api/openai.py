"""OpenAI's images API: generations and edits, with one answer or a stream of events. Its clients work unchanged."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, create_model
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from inkstream.engine.drawing.options import FEW, options
from inkstream.engine.pictures.metadata import PICTURE_FIELDS, encode_picture, picture_format
from inkstream.serve import schema
from inkstream.serve.api.gallery import FOREVER, GONE, file_answer, find_picture
from inkstream.serve.api.native import Token
from inkstream.serve.api.service import EVENT_STREAM, Parts, Service, Who
from inkstream.serve.engines.models import choose, spec_of
from inkstream.serve.errors import KINDS, Refused, answers, explain_invalid
from inkstream.serve.queue.inputs import PREFIX
from inkstream.serve.queue.store import Job, Picture
from inkstream.types import InputError, Request, Saving, Spec

router = APIRouter(tags=["openai"])

Format = Literal["png", "jpeg", "webp"]
Kind = Literal["image_generation", "image_edit"]
QUALITY = 95
"""Quality of a JPEG or WebP without `output_compression`."""
IMAGES = 16
"""Most pictures in one edit, as in OpenAI's API."""
NAMES = re.compile(r"(dall-e|gpt-image|chatgpt-image)-[\w.-]{1,100}", re.ASCII)
"""OpenAI's model names. Many programs send one without being told to."""
EFFORT = {"low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 3.0}
"""Quality -> factor for the model's default number of steps. All other qualities use the default."""


class Named(BaseModel):
    """One LoRA in vLLM-Omni's form."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=500, description="One of /v1/loras.")
    scale: float = Field(1.0, ge=-10, le=10, description="The strength.")


class Asked(BaseModel):
    """The fields of both routes of OpenAI's API, as far as this server supports them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, max_length=200, description="One of /v1/models. The default is the first of them.")
    n: int | None = Field(None, ge=1, le=10, description="Number of pictures.")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="WIDTHxHEIGHT, both multiples of 16, or auto: the model's default size, or the edited picture's.",
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None,
        description="low: half of the model's default steps; high, hd: 1.5 times; xhigh: 2 times; max: 3 times. No "
        "effect if they are few.",
    )
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="No effect: see quality.")
    style: Literal["vivid", "natural"] | None = Field(None, description="No effect.")
    background: Literal["auto", "opaque"] | None = Field(None, description="All pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="No effect: there is no moderation.")
    output_format: Format | None = Field(None, description="The default is png.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of a JPEG or WebP.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="The default is b64_json, but url for the models dall-e-2 and dall-e-3, as in OpenAI's API."
    )
    stream: bool | None = Field(None, description="Answer with a stream of events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Number of previews in the stream.")
    user: str | None = Field(None, max_length=1000, description="Stored as the job's note.")
    safety_identifier: str | None = Field(
        None, max_length=1000, description="Stored as the job's note, if there is no user."
    )
    lora: Named | None = Field(None, description="vLLM-Omni's form of `loras` for one LoRA.")

    _ignored: dict[str, str] = PrivateAttr(default_factory=dict)  # given field without effect -> reason

    @property
    def format(self) -> Format:
        return self.output_format or "png"


TRANSLATED = ("prompt", "model", "width", "height", "count", *PICTURE_FIELDS)
"""Fields of a Request that have other names in OpenAI's API."""
OWN = {name: (field.annotation, field) for name, field in Request.model_fields.items() if name not in TRANSLATED}
BODY = create_model("ImageBody", __base__=Asked, **OWN)  # type: ignore[call-overload]
"""Asked, plus all other fields of a Request under their own names."""
INSTEAD = {
    "width": "size",
    "height": "size",
    "count": "n",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "guidance",
    "input_fidelity": "strength",
    "reference": "image",
}
"""Field name of other servers and tools -> the name in this API."""
REFUSED = {
    "frame_count": "animations are not drawn here",
    "frame_duration_ms": "animations are not drawn here",
    "svg": "pictures are made of pixels here",
    "markup": "marks on a picture are not read here; a mask says what to repaint",
}
"""Field of OpenAI's API that this server refuses -> why. Ignored, it would give a picture that nobody asked for."""
FORMATS = {"gif": "animations are not drawn here", "svg": "pictures are made of pixels here"}
"""Output format of OpenAI's API that is refused -> why."""
PARAMS = {"width": "size", "height": "size", "count": "n"}
"""Field of a Request -> its name in this API, for error messages."""


class Source(BaseModel):
    """A picture of an edit in a JSON body: a data URL, or the id of an upload."""

    model_config = ConfigDict(extra="forbid")

    image_url: str | None = None
    file_id: str | None = Field(None, max_length=64)


class Sources(BaseModel):
    """The pictures of an edit in a JSON body."""

    images: list[Source] = Field(min_length=1, max_length=IMAGES)
    mask: Source | None = None


class Drawn(BaseModel):
    """One picture of the answer."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="Readable without a key for an hour.")
    revised_prompt: str | None = Field(default=None, description="The prompt that the model read, if it differs.")
    inkstream: schema.Picture


class Remarks(BaseModel):
    """Our additions to an answer."""

    job: str
    remarks: list[str] = Field(description="Fields of the request that have no effect or a poor one.")


class Images(BaseModel):
    """The answer to a generation or an edit."""

    created: int
    data: list[Drawn]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    inkstream: Remarks


ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Images,
        "description": "The pictures, or server-sent events with `stream`.",
        "content": EVENT_STREAM,
        "headers": {
            "Inkstream-Model": {"schema": {"type": "string"}, "description": "The model that draws."},
            "Inkstream-Ignored": {
                "schema": {"type": "string"},
                "description": "Given fields that have no effect, comma-separated.",
            },
        },
    },
    **answers(400, 404, 409, 429, 500, 503),
}
SCHEMA = BODY.model_json_schema()
SCHEMA["properties"]["lora"]["anyOf"] = [
    SCHEMA.pop("$defs")["Named"],
    {"type": "null"},
]  # no reference, as it is a part
URL = {"type": "object", "properties": {"image_url": {"type": "string"}, "file_id": {"type": "string"}}}
BINARY = {"type": "string", "format": "binary"}
TEXTS = {name: {"type": "string", "contentMediaType": "application/json"} for name in ("loras", "lora")}
"""Fields of a form that are JSON in a text, because a form has no lists and no objects."""


def _several(kind: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": kind, "minItems": 1, "maxItems": IMAGES}


def _body(kind: str, required: str | None = None, **pictures: Any) -> dict[str, Any]:
    """OpenAPI content of a request body. kind: its media type; required: one more required field."""
    names = SCHEMA["required"] + ([required] if required else [])
    return {kind: {"schema": {**SCHEMA, "properties": SCHEMA["properties"] | pictures, "required": names}}}


JSON = "application/json"
GENERATION = {"requestBody": {"required": True, "content": _body(JSON)}}
EDIT = {
    "requestBody": {
        "required": True,
        "content": {
            **_body("multipart/form-data", "image", image=_several(BINARY), mask=BINARY, **TEXTS),
            **_body(JSON, "images", images=_several(URL), mask=URL),
        },
    }
}


@router.post("/v1/images/generations", responses=ANSWERS, openapi_extra=GENERATION, response_model=None)
async def generate_images(parts: Parts, who: Who, http: HTTPRequest, token: Token = None) -> Response:
    """Draw pictures from a prompt. If the client disconnects before the answer, the job is cancelled."""
    asked = settle(parts, understand(await read_json(http)))
    return await draw(parts, who, http, asked, to_request(asked), "image_generation", token)


@router.post("/v1/images/edits", responses=ANSWERS, openapi_extra=EDIT, response_model=None)
async def edit_images(parts: Parts, who: Who, http: HTTPRequest, token: Token = None) -> Response:
    """Draw from pictures.

    With a mask, the first picture is repainted where the mask is transparent, or white if the mask is opaque. Without a
    mask, a model that supports references uses all pictures as references. Another model, or any model with
    `strength`, starts from the first picture.
    """
    if http.headers.get("content-type", "").startswith("multipart/form-data"):
        async with http.form(max_files=IMAGES + 1, max_fields=100) as form:
            fields, images, masks = read_form(form.multi_items())
            asked = settle(parts, understand(parse_texts(fields)))
            taken = {name: [await keep(parts, who, file, name) for file in files]
                     for name, files in (("image", images), ("mask", masks))}  # fmt: skip
        given, mask = taken["image"], next(iter(taken["mask"]), None)
    else:
        fields = await read_json(http)
        sources = understand_sources({name: fields.pop(name) for name in ("images", "mask") if name in fields})
        asked = settle(parts, understand(fields))
        given = [read_source(source, f"images.{place}") for place, source in enumerate(sources.images)]
        mask = None if sources.mask is None else read_source(sources.mask, "mask")
    roles = cast_pictures(given, mask, asked, find_spec(parts, asked))
    return await draw(parts, who, http, asked, to_request(asked, **roles), "image_edit", token)


@router.get(
    "/v1/images/{id}/file.{output_format}",
    responses=file_answer("image/jpeg", "image/png", "image/webp") | answers(400, 404),
    response_class=Response,
)
async def get_image(
    parts: Parts,
    who: Who,
    id: Annotated[str, Path(max_length=64, description="The picture's id.")],
    output_format: Format,
    output_compression: Annotated[int, Query(ge=0, le=100)] = QUALITY,
) -> Response:
    """A picture in the requested format. `url` in an answer points here."""
    data = await encode(parts, find_picture(parts, who, id), output_format, output_compression)
    return Response(data, media_type=f"image/{output_format}", headers={"Cache-Control": FOREVER})


# Reading requests ---------------------------------------------------------------------------------------------------


async def read_json(http: HTTPRequest) -> dict[str, Any]:
    """The JSON object in the body. Raises Refused if the body is anything else."""
    try:
        fields = from_json(await http.body())  # unlike json, it refuses half a surrogate pair
    except ValueError:
        raise Refused(400, "the body is not JSON: send one JSON object", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is JSON, but not an object: send one JSON object", code="invalid_json")
    return fields


def read_form(items: list[tuple[str, Any]]) -> tuple[dict[str, str], list[UploadFile], list[UploadFile]]:
    """The fields, the pictures and the masks of a form. Raises Refused if one has the wrong kind or is given twice."""
    fields: dict[str, str] = {}
    files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
    for name, value in items:
        kind = name.removesuffix("[]")
        if kind in files:
            if not isinstance(value, UploadFile):
                raise Refused(400, f"{kind} is text: send it as a file", param=kind)
            files[kind].append(value)
        elif isinstance(value, UploadFile):
            raise Refused(400, f"{name[:200]} is not a file field: send pictures as image", param=name[:200])
        elif name in fields:
            raise Refused(400, f"{name[:200]} is given twice: give it once", param=name[:200])
        else:
            fields[name] = value
    if not files["image"]:
        raise Refused(400, "image is missing: send the picture to edit as a file", param="image")
    if len(files["mask"]) > 1:
        raise Refused(400, "mask is given twice: send one mask, for the first picture", param="mask")
    return fields, files["image"], files["mask"]


def parse_texts(fields: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a form with the values of `loras` and `lora`, which are JSON. Raises Refused if one is not JSON."""
    parsed: dict[str, Any] = dict(fields)
    for name in TEXTS:
        if name in fields:
            try:
                parsed[name] = from_json(fields[name])
            except ValueError:
                line = f'{name} is not JSON: write it as in a JSON body, such as ["NAME:0.8"] for loras'
                raise Refused(400, line, param=name) from None
    return parsed


async def keep(parts: Service, who: Who, file: UploadFile, param: str) -> str:
    """Store a picture of a form, and return it as `upload:ID`."""
    data = await file.read()
    upload = await parts.examine(who, data, param)
    parts.store.add_upload(upload, data)
    return PREFIX + upload.id


def read_source(source: Source, param: str) -> str:
    """A picture of a JSON body, as `upload:ID` or as the given URL."""
    if (source.image_url is None) == (source.file_id is None):
        raise Refused(400, f"{param} needs either image_url or file_id: give one of them", param=param)
    return PREFIX + source.file_id if source.file_id is not None else source.image_url or ""


def understand_sources(fields: Mapping[str, Any]) -> Sources:
    """Validate the pictures of a JSON body. Raises Refused if one is not valid."""
    try:
        return Sources.model_validate(fields)
    except ValidationError as error:
        raise explain_invalid(error) from None


def understand(fields: Mapping[str, Any]) -> Asked:
    """Validate the fields of a body. Raises Refused, with the field's name, for an unknown field or a wrong value."""
    for name in INSTEAD.keys() & fields.keys():
        raise Refused(400, f"{name} is not a known field: give {INSTEAD[name]} instead", param=name)
    for name in REFUSED.keys() & fields.keys():
        raise Refused(400, f"{name} is not supported, {REFUSED[name]}: leave it out", param=name)
    if isinstance(kind := fields.get("output_format"), str) and kind in FORMATS:
        message = f"output_format {kind} is not supported, {FORMATS[kind]}: take png, jpeg or webp"
        raise Refused(400, message, param="output_format")
    if fields.get("background") == "transparent":
        message = "background transparent is not supported, every picture is opaque: leave it out"
        raise Refused(400, message, param="background")
    if fields.get("lora") is not None and fields.get("loras"):
        raise Refused(400, "lora and loras are given both: give all LoRAs in loras", param="lora")
    try:
        asked = BODY.model_validate(fields)
    except ValidationError as error:
        raise explain_invalid(error) from None
    if asked.output_compression not in (None, 100) and asked.format == "png":
        raise Refused(
            400, "output_compression has no effect on png: give output_format jpeg or webp",
            param="output_compression",
        )  # fmt: skip
    if asked.partial_images and not asked.stream:
        raise Refused(400, "partial_images needs a stream of events: give stream as well", param="partial_images")
    if asked.stream and asked.response_format == "url":
        raise Refused(400, "events contain the picture itself: leave response_format out", param="response_format")
    return asked


def settle(parts: Service, asked: Asked) -> Asked:
    """Replace OpenAI's names with ours: an offered model for `model`, `steps` for `quality`.

    Fields without effect are noted in `_ignored`. Raises Refused if `model` does not mean an offered model.
    """
    changes: dict[str, Any] = {"model": find_model(parts, asked.model)}
    ignored: dict[str, str] = {}
    if asked.response_format is None and not asked.stream and asked.model in ("dall-e-2", "dall-e-3"):
        changes["response_format"] = "url"
    asked, effort = asked.model_copy(update=changes), EFFORT.get(asked.quality or "")
    if effort is not None:
        spec = find_spec(parts, asked)
        if getattr(asked, "steps", None) is not None:
            ignored["quality"] = f"quality {asked.quality} has no effect: steps were given"
        elif spec.steps <= FEW:
            ignored["quality"] = f"quality {asked.quality} has no effect: {spec.name} draws in {spec.steps} steps"
        else:
            most = parts.settings.limits.steps
            asked = asked.model_copy(update={"steps": min(most, round(spec.steps * effort))})
    if asked.style is not None:
        ignored["style"] = f"style {asked.style} has no effect: say it in the prompt"
    if asked.complexity is not None:
        ignored["complexity"] = f"complexity {asked.complexity} has no effect: give quality or steps"
    asked._ignored = ignored
    return asked


def find_model(parts: Service, name: str | None) -> str | None:
    """The model that a name means: an alias means its model, and OpenAI's names mean the only model, if there is one.

    Another name is returned as it is, and no name as None, which is the first model. Raises Refused for one of OpenAI's
    names without a meaning.
    """
    if not name or name in parts.models or not (name in parts.aliases or NAMES.fullmatch(name)):
        return name or None
    if name in parts.aliases:
        return parts.aliases[name]
    if len(parts.models) == 1 and not parts.settings.strict:
        return next(iter(parts.models))
    known = ", ".join(parts.models)
    message = f"model {name} is not offered: take {known}, or start the server with --alias {name}=MODEL"
    raise Refused(404, message, param="model", code="model_not_found")


def find_spec(parts: Service, asked: Asked) -> Spec:
    """The Spec of the requested model. Raises Refused with 503 until the engine has described the model."""
    return spec_of(choose(parts.models, to_request(asked))[1])


def to_request(asked: Asked, **pictures: Any) -> Request:
    """The Request for a body. pictures: field of a Request -> pictures of an edit."""
    fields = {name: getattr(asked, name) for name in asked.model_fields_set & OWN.keys()} | pictures
    if asked.model is not None:
        fields["model"] = asked.model
    if asked.n is not None:
        fields["count"] = asked.n
    if asked.lora is not None:
        fields["loras"] = [{"path": asked.lora.name, "strength": asked.lora.scale}]
    if asked.size not in (None, "auto"):
        fields["width"], fields["height"] = map(int, (asked.size or "").split("x"))
    try:
        return Request.model_validate({"prompt": asked.prompt, **fields})
    except ValidationError as error:
        raise _renamed(explain_invalid(error)) from None


def cast_pictures(given: list[str], mask: str | None, asked: Asked, spec: Spec) -> dict[str, Any]:
    """Field of a Request (`image`, `mask`, `reference`) -> pictures of an edit.

    Raises Refused if the model cannot use all pictures.
    """
    takes_references = options(spec)["reference"].effect == "honours"
    starts = mask is not None or "strength" in asked.model_fields_set or not takes_references
    references = given[1:] if starts else given
    if references and not takes_references:
        raise Refused(400, f"{spec.name} uses one picture as its start and no others: send one image", param="image")
    most = 1 if "map" in spec.abilities else 10
    if len(references) > most:
        raise Refused(400, f"{spec.name} takes at most {most} references: send fewer images", param="image")
    return ({"image": given[0]} if starts else {}) | ({"mask": mask} if mask is not None else {}) | (
        {"reference": references} if references else {}
    )  # fmt: skip


def _renamed(refusal: Refused) -> Refused:
    """The refusal with the field's name in this API."""
    refusal.param = PARAMS.get(refusal.param or "", refusal.param)
    return refusal


# Answers ------------------------------------------------------------------------------------------------------------


async def draw(
    parts: Service, who: Who, http: HTTPRequest, asked: Asked, request: Request, kind: Kind, token: str | None
) -> Response:
    """Draw a request and answer, at once or as events. If the client disconnects, the job is cancelled."""
    if request.count > parts.settings.limits.pictures:
        most = parts.settings.limits.pictures
        raise Refused(400, f"n {request.count} is too many for one request: take at most {most}", param="n")
    try:
        request = await parts.take_pictures(who, request)
        job = parts.jobs.submit(
            who, request, note=asked.user or asked.safety_identifier or "", token=token, waited=True
        )
    except Refused as refusal:
        raise _renamed(refusal) from None
    headers = {"Inkstream-Model": job.model}
    if asked._ignored:
        headers["Inkstream-Ignored"] = ", ".join(asked._ignored)
    if asked.stream:
        headers |= {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(parts, job, asked, kind), media_type="text/event-stream", headers=headers)
    done = await parts.jobs.run(http, job)
    if done.state != "succeeded":
        raise failure(done)
    images = Images(
        created=int(done.created),
        data=[await present(parts, http, asked, picture) for picture in done.pictures],
        output_format=asked.format,
        size=f"{done.pictures[0].width}x{done.pictures[0].height}",
        inkstream=Remarks(job=done.id, remarks=[*done.remarks, *asked._ignored.values()]),
    )
    return JSONResponse(images.model_dump(mode="json", exclude_none=True), headers=headers)


async def present(parts: Service, http: HTTPRequest, asked: Asked, picture: schema.Picture) -> Drawn:
    """A picture of the answer, as base64 or as a signed URL."""
    drawn = Drawn(inkstream=picture, revised_prompt=None if picture.prompt == asked.prompt else picture.prompt)
    if asked.response_format != "url":
        drawn.b64_json = await fetch(parts, asked, picture.id)
        return drawn
    drawn.url = str(http.base_url).rstrip("/") + parts.jobs.signed(f"/v1/images/{picture.id}/file.{asked.format}")
    drawn.url += f"&output_compression={_quality(asked)}"
    return drawn


async def stream(parts: Service, job: Job, asked: Asked, kind: Kind) -> AsyncIterator[bytes]:
    """Yield a job as OpenAI's events: previews during the drawing, and each finished picture."""
    async with aclosing(parts.jobs.draw(job)) as happenings:
        async for happening in happenings:
            data = happening.data
            if happening.name == "ping":
                yield b": ping\n\n"
            elif happening.name == "step" and data["preview"] is not None:
                marks = partial_steps(data["steps"], asked.partial_images or 0)
                if data["step"] in marks:
                    size, content = await to_thread.run_sync(reencode, data["preview"], asked.format)
                    facts = {"partial_image_index": marks.index(data["step"]), "b64_json": content}
                    yield _event(f"{kind}.partial_image", asked, size, facts)
            elif happening.name == "picture":
                picture = schema.Picture.model_validate(data)
                facts = {"b64_json": await fetch(parts, asked, picture.id), "usage": None}
                own = {"inkstream": picture.model_dump(mode="json")}
                yield _event(f"{kind}.completed", asked, f"{picture.width}x{picture.height}", facts | own)
            elif happening.name in ("failed", "cancelled"):
                yield _line("error", failure(schema.Job.model_validate(data)).body())
            if happening.name in schema.ENDED:
                return
    yield _line("error", Refused(503, "the server is stopping: try again in 5 s").body())


def partial_steps(steps: int, count: int) -> list[int]:
    """The steps after which a partial picture is sent: evenly spread, never the last; fewer if steps are few."""
    return sorted({round(steps * place / (count + 1)) for place in range(1, count + 1)} - {0, steps})


def failure(job: schema.Job) -> Refused:
    """The error answer for a job that failed or was cancelled."""
    if job.error is None:
        return Refused(409, "another client cancelled the job: send the request again", code="cancelled")
    status = 400 if job.error.type == KINDS[400] else 500
    return Refused(status, job.error.message, param=job.error.param, code=job.error.code)


def _event(name: str, asked: Asked, size: str, facts: Mapping[str, Any]) -> bytes:
    same = {"created_at": int(time.time()), "size": size, "quality": "auto", "background": "opaque"}
    return _line(name, {**same, "output_format": asked.format, **facts})


def _line(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


# Files --------------------------------------------------------------------------------------------------------------


async def fetch(parts: Service, asked: Asked, identity: str) -> str:
    """A finished picture in the requested format, as base64."""
    picture = parts.store.picture(identity)
    assert picture is not None
    return base64.b64encode(await encode(parts, picture, asked.format, _quality(asked))).decode()


async def encode(parts: Service, picture: Picture, output_format: Format, quality: int) -> bytes:
    """A picture's bytes in a format, with its metadata. Raises Refused if its file is missing."""
    model = parts.models.get(picture.model)
    path = parts.store.pictures / picture.file
    files, short = (Saving(amount, parts.settings.provenance) for amount in ("full", "minimal"))

    def work() -> bytes:
        data = path.read_bytes()
        if output_format == "png":
            return data
        fields = {name: value for name, value in picture.request.items() if name not in PICTURE_FIELDS}
        request, kind = Request.model_validate(fields), picture_format(output_format)
        spec = None if model is None else model.spec
        with Image.open(io.BytesIO(data)) as image:
            try:
                return encode_picture(image, kind, request, spec, max(1, quality), saving=files, marked=True)
            except InputError:  # the metadata is too long for a JPEG
                return encode_picture(image, kind, request, spec, max(1, quality), saving=short, marked=True)

    try:
        return await to_thread.run_sync(work)
    except FileNotFoundError:
        raise Refused(404, GONE) from None


def reencode(preview: str, output_format: Format) -> tuple[str, str]:
    """A preview's size, and its bytes in another format as base64. Call it in a thread."""
    with Image.open(io.BytesIO(base64.b64decode(preview.partition(",")[2]))) as image:
        buffer = io.BytesIO()
        image.save(buffer, picture_format(output_format))
        return f"{image.width}x{image.height}", base64.b64encode(buffer.getvalue()).decode()


def _quality(asked: Asked) -> int:
    return QUALITY if asked.output_compression is None else asked.output_compression
