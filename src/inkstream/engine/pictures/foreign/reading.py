"""What is read from another program's metadata, and the names of that program's solvers, schedules and models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, get_args

from inkstream.families.names import SCHEDULES, named
from inkstream.types import LoraUse, MaskFill, ScheduleName, SolverName, Spec


@dataclass
class Reading:
    """Fields for a Request, not yet validated; and ignored settings, by their name in the other program.

    Programs keep two numbers apart: the scale of classifier-free guidance, here in `fields["guidance"]`, and the scale
    that a model reads as an input, here `embedded`. A Request has one field for both, and `settle` chooses.
    """

    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    ignored: dict[str, Any] = field(default_factory=dict[str, Any])
    embedded: Any = None
    embedded_as: str = ""  # its name in the other program; empty: the program's default, which the picture does not say

    def both_scales(self, value: Any) -> None:
        """Takes a number that the program uses for whichever guidance the model has."""
        if value is not None:
            self.fields["guidance"] = self.embedded = value

    def fill(self, other: Reading) -> None:
        """Takes what this lacks from another text of the same picture."""
        if self.embedded is None:
            self.embedded, self.embedded_as = other.embedded, other.embedded_as
        if "model" in other.fields:
            self.ignored.pop("model", None)
        for name, value in other.fields.items():
            if self.fields.get(name) is None and name not in self.ignored:
                self.fields[name] = value
        for name, value in other.ignored.items():
            if self.fields.get(name) is None:
                self.ignored.setdefault(name, value)

    def settle(self, spec: Spec | None = None) -> None:
        """Chooses the guidance and the schedule as the model means them. The numbers left over are ignored.

        spec: of the model that will draw, if it is not the picture's.
        """
        spec = spec or named(str(self.fields.get("model")))
        scale = self.fields.get("guidance")
        if spec is not None and spec.guides == "read":
            if self.embedded is not None:
                self.fields["guidance"] = self.embedded
                if self.embedded_as and as_number(scale) not in (None, 0, 1, as_number(self.embedded)):
                    self.ignored["guidance"] = scale  # the model has no second prediction to guide by
            elif as_number(scale) == 1:  # this says that there is no second prediction
                del self.fields["guidance"]
        elif self.embedded_as:
            self.ignored[self.embedded_as] = self.embedded
        if spec is not None and SCHEDULES.get(str(self.ignored.get("schedule"))) == spec.shift_rule:
            del self.ignored["schedule"]  # it is the model's own

    def use_loras(self, known: Collection[str]) -> None:
        """Takes the LoRAs that have a strength and exactly one of the known names. The others stay ignored."""
        left: list[str] = []
        for told in self.ignored.pop("loras", []):
            name, _, strength = str(told).partition(":")
            number, names = as_number(strength.partition(":")[0]), files_named(name.strip(), known)
            if number is None or len(names) != 1:
                left.append(told)
            else:
                self.fields.setdefault("loras", []).append(str(LoraUse(names[0], number)))
        if left:
            self.ignored["loras"] = left


# Names --------------------------------------------------------------------------------------------------------------

A1111_SOLVERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "res_multistep": "Res Multistep",
    "lcm": "LCM",
}
A1111_SCHEDULES = {"simple": "Simple", "sgm_uniform": "SGM Uniform", "normal": "Normal", "beta": "Beta"}


def plain(name: str) -> str:
    """A name in lower case without spaces and punctuation: `DPM++ 2M` and `dpmpp_2m` give the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


_SOLVERS: dict[str, str] = {
    **{plain(name): name for name in get_args(SolverName)},
    **{plain(theirs): ours for ours, theirs in A1111_SOLVERS.items()},
    **{plain(f"{theirs} FlowMatch"): theirs.lower() for theirs in ("Euler", "Heun", "LCM")},  # SD.Next
    "flowmatcheulerdiscretescheduler": "euler",
    "flowmatchheundiscretescheduler": "heun",
    "flowmatchlcmscheduler": "lcm",
}
_SCHEDULES: dict[str, str] = {plain(name): name for name in get_args(ScheduleName)}
_OTHER_SCHEDULES = (
    "karras", "exponential", "polyexponential", "uniform", "ddim_uniform", "kl_optimal", "align_your_steps", "ays",
    "gits", "turbo", "smoothstep", "discrete", "lcm", "ltx2", "logit_normal", "linear", "cosine", "trailing", "substep",
)  # fmt: skip
"""Schedules of other programs that are not known here. They are only told apart from the solver's name before them."""
_ENDINGS = {plain(name) for name in (*get_args(ScheduleName), *_OTHER_SCHEDULES, *SCHEDULES)}


def find_solver(name: Any, reading: Reading) -> None:
    """Sets `solver` to our solver of that name, and `schedule` if the name ends with one: `euler simple`.

    A folder is dropped: `exponential/res_2s` is res_2s.
    """
    name = str(name)[:200].rpartition("/")[2]
    if plain(name) not in _SOLVERS:
        for cut in reversed([found.start() for found in re.finditer(r"[ _]", name)]):
            if plain(name[:cut]) in _SOLVERS and plain(name[cut:]) in _ENDINGS:
                find_schedule(name[cut + 1 :], reading)
                name = name[:cut]
                break
    _find("solver", name, _SOLVERS, reading)


def find_schedule(name: Any, reading: Reading) -> None:
    """Sets `schedule` to our schedule of that name. "Automatic" leaves the field unset."""
    if plain(str(name)) != "automatic":
        _find("schedule", str(name), _SCHEDULES, reading)


