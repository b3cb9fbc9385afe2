"""Splits a job into its requests, one for each cell of a grid, and checks that its models can draw them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from inkstream.clients.remote.catalogue import offer_of
from inkstream.clients.remote.drawer import check_request
from inkstream.engine.drawing.options import refuse
from inkstream.engine.drawing.templates import filled
from inkstream.engine.files.loras import names_in
from inkstream.engine.files.upscalers import upscalers_in
from inkstream.engine.pictures.metadata import PICTURE_FIELDS
from inkstream.serve.engines.models import Offered, choose
from inkstream.serve.errors import Refused, explain_invalid
from inkstream.serve.limits import Limits, check
from inkstream.serve.schema import Grid
from inkstream.types import ControlUse, InputError, LoraUse, Request, Spec


def split(request: Request, grid: Grid | None) -> list[Request]:
    """The requests of a job: one, or one for each cell of its grid, row by row.

    Raises Refused if a field of the grid does not exist or a value is not valid.
    """
    if grid is None:
        return [request]
    if request.count != 1:
        raise Refused(400, "a grid has one picture in each cell: leave count out", param="count")
    for name in axes(grid):
        if name not in Request.model_fields or name in ("count", *PICTURE_FIELDS):
            raise Refused(400, f"{name} cannot be an axis of a grid: take a field such as steps or seed", param="grid")
    if grid.y is not None and grid.x.field == grid.y.field:
        raise Refused(400, f"both axes of the grid are {grid.x.field}: take another field for y", param="grid")
    given = request.model_dump(exclude_unset=True)
    cells = []
    for y in grid.y.values if grid.y else [None]:
        for x in grid.x.values:
            fields = {**given, grid.x.field: x} | ({grid.y.field: y} if grid.y else {})
            try:
                cells.append(Request.model_validate(fields))
            except ValidationError as error:
                raise Refused(400, f"grid: {explain_invalid(error).message}", param="grid") from None
    return cells


def axes(grid: Grid) -> list[str]:
    """The fields that differ from cell to cell."""
    return [axis.field for axis in (grid.x, grid.y) if axis is not None]


def check_parts(
    parts: list[Request],
    models: dict[str, Offered],
    limits: Limits,
    loras: Path,
    controls: Path,
    wildcards: Path,
    upscalers: Path,
) -> int:
    """The number of pictures of all parts. Raises Refused if a part cannot be drawn or the number is too large."""
    for part in parts:
        part, model = choose(models, part)
        if not part.prompt.strip() and not part.reference and not part.only_enlarges:
            raise Refused(400, "there is no prompt: say what to draw", param="prompt")
        check(part, model.spec, limits)
        check_loras(part, loras)
        nets = [ControlUse.read(net).path for net in part.control_nets]
        _check_names(nets, names_in(controls) if nets else {}, "control net", "control_nets")
        if part.upscaler is not None:
            _check_names([part.upscaler], upscalers_in(upscalers), "upscaler", "upscaler")
        _check_template(part, wildcards)
        if model.spec is not None:
            _check_spec(part, model.spec)
    total = sum(part.count for part in parts)
    if total > limits.pictures:
        raise Refused(400, f"a grid of {total} pictures is too large: take at most {limits.pictures}", param="grid")
    return total


def check_loras(request: Request, folder: Path) -> None:
    """Raises Refused if a request names an adapter that is not one of the server's folder."""
    names = [LoraUse.read(lora).path for lora in request.loras]
    _check_names(names, names_in(folder) if names else {}, "lora", "loras")


def _check_names(names: list[str], known: Mapping[str, Path], what: str, param: str) -> None:
    """Only files in the server's folder are open to clients, and only by their names. known: name -> file."""
    for name in names:
        if name not in known:
            others = difflib.get_close_matches(name, known) or [*known][:5]
            hint = f"take {' or '.join(others)}" if others else "its folder of them is empty"
            code = f"{what.replace(' ', '_')}_not_found"
            raise Refused(404, f"the server has no {what} {name[:100]}: {hint}", param=param, code=code)


def _check_template(request: Request, folder: Path) -> None:
    """Write the first picture's prompt out, so that a wildcard that is not known is told at once."""
    try:
        filled(request, folder)
    except InputError as error:
        raise Refused(400, str(error), param="prompt") from None


def _check_spec(request: Request, spec: Spec) -> None:
    try:
        if spec.takes is not None:
            check_request(offer_of(spec.name), spec, request)
            return
        refuse(request, spec)
    except InputError as error:
        raise Refused(400, str(error)) from None
    for name in ("width", "height"):
        value = getattr(request, name)
        if value is not None and value % spec.multiple:
            near = max(spec.multiple, value // spec.multiple * spec.multiple)
            raise Refused(400, f"{name} {value} is not a multiple of {spec.multiple}: take {near}", param=name)
