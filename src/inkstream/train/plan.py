"""Memory and time of training, computed before anything is read: the step runs on meta tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.engine.files.parts import Unset
from inkstream.engine.files.quantise import QUANTS, prepare
from inkstream.engine.machine.fit import BESIDES, Speed
from inkstream.engine.machine.peak import Counting
from inkstream.engine.machine.placement import BESIDE, Placed, pages_seen
from inkstream.families import Family, family_of
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.forward import Sample
from inkstream.nn.offload import is_number
from inkstream.nn.quant import place as put_packed
from inkstream.quant.packed import Weight
from inkstream.train.adapters import AdapterWeights, slots_of
from inkstream.train.models import DTYPES
from inkstream.train.objectives import TAUGHT_GUIDANCE
from inkstream.train.parallel import blocks_of, checkpoint_blocks
from inkstream.train.recipe import Optimiser, Recipe
from inkstream.train.speed import counting
from inkstream.train.stream import recompute_blocks
from inkstream.types import Conditioning, Spec

CAPTION = 128
"""Tokens of a caption, where the real captions are not known yet. FLUX pads its captions to 512."""
STATES = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1, "prodigy": 16.0, "muon": 4.0}
"""Kind of optimiser -> bytes of its state for each weight that learns."""
META = torch.device("meta")


@dataclass(frozen=True)
class Foreseen:
    """The memory of a step on the device in bytes, and the work of a step.

    base: the frozen transformer, or the blocks of it that are there at the same time. learners: weights that learn, in
    float32 and in the compute dtype, gradients, averages and the optimisers' states; with fsdp, this process's shards.
    step: the most that is computed at the same time. weights: of the frozen transformer, wherever it is. flops:
    floating-point operations.
    """

    base: int
    learners: int
    step: int
    weights: int
    numbers: int  # of weights that learn
    flops: int

    @property
    def peak(self) -> int:
        return self.base + self.learners + self.step


def foresee(
    recipe: Recipe, spec: Spec, device: torch.device, stored: Mapping[str, Weight] | None = None, tokens: int = 0,
    processes: int = 1,
) -> Foreseen:  # fmt: skip
    """Compute the memory and work of one step of a recipe on one device, for the first of its sizes.

    spec: of the model. device: cpu or cuda, which need not be here. stored: the transformer's weights as they are in
    its files, on meta; None: in bfloat16. tokens: of a caption, 0: CAPTION. processes: that train together. The
    autoencoder and the text encoders are not counted: they work before the first step.
    """
    if recipe.adapter.kind == "none":
        return _foresee_whole(recipe, spec, tokens, processes)
    settings, run = recipe.adapter, recipe.run
    kind, dtype = family_of(spec.family), DTYPES[run.dtype]
    transformer, weights = _frozen(kind, spec, recipe, stored)
    place = "visiting" if settings.stream else "resident"
    placed = Placed(transformer, place, device, dtype)
    base = placed.always + placed.working
    if device.type == "cpu":
        base = placed.always + BESIDE + _at_home(placed, packed_here=bool(settings.base))
    Placed(transformer, "resident", META, dtype).settle()

    slots = slots_of(spec, settings)
    with META:
        adapter = AdapterWeights(transformer, slots, settings, 0)
    numbers = sum(weight.numel() for weight in adapter.parameters())
    learners = sum(numbers * _bytes_each(optimiser, dtype) for optimiser in optimisers_of(recipe))
    adapter.to(META, dtype).requires_grad_(True)
    if settings.stream or run.checkpointing:
        recompute_blocks(transformer, adapter.weights_in)
    modules = dict.fromkeys(kind.parts) | {"transformer": transformer}
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))  # its texts have a token, where few tokens do not count
    family = kind(spec, modules, dict.fromkeys(kind.tokenizers, words))  # type: ignore[arg-type]
    weights_that_learn = list(adapter.parameters())
    around = Around(adapters=(adapter.apply_to(transformer),))
    step, flops = _measure(family, spec, recipe, around, tokens, weights_that_learn, processes)
    return Foreseen(base, int(learners), step, weights, numbers, flops)


def _foresee_whole(recipe: Recipe, spec: Spec, tokens: int, processes: int) -> Foreseen:
    """Compute the memory and work of a step that trains all weights. A distillation has a frozen teacher beside it."""
    kind, run, dtype = family_of(spec.family), recipe.run, DTYPES[recipe.run.dtype]
    with META, Unset():
        transformer = kind.parts["transformer"].build(spec.transformer)
    transformer.to(dtype).requires_grad_(True)
    weights = list(transformer.parameters())
    numbers = sum(weight.numel() for weight in weights)
    sharded = 0
    if run.parallel == "fsdp":
        layers = [layer for block in blocks_of(transformer) for layer in block.modules()]
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        sharded = sum(weight.numel() for layer in linears for weight in layer.parameters())
    here = numbers - sharded + sharded / processes
    if run.checkpointing:
        checkpoint_blocks(transformer)
    learners = sum(here * _bytes_each(optimiser, dtype) for optimiser in optimisers_of(recipe))
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    modules = dict.fromkeys(kind.parts) | {"transformer": transformer}
    family = kind(spec, modules, dict.fromkeys(kind.tokenizers, words))  # type: ignore[arg-type]
    step, flops = _measure(family, spec, recipe, NOTHING, tokens, weights, processes)
    teacher = numbers * dtype.itemsize if recipe.objective.kind == "distil" else 0
    return Foreseen(teacher, int(learners), step, numbers * dtype.itemsize, numbers, flops)


def _bytes_each(optimiser: Optimiser, dtype: torch.dtype) -> float:
    """Return the bytes that a weight takes while it learns: itself, its gradient, its average and its state."""
    copies = 0 if dtype == torch.float32 else dtype.itemsize  # the gradient in this dtype is freed as it is moved
    return 8.0 + STATES[optimiser.kind] + copies + (4 if optimiser.ema else 0)


def optimisers_of(recipe: Recipe) -> list[Optimiser]:
    """Return the settings of each learner of a run: of a distillation, those of the student and of the critic."""
    own = recipe.own.get("distil")
    if own is None or own.method != "dmd" or not (own.dm or own.gan):
        return [recipe.optimiser]
    return [recipe.optimiser, recipe.own["critic"]]


def _at_home(placed: Placed, packed_here: bool) -> int:
    """Return the bytes on a CPU of the weights that visit: a copy of those in another dtype, and what is read at home.

    Packed bytes are computed with where they are, so there is no copy of them. packed_here: they were packed when they
    were read, so they are no views of a file, and all of them are in memory at all times.
    """
    held, rooms = 0, [0]
    streams = placed.streams.values()
    for guest in (*placed.guests, *(guest for each in streams for guest in (*each.guests, *each.apart))):
        away = zip(guest.away, guest.types)
        copies = sum(weight.home.numel() * dtype.itemsize for weight, dtype in away if weight.home.dtype != dtype)
        packed = sum(weight.home.nbytes for weight in (*guest.away, *guest.here) if not is_number(weight.home))
        stays = packed if packed_here else 0
        held += stays
        rooms.append(copies + pages_seen(guest) - stays)
    return held + max(rooms)


def _frozen(
    kind: type[Family], spec: Spec, recipe: Recipe, stored: Mapping[str, Weight] | None
) -> tuple[nn.Module, int]:
    """Return the transformer on meta, with its weights as they are at home, and their bytes."""
    part, dtype = kind.parts["transformer"], DTYPES[recipe.run.dtype]
    with META, Unset():
        module = part.build(spec.transformer)
    known = stored or {key: tensor.to(torch.bfloat16) for key, tensor in module.state_dict().items()}
    state: Mapping[str, Weight] = {key: known[key] for key in module.state_dict()}
    if recipe.adapter.base:
        state = prepare(state, part, QUANTS[recipe.adapter.base])
    module.load_state_dict(put_packed(module, state, dtype), strict=True, assign=True)
    module.eval().requires_grad_(False)
    return module, sum(tensor.nbytes for tensor in module.state_dict().values())


def references_of(recipe: Recipe) -> int:
    """Return the number of reference pictures of each picture. They are planned at the picture's size."""
    return 1 if recipe.data.source == "edits" else len(recipe.data.references)