def _find(field: str, name: str, known: Mapping[str, str], reading: Reading) -> None:
    if plain(name) in known:
        reading.fields[field] = known[plain(name)]
        reading.ignored.pop(field, None)
    else:
        reading.ignored[field] = name


def find_model(name: Any, reading: Reading) -> None:
    """Sets `model` to the known model of that file or repository name, in any precision. A finetune does not match."""
    if (spec := named(str(name))) is not None:
        reading.fields["model"] = spec.name
        reading.ignored.pop("model", None)
    else:
        reading.ignored["model"] = name


FINDERS: Mapping[str, Callable[[Any, Reading], None]] = {
    "solver": find_solver,
    "schedule": find_schedule,
    "model": find_model,
}
"""Field -> the function that sets it from a name."""

_LORA = re.compile(r"<lora:([^<>]{1,300})>")


def take_loras(prompt: Any, reading: Reading) -> Any:
    """Removes `<lora:name:weight>` tags from a prompt. The tags are noted as ignored."""
    if isinstance(prompt, str) and (found := _LORA.findall(prompt)):
        add_loras([tag if ":" in tag else f"{tag}:1" for tag in found], reading)
        prompt = _LORA.sub("", prompt).strip()
    return prompt


def add_loras(loras: Iterable[str], reading: Reading) -> None:
    """Notes LoRAs, as `name:strength`, as ignored. Those that are told already are left out."""
    told = {str(name).partition(":")[0] for name in reading.ignored.get("loras", [])}
    if new := [lora for lora in loras if lora.partition(":")[0] not in told]:
        reading.ignored.setdefault("loras", []).extend(new)


def files_named(name: str, known: Collection[str]) -> list[str]:
    """The known names that another program's name of a file means: that name, or one inside a folder.

    Other programs write a name with or without folders and .safetensors.
    """
    name = name.removesuffix(".safetensors").replace("\\", "/")
    short = name.rpartition("/")[2]
    return [one for one in known if one == name] or [one for one in known if one.rpartition("/")[2] == short]


# Values -------------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """The value of a JSON text; None if the text is not JSON or is nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_number(value: Any) -> float | None:
    """A number, also one written as a text; None for anything else."""
    try:
        number = float(value) if is_number(value) or isinstance(value, str) else math.nan
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def take(data: Mapping[str, Any], names: Mapping[str, str], reading: Reading) -> None:
    """Copies the settings that have a value, under our names."""
    for theirs, ours in names.items():
        value, find = data.get(theirs), FINDERS.get(ours)
        if find is not None and value:
            find(value, reading)
        elif find is None and value is not None:
            reading.fields[ours] = take_loras(value, reading)


def take_size(size: Any, reading: Reading) -> None:
    """Reads `1024x768`, `1024*768` or `(1024, 768)`. Any other value is ignored."""
    if found := re.fullmatch(r"\(?\s*(\d{1,6})\s*[x*,×]\s*(\d{1,6})\s*\)?", str(size)[:50]):
        reading.fields["width"], reading.fields["height"] = found.groups()
    elif size:
        reading.ignored["size"] = size


def take_variation(data: dict[str, Any], seed: str, strength: str, reading: Reading) -> None:
    """Takes a variation's seed and strength, which many programs count alike, out of the settings. 0 is off."""
    given = as_number(data.get(strength))
    if given is None:
        return
    if given > 0:
        reading.fields["variation"] = f"{data.get(seed)}:{data[strength]}"
    del data[strength]
    data.pop(seed, None)


def repainting(blur: float | None, padding: float | None) -> dict[str, Any]:
    """Our fields for A1111's `mask_blur`, and for the padding if only the masked area is drawn.

    A1111 blurs a mask's edge by a Gaussian whose sigma is `mask_blur`: two sigmas to each side are most of it.
    """
    fields: dict[str, Any] = {}
    if blur is not None:
        fields |= {"mask_grow": round(2 * blur), "mask_blur": round(4 * blur)}
    if padding is not None:
        fields["crop"] = f"{round(padding)}px"
    return fields


A1111_FILLS: dict[str, MaskFill] = {"fill": "blur", "original": "original", "latent noise": "noise"}
"""A1111's name of a fill of the mask, in the order of its numbers -> ours. Its fourth has no equivalent."""


def take_mask(data: dict[str, Any], reading: Reading) -> None:
    """Takes A1111's settings of a mask out of the settings, and notes that the mask itself is not in the file."""
    blur = as_number(data.get("Mask blur"))
    padding = 32.0 if (padded := as_number(data.get("Masked area padding"))) is None else padded
    found = repainting(blur, padding if data.get("Inpaint area") == "Only masked" else None)
    if fill := A1111_FILLS.get(str(data.get("Masked content"))):
        found["mask_fill"] = fill
        del data["Masked content"]
    if data.get("Mask mode") == "Inpaint not masked":
        found["mask_invert"] = True
        del data["Mask mode"]
    if found:
        reading.fields |= found
        reading.ignored["mask"] = "is not in the file: give image and mask as well"
        for name in ("Mask blur", "Inpaint area", "Masked area padding"):
            data.pop(name, None)


def leftovers(data: Mapping[str, Any], known: set[str], reading: Reading) -> None:
    """Notes every setting outside `known` that has a value as ignored."""
    for key, value in data.items():
        if key not in known and value not in (None, "", [], {}, False):
            reading.ignored.setdefault(key, value)
