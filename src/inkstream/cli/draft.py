"""`inkstream draft`: draws many drafts and a contact sheet, and refines the chosen ones. A stopped run can be resumed.

The pictures in the folder are the progress; each is written atomically. The state file holds the request.
"""

from __future__ import annotations

import math
import re
import secrets
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inkstream.cli.download import agree_to_download, agree_to_loras, is_downloaded
from inkstream.cli.generate import as_options, check, draw, slug, try_folder, understand
from inkstream.cli.lines import print_json
from inkstream.cli.machine import HERE, RUN, Here, check_machine, make_engine, words_of
from inkstream.cli.refine import find_spec, plan, read_draft
from inkstream.cli.terminal import Terminal
from inkstream.types import SAVING, InputError, Machine, Request, Spec, singles

if TYPE_CHECKING:
    from inkstream.engine.engine import Engine

STATE = "draft.json"
SHEET = "sheet.png"
DRAFTS_WITH = "z-image-turbo"
"""The model of the drafts if none is given and it is downloaded."""
AFTER = Group("After the drafts", sort_key=0.5)


class Drafts(Request, frozen=True):
    """A Request as options, with at most 256 pictures: a contact sheet shows no more."""

    count: int = Field(16, ge=1, le=256, description="Number of drafts; draft i has seed + i.")


as_options(Drafts)
NOTHING = Drafts.model_validate({})


