"""Input pictures of a request: data URLs, uploads and, if allowed, downloads by URL. A path is never opened."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any

from inkstream.engine.pictures.inputs import open_header, read_source
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.serve.errors import Refused
from inkstream.serve.limits import Limits
from inkstream.serve.queue.store import TYPES, Store, Upload, upload_id
from inkstream.types import InputError, Request

PREFIX = "upload:"


def examine(data: bytes, key: str, now: float, limits: Limits, param: str | None = None) -> Upload:
    """The Upload record for a picture's bytes. Raises Refused if they are not a picture or have too many pixels.

    Call it in a thread.
    """
    try:
        image = open_header(as_data(data))
    except InputError as error:
        line = str(error).split(" ", 1)[-1] if str(error).startswith("data:") else str(error)
        raise Refused(400, f"{param or 'the picture'} {line}", param=param, code="invalid_image") from None
    width, height = image.size
    if width * height > limits.upload_pixels:
        raise Refused(
            400,
            f"{param or 'the picture'} is {width}x{height}: send at most {limits.upload_pixels >> 20} megapixels",
            param=param,
            code="invalid_image",
        )
    kind = image.format or "PNG"
    identity = upload_id(key, data)
    file = f"{identity}.{kind.lower()}"
    return Upload(identity, key, now, width, height, len(data), TYPES.get(kind, "application/octet-stream"), file)


def as_data(data: bytes) -> str:
    """Bytes as a data URL without a specific media type: readers detect the type from the content."""
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def as_url(picture: str) -> str:
    """A picture as a data URL. picture: base64, or already a data URL."""
    return picture if picture[:5].lower() == "data:" else f"data:image/png;base64,{picture}"


def pictures_in(request: Request) -> Iterator[tuple[str, int | None, str]]:
    """Each picture of a request: its field, its index (None unless the field is a list), and its value."""
    for name in PICTURE_FIELDS:
        given = getattr(request, name)
        if isinstance(given, str):
            yield name, None, given
        elif given:
            for place, one in enumerate(given):
                yield name, place, one


def decode(request: Request, fetch: Callable[[str], bytes] | None, limits: Limits) -> dict[str, tuple[bytes, str]]:
    """Pictures that a request gives as data URLs or URLs: value -> (bytes, field).

    fetch: downloads a URL; None if that is not allowed. Raises Refused for any other value, such as a path. Call it in
    a thread.
    """
    found: dict[str, tuple[bytes, str]] = {}
    for name, place, given in pictures_in(request):
        param = name if place is None else f"{name}.{place}"
        if given.startswith(PREFIX):
            continue
        if given[:5].lower() == "data:":
            try:
                found[given] = read_source(given), param
            except InputError as error:
                raise Refused(400, f"{param}: {error}", param=param, code="invalid_image") from None
        elif re.match(r"https?://", given, re.IGNORECASE):
            if fetch is None:
                raise Refused(
                    400,
                    f"{param} is a URL, and this server downloads no pictures: send a data URL or upload the picture",
                    param=param,
                )
            found[given] = fetch(given), param
        else:
            raise Refused(400, f"{param} is neither a data URL nor upload:ID: send one of them", param=param)
        if len(found[given][0]) > limits.body_bytes:
            raise Refused(400, f"{param} has more than {limits.body_bytes >> 20} MiB: scale it down first", param=param)
    return found


def keep(store: Store, request: Request, found: dict[str, tuple[bytes, Upload]], key: str | None) -> Request:
    """Store the pictures in `found`, and return the request with every picture as `upload:ID`.

    key: whose uploads the request may use; None for all. Raises Refused if an upload does not exist.
    """
    for data, upload in found.values():
        store.add_upload(upload, data)
    names: dict[str, Any] = {}
    for name, place, given in pictures_in(request):
        if given in found:
            own = PREFIX + found[given][1].id
        elif store.upload(given.removeprefix(PREFIX), key) is not None:
            own = given
        else:
            param = name if place is None else f"{name}.{place}"
            raise Refused(400, f"{param} names an unknown upload: upload it again", param=param, code="no_upload")
        names[name] = own if place is None else (*names.get(name, ()), own)
    return request.model_copy(update=names) if names else request
