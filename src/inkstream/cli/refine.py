"""`inkstream refine`: draws pictures again with another model, using the requests in their metadata."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from inkstream.cli.download import agree_to_download
from inkstream.cli.generate import as_options, check, check_files, draw, find_place, read_json_prompt
from inkstream.cli.lines import print_json
from inkstream.cli.machine import HERE, RUN, Files, Here, make_engine
from inkstream.cli.terminal import Terminal
from inkstream.types import REPAINTING, SAVING, InputError, Machine, Request, Spec

if TYPE_CHECKING:
    from inkstream.engine.drawing.refine import Refinement


class Anew(Request, frozen=True):
    """Fields that override the draft's request, as options."""

    model: str = Field(
        "z-image-turbo", description="Model that draws the picture again: a name, a repository, or a local path."
    )
    strength: float | None = Field(
        None, ge=0, le=1, description="Start from the picture and change it this much: 0 keeps it, 1 ignores it."
    )


as_options(Anew, bare=(), without=("image", *REPAINTING, "reference", "count"))
ANEW = Anew.model_validate({})


def refine(
    pictures: list[str],
    *,
    wish: Annotated[Anew, Parameter(name="*")] = ANEW,
    reference: Annotated[bool, Parameter(show_default=False)] = False,
    json_prompt: Annotated[str | None, Parameter(group=RUN)] = None,
    output: Annotated[str | None, Parameter(alias="-o", group=RUN)] = None,
    files: Files = SAVING,
    machine: Here = HERE,
    json: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> None:
    """Draw pictures again with another model, using the requests in their metadata.

    Parameters
    ----------
    pictures
        One or more PNG, WebP or JPEG files of any program.
    reference
        Use the picture as a reference. This is the default if the model takes references.
    json_prompt
        File with a JSON prompt for FLUX.2, with fields such as scene, subjects, style, camera; - reads stdin.
    output
        Output file (.png, .webp, .jpg) or folder; default: the current folder. Existing files are not overwritten.
    json
        Print one JSON document on stdout at the end.
    quiet
        Print no progress and no messages, only errors.
    yes
        Download missing files without asking.
    """
    if reference and wish.strength is not None:
        raise InputError(f"--reference and --strength {wish.strength:g} are two ways to refine: give one of them")
    if json_prompt is not None:
        if "prompt" in wish.model_fields_set:
            raise InputError(f"--json-prompt {json_prompt} and --prompt were given: leave one of them out")
        wish = wish.model_copy(update={"prompt": read_json_prompt(json_prompt)})
    elif wish.prompt == "-":
        wish = wish.model_copy(update={"prompt": sys.stdin.read().strip()})
    from inkstream.engine.drawing.refine import origin

    with Terminal(quiet) as terminal:
        drafts = {picture: read_draft(picture, wish, terminal) for picture in pictures}
        stems = [f"{Path(picture).stem}-refined" for picture in drafts]
        check_files(files)
        place = find_place(output, len(drafts), lambda request, index: stems[index])
        spec = find_spec(wish.model, yes, terminal, machine)
        plans = [plan(wish, draft, picture, spec, reference, machine, terminal) for picture, draft in drafts.items()]
        engine = make_engine(machine)
        done: list[dict[str, Any]] = []
        try:
            for index, (found, (picture, draft)) in enumerate(zip(plans, drafts.items())):
                said = {"refined_from": origin(picture, draft)}
                for drawn in draw(engine, found.request, place, files, terminal, said, index, len(plans)):
                    done.append({**drawn, **said, "way": found.way})
                    if not json:
                        terminal.print(drawn["path"])
                    terminal.say(f"seed {drawn['seed']}, {drawn['seconds']} s")
        except KeyboardInterrupt:
            terminal.say(f"stopped; {len(done)} of {len(plans)} done")
            raise
        finally:
            if done and json:
                print_json({"pictures": done})


def find_spec(model: str, yes: bool, terminal: Terminal, machine: Machine) -> Spec:
    """Return the model's Spec, after a download with consent. Raises InputError if the model cannot be loaded."""
    agree_to_download(model, yes, terminal, machine.commercial_only)
    from inkstream.engine.files.licences import check_licence, is_commercial_only
    from inkstream.engine.files.sources import locate

    spec = locate(model, terminal.show, chosen=machine.chosen).spec
    if is_commercial_only(machine.commercial_only):
        check_licence(model, spec)
    return spec


def read_draft(picture: str, wish: Request, terminal: Terminal) -> Request:
    """Return the picture's request. If it has none: an empty one with a given prompt, else raises InputError."""
    from inkstream.engine.pictures.inputs import open_header
    from inkstream.engine.pictures.metadata import read_request

    open_header(picture)
    try:
        found = read_request(picture)
    except InputError as error:
        if wish.prompt.strip():
            return Request.model_validate({})
        raise InputError(f"{picture} has no request in its metadata: give --prompt") from error
    request = found.request
    if gone := [path for path in request.reference if not os.path.isfile(path)]:
        terminal.say(f"{picture}: its references are left out, because these files are missing: {', '.join(gone)}")
        request = Request.model_validate(request.model_dump(include=request.model_fields_set - {"reference"}))
    return request


def plan(
    wish: Request, draft: Request, picture: str, spec: Spec, reference: bool, machine: Machine, terminal: Terminal
) -> Refinement:
    """Return how a picture is refined. The request is checked first, and remarks are printed."""
    from inkstream.engine.drawing.complete import complete
    from inkstream.engine.drawing.refine import refined

    found = refined(wish, draft, picture, spec, "reference" if reference else None)
    check(found.request, machine)
    complete(found.request, spec)
    for line in found.lines:
        terminal.say(line, once=True)
    return found
