"""Pictures that are enlarged after they are drawn: their size, and the second pass that draws them again."""

from __future__ import annotations

from typing import Any

from inkstream.engine.drawing.complete import Complete, shift_for
from inkstream.engine.drawing.options import options
from inkstream.sampling.masks import start_index
from inkstream.sampling.schedules import SCHEDULES
from inkstream.sampling.solvers import times_asked
from inkstream.types import Region, Spec


def times_of(request: Complete, spec: Spec, from_picture: bool) -> tuple[list[float], list[float]]:
    """The times of a picture's steps, and those of the whole schedule."""
    asked = request.steps, request.schedule, request.shift
    if spec.times and asked == (spec.steps, spec.schedule, spec.shift):
        schedule = list(spec.times)
    else:
        schedule = list(SCHEDULES[request.schedule](request.steps, request.shift, spec.table))
    return schedule[start_index(len(schedule) - 1, request.strength) :] if from_picture else schedule, schedule


def evaluations_of(request: Complete, spec: Spec) -> int:
    """The number of model evaluations of a picture that starts from another."""
    return len(times_asked(request.solver, times_of(request, spec, from_picture=True)[0]))


def second_pass(request: Complete, spec: Spec) -> Complete | None:
    """The request that draws the enlarged picture again; None if nothing does.

    Its start picture must be given by `starting_from`. It is drawn in windows of the model's own size, unless the
    request says another, or the model does not draw in windows.
    """
    if request.upscale is None or request.upscale_strength == 0:
        return None
    width, height = request.final_size(spec.multiple)
    tile = request.tile
    if tile is None and options(spec, request)["tile"].effect != "rejects":
        tile = max(spec.size)
    fields: dict[str, Any] = {
        "width": width,
        "height": height,
        "tile": tile,
        "image": "the enlarged picture",
        "strength": request.upscale_strength,
        "regions": tuple(
            str(Region.read(region).as_shares(request.width, request.height)) for region in request.regions
        ),
        "upscale": None,
        "upscaler": None,
    }
    if request.shift == shift_for(spec, request.width, request.height, request.steps):
        wide, high = (min(side, tile or side) for side in (width, height))  # what the model sees at once
        fields["shift"] = shift_for(spec, wide, high, request.steps)
    return request.model_copy(update=fields)
