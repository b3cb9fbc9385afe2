"""The command line: a short function per command. Results go to stdout, messages to stderr; torch is imported late."""

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
Yes = Annotated[bool, Parameter(alias="-y", show_default=False, help="Download missing files without asking.")]

app = App(
    name="inkstream",
    version=__version__,
    help="Text to image on your own machine.",
    help_epilogue="inkstream COMMAND --help lists the options of a command; --debug shows the traceback of an error.",
    help_format="plaintext",  # markdown would cost a third of the time of --help
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,  # `main` handles it
)
READ_STDIN = ("--prompt", "--json-prompt")
GENERATE = """Draw pictures of a prompt, or draw a picture again.

The prompt - reads stdin. If stdout is a pipe, the picture goes there as a PNG, unless --output or --json is given.
Missing options have the model's defaults."""
app.command("inkstream.cli.generate:generate", help=GENERATE)  # given as a path, because its options import slowly

REFINE = """Draw pictures again with another model, using the requests in their metadata.

The prompt, size and seed come from the picture, unless given. Steps, guidance and similar options have the model's
defaults. A model that takes references gets the picture as a reference; another model starts from the picture. A line
says which."""
app.command("inkstream.cli.refine:refine", help=REFINE)

DRAFT = """Draw many drafts, choose from a contact sheet, and refine the chosen drafts with a bigger model.

The folder gets the drafts, the contact sheet, the refined pictures and the state. The same command, or
--resume FOLDER, resumes an interrupted run: no picture is drawn twice."""
app.command("inkstream.cli.draft:draft", help=DRAFT)

EDIT = """Change a picture as an instruction says.

The instruction is in words, such as "make the circle blue". The rest of the picture stays, as far as the model can. To
keep it exactly, mark the part to change with a mask: see `inkstream generate --image --mask`."""
app.command("inkstream.cli.edit:edit", help=EDIT)

CONTROL = """Draw a map of a picture for models that follow one, or list the maps.

Maps are edges, lines, tones, poses and depth. The map is a picture file, whose path goes to stdout."""
app.command("inkstream.cli.control:control", help=CONTROL)

UPSCALE = """Enlarge pictures with an upscaling model, or by Lanczos resampling. Without pictures, list the models.

The paths of the results go to stdout. Transparency and the request in a picture's metadata stay."""
app.command("inkstream.cli.upscale:upscale", help=UPSCALE)

BATCH = """Draw a file of requests into a folder, several at once.

The same command resumes an interrupted run. It keeps finished pictures, retries failed rows, and draws changed rows
again. The exit code is 1 if some rows failed."""
app.command("inkstream.cli.batch:batch", help=BATCH)

EVALUATE = """Draw a suite of prompts with a model and grade the pictures.

The table of results goes to stdout. A folder gets the pictures, a contact sheet and the results as JSON. The same
command resumes an interrupted run: finished pictures are not drawn again."""
app.command("inkstream.cli.evaluate:evaluate", name="eval", help=EVALUATE)

BAKEOFF = """Let several models draw the same prompts with the same seeds, and compare them.

The folder gets the pictures, report.html, contact sheets, tables, and vote.html, a page for blind votes. The same
command resumes an interrupted run: no picture is drawn twice. The exit code is 1 if some pictures failed."""
app.command("inkstream.cli.bakeoff:bakeoff", help=BAKEOFF)

ADVISE = """Advise a model, a precision and a placement, and compare the costs of own card, rented card and API.

All arithmetic is shown, and the source and the date of every figure. The figures are in a TOML file: copy it, edit it,
and give it with --figures."""
app.command("inkstream.cli.advise:advise", help=ADVISE)

VERIFY = """Verify that pictures show what was asked for: texts, colours, counts and relations.

Without --text and --colour, what was asked for is in the picture's metadata: the texts that the prompt quotes, its
colours as hex codes, and, of flat pictures, its things. The exit code is 1 if a picture is wrong."""
app.command("inkstream.cli.verify:verify", help=VERIFY)

PROVENANCE = """Make the certificate with which --provenance eu signs pictures."""
app.command("inkstream.cli.provenance:provenance", help=PROVENANCE)

