"""`inkstream edit`: changes a picture as an instruction says. The picture is the first reference of a request."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from inkstream.cli.generate import Wish, as_options, generate
from inkstream.cli.machine import ANYWHERE, RUN, Anywhere, Files
from inkstream.families import SPECS
from inkstream.families.names import named
from inkstream.types import REPAINTING, SAVING, InputError, Request

EDITOR = "flux2-klein-4b"
"""The model that edits if none is named."""


class Change(Request, frozen=True):
    """A Request as options. The instruction is positional, behind the picture."""

    model: str = Field(EDITOR, description="Model that edits: a name, a repository, or a local path.")


as_options(Change, without=("image", "strength", *REPAINTING))
NOTHING = Change.model_validate({})


def edit(
    picture: str,
    wish: Annotated[Change, Parameter(name="*")] = NOTHING,
    *,
    output: Annotated[str | None, Parameter(alias="-o", group=RUN)] = None,
    files: Files = SAVING,
    machine: Anywhere = ANYWHERE,
    dry_run: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    json: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> int:
    """Change a picture as an instruction says.

    Parameters
    ----------
    picture
        The picture to change. It is 'image 1' in the instruction; --reference adds more.
    output
        Output file (.png, .webp, .jpg) or folder; default: the current folder. Existing files are not overwritten.
    dry_run
        Print the memory of each placement for this request, and the chosen placement, or the cost of a remote model;
        draw nothing.
    json
        Print one JSON document on stdout at the end.
    quiet
        Print no progress and no messages, only errors.
    yes
        Download missing files without asking.
    """
    if not wish.prompt.strip():
        raise InputError(
            f"there is no instruction: say what to change, as in inkstream edit {picture} 'remove the star'"
        )
    spec = named(wish.model)
    if spec is not None and "references" not in spec.abilities:
        able = [
            name for name, known in SPECS.items() if "references" in known.abilities and known.image_embedder is None
        ]
        raise InputError(f"{wish.model} does not edit by instruction: take {', '.join(able)}")
    given = {name: getattr(wish, name) for name in wish.model_fields_set}
    whole = Wish.model_validate({**given, "model": wish.model, "reference": (picture, *wish.reference)})
    return generate(
        whole, output=output, files=files, machine=machine, dry_run=dry_run, json=json, quiet=quiet, yes=yes
    )
