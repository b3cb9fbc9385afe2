"""`load`: from a model's name or path to a Model. Weights are memory-mapped and moved tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from inkstream.engine.drawing.adapters import KEPT
from inkstream.engine.drawing.enhancer import ChatWriter, able, is_address
from inkstream.engine.drawing.model import Model
from inkstream.engine.files.controls import control_folder
from inkstream.engine.files.licences import is_commercial_only
from inkstream.engine.files.loras import lora_folder, read_merges
from inkstream.engine.files.merging import open_merge
from inkstream.engine.files.names import Progress
from inkstream.engine.files.parts import Found, locate_control, locate_writer
from inkstream.engine.files.sources import Source, locate
from inkstream.engine.files.tokenizers import encoder_of, open_tokenizer
from inkstream.engine.files.upscalers import upscaler_folder
from inkstream.engine.machine.encoding import FarEncoder, text_parts
from inkstream.engine.machine.install import Placement, install
from inkstream.engine.machine.placement import PLACEMENTS, Sharing, place_of
from inkstream.families import ControlNet, Writer
from inkstream.nn.attention import check_attention
from inkstream.nn.offload import advise, is_mapped, mapped_ranges
from inkstream.quant.packed import Weight, unpack
from inkstream.types import ControlUse, InputError, Loading, Machine, read_size
from inkstream.weights.files import in_section, read_state
from inkstream.weights.keymap import translate
from inkstream.weights.lora.merge import Merge, merge_into

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
ANY = Machine()
"""The best device there is, with its own dtype."""


def load(name: Path | str, machine: Machine = ANY, progress: Progress | None = None) -> Model:
    """Load a model, ready to draw.

    name: of a known model, OWNER/NAME on the hub, or a path (see `sources.locate`). machine: what the model runs on;
    memory is not looked at, and the default placement is resident. Weights of the machine's dtype stay views of the
    files on disk. Raises InputError, before anything big is read, if a part is missing or does not fit.
    """
    return read_model(open_model(name, machine, progress), machine.placement or "resident", progress)


@dataclass(frozen=True)
class Opened:
    """A model whose files are found and checked. No weights are read."""

    source: Source
    tokenizers: Mapping[str, Any]
    machine: Machine
    device: torch.device
    dtype: torch.dtype
    numbers: Mapping[str, int]  # part -> number of parameters
    crew: Sharing | None = None  # the processes that share the transformer, if there are several
    merge: Merge | None = None  # the adapters to merge into the transformer, until its weights are read

    @property
    def merged(self) -> frozenset[str]:
        """The names of the transformer's weights that adapters change."""
        return self.merge.names if self.merge else frozenset()

    @property
    def away(self) -> list[str]:
        """The parts that work on another machine."""
        return [] if self.machine.text_encoder_server is None else text_parts(self.source)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Part -> the dtype that it computes in."""
        return {part: dtype_of(part, self.dtype, self.device) for part in self.source.parts}


def open_model(name: Path | str, machine: Machine = ANY, progress: Progress | None = None) -> Opened:
    """Find and check a model's files: the first half of `load`."""
    device, dtype = check_machine(machine)
    source = locate(name, progress, is_commercial_only(machine.commercial_only), machine.chosen)
    source = replace(source, spec=able(source.spec, machine))
    tokenizers = {
        name: open_tokenizer(source.family.tokenizers[name], place) for name, place in source.tokenizers.items()
    }
    check_vocabulary(source, tokenizers)
    numbers = {part: sum(p.numel() for p in found.module.parameters()) for part, found in source.parts.items()}
    return Opened(source, tokenizers, machine, device, dtype, numbers, merge=merge_of(source, machine))


def merge_of(source: Source, machine: Machine) -> Merge | None:
    """Read the adapters to merge into the transformer; None if there are none to merge.

    Raises InputError if one is for another model, or if a weight that it changes has a format that is only read here.
    """
    if not machine.merge_lora:
        return None
    merge = open_merge(read_merges(machine.merge_lora), lora_folder(machine), source)
    merge.check(source.parts["transformer"].tensors)
    return merge


def read_model(opened: Opened, placement: str, progress: Progress | None = None) -> Model:
    """Read an opened model's weights: the second half of `load`. An opened model can be read once."""
    tell: Progress = progress or (lambda event: None)
    source, device, dtypes = opened.source, opened.device, opened.dtypes
    merge = opened.merge
    modules = {
        part: found.module
        if part in opened.away
        else read(
            found,
            Placement(device, dtypes[part], place_of(placement, part), found.rules),
            partial(_tell, tell, part),
            part=part,
            crew=opened.crew,
            machine=opened.machine,
            merge=merge if part == "transformer" else None,
        )
        for part, found in source.parts.items()
    }
    if merge:
        tell(Loading("transformer", note=merge.line()))
        merge.let_go()

    def read_writer() -> Writer:
        if opened.machine.enhancer is not None:
            return open_enhancer(opened.machine, opened.device)
        if opened.away:
            raise InputError("upsample needs the text encoder here: leave text_encoder_server out, or give an enhancer")
        found = locate_writer(source.family, source.parts["text_encoder"], source.spec.name)
        writer: Any = read(found, Placement(device, opened.dtype, rules=found.rules))
        writer.attach(modules["text_encoder"], opened.tokenizers["tokenizer"])
        return writer

    family: Any = source.family(source.spec, modules, opened.tokenizers)
    if opened.machine.text_encoder_server is not None:
        far = FarEncoder(opened.machine.text_encoder_server, source, device, dtypes[opened.away[0]])
        family.encode_tokens = far.encode_tokens
    kept = KEPT if opened.machine.memory is None else 0

    def read_control(path: Path, use: ControlUse) -> nn.Module:
        found = locate_control(source.family, source.spec.name, path)
        cast("ControlNet", found.module).check(family, use)
        return read(found, Placement(device, dtypes["transformer"], place_of(placement, "transformer"), found.rules))

    loras, controls = lora_folder(opened.machine), control_folder(opened.machine)
    upscalers = upscaler_folder(opened.machine)
    return Model(family, device, opened.dtype, placement, read_writer, loras, kept, controls, read_control, upscalers)


