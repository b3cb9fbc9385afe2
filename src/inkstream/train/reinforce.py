"""Reinforcement learning: a model draws, rewards value its pictures, and it learns from the better and the worse ones.

The maths is in `preferences`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.larger import times_of
from inkstream.engine.pictures.inputs import to_image as to_picture
from inkstream.flow import add_noise
from inkstream.nn.around import NOTHING
from inkstream.train.data import Data, Place, Preparing
from inkstream.train.learner import Learner, Loss
from inkstream.train.models import Start
from inkstream.train.objectives import TAUGHT_GUIDANCE, Batch, Voice, mix, shift_time
from inkstream.train.parallel import Team
from inkstream.train.pictures import open_source
from inkstream.train.preferences import (
    advantages,
    dpo_loss,
    grpo_loss,
    log_probability,
    nft_loss,
    sde_step,
)
from inkstream.train.recipe import Recipe, key
from inkstream.train.rewards import Asked, Reward, weights_of
from inkstream.train.tasks import Flow, order_of
from inkstream.types import Conditioning, InputError, Request, Spec

SALT_DRAW, SALT_LEARN = range(200, 202)


@dataclass(frozen=True)
class Reinforce:
    """Reinforcement learning, if [objective] kind = reinforce. A batch has [run] batch prompts."""

    method: Literal["nft", "grpo", "dpo"] = key(
        "nft",
        "nft: DiffusionNFT, on the forward process with any solver. grpo: Flow-GRPO, on stochastic steps. dpo: the "
        "best picture of each group against the worst.",
    )
    rewards: tuple[str, ...] = key(
        ("right",),
        "What values the pictures, each with a weight if it is not 1, as in `text:2`. right, text, relation, count, "
        "colour: inkstream's graders, for scenes. ocr: the second reader, for texts in quotation marks. module:NAME: a "
        "function of Python. A URL: a server that gets pictures and prompts.",
    )
    group: int = key(8, "Pictures of each prompt, which are compared with each other.", 2, 256)
    steps: int = key(0, "Steps of the pictures; 0: the model's default.", 0, 1000)
    guidance: float = key(0.0, "Guidance of the pictures; 0: the model's. nft and dpo learn without it.", 0, 100)
    beta: float = key(1.0, "nft: how far the model is seen ahead of the one that drew. dpo: 2000 or more.", 0)
    noise: float = key(0.7, "grpo: noise that the stochastic steps add.", 0, 10)
    clip: float = key(1e-4, "grpo: how far the ratio of probabilities may go from 1 and still teach.", 0)
    kept_steps: int = key(2, "grpo: steps of each picture that are learnt from, chosen at random.", 1)
    stay: float = key(0.0, "Weight of the squared distance to the velocities of the model at the start.", 0)


Velocity = Callable[[Tensor, Tensor], Tensor]
"""Answers velocities at points, (N, C, h, w), of times, (N,)."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of a group for each prompt, one group after the other: N = prompts x group."""

    images: Tensor  # (N, C, h, w) latents
    rewards: Tensor  # (P, K)
    path: Sequence[Tensor] = ()  # grpo: the noise, and the result of each stochastic step, (N, C, h, w)
    probabilities: Sequence[Tensor] = ()  # grpo: the log-probability of each of these results, (N,)