def _measure(
    family: Family, spec: Spec, recipe: Recipe, around: Around, tokens: int, weights: Sequence[Tensor], processes: int
) -> tuple[int, int]:
    """Run a piece of a batch forward and backward on meta. Returns the peak of bytes and the operations of a step.

    weights: that learn; their gradients are not counted. In a distillation, the teacher is asked twice for each sample
    while the student's forward waits for its backward.
    """
    width, height = recipe.data.sizes[0]
    count = max(recipe.run.batch // (recipe.run.accumulate * processes), 1)
    asked, forward = (2 if recipe.objective.kind == "distil" else 0), 0
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    length = tokens or (CAPTION if spec.family == "zimage" else 512)
    sizes = spec.transformer
    wide = sizes.cap_feat_dim if spec.family == "zimage" else sizes.joint_attention_dim
    pooled = torch.empty(count, sizes.pooled_projection_dim, device=META) if spec.family == "flux1" else None
    attention, counted = _Attention(), Counting()
    with counting() as flops, attention, counted:
        cond = Conditioning(torch.empty(count * length, wide, device=META), (length,) * count, pooled)
        if spec.guides == "read":
            cond = replace(cond, guidance=TAUGHT_GUIDANCE)
        images, noise = (torch.empty(count, *family.latent_shape(width, height), device=META) for _ in range(2))
        seen = tuple(torch.empty_like(images[0]) for _ in range(references_of(recipe)))
        prepared = family.prepare(replace(cond, references=seen), width, height, (), around)
        times = [0.5 + i / 1000 for i in range(count)]  # each sample has a time of its own
        points = torch.lerp(images, noise, 0.5)
        samples = [Sample(x, t, own, around) for x, t, own in zip(points.unbind(), times, prepared)]
        velocity = torch.stack(family.answer(samples))
        if asked:
            with torch.no_grad():
                again = [Sample(x, t, own, around) for x, t, own in zip(points.unbind(), times, prepared)]
                before = flops.get_total_flops() + attention.flops
                family.answer(again * asked)
                forward = (flops.get_total_flops() + attention.flops - before) // asked
        loss = (velocity - (noise - images)).square().mean((1, 2, 3)).mean()
        loss.backward()
    work = (flops.get_total_flops() + attention.flops) * recipe.run.accumulate
    if asked:
        work += _others_work(recipe, forward, work - asked * forward * recipe.run.accumulate)
    return counted.most, work


def _others_work(recipe: Recipe, forward: int, step: int) -> int:
    """Return the operations of a distillation's step besides the student's and the teacher's guidance.

    These are backward simulation, which has half the steps on average, distribution matching, and the critic's turns.
    Of the other methods, only `direct` simulates.
    forward: operations of a piece's forward; step: of the student's own forward and backward of all pieces.
    """
    own, pieces = recipe.own["distil"], recipe.run.accumulate
    rollout = forward * pieces * (own.steps - 1) // 2
    if own.method != "dmd":
        return rollout if own.method == "direct" else 0
    critic = own.critic_turns * (rollout + forward * pieces + step) if len(optimisers_of(recipe)) > 1 else 0
    return rollout + 2 * forward * pieces + critic


class _Attention:
    """Counts attention as a fused kernel, which keeps queries, keys, values and its output for the backward pass.

    Inside, torch's function is replaced: function modes of torch are off in the functions that compute blocks again.
    """

    def __init__(self) -> None:
        self.flops = 0

    def __enter__(self) -> None:
        self.torchs = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda q, k, v, *_, **__: _Fused.apply(self, q, k, v)

    def __exit__(self, *error: object) -> None:
        F.scaled_dot_product_attention = self.torchs


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: _Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        ctx.work = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
        ctx.mode = mode
        mode.flops += ctx.work
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        q, k, v, _ = ctx.saved_tensors
        ctx.mode.flops += int(2.5 * ctx.work)  # the scores again, and four products
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def seconds_of(found: Foreseen, recipe: Recipe, spec: Spec, speed: Speed) -> float:
    """Estimate the seconds of a step. speed: of the device, in the recipe's compute dtype."""
    settings, passes = recipe.adapter, 2 if recipe.adapter.stream or recipe.run.checkpointing else 1
    seconds = found.flops / speed.products * BESIDES
    if settings.base:
        unpacked = speed.unpacked.get({"int8": "w8a8", "int4": "nf4"}.get(settings.base, settings.base))
        numbers = _count_numbers(spec)
        seconds += 0.0 if unpacked is None else passes * recipe.run.accumulate * numbers / unpacked
    if settings.stream:
        brought = 2 * recipe.run.accumulate * found.weights / speed.brought
        seconds = max(seconds, brought)
    return seconds


def _count_numbers(spec: Spec) -> int:
    with META, Unset():
        return sum(p.numel() for p in family_of(spec.family).parts["transformer"].build(spec.transformer).parameters())
