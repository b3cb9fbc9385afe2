"""The adapters (LoRA and relatives) in the server's folder: their list, their previews, and the tags that name them."""

from __future__ import annotations

import io
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, Path, Response
from PIL import Image

from inkstream.engine.files.lora_facts import find_preview, picture_beside, read_facts
from inkstream.engine.files.loras import lora_folder, names_in
from inkstream.engine.pictures.foreign.reading import files_named
from inkstream.engine.pictures.inputs import open_picture
from inkstream.families import SPECS
from inkstream.families.fits import Sizes, fits, sizes_of
from inkstream.serve import schema
from inkstream.serve.api.gallery import THUMBNAIL, UNCHANGED, Match, file_answer
from inkstream.serve.api.service import Parts, Who
from inkstream.serve.engines.models import Offered
from inkstream.serve.errors import Refused, answers
from inkstream.types import InputError, LoraUse

router = APIRouter(tags=["models"])


@router.get("/v1/loras", responses=answers())
async def get_loras(parts: Parts, who: Who) -> schema.Loras:
    """The LoRA files that requests can name, and what their headers say. A damaged file is listed with its error."""
    folder, models = lora_folder(parts.settings.machine), parts.models

    def work() -> schema.Loras:
        return schema.Loras(data=[tell(name, file, models) for name, file in names_in(folder).items()])

    return await to_thread.run_sync(work)


@router.get(
    "/v1/loras/{name:path}/preview",
    responses=file_answer("image/webp") | UNCHANGED | answers(400, 404),
    response_class=Response,
)
async def get_preview(
    parts: Parts,
    who: Who,
    name: Annotated[str, Path(max_length=500, description="The LoRA's name.")],
    match: Match = None,
) -> Any:
    """A small preview of a LoRA: the picture beside its file, or the one in its metadata."""

    def work() -> tuple[str, bytes]:
        file = names_in(lora_folder(parts.settings.machine)).get(name)
        if file is None:
            raise Refused(404, f"the server has no lora {name[:100]}: see /v1/loras", code="not_found")
        try:
            stat = (picture_beside(file) or file).stat()
            return f"{stat.st_mtime_ns:x}-{stat.st_size:x}", make_preview(file, stat.st_mtime_ns, stat.st_size)
        except (InputError, OSError):
            raise Refused(404, f"lora {name[:100]} has no preview that can be read", code="not_found") from None

    tag, data = await to_thread.run_sync(work)
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}
    if match is not None and f'"{tag}"' in match:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type="image/webp", headers=headers)


def tell(name: str, file: FilePath, models: dict[str, Offered]) -> schema.Lora:
    """What the list says of one file. Call it in a thread."""
    facts = read_facts(file)
    return schema.Lora(
        name=name,
        title=facts.title,
        trigger_words=list(facts.triggers),
        base=facts.base,
        family=family_of_sizes(facts.sizes) if not facts.error else "",
        fits={} if facts.error else fitting(facts.sizes, models),
        ranks=list(facts.ranks),
        bytes=facts.size,
        strength=facts.strength,
        hint=facts.hint,
        preview=f"/v1/loras/{quote(name)}/preview" if facts.has_preview else None,
        error=facts.error or None,
    )


def fitting(sizes: Sizes, models: dict[str, Offered]) -> dict[str, bool]:
    """Offered model -> whether a file with these sizes fits it. Models of which this is not known are left out."""
    known = {name: fits(sizes, model.sizes) for name, model in models.items() if model.sizes is not None}
    return {name: fit for name, fit in known.items() if fit is not None}


def family_of_sizes(sizes: Sizes) -> str:
    """The family of all known models that a file with these sizes fits; empty if it is none or several."""
    families = {spec.family for spec in SPECS.values() if fits(sizes, sizes_of(spec))}
    return families.pop() if len(families) == 1 else ""


@lru_cache(maxsize=256)
def make_preview(file: FilePath, changed: int, size: int) -> bytes:
    """The preview of a LoRA's file as WebP. changed, size: those of the file with the picture, for the cache.

    Raises InputError if there is none or it cannot be read. Call it in a thread.
    """
    source = find_preview(file)
    if source is None:
        raise InputError("there is no preview")
    image = open_picture(source)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def find_use(tag: str, known: Collection[str]) -> LoraUse:
    """How a prompt uses a LoRA, by its tag NAME[:STRENGTH]. known: the names in the server's folder.

    Raises Refused for tags that mean no file or several.
    """
    name, _, strength = tag.partition(":")
    name = name.removesuffix(".safetensors")
    found = files_named(name, known)
    if len(found) != 1:
        problem = f"means {' and '.join(found)}" if found else "is not one of /v1/loras"
        raise Refused(400, f"prompt has the LoRA {name[:100]}, which {problem}: give one name", param="prompt")
    try:
        return LoraUse.read({"path": found[0], "strength": strength or 1})
    except InputError:
        line = f"prompt has <lora:{tag[:100]}>: write <lora:{name[:100]}:0.8>, with a strength from -10 to 10"
        raise Refused(400, line, param="prompt") from None
