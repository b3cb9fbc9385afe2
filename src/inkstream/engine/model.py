"""A loaded model: encode, sample, decode. The one denoising loop is `advance`; whoever draws, drives it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inkstream.engine.inputs import fit_size, open_mask, open_picture, to_pixels
from inkstream.engine.options import cached, guided, refuse
from inkstream.engine.preview import fit_preview
from inkstream.engine.writing import writes_out, written_out
from inkstream.families import Family, Pictures, Writer, family_of
from inkstream.flow import add_noise, to_image
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.around.cache import POINTS, StepCache
from inkstream.nn.forward import Sample
from inkstream.sampling.guidance import guide, is_on
from inkstream.sampling.masks import keep, latent_mask, paste, start_index
from inkstream.sampling.schedules import SCHEDULES, dynamic_shift, empirical_shift
from inkstream.sampling.solvers import SOLVERS, times_asked
from inkstream.types import Conditioning, InputError, Query, Request, Solver, Spec

FEATHER = 8
"""Pixels inside a mask's edge over which the repainted part fades in."""


class Model:
    """What `inkstream.load` returns. Latents are (B, C, h, w) float32, pixels (B, 3, H, W) float32 in [0, 1]."""

    def __init__(
        self,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        plan: str = "resident",  # how its parts were placed
        read_writer: Callable[[], Writer] | None = None,  # where the text encoder's files hold one
    ):
        self.family = family
        self.device = device
        self.dtype = dtype
        self.plan = plan
        self._read_writer = read_writer

    @property
    def spec(self) -> Spec:
        return self.family.spec

    @cached_property
    def writer(self) -> Writer:
        """What writes prompts out, read when it is first asked for. InputError where it is not there."""
        assert self._read_writer is not None, "only models with the ability to upsample are asked"
        return self._read_writer()

    @torch.inference_mode()
    def upsample(self, request: Request) -> Iterator[str]:
        """The request's prompt as the model itself writes it out, as it grows; the last is the whole."""
        request = complete(request, self.spec)
        assert request.seed is not None
        yield from self.writer.write(request.prompt, [open_picture(p) for p in request.reference], request.seed)
        if self.plan != "resident":
            del self.writer

    @torch.inference_mode()
    def encode(self, request: Request) -> Conditioning:
        """The request's prompt, behind it its negative one where guidance will ask for it, and what pictures show.

        A prompt that a grammar writes out is written as the request's own seed has it.
        """
        request = complete(request, self.spec)
        prompt = written_out(request, self.spec)
        prompts = [prompt, request.negative_prompt] if guided(request, self.spec) else [prompt]
        cond = Conditioning.pack([self.family.encode(prompt) for prompt in prompts])
        shown = [open_picture(picture) for picture in request.reference]
        fill = "fill" in self.spec.abilities
        image, mask = (open_picture(p) if p and fill else None for p in (request.image, request.mask))
        assert request.width is not None
        assert request.height is not None
        return self.family.look(cond, Pictures(request.width, request.height, shown, image, mask))

    @torch.inference_mode()
    def sample(self, request: Request, cond: Conditioning, noise: Tensor | None = None) -> Tensor:
        """Latents of the request's `count` pictures, all driven through the model together.

        noise: (B, C, h, w), the start; drawn from the request's seeds where left out, else B counts the pictures.
        """
        request = complete(request, self.spec)
        shape = self.family.latent_shape(request.width, request.height)  # type: ignore[arg-type]
        if noise is not None and noise.shape[1:] != shape:
            size = f"{request.width}x{request.height}"
            raise InputError(f"noise is {tuple(noise.shape)}: a {size} picture takes (B, {', '.join(map(str, shape))})")
        count = request.count if noise is None else len(noise)
        original = self.open_original(request)
        runs = [
            self.start(one, cond, original, None if noise is None else noise[i])
            for i, one in enumerate(singles(request, count))
        ]
        while pending := [run for run in runs if run.query is not None]:
            advance(self.family, pending)
        return torch.stack([run.result for run in runs])

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w) -> pixels (B, 3, H, W) in [0, 1]."""
        return self.family.decode(latents.to(self.device))

    @torch.inference_mode()
    def open_original(self, request: Request) -> Original | None:
        """The picture a request starts from, as pixels, latents and mask; None where it starts from noise."""
        if request.image is None:
            return None
        width, height = request.width, request.height
        assert width is not None
        assert height is not None
        pixels = to_pixels(open_picture(request.image), width, height)
        mask = None if request.mask is None else torch.as_tensor(open_mask(request.mask, (width, height)))
        if "fill" in self.spec.abilities:  # it sees the picture beside the noise, which nothing is mixed into
            return Original(pixels, None, mask)
        return Original(pixels, self.family.encode_image(pixels[None].to(self.device))[0], mask)

    @torch.inference_mode()
    def start(
        self,
        request: Request,
        cond: Conditioning,
        original: Original | None,
        noise: Tensor | None = None,
        around: Around = NOTHING,
    ) -> Run:
        """One picture about to be drawn, waiting at its first query. `request` is complete.

        around: what is done around its blocks, to which the request's step cache comes.
        """
        shape = self.family.latent_shape(request.width, request.height)  # type: ignore[arg-type]
        generator = torch.Generator("cpu").manual_seed(request.seed)  # type: ignore[arg-type]
        if noise is None:
            noise = torch.randn(shape, generator=generator)
        noise = noise.to(self.device, torch.float32)
        ts = SCHEDULES[request.schedule](request.steps, request.shift)  # type: ignore[index]
        latents = None if original is None else original.latents
        if latents is not None:
            ts = ts[start_index(len(ts) - 1, request.strength) :]  # type: ignore[arg-type]
            noise = add_noise(latents, noise, ts[0])
        solver = SOLVERS[request.solver](noise, ts, generator)  # type: ignore[index]
        if original is not None and latents is not None and original.mask is not None:
            mask = latent_mask(original.mask, *shape[1:]).to(self.device)
            solver = keep(solver, latents, mask)
        times = times_asked(request.solver, ts)  # type: ignore[arg-type]
        if guided(request, self.spec) and len(cond) < 2:
            raise InputError(f"guidance {request.guidance} needs the negative prompt too: encode this same request")
        entries = cond if guided(request, self.spec) else cond[0]
        if self.spec.guides == "read":
            entries = replace(entries, guidance=request.guidance)
        if cached(request, self.spec):
            around = replace(around, cache=StepCache(POINTS[request.cache], request.cache_threshold))
        prepared = self.family.prepare(entries, request.width, request.height, times, around)  # type: ignore[arg-type]
        return Run(request, solver, prepared, len(times), noise, around)

    def finish(self, run: Run, original: Original | None) -> Tensor:
        """Pixels (3, H, W) of a run that is done; outside a mask they are the original's own."""
        if not torch.isfinite(run.result).all():
            raise self.overflow()
        pixels = self.decode(run.result[None])[0].cpu()
        if not torch.isfinite(pixels).all():
            raise self.overflow()
        if original is not None and original.mask is not None:
            pixels = paste(original.pixels, pixels, original.mask, FEATHER)
        return pixels

    def overflow(self) -> InputError:
        """What to say when numbers left the range of the model's dtype."""
        name = str(self.dtype).removeprefix("torch.")
        remedy = "use bfloat16 (--dtype bf16)" if self.dtype == torch.float16 else "use float32 (--dtype fp32)"
        return InputError(f"{self.spec.name} in {name} gave numbers that are not finite: it overflows here, {remedy}")

    @cached_property
    def preview(self) -> Any:
        """latents (C, h, w) -> a small picture, by a linear map fitted to this model's autoencoder once."""
        return fit_preview(self.family, self.device)