SERVE = """Serve pictures over HTTP, with a queue that survives crashes.

Only this machine can connect, until you make a key with `inkstream serve keys add NAME`. Ctrl-C stops the server.
Unfinished jobs start again with the next start of the server."""
app.command("inkstream.cli.serve:serve", help=SERVE)

STUDIO = """Open the studio in the browser. If no server runs at the port, one is started, until Ctrl-C."""
app.command("inkstream.cli.serve:studio", help=STUDIO)

LORA = """Describe, merge, convert, extract, resize and compare LoRA files."""
app.command("inkstream.cli.lora:lora", help=LORA)

MCP = """Let agents draw: a server of the Model Context Protocol on stdin and stdout.

Tools: generate, edit, list_models. Pictures are also written to a folder, so that edit can use their paths."""
app.command("inkstream.cli.mcp:mcp", help=MCP)

BENCH = """Time inkstream and other implementations in turns, in one run.

Other implementations are diffusers and stable-diffusion.cpp, if installed. Timing them needs the repository."""
app.command("inkstream.cli.bench:bench", help=BENCH)


@app.command
def info(picture: Annotated[str, Parameter(help="A PNG, WebP or JPEG of any program.")], *, json: Json = False) -> None:
    """Show a picture's format, the request in its metadata, and the verified marks that a model made it."""
    from inkstream.cli.lines import print_facts, print_json
    from inkstream.engine.pictures.metadata import describe
    from inkstream.engine.pictures.provenance import verify_provenance

    facts = describe(picture)
    if marks := verify_provenance(picture):
        facts["provenance"] = marks
    print_json(facts) if json else print_facts(facts)


@app.command
def models(*, json: Json = False) -> None:
    """List the known models, and apart from them those that others draw with for money."""
    from inkstream.cli.lines import print_json
    from inkstream.cli.models import add_fits, list_models, list_remote, print_models, print_remote

    known = list_models()
    if json:
        add_fits(known)
        print_json([*known, *({**model, "remote": True} for model in list_remote())])
    else:
        print_models(known)
        print_remote(list_remote())


@app.command
def doctor(
    *, other: Annotated[str | None, Parameter(name="--for", show_default=False)] = None, json: Json = False
) -> None:
    """Show this machine's device and memory, the models that fit, their precision, and the recommended model.

    Parameters
    ----------
    other
        Answer for a machine with this card, such as "RTX 3060", or with a GPU of this memory, such as 8GiB.
    """
    from inkstream.cli.doctor import examine, print_findings, print_software
    from inkstream.cli.lines import print_json

    if not json and other is None:
        print_software()
    asked = None
    if other is not None:
        from inkstream.engine.machine.cards import find_card

        asked = find_card(other)
    findings = examine(asked)
    print_json(findings) if json else print_findings(findings, asked=asked is not None)


@app.command(name="--install-completion")
def install_completion(
    *, shell: Annotated[Literal["bash", "zsh", "fish"] | None, Parameter(show_default=False)] = None
) -> None:
    """Install completion of commands and options for bash, zsh or fish.

    The startup file of bash or zsh gets a line that loads it.

    Parameters
    ----------
    shell
        The shell; default: the one that runs this command.
    """
    from cyclopts.completion.detect import ShellDetectionError, detect_shell

    from inkstream.types import InputError

    try:
        path = app.install_completion(shell=shell or detect_shell())
    except ShellDetectionError:
        raise InputError("the shell is not known: add --shell bash, zsh or fish") from None
    print(f"{path} is written: open a new shell to use it")


