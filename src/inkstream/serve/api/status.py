"""Health, readiness and metrics of the server, and the cookie that holds a key for pages in a browser."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from inkstream import __version__
from inkstream.serve import schema
from inkstream.serve.api.service import Parts, Service, Who
from inkstream.serve.errors import Refused, answers
from inkstream.serve.keys import COOKIE, given_key

router = APIRouter(tags=["server"])


def health(parts: Service) -> schema.Health:
    engine = "ready" if parts.jobs.drawing.ready else "starting"
    return schema.Health(
        status="ok" if parts.jobs.drawing.ready else "starting",
        version=__version__,
        engine=engine,
        model=parts.jobs.drawing.loaded,
        device=parts.jobs.drawing.device,
    )


@router.get("/healthz")
async def healthz(parts: Parts) -> schema.Health:
    """200 while the server runs."""
    return health(parts)


@router.get("/readyz", responses={503: {"model": schema.Health, "description": "The engine does not accept jobs yet."}})
async def readyz(parts: Parts) -> schema.Health:
    """200 once the engine accepts jobs, else 503. The queue also accepts jobs before that."""
    state = health(parts)
    return state if parts.jobs.drawing.ready else JSONResponse(state.model_dump(), 503)  # type: ignore[return-value]


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **answers()},
)
async def metrics(parts: Parts, who: Who) -> Response:
    """Metrics for Prometheus. On a server with keys, this needs an admin's key: the metrics contain all keys' names."""
    if not who.admin:
        raise Refused(403, "this key may not read the metrics: use an admin's key")
    return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4")


@router.post("/v1/session", status_code=204, responses=answers(), response_class=Response)
async def open_session(parts: Parts, who: Who, request: Request) -> Response:
    """Put the key into a cookie, so that a page can load pictures and events."""
    answer = Response(status_code=204)
    key = given_key(request.headers, request.cookies)
    if key is not None:
        answer.set_cookie(COOKIE, key, max_age=365 * 86_400, httponly=True, samesite="strict")
    return answer


@router.delete("/v1/session", status_code=204, responses=answers(), response_class=Response)
async def close_session(parts: Parts, who: Who) -> Response:
    """Remove the key's cookie."""
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer
