"""The kinds of training."""

from __future__ import annotations

from inkstream.train.distil import Distillation
from inkstream.train.reinforce import Reinforcement
from inkstream.train.tasks import Autoencoding, Flow, Task

TASKS: dict[str, type[Task]] = {
    "flow": Flow,
    "autoencoder": Autoencoding,
    "distil": Distillation,
    "reinforce": Reinforcement,
}
"""Task classes by [objective] kind."""