class Rewarding:
    """Draws groups of pictures with a learner's averaged weights, values them, and says what the learner should lower.

    spec: how the pictures are drawn, where [reinforce] does not say it. policy: the model that learns. Raises
    InputError without a reward.
    """

    def __init__(
        self, recipe: Recipe, begun: Start, spec: Spec, device: torch.device, policy: Voice, reward: Reward | None
    ):  # fmt: skip
        if reward is None:
            raise InputError("[reinforce] needs rewards: give `train` a function of pictures")
        self.recipe = recipe
        self.begun = begun
        self.spec = spec
        self.device = device
        self.policy = policy
        self.reward = reward
        self.settings: Reinforce = recipe.own["reinforce"]
        self.guidance = self.settings.guidance or spec.guidance
        self.first = self._as_it_began()
        self.noted: dict[str, list[float]] = {}

    def open(self, data: Data, learner: Learner) -> None:
        """Set the captions that are asked for, and the learner."""
        assert data.captions is not None
        assert data.cond is not None
        self.data, self.learner, self.captions = data, learner, data.captions
        self.source, _ = open_source(self.recipe.data, "train", hold_out=bool(self.recipe.run.held_out))
        self.empty = data.cond[int(data.captions.firsts[-1])]

    def _as_it_began(self) -> Voice | None:
        """Return the model at the start, if a loss needs it: of an adapter, the model without it."""
        if not self.settings.stay and self.settings.method != "dpo":
            return None
        if self.begun.adapter is not None:
            around = self.policy.around
            return Voice(self.policy.family, replace(around, adapters=around.adapters[:-1]))
        module = copy.deepcopy(self.begun.modules["transformer"]).requires_grad_(False)
        return Voice(replace(self.begun, modules={**self.begun.modules, "transformer": module}).family(), NOTHING)

    # Drawing ----------------------------------------------------------------------------------------------------

    def _entries(self, batch: Batch, empty: bool = False) -> Conditioning:
        """Return each prompt of a batch, or the empty one, as often as its group has pictures."""
        assert batch.cond is not None
        count, group = len(batch.images), self.settings.group
        each = [self.empty] * count if empty else [batch.cond[i] for i in range(count)]
        cond = Conditioning.pack([one for one in each for _ in range(group)])
        pooled = None if cond.pooled is None else cond.pooled.to(self.device)
        cond = replace(cond, tokens=cond.tokens.to(self.device), pooled=pooled)
        return replace(cond, guidance=TAUGHT_GUIDANCE) if self.spec.guides == "read" else cond

    def _schedule(self, shape: Sequence[int]) -> tuple[list[float], float]:
        """Return the times of a picture's steps for latents of a shape, and their shift."""
        height, width = (side * self.spec.vae.downscale for side in shape[-2:])
        steps = self.settings.steps or self.spec.steps
        request = Request.model_validate({"width": width, "height": height, "steps": steps})
        whole = complete(request, self.spec)
        return times_of(whole, self.spec, from_picture=False)[0], whole.shift

    @torch.no_grad()
    def _draw(self, batch: Batch, place: Place, piece: slice, generator: torch.Generator) -> Drawn:
        """Draw a group of pictures for each prompt with the averaged weights, and value them."""
        own, count = self.settings, len(place.rows)
        shape = (count, own.group, *batch.images.shape[1:])

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)[piece].flatten(0, 1)

        x = noise()
        path, probabilities = [x], []
        with self.learner.weights.using(self.learner.ema):
            velocity = self._velocity(self.policy, batch, self.guidance)
            for t, after in pairwise(self._schedule(shape)[0]):
                v = velocity(x, torch.full((len(x),), t, device=self.device))
                if own.method == "grpo" and after > 0:
                    mean, std = sde_step(x, v, t, after, own.noise)
                    x = mean + std * noise()
                    path.append(x)
                    probabilities.append(log_probability(x, mean, std))
                else:
                    x = x + (after - t) * v
        rewards = self._value(x, place, piece).view(-1, own.group)
        return Drawn(x, rewards, path, probabilities)

    def _velocity(self, voice: Voice, batch: Batch, guidance: float) -> Velocity:
        """Return the function that answers a voice's velocities for a batch's groups, with guidance."""
        entries, shape = self._entries(batch), batch.images.shape
        if self.spec.guides == "read":
            entries = replace(entries, guidance=guidance)
        prepared = voice.prepare(shape, [entries])
        if guidance <= 1 or self.spec.guides != "twice":
            return lambda x, t: voice.answer(x, t, prepared)
        empty = voice.prepare(shape, [self._entries(batch, empty=True)])

        def guided(x: Tensor, t: Tensor) -> Tensor:
            v = voice.answer(x, t, prepared)
            return v + (guidance - 1) * (v - voice.answer(x, t, empty))

        return guided

    def _value(self, latents: Tensor, place: Place, piece: slice) -> Tensor:
        """Return the weighted mean of the rewards of each picture, (N,)."""
        pictures = [to_picture(one) for one in self.policy.family.decode(latents).float().cpu()]
        asked = []
        indices = self.data.samples[place.samples].indices[place.rows[piece]]
        for index, caption in zip(indices.tolist(), place.captions[piece].tolist()):
            texts = self.source.captions(index, self.recipe.data.captions)
            prompt = texts[caption - int(self.captions.firsts[index])]
            asked += [Asked(prompt, index, self.source)] * self.settings.group
        found = self.reward(pictures, asked)
        weights = weights_of(self.settings.rewards)
        total = torch.zeros(len(pictures))
        for name, values in found.items():
            if wrong := [value for value in values if not 0 <= value <= 1]:
                raise InputError(f"[reinforce] rewards: {name} gave {wrong[0]}: it must give numbers from 0 to 1")
            self.noted.setdefault(name, []).append(sum(values) / len(values))
            total += weights[name] * torch.tensor(list(values))
        return (total / sum(weights.values())).to(self.device)

    # Learning ---------------------------------------------------------------------------------------------------

    def loss(self, step: int, place: Place, batch: Batch, piece: slice) -> Tensor:
        """Return the mean loss of a piece. batch: that piece's prompts, on the device."""
        generator = torch.Generator(self.device).manual_seed(mix(self.recipe.run.seed, SALT_DRAW, step))
        drawn = self._draw(batch, place, piece, generator)
        better = advantages(drawn.rewards)
        self.noted.setdefault("useful", []).append((better != 0).any(1).float().mean().item())
        if self.settings.method == "grpo":
            return self._grpo(drawn, better.flatten(), batch, step)
        count, group = len(place.rows), self.settings.group
        shape = (count, *batch.images.shape[1:])
        learning = torch.Generator(self.device).manual_seed(mix(self.recipe.run.seed, SALT_LEARN, step))
        shift = self._schedule(shape)[1]
        if self.settings.method == "dpo":  # both pictures of a pair share time and noise
            t = shift_time(torch.rand(count, generator=learning, device=self.device), shift)[piece].clamp(min=1e-3)
            noise = torch.randn(shape, generator=learning, device=self.device)[piece]
            return self._dpo(drawn, batch, t, noise)
        t = shift_time(torch.rand(count, group, generator=learning, device=self.device), shift)[piece].flatten()
        t = t.clamp(min=1e-3)
        noise = torch.randn((count, group, *shape[1:]), generator=learning, device=self.device)[piece].flatten(0, 1)
        points = add_noise(drawn.images, noise, t.view(-1, 1, 1, 1))
        with torch.no_grad(), self.learner.weights.using(self.learner.ema):
            old = self._velocity(self.policy, batch, TAUGHT_GUIDANCE)(points, t)
        v = self._velocity(self.policy, batch, TAUGHT_GUIDANCE)(points, t)
        good = (better.flatten() / 5).clamp(-1, 1) / 2 + 0.5
        loss = nft_loss(v, old, points, t, drawn.images, good, self.settings.beta)
        return (loss + self._stay(v, points, t, batch, TAUGHT_GUIDANCE)).mean()

    def _stay(self, v: Tensor, points: Tensor, t: Tensor, batch: Batch, guidance: float) -> Tensor:
        """Return the weighted squared distance of velocities to those of the model at the start, (N,)."""
        if not self.settings.stay or self.first is None:
            return torch.zeros(len(points), device=self.device)
        with torch.no_grad():
            before = self._velocity(self.first, batch, guidance)(points, t)
        return self.settings.stay * (v - before).square().mean((1, 2, 3))

    def _grpo(self, drawn: Drawn, better: Tensor, batch: Batch, step: int) -> Tensor:
        """Return GRPO's loss, the mean over some of the stochastic steps, with the guidance of the pictures."""
        times = self._schedule(batch.images.shape)[0]
        order = torch.Generator().manual_seed(mix(self.recipe.run.seed, SALT_LEARN, step))
        chosen = torch.randperm(len(drawn.probabilities), generator=order)[: self.settings.kept_steps].tolist()
        velocity = self._velocity(self.policy, batch, self.guidance)
        losses = []
        for number in chosen:
            x = drawn.path[number]
            t = torch.full((len(x),), times[number], device=self.device)
            v = velocity(x, t)
            mean, std = sde_step(x, v, times[number], times[number + 1], self.settings.noise)
            now = log_probability(drawn.path[number + 1], mean, std)
            loss = grpo_loss(now, drawn.probabilities[number], better, self.settings.clip)
            losses.append(loss + self._stay(v, x, t, batch, self.guidance))
        return torch.stack(losses).mean()

    def _dpo(self, drawn: Drawn, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """Return DPO's loss of the best and the worst picture of each group. Groups of equals are left out."""
        assert self.first is not None
        groups = drawn.images.unflatten(0, drawn.rewards.shape)
        rows = torch.arange(len(groups), device=self.device)
        pairs = [groups[rows, drawn.rewards.argmax(1)], groups[rows, drawn.rewards.argmin(1)]]
        cond = self._entries(batch)
        each = Conditioning.pack([cond[i] for i in range(0, len(drawn.images), self.settings.group)])
        errors: list[Tensor] = []
        for voice in (self.policy, self.first):
            with torch.set_grad_enabled(voice is self.policy):
                for image in pairs:
                    points = add_noise(image, noise, t.view(-1, 1, 1, 1))
                    v = voice.answer(points, t, voice.prepare(points.shape, [each]))
                    errors.append((v - (noise - image)).square().mean((1, 2, 3)))
        loss = dpo_loss(*errors, beta=self.settings.beta)
        told_apart = (drawn.rewards.max(1).values > drawn.rewards.min(1).values).float()
        return (loss * told_apart).mean()

    def notes(self) -> dict[str, float]:
        """Return the mean of each reward, and `useful`, the share of prompts whose pictures differ in their rewards."""
        found = {name: sum(values) / len(values) for name, values in self.noted.items()}
        self.noted = {}
        return found


class Reinforcement(Flow):
    """Trains a transformer on the rewards of its own pictures."""

    learns: ClassVar[tuple[str, ...]] = ("transformer",)
    tables: ClassVar[Mapping[str, type]] = {"reinforce": Reinforce}
    learners: Sequence[Learner]

    def __init__(
        self, recipe: Recipe, begun: Start, device: torch.device, team: Team, reward: Reward | None = None
    ):  # fmt: skip
        super().__init__(recipe, begun, device, team)
        policy = Voice(self.family, self.around)
        self.rewarding = Rewarding(recipe, begun, begun.spec, device, policy, reward)

    def _order(self) -> Any:
        return replace(order_of(self.recipe, self.team), dropout=0.0)

    def prepare(self) -> Iterator[Preparing]:
        yield from super().prepare()
        self.rewarding.open(self.data, self.learners[0])

    def turns(self, step: int) -> Iterable[tuple[Learner, Loss]]:
        return [(self.learners[0], partial(self._learn, step, self.data.place(step)))]

    def samples(self, step: int) -> int:
        return len(self.data.place(step).rows) * self.rewarding.settings.group

    def _learn(self, step: int, place: Place, piece: slice) -> Tensor:
        return self.rewarding.loss(step, place, self._move(self.data.load(place, piece)), piece)

    def notes(self) -> dict[str, float]:
        return self.rewarding.notes()
