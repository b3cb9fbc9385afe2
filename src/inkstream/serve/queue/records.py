"""Rows of the store as other parts want them: a job's request and grid, a picture as the API has it."""

from __future__ import annotations

from inkstream.serve import schema
from inkstream.serve.queue.grids import split
from inkstream.serve.queue.store import Job, Picture
from inkstream.serve.schema import Grid
from inkstream.types import Request


def request_of(job: Job) -> Request:
    """What was asked, with the seed it was given."""
    return Request.model_validate(job.request)


def grid_of(job: Job) -> Grid | None:
    return None if job.grid is None else Grid.model_validate(job.grid)


def parts_of(job: Job) -> list[Request]:
    """The requests that a job is made of."""
    return split(request_of(job), grid_of(job))


def part_at(job: Job, place: int) -> tuple[Request, int]:
    """The request that picture `place` of a job belongs to, and the place of that request's first picture."""
    start = 0
    for part in parts_of(job):
        if place < start + part.count:
            return part, start
        start += part.count
    raise AssertionError(f"job {job.id} has no picture {place}")


def tell_picture(picture: Picture, job: Job | None) -> schema.Picture:
    """A picture as the API has it. job: its own, which says where in a grid it is."""
    columns = len(job.grid["x"]["values"]) if job is not None and job.grid is not None else 0
    return schema.Picture(
        id=picture.id,
        job=picture.job,
        index=picture.place,
        cell=[picture.place % columns, picture.place // columns] if columns else None,
        created=picture.created,
        seconds=picture.seconds,
        width=picture.width,
        height=picture.height,
        bytes=picture.bytes,
        type=picture.type,
        sha256=picture.sha256,
        seed=picture.seed,
        model=picture.model,
        prompt=picture.request.get("prompt", ""),
        favourite=bool(picture.favourite),
        deleted=picture.deleted is not None,
        request=picture.request,
        url=f"/v1/pictures/{picture.id}/file",
        thumbnail=f"/v1/pictures/{picture.id}/thumbnail",
    )
