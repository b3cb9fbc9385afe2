"""How the server is: health, readiness, numbers; and the cookie by which a page in a browser carries its key."""

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
    """200 as long as the server answers."""
    return health(parts)


@router.get("/readyz", responses={503: {"model": schema.Health, "description": "The engine does not take jobs yet."}})
async def readyz(parts: Parts) -> schema.Health:
    """200 once the engine takes jobs. Jobs are accepted before that, too."""
    state = health(parts)
    return state if parts.jobs.drawing.ready else JSONResponse(state.model_dump(), 503)  # type: ignore[return-value]


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **answers()},
)
async def metrics(parts: Parts, who: Who) -> Response:
    """Numbers for Prometheus. With keys, only an admin's reads them: they name the others."""
    if not who.admin:
        raise Refused(403, "only an admin's key may read the metrics")
    return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4")


@router.post("/v1/session", status_code=204, responses=answers(), response_class=Response)
async def open_session(parts: Parts, who: Who, request: Request) -> Response:
    """Keep the key in a cookie, so that pictures and events can be asked for by a page."""
    answer = Response(status_code=204)
    key = given_key(request.headers, request.cookies)
    if key is not None:
        answer.set_cookie(COOKIE, key, max_age=365 * 86_400, httponly=True, samesite="strict")
    return answer


@router.delete("/v1/session", status_code=204, responses=answers(), response_class=Response)
async def close_session(parts: Parts, who: Who) -> Response:
    """Forget the key."""
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer
