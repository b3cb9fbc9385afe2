"""The command line: one short function per command. Results go to stdout, talk to stderr; torch is imported late."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from cyclopts import App, Parameter

from inkstream import __version__
from inkstream.quant import QuantName

Json = Annotated[bool, Parameter(show_default=False, help="Print one JSON document on stdout.")]
Yes = Annotated[bool, Parameter(alias="-y", show_default=False, help="Download what is missing without asking.")]

app = App(
    name="inkstream",
    version=__version__,
    help="Text to image with Z-Image, on your own machine.",
    help_epilogue="inkstream COMMAND --help lists a command's options; --debug adds the traceback to an error.",
    help_format="plaintext",  # markdown would cost a third of the time of --help
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,  # `main` has a way of its own
)
READ_STDIN = ("--prompt", "--json-prompt")
GENERATE = """Draw pictures of a prompt, or draw a picture again.

The prompt is read from stdin where it is -. Where stdout is a pipe and neither --output nor --json is given, the
picture itself goes there, as a PNG. Options left out take the model's own defaults."""
app.command("inkstream.cli.generate:generate", help=GENERATE)  # by its path: its options need a slow import

REFINE = """Draw pictures anew with another model, by the requests they carry.

Prompt, size and seed are the picture's unless they are given; how the model is run is its own. Where it takes
references it looks at the picture, else it starts from it: a line says which."""
app.command("inkstream.cli.refine:refine", help=REFINE)

DRAFT = """Draw many drafts, choose from a sheet of them, and refine the chosen ones with a bigger model.

A folder takes the drafts, the sheet, what is refined, and the state. The same command goes on where it was stopped,
and so does --resume FOLDER: no picture is drawn twice."""
app.command("inkstream.cli.draft:draft", help=DRAFT)

BATCH = """Draw a file of requests into a folder, many at once.

The same command goes on where it was stopped: pictures that are there are not drawn again, rows that failed are tried
again, rows that have changed are drawn anew. The exit code is 1 where some failed."""
app.command("inkstream.cli.batch:batch", help=BATCH)

EVALUATE = """Draw a suite of prompts with a model and say how much of what was asked is there.

A table goes to stdout; pictures, a contact sheet and the numbers as JSON go to a folder. The same command goes on
where it was stopped: pictures that are there are not drawn again."""
app.command("inkstream.cli.evaluate:evaluate", name="eval", help=EVALUATE)

SERVE = """Serve pictures over HTTP, with a queue that outlives whatever dies.

Only this machine reaches it until a key was made with `inkstream serve keys add NAME`. Ctrl-C stops it; what was being
drawn starts again with the next start."""
app.command("inkstream.cli.serve:serve", help=SERVE)

MCP = """Let agents draw, over the Model Context Protocol on stdin and stdout.

Tools: generate, edit, list_models. Pictures are written to a folder too, so that edit can name them."""
app.command("inkstream.cli.mcp:mcp", help=MCP)

BENCH = """Time us beside other implementations, turn by turn in one run.

What is not installed is left out. Run in the repository, it knows how to drive diffusers and stable-diffusion.cpp."""
app.command("inkstream.cli.bench:bench", help=BENCH)


@app.command
def info(
    picture: Annotated[str, Parameter(help="A PNG, WebP or JPEG, whoever wrote it.")], *, json: Json = False
) -> None:
    """Show what a picture is and the request it carries."""
    from inkstream.cli.lines import print_facts, print_json
    from inkstream.engine.pictures.metadata import describe

    facts = describe(picture)
    print_json(facts) if json else print_facts(facts)


@app.command
def models(*, json: Json = False) -> None:
    """List the models that are known by name."""
    from inkstream.cli.lines import print_json
    from inkstream.cli.models import list_models, print_models

    known = list_models()
    print_json(known) if json else print_models(known)


@app.command
def doctor(
    *, memory: Annotated[str | None, Parameter(name="--for", show_default=False)] = None, json: Json = False
) -> None:
    """Show what this machine has, which models fit it, in which precision, and which one to take.

    Parameters
    ----------
    memory
        Answer for another machine, with a GPU of so much memory, like 8GiB.
    """
    from inkstream.cli.doctor import examine, print_findings
    from inkstream.cli.lines import print_json

    if memory is not None:
        from inkstream.types import read_size

        findings = examine(read_size(memory))
    else:
        findings = examine()
    print_json(findings) if json else print_findings(findings, asked=memory is not None)


@app.command
def convert(
    source: str,
    folder: str,
    *,
    to: Annotated[Literal["diffusers", "native"] | None, Parameter(show_default=False)] = None,
    quant: Annotated[QuantName | None, Parameter(show_default=False)] = None,
    yes: Yes = False,
) -> None:
    """Write a model in another layout, or in fewer bits.

    Parameters
    ----------
    source
        A model's name, a folder or a single file.
    folder
        The folder to write.
    to
        diffusers: every part in its folder, the default; native: the transformer as one file beside the other parts,
        the default with --quant.
    quant
        Pack the weights of transformer and text encoders. fp8: 8-bit floats, multiplied as such where a GPU can; int8,
        nf4, int4: unpacked to be used; w8a8: int8 that is multiplied as such, fast on CPUs; q8_0 to q2_k: GGUF files;
        bf16, fp16: in full.
    """
    from inkstream.cli.download import agree_to_download
    from inkstream.cli.terminal import Terminal
    from inkstream.engine.files.convert import convert

    with Terminal() as terminal:
        agree_to_download(source, yes, terminal, commercial_only=False)  # nothing is drawn
        convert(source, folder, to, terminal.show, quant)
    print(folder)


@app.command
def train(
    recipe: Annotated[str, Parameter(help="A TOML file: see docs/training.md.")],
    *,
    output: Annotated[
        str | None, Parameter(alias="-o", show_default=False, help="Folder of the run; runs/NAME of the recipe if not.")
    ] = None,
    resume: Annotated[bool, Parameter(show_default=False, help="Go on from the folder's last checkpoint.")] = False,
    export: Annotated[
        bool, Parameter(show_default=False, help="Write the model of the last checkpoint and train no further.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        Parameter(name="--set", negative=(), show_default=False, help="Change a key of the recipe: run.steps=50."),
    ] = None,
    json: Json = False,
) -> int:
    """Train a model as a recipe says."""
    from inkstream.cli.train import train

    return train(recipe, output, resume, export, set_ or [], json)


def run() -> NoReturn:
    """The process: `main`, and the way out.

    It is a short one: to take torch apart would take as long as a third of its import, and a thread that is still
    loading or downloading would be waited for, or crash.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def cores_allowed(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """How many cores' time a container may use; None where nothing limits it. torch would start a thread for each core
    that there is."""
    with suppress(OSError, ValueError):
        allowed, period = quota.read_text().split()
        return min(max(1, round(int(allowed) / int(period))), os.cpu_count() or 1)  # ValueError: "max", no limit
    return None


def join_dashes(words: Sequence[str]) -> list[str]:
    """A dash joined to the option before it, if that reads stdin, or else to the prompt's: alone it is no value."""
    joined: list[str] = []
    for word in words:
        if word == "-" and joined and joined[-1] in READ_STDIN:
            joined[-1] += "=-"
        else:
            joined.append("--prompt=-" if word == "-" else word)
    return joined


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit code: 0 done, 1 our own error, 2 what was asked cannot be done, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = join_dashes([word for word in words if word != "--debug"])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost every other process its time
    if cores := cores_allowed():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if not debug:
        warnings.simplefilter("ignore")
    try:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        if isinstance(code, int):
            return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from inkstream.cli.errors import explain

        if debug:
            import traceback

            traceback.print_exc()
        line, code = explain(error)
        print(f"inkstream: {line}", file=sys.stderr)
        return code
    return 0