@app.command
def convert(
    source: str,
    folder: str,
    *,
    to: Annotated[Literal["diffusers", "native"] | None, Parameter(show_default=False)] = None,
    quant: Annotated[QuantName | None, Parameter(show_default=False)] = None,
    text_encoder: Annotated[str | None, Parameter(show_default=False)] = None,
    vae: Annotated[str | None, Parameter(show_default=False)] = None,
    yes: Yes = False,
) -> None:
    """Convert a model to another layout, or quantise it.

    Parameters
    ----------
    source
        A model's name, a folder or a single file.
    folder
        The folder to write.
    to
        diffusers: each part in its own folder, the default; native: the transformer as one file beside the other
        parts, the default with --quant.
    quant
        Quantise the weights of transformer and text encoders. fp8: 8-bit floats, multiplied in fp8 if the GPU can;
        int8, nf4, int4: unpacked before use; w8a8: multiplied in int8, fast on CPUs; q8_0 to q2_k: GGUF files; bf16,
        fp16: not quantised.
    text_encoder
        A text encoder's file to take instead of the model's own, or a folder of such files.
    vae
        An autoencoder's file or folder to take instead of the model's own.
    """
    from inkstream.cli.download import agree_to_download
    from inkstream.cli.terminal import Terminal
    from inkstream.engine.files.convert import convert
    from inkstream.types import Machine

    with Terminal() as terminal:
        agree_to_download(source, yes, terminal, commercial_only=False)  # nothing is drawn
        convert(source, folder, to, terminal.show, quant, Machine(text_encoder=text_encoder, vae=vae).chosen)
    print(folder)


@app.command
def train(
    recipe: Annotated[str, Parameter(help="A TOML file: see docs/training.md. Or quick, which needs no recipe.")],
    photos: Annotated[
        str | None, Parameter(show_default=False, help="For quick: a folder of pictures of what is taught.")
    ] = None,
    *,
    trigger: Annotated[
        str | None, Parameter(show_default=False, help='For quick: the words for what is taught, such as "sks mug".')
    ] = None,
    model: Annotated[
        str | None, Parameter(alias="-m", show_default=False, help="For quick: the model to teach; default: pocket.")
    ] = None,
    output: Annotated[
        str | None, Parameter(alias="-o", show_default=False, help="Folder of the run; default: runs/RECIPE.")
    ] = None,
    resume: Annotated[bool, Parameter(show_default=False, help="Resume from the folder's last checkpoint.")] = False,
    export: Annotated[
        bool, Parameter(show_default=False, help="Write the model of the last checkpoint without training.")
    ] = False,
    preset: Annotated[
        int | None,
        Parameter(show_default=False, help="Settings for an adapter on a card of 8, 12, 16, 24 or 80 GiB."),
    ] = None,
    dry_run: Annotated[
        bool, Parameter(show_default=False, help="Print the memory and time of a training, and end.")
    ] = False,
    other: Annotated[
        str | None,
        Parameter(
            name="--for",
            show_default=False,
            help="With --dry-run: a card, its memory, or several cards, as in `8x h100`.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        Parameter(name="--set", negative=(), show_default=False, help="Change a key of the recipe: run.steps=50."),
    ] = None,
    yes: Annotated[bool, Parameter(show_default=False, help="Download the model without asking.")] = False,
    json: Json = False,
) -> int:
    """Train a model or an adapter from a recipe, or an adapter from a folder of pictures."""
    from inkstream.cli.train import Wish, train

    return train(
        Wish(recipe, photos, trigger, model, output, resume, export, preset, dry_run, other, set_ or [], yes, json)
    )


def run() -> NoReturn:
    """Run `main`, and end the process without the interpreter's cleanup.

    The cleanup of torch takes a third of the time of its import. A thread that is still loading or downloading would
    delay the exit, or crash.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def cores_allowed(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Return the number of cores that the container may use, or None without a limit.

    Without this, torch starts a thread for each core of the machine.
    """
    with suppress(OSError, ValueError):
        allowed, period = quota.read_text().split()
        return min(max(1, round(int(allowed) / int(period))), os.cpu_count() or 1)  # ValueError: "max" means no limit
    return None


def join_dashes(words: Sequence[str]) -> list[str]:
    """Join each "-" to the option before it if that reads stdin, else to --prompt. cyclopts takes no "-" as a value."""
    joined: list[str] = []
    for word in words:
        if word == "-" and joined and joined[-1] in READ_STDIN:
            joined[-1] += "=-"
        else:
            joined.append("--prompt=-" if word == "-" else word)
    return joined


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 success, 1 internal error, 2 impossible request, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = join_dashes([word for word in words if word != "--debug"])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would slow down other processes
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
    except BrokenPipeError:  # the reader of stdout has closed it
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