def open_enhancer(machine: Machine, device: torch.device) -> Writer:
    """Return what writes prompts out in place of the model's own language model: a server, or another model's."""
    assert machine.enhancer is not None  # or there is none
    if is_address(machine.enhancer):
        return ChatWriter(machine.enhancer, machine.enhancer_model)
    opened = open_model(machine.enhancer, Machine(str(device), machine.dtype))
    source = opened.source
    written = locate_writer(source.family, source.parts["text_encoder"], source.spec.name)
    place = Placement(device, opened.dtypes["text_encoder"], rules=source.parts["text_encoder"].rules)
    encoder = read(source.parts["text_encoder"], place)
    writer: Any = read(written, Placement(device, opened.dtype, rules=written.rules))
    writer.attach(encoder, opened.tokenizers["tokenizer"])
    return writer


def check_vocabulary(source: Source, tokenizers: Mapping[str, Any]) -> None:
    """Raise InputError if a tokenizer has more tokens than its text encoder."""
    for name, tokenizer in tokenizers.items():
        used, known = vocabulary_of(tokenizer), getattr(source.spec, encoder_of(name)).vocab_size
        if used > known:
            place = source.tokenizers[name]
            raise InputError(f"the tokenizer {place} has {used} tokens, the text encoder knows {known}")


def vocabulary_of(tokenizer: Any) -> int:
    """Return the number of tokens of a tokenizer, of the package tokenizers or transformers."""
    return tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else len(tokenizer)


def read(
    found: Found,
    placement: Placement,
    progress: Callable[[int, int], None] = lambda done, total: None,
    packed: bool = True,
    part: str = "",
    crew: Sharing | None = None,
    machine: Machine | None = None,
    merge: Merge | None = None,
) -> nn.Module:
    """Return the part's module with its weights. progress: called with the bytes done and the bytes in all.

    packed: weights that are packed in the file stay packed where a layer can hold them; otherwise they are unpacked.
    merge: adapters that change the weights before they are installed. crew, machine: as in `install`.
    """
    weights = weights_of(found, placement.dtype, packed, merge)
    return install(part, found.module, weights, placement, crew, machine, progress)


@contextmanager
def weights_of(
    found: Found, dtype: torch.dtype, packed: bool, merge: Merge | None = None
) -> Generator[Mapping[str, Weight]]:
    """Yield a part's weights under our names. Weights that need no change are views of the files."""
    wanted = found.module.state_dict().keys()
    raw = in_section(read_state(found.path), found.section)
    state = {key: weight for key, weight in translate(found.rules, raw).items() if key in wanted}
    if not packed:
        state = {key: weight if isinstance(weight, Tensor) else unpack(weight, dtype) for key, weight in state.items()}
    yield merge_into(state, merge, dtype) if merge else state
    let_go(raw)


def let_go(state: Mapping[str, Weight]) -> None:
    """Release the memory of mapped pages that were only copied from. A later read brings them back."""
    ranges = mapped_ranges()
    for weight in state.values():
        for tensor in (weight,) if isinstance(weight, Tensor) else (weight.data, *weight.scales):
            if is_mapped(tensor, ranges):
                advise(tensor, "MADV_DONTNEED")


def check_machine(machine: Machine) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype to use. Raises InputError if the machine has no such device, dtype or attention."""
    if not isinstance(machine, Machine):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"{machine!r} is not a Machine: give Machine({machine!r}), with the device first, then the dtype"
        )
    if machine.memory is not None:
        read_size(machine.memory)
    device = choose_device(machine.device)
    dtype = choose_dtype(machine.dtype, device)
    check_attention(machine.attention, device)
    if machine.placement not in (None, *PLACEMENTS):
        raise InputError(f"placement {machine.placement} is not known: take {', '.join(PLACEMENTS)}")
    return device, dtype


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of that name, or the best there is. Raises InputError if it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name} is not known: take cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps}
    if not there.get(device.type, False):
        best = choose_device()
        raise InputError(f"device {name} is not there, or this build of torch does not support it: take {best}")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of that name, or the device's default: bfloat16 if the hardware computes it, else float32.

    float16 is never a default: activations of Z-Image leave its range.
    """
    if name is None:
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype {name} is not supported: take {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_of(part: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a part. The autoencoder overflows in float16, and on a CPU it is fastest in float32."""
    if part == "vae" and (device.type == "cpu" or dtype == torch.float16):
        return torch.float32
    return dtype


def _tell(progress: Progress, what: str, done: int, total: int) -> None:
    progress(Loading(what, done, total))
