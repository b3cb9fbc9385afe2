"""Requests without open fields. A request that cannot be drawn is told at once: torch and numpy are not imported."""

from __future__ import annotations

import secrets
from functools import cached_property
from typing import TYPE_CHECKING, Any

from inkstream.engine.drawing.options import refuse
from inkstream.engine.drawing.templates import JSON
from inkstream.engine.drawing.writing import writes_out
from inkstream.families import family_of
from inkstream.sampling.schedules import dynamic_shift, empirical_shift
from inkstream.types import LONGEST, Enlargement, InputError, Region, Request, ScheduleName, SolverName, Spec

if TYPE_CHECKING:
    from PIL import Image

    from inkstream.engine.pictures.edits import Canvas, Edit


SKEW = 0.05
"""How much a second pass may change the aspect ratio of control pictures and regions: by rounding, not more."""


class Complete(Request, frozen=True):
    """A Request without open fields. `complete` makes it from a request and a model's Spec.

    Its pictures are decoded once. A copy with other fields keeps the decoded pictures.
    """

    width: int
    height: int
    steps: int
    guidance: float
    shift: float
    solver: SolverName
    schedule: ScheduleName
    seed: int
    strength: float = 1.0  # 1 is the value of a request that starts from noise
    upsample: bool = False

    @cached_property
    def start(self) -> Image.Image | None:
        """The picture to start from, RGB, at its own size."""
        if self.image is None:
            return None
        from inkstream.engine.pictures.inputs import open_picture

        return open_picture(self.image)

    @cached_property
    def canvas(self) -> Canvas | None:
        """The picture of which a part is repainted; None if none is. Raises InputError if that is not possible."""
        if self.start is None or not self.repaints:
            return None
        from inkstream.engine.pictures.edits import canvas_of

        return canvas_of(self, self.start)

    @cached_property
    def edit(self) -> Edit | None:
        """How a part of the start picture is drawn and pasted back; None if the whole is drawn."""
        if self.canvas is None:
            return None
        from inkstream.engine.pictures.edits import Edit

        return Edit(self.canvas, (self.width, self.height), self.mask_blur, self.mask_soft, self.mask_fill)

    @cached_property
    def shown(self) -> list[Image.Image]:
        """The references, RGB, at their own sizes."""
        if not self.reference:
            return []
        from inkstream.engine.pictures.inputs import open_picture

        return [open_picture(picture) for picture in self.reference]

    @cached_property
    def followed(self) -> list[Image.Image]:
        """The control pictures, RGB, at their own sizes."""
        if not self.control:
            return []
        from inkstream.engine.pictures.inputs import open_picture

        return [open_picture(picture) for picture in self.control]

    def final_size(self, multiple: int) -> tuple[int, int]:
        """The width and height of the finished picture. Raises InputError if it is too large for a second pass.

        multiple: of a drawn picture's sides.
        """
        own = self.start.size if self.keeps_start and self.start is not None else (self.width, self.height)
        if self.upscale is None:
            return self.width, self.height
        width, height = Enlargement.read(self.upscale).of(*own)
        if self.upscale_strength == 0:
            return width, height
        width, height = (max(1, round(side / multiple)) * multiple for side in (width, height))
        if max(width, height) > LONGEST:
            raise InputError(
                f"upscale {self.upscale} makes {width}x{height}, and a side of a drawn picture has {LONGEST} pixels at "
                "most: take a smaller one, or upscale_strength 0"
            )
        if (self.control or self.regions) and abs(width * own[1] / (height * own[0]) - 1) > SKEW:
            raise InputError(
                f"upscale {self.upscale} crops a picture of {own[0]}x{own[1]}, and control pictures and regions are of "
                "the whole: take a factor such as 2x"
            )
        return width, height

    def starting_from(self, image: Image.Image) -> Complete:
        """Return a copy that starts from this picture (RGB) in place of its own."""
        copy = self.model_copy()
        vars(copy)["start"] = image  # where the cached property looks
        return copy

    def boxes(self, spec: Spec) -> list[tuple[Region, tuple[int, int, int, int]]]:
        """The regions, each with its box in the model's image tokens. Raises InputError if a box does not fit."""
        regions = [Region.read(region) for region in self.regions]
        return [(region, region.on_grid(self.width, self.height, spec.multiple)) for region in regions]

    def plain(self) -> Request:
        """Return the plain Request that draws the same picture again."""
        given = self.model_fields_set
        return Request.model_construct(set(given), **{name: getattr(self, name) for name in given})


def complete(request: Request, spec: Spec) -> Complete:
    """Return the request with every open field filled from the model's defaults. A Complete request is returned as is.

    Raises InputError if the model cannot draw the request.
    """
    if isinstance(request, Complete):
        return request
    refuse(request, spec)
    given = {name: value for name in request.model_fields_set if (value := getattr(request, name)) is not None}
    whole = Complete.model_construct(set(given), **given)
    width, height = request.width, request.height
    if width is None or height is None:
        own = spec.size
        if whole.canvas is not None:
            own = whole.canvas.size_for(spec.multiple, spec.size)
        elif whole.start is not None:
            from inkstream.engine.pictures.inputs import fit_size

            own = fit_size(whole.start, spec.multiple)
        elif whole.shown:
            own = family_of(spec.family).size_for(spec, whole.shown[0].size)
        width, height = width or own[0], height or own[1]
    for name, value in (("width", width), ("height", height), ("tile", request.tile or spec.multiple)):
        if value % spec.multiple:
            low = value // spec.multiple * spec.multiple
            near = f"{low} or {low + spec.multiple}" if low else f"{spec.multiple}"
            raise InputError(f"{name} {value} is not a multiple of {spec.multiple}: take {near}")
    steps = request.steps or spec.steps
    wide, high = (min(side, request.tile or side) for side in (width, height))  # what the model sees at once
    defaults: dict[str, Any] = {
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": spec.guidance,
        "shift": shift_for(spec, wide, high, steps),
        "solver": spec.solver,
        "schedule": spec.schedule,
        "seed": secrets.randbelow(2**32),
    }
    if request.image is not None:
        defaults["strength"] = 1.0 if request.repaints else spec.strength
    if spec.writer:
        defaults["upsample"] = writes_out(request, spec)
    elif "enhanced" in spec.abilities:
        defaults["upsample"] = request.image is None and bool(request.prompt.strip()) and not JSON.match(request.prompt)
    whole = whole.model_copy(update={name: value for name, value in defaults.items() if name not in given})
    whole.final_size(spec.multiple)
    whole.boxes(spec)
    return whole


def shift_for(spec: Spec, width: int, height: int, steps: int) -> float:
    """Return the time shift for a picture of this size, by the model's rule."""
    tokens = (width // spec.multiple) * (height // spec.multiple)
    if spec.shift_rule == "dynamic":
        return round(dynamic_shift(tokens, *spec.shift_line), 6)
    return round(empirical_shift(tokens, steps), 6) if spec.shift_rule == "empirical" else spec.shift
