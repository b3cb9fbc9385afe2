"""OpenAI's images API: generations and edits, answered whole or as events. Its clients work here as they are."""

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
from inkstream.serve.api.gallery import FOREVER, find_picture
from inkstream.serve.api.native import Token
from inkstream.serve.api.service import EVENT_STREAM, Parts, Service, Who
from inkstream.serve.engines.models import choose, spec_of
from inkstream.serve.errors import KINDS, Refused, answers, explain_invalid
from inkstream.serve.queue.inputs import PREFIX
from inkstream.serve.queue.store import Job, Picture
from inkstream.types import InputError, Request, Spec

router = APIRouter(tags=["openai"])

Format = Literal["png", "jpeg", "webp"]
Kind = Literal["image_generation", "image_edit"]
QUALITY = 95
"""Of a JPEG or WebP where no compression is asked for."""
IMAGES = 16
"""Pictures that one edit may bring, as OpenAI has it."""
NAMES = re.compile(r"(dall-e|gpt-image|chatgpt-image)-[\w.-]{1,100}", re.ASCII)
"""OpenAI's names of models, which programs send unasked."""
EFFORT = {"low": 0.5, "high": 1.5, "hd": 1.5}
"""A quality -> times the model's own steps. The others are its own steps."""


class Asked(BaseModel):
    """What OpenAI's API asks of either route, as far as there is something here that can do it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(min_length=1, description="What to draw, in plain words.")
    model: str | None = Field(None, max_length=200, description="One of /v1/models; the first when left out.")
    n: int | None = Field(None, ge=1, le=10, description="How many pictures.")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="WIDTHxHEIGHT, both multiples of 16, or auto: the model's own, or that of the picture edited.",
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        None,
        description="low is half the model's own steps, high and hd half as many again; no effect where they are few.",
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Without effect.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Always opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Nothing is moderated here.")
    output_format: Format | None = Field(None, description="png when left out.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of a JPEG or WebP.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="When left out b64_json, and url for the names dall-e-2 and dall-e-3, as OpenAI has it."
    )
    stream: bool | None = Field(None, description="Answer with events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Small pictures sent meanwhile; with stream.")
    user: str | None = Field(None, max_length=1000, description="Kept with the job as its note.")

    _ignored: dict[str, str] = PrivateAttr(default_factory=dict)  # what was given without effect -> why

    @property
    def format(self) -> Format:
        return self.output_format or "png"


TRANSLATED = ("prompt", "model", "width", "height", "count", *PICTURE_FIELDS)
"""Fields of a Request that OpenAI has its own words for."""
OWN = {name: (field.annotation, field) for name, field in Request.model_fields.items() if name not in TRANSLATED}
BODY = create_model("ImageBody", __base__=Asked, **OWN)  # type: ignore[call-overload]
"""Asked, and beside it every other field of a Request under its own name."""
INSTEAD = {
    "width": "size",
    "height": "size",
    "count": "n",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "guidance",
    "input_fidelity": "strength",
    "safety_identifier": "user",
    "reference": "image",
}
"""Names that other servers and tools have for what is known here by another."""
PARAMS = {"width": "size", "height": "size", "count": "n"}
"""What the queue calls a field -> what it is called here."""


class Source(BaseModel):
    """A picture of an edit that is sent as JSON: a data URL, or the id of an upload."""

    model_config = ConfigDict(extra="forbid")

    image_url: str | None = None
    file_id: str | None = Field(None, max_length=64)


class Sources(BaseModel):
    """The pictures of an edit that is sent as JSON."""

    images: list[Source] = Field(min_length=1, max_length=IMAGES)
    mask: Source | None = None


class Drawn(BaseModel):
    """One picture of the answer."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="Readable without a key for an hour.")
    revised_prompt: str | None = Field(default=None, description="The prompt as the model wrote it out, where it did.")
    inkstream: schema.Picture


