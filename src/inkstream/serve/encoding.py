"""The server of `inkstream serve --encode-only`: prompts' tokens in, text encoders' states out. It draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from inkstream.serve.keys import Keys
from inkstream.types import InputError

MOST = 1 << 20
"""Bytes of the largest body."""
Encode = Callable[[list[int], str, str], bytes]
"""Tokens, the mark of the asker's text encoders, and its dtype -> safetensors. Raises InputError."""


class Tokens(BaseModel):
    """A prompt's tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    mark: str = Field(max_length=64)
    dtype: str = Field(max_length=20)


def build(encode: Encode, keys: Keys) -> FastAPI:
    """The application. If there are keys, each request needs one."""
    app = FastAPI(title="inkstream text encoder", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def tell_health() -> dict[str, bool]:
        return {"ok": True}

    @app.post("/v1/encode")
    def encode_tokens(asked: Tokens) -> Response:
        try:
            return Response(encode(asked.tokens, asked.mark, asked.dtype), media_type="application/octet-stream")
        except InputError as error:
            return _refuse(400, str(error))

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], object]) -> object:
        if request.url.path != "/healthz":
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            known = bool(keys) and kind.lower() == "bearer" and keys.remembered(given)
            if keys and not known and (kind.lower() != "bearer" or await to_thread.run_sync(keys.check, given) is None):
                return _refuse(401, "this server needs a key: set INKSTREAM_API_KEY")
            if "origin" in request.headers and not keys:  # a page in the user's browser
                return _refuse(403, "pages may not use this server: ask without a browser")
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not (length.isdecimal() and int(length) <= MOST):
            return _refuse(413, f"the body is larger than {MOST >> 20} MiB, or has no length: send one prompt's tokens")
        return await go_on(request)  # type: ignore[misc]

    return app


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)
