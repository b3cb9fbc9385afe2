"""A loaded model: encode, sample, decode. `advance` is the one denoising loop; its callers drive it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inkstream.engine.drawing.options import cached, guided, refuse
from inkstream.engine.drawing.writing import writes_out, written_out
from inkstream.engine.pictures.inputs import fit_size, open_mask, open_picture, to_pixels
from inkstream.engine.pictures.preview import fit_preview
from inkstream.families import Family, Pictures, Writer, family_of
from inkstream.flow import add_noise, to_image
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.around.cache import POINTS, StepCache
from inkstream.nn.forward import Sample
from inkstream.sampling.guidance import guide, is_on
from inkstream.sampling.masks import keep, latent_mask, paste, start_index
from inkstream.sampling.schedules import SCHEDULES, dynamic_shift, empirical_shift
from inkstream.sampling.solvers import SOLVERS, times_asked
from inkstream.types import Conditioning, InputError, Query, Request, ScheduleName, Solver, SolverName, Spec, singles

FEATHER = 8
"""Width in pixels of the fade between original and repainted pixels, inside a mask's edge."""


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
        return None if self.image is None else open_picture(self.image)

    @cached_property
    def shown(self) -> list[Image.Image]:
        """The references, RGB, at their own sizes."""
        return [open_picture(picture) for picture in self.reference]

    def plain(self) -> Request:
        """Return the plain Request that draws the same picture again."""
        given = self.model_fields_set
        return Request.model_construct(set(given), **{name: getattr(self, name) for name in given})


