"""scheduler_config.json of a diffusers folder: read into a Spec, and written from one. Without torch.

Source: diffusers' FlowMatchEulerDiscreteScheduler, as the FLUX and Z-Image pipelines call it: with the sigmas
1, 1 - 1/n, ... 1/n for n steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from inkstream.types import InputError, ShiftRule, Spec

SCHEDULER = "scheduler/scheduler_config.json"
"""Its path in a folder."""
CLASS = "FlowMatchEulerDiscreteScheduler"
DEFAULTS: Mapping[str, float] = {
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""The values of numbers that a file leaves out."""
REFUSED: Mapping[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "num_train_timesteps": 1000,
}
"""Entries that change the times in a way that is not implemented -> the value that changes nothing."""


def read_scheduler(spec: Spec, documents: Mapping[str, Mapping[str, Any]], dynamic: ShiftRule = "dynamic") -> Spec:
    """The Spec with the shift that the folder's scheduler has, and the solver lcm if it samples stochastically.

    Without a scheduler, the Spec is unchanged. dynamic: the family's rule for a shift that depends on the size. Raises
    InputError where the scheduler would step at other times than ours.
    """
    config = documents.get(SCHEDULER)
    if config is None:
        return spec
    place = f"{spec.name}: {SCHEDULER}"
    declared: Any = documents.get("model_index.json", {}).get("scheduler")
    kind = declared[1] if isinstance(declared, list) and len(declared) == 2 else config.get("_class_name", CLASS)
    if kind != CLASS:
        raise InputError(f"the scheduler of {spec.name} is {kind}: only {CLASS} is known, declare that one")
    shifts = config.get("use_dynamic_shifting") or False
    if not isinstance(shifts, bool):
        raise InputError(f"{place} says use_dynamic_shifting is {shifts!r}: expected true or false")
    for name, neutral in REFUSED.items():
        value = config.get(name, neutral)
        if (value or neutral) != neutral and (shifts or name != "time_shift_type"):
            raise InputError(f"{place} says {name} is {value!r}, which is not implemented: set it to {neutral!r}")
    numbers = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in numbers.items():
        if shifts == (name == "shift"):  # it is not used
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{place} says {name} is {value!r}: expected a number like {DEFAULTS[name]}")
    shift, few_mu, many_mu, few, many = numbers.values()
    if shifts and few == many:
        raise InputError(f"{place} says base_image_seq_len and max_image_seq_len are both {few}: they must differ")
    if not shifts and shift <= 0:
        raise InputError(f"{place} says shift is {shift!r}: expected a number above 0, like 3.0")
    if config.get("stochastic_sampling"):
        spec = replace(spec, solver="lcm")
    if shifts:
        return replace(spec, shift_rule=dynamic, shift_line=(few, many, few_mu, many_mu))
    return replace(spec, shift_rule="fixed", shift=float(shift))


def write_scheduler(spec: Spec) -> dict[str, Any]:
    """The content of a Spec's scheduler_config.json. `read_scheduler` is the inverse."""
    few, many, few_mu, many_mu = spec.shift_line
    dynamic = spec.shift_rule != "fixed"
    return {
        "_class_name": CLASS,
        "num_train_timesteps": 1000,
        "shift": 3.0 if dynamic else spec.shift,  # ignored if the shift is dynamic
        "use_dynamic_shifting": dynamic,
        "base_shift": few_mu,
        "max_shift": many_mu,
        "base_image_seq_len": few,
        "max_image_seq_len": many,
        **({"stochastic_sampling": True} if spec.solver == "lcm" else {}),
    }
