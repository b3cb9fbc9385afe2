"""The upscaling models in the server's folder."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter

from inkstream.engine.files.upscalers import upscaler_folder, upscalers_in
from inkstream.serve import schema
from inkstream.serve.api.service import Parts, Who
from inkstream.serve.errors import answers

router = APIRouter(tags=["models"])


@router.get("/v1/upscalers", responses=answers())
async def get_upscalers(parts: Parts, who: Who) -> schema.Upscalers:
    """The upscaling models that requests can name. Their files are read when a request uses one."""
    folder = upscaler_folder(parts.settings.machine)

    def work() -> schema.Upscalers:
        files = upscalers_in(folder).items()
        return schema.Upscalers(
            data=[schema.Upscaler(name=name, bytes=file.stat().st_size) for name, file in files if file.is_file()]
        )

    return await to_thread.run_sync(work)
