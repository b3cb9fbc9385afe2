"""Control nets in the server's folder, and the maps of pictures that they follow."""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from anyio import fail_after, run_process, to_thread
from fastapi import APIRouter
from PIL import Image

from inkstream import types
from inkstream.engine.files.control_facts import read_net
from inkstream.engine.files.controls import control_folder
from inkstream.engine.files.loras import names_in
from inkstream.engine.pictures.maps import MAPS, Map, Size, check_settings, known, map_of, missing
from inkstream.serve import schema
from inkstream.serve.api.service import Parts, Service, Who
from inkstream.serve.engines.models import Offered
from inkstream.serve.errors import Refused, answers
from inkstream.serve.queue.inputs import PREFIX
from inkstream.types import InputError

router = APIRouter(tags=["controls"])

READS = {"picture": "picture", "numbers": "depth", "keypoints": "keypoints"}
"""What a map's function reads -> its name in this API."""
SECONDS = 300
"""Longest time for a map that a network draws."""


@router.get("/v1/controls", responses=answers())
async def get_controls(parts: Parts, who: Who) -> schema.ControlNets:
    """The control nets that requests can name, and what their headers say. A damaged file is listed with its error."""
    folder, models = control_folder(parts.settings.machine), parts.models

    def work() -> schema.ControlNets:
        return schema.ControlNets(data=[tell(name, file, models) for name, file in names_in(folder).items()])

    return await to_thread.run_sync(work)


@router.get("/v1/maps", responses=answers())
async def get_maps(who: Who) -> schema.Maps:
    """The kinds of maps, and their settings."""
    return schema.Maps(data=[tell_map(name, kind) for name, kind in MAPS.items()])


@router.post("/v1/maps", status_code=201, responses=answers(400, 429, 503))
async def draw_map(parts: Parts, who: Who, body: schema.MapBody) -> schema.Upload:
    """Draw the map of a picture, and store it, so that requests can use it as `upload:ID`."""
    name, size = understand(parts, body)
    if body.picture is not None:
        asked = types.Request.model_validate({"control": [body.picture]})
        try:
            given = (await parts.take_pictures(who, asked)).control[0]
        except Refused as refusal:
            refusal.message, refusal.param = refusal.message.replace("control.0", "picture"), "picture"
            raise
        upload = parts.store.upload(given.removeprefix(PREFIX))
        assert upload is not None
        source = str(parts.store.uploads / upload.file)
    else:
        source = "data:application/json;base64," + base64.b64encode(json.dumps(body.keypoints).encode()).decode()
    data = await draw_picture(parts, name, source, size, body.settings)
    own = await parts.examine(who, data)
    parts.store.add_upload(own, data)
    return schema.Upload(id=own.id, width=own.width, height=own.height, type=own.type)


def tell(name: str, file: FilePath, models: dict[str, Offered]) -> schema.ControlNet:
    """What the list says of one file. Call it in a thread."""
    size = file.stat().st_size if file.exists() else 0
    try:
        net = read_net(file)
    except InputError as error:
        return schema.ControlNet(name=name, family="", fits={}, modes=[], bytes=size, error=str(error))
    fits = {
        model.name: "control" in model.spec.abilities
        and model.spec.family == net.family
        and net.width in model.sizes.inside
        for model in models.values()
        if model.spec is not None and model.sizes is not None
    }
    return schema.ControlNet(name=name, family=net.family, fits=fits, modes=list(net.modes), bytes=size, error=None)


def tell_map(name: str, kind: Map) -> schema.Map:
    """What the list says of one kind of map. Settings that are texts name files, so clients do not have them."""
    settings = [
        schema.MapSetting(name=key, help=one.line, default=one.default, minimum=one.least, maximum=one.most)
        for key, one in kind.settings.items()
        if one.default is not None
    ]
    reads: Any = READS[kind.reads]
    return schema.Map(name=name, help=kind.line, reads=reads, settings=settings, missing=missing(name))


def understand(parts: Service, body: schema.MapBody) -> tuple[str, Size | None]:
    """The map's name and size. Raises Refused, with the field's name, for what cannot be drawn."""
    try:
        name = known(body.map)
    except InputError as error:
        raise Refused(400, str(error), param="map") from None
    field = "keypoints" if MAPS[name].reads == "keypoints" else "picture"
    if [one for one in ("picture", "keypoints") if getattr(body, one) is not None] != [field]:
        raise Refused(400, f"map {name} is drawn from {field}: give {field} and no other source", param=field)
    if lacking := missing(name):
        raise Refused(400, lacking, param="map", code="not_installed")
    try:
        check_settings(name, body.settings)
    except InputError as error:
        raise Refused(400, str(error), param="settings") from None
    if (body.width is None) != (body.height is None):
        raise Refused(400, "width and height are given together: give both, or leave both out", param="width")
    size = None if body.width is None or body.height is None else (body.width, body.height)
    if size is not None and size[0] * size[1] > parts.settings.limits.pixels:
        raise Refused(400, f"a map of {size[0]}x{size[1]} is more than this server draws: take less", param="width")
    return name, size


async def draw_picture(
    parts: Service, name: str, source: str | Image.Image, size: Size | None, settings: Mapping[str, float]
) -> bytes:
    """A map as the bytes of a PNG. One map is drawn at a time. source: a path, a data URL or a picture.

    A map by a network is drawn in a process of its own, because the server does not import torch. Raises Refused if
    it cannot be drawn.
    """

    def work() -> bytes:
        buffer = io.BytesIO()
        try:
            map_of(name, source, size, **settings).save(buffer, "PNG")
        except InputError as error:
            raise told(str(error)) from None
        return buffer.getvalue()

    def told(line: str) -> Refused:
        line = line.replace(source, "the picture") if isinstance(source, str) else line
        return Refused(400, line, param="picture", code="invalid_image")

    async with parts.mapping:
        if not MAPS[name].network:
            return await to_thread.run_sync(work)
        with tempfile.TemporaryDirectory() as folder:
            path, start = FilePath(folder) / "map.png", source
            if not isinstance(start, str):
                start.save(given := FilePath(folder) / "given.png")
                start = str(given)
            sides = [] if size is None else ["--width", str(size[0]), "--height", str(size[1])]
            command = [sys.executable, "-m", "inkstream", "control", name, start, *sides, "--output", str(path)]
            try:
                with fail_after(SECONDS):
                    done = await run_process(command, check=False)
            except TimeoutError:
                raise Refused(503, f"map {name} took more than {SECONDS} s: send a smaller picture") from None
            if done.returncode:
                raise told((done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1])
            return path.read_bytes()