class Remarks(BaseModel):
    """What is ours in an answer."""

    job: str
    remarks: list[str] = Field(description="What of the request has no effect, or not a good one.")


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
        "description": "The pictures; with `stream` server-sent events.",
        "content": EVENT_STREAM,
        "headers": {
            "Inkstream-Model": {"schema": {"type": "string"}, "description": "The model that draws."},
            "Inkstream-Ignored": {
                "schema": {"type": "string"},
                "description": "Fields that were given and have no effect, with commas between.",
            },
        },
    },
    **answers(400, 404, 409, 429, 500, 503),
}
SCHEMA = BODY.model_json_schema()
URL = {"type": "object", "properties": {"image_url": {"type": "string"}, "file_id": {"type": "string"}}}
BINARY = {"type": "string", "format": "binary"}


def _several(kind: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": kind, "minItems": 1, "maxItems": IMAGES}


def _body(kind: str, required: str | None = None, **pictures: Any) -> dict[str, Any]:
    """What the OpenAPI document says of a body of one media type."""
    names = SCHEMA["required"] + ([required] if required else [])
    return {kind: {"schema": {**SCHEMA, "properties": SCHEMA["properties"] | pictures, "required": names}}}


JSON = "application/json"
GENERATION = {"requestBody": {"required": True, "content": _body(JSON)}}
EDIT = {
    "requestBody": {
        "required": True,
        "content": {
            **_body("multipart/form-data", "image", image=_several(BINARY), mask=BINARY),
            **_body(JSON, "images", images=_several(URL), mask=URL),
        },
    }
}


@router.post("/v1/images/generations", responses=ANSWERS, openapi_extra=GENERATION, response_model=None)
async def generate_images(parts: Parts, who: Who, http: HTTPRequest, token: Token = None) -> Response:
    """Draw pictures of a prompt. Leaving before the answer cancels the drawing."""
    asked = settle(parts, understand(await read_json(http)))
    return await draw(parts, who, http, asked, to_request(asked), "image_generation", token)


@router.post("/v1/images/edits", responses=ANSWERS, openapi_extra=EDIT, response_model=None)
async def edit_images(parts: Parts, who: Who, http: HTTPRequest, token: Token = None) -> Response:
    """Draw from pictures.

    With a mask the first is repainted where the mask is clear, or white where it is opaque. Without one, a model that
    takes references looks at all; to another, or beside `strength`, the first is what it starts from.
    """
    if http.headers.get("content-type", "").startswith("multipart/form-data"):
        async with http.form(max_files=IMAGES + 1, max_fields=100) as form:
            fields, images, masks = read_form(form.multi_items())
            asked = settle(parts, understand(fields))
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
    responses={200: {"content": {f"image/{kind}": {"schema": BINARY} for kind in ("jpeg", "png", "webp")}}}
    | answers(400, 404),
    response_class=Response,
)
async def get_image(
    parts: Parts,
    who: Who,
    id: Annotated[str, Path(max_length=64, description="The picture's id.")],
    output_format: Format,
    output_compression: Annotated[int, Query(ge=0, le=100)] = QUALITY,
) -> Response:
    """A picture in the format that `url` was asked for in."""
    data = await encode(parts, find_picture(parts, who, id), output_format, output_compression)
    return Response(data, media_type=f"image/{output_format}", headers={"Cache-Control": FOREVER})


# Asking -------------------------------------------------------------------------------------------------------------


