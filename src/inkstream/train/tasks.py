"""Tasks define what a training step does: flow matching or autoencoding. The training loop uses only this interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model, advance
from inkstream.engine.files.merging import names_of
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.vae import Autoencoder
from inkstream.train.adapters import AdapterWeights, fixed
from inkstream.train.controls import Maps, begin_net
from inkstream.train.data import (
    Data,
    Endless,
    Order,
    Place,
    Preparing,
    crop,
    keep_captions,
    keep_latents,
    keep_pixels,
    keep_seen,
    keep_states,
    look_at,
    stress_of,
    weights_key,
)
from inkstream.train.learner import Learner, Loss
from inkstream.train.models import DTYPES, Start, words_key
from inkstream.train.objectives import (
    Batch,
    autoencode,
    draw_times,
    flow,
    flow_error,
    held_out_times,
    measure_latents,
    mix,
    psnr,
)
from inkstream.train.parallel import Team, compile_blocks
from inkstream.train.pictures import SCENES, Source, Split, open_source
from inkstream.train.recipe import Recipe
from inkstream.train.rewards import Reward
from inkstream.train.stream import recompute_blocks
from inkstream.types import InputError, Request, Spec
from inkstream.weights.lora.read import read_lora

SALT_STEP, SALT_CROP, SALT_HELD_OUT = range(3)
"""Salts: random numbers for different uses of one seed are independent."""
T = TypeVar("T")


class Task(Protocol):
    """One kind of objective. Each step is a function of the recipe, the step number and the weights."""

    learns: ClassVar[tuple[str, ...]]
    """Names that [model] train may hold: parts, or modules inside a part. The first is the default."""
    tables: ClassVar[Mapping[str, type]]
    """Recipe tables of this task only, by name, as frozen dataclasses of `recipe.key`s.

    They are read into `recipe.own`. Keys that a table of type Optimiser leaves out have the values of [optimiser].
    """
    learners: Sequence[Learner]
    """All learners, set by `prepare`. The first has a turn at every step, and its loss is the run's loss."""

    def __init__(
        self, recipe: Recipe, begun: Start, device: torch.device, team: Team, reward: Reward | None = None
    ) -> None:
        """reward: values pictures, for tasks that learn from rewards."""
        ...

    def prepare(self) -> Iterator[Preparing]:
        """Draw, encode and read the training data, then create the learners."""
        ...

    def turns(self, step: int) -> Iterable[tuple[Learner, Loss]]:
        """Return the step's (learner, loss) pairs, in order. A learner may have several turns, or none."""
        ...

    def samples(self, step: int) -> int:
        """Return the batch size of a step in samples."""
        ...

    def measure(self) -> dict[str, float]:
        """Return errors on held-out data. The first one is plotted."""
        ...

    def notes(self) -> dict[str, float]:
        """Return what the losses noted besides since the last call, as means by name."""
        ...

    def sheet(self) -> Image.Image:
        """Return a preview sheet of pictures drawn with the current weights."""
        ...

    def model(self) -> Model | None:
        """Return a model that draws with the current weights; None if the task trains no such model."""
        ...

    def finish(self) -> Spec:
        """Return the spec of the trained model."""
        ...

    @staticmethod
    def spec_of(spec: Spec, recipe: Recipe) -> Spec:
        """Return the spec of the model that a recipe trains, from that of the model that the run starts from."""
        ...