class State(BaseModel):
    """The state of a folder. Its request has a seed, so a draft is the same whenever it is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    request: Request
    pick: int | None = Field(default=None, ge=1)
    refine_with: str | None = None
    refine_strength: float | None = Field(default=None, ge=0, le=1)
    chosen: tuple[int, ...] = ()  # drafts are numbered from 1

    def draft(self, number: int) -> Request:
        """Return the request of one draft."""
        return next(singles(self.request, number - 1))

    @property
    def results(self) -> Literal["refined", "chosen"]:
        """The folder of the results: refined pictures, or copies of the chosen drafts if nothing refines them."""
        return "refined" if self.refine_with else "chosen"

    def path(self, folder: Path, number: int, kind: Literal["drafts", "refined", "chosen"]) -> Path:
        """Return the path of a draft, of its refined picture, or of its copy among the chosen drafts."""
        width = max(2, len(str(self.request.count)))
        return folder / kind / f"{number:0{width}}.png"


def draft(
    wish: Annotated[Drafts, Parameter(name="*")] = NOTHING,
    *,
    pick: Annotated[int | None, Parameter(show_default=False, group=AFTER)] = None,
    choose: Annotated[str | None, Parameter(group=AFTER)] = None,
    refine_with: Annotated[str | None, Parameter(group=AFTER)] = None,
    refine_strength: Annotated[float | None, Parameter(group=AFTER)] = None,
    json_prompt: Annotated[str | None, Parameter(group=RUN)] = None,
    resume: Annotated[Path | None, Parameter(group=RUN)] = None,
    output: Annotated[Path | None, Parameter(alias="-o", group=RUN)] = None,
    machine: Here = HERE,
    json: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> None:
    """Draw many drafts, choose from a contact sheet, and refine the chosen drafts with a bigger model.

    Parameters
    ----------
    pick
        Number of drafts to choose; default: any number.
    choose
        Numbers of the drafts to choose, such as 3,7; default: the command asks.
    refine_with
        Model that refines the chosen drafts; default: they are copied to the folder chosen/ as they are.
    refine_strength
        Start from the draft and change it this much, 0 to 1; default: as in inkstream refine.
    json_prompt
        File with a JSON prompt for FLUX.2, with fields such as scene, subjects, style, camera; - reads stdin.
    resume
        Resume the run of this folder with its options.
    output
        Output folder; default: drafts/ and the first words of the prompt.
    json
        Print one JSON document on stdout at the end.
    quiet
        Print no progress and no messages, only errors.
    yes
        Download missing files without asking.
    """
    with Terminal(quiet) as terminal:
        folder, state = resumed(wish, resume, output) if resume else begun(wish, json_prompt, output, terminal)
        state = settled(state, folder, pick, choose, refine_with, refine_strength)
        if missing(folder, state, "drafts"):
            agree_to_loras([*state.request.loras, *machine.merge_lora], machine, yes, terminal)
            check(state.request, machine)
        check_machine(machine)
        spec = look_ahead(folder, state, yes, machine, terminal)
        write_state(folder, state)
        ran = words_of(machine)
        engine = make_engine(machine)
        try:
            draw_drafts(engine, folder, state, terminal)
            write_sheet(folder, state)
            if not json:
                terminal.print(str(folder / SHEET))
            if (state.refine_with or state.pick) and not state.chosen:
                state = state.model_copy(update={"chosen": ask(folder, state, terminal)})
                write_state(folder, state)
            if state.refine_with:
                refine_chosen(engine, folder, state, spec, terminal, json)
            else:
                keep_chosen(folder, state, terminal, json)
        except KeyboardInterrupt:
            terminal.say(f"stopped; {told(folder, state)}")
            raise
        finally:
            if len(missing(folder, state, "drafts")) < state.request.count:
                again = go_on(folder, state, ran)
                if again:
                    terminal.say(f"resume with: {again}")
                if json:
                    print_json(describe(folder, state, again))


# Options and state


def begun(wish: Drafts, json_prompt: str | None, output: Path | None, terminal: Terminal) -> tuple[Path, State]:
    """Return the folder and the state of a command with a prompt. The state is read if the folder already has one."""
    request = understand(wish, None, terminal.say, json_prompt).model_copy(update={"count": wish.count})
    folder = output or Path("drafts") / slug(request.prompt)
    if (folder / STATE).exists():
        state = read_state(folder)
        open_fields = {"seed"} if request.seed is None else set[str]()
        open_fields |= {"model"} - wish.model_fields_set
        refuse_changes(state.request, request.model_dump(exclude=open_fields), folder)
        return folder, state
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"{folder} has files that are not drafts: give another --output")
    settled: dict[str, Any] = {"seed": secrets.randbelow(2**32) if request.seed is None else request.seed}
    if "model" not in wish.model_fields_set:
        settled["model"] = DRAFTS_WITH if is_downloaded(DRAFTS_WITH) else request.model
        why = f", because {DRAFTS_WITH} is not downloaded: -m {DRAFTS_WITH} --yes downloads it"
        terminal.say(f"drafting with {settled['model']}{'' if settled['model'] == DRAFTS_WITH else why}")
    return folder, State(request=Request.model_validate(request.model_dump() | settled))


def resumed(wish: Drafts, folder: Path, output: Path | None) -> tuple[Path, State]:
    """Return a folder and its state. Given options must equal those of the state."""
    if output is not None:
        raise InputError(f"--resume {folder} and --output {output} are both given: give one of them")
    if not (folder / STATE).exists():
        raise InputError(f"{folder} has no drafts to resume: give a folder of inkstream draft")
    state = read_state(folder)
    refuse_changes(state.request, wish.model_dump(include=wish.model_fields_set), folder)
    return folder, state


def refuse_changes(before: Request, asked: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError if a given field differs from that of the folder's drafts."""
    for name, value in asked.items():
        if (held := getattr(before, name)) != value:
            held, value = (repr(v[:60]) if isinstance(v, str) else v for v in (held, value))
            shown = name.replace("_", " ")
            raise InputError(f"{folder} has drafts with {shown} {held}, not {value}: give another --output")


def settled(
    state: State,
    folder: Path,
    pick: int | None,
    choose: str | None,
    refine_with: str | None,
    refine_strength: float | None,
) -> State:
    """Return the state with the options of choosing and refining. They cannot change once drafts are chosen."""
    asked = {"refine_with": refine_with, "refine_strength": refine_strength}
    for name, value in asked.items():
        if state.chosen and state.refine_with and value is not None and value != getattr(state, name):
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"the drafts chosen in {folder} are refined with {option} {getattr(state, name)}, not {value}: "
                "use inkstream refine to refine them differently"
            )
    if pick is not None and choose is None and state.chosen and pick != len(state.chosen):
        raise InputError(f"{len(state.chosen)} drafts of {folder} are chosen, not {pick}: choose more with --choose")
    given = {name: value for name, value in (*asked.items(), ("pick", pick)) if value is not None}
    state = State.model_validate(state.model_dump() | given)
    if state.pick is not None and state.pick > state.request.count:
        raise InputError(f"--pick {state.pick} is more than {state.request.count} drafts: pick fewer, or draw more")
    if choose is None:
        return state
    chosen = numbers_of(choose, state.request.count, pick)
    return state.model_copy(update={"chosen": tuple(dict.fromkeys((*state.chosen, *chosen)))})


