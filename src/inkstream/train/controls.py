"""Training of a ControlNet: a new net beside a frozen model, what it sees of each picture, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor, nn

from inkstream.engine.pictures.maps import MAPS, map_of
from inkstream.families import ControlNet, Family, Part, Pictures
from inkstream.nn.around import NOTHING, Around
from inkstream.train.adapterfile import adapter_name
from inkstream.train.models import DTYPES, Start, build, read_sizes
from inkstream.train.pictures import Folder, Source, namesake, open_upright
from inkstream.train.recipe import Recipe
from inkstream.types import Conditioning, ControlUse, InputError
from inkstream.weights.files import write_state
from inkstream.weights.keymap import translate


@dataclass(frozen=True)
class NewNet:
    """A control net that learns. part: of its files."""

    module: ControlNet
    part: Part
    config: Any
    use: ControlUse

    @property
    def weights(self) -> nn.Module:
        return cast(nn.Module, self.module)

    def follow(self, family: Family, seen: Tensor, cond: Conditioning) -> Around:
        return self.module.follow(family, seen, self.use, cond, (), NOTHING)


def part_of(recipe: Recipe, begun: Start) -> Part:
    """Return the kind of net that a recipe trains. Raises InputError if the family has no such kind."""
    settings = recipe.control
    kinds = {kind: part for kind, part in begun.kind.controls.items() if hasattr(part.build, "begin")}
    kind = settings.kind or next(iter(kinds), "")
    if kind not in kinds:
        known = f"take {' or '.join(kinds)}" if kinds else f"{begun.kind.__name__} has none"
        raise InputError(f"[control] kind = {settings.kind!r} is not known: {known}")
    return kinds[kind]


def begin_net(recipe: Recipe, begun: Start, family: Family) -> NewNet:
    """Build a net for the model, which changes nothing yet. Raises InputError if there is no such kind of net."""
    settings, part = recipe.control, part_of(recipe, begun)
    net: type[ControlNet] = part.build  # type: ignore[assignment]
    config = read_sizes(part, "control", settings.sizes, asdict(net.sizes_for(begun.spec.transformer)))
    module = build(part, config, recipe.run.seed)
    cast(ControlNet, module).begin(family)
    use = ControlUse(path=adapter_name(recipe, Path("control")), scale=1.0, mode=settings.mode)
    cast(ControlNet, module).check(family, use)
    return NewNet(cast(ControlNet, module), part, config, use)


@dataclass(frozen=True)
class Maps:
    """The maps of a source's pictures."""

    source: Source
    name: str  # of a map, or a folder

    def key(self) -> Any:
        """Return what the maps depend on, beside the pictures."""
        folder = Path(self.name).expanduser()
        files = sorted(folder.iterdir()) if self.name not in MAPS and folder.is_dir() else []
        return [self.name, [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]]

    def seen(self, net: ControlNet, family: Family, index: int) -> tuple[Tensor, ...]:
        """Return what a net sees of a picture's map."""
        return (net.look(family, Pictures(*self.source.size(index), [self.draw(index)])),)

    def draw(self, index: int) -> Image.Image:
        """Return the map of a picture at the picture's training size, RGB."""
        size = self.source.size(index)
        if self.name in MAPS:
            return map_of(self.name, Image.fromarray(np.asarray(self.source.picture(index))), size)
        folder = Path(self.name).expanduser()
        if not isinstance(self.source, Folder) or not folder.is_dir():
            known = ", ".join(name for name, kind in MAPS.items() if kind.reads == "picture")
            raise InputError(f"[control] map = {self.name!r} is neither a map nor a folder: take {known}")
        return open_upright(namesake(Path(self.source.files[index]), folder, "map"), "RGB").resize(size)


def write_net(path: Path, part: Part, tensors: Mapping[str, Tensor], recipe: Recipe) -> Path:
    """Write the net that a checkpoint's tensors hold, with published names. The file appears when it is complete."""
    own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith("control.")}
    state = {name: tensor.detach().to("cpu", DTYPES[recipe.run.export]) for name, tensor in own.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    rules = next(iter(part.layouts.values()))
    write_state(path, translate(rules, state, back=True))
    return path
