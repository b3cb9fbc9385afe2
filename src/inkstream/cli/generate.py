"""`inkstream generate`: its options are the fields of a Request. Each picture is written when it is finished."""

from __future__ import annotations

import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from inkstream.cli.crew import follow, follows, join
from inkstream.cli.download import agree_to_download, agree_to_loras
from inkstream.cli.lines import in_gibibytes, print_facts, print_json
from inkstream.cli.machine import ANYWHERE, RUN, Anywhere, Files, make_drawer, make_engine, options_of
from inkstream.cli.terminal import Terminal
from inkstream.clients.remote.catalogue import is_remote
from inkstream.types import SAVING, Done, Drawer, Failed, InputError, Loading, Machine, Request, Saving, Spec, Step

if TYPE_CHECKING:
    from inkstream.engine.machine.memory import Placing
    from inkstream.engine.machine.parallel import Crew

SHORT = {
    "negative_prompt": "-n",
    "model": "-m",
    "width": "-W",
    "height": "-H",
    "guidance": "--cfg-scale",
    "seed": "-s",
    "count": "-c",
}
NAMES = {"loras": "--lora", "control_nets": "--control-net", "regions": "--region"}
"""The options that are not called as their fields."""
THE_REAL_ONE = "for photographs and long texts add -m z-image-turbo (a download of 33 GB)"


def as_options(wish: type[Request], bare: Collection[str] = ("prompt",), without: Collection[str] = ()) -> None:
    """Make the fields of a kind of Request options. bare: positional fields; without: fields that are not options."""
    for name, field in wish.model_fields.items():
        field.kw_only = name not in bare
        shown = name not in without
        default = field.default not in (None, "") and field.default is not False and not field.is_required()
        no = f"--no-{name}" if name == "upsample" else ""  # the only switch that a model may turn on by default
        option = Parameter(
            NAMES.get(name), alias=SHORT.get(name), show_default=default, parse=shown, show=shown, negative=no
        )
        field.metadata = [*field.metadata, option]  # a new list: the old one is shared with Request


class Wish(Request, frozen=True):
    """A Request as options. Only the prompt is positional."""


as_options(Wish)

NOTHING = Wish.model_validate({})


