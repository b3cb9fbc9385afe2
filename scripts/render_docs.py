"""Render the generated parts of the docs.

docs/cli.md comes from the command line, the keys in docs/training.md from the recipe, the table in docs/models.md from
the known models, and the tables of measurements on all pages from the records.

    python scripts/render_docs.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cyclopts import App, Argument

from inkstream.bench.tables import fill
from inkstream.cli import app
from inkstream.cli.models import TELLING, in_a_word, list_models
from inkstream.train.reading import describe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECORDS = ROOT / "benchmarks" / "records"
KEYS = "## Keys\n\n"
KNOWN = "## Known models\n\n"
HEAD = """# The command line

`scripts/render_docs.py` renders this page from the code. A test checks that it is up to date.

Results go to stdout, messages to stderr. The exit code is 0 for success, 2 if the request cannot be done (one line
gives the reason and the remedy), 1 for an internal error, and 130 after an interrupt (finished pictures are kept).
Every command has `--help`, and `--debug`, which shows the traceback of an error.
"""


def render() -> str:
    """Return the page docs/cli.md."""
    return "\n".join([HEAD, *(line for name in commands() for line in section(name))])


def commands(parent: App = app, before: str = "") -> list[str]:
    """Return the names of all commands that can be run, without flags such as --help, in the order of the code."""
    found = []
    for name in parent:
        if not name.startswith("-"):
            found += [before + name] if parent[name].default_command else []
            found += commands(parent[name], f"{before}{name} ")
    return found


def find(command: str) -> App:
    """Return the command of a name such as `generate` or `serve keys add`."""
    return reduce(lambda parent, name: parent[name], command.split(), app)


def arguments(command: str) -> list[Argument]:
    """Return the arguments of a command, in the order of its help."""
    every = find(command).assemble_argument_collection(default_parameter=app.default_parameter, parse_docstring=True)
    return [argument for argument in every if argument.parse and argument.show]


def section(command: str) -> Iterator[str]:
    yield f"## inkstream {command}"
    yield ""
    yield find(command).help.partition("Parameters\n")[0].strip()
    yield ""
    rows = [row(argument) for argument in arguments(command)]
    yield "| Option | Takes | Default | Meaning |"
    yield "|---|---|---|---|"
    yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows)
    yield ""


def row(argument: Argument) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in argument.names if name.startswith("-"))
    if argument.is_positional_only() or argument.index is not None:
        names = f"`{argument.name.lstrip('-').upper()}`, {names}".removesuffix(", ")
    default = argument.field_info.default
    shown = "required" if argument.required else "" if default in (None, "", ()) or default is False else f"`{default}`"
    return names, takes(argument.hint), shown, " ".join((argument.parameter.help or "").split())


def takes(hint: Any) -> str:
    """Return the type of an option's value in words."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if hint is not None and get_args(hint):
        return next(takes(kind) for kind in get_args(hint) if kind is not type(None))
    return {bool: "", int: "whole number", float: "number"}.get(hint, "text")


def models() -> str:
    """Return a table with a row for each known model."""
    heads = ["Model", "Licence", "Commercial use", *(name.replace("_", " ") for name in TELLING)]
    rows = [
        [
            f"`{model['name']}`",
            model["licence"],
            "yes" if model["commercial"] else "no",
            *(in_a_word(model["options"][name]) for name in TELLING),
        ]
        for model in list_models()
    ]
    return table(heads, rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    (DOCS / "cli.md").write_text(render())
    page = DOCS / "models.md"
    page.write_text(page.read_text().partition(KNOWN)[0] + KNOWN + models())
    training = DOCS / "training.md"
    training.write_text(training.read_text().partition(KEYS)[0] + KEYS + describe())
    for page in DOCS.glob("*.md"):
        page.write_text(fill(page.read_text(), RECORDS))
