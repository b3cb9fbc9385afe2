"""A loaded model: encode, sample, decode. `advance` is the one denoising loop; its callers drive it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from inkstream.engine.drawing.adapters import KEPT, Adapters
from inkstream.engine.drawing.complete import Complete, complete
from inkstream.engine.drawing.controls import Controls
from inkstream.engine.drawing.larger import times_of
from inkstream.engine.drawing.options import cached, guided
from inkstream.engine.drawing.upscaling import Upscalers
from inkstream.engine.drawing.writing import written_out
from inkstream.engine.files.controls import uses_of
from inkstream.engine.pictures.inputs import to_pixels
from inkstream.engine.pictures.preview import fit_preview
from inkstream.families import ControlNet, Family, Pictures, Writer
from inkstream.flow import add_noise, to_image
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.around.cache import POINTS, StepCache
from inkstream.nn.forward import Sample
from inkstream.sampling.guidance import guide, is_on
from inkstream.sampling.masks import keep, latent_mask, latent_strengths
from inkstream.sampling.solvers import SOLVERS, times_asked
from inkstream.sampling.variety import varied_noise, varied_prompt
from inkstream.sampling.windows import Corner, Windows
from inkstream.types import (
    Conditioning,
    ControlUse,
    Encoded,
    InputError,
    LoraUse,
    Query,
    Request,
    Solver,
    Spec,
    Variation,
    singles,
)


class Model:
    """A loaded model. Latents are (B, C, h, w) float32, pixels are (B, 3, H, W) float32 in [0, 1]."""

    def __init__(
        self,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        placement: str = "resident",
        read_writer: Callable[[], Writer] | None = None,  # if the text encoder's files hold a language model
        loras: Path = Path("loras"),  # the folder of adapters that requests name
        adapters_kept: int = KEPT,  # bytes of adapters that stay for later requests
        controls: Path = Path("controls"),  # the folder of control nets that requests name
        read_control: Callable[[Path, ControlUse], nn.Module] | None = None,  # None: there are no control nets
        upscalers: Path = Path("upscalers"),  # the folder of upscaling models that requests name
        around: Around = NOTHING,  # what is done around the blocks of every picture
    ):
        self.family = family
        self.device = device
        self.dtype = dtype
        self.placement = placement
        self.loras = loras
        self.adapters_kept = adapters_kept
        self.controls = None if read_control is None else Controls(family, controls, read_control)
        self.upscalers = Upscalers(upscalers, device)
        self.around = around
        self._read_writer = read_writer

    @property
    def spec(self) -> Spec:
        return self.family.spec

    @cached_property
    def writer(self) -> Writer:
        """The language model that expands prompts, read at its first use. Raises InputError if it is not there."""
        assert self._read_writer is not None, "only models with the ability `upsample` have a writer"
        return self._read_writer()

    @cached_property
    def adapters(self) -> Adapters:
        """The adapters that requests have used."""
        return Adapters(self.family.transformer, self.spec, self.device, self.dtype, self.loras, self.adapters_kept)

    @torch.inference_mode()
    def upsample(self, request: Complete) -> Iterator[str]:
        """Yield the expanded prompt as it grows. The last text is complete."""
        yield from self.writer.write(request.prompt, request.shown, request.seed)
        if self.placement != "resident":
            del self.writer

    def told(self, request: Complete) -> str:
        """Return the prompt that the model gets for the request's first picture: with a grammar, the expanded one."""
        return written_out(request, self.spec, self.loras)

    @torch.inference_mode()
    def encode(self, request: Request) -> Conditioning:
        """Encode the prompt, the negative prompt if guidance needs it, and the pictures that the model looks at.

        If a grammar expands the prompt, it uses the request's seed.
        """
        whole = complete(request, self.spec)
        prompt = self.told(whole)
        prompts = [prompt, whole.negative_prompt] if guided(whole, self.spec) else [prompt]
        cond = Conditioning.pack([self.family.encode(prompt, len(whole.shown)) for prompt in prompts])
        inpainting = (whole.edit.shown, whole.edit.mask) if whole.edit else ()
        cond = self.family.look(cond, Pictures(whole.width, whole.height, whole.shown, *inpainting))
        texts = [(self.family.encode(region.text).tokens, region, box) for region, box in whole.boxes(self.spec)]
        cond = replace(cond, regions=tuple(Encoded(tokens, box, region.strength) for tokens, region, box in texts))
        if not whole.control:
            return cond
        pictures = [Pictures(whole.width, whole.height, [picture], *inpainting) for picture in whole.followed]
        nets = map(self._net, uses_of(whole))
        return replace(cond, controls=tuple(net.look(self.family, one) for net, one in zip(nets, pictures)))

    def _net(self, use: ControlUse) -> ControlNet:
        assert self.controls is not None, "this model was made without control nets"
        return self.controls.get(use)

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
        """latents: (B, C, h, w) -> pixels (B, 3 or 4, H, W) in [0, 1]."""
        return self.family.decode(latents.to(self.device))

    @torch.inference_mode()
    def open_original(self, request: Complete) -> Original | None:
        """Return the picture that a request starts from, as latents and mask. None: it starts from noise."""
        edit = request.edit
        if request.start is None or "fill" in self.spec.abilities:  # Fill reads the picture beside the noise
            return None
        pixels = to_pixels(edit.start if edit else request.start, request.width, request.height)
        mask = to_pixels(edit.mask, request.width, request.height)[0] if edit else None
        return Original(self.family.encode_image(pixels[None].to(self.device))[0], mask)

    @torch.inference_mode()
    def start(
        self,
        request: Complete,
        cond: Conditioning,
        original: Original | None,
        noise: Tensor | None = None,
        around: Around | None = None,
    ) -> Run:
        """Start one picture. The Run waits at its first query.

        around: what is done around the blocks; the request's step cache and adapters are added to it. Default: the
        model's.
        """
        around = self.around if around is None else around
        shape = self.family.latent_shape(request.width, request.height)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        if noise is None:
            noise = torch.randn(shape, generator=generator)
            if request.variation is not None:
                noise = varied_noise(noise, Variation.read(request.variation))
        noise = start = noise.to(self.device, torch.float32)
        ts, schedule = times_of(request, self.spec, original is not None)
        windows = windows_of(request, shape)
        width, height = request.width, request.height
        if windows is not None:
            width, height = (side * width // shape[2] for side in windows.side[::-1])
        if original is not None:
            start = add_noise(original.latents, noise, ts[0])
        solver = SOLVERS[request.solver](start, ts, generator)
        if original is not None and original.mask is not None:
            if soft := request.mask_soft:
                mask = latent_strengths(original.mask, *shape[1:])
            else:
                mask = latent_mask(original.mask, *shape[1:], smooth="source" in self.spec.abilities)
            mixes = request.solver == "euler"
            solver = keep(solver, original.latents, mask.to(self.device), noise, ts, mixes, soft)
        times = times_asked(request.solver, ts)
        if guided(request, self.spec) and len(cond) < 2:
            raise InputError(f"guidance {request.guidance} needs the negative prompt too: encode this same request")
        entries = cond if guided(request, self.spec) else cond[0]
        if self.spec.guides == "read":
            entries = replace(entries, guidance=request.guidance)
        if request.seed_variance:
            entries = varied_prompt(entries, request.seed, request.seed_variance)
        if cached(request, self.spec) and windows is None:
            around = replace(around, cache=StepCache(POINTS[request.cache], request.cache_threshold))
        loras, nets = [LoraUse.read(lora) for lora in request.loras], uses_of(request)
        if len(nets) != len(cond.controls):
            raise InputError(f"{len(nets)} control nets saw {len(cond.controls)} pictures: encode this same request")
        legs: list[Leg] = []
        for begins, own, on in stretches([*loras, *nets], schedule, times):
            adapters = tuple(self.adapters.get(use) for use in loras if use in on)
            here = replace(around, adapters=(*around.adapters, *adapters)) if adapters else around
            followed = tuple(use if use in on else None for use in nets)
            see = partial(self._see, uses=followed, width=width, height=height, around=here)
            if windows is None or not (entries.regions or any(map(windows.fit, entries.controls))):
                legs.append(Leg(begins, *see(entries, own)))
                continue
            token = self.spec.multiple * shape[2] // request.width
            window = partial(view_of, see, entries, windows, token)
            legs.append(Leg(begins, *window(windows.corners[0], own[0]), window))
        return Run(request, solver, legs, len(times), start, windows)

    def _see(
        self,
        cond: Conditioning,
        times: Sequence[float],
        uses: Sequence[ControlUse | None],
        width: int,
        height: int,
        around: Around,
    ) -> View:
        """Prepare the forwards of a picture or of one window. uses: of each of `cond.controls`, None if it is off."""
        guides = [
            self._net(use).follow(self.family, seen, use, cond, times, around)
            for use, seen in zip(uses, cond.controls)
            if use is not None
        ]
        if guides:
            adapters = [adapter for guide in guides for adapter in guide.adapters]
            residuals = [residual for guide in guides for residual in guide.residuals]
            around = replace(around, adapters=(*around.adapters, *adapters), residuals=(*around.residuals, *residuals))
        return View(around, self.family.prepare(cond, width, height, times, around))

    def finish(self, run: Run) -> Tensor:
        """Return the pixels (3, H, W) of a finished run. Raises InputError if a number is not finite."""
        if not torch.isfinite(run.result).all():
            raise self.overflow()
        pixels = self.decode(run.result[None])[0].cpu()
        if not torch.isfinite(pixels).all():
            raise self.overflow()
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
    """The picture to start from. latents: (C, h, w); mask: (H, W) in [0, 1], 1 repaints; None: all is repainted."""

    latents: Tensor
    mask: Tensor | None


class View(NamedTuple):
    """What is done around the blocks, and what is constant over the steps for each prompt."""

    around: Around
    prepared: Sequence[Any]


class Leg(NamedTuple):
    """A stretch of a run in which the same is done around the blocks."""

    begins: float  # the first time t
    around: Around
    prepared: Sequence[Any]  # of each prompt
    window: Callable[[Corner, float], View] | None = None  # corner, time -> its own, if windows are unlike


class Run:
    """A picture that is being drawn: its solver, the pending query, and the legs of the way, in their order."""

    def __init__(
        self,
        request: Complete,
        solver: Solver,
        legs: Sequence[Leg],
        evaluations: int,
        start: Tensor,
        windows: Windows | None = None,
    ):
        self.request = request
        self.windows = windows  # of the pending query
        self._all_windows, self._turn = windows, 0
        self.evaluations = evaluations
        self.result: Tensor = start
        self.query: Query | None = None
        self.estimate: Tensor = start  # the last prediction of the clean latents
        self._solver = solver
        self._legs: list[Leg] = list(legs)
        self._send(None)

    @property
    def leg(self) -> Leg:
        """The leg of the pending query; the first one if there is none."""
        t = 1.0 if self.query is None else self.query.t
        return next((leg for leg in reversed(self._legs) if t <= leg.begins), self._legs[0])

    @property
    def forwards(self) -> int:
        """The number of forwards that answer the pending query: one, or one for each window."""
        return 1 if self.windows is None else len(self.windows)

    def samples(self, number: int = 0) -> list[Sample]:
        """Return the samples of one forward of the pending query: of both prompts if guidance is on, else of one."""
        assert self.query is not None
        (x, t, to), leg = self.query, self.leg
        view = View(leg.around, leg.prepared)
        if self.windows is not None:
            corner = self.windows.corners[number]
            x = self.windows.cut(x, corner)
            view = leg.window(corner, t) if leg.window else view
        prepared = view.prepared[: len(self.entries())]
        return [Sample(x, t, entry, view.around, i, to) for i, entry in enumerate(prepared)]

    def entries(self) -> Sequence[Any]:
        """Return the prepared prompts that the pending query is answered with."""
        assert self.query is not None
        r = self.request
        on = is_on(self.query.t, r.guidance, r.cfg_truncation, r.guidance_from, r.guidance_until)
        return self.leg.prepared if on else self.leg.prepared[:1]

    def answer(self, answers: Sequence[Sequence[Tensor]]) -> None:
        """Send the velocity at the pending query, and get the next query. answers: of each forward, of its samples.

        The windows are blended, then guidance makes one of two velocities.
        """
        assert self.query is not None
        velocities = answers[0] if self.windows is None else [self.windows.blend(pieces) for pieces in zip(*answers)]
        v = velocities[0]
        if len(velocities) == 2:
            v = guide(v, velocities[1], self.request.guidance, self.request.cfg_normalization)
        self.estimate = to_image(self.query.x, v, self.query.t)
        if self._all_windows is not None:
            self._turn += 1
            self.windows = self._all_windows.moved(self._turn)
        self._send(v)

    def close(self) -> None:
        self._solver.close()

    def _send(self, v: Tensor | None) -> None:
        before = self.leg
        try:
            self.query = next(self._solver) if v is None else self._solver.send(v)
        except StopIteration as end:
            self.query, self.result, self._legs = None, end.value, []
            return
        if self.leg is not before and self.leg.around.cache is not None:
            self.leg.around.cache.forget()


Use = TypeVar("Use", bound="LoraUse | ControlUse")


def stretches(
    uses: Sequence[Use], schedule: Sequence[float], times: Sequence[float]
) -> list[tuple[float, list[float], list[Use]]]:
    """The stretches of a run in which the same uses are on: the first time, all times, the uses."""
    spans = [(time_at(schedule, use.begins), time_at(schedule, use.ends)) for use in uses]
    found: list[tuple[float, list[float], list[Use]]] = []
    on: list[bool] | None = None
    for t in sorted(set(times), reverse=True):
        now = [begin >= t and (t > end or end == 0) for begin, end in spans]
        if now != on:
            on = now
            found.append((t, [], [use for use, wanted in zip(uses, on) if wanted]))
        found[-1][1].append(t)
    return found or [(1.0, [], [])]


def windows_of(request: Complete, shape: tuple[int, int, int]) -> Windows | None:
    """The windows of a request over latents of a shape (C, h, w), if it asks for some and does not fit into one."""
    if request.tile is None:
        return None
    return Windows.over(*shape[1:], side=request.tile * shape[2] // request.width)


def view_of(
    see: Callable[[Conditioning, Sequence[float]], View],
    cond: Conditioning,
    windows: Windows,
    token: int,
    corner: Corner,
    t: float,
) -> View:
    """What one window has, at one time. see: prepares a conditioning; the others: as in `part_of`."""
    return see(part_of(cond, windows, corner, token), [t])


def part_of(cond: Conditioning, windows: Windows, corner: Corner, token: int) -> Conditioning:
    """The conditioning of one window: its part of what control nets see, and the regions in it.

    token: latents along a side of an image token. Edges of boxes are rounded to the window's own tokens.
    """
    starts, sides = corner[::-1] * 2, windows.side[::-1] * 2
    regions: list[Encoded] = []
    for region in cond.regions:
        edges = [
            min(max(round(edge - start / token), 0), side // token)
            for edge, start, side in zip(region.box, starts, sides)
        ]
        left, top, right, bottom = edges
        if left < right and top < bottom:
            regions.append(replace(region, box=(left, top, right, bottom)))
    controls = tuple(windows.cut(seen, corner) if windows.fit(seen) else seen for seen in cond.controls)
    return replace(cond, regions=tuple(regions), controls=controls)


def time_at(schedule: Sequence[float], share: float) -> float:
    """Return the time t after a share of a schedule's steps."""
    return schedule[round(share * (len(schedule) - 1))]


@torch.inference_mode()
def advance(family: Family, runs: Sequence[Run]) -> None:
    """Answer the pending query of every run in one packed forward. If the forward fails, step caches forget it.

    Runs in windows take more forwards, one for each window, so that they need no more memory than a window does.
    """
    answers: list[list[list[Tensor]]] = [[] for _ in runs]
    try:
        for number in range(max(run.forwards for run in runs)):
            own = [(place, run.samples(number)) for place, run in enumerate(runs) if number < run.forwards]
            velocities = iter(family.answer([sample for _, samples in own for sample in samples]))
            for place, samples in own:
                answers[place].append([next(velocities) for _ in samples])
    except BaseException:
        for run in runs:
            if run.leg.around.cache is not None:
                run.leg.around.cache.forget()
        raise
    for run, answer in zip(runs, answers):
        run.answer(answer)