def generate(
    wish: Annotated[Wish, Parameter(name="*")] = NOTHING,
    *,
    json_prompt: Annotated[str | None, Parameter(group=RUN)] = None,
    source: Annotated[Path | None, Parameter(name="--from", group=RUN)] = None,
    output: Annotated[str | None, Parameter(alias="-o", group=RUN)] = None,
    files: Files = SAVING,
    machine: Anywhere = ANYWHERE,
    parallel: Annotated[
        Literal["replicas", "cfg", "context", "tensor"] | None, Parameter(show_default=False, group=RUN)
    ] = None,
    dry_run: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    json: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> int:
    """Draw pictures of a prompt, or draw a picture again.

    Parameters
    ----------
    json_prompt
        File with a JSON prompt for FLUX.2, with fields such as scene, subjects, style, camera; - reads stdin.
    source
        Read the request from this picture's metadata. Given options override it.
    output
        Output file (.png, .webp, .jpg) or folder; default: the current folder. Existing files are not overwritten.
    parallel
        How the processes of torchrun, one for each GPU, share the work: by pictures (replicas), by the two prompts of
        guidance (cfg), by a picture's tokens (context) or by weights (tensor); default: the best for the request.
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
    if follows():
        return follow(parallel, machine)
    crew = join(parallel, machine.device)
    with Terminal(quiet) as terminal:
        request = understand(wish, source, terminal.say, json_prompt, machine)
        piped = output is None and not json and not sys.stdout.isatty()
        if piped and request.count > 1:
            raise InputError(f"--count {request.count} is too many for a pipe, which takes one picture: give --output")
        if machine.server is not None:
            if dry_run:
                raise InputError("--dry-run is for a model on this machine: leave it out, or leave --server out")
            check_pictures(request)
        else:
            agree_to_loras([*request.loras, *machine.merge_lora], machine, yes, terminal)
            check(request, machine)
        check_files(files)
        place = None if piped else find_place(output, request.count)
        if machine.server is None:
            if not is_remote(request.model):
                agree_to_download(request.model, yes, terminal, machine.commercial_only)
            if "model" not in wish.model_fields_set and source is None:
                terminal.say(f"drawing with {request.model}, the small built-in model; {THE_REAL_ONE}")
        if dry_run:
            if is_remote(request.model):
                print_price(request, machine, json)
            else:
                print_plans(make_engine(machine).placing(request), request, json)
            return 0
        if request.until_verified and request.seed is None:
            request = request.model_copy(update={"seed": secrets.randbelow(2**32)})
        drawer = make_drawer(machine, crew, [request.model])
        done: list[dict[str, Any]] = []
        try:
            for picture in draw(drawer, request, place, files, terminal):
                done.append(picture)
                if not (piped or json):
                    terminal.print(picture["path"])
                terminal.say(f"seed {picture['seed']}, {picture['seconds']} s" + priced(picture.get("cost_usd")))
        except KeyboardInterrupt:
            terminal.say(f"stopped; {len(done)} of {request.count} done")
            raise
        finally:
            if done:
                again = repeat(request, done[0]["seed"], machine, crew)
                terminal.say(f"again: {again}")
                if json:
                    print_json({"pictures": done, "again": again})
    return 0


def print_price(request: Request, machine: Machine, as_json: bool) -> None:
    """Print what a remote model would take for a request. Nothing is sent."""
    from inkstream.clients.remote.budget import money
    from inkstream.clients.remote.drawer import Remote

    remote = Remote(request.model, machine)
    cost, offer = remote.check(request), remote.offer
    if as_json:
        print_json({"model": offer.name, "cost_usd": round(cost, 6), "source": offer.source, "date": offer.date})
        return
    print_facts({"model": offer.name, "about": money(cost), "prices of": offer.date, "source": offer.source})


def priced(cost: float | None) -> str:
    """Return the end of a line about a picture: its cost, if a remote model drew it."""
    from inkstream.clients.remote.budget import money

    return "" if cost is None else f", {money(cost)}"


def print_plans(placing: Placing, request: Request, as_json: bool) -> None:
    """Print the memory of each placement by phase, and the chosen placement."""
    chosen, budget = placing.choose(request), placing.budget
    if as_json:
        plans = [
            {"placement": plan.placement, "bytes": plan.peak, "phases": dict(plan.phases)}
            for plan in placing.plans(request)
        ]
        print_json({"placement": chosen, "budget_bytes": budget, "device": str(placing.opened.device), "plans": plans})
        return
    facts = {
        plan.placement: f"{in_gibibytes(plan.peak)} ("
        + ", ".join(f"{phase} {in_gibibytes(count)}" for phase, count in plan.phases.items())
        + f"){', chosen' if plan.placement == chosen else ''}"
        for plan in placing.plans(request)
    }
    print_facts({**facts, "of": "unknown" if budget is None else f"{in_gibibytes(budget)} on {placing.opened.device}"})


def understand(
    wish: Request,
    source: Path | None,
    say: Callable[[str], None],
    json_prompt: str | None = None,
    machine: Anywhere = ANYWHERE,
) -> Request:
    """Return the request of the options, stdin and the metadata of `source`. Options override metadata."""
    given = {name: getattr(wish, name) for name in wish.model_fields_set}
    if json_prompt is not None:
        if "prompt" in given:
            raise InputError(f"--json-prompt {json_prompt} and a prompt were given: leave one of them out")
        given["prompt"] = read_json_prompt(json_prompt)
    elif given.get("prompt") == "-":
        given["prompt"] = sys.stdin.read().strip()
    if source is not None:
        from inkstream.engine.files.loras import lora_folder, names_in
        from inkstream.engine.pictures.metadata import read_request

        here = names_in(lora_folder(machine)) if machine.server is None else ()
        found = read_request(source, spec_of(given["model"], machine) if "model" in given else None, here)
        if "model" not in given.keys() | found.request.model_fields_set:
            named = found.ignored.get("model")
            told = f"names the model {named}, which is not known here" if named else "names no model"
            raise InputError(f"{source} {told}: choose the model to draw with, for example -m z-image-turbo")
        if found.ignored:
            say(f"{source}: not taken over: {'; '.join(f'{name} {value}' for name, value in found.ignored.items())}")
        given = found.request.model_dump(include=found.request.model_fields_set) | given
    elif not given.get("prompt", "").strip() and not given.get("reference"):
        raise InputError("there is no prompt: say what to draw, as in inkstream generate 'a lighthouse in fog'")
    return Request.model_validate(given)


def spec_of(model: str, machine: Anywhere) -> Spec | None:
    """Return the Spec of a model by its name, or of a local path by its files; None for any other on the hub."""
    from inkstream.engine.files.sources import locate
    from inkstream.families.names import named

    spec = named(model)
    if spec is None and machine.server is None and Path(model).expanduser().exists():
        spec = locate(model, chosen=machine.chosen).spec
    return spec


def read_json_prompt(file: str) -> str:
    """Read a JSON prompt and return it as one line. Raises InputError with the file, the field and the remedy."""
    from inkstream.families.flux2.json_prompt import json_prompt

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except OSError as error:
        reason = error.strerror or "no file"
        raise InputError(f"--json-prompt {file} cannot be read ({reason}): give a file, or - for stdin") from None
    except UnicodeDecodeError:
        raise InputError(f"--json-prompt {file} is not UTF-8 text: save it as UTF-8") from None
    try:
        return json_prompt(text.removeprefix("\ufeff"))
    except InputError as error:
        raise InputError(f"--json-prompt {file}: {error}") from None


def find_place(
    output: str | None, count: int, name: Callable[[Request, int], str] | None = None
) -> Callable[[Request, int], Path]:
    """Return a function from a picture's complete request and index to a free path.

    name: returns a picture's file name in a folder; default: prompt and seed. Raises InputError if the place cannot be
    written to, or if the file exists.
    """
    from inkstream.engine.pictures.metadata import free_name, picture_format

    path = Path(output or ".")
    if path.is_dir() or str(output or "/").endswith(("/", "\\")) or not path.suffix:
        try_folder(path)
        name = name or (lambda request, index: f"{slug(request.prompt)}-{request.seed}")
        return lambda request, index: free_name(path, name(request, index), ".png")
    picture_format(path)
    try_folder(path.parent)
    stems = [path.stem] if count == 1 else [f"{path.stem}-{index + 1}" for index in range(count)]
    for taken in (path.with_stem(stem) for stem in stems if path.with_stem(stem).exists()):
        raise InputError(f"{taken} exists and is not overwritten: give another --output")
    return lambda request, index: free_name(path.parent, stems[index], path.suffix)


def try_folder(folder: Path) -> None:
    """Make the folder and test that it can be written to, so that no picture is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise InputError(f"{folder} cannot be written to ({reason}): give another --output") from None


def slug(prompt: str) -> str:
    """Return the first words of a prompt as a file name."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-_") or "picture"


def check(request: Request, machine: Machine) -> None:
    """Check a request before anything big is downloaded or read. Raises InputError."""
    from inkstream.engine.drawing.complete import complete
    from inkstream.engine.drawing.enhancer import able
    from inkstream.engine.drawing.templates import filled, wildcard_folder
    from inkstream.engine.files.controls import check_controls, control_folder
    from inkstream.engine.files.loras import check_loras, lora_folder, read_merges
    from inkstream.engine.files.names import check_name
    from inkstream.engine.files.upscalers import check_upscaler, upscaler_folder
    from inkstream.families import SPECS

    check_pictures(request)
    if is_remote(request.model):
        from inkstream.clients.remote.drawer import Remote

        Remote(request.model, machine).check(request)
        filled(request, wildcard_folder(machine))
        return
    read_merges(machine.merge_lora)
    check_loras([*request.loras, *machine.merge_lora], lora_folder(machine))
    check_controls(request, control_folder(machine))
    check_upscaler(request, upscaler_folder(machine))
    check_name(request.model)
    filled(request, wildcard_folder(machine))
    if request.model in SPECS:
        complete(request, able(SPECS[request.model], machine))


def check_files(files: Saving) -> None:
    """Raise InputError if pictures cannot be saved so: a certificate is missing, for example."""
    if files != SAVING:
        from inkstream.engine.pictures.provenance import check_saving

        check_saving(files)


def check_pictures(request: Request) -> None:
    """Raise InputError if an input picture of the request cannot be read."""
    given = (request.image, request.mask, *request.reference, *request.control)
    pictures = [picture for picture in given if picture is not None]
    if pictures:
        from inkstream.engine.pictures.inputs import open_header

        for picture in pictures:
            open_header(picture)


def draw(
    drawer: Drawer,
    request: Request,
    place: Callable[[Request, int], Path] | None,
    files: Saving,
    terminal: Terminal,
    extra: Mapping[str, Any] | None = None,
    before: int = 0,
    total: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Draw the pictures, write each to its place or to stdout, and yield its description as JSON.

    extra: JSON for the picture's metadata, beside its request. before, total: if the request is part of a larger run,
    the number of earlier pictures and of all pictures, for the progress.
    """
    from inkstream.engine.drawing.templates import is_template
    from inkstream.engine.drawing.writing import cost_of, wording
    from inkstream.engine.pictures.metadata import free_name, save_picture

    written, known = "", None
    told = ""  # the last shown prompt: a grammar expands the prompt differently for each picture
    for event in drawer.submit(request):
        if isinstance(event, Step):
            terminal.show(replace(event, index=before + event.index, count=total or event.count))
        else:
            terminal.show(event)
        if isinstance(event, Loading) and event.text:
            written = event.text
        elif isinstance(event, Step) and event.step == 1 and (event.index == 0 or written != told):
            if written not in (told, request.prompt):
                as_typed = request.upsample or told or is_template(request.prompt)
                hint = "" if as_typed else " (--no-upsample leaves it as typed)"
                terminal.say(f"prompt: {written}{hint}")
                told = written
            for line in drawer.remarks(request.model_copy(update={"prompt": written} if written else {})):
                terminal.say(line, once=True)
        elif isinstance(event, Failed):
            raise InputError(event.error) if event.kind == "input" else RuntimeError(event.error)
        elif isinstance(event, Done):
            path = place(event.request, before + event.index) if place else None
            model = event.request.model
            spec, runs = known = known or (drawer.spec(model), drawer.ran_on(model))
            ran = runs | wording(request.prompt, event) | cost_of(event)
            kept = {**ran, **(extra or {})}
            facts: Any = {"request": event.request, "spec": spec, "saving": files, "extra": kept}
            try:
                save_picture(event.image, path or sys.stdout.buffer, **facts)
            except InputError as error:  # a JPEG has little room for metadata; the picture must not be lost
                if path is None:
                    raise
                path = free_name(path.parent, path.stem, ".png")
                save_picture(event.image, path, **facts)
                terminal.say(f"{error}; saved as {path.name} instead")
            yield {
                "path": str(path) if path else None,
                "seed": event.request.seed,
                "width": event.image.width,
                "height": event.image.height,
                "seconds": round(event.seconds, 3),
                **ran,
                "request": event.request.model_dump(exclude_none=True),
            }


def repeat(request: Request, seed: int, machine: Machine, crew: Crew | None) -> str:
    """Return the command that draws the same pictures again. seed: of the first picture, as it was kept."""
    update = {} if request.until_verified and request.count > 1 else {"seed": seed, "until_verified": 0}
    fields = request.model_copy(update=update).model_dump(exclude_defaults=True)
    fields |= options_of(machine)
    start = ["inkstream"]
    if crew is not None:
        start = ["torchrun", "--nproc-per-node", str(crew.count), "-m", "inkstream"]
        fields["parallel"] = crew.way
    prompt = fields.pop("prompt", "")
    words = [f"--prompt={prompt}" if prompt.startswith("-") else prompt] if prompt else []
    for name, value in fields.items():
        option = NAMES.get(name) or "--" + name.replace("_", "-")
        for one in value if isinstance(value, tuple | list) else [value]:
            if isinstance(one, bool):
                words.append(option if one else option.replace("--", "--no-", 1))
            else:
                words += [f"{option}={one}"] if str(one).startswith("-") else [option, str(one)]
    return shlex.join([*start, "generate", *words])
