"""Converts rows of the store: a job to its request, grid and parts, a picture to its API record."""

from __future__ import annotations

from inkstream.serve import schema
from inkstream.serve.queue.grids import split
from inkstream.serve.queue.store import Job, Picture
from inkstream.serve.schema import Grid
from inkstream.types import Request


def request_of(job: Job) -> Request:
    """The job's request, with its seed."""
    return Request.model_validate(job.request)


def grid_of(job: Job) -> Grid | None:
    return None if job.grid is None else Grid.model_validate(job.grid)


def parts_of(job: Job) -> list[Request]:
    """The requests of a job, one for each part."""
    return split(request_of(job), grid_of(job))


def part_at(job: Job, place: int) -> tuple[Request, int]:
    """The part that draws picture `place` of a job, and the place of that part's first picture."""
    start = 0
    for part in parts_of(job):
        if place < start + part.count:
            return part, start
        start += part.count
    raise AssertionError(f"job {job.id} has no picture {place}")


def tell_picture(picture: Picture, job: Job | None) -> schema.Picture:
    """The picture's API record. job: the picture's job, which gives its place in a grid; None if unknown."""
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