class Flow:
    """Flow matching: trains a transformer, with or without its text encoder, to predict velocities of latents.

    Instead, a control net may learn beside a model that stays as it is.
    """

    learns: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder", "control")
    tables: ClassVar[Mapping[str, type]] = {}
    learners: Sequence[Learner]

    def __init__(
        self, recipe: Recipe, begun: Start, device: torch.device, team: Team, reward: Reward | None = None
    ):  # fmt: skip
        self.recipe = recipe
        self.begun = begun
        self.device = device
        self.team = team
        self.learning = recipe.model.train or self.learns[:1]
        if missing := sorted(begun.spec.abilities & {"fill", "map"}):
            why = f"needs an input picture ({missing[0]}), which training cannot give"
            raise InputError(f"{begun.spec.name} {why}: take another model")
        self.around = self.drawing = NOTHING  # while learning, and in previews
        self.before: Around | None = None  # while learning, without the adapter that learns
        if begun.adapter is None:
            for name, module in begun.modules.items():
                whole = name in self.learning or name == "vae"
                module.to(device, torch.float32 if whole else DTYPES[recipe.run.dtype]).eval().requires_grad_(False)
        else:
            self._adapt(begun.modules["transformer"], begun.adapter)
        self.family = begun.family()
        self.net = begin_net(recipe, begun, self.family) if "control" in self.learning else None
        self.follow = None
        if self.net is not None:
            self.net.weights.to(device).requires_grad_(False)
            self.follow = self.net.follow

    def _adapt(self, transformer: nn.Module, adapter: AdapterWeights) -> None:
        """Let the adapter learn in the transformer's place."""
        ours = adapter.apply_to(transformer)
        helpers = ()
        if place := self.recipe.adapter.assistant:
            lora = read_lora(Path(place).expanduser(), names_of(self.begun.spec))
            helpers = (fixed(lora, transformer, DTYPES[self.recipe.run.dtype], self.device),)
        self.around, self.drawing = Around(adapters=(*helpers, ours)), Around(adapters=(ours,))
        if self.recipe.data.prior_by == "model":
            self.before = Around(adapters=helpers)
        if self.recipe.run.compile:
            compile_blocks(transformer)
        if self.recipe.adapter.stream or self.recipe.run.checkpointing:
            recompute_blocks(transformer, self._weights_in)

    def _weights_in(self, block: nn.Module) -> list[nn.Parameter]:
        """Return the weights that learn and change the layers of a block of a frozen transformer."""
        assert self.begun.adapter is not None
        return self.begun.adapter.weights_in(block)

    def _order(self) -> Order:
        return order_of(self.recipe, self.team)

    @property
    def _encoders(self) -> list[str]:
        """The names of the text encoders."""
        return [name for name in self.begun.modules if name.startswith("text_encoder")]

    def prepare(self) -> Iterator[Preparing]:
        run, order = self.recipe.run, self._order()
        self.data = yield from in_turn(self.team, self._load("train", order))
        self.held_out: Data | None = None
        if run.held_out or (run.preview and not run.prompts):
            few = replace(order, batch=min(order.batch, 32), dropout=0.0, pieces=1)
            self.held_out = yield from in_turn(self.team, self._load("held_out", few))
        if self.begun.adapter is not None:
            learning = {"adapter": self.begun.adapter}
            self.learners = [Learner("adapter", learning, self.recipe, self.device, self.team)]
            return
        if self.data.cond is not None and not run.preview and not run.graded:
            for name in self._encoders:
                self.begun.modules[name].to("cpu")  # all captions are encoded: free GPU memory
        if self.net is not None:
            net = {"control": self.net.weights}
            self.learners = [Learner("control", net, self.recipe, self.device, self.team)]
            return
        self.learners = [model_learner(self.recipe, self.begun, self.learning, self.device, self.team)]

    def _load(self, split: Split, order: Order) -> Iterator[Any]:
        data = self.recipe.data
        source, count = pictures_of(self.recipe, split)
        cache = Path(data.cache).expanduser()
        vae_key = weights_key(self.begun.modules["vae"].state_dict(), self.begun.spec.vae)
        words = words_key(self.begun.words)
        samples = yield from last_of(keep_latents(source, count, cache, data.workers, self.family, vae_key))
        each, references = len(source.references(0)), None
        captions = yield from last_of(keep_captions(source, count, data.captions, cache, self.family, words, each))
        if each:
            see = partial(look_at, source, self.family)
            references = yield from last_of(keep_seen("references", source, count, cache, see, [vae_key, *self._sizes]))
        seen = None
        if self.net is not None:
            maps = Maps(source, self.recipe.control.map)
            see, key = partial(maps.seen, self.net.module, self.family), [vae_key, maps.key(), *self._sizes]
            seen = yield from last_of(keep_seen("maps", source, count, cache, see, [*key, self.net.config]))
        cond = None
        if "text_encoder" not in self.learning:
            begun = self.begun
            keys = [weights_key(begun.modules[name].state_dict(), getattr(begun.spec, name)) for name in self._encoders]
            key = [*keys, words, data.captions, each]
            cond = yield from last_of(keep_states(source, count, captions, cache, self.family, key))
        stress = stress_of(source, count, self.family, data.mask_floor)
        yield Data(samples, captions, order, cond, stress, references, seen)

    @property
    def _sizes(self) -> list[Any]:
        """What the size that a model sees pictures at depends on."""
        return [self.begun.spec.family, self.begun.spec.size]

    def turns(self, step: int) -> Iterable[tuple[Learner, Loss]]:
        return [(self.learners[0], partial(self._loss, step, self.data.place(step)))]

    def samples(self, step: int) -> int:
        return len(self.data.place(step).rows)

    def _loss(self, step: int, place: Place, piece: slice) -> Tensor:
        settings = self.recipe.objective
        generator = torch.Generator(self.device).manual_seed(mix(self.recipe.run.seed, SALT_STEP, step))
        shape = (len(place.rows), *self.data.samples[place.samples].images.shape[1:])
        t = draw_times(shape[0], settings, generator)  # times and noise do not depend on the number of pieces
        noise = torch.randn(shape, generator=generator, device=self.device)  # of the whole batch
        batch = self._move(self.data.load(place, piece))
        arounds = self.around, self.before, self.follow
        return flow(self.family, batch, t[piece], noise[piece], settings, *arounds).mean()

    def _move(self, batch: Batch) -> Batch:
        cond = batch.cond
        if cond is not None:
            pooled = None if cond.pooled is None else cond.pooled.to(self.device)
            cond = replace(cond, tokens=cond.tokens.to(self.device), pooled=pooled)
        own = {"weights": batch.weights, "masks": batch.masks, "prior": batch.prior}
        moved = {name: each.to(self.device) for name, each in own.items() if each is not None}
        images = batch.images.to(self.device)
        references, seen = (
            [tuple(one.to(self.device) for one in each) for each in found] for found in (batch.references, batch.seen)
        )
        return replace(batch, images=images, cond=cond, references=references, seen=seen, **moved)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the velocity's held-out error at fixed times, and the mean of these errors."""
        assert self.held_out is not None
        found = {}
        for t in held_out_times():
            errors = []
            for number in range(len(self.held_out)):
                batch = self._move(self.held_out.load(self.held_out.place(number)))
                generator = torch.Generator(self.device).manual_seed(mix(SALT_HELD_OUT, number))
                noise = torch.randn(batch.images.shape, generator=generator, device=self.device)
                times = torch.full((len(noise),), t, device=self.device)
                errors.append(flow_error(self.family, batch, times, noise, self.around, follow=self.follow))
            found[f"{t:g}"] = torch.cat(errors).mean().item()
        return {"mean": sum(found.values()) / len(found), **found}

    def notes(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Draw the prompts with the inference engine and its default settings. Picture i has seed i.

        Of pairs, each picture stands behind its first reference.
        """
        run = self.recipe.run
        prompts = [self.family.tokens(prompt) for prompt in run.prompts]
        if not prompts:
            assert self.held_out is not None
            captions = self.held_out.captions
            assert captions is not None
            prompts = [captions[int(i)] for i in captions.firsts[:-1][: run.preview_count]]
        model = self.model()
        seen = None if self.held_out is None else self.held_out.references
        empty, pictures = self.family.tokens("", 0 if seen is None else seen.shapes.shape[1]), []
        for i, ids in enumerate(prompts):
            cond = self.family.encode_tokens([ids, empty])
            if seen is not None:
                cond = replace(cond, references=tuple(one.to(self.device) for one in seen[i]))
                before = model.decode(seen[i][0][None])[0].cpu()
                pictures.append(F.interpolate(before[None], self.begun.spec.size[::-1])[0])
            around = None
            if self.net is not None:
                assert self.held_out is not None
                assert self.held_out.seen is not None
                (map_seen,) = self.held_out.seen[i]
                around = self.net.follow(self.family, map_seen.to(self.device), cond)
            drawn = model.start(complete(Request.model_validate({"seed": i}), model.spec), cond, None, around=around)
            while drawn.query is not None:
                advance(model.family, [drawn])
            pictures.append(model.decode(drawn.result[None])[0].cpu())
        return tile(torch.stack(pictures), 0 if seen is None else 6)

    def model(self) -> Model:
        """Return a model with a new family object: a family caches encoded prompts, and the text encoder may change."""
        return Model(self.begun.family(), self.device, DTYPES[self.recipe.run.dtype], around=self.drawing)

    def finish(self) -> Spec:
        return self.spec_of(self.begun.spec, self.recipe)

    @staticmethod
    def spec_of(spec: Spec, recipe: Recipe) -> Spec:
        """Return the spec of a trained model: after pairs it takes references.

        Instructions about scenes are written out by the grammar of edits.
        """
        if recipe.data.source == "edits":
            abilities = spec.abilities | {"references", "upsample", "upsample_references"}
            return replace(spec, abilities=abilities, writer="edits")
        return replace(spec, abilities=spec.abilities | {"references"}) if recipe.data.references else spec


class Autoencoding:
    """Trains an autoencoder to reconstruct pictures."""

    learns: ClassVar[tuple[str, ...]] = ("vae", "vae.decoder")
    tables: ClassVar[Mapping[str, type]] = {}
    learners: Sequence[Learner]

    def __init__(
        self, recipe: Recipe, begun: Start, device: torch.device, team: Team, reward: Reward | None = None
    ):  # fmt: skip
        self.recipe = recipe
        self.begun = begun
        self.device = device
        self.team = team
        self.learning = recipe.model.train or self.learns[:1]
        module = begun.modules["vae"].to(device).requires_grad_(False)
        assert isinstance(module, Autoencoder)
        self.vae = module

    def prepare(self) -> Iterator[Preparing]:
        run = self.recipe.run
        order = order_of(self.recipe, self.team)
        self.data = yield from in_turn(self.team, self._load("train", order))
        self.held_out: Data | None = None
        if run.held_out or run.preview:
            few = replace(order, batch=min(order.batch, 16), pieces=1)
            self.held_out = yield from in_turn(self.team, self._load("held_out", few))
        self.learners = [model_learner(self.recipe, self.begun, self.learning, self.device, self.team)]

    def _load(self, split: Split, order: Order) -> Iterator[Any]:
        source, count = pictures_of(self.recipe, split)
        if not count:
            yield Endless(source, order)
            return
        cache = Path(self.recipe.data.cache).expanduser()
        samples = yield from last_of(keep_pixels(source, count, cache, self.recipe.data.workers))
        yield Data(samples, None, order)

    def turns(self, step: int) -> Iterable[tuple[Learner, Loss]]:
        return [(self.learners[0], partial(self._loss, step, self.data.place(step)))]

    def samples(self, step: int) -> int:
        return len(self.data.place(step).rows)

    def _loss(self, step: int, place: Place, piece: slice) -> Tensor:
        seed, side = self.recipe.run.seed, self.recipe.data.crop
        pixels = self.data.load(place, piece).images
        if side:
            numbers = range(len(place.rows))[piece]
            pixels = crop(pixels, side, [mix(seed, SALT_CROP, step, number) for number in numbers])
        pixels = pixels.to(self.device)
        generator = torch.Generator(self.device).manual_seed(mix(seed, SALT_STEP, step))
        config = self.begun.spec.vae
        grid = (pixels.shape[2] // config.downscale, pixels.shape[3] // config.downscale)
        shape = (len(place.rows), config.latent_channels, *grid)
        noise = torch.randn(shape, generator=generator, device=self.device)[piece]
        dtype = next(self.vae.parameters()).dtype
        return autoencode(self.vae, pixels.to(dtype), noise.to(dtype), self.recipe.objective)[0].mean()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the L1 error and the PSNR of held-out pictures, without crops."""
        assert self.held_out is not None
        found: list[tuple[float, float]] = []
        for number in range(len(self.held_out)):
            pixels = self.held_out.load(self.held_out.place(number)).images.to(self.device)
            seen = self._again(pixels)
            found.append(((seen - pixels).abs().mean().item(), psnr(seen, pixels)))
        l1, ratio = (sum(values) / len(found) for values in zip(*found))
        return {"l1": l1, "psnr": ratio}

    def notes(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Return held-out pictures, each with its reconstruction below it."""
        assert self.held_out is not None
        pixels = self.held_out.load(self.held_out.place(0)).images[:8].to(self.device)
        return tile(torch.cat([pixels, self._again(pixels)]).cpu() / 2 + 0.5, len(pixels))

    def model(self) -> None:
        return None

    def _again(self, pixels: Tensor) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        return self.vae.decode(self.vae.encode(pixels.to(dtype))).float()

    @staticmethod
    def spec_of(spec: Spec, recipe: Recipe) -> Spec:
        return spec

    def finish(self) -> Spec:
        """Measure the latents' mean and spread and write them into the config. They stay if only the decoder learnt."""
        if self.learning != ("vae",):
            return self.begun.spec
        dtype = next(self.vae.parameters()).dtype
        batches = [self.data.load(self.data.place(i)).images.to(self.device, dtype) for i in range(8)]
        shift, scale = measure_latents(self.vae, batches)
        vae = replace(self.begun.spec.vae, shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
        return replace(self.begun.spec, vae=vae)


def model_learner(recipe: Recipe, begun: Start, names: Sequence[str], device: torch.device, team: Team) -> Learner:
    """Return one learner for parts of the model or modules inside them. names: as in [model] train."""
    parts = nn.ModuleDict(begun.modules)
    return Learner("model", {name: parts.get_submodule(name) for name in names}, recipe, device, team)


def order_of(recipe: Recipe, team: Team) -> Order:
    run = recipe.run
    pieces = run.accumulate * team.count
    return Order(run.batch, pieces, recipe.data.pool, mix(run.seed, recipe.data.first), recipe.objective.dropout)


def pictures_of(recipe: Recipe, split: Split) -> tuple[Source, int]:
    """Return the pictures of a split and the number to use."""
    source, count = open_source(recipe.data, split, hold_out=bool(recipe.run.held_out))
    if split == "held_out":
        count = recipe.run.held_out_count if recipe.data.source in SCENES else min(recipe.run.held_out_count, count)
    return source, count


def in_turn(team: Team, making: Iterator[Preparing | T]) -> Iterator[Any]:
    """Run `making` in the first process, then in the others, which find the results in the caches.

    Returns the last item that is not a Preparing.
    """
    if not team.leads:
        team.wait()
    made = yield from last_of(making)
    if team.leads:
        team.wait()
    return made


def last_of(making: Iterator[Preparing | T]) -> Iterator[Any]:
    """Yield the Preparing messages. Returns the last item that is not a Preparing."""
    made = None
    for made in making:
        if isinstance(made, Preparing):
            yield made
    return made


def tile(pixels: Tensor, columns: int = 0) -> Image.Image:
    """Arrange pictures, (B, 3, H, W) in [0, 1], in a grid. columns: 0 chooses a number."""
    columns = columns or max(1, round(len(pixels) ** 0.5 * 1.3))
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[2:]
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, picture in enumerate((pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)):
        corner = (i % columns * (width + 2), i // columns * (height + 2))
        sheet.paste(Image.fromarray(picture.contiguous().numpy()), corner)
    return sheet