class Model:
    """A loaded model. Latents are (B, C, h, w) float32, pixels are (B, 3, H, W) float32 in [0, 1]."""

    def __init__(
        self,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        placement: str = "resident",
        read_writer: Callable[[], Writer] | None = None,  # if the text encoder's files hold a language model
    ):
        self.family = family
        self.device = device
        self.dtype = dtype
        self.placement = placement
        self._read_writer = read_writer

    @property
    def spec(self) -> Spec:
        return self.family.spec

    @cached_property
    def writer(self) -> Writer:
        """The language model that expands prompts, read at its first use. Raises InputError if it is not there."""
        assert self._read_writer is not None, "only models with the ability `upsample` have a writer"
        return self._read_writer()

    @torch.inference_mode()
    def upsample(self, request: Complete) -> Iterator[str]:
        """Yield the expanded prompt as it grows. The last text is complete."""
        yield from self.writer.write(request.prompt, request.shown, request.seed)
        if self.placement != "resident":
            del self.writer

    @torch.inference_mode()
    def encode(self, request: Request) -> Conditioning:
        """Encode the prompt, the negative prompt if guidance needs it, and the pictures that the model looks at.

        If a grammar expands the prompt, it uses the request's seed.
        """
        whole = complete(request, self.spec)
        prompt = written_out(whole, self.spec)
        prompts = [prompt, whole.negative_prompt] if guided(whole, self.spec) else [prompt]
        cond = Conditioning.pack([self.family.encode(prompt) for prompt in prompts])
        seen = (whole.start, open_picture(whole.mask)) if whole.mask else ()
        return self.family.look(cond, Pictures(whole.width, whole.height, whole.shown, *seen))

    @torch.inference_mode()
    def sample(self, request: Request, cond: Conditioning, noise: Tensor | None = None) -> Tensor:
        """Return the latents of the request's `count` pictures, computed together.

        noise: (B, C, h, w), the start of B pictures. By default it comes from the request's seeds.
        """
        whole = complete(request, self.spec)
        shape = self.family.latent_shape(whole.width, whole.height)
        if noise is not None and noise.shape[1:] != shape:
            size = f"{whole.width}x{whole.height}"
            raise InputError(f"noise is {tuple(noise.shape)}: a {size} picture takes (B, {', '.join(map(str, shape))})")
        if noise is not None:
            whole = whole.model_copy(update={"count": len(noise)})
        original = self.open_original(whole)
        runs = [
            self.start(one, cond, original, None if noise is None else noise[i]) for i, one in enumerate(singles(whole))
        ]
        while pending := [run for run in runs if run.query is not None]:
            advance(self.family, pending)
        return torch.stack([run.result for run in runs])

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w) -> pixels (B, 3, H, W) in [0, 1]."""
        return self.family.decode(latents.to(self.device))

    @torch.inference_mode()
    def open_original(self, request: Complete) -> Original | None:
        """Return the picture that a request starts from, as pixels, latents and mask. None: it starts from noise."""
        if request.start is None:
            return None
        size = request.width, request.height
        pixels = to_pixels(request.start, *size)
        mask = None if request.mask is None else torch.as_tensor(open_mask(request.mask, size))
        if "fill" in self.spec.abilities:  # the picture is an input beside the noise; it is not mixed with the noise
            return Original(pixels, None, mask)
        return Original(pixels, self.family.encode_image(pixels[None].to(self.device))[0], mask)

    @torch.inference_mode()
    def start(
        self,
        request: Complete,
        cond: Conditioning,
        original: Original | None,
        noise: Tensor | None = None,
        around: Around = NOTHING,
    ) -> Run:
        """Start one picture. The Run waits at its first query.

        around: what is done around the blocks; the request's step cache is added to it.
        """
        shape = self.family.latent_shape(request.width, request.height)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        if noise is None:
            noise = torch.randn(shape, generator=generator)
        noise = start = noise.to(self.device, torch.float32)
        ts = SCHEDULES[request.schedule](request.steps, request.shift, self.spec.table)
        latents = None if original is None else original.latents
        if latents is not None:
            ts = ts[start_index(len(ts) - 1, request.strength) :]
            start = add_noise(latents, noise, ts[0])
        solver = SOLVERS[request.solver](start, ts, generator)
        if original is not None and latents is not None and original.mask is not None:
            mask = latent_mask(original.mask, *shape[1:], smooth="source" in self.spec.abilities).to(self.device)
            solver = keep(solver, latents, mask, noise, ts if request.solver == "euler" else ())
        times = times_asked(request.solver, ts)
        if guided(request, self.spec) and len(cond) < 2:
            raise InputError(f"guidance {request.guidance} needs the negative prompt too: encode this same request")
        entries = cond if guided(request, self.spec) else cond[0]
        if self.spec.guides == "read":
            entries = replace(entries, guidance=request.guidance)
        if cached(request, self.spec):
            around = replace(around, cache=StepCache(POINTS[request.cache], request.cache_threshold))
        prepared = self.family.prepare(entries, request.width, request.height, times, around)
        return Run(request, solver, prepared, len(times), start, around)

    def finish(self, run: Run, original: Original | None) -> Tensor:
        """Return the pixels (3, H, W) of a finished run. Outside a mask, they are the original's pixels."""
        if not torch.isfinite(run.result).all():
            raise self.overflow()
        pixels = self.decode(run.result[None])[0].cpu()
        if not torch.isfinite(pixels).all():
            raise self.overflow()
        if original is not None and original.mask is not None:
            pixels = paste(original.pixels, pixels, original.mask, FEATHER)
        return pixels

    def overflow(self) -> InputError:
        """Return the error for numbers that left the range of the model's dtype."""
        name = str(self.dtype).removeprefix("torch.")
        remedy = "use bfloat16 (--dtype bf16)" if self.dtype == torch.float16 else "use float32 (--dtype fp32)"
        return InputError(f"{self.spec.name} in {name} gave numbers that are not finite: it overflows here, {remedy}")

    @cached_property
    def preview(self) -> Any:
        """latents (C, h, w) -> a small picture, by a linear map that is fitted to the autoencoder once."""
        return fit_preview(self.family, self.device)


@dataclass(frozen=True)
class Original:
    """The picture to start from. pixels: (3, H, W) in [0, 1]; latents: (C, h, w); mask: (H, W), 1 repaints.

    latents: None if no noise is mixed with the picture.
    """

    pixels: Tensor
    latents: Tensor | None
    mask: Tensor | None


