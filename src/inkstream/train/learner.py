"""A learner: modules with float32 weights, averaged weights (EMA), optimisers, a learning rate and a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from inkstream.train.checkpoint import Checkpoint
from inkstream.train.models import DTYPES
from inkstream.train.optim import (
    ema_decay,
    load_optimiser_state,
    make_optimiser,
    optimiser_state,
    rate,
    set_rate,
    update_ema,
)
from inkstream.train.parallel import Team, checkpoint_blocks, compile_blocks, share_out
from inkstream.train.recipe import Optimiser, Recipe
from inkstream.train.weights import Weights
from inkstream.types import InputError

Loss = Callable[[slice], Tensor]
"""Computes the mean loss of a piece of a step's batch."""


class Learner:
    """Modules that one set of optimisers trains together, for example a student or a critic.

    modules: modules by name. A module named like a part of the model (`transformer`, `vae.decoder`) replaces that part
    in the export; a module with any other name is not exported. Names are unique in a run. settings: the optimiser's
    settings; default: the recipe's.
    """

    def __init__(
        self, name: str, modules: Mapping[str, nn.Module], recipe: Recipe, device: torch.device, team: Team,
        settings: Optimiser | None = None,
    ):  # fmt: skip
        self.name = name
        self.run = recipe.run
        self.settings = settings or recipe.optimiser
        self.device = device
        self.team = team
        dtype = DTYPES[self.run.dtype]
        for module in modules.values():
            module.train()
            if self.run.compile:
                compile_blocks(module)
            if self.run.checkpointing:
                checkpoint_blocks(module)
            if team.count > 1 and self.run.parallel == "fsdp":
                share_out(module, device, team, dtype)
        self.weights = Weights(modules, dtype, team, recipe.model.only or ("*",))
        kept = self.weights.masters.items() if self.settings.ema else ()
        self.ema = {name: w.clone() for name, w in kept}
        self.optimisers = make_optimiser(self.weights, self.settings)

    def rate(self, step: int) -> float:
        """Return the learning rate factor, 0 to 1, of a step of the run. step: counted from 0."""
        return rate(step, self.settings, self.run)

    def advance(self, step: int, loss: Loss) -> tuple[Tensor, Tensor]:
        """Do one optimiser step on the loss. Returns the mean loss and the gradient norm, both scalars.

        step: the step of the run, counted from 0.
        """
        set_rate(self.optimisers, self.rate(step), self.settings)
        self.weights.forget()  # zero gradients that another learner's loss left here
        pieces = self.run.accumulate * self.team.count
        total = torch.zeros((), device=self.device)
        for piece in range(self.team.rank, pieces, self.team.count):
            value = loss(slice(piece, None, pieces)) / self.run.accumulate
            value.backward()
            total += value.detach()
        norm = self.weights.collect(self.settings.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.weights.publish()
        if self.ema:
            decay = ema_decay(step, self.settings)
            update_ema(list(self.ema.values()), list(self.weights.masters.values()), decay)
        return self.team.sum(total) / self.team.count, norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return full weights, averaged weights and optimiser state for a Checkpoint. All processes must call it."""
        weights = self.weights.whole(self.weights.masters)
        return weights, self.weights.whole(self.ema), optimiser_state(self.optimisers, self.weights)

    def load(self, saved: Checkpoint) -> None:
        """Restore this learner's part of a checkpoint. Raises InputError if the optimiser's kind or `ema` differs."""
        names = self.weights.masters
        self.weights.load(saved.weights)
        if any(name in saved.ema for name in names) != bool(self.ema):
            raise InputError("[optimiser] ema is on in only one of recipe and checkpoint: set ema as in the checkpoint")
        self.weights.fill(self.ema, saved.ema)
        own = {key: value for key, value in saved.optimiser.items() if key.partition(".")[2] in names}
        load_optimiser_state(self.optimisers, self.weights, own)
