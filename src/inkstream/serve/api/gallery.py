"""The gallery: pictures with their files and thumbnails, uploads, and requests from a picture's metadata."""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Collection
from pathlib import Path as FilePath
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse
from PIL import Image

from inkstream.disk import whole_file
from inkstream.engine.files.loras import lora_folder, names_in
from inkstream.engine.pictures.inputs import open_picture
from inkstream.engine.pictures.metadata import PICTURE_FIELDS, read_request
from inkstream.serve import schema
from inkstream.serve.api.native import Before, Limit, number_of
from inkstream.serve.api.service import Parts, Service, Who
from inkstream.serve.errors import Refused, answers
from inkstream.serve.queue.inputs import as_data
from inkstream.serve.queue.records import tell_picture
from inkstream.serve.queue.store import Picture, Search
from inkstream.types import InputError

router = APIRouter(tags=["gallery"])
log = logging.getLogger("inkstream.serve")

THUMBNAIL = 256
"""Pixels of a thumbnail's longer side."""
FOREVER = "private, max-age=31536000, immutable"
GONE = "the picture's file was removed from the server's folder: draw the picture again"
Name = Annotated[str, Path(max_length=64, description="The picture's id.")]
Match = Annotated[str | None, Header(alias="If-None-Match", max_length=1000)]
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "The client already has the file."}}


def file_answer(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI response of a route that answers with a picture's file. kinds: its possible media types."""
    return {200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}}}


@router.get("/v1/pictures", responses=answers(400))
async def search_pictures(
    parts: Parts,
    who: Who,
    q: Annotated[str, Query(max_length=500, description="Words of the prompt, the model or the seed.")] = "",
    model: Annotated[str | None, Query(max_length=200)] = None,
    seed: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
    since: Annotated[float | None, Query(allow_inf_nan=False, description="Unix seconds.")] = None,
    until: Annotated[float | None, Query(allow_inf_nan=False, description="Unix seconds.")] = None,
    favourite: bool | None = None,
    deleted: Annotated[bool, Query(description="Search the deleted pictures instead.")] = False,
    limit: Limit = 60,
    before: Before = None,
    offset: Annotated[int, Query(ge=0, lt=2**62, description="Number of pictures to skip after `before`.")] = 0,
) -> schema.Pictures:
    """Pictures, newest first."""
    wanted = Search(who.scope, q, model, seed, since, until, favourite, deleted)
    number = None if before is None else number_of(parts.store.picture(before, who.scope), before)
    pictures, total = await to_thread.run_sync(parts.store.search, wanted, number, limit, offset)
    last = pictures[-1].id if len(pictures) == limit else None
    return schema.Pictures(pictures=[tell(parts, picture) for picture in pictures], next=last, total=total)


@router.get("/v1/pictures/{id}", responses=answers(400, 404))
async def get_picture(parts: Parts, who: Who, id: Name) -> schema.Picture:
    """One picture's record."""
    return tell(parts, find_picture(parts, who, id))


@router.patch("/v1/pictures/{id}", responses=answers(400, 404, 503))
async def mark_picture(parts: Parts, who: Who, id: Name, body: schema.PicturePatch) -> schema.Picture:
    """Mark a picture as a favourite or delete it, or undo either."""
    picture = find_picture(parts, who, id)
    deleted = time.time() if body.deleted else None
    parts.store.mark(picture.id, body.favourite, deleted, undelete=body.deleted is False)
    return tell(parts, find_picture(parts, who, id))


@router.get(
    "/v1/pictures/{id}/file",
    responses=file_answer("image/png") | UNCHANGED | answers(400, 404),
    response_class=Response,
)
async def get_file(parts: Parts, who: Who, id: Name, match: Match = None) -> Any:
    """The picture's file, with the request in its metadata."""
    picture = find_picture(parts, who, id)
    return send(parts.store.pictures / picture.file, picture.type, picture.sha256, match)


@router.get(
    "/v1/pictures/{id}/thumbnail",
    responses=file_answer("image/webp") | UNCHANGED | answers(400, 404),
    response_class=Response,
)
async def get_thumbnail(parts: Parts, who: Who, id: Name, match: Match = None) -> Any:
    """The picture's thumbnail. It is made at the first request."""
    picture = find_picture(parts, who, id)
    path, tag = parts.store.thumbnail_of(picture), f"{picture.sha256}-{THUMBNAIL}"
    if not path.exists():
        source = parts.store.pictures / picture.file
        data = await to_thread.run_sync(make_thumbnail, source, path)
        if not path.exists():  # the disk is full or not writable
            return Response(data, media_type="image/webp")
    return send(path, "image/webp", tag, match)


