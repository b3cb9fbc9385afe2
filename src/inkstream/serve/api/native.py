"""The native API: jobs, the queue, events, models."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Response

from inkstream.engine.drawing import writing
from inkstream.engine.files.loras import lora_folder
from inkstream.serve import schema
from inkstream.serve.api.service import EVENTS, Parts, Service, Who, stream
from inkstream.serve.engines.models import Offered, choose, describe, form, spec_of
from inkstream.serve.errors import Refused, answers
from inkstream.serve.limits import check, check_text
from inkstream.serve.queue.grids import check_loras
from inkstream.serve.queue.store import Job, Picture
from inkstream.types import Request

router = APIRouter(tags=["jobs"])

Name = Annotated[str, Path(max_length=64, description="The job's id.")]
Token = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=255, description="The same key returns the same job."),
]
LastEvent = Annotated[
    str | None, Header(alias="Last-Event-ID", max_length=64, description="Id of the last event seen.")
]
Before = Annotated[str | None, Query(max_length=64, description="`next` of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=500)]


@router.post("/v1/jobs", status_code=202, responses=answers(400, 404, 409, 429, 503))
async def add_job(parts: Parts, who: Who, body: schema.JobBody, response: Response, token: Token = None) -> schema.Job:
    """Accept a request. The job is then drawn even if the client leaves or the server or the engine crashes."""
    fields = body.model_dump(exclude_unset=True, exclude={"priority", "note", "grid"})
    request = await parts.take_pictures(who, Request.model_validate(fields))
    job = parts.jobs.submit(who, request, note=body.note, priority=body.priority, grid=body.grid, token=token)
    await to_thread.run_sync(parts.store.settle)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return parts.jobs.tell(job)


@router.get("/v1/jobs", responses=answers(400))
async def list_jobs(
    parts: Parts, who: Who, state: schema.State | None = None, limit: Limit = 50, before: Before = None
) -> schema.Jobs:
    """Jobs, newest first."""
    number = None if before is None else number_of(parts.store.job(before, who.scope), before)
    jobs = parts.store.list_jobs(who.scope, state, number, limit)
    last = jobs[-1].id if len(jobs) == limit else None
    return schema.Jobs(jobs=parts.jobs.tell_all(jobs), next=last)


@router.get("/v1/jobs/{id}", responses=answers(400, 404))
async def get_job(parts: Parts, who: Who, id: Name) -> schema.Job:
    """One job in its present state."""
    return parts.jobs.tell(find_job(parts, who, id))


@router.delete("/v1/jobs/{id}", responses=answers(400, 404, 503))
async def cancel_job(parts: Parts, who: Who, id: Name) -> schema.Job:
    """Cancel a job. A running job stops within one step and keeps its pictures; an ended job does not change."""
    parts.jobs.cancel(find_job(parts, who, id).id)
    return parts.jobs.tell(find_job(parts, who, id))


@router.patch("/v1/jobs/{id}", responses=answers(400, 404, 409, 503))
async def move_job(parts: Parts, who: Who, id: Name, body: schema.JobPatch) -> schema.Job:
    """Move a queued job."""
    parts.jobs.move(find_job(parts, who, id), who, body)
    return parts.jobs.tell(find_job(parts, who, id))


@router.get("/v1/jobs/{id}/events", responses=EVENTS | answers(400, 404), response_class=Response)
async def follow_job(parts: Parts, who: Who, id: Name, last: LastEvent = None) -> Any:
    """A job's present state, then its events, up to its end."""
    job = find_job(parts, who, id)
    return stream(parts, who, parts.jobs.follow(job.id, last))


@router.get("/v1/events", responses=EVENTS | answers(400), response_class=Response)
async def follow_all(parts: Parts, who: Who, last: LastEvent = None) -> Any:
    """The events of all jobs that the key may see. The stream has no end."""
    return stream(parts, who, parts.jobs.follow_all(who, last), named=True)


@router.get("/v1/queue", responses=answers())
async def get_queue(parts: Parts, who: Who) -> schema.Queue:
    """Running jobs, and queued jobs in their order."""
    active = {job.id: job for job in parts.store.active() if who.scope in (None, job.key)}
    running = [job for job in active.values() if job.state == "running"]
    queued = [active[identity] for identity in parts.jobs.order() if identity in active]
    etas = [eta for identity, eta in parts.jobs.etas().items() if identity in active]
    known = [eta for eta in etas if eta is not None]
    return schema.Queue(
        paused=parts.jobs.paused,
        running=parts.jobs.tell_all(running),
        queued=parts.jobs.tell_all(queued),
        eta=None if len(known) < len(etas) else round(max(known, default=0.0), 2),
    )


@router.patch("/v1/queue", responses=answers(400, 503))
async def pause_queue(parts: Parts, who: Who, body: schema.QueuePatch) -> schema.Queue:
    """Pause or resume the start of jobs. On a server with keys, this needs an admin's key."""
    if not who.admin:
        raise Refused(403, "this key may not pause the queue: use an admin's key")
    parts.jobs.pause(body.paused)
    return await get_queue(parts, who)


@router.get("/v1/models", responses=answers(), tags=["models"])
async def list_models(parts: Parts, who: Who) -> schema.Models:
    """The offered models. The first is the default."""
    loaded = parts.jobs.drawing.loaded
    return schema.Models(data=[describe(m, parts.started, m.name == loaded) for m in parts.models.values()])


ModelName = Annotated[str, Path(max_length=200, description="The model's id.")]


@router.get("/v1/models/{name}", responses=answers(400, 404), tags=["models"])
async def get_model(parts: Parts, who: Who, name: ModelName) -> schema.Model:
    """One model."""
    return describe(find_model(parts, name), parts.started, name == parts.jobs.drawing.loaded)


@router.get("/v1/models/{name}/form", responses=answers(400, 404, 503), tags=["models"])
async def get_form(parts: Parts, who: Who, name: ModelName) -> schema.Form:
    """The options of a model: their values, and their effect on this model."""
    return form(find_model(parts, name), parts.settings.limits)


@router.post("/v1/prompts", responses=answers(400, 404, 503), tags=["models"])
async def write_prompt(parts: Parts, who: Who, body: schema.PromptBody) -> schema.PromptTold:
    """The prompt that the model would read, and notes on what its grammar does not understand. Nothing is drawn."""
    request, model = choose(parts.models, Request.model_validate(body.model_dump(exclude_unset=True)))
    spec = spec_of(model)
    check_text(request.prompt, request.negative_prompt)
    check(request, spec, parts.settings.limits)

    def write() -> schema.PromptTold:
        folder = lora_folder(parts.settings.machine)
        check_loras(request, folder)
        told = writing.written_out(request, spec, folder)
        return schema.PromptTold(told=told, notes=writing.notes(request, spec, folder))

    return await to_thread.run_sync(write)


def find_job(parts: Service, who: Who, identity: str) -> Job:
    """The job with that id. Raises Refused if it does not exist or the caller may not see it."""
    job = parts.store.job(identity, who.scope)
    if job is None:
        raise Refused(404, f"there is no job {identity}: see /v1/jobs", code="not_found")
    return job


def number_of(last: Job | Picture | None, before: str) -> int:
    """The number of the last row of the previous page. Raises Refused if `last` is None: `before` is unknown."""
    if last is None:
        raise Refused(400, f"before {before} is not known: give `next` of a page", param="before")
    return last.number


def find_model(parts: Service, name: str) -> Offered:
    if name not in parts.models:
        raise Refused(404, f"model {name} is not offered: take {', '.join(parts.models)}", code="model_not_found")
    return parts.models[name]