async def read_json(http: HTTPRequest) -> dict[str, Any]:
    """The body, which must be a JSON object."""
    try:
        fields = from_json(await http.body())  # which knows half a surrogate pair from text, as json does not
    except ValueError:
        raise Refused(400, "the body is not JSON: send one JSON object", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is JSON, but no object: send one JSON object", code="invalid_json")
    return fields


def read_form(items: list[tuple[str, Any]]) -> tuple[dict[str, str], list[UploadFile], list[UploadFile]]:
    """The fields of a form, its pictures, its masks. Refused where one is what it cannot be."""
    fields: dict[str, str] = {}
    files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
    for name, value in items:
        kind = name.removesuffix("[]")
        if kind in files:
            if not isinstance(value, UploadFile):
                raise Refused(400, f"{kind} is text: send it as a file", param=kind)
            files[kind].append(value)
        elif isinstance(value, UploadFile):
            raise Refused(400, f"{name[:200]} is no field for a file: send pictures as image", param=name[:200])
        elif name in fields:
            raise Refused(400, f"{name[:200]} is given twice: give it once", param=name[:200])
        else:
            fields[name] = value
    if not files["image"]:
        raise Refused(400, "image is missing: send the picture to edit as a file", param="image")
    if len(files["mask"]) > 1:
        raise Refused(400, "mask is given twice: one mask goes with the first picture", param="mask")
    return fields, files["image"], files["mask"]


async def keep(parts: Service, who: Who, file: UploadFile, param: str) -> str:
    """A picture of a form, kept, as a request names it."""
    data = await file.read()
    upload = await parts.examine(who, data, param)
    parts.store.add_upload(upload, data)
    return PREFIX + upload.id


def read_source(source: Source, param: str) -> str:
    """A picture of a JSON body, as a request names it."""
    if (source.image_url is None) == (source.file_id is None):
        raise Refused(400, f"{param} needs either image_url or file_id: give one of them", param=param)
    return PREFIX + source.file_id if source.file_id is not None else source.image_url or ""


def understand_sources(fields: Mapping[str, Any]) -> Sources:
    try:
        return Sources.model_validate(fields)
    except ValidationError as error:
        raise explain_invalid(error) from None


def understand(fields: Mapping[str, Any]) -> Asked:
    """What is asked. Refused, with its name, for any field that is not known or does not fit."""
    for name in INSTEAD.keys() & fields.keys():
        raise Refused(400, f"{name} is not a field that is known here: give {INSTEAD[name]} instead", param=name)
    if fields.get("background") == "transparent":
        message = "background transparent is not drawn here: every picture is opaque, so leave it out"
        raise Refused(400, message, param="background")
    try:
        asked = BODY.model_validate(fields)
    except ValidationError as error:
        raise explain_invalid(error) from None
    if asked.output_compression not in (None, 100) and asked.format == "png":
        raise Refused(
            400, "output_compression has no meaning for png: give output_format jpeg or webp",
            param="output_compression",
        )  # fmt: skip
    if asked.partial_images and not asked.stream:
        raise Refused(400, "partial_images come as events: give stream as well", param="partial_images")
    if asked.stream and asked.response_format == "url":
        raise Refused(400, "events carry the picture itself: leave response_format out", param="response_format")
    return asked


def settle(parts: Service, asked: Asked) -> Asked:
    """The same in words that are meant here: an offered model, steps for a quality; and what has no effect, noted.

    Refused where the name of the model means none.
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
    asked._ignored = ignored
    return asked


def find_model(parts: Service, name: str | None) -> str | None:
    """The model that a name means: what it is an alias of, or the only one there is for a name of OpenAI's.

    None is the first. Refused for a name of OpenAI's that means none.
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
    """What the model is that is asked for. Refused with 503 until the engine has said it."""
    return spec_of(choose(parts.models, to_request(asked))[1])


def to_request(asked: Asked, **pictures: Any) -> Request:
    """The Request that does it, with the pictures of an edit under the names they have in one."""
    fields = {name: getattr(asked, name) for name in asked.model_fields_set & OWN.keys()} | pictures
    if asked.model is not None:
        fields["model"] = asked.model
    if asked.n is not None:
        fields["count"] = asked.n
    if asked.size not in (None, "auto"):
        fields["width"], fields["height"] = map(int, (asked.size or "").split("x"))
    try:
        return Request.model_validate({"prompt": asked.prompt, **fields})
    except ValidationError as error:
        raise _renamed(explain_invalid(error)) from None


def cast_pictures(given: list[str], mask: str | None, asked: Asked, spec: Spec) -> dict[str, Any]:
    """What each picture of an edit is to the model. Refused where there is one that it cannot be anything to."""
    takes_references = options(spec)["reference"].effect == "honours"
    starts = mask is not None or "strength" in asked.model_fields_set or not takes_references
    references = given[1:] if starts else given
    if references and not takes_references:
        raise Refused(400, f"{spec.name} starts from one picture and looks at no others: send one image", param="image")
    most = 1 if "map" in spec.abilities else 10
    if len(references) > most:
        raise Refused(400, f"{spec.name} looks at {most} of these at most: send fewer", param="image")
    return ({"image": given[0]} if starts else {}) | ({"mask": mask} if mask is not None else {}) | (
        {"reference": references} if references else {}
    )  # fmt: skip


def _renamed(refusal: Refused) -> Refused:
    """The same about the field's name here."""
    refusal.param = PARAMS.get(refusal.param or "", refusal.param)
    return refusal


# Answering ----------------------------------------------------------------------------------------------------------


async def draw(
    parts: Service, who: Who, http: HTTPRequest, asked: Asked, request: Request, kind: Kind, token: str | None
) -> Response:
    """The answer to a request, whole or as events; it is drawn for as long as the client waits."""
    if request.count > parts.settings.limits.pictures:
        most = parts.settings.limits.pictures
        raise Refused(400, f"n {request.count} is more than one request may have here: at most {most}", param="n")
    try:
        request = await parts.take_pictures(who, request)
        job = parts.jobs.submit(who, request, note=asked.user or "", token=token, waited=True)
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
    """A picture as it was asked for: in the answer, or behind an address."""
    drawn = Drawn(inkstream=picture, revised_prompt=None if picture.prompt == asked.prompt else picture.prompt)
    if asked.response_format != "url":
        drawn.b64_json = await fetch(parts, asked, picture.id)
        return drawn
    drawn.url = str(http.base_url).rstrip("/") + parts.jobs.signed(f"/v1/images/{picture.id}/file.{asked.format}")
    drawn.url += f"&output_compression={_quality(asked)}"
    return drawn


async def stream(parts: Service, job: Job, asked: Asked, kind: Kind) -> AsyncIterator[bytes]:
    """A job as OpenAI's events: previews on the way, each picture when it is done."""
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
    """The steps after which a partial picture is sent: evenly spread, before the last; fewer where steps are few."""
    return sorted({round(steps * place / (count + 1)) for place in range(1, count + 1)} - {0, steps})


def failure(job: schema.Job) -> Refused:
    """The answer that tells of a job that gave no pictures."""
    if job.error is None:
        return Refused(409, "the job was cancelled by somebody else", code="cancelled")
    status = 400 if job.error.type == KINDS[400] else 500
    return Refused(status, job.error.message, param=job.error.param, code=job.error.code)


def _event(name: str, asked: Asked, size: str, facts: Mapping[str, Any]) -> bytes:
    same = {"created_at": int(time.time()), "size": size, "quality": "auto", "background": "opaque"}
    return _line(name, {**same, "output_format": asked.format, **facts})


def _line(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


# Files --------------------------------------------------------------------------------------------------------------


async def fetch(parts: Service, asked: Asked, identity: str) -> str:
    """A picture just drawn, in the format asked for, as base64."""
    picture = parts.store.picture(identity)
    assert picture is not None
    return base64.b64encode(await encode(parts, picture, asked.format, _quality(asked))).decode()


async def encode(parts: Service, picture: Picture, output_format: Format, quality: int) -> bytes:
    """A picture's file, or its pixels and its metadata in another format. Refused where somebody took it away."""
    model = parts.models.get(picture.model)
    path = parts.store.pictures / picture.file

    def work() -> bytes:
        data = path.read_bytes()
        if output_format == "png":
            return data
        fields = {name: value for name, value in picture.request.items() if name not in PICTURE_FIELDS}
        request, kind = Request.model_validate(fields), picture_format(output_format)
        spec = None if model is None else model.spec
        with Image.open(io.BytesIO(data)) as image:
            try:
                return encode_picture(image, kind, request, spec, max(1, quality))
            except InputError:  # a JPEG's metadata has little room
                return encode_picture(image, kind, request, spec, max(1, quality), metadata="minimal")

    try:
        return await to_thread.run_sync(work)
    except FileNotFoundError:
        raise Refused(404, "the file is not there any more: somebody removed it from the server's folder") from None


def reencode(preview: str, output_format: Format) -> tuple[str, str]:
    """A preview's size, and itself in another format as base64. For threads."""
    with Image.open(io.BytesIO(base64.b64decode(preview.partition(",")[2]))) as image:
        buffer = io.BytesIO()
        image.save(buffer, picture_format(output_format))
        return f"{image.width}x{image.height}", base64.b64encode(buffer.getvalue()).decode()


def _quality(asked: Asked) -> int:
    return QUALITY if asked.output_compression is None else asked.output_compression