def numbers_of(text: str, count: int, pick: int | None) -> tuple[int, ...]:
    """Return the draft numbers in a text such as 3,7. Raises InputError if one is unknown or not `pick` are named."""
    words = re.split(r"[\s,]+", text.strip(" ,"))
    wrong = [word for word in words if not (word.isascii() and word.isdigit() and 1 <= int(word) <= count)]
    if wrong:
        raise InputError(f"there is no draft {wrong[0] or 'without a number'}: choose from 1 to {count}, such as 1,2")
    numbers = tuple(dict.fromkeys(map(int, words)))
    if pick is not None and len(numbers) != pick:
        raise InputError(f"{len(numbers)} drafts are named, but --pick is {pick}: name {pick}")
    return numbers


def read_state(folder: Path) -> State:
    """Read the state of a folder. Raises InputError if the file is not valid."""
    path = folder / STATE
    try:
        return State.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise InputError(f"{path} cannot be read ({reason}): give another --output, or remove the folder") from None


def write_state(folder: Path, state: State) -> None:
    replace_file(folder / STATE, (state.model_dump_json(indent=2) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader finds the old content or the new."""
    from inkstream.disk import whole_file

    with whole_file(path) as part:
        part.write_bytes(data)


# Drawing and refining


def look_ahead(folder: Path, state: State, yes: bool, machine: Machine, terminal: Terminal) -> Spec | None:
    """Check the folder and ask for downloads. Returns the Spec of the model that refines, or None if not needed."""
    from inkstream.engine.drawing.refine import way_for

    try_folder(folder)
    for left in folder.glob("*/.*.part"):  # left by a killed process
        left.unlink(missing_ok=True)
    if missing(folder, state, "drafts"):
        agree_to_download(state.request.model, yes, terminal, machine.commercial_only)
    if state.refine_with is None or (state.chosen and not missing(folder, state, state.results)):
        return None
    spec = find_spec(state.refine_with, yes, terminal, machine)
    way_for(spec, None if state.refine_strength is None else "strength")
    return spec


def missing(folder: Path, state: State, kind: Literal["drafts", "refined", "chosen"]) -> list[int]:
    """Return the numbers of missing drafts, refined pictures or copies of chosen drafts."""
    wanted = range(1, state.request.count + 1) if kind == "drafts" else state.chosen
    return [number for number in wanted if not state.path(folder, number, kind).exists()]


def draw_drafts(engine: Engine, folder: Path, state: State, terminal: Terminal) -> None:
    total = state.request.count
    for number in missing(folder, state, "drafts"):
        for drawn in draw(
            engine,
            state.draft(number),
            lambda request, index: state.path(folder, index + 1, "drafts"),
            SAVING,
            terminal,
            before=number - 1,
            total=total,
        ):
            terminal.say(f"draft {number} of {total}: seed {drawn['seed']}, {drawn['seconds']} s")


def write_sheet(folder: Path, state: State) -> None:
    """Write the contact sheet of numbered drafts, unless it exists. Few drafts get larger tiles."""
    import io

    from PIL.Image import Resampling

    from inkstream.engine.pictures.inputs import open_picture
    from inkstream.engine.pictures.sheet import Tile, contact_sheet

    if (folder / SHEET).exists():
        return
    count, width, height = state.request.count, 1, 1
    size = 320 if count <= 36 else 160
    tiles = []
    for number in range(1, count + 1):
        picture = open_picture(str(state.path(folder, number, "drafts")))
        width, height = picture.size
        picture.thumbnail((size, size), Resampling.LANCZOS)  # many large pictures would not fit into memory
        tiles.append(Tile(picture, f"seed {seed_of(folder, state, number)}", label=str(number)))
    note = f"{Path(state.request.model).name}, {width} x {height}"
    columns = math.ceil(math.sqrt(count * height / width))
    buffer = io.BytesIO()
    contact_sheet(tiles, columns, size, state.request.prompt, note).save(buffer, "PNG")
    replace_file(folder / SHEET, buffer.getvalue())


def seed_of(folder: Path, state: State, number: int) -> int | None:
    """Return the seed of a draft that is there: of its own, or, if it was drawn until it passed, in its metadata."""
    if not state.request.until_verified:
        return state.draft(number).seed
    from inkstream.engine.pictures.metadata import read_request

    return read_request(state.path(folder, number, "drafts")).request.seed


def ask(folder: Path, state: State, terminal: Terminal) -> tuple[int, ...]:
    """Ask for the drafts to refine until the answer is valid. Empty without a terminal or an answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return ()
    wanted = f"{state.pick} of the" if state.pick else "the"
    purpose = f"for {state.refine_with} to refine" if state.refine_with else "to keep"
    question = f"numbers of {wanted} {state.request.count} drafts {purpose}, such as 1,2:"
    while answer := terminal.read(question):
        try:
            return numbers_of(answer, state.request.count, state.pick)
        except InputError as error:
            terminal.say(str(error))
    return ()


def refine_chosen(
    engine: Engine, folder: Path, state: State, spec: Spec | None, terminal: Terminal, json: bool
) -> None:
    """Refine the chosen drafts that are not refined yet, and print the paths."""
    from inkstream.engine.drawing.refine import origin

    asked = {"model": state.refine_with, "strength": state.refine_strength}
    wish = Request.model_validate({name: value for name, value in asked.items() if value is not None})
    for index, number in enumerate(state.chosen):
        path = state.path(folder, number, "refined")
        if not path.exists():
            assert spec is not None
            picture = str(state.path(folder, number, "drafts"))
            one = read_draft(picture, wish, terminal)
            found = plan(wish, one, picture, spec, False, engine.machine, terminal)
            said = {"refined_from": origin(picture, one)}
            total = len(state.chosen)
            for drawn in draw(engine, found.request, lambda *_, path=path: path, SAVING, terminal, said, index, total):
                terminal.say(f"draft {number}, refined: {drawn['seconds']} s")
        if not json:
            terminal.print(str(path))


def keep_chosen(folder: Path, state: State, terminal: Terminal, json: bool) -> None:
    """Copy the chosen drafts to a folder of their own, and print the paths."""
    for number in state.chosen:
        path = state.path(folder, number, "chosen")
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            replace_file(path, state.path(folder, number, "drafts").read_bytes())
        if not json:
            terminal.print(str(path))


# Reports


def told(folder: Path, state: State) -> str:
    """Return the progress of a folder as text."""
    count, chosen = state.request.count, len(state.chosen)
    results = f"{state.results} {'pictures' if state.refine_with else 'drafts'}"
    drafts = f"{count - len(missing(folder, state, 'drafts'))} of {count} drafts"
    done = f" and {chosen - len(missing(folder, state, state.results))} of {chosen} {results}" if chosen else ""
    return f"{drafts}{done} are in {folder}"


def go_on(folder: Path, state: State, ran: list[str]) -> str | None:
    """Return the command that continues the run, or None if it is complete."""
    words = ["inkstream", "draft", "--resume", str(folder), *ran]
    if not missing(folder, state, "drafts"):
        if not state.chosen:
            words += ["--choose", "NUMBERS", *([] if state.refine_with or state.pick else ["--refine-with", "MODEL"])]
        elif not missing(folder, state, state.results):
            return None
    return shlex.join(words)


def describe(folder: Path, state: State, again: str | None) -> dict[str, Any]:
    """Return the contents of the folder as JSON."""
    undrawn, undone = missing(folder, state, "drafts"), missing(folder, state, state.results)
    sheet = folder / SHEET
    return {
        "folder": str(folder),
        "sheet": str(sheet) if sheet.exists() else None,
        "drafts": [
            {
                "number": number,
                "path": str(state.path(folder, number, "drafts")),
                "seed": seed_of(folder, state, number),
            }
            for number in range(1, state.request.count + 1)
            if number not in undrawn
        ],
        "chosen": list(state.chosen),
        "results": [
            {"number": number, "path": str(state.path(folder, number, state.results))}
            for number in state.chosen
            if number not in undone
        ],
        "refined_with": state.refine_with,
        "go_on": again,
    }