@dataclass(frozen=True)
class Original:
    """The picture to start from. pixels: (3, H, W) in [0, 1]; latents: (C, h, w); mask: (H, W), 1 repaints.

    latents: None where noise is not mixed with them.
    """

    pixels: Tensor
    latents: Tensor | None
    mask: Tensor | None


class Run:
    """One picture being drawn: a solver, the query it waits for, what the model prepared for it and what is done around
    its blocks."""

    def __init__(
        self,
        request: Request,
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
        self.estimate: Tensor = start  # the clean latents as last foreseen
        self._solver = solver
        self._send(None)

    def samples(self) -> list[Sample]:
        """Whose velocity the pending query needs: of both prompts where guidance is on, else of the first."""
        assert self.query is not None
        return [Sample(*self.query, entry, self.around) for entry in self.entries()]

    def entries(self) -> Sequence[Any]:
        """The prepared prompts of `samples`."""
        assert self.query is not None
        r = self.request
        assert r.guidance is not None  # the request is complete
        on = is_on(self.query.t, r.guidance, r.cfg_truncation, r.guidance_from, r.guidance_until)
        return self.prepared if on else self.prepared[:1]

    def answer(self, velocities: Sequence[Tensor]) -> None:
        """Send the velocity at the pending query, guided if there are two, and move on to the next."""
        assert self.query is not None
        v = velocities[0]
        if len(velocities) == 2:
            v = guide(*velocities, self.request.guidance, self.request.cfg_normalization)  # type: ignore[arg-type]
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
    """Answer the pending query of every run in one packed forward. No cache takes anything over from one that fails."""
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


def singles(request: Request, count: int) -> Iterator[Request]:
    """The requests that draw each picture alone: seeds count up from the first."""
    for i in range(count):
        yield request.model_copy(update={"seed": request.seed + i, "count": 1})  # type: ignore[operator]


def complete(request: Request, spec: Spec) -> Request:
    """The request with every open field taken from the model's defaults. InputError where the model cannot do it."""
    refuse(request, spec)
    width, height = request.width, request.height
    if request.image is not None and (width is None or height is None):
        own = fit_size(open_picture(request.image), spec.multiple)
        width, height = width or own[0], height or own[1]
    elif request.reference and (width is None or height is None):
        own = family_of(spec.family).size_for(spec, open_picture(request.reference[0]).size)
        width, height = width or own[0], height or own[1]
    width, height = width or spec.size[0], height or spec.size[1]
    for name, value in (("width", width), ("height", height)):
        if value % spec.multiple:
            low = value // spec.multiple * spec.multiple
            near = f"{low} or {low + spec.multiple}" if low else f"{spec.multiple}"
            raise InputError(f"{name} {value} is not a multiple of {spec.multiple}: take {near}")
    steps = request.steps or spec.steps
    defaults: dict[str, Any] = {
        "steps": steps,
        "guidance": spec.guidance,
        "shift": shift_for(spec, width, height, steps),
        "solver": spec.solver,
        "schedule": spec.schedule,
        "seed": secrets.randbelow(2**32) if request.seed is None else request.seed,
    }
    if request.image is not None:
        defaults["strength"] = 1.0 if request.mask is not None else spec.strength
    if spec.writer:
        defaults["upsample"] = writes_out(request, spec)
    update = {name: value for name, value in defaults.items() if getattr(request, name) is None}
    return request.model_copy(update={**update, "width": width, "height": height})


def shift_for(spec: Spec, width: int, height: int, steps: int) -> float:
    """The shift that suits a picture of that many pixels, by the model's own rule."""
    tokens = (width // 16) * (height // 16)
    if spec.shift_rule == "dynamic":
        return round(dynamic_shift(tokens), 6)
    return round(empirical_shift(tokens, steps), 6) if spec.shift_rule == "empirical" else spec.shift
