"""`inkstream lora`: what is done with adapters' files (LoRA and relatives)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from inkstream.cli.lines import in_gigabytes, print_facts, print_json
from inkstream.cli.terminal import Terminal
from inkstream.quant import QuantName
from inkstream.types import InputError, Machine

if TYPE_CHECKING:
    from inkstream.engine.files.lora_tools import AdapterFile, Approximated, ModelWeights
    from inkstream.engine.files.sources import Source

lora = App(name="lora", help_format="plaintext", default_parameter=Parameter(negative=""))

Output = Annotated[str, Parameter(alias="-o", show_default=False, help="File to write. It must not exist.")]
For = Annotated[str | None, Parameter(alias="-m", show_default=False)]
To = Literal["kohya", "comfyui", "diffusers", "peft", "lycoris"]
Dtype = Literal["fp32", "bf16", "fp16"]
Json = Annotated[bool, Parameter(show_default=False, help="Print one JSON document on stdout.")]
Rank = Annotated[int | None, Parameter(show_default=False, help="Rank of each layer.")]
Keep = Annotated[
    float | None,
    Parameter(show_default=False, help="Share of each layer's Frobenius norm to keep at least, such as 0.9 or 0.99."),
]


@lora.command
def info(file: str, *, model: For = None, json: Json = False) -> None:
    """Show what an adapter's file is: dialect, kind, ranks, trigger, hashes, metadata, and the size of its changes.

    Parameters
    ----------
    file
        A safetensors file, or a folder of PEFT or diffusers.
    model
        The model that it is for, to compare its changes with the model's weights; default: the known model it fits.
    """
    from inkstream.engine.files.lora_tools import describe

    with Terminal() as terminal:
        opened, weights = read(file, model, terminal)
        facts = describe(opened, weights, lambda done, total: terminal.wait("norms", done, total))
        remarks = opened.lora.report.remarks()
    if json:
        print_json(facts)
        return
    sizes = facts.pop("norms")
    facts["bytes"] = in_gigabytes(facts["bytes"]) if facts["bytes"] > 1e6 else f"{facts['bytes']:,}"
    said = {key: value for key, value in facts.pop("metadata").items() if key != "format"}
    facts["change"] = {
        block: f"norm {one['norm']:.4g}" + (f", {one['relative']:.2%} of the weights" if "relative" in one else "")
        for block, one in sizes.items()
    }
    print_facts({name: value for name, value in facts.items() if value not in ("", 0, {}, [])})
    print("metadata:" if said else "metadata: none")
    for key, value in said.items():  # keys as they are in the file
        print(f"  {key}: {shortened(value)}")
    for line in remarks:
        terminal.say(line)


@lora.command
def merge(
    model: str,
    *loras: str,
    output: Annotated[str, Parameter(alias="-o", show_default=False, help="Folder to write. It must not exist.")],
    to: Annotated[Literal["diffusers", "native"] | None, Parameter(show_default=False)] = None,
    quant: Annotated[QuantName | None, Parameter(show_default=False)] = None,
    lora_folder: Annotated[str | None, Parameter(show_default=False)] = None,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, help="Download files without asking.")] = False,
) -> None:
    """Merge adapters into a model's weights, and write a whole model.

    Parameters
    ----------
    model
        A model's name, a folder or a single file.
    loras
        The adapters, each as PATH[:STRENGTH].
    to
        The layout, as in `inkstream convert`.
    quant
        The precision of the weights, as in `inkstream convert`; default: that of the model's files.
    lora_folder
        Folder of LoRA files that can be named; default: `loras` in the data folder of inkstream.
    """
    from inkstream.cli.download import agree_to_download, agree_to_loras
    from inkstream.engine.files.loras import check_loras, read_merges
    from inkstream.engine.files.loras import lora_folder as folder_of

    if not loras:
        raise InputError("no adapter was given: name one or more after the model, each as PATH[:STRENGTH]")
    machine = Machine(lora_folder=lora_folder)
    uses, folder = read_merges(loras), folder_of(machine)
    with Terminal() as terminal:
        agree_to_loras(loras, machine, yes, terminal)
        check_loras(loras, folder)
        agree_to_download(model, yes, terminal, commercial_only=False)  # nothing is drawn
        from inkstream.engine.files.convert import convert as write_model

        write_model(model, output, to, terminal.show, quant, loras=uses, lora_folder=folder)
    print(output)


@lora.command
def convert(
    file: str,
    *,
    output: Output,
    to: To,
    dtype: Annotated[Dtype | None, Parameter(show_default=False)] = None,
    model: For = None,
) -> None:
    """Write an adapter with the names that other programs read.

    Parameters
    ----------
    file
        A safetensors file, or a folder of PEFT or diffusers.
    to
        kohya: also musubi and web UIs; comfyui: also ai-toolkit; diffusers; peft: a folder; lycoris: also SimpleTuner.
    dtype
        The dtype of the numbers; default: that of the file.
    model
        The model that it is for; default: the known model that it fits.
    """
    from inkstream.engine.files import lora_tools

    with Terminal() as terminal:
        lora_tools.check_output(output, to)
        opened, _ = read(file, model, terminal, weights=False)
        path = lora_tools.convert(opened, output, to, lora_tools.DTYPES[dtype] if dtype else None)
        for line in opened.lora.report.remarks():
            terminal.say(line)
    print(path)


@lora.command
def extract(
    tuned: str,
    base: str,
    *,
    output: Output,
    rank: Rank = None,
    keep: Keep = None,
    to: To = "comfyui",
    dtype: Dtype = "fp32",
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, help="Download files without asking.")] = False,
) -> None:
    """Write the difference of a tuned model and its base as an adapter.

    Parameters
    ----------
    tuned
        The tuned model: a name, a folder or a single file.
    base
        The model that it was tuned from.
    to
        The dialect, as in `inkstream lora convert`.
    dtype
        The dtype of the numbers.
    """
    from inkstream.engine.files import lora_tools

    lora_tools.check_size(rank, keep)
    lora_tools.check_output(output, to)
    with Terminal() as terminal:
        ours, theirs = (source_of(name, yes, terminal) for name in (tuned, base))
        done = lora_tools.extract(
            ours, theirs, output, rank, keep, to, lora_tools.DTYPES[dtype],
            lambda i, total: terminal.wait("layers", i, total),
        )  # fmt: skip
        tell(done, terminal)


@lora.command
def resize(
    file: str,
    *,
    output: Output,
    rank: Rank = None,
    keep: Keep = None,
    to: Annotated[To | None, Parameter(show_default=False)] = None,
    model: For = None,
) -> None:
    """Write an adapter with lower ranks.

    Parameters
    ----------
    file
        A safetensors file, or a folder of PEFT or diffusers.
    to
        The dialect, as in `inkstream lora convert`; default: that of the file.
    model
        The model that it is for; default: the known model that it fits.
    """
    from inkstream.engine.files import lora_tools

    lora_tools.check_size(rank, keep)
    with Terminal() as terminal:
        opened, _ = read(file, model, terminal, weights=False)
        if to is None and opened.dialect not in opened.lora.report.dialects:
            terminal.say(f"{file} has names that are only read: the new file has those of {opened.dialect}")
        count = lambda i, total: terminal.wait("layers", i, total)  # noqa: E731
        tell(lora_tools.resize(opened, output, rank, keep, to, count), terminal)
        for line in opened.lora.report.remarks():
            terminal.say(line)


@lora.command
def compare(a: str, b: str, *, model: For = None, json: Json = False) -> None:
    """Print the cosine between the changes of two adapters, in total and for each block.

    1: the same change up to its strength; 0: unrelated changes; -1: opposite changes.

    Parameters
    ----------
    a
        A safetensors file, or a folder of PEFT or diffusers.
    b
        The other one.
    model
        The model that they are for, if a change depends on its weights; default: the known model that A fits.
    """
    from inkstream.engine.files import lora_tools

    with Terminal() as terminal:
        ours, weights = read(a, model, terminal)
        path = lora_tools.adapter_file(Path(b).expanduser())
        try:
            lora = lora_tools.read(path, ours.names)
        except InputError as error:
            raise InputError(f"{error} ({a} is for {' or '.join(ours.models)})") from error
        theirs = lora_tools.AdapterFile(path, lora, ours.names, ours.models)
        facts = lora_tools.compare(ours, theirs, weights, lambda i, total: terminal.wait("layers", i, total))
    if json:
        print_json(facts)
        return
    blocks = {block: f"{one['cosine']:z.4f}" for block, one in facts["blocks"].items()}
    print_facts({"cosine": f"{facts['cosine']:z.4f}", "norms": [f"{norm:.4g}" for norm in facts["norms"]], **blocks})


def read(
    file: str, model: str | None, terminal: Terminal, weights: bool = True
) -> tuple[AdapterFile, ModelWeights | None]:  # fmt: skip
    """Read an adapter, and open the weights of the model that was named, if they are here. Nothing is downloaded."""
    from inkstream.cli.download import is_downloaded
    from inkstream.engine.files.lora_tools import ModelWeights, open_file
    from inkstream.engine.files.names import check_name
    from inkstream.families import SPECS

    if model is None:
        return open_file(file), None
    check_name(model)
    if model in SPECS and not (weights and is_downloaded(model)):
        if weights:
            terminal.say(f"{model} is not downloaded: changes are not compared with its weights")
        return open_file(file, SPECS[model]), None
    if model not in SPECS and not Path(model).expanduser().exists():
        raise InputError(f"{model} is not on this machine: give a path, or one of {', '.join(SPECS)}")
    source = source_of(model, False, terminal)
    return open_file(file, source.spec), ModelWeights(source.parts["transformer"])


def source_of(model: str, yes: bool, terminal: Terminal) -> Source:
    """Find a model's files."""
    from inkstream.cli.download import agree_to_download
    from inkstream.engine.files.sources import locate

    agree_to_download(model, yes, terminal, commercial_only=False)  # nothing is drawn
    return locate(model, terminal.show)


def tell(done: Approximated, terminal: Terminal) -> None:
    """Say what an approximation keeps, and print its file."""
    low, high = min(done.ranks, default=0), max(done.ranks, default=0)
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    terminal.say(f"{ranks}: {done.share:.2%} of the change is kept (Frobenius norm)")
    print(done.path)


def shortened(text: str) -> str:
    """Return a value of the metadata as one line of at most 120 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:117] + "..."
