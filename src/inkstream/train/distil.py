"""Distillation: a student learns to draw in a few evaluations, without guidance, what its teacher draws in many.

The student, its teacher and a critic, which knows the student's pictures, are three full models, or two adapters beside
one frozen model. The maths is in `matching`.
"""

# ruff: noqa: RUF009 (key() returns a field)
from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.larger import times_of
from inkstream.engine.drawing.model import Model
from inkstream.flow import add_noise, to_image
from inkstream.train.adapters import AdapterWeights
from inkstream.train.data import Place, Preparing, cache_key, weights_key
from inkstream.train.learner import Learner, Loss
from inkstream.train.matching import (
    cosine,
    fake_loss,
    guidance_direction,
    matching_direction,
    moments_loss,
    normalised,
    pull,
    real_loss,
    rms,
    unshift_time,
)
from inkstream.train.models import DTYPES, Start, start
from inkstream.train.objectives import TAUGHT_GUIDANCE, Batch, Prepared, Voice, mix, shift_time
from inkstream.train.parallel import Team, compile_blocks
from inkstream.train.recipe import Optimiser, Recipe, key
from inkstream.train.reinforce import Reinforce, Rewarding
from inkstream.train.rewards import Reward
from inkstream.train.tasks import SALT_HELD_OUT, Flow, in_turn, order_of
from inkstream.types import Conditioning, InputError, Request, Spec

SALT_STUDENT, SALT_CRITIC, SALT_PATHS = range(100, 103)
Method = Literal["dmd", "guidance", "direct", "trajectory"]


@dataclass(frozen=True)
class Distil:
    """Distillation, if [objective] kind = distil. [critic] has the keys of [optimiser] for the critic."""

    method: Method = key(
        "dmd",
        "dmd: distribution matching, see `dm` and `ca`. guidance: the teacher's guided velocity at noisy training "
        "pictures. direct: from each level to the picture that the teacher draws from the same noise. trajectory: from "
        "each point of the teacher's path to the next.",
    )
    teacher: str = key(
        "",
        "Model that teaches: a known model, OWNER/NAME, a folder or a file. Default: the model that the student starts "
        "from. Give it where the student starts from an earlier stage.",
    )
    steps: int = key(8, "Evaluations that the student draws a picture in.", 1, 100)
    guidance: float = key(0.0, "Guidance of the teacher; 0: its default.", 0, 100)
    teacher_steps: int = key(0, "Steps of the teacher's pictures; 0: its default.", 0, 1000)
    pictures: int = key(2048, "direct, trajectory: pictures that the teacher draws in advance.", 1)
    dm: float = key(1.0, "dmd: weight of distribution matching, which holds the student near the teacher.", 0)
    ca: float = key(1.0, "dmd: weight of CFG augmentation, which turns many steps into few.", 0)
    coupled: bool = key(False, "dmd: both terms at one noisy point with one norm, as in DMD and DMD2.")
    ca_times: Literal["cleaner", "all"] = key(
        "cleaner", "dmd: times of CFG augmentation. cleaner: below the time that the student was asked at."
    )
    times: tuple[float, float] = key((0.02, 0.98), "dmd: range of the times of noisy points, before the shift.")
    noisy_first: int = key(
        0, "dmd: first steps in which distribution matching prefers noisy times, less and less (DMDR's DynaRS)."
    )
    floor: float = key(0.1, "dmd: least divisor of a term's norm.", 0)
    moments: float = key(0.0, "dmd: weight of the KL of each image's means and variances to the teacher's estimate.", 0)
    gan: float = key(0.0, "dmd: weight of a discriminator that tells the training pictures from the student's.", 0)
    beyond: float = key(
        0.0, "dmd: weight of the same loss at points that the student's velocity extrapolates to (CDM).", 0
    )
    levels: Literal["schedule", "random"] = key(
        "schedule", "Times that the student is asked at. random: as many as `steps` or fewer, at any times (CDM)."
    )
    rollout: Literal["euler", "fresh"] = key(
        "euler",
        "How the student gets to a level. euler: as it draws. fresh: each time with new noise, as in DMD2.",
    )
    reward: float = key(
        0.0,
        "dmd: weight of reinforcement learning at the same time (DMDR): see [reinforce].",
        0,
    )
    critic_turns: int = key(2, "dmd: optimiser steps of the critic for each step of the student.", 1, 100)