class Run:
    """A picture that is being drawn: its solver, the pending query, the prepared inputs, and what is done around the
    blocks."""

    def __init__(
        self,
        request: Complete,
        solver: Solver,
        prepared: Sequence[Any],
        evaluations: int,
        start: Tensor,
        around: Around = NOTHING,
    ):
        self.request = request
        self.prepared = prepared
        self.around = around
        self.evaluations = evaluations
        self.result: Tensor = start
        self.query: Query | None = None
        self.estimate: Tensor = start  # the last prediction of the clean latents
        self._solver = solver
        self._send(None)

    def samples(self) -> list[Sample]:
        """Return the samples of the pending query: of both prompts if guidance is on, else of the first."""
        assert self.query is not None
        return [Sample(*self.query, entry, self.around) for entry in self.entries()]

    def entries(self) -> Sequence[Any]:
        """Return the prepared prompts of `samples`."""
        assert self.query is not None
        r = self.request
        on = is_on(self.query.t, r.guidance, r.cfg_truncation, r.guidance_from, r.guidance_until)
        return self.prepared if on else self.prepared[:1]

    def answer(self, velocities: Sequence[Tensor]) -> None:
        """Send the velocity at the pending query, and get the next query. Guidance makes one of two velocities."""
        assert self.query is not None
        v = velocities[0]
        if len(velocities) == 2:
            v = guide(v, velocities[1], self.request.guidance, self.request.cfg_normalization)
        self.estimate = to_image(self.query.x, v, self.query.t)
        self._send(v)

    def close(self) -> None:
        self._solver.close()

    def _send(self, v: Tensor | None) -> None:
        try:
            self.query = next(self._solver) if v is None else self._solver.send(v)
        except StopIteration as end:
            self.query, self.result, self.around = None, end.value, NOTHING


@torch.inference_mode()
def advance(family: Family, runs: Sequence[Run]) -> None:
    """Answer the pending query of every run in one packed forward. If the forward fails, step caches forget it."""
    asked = [run.samples() for run in runs]
    try:
        answers = iter(family.answer([sample for samples in asked for sample in samples]))
    except BaseException:
        for run in runs:
            if run.around.cache is not None:
                run.around.cache.forget()
        raise
    for run, samples in zip(runs, asked):
        run.answer([next(answers) for _ in samples])


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
        if whole.start is not None:
            own = fit_size(whole.start, spec.multiple)
        elif whole.shown:
            own = family_of(spec.family).size_for(spec, whole.shown[0].size)
        width, height = width or own[0], height or own[1]
    for name, value in (("width", width), ("height", height)):
        if value % spec.multiple:
            low = value // spec.multiple * spec.multiple
            near = f"{low} or {low + spec.multiple}" if low else f"{spec.multiple}"
            raise InputError(f"{name} {value} is not a multiple of {spec.multiple}: take {near}")
    steps = request.steps or spec.steps
    defaults: dict[str, Any] = {
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": spec.guidance,
        "shift": shift_for(spec, width, height, steps),
        "solver": spec.solver,
        "schedule": spec.schedule,
        "seed": secrets.randbelow(2**32),
    }
    if request.image is not None:
        defaults["strength"] = 1.0 if request.mask is not None else spec.strength
    if spec.writer:
        defaults["upsample"] = writes_out(request, spec)
    return whole.model_copy(update={name: value for name, value in defaults.items() if name not in given})


def shift_for(spec: Spec, width: int, height: int, steps: int) -> float:
    """Return the time shift for a picture of this size, by the model's rule."""
    tokens = (width // spec.multiple) * (height // spec.multiple)
    if spec.shift_rule == "dynamic":
        return round(dynamic_shift(tokens, *spec.shift_line), 6)
    return round(empirical_shift(tokens, steps), 6) if spec.shift_rule == "empirical" else spec.shift