@router.post("/v1/uploads", status_code=201, responses=answers(400, 429, 503), openapi_extra=BODY)
async def add_upload(parts: Parts, who: Who, request: Request) -> schema.Upload:
    """Store a picture, so that requests can use it as `upload:ID`. The same bytes get the same id."""
    data = await request.body()
    upload = await parts.examine(who, data)
    parts.store.add_upload(upload, data)
    return schema.Upload(id=upload.id, width=upload.width, height=upload.height, type=upload.type)


@router.get(
    "/v1/uploads/{id}", responses=file_answer("image/*") | UNCHANGED | answers(400, 404), response_class=Response
)
async def get_upload(parts: Parts, who: Who, id: Name, match: Match = None) -> Any:
    """An uploaded picture."""
    upload = parts.store.upload(id, who.scope)
    if upload is None:
        raise Refused(404, f"there is no upload {id}: upload the picture again", code="not_found")
    return send(parts.store.uploads / upload.file, upload.type, upload.id, match)


@router.post("/v1/recall", responses=answers(400, 404), openapi_extra=BODY)
async def recall(parts: Parts, who: Who, request: Request) -> schema.Recalled:
    """The request in a picture's metadata, from inkstream or another program. 404 if it has none.

    For a picture of the caller's own gallery, the request also has the pictures it was made from.
    """
    data = await request.body()
    folder = lora_folder(parts.settings.machine)
    found = await to_thread.run_sync(lambda: read_recalled(data, names_in(folder)))
    own = parts.store.with_content(hashlib.sha256(data).hexdigest(), who.scope)
    return found if own is None else schema.Recalled(request=own.request, tool=found.tool, remarks=[])


def read_recalled(data: bytes, loras: Collection[str] = ()) -> schema.Recalled:
    """The request in the metadata of a picture's bytes, without names of files. Call it in a thread.

    loras: as in `read_request`.
    """
    try:
        found = read_request(as_data(data), loras=loras)
    except InputError as error:
        text = str(error)
        status = 404 if "carries no request" in text else 400
        raise Refused(status, f"the picture {text.partition(' ')[2]}") from None
    fields = found.request.model_dump(mode="json", include=found.request.model_fields_set)
    remarks = [f"{name}: {value}" for name, value in found.ignored.items()]
    for name in PICTURE_FIELDS:
        if fields.pop(name, None):
            remarks.append(f"{name}: the metadata names a file, which is not opened; add the picture again")
    return schema.Recalled(request=fields, tool=found.source, remarks=remarks)


def tell(parts: Service, picture: Picture) -> schema.Picture:
    return tell_picture(picture, parts.store.job(picture.job))


def find_picture(parts: Service, who: Who, identity: str) -> Picture:
    """The picture with that id. Raises Refused if it does not exist or the caller may not see it.

    A signed link to a deleted picture is refused, too.
    """
    picture = parts.store.picture(identity, who.scope)
    if picture is None or (who.link and picture.deleted is not None):
        raise Refused(404, f"there is no picture {identity}: see /v1/pictures", code="not_found")
    return picture


def send(path: FilePath, kind: str, tag: str, match: str | None) -> Response:
    """The answer with a file that never changes, or 304 if the client has it. Raises Refused if the file is missing.

    tag: the file's ETag. match: the header If-None-Match.
    """
    headers = {"ETag": f'"{tag}"', "Cache-Control": FOREVER}
    if match is not None and f'"{tag}"' in match:
        return Response(status_code=304, headers=headers)
    if not path.exists():
        raise Refused(404, GONE)
    return FileResponse(path, media_type=kind, headers=headers)


def make_thumbnail(source: FilePath, path: FilePath) -> bytes:
    """Make a picture's thumbnail, write it to `path` if the disk allows it, and return its bytes.

    Raises Refused if the picture's file is missing or damaged. Call it in a thread.
    """
    if not source.exists():
        raise Refused(404, GONE)
    try:
        image = open_picture(str(source))
    except InputError:
        raise Refused(404, "the picture's file on the server is damaged: draw it again") from None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    try:
        with whole_file(path) as part:
            part.write_bytes(buffer.getvalue())
    except OSError as error:
        log.warning("a thumbnail cannot be stored", extra={"error": str(error)})
    return buffer.getvalue()