@dataclass(frozen=True)
class Paths:
    """The points of the teacher's drawings at the student's levels, of the first batches of a run."""

    folder: Path
    count: int  # batches

    def __getitem__(self, number: int) -> Tensor:
        """Return (steps + 1, B, C, h, w), from the noise to the picture."""
        return torch.from_numpy(np.load(self.folder / f"{number:05d}.npy").astype(np.float32))


class Distillation(Flow):
    """Distils a model to few steps without guidance."""

    learns: ClassVar[tuple[str, ...]] = ("transformer",)
    tables: ClassVar[Mapping[str, type]] = {"distil": Distil, "critic": Optimiser, "reinforce": Reinforce}
    learners: Sequence[Learner]

    def __init__(
        self, recipe: Recipe, begun: Start, device: torch.device, team: Team, reward: Reward | None = None
    ):  # fmt: skip
        self.critic_adapter: AdapterWeights | None = None
        if begun.adapter is not None:  # before the blocks learn what to compute again
            adapter, seed = begun.adapter, mix(recipe.run.seed, 1)
            transformer = begun.modules["transformer"]
            self.critic_adapter = AdapterWeights(transformer, adapter.slots, recipe.adapter, seed).to(device)
        super().__init__(recipe, begun, device, team)
        self.settings: Distil = recipe.own["distil"]
        self.master = open_teacher(recipe, begun) if self.settings.teacher else begun
        self.taught = self.master.spec
        self.guidance = self.settings.guidance or self.taught.guidance
        if self.guidance <= 1 or self.taught.guides == "none" or "guidance" not in self.taught.abilities:
            raise InputError(
                f"{self.taught.name} with guidance {self.guidance:g} has none to distil: take another model"
            )
        self.student = Voice(self.family, self.around)
        self.critic_module: nn.Module | None = None
        if self.critic_adapter is None:
            transformer = self.master.modules["transformer"]
            teacher = transformer if self.settings.teacher else copy.deepcopy(transformer)
            if self.settings.method == "dmd":
                self.critic_module = copy.deepcopy(transformer)
                self.critic = self._voice(self.critic_module)
            teacher.to(device, DTYPES[recipe.run.dtype])
            if recipe.run.compile:
                compile_blocks(teacher)
            self.teacher = self._voice(teacher)
        else:
            self.critic_module = self.critic_adapter
            self.teacher = Voice(self.family, replace(self.around, adapters=self.around.adapters[:-1]))
            own = self.critic_adapter.apply_to(begun.modules["transformer"])
            self.critic = Voice(self.family, replace(self.around, adapters=(*self.around.adapters[:-1], own)))
        self.unprompted: dict[tuple[int, ...], Any] = {}  # the teacher's empty prompt, prepared, by the latents' size
        self.schedules: dict[tuple[int, ...], tuple[list[float], float]] = {}  # by the latents' size
        channels = begun.spec.vae.latent_channels
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mix(recipe.run.seed, 2))
            self.discriminator = Discriminator(channels).to(device) if self.settings.gan else None
        self.noted: dict[str, list[Tensor]] = {}
        self.rewarding: Rewarding | None = None
        if self.settings.reward:
            self.rewarding = Rewarding(recipe, begun, self.finish(), device, self.student, reward)

    def _voice(self, transformer: nn.Module) -> Voice:
        return Voice(replace(self.begun, modules={**self.begun.modules, "transformer": transformer}).family())

    def _weights_in(self, block: nn.Module) -> list[nn.Parameter]:
        assert self.critic_adapter is not None
        return [*super()._weights_in(block), *self.critic_adapter.weights_in(block)]

    def _order(self) -> Any:
        return replace(order_of(self.recipe, self.team), dropout=0.0)  # a student draws without guidance

    def prepare(self) -> Iterator[Preparing]:
        yield from super().prepare()
        assert self.data.captions is not None
        assert self.data.cond is not None
        self.empty = self.data.cond[int(self.data.captions.firsts[-1])]
        if self.rewarding is not None:
            self.rewarding.open(self.data, self.learners[0])
        if self.settings.method == "dmd":
            make = partial(Learner, recipe=self.recipe, device=self.device, team=self.team)
            own = self.recipe.own["critic"]
            if self.settings.dm or self.discriminator is not None:
                assert self.critic_module is not None
                self.learners = [*self.learners, make("critic", {"critic": self.critic_module}, settings=own)]
            if self.discriminator is not None:
                judge = {"discriminator": self.discriminator}
                self.learners = [*self.learners, make("discriminator", judge, settings=replace(own, kind="adamw"))]
        if self.settings.method in ("direct", "trajectory"):
            self.paths = yield from in_turn(self.team, self._draw_paths())

    def turns(self, step: int) -> Iterable[tuple[Learner, Loss]]:
        student, *others = self.learners
        yield student, partial(self._student_loss, step)
        for turn in range(self.settings.critic_turns if others else 0):
            yield others[0], partial(self._critic_loss, step, turn)
        for judge in others[1:]:
            yield judge, partial(self._judge_loss, step)

    def _place(self, step: int, turn: int) -> Place:
        """Return the batch of a turn: 0 is the student's, and the critic's follow."""
        if self.settings.method in ("direct", "trajectory"):
            return self.data.place(step % self.paths.count)
        each = 1 + self.settings.critic_turns if len(self.learners) > 1 else 1
        return self.data.place(step * each + turn)

    def samples(self, step: int) -> int:
        return len(self._place(step, 0).rows)

    # Conditions and levels --------------------------------------------------------------------------------------

    def _entries(self, batch: Batch, empty: bool = False) -> list[Conditioning]:
        """Return the batch's prompts, or as many empty ones, with its references."""
        assert batch.cond is not None
        cond = Conditioning.pack([self.empty] * len(batch.images)) if empty else batch.cond
        pooled = None if cond.pooled is None else cond.pooled.to(self.device)
        cond = replace(cond, tokens=cond.tokens.to(self.device), pooled=pooled)
        if self.begun.spec.guides == "read":
            cond = replace(cond, guidance=TAUGHT_GUIDANCE)
        if not batch.references:
            return [cond]
        return [replace(cond[i], references=references) for i, references in enumerate(batch.references)]

    def _schedule(self, shape: Sequence[int]) -> tuple[list[float], float]:
        """Return the times of the student's steps for latents of a shape, from 1 to 0, and their shift."""
        size = tuple(shape[-2:])
        if size not in self.schedules:
            height, width = (side * self.begun.spec.vae.downscale for side in size)
            asked = {"width": width, "height": height, "steps": self.settings.steps}
            request = complete(Request.model_validate(asked), self.begun.spec)
            self.schedules[size] = times_of(request, self.begun.spec, from_picture=False)[0], request.shift
        return self.schedules[size]

    def _levels(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw each sample's times, (B, n + 1), and which of them the student is asked at, (B,): equally often each."""
        count = shape[0]
        times, shift = self._schedule(shape)
        ladder = torch.tensor(times, device=self.device).expand(count, -1)
        if self.settings.levels == "random":
            steps = int(torch.randint(1, self.settings.steps + 1, (), generator=generator, device=self.device))
            between = torch.rand(count, steps - 1, generator=generator, device=self.device)
            between = shift_time(between, shift).sort(1, descending=True).values
            ends = torch.ones(count, 1, device=self.device), torch.zeros(count, 1, device=self.device)
            ladder = torch.cat([ends[0], between, ends[1]], 1)
        steps = ladder.shape[1] - 1
        first = torch.randint(steps, (), generator=generator, device=self.device)
        order = torch.randperm(count, generator=generator, device=self.device)
        return ladder, (order + first) % steps

    def _times(self, shape: Sequence[int], generator: torch.Generator, below: Tensor | None = None) -> Tensor:
        """Draw times of noisy points, (B,): uniform before the shift, and lower than `below`."""
        low, high = self.settings.times
        shift = self._schedule(shape)[1]
        top = torch.full((shape[0],), high, device=self.device)
        if below is not None:
            top = torch.minimum(top, unshift_time(below, shift)).clamp(min=low)
        even = torch.rand(shape[0], generator=generator, device=self.device)
        return shift_time(low + (top - low) * even, shift)

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device=self.device)

    @torch.no_grad()
    def _rollout(
        self, prepared: Prepared, x: Tensor, ladder: Tensor, levels: Tensor, fresh: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Draw with the student from noise to each sample's level. Returns the points and their times."""
        x = x.clone()
        for step in range(int(levels.max())):
            rows = (levels > step).nonzero()[:, 0]
            now, then = ladder[rows, step], ladder[rows, step + 1]
            v = self.student.answer(x[rows], now, [prepared[i] for i in rows.tolist()])
            if fresh:
                x[rows] = add_noise(to_image(x[rows], v, _wide(now)), fresh[step][rows], _wide(then))
            else:
                x[rows] = x[rows] + _wide(then - now) * v
        return x, ladder[torch.arange(len(x), device=self.device), levels]

    def _draw_to_level(
        self, prepared: Prepared, shape: Sequence[int], piece: slice, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch from noise to random levels. shape: of the whole batch. Returns a piece's points and times."""
        ladder, levels = self._levels(shape, generator)
        noise = self._noise(shape, generator)[piece]
        fresh = []
        if self.settings.rollout == "fresh":
            fresh = [self._noise(shape, generator)[piece] for _ in range(ladder.shape[1] - 2)]
        return self._rollout(prepared, noise, ladder[piece], levels[piece], fresh)

    # The teacher ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _guided(self, points: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the teacher's velocity with the prompt, and how it differs from that without: its guidance."""
        entries = self._entries(batch)
        if self.taught.guides == "read":
            others = self.teacher.prepare(points.shape, [replace(cond, guidance=self.guidance) for cond in entries])
        elif batch.references:
            others = self.teacher.prepare(points.shape, self._entries(batch, empty=True))
        else:
            size = tuple(points.shape[-2:])
            if size not in self.unprompted:
                alone = replace(batch, images=batch.images[:1])
                shape = (1, *points.shape[1:])
                self.unprompted[size] = self.teacher.prepare(shape, self._entries(alone, empty=True))
            others = self.unprompted[size] * len(points)
        prepared = [*self.teacher.prepare(points.shape, entries), *others]
        plain, other = self.teacher.answer(torch.cat([points] * 2), torch.cat([t] * 2), prepared).chunk(2)
        return plain, (other - plain) / (self.guidance - 1) if self.taught.guides == "read" else plain - other

    @torch.no_grad()
    def _teach(self, batch: Batch, noise: Tensor) -> Tensor:
        """Draw with the teacher. Returns the points at the student's levels, (steps + 1, B, C, h, w)."""
        ladder, shift = self._schedule(noise.shape)
        pieces = max(1, round((self.settings.teacher_steps or self.taught.steps) / self.settings.steps))
        x, found = noise, [noise]
        for now, then in pairwise(ladder):
            first, last = unshift_time(torch.tensor([now, then]), shift).tolist()
            times = shift_time(torch.linspace(first, last, pieces + 1), shift).tolist()
            for t, after in pairwise(times):
                plain, gap = self._guided(x, torch.full((len(x),), t, device=self.device), batch)
                x = x + (after - t) * (plain + (self.guidance - 1) * gap)
            found.append(x)
        return torch.stack(found)

    def _draw_paths(self) -> Iterator[Preparing | Paths]:
        """Draw the teacher's paths of the run's first batches, or find them in the cache."""
        teacher = weights_key(self.master.modules["transformer"].state_dict(), self.taught.transformer)
        own = self.settings
        wanted = [teacher, own.steps, own.teacher_steps, self.guidance, self.recipe.run.seed, self.recipe.run.batch]
        captions = self.data.captions
        assert captions is not None
        wanted += [weights_key({"tokens": torch.from_numpy(captions.tokens)}, None), self.begun.spec.shift]
        folder = Path(self.recipe.data.cache).expanduser() / f"paths-{cache_key(*wanted)}"
        folder.mkdir(parents=True, exist_ok=True)
        count = -(-own.pictures // self.recipe.run.batch)
        for number in range(count):
            path = folder / f"{number:05d}.npy"
            if path.is_file():
                continue
            yield Preparing("drawing with the teacher", number, count)
            batch = self._move(self.data.load(self.data.place(number)))
            generator = torch.Generator(self.device).manual_seed(mix(self.recipe.run.seed, SALT_PATHS, number))
            drawn = self._teach(batch, self._noise(batch.images.shape, generator))
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.save(file, drawn.half().cpu().numpy())
            part.replace(path)
        yield Paths(folder, count)

    # Losses -----------------------------------------------------------------------------------------------------

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(mix(self.recipe.run.seed, *numbers))

    def _student_loss(self, step: int, piece: slice) -> Tensor:
        if self.settings.method == "guidance":
            return self._guidance_loss(step, piece)
        if self.settings.method != "dmd":
            return self._imitation_loss(step, piece)
        place = self._place(step, 0)
        batch = self._move(self.data.load(place, piece))
        shape = (len(place.rows), *batch.images.shape[1:])
        rewarded = None
        if self.rewarding is not None:  # first, because its pictures are drawn with the averaged weights
            rewarded = self.rewarding.loss(step, place, batch, piece)
        generator = self._generator(SALT_STUDENT, step)
        entries = self._entries(batch)
        with torch.no_grad():
            points, t = self._draw_to_level(self.student.prepare(shape, entries), shape, piece, generator)
        prepared = self.student.prepare(shape, entries)
        v = self.student.answer(points, t, prepared)
        image = to_image(points, v, _wide(t))
        loss = self._dmd_loss(image, t, batch, shape, step, piece, generator)
        if self.settings.beyond:
            share = torch.rand(shape[0], generator=generator, device=self.device)[piece]
            further = t * share.clamp(min=0.02)
            points = points + _wide(further - t) * v.detach()
            image = to_image(points, self.student.answer(points, further, prepared), _wide(further))
            more = self._dmd_loss(image, further, batch, shape, step, piece, generator)
            loss = loss + self.settings.beyond * more
        return loss.mean() if rewarded is None else loss.mean() + self.settings.reward * rewarded

    def _dmd_loss(
        self, x: Tensor, t: Tensor, batch: Batch, shape: Sequence[int], step: int, piece: slice,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """Return each image's loss, (B,). x: the student's images of a piece, asked at t. shape: of the whole batch."""
        own, still = self.settings, x.detach()
        at = self._matching_times(shape, step, generator)[piece]
        noise = self._noise(shape, generator)[piece]
        whole = torch.ones(shape[0], device=self.device)
        whole[piece] = t
        at_ca = self._times(shape, generator, whole if own.ca_times == "cleaner" else None)[piece]
        noise_ca = self._noise(shape, generator)[piece]
        if own.coupled:
            at_ca, noise_ca = at, noise
        points, points_ca = add_noise(still, noise, _wide(at)), add_noise(still, noise_ca, _wide(at_ca))
        terms: dict[str, Tensor] = {}
        estimates: dict[str, Tensor] = {}  # the teacher's, of the image
        with torch.no_grad():
            if own.ca:
                plain, gap = self._guided(points_ca, at_ca, batch)
                terms["ca"] = guidance_direction(gap, self.guidance, at_ca)
                estimates["ca"] = to_image(points_ca, plain, _wide(at_ca))
            if own.dm:
                entries = self._entries(batch)
                theirs = self.critic.answer(points, at, self.critic.prepare(shape, entries))
                plain = self.teacher.answer(points, at, self.teacher.prepare(shape, entries))
                terms["dm"] = matching_direction(plain, theirs, at)
                estimates["dm"] = to_image(points, plain, _wide(at))
                lag = rms(terms["dm"]) / rms(estimates["dm"])
                self._note(lag=lag, cosine=cosine(estimates["dm"], to_image(points, theirs, _wide(at))))
            if own.coupled and len(terms) == 2:
                estimates = dict.fromkeys(terms, estimates["dm"] + terms["ca"])
            terms = {name: normalised(term, still, estimates[name], own.floor) for name, term in terms.items()}
            direction = sum((getattr(own, name) * term for name, term in terms.items()), torch.zeros_like(still))
            self._note(**{name: rms(term) for name, term in terms.items()})
            self._note_images(still, batch)
        loss = pull(x, direction)
        if own.moments:
            loss = loss + own.moments * moments_loss(x, estimates["dm" if own.dm else "ca"])
        if self.discriminator is not None:
            points = add_noise(x, noise, _wide(at))
            loss = loss + own.gan * real_loss(self._judged(points, at, batch)).mean((1, 2, 3))
        return loss

    def _matching_times(self, shape: Sequence[int], step: int, generator: torch.Generator) -> Tensor:
        times = self._times(shape, generator)
        if step >= self.settings.noisy_first:
            return times
        share = torch.rand(shape[0], generator=generator, device=self.device)
        noisy = np.random.default_rng(mix(self.recipe.run.seed, SALT_STUDENT, step)).beta(4, 1.5, shape[0])
        low, high = self.settings.times
        early = shift_time(torch.from_numpy(noisy).to(times).clamp(low, high), self._schedule(shape)[1])
        return torch.where(share < 1 - step / self.settings.noisy_first, early, times)

    def _critic_loss(self, step: int, turn: int, piece: slice) -> Tensor:
        """Return the loss of a critic that learns the velocity of the student's pictures."""
        place = self._place(step, 1 + turn)
        batch = self._move(self.data.load(place, piece))
        shape = (len(place.rows), *batch.images.shape[1:])
        generator = self._generator(SALT_CRITIC, step, turn)
        image, entries = self._drawn(batch, shape, piece, generator)
        t = self._times(shape, generator)[piece]
        noise = self._noise(shape, generator)[piece]
        points = add_noise(image, noise, _wide(t))
        v = self.critic.answer(points, t, self.critic.prepare(shape, entries))
        return (v - (noise - image)).square().mean()

    @torch.no_grad()
    def _drawn(
        self, batch: Batch, shape: Sequence[int], piece: slice, generator: torch.Generator
    ) -> tuple[Tensor, list[Conditioning]]:
        """Draw a batch with the student, each picture from a random level. Returns the images and their prompts."""
        entries = self._entries(batch)
        prepared = self.student.prepare(shape, entries)
        points, t = self._draw_to_level(prepared, shape, piece, generator)
        return to_image(points, self.student.answer(points, t, prepared), _wide(t)), entries

    def _judge_loss(self, step: int, piece: slice) -> Tensor:
        """Return the loss of the discriminator, on training pictures and the student's."""
        place = self._place(step, self.settings.critic_turns)
        batch = self._move(self.data.load(place, piece))
        shape = (len(place.rows), *batch.images.shape[1:])
        generator = self._generator(SALT_CRITIC, step, self.settings.critic_turns)
        image, _ = self._drawn(batch, shape, piece, generator)
        t = self._times(shape, generator)[piece]
        real, fake = (
            self._judged(add_noise(one, self._noise(shape, generator)[piece], _wide(t)), t, batch)
            for one in (batch.images, image)
        )
        return (real_loss(real) + fake_loss(fake)).mean()

    def _judged(self, points: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Return the discriminator's logits, (B, 1, h, w), of noisy pictures and what the critic answers there."""
        assert self.discriminator is not None
        v = self.critic.answer(points, t, self.critic.prepare(points.shape, self._entries(batch)))
        return self.discriminator(points, v, t)

    def _guidance_loss(self, step: int, piece: slice) -> Tensor:
        """Return the error to the teacher's guided velocity at noisy training pictures (arXiv 2210.03142)."""
        place = self._place(step, 0)
        batch = self._move(self.data.load(place, piece))
        shape = (len(place.rows), *batch.images.shape[1:])
        generator = self._generator(SALT_STUDENT, step)
        t = self._times(shape, generator)[piece]
        points = add_noise(batch.images, self._noise(shape, generator)[piece], _wide(t))
        plain, gap = self._guided(points, t, batch)
        v = self.student.answer(points, t, self.student.prepare(shape, self._entries(batch)))
        self._note_images(to_image(points, v, _wide(t)).detach(), batch)
        return (v - (plain + (self.guidance - 1) * gap)).square().mean()

    def _imitation_loss(self, step: int, piece: slice) -> Tensor:
        """Return the error to the teacher's picture, or to the next point of its path."""
        number = step % self.paths.count
        batch = self._move(self.data.load(self.data.place(number), piece))
        path = self.paths[number].to(self.device)
        generator = self._generator(SALT_STUDENT, step)
        ladder, levels = self._levels(path.shape[1:], generator)
        ladder, levels, path = ladder[piece], levels[piece], path[:, piece]
        rows = torch.arange(len(levels), device=self.device)
        entries = self._entries(batch)
        if self.settings.method == "direct":
            with torch.no_grad():
                prepared = self.student.prepare(path.shape, entries)
                points, t = self._rollout(prepared, path[0], ladder, levels, ())
            target = (points - path[-1]) / _wide(t)  # the velocity that goes straight to the teacher's picture
        else:
            points, t = path[levels, rows], ladder[rows, levels]
            target = (path[levels + 1, rows] - points) / _wide(ladder[rows, levels + 1] - t)
        v = self.student.answer(points, t, self.student.prepare(path.shape, entries))
        self._note_images(to_image(points, v, _wide(t)).detach(), batch)
        return (v - target).square().mean()

    # What is told -----------------------------------------------------------------------------------------------

    def _note(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.noted.setdefault(name, []).append(value.detach())

    def _note_images(self, x: Tensor, batch: Batch) -> None:
        """Note how the student's images compare with the training pictures of the same prompts."""
        real = batch.images
        self._note(spread=x.std() / real.std(), drift=rms(x.mean((0, 2, 3)) - real.mean((0, 2, 3))) / real.std())
        self._note(extremes=(x.abs() > real.abs().amax()).float().mean())

    def notes(self) -> dict[str, float]:
        """Return the means of what was noted since the last call.

        dm, ca: RMS of the two terms. ratio: dm / ca. lag: RMS of what distribution matching still asks, as a share of
        the teacher's estimate. cosine: of the critic's and the teacher's estimates. spread: standard deviation of the
        student's latents over that of the training pictures; drift: distance of their channels' means, in such
        deviations; extremes: share of the student's latents beyond the largest of the training pictures.
        """
        found = {name: torch.stack(values).mean().item() for name, values in self.noted.items()}
        self.noted = {}
        if found.get("ca"):
            found["ratio"] = found.get("dm", 0.0) / found["ca"]
        return found if self.rewarding is None else found | self.rewarding.notes()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the mean squared error of the student's pictures to the teacher's from the same noise, held out."""
        assert self.held_out is not None
        errors = []
        for number, wanted in enumerate(self._held_out_pictures):
            batch = self._move(self.held_out.load(self.held_out.place(number)))
            noise = self._held_out_noise(batch, number)
            ladder = torch.tensor(self._schedule(noise.shape)[0], device=self.device).expand(len(noise), -1)
            prepared = self.student.prepare(noise.shape, self._entries(batch))
            last = torch.full((len(noise),), self.settings.steps, device=self.device)
            seen, _ = self._rollout(prepared, noise, ladder, last, ())
            errors.append((seen - wanted).square().mean((1, 2, 3)))
        return {"error": torch.cat(errors).mean().item()}

    def _held_out_noise(self, batch: Batch, number: int) -> Tensor:
        return self._noise(batch.images.shape, torch.Generator(self.device).manual_seed(mix(SALT_HELD_OUT, number)))

    @cached_property
    def _held_out_pictures(self) -> list[Tensor]:
        """The teacher's pictures of the held-out prompts."""
        assert self.held_out is not None
        found = []
        for number in range(len(self.held_out)):
            batch = self._move(self.held_out.load(self.held_out.place(number)))
            found.append(self._teach(batch, self._held_out_noise(batch, number))[-1])
        return found

    def model(self) -> Model:
        family = replace(self.begun, spec=self.finish()).family()
        return Model(family, self.device, DTYPES[self.recipe.run.dtype], around=self.drawing)

    @staticmethod
    def spec_of(spec: Spec, recipe: Recipe) -> Spec:
        """Return the spec of a student: few steps, and no guidance."""
        student = Flow.spec_of(spec, recipe)
        steps = recipe.own["distil"].steps
        return replace(student, steps=steps, guidance=1.0, abilities=student.abilities - {"guidance"})


def open_teacher(recipe: Recipe, begun: Start) -> Start:
    """Read the model that teaches. Raises InputError if more than the transformer's weights differ from the student."""
    name = recipe.own["distil"].teacher
    if begun.adapter is not None:
        raise InputError(f"[distil] teacher = {name!r}: an adapter's teacher is its base; leave teacher out")
    master = start(replace(recipe, model=replace(recipe.model, from_=name, name="")))
    for part in sorted({*begun.modules, *master.modules}):
        one, other = (each.modules[part].state_dict() if part in each.modules else {} for each in (begun, master))
        alike = one.keys() == other.keys() and all(one[key].shape == other[key].shape for key in one)
        if not alike or (part != "transformer" and any(not torch.equal(one[key], other[key]) for key in one)):
            raise InputError(f"[distil] teacher = {name!r}: its {part} is not the student's; take a relative of it")
    return replace(master, modules={"transformer": master.modules["transformer"]})


class Discriminator(nn.Module):
    """Tells noisy latents of training pictures from the student's, patch by patch.

    It sees the latents, the critic's velocity there and the time. DMD2 reads the critic's inner features instead; a
    velocity is the same for all families.
    """

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.into = nn.Conv2d(2 * channels + 1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.out = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, points: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return logits, (B, 1, h / 2, w / 2). points, v: (B, C, h, w); t: (B,)."""
        times = _wide(t).expand(-1, 1, *points.shape[2:])
        x = F.silu(self.into(torch.cat([points, v, times], 1)))
        return self.out(F.silu(self.down(x)))


def _wide(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)
