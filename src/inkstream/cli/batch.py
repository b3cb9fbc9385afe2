"""`inkstream batch`: draws a file of requests into a folder, here or elsewhere; an interrupted run can be resumed."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json as json_
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field, ValidationError

from inkstream.cli.download import agree_to_download, agree_to_loras
from inkstream.cli.errors import explain_value, one_line
from inkstream.cli.generate import as_options, check_files, check_pictures, slug
from inkstream.cli.lines import print_json
from inkstream.cli.machine import ANYWHERE, RUN, Anywhere, Files, check_machine, make_drawer, make_engine
from inkstream.cli.terminal import Terminal
from inkstream.clients.remote.catalogue import is_remote
from inkstream.types import SAVING, Failed, InputError, Loading, Request, Saving, Spec, Step, singles

if TYPE_CHECKING:
    from inkstream.clients.manifest import Manifest, Wanted
    from inkstream.clients.many import Told

EVERY = 30.0
"""Seconds between lines of progress if there is no progress bar."""
PICTURES = ("image", "mask", "reference", "control")
LISTS = ("reference", "control", "loras", "control_nets", "regions")
"""Fields with several values. In a CSV file, `;` separates them."""
NAME, SIZE, LORA = "name", "size", "lora"
FIELDS = frozenset(Request.model_fields) | {NAME, SIZE, LORA}
"""What a column may be: a field of a Request, the name of the file, WIDTHxHEIGHT, or one more LoRA."""
LONGEST_NAME = 150


class Common(Request, frozen=True):
    """A Request as options. They apply to all rows that do not set the field."""

    seed: int | None = Field(0, ge=0, lt=2**63, description="Base of the seeds of rows without a seed.")


as_options(Common, bare=())
NOTHING = Common.model_validate({})

Row = tuple[int, dict[str, Any]]
"""The first line number of a row, and what it gives, by FIELDS."""


def batch(
    prompts: Path,
    common: Annotated[Common, Parameter(name="*")] = NOTHING,
    *,
    out: Annotated[Path, Parameter(alias=("-o", "--output"), group=RUN)],
    columns: Annotated[list[str] | None, Parameter(show_default=False, group=RUN, negative=())] = None,
    skip_bad: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    slots: Annotated[int, Parameter(group=RUN)] = 4,
    ray: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    engines: Annotated[int | None, Parameter(show_default=False, group=RUN)] = None,
    files: Files = SAVING,
    machine: Anywhere = ANYWHERE,
    json: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> int:
    """Draw a file of requests into a folder.

    Parameters
    ----------
    prompts
        A .txt file with one prompt a line, a .csv file with fields of a request in its first line, or a .jsonl file.
    out
        Folder of the pictures and of manifest.jsonl, which has a line for each picture.
    columns
        COLUMN=FIELD: what a column of your file is, such as Title=prompt or SKU=name; repeat for more. Columns that are
        neither named here nor fields are then left out. `name` is the name of the picture's file, `size` is
        WIDTHxHEIGHT, `lora` is one more LoRA.
    skip_bad
        Draw the other rows if some rows are invalid.
    slots
        Number of pictures drawn at once: they share each forward pass of the model.
    ray
        Draw with Ray and several engines, on the cluster of RAY_ADDRESS, or on a new one on this machine.
    engines
        Number of engines with Ray; default: one for each GPU.
    json
        Print one JSON document on stdout at the end.
    quiet
        Print no progress and no messages, only errors.
    yes
        Download missing files without asking.
    """
    for name, value in (("--slots", slots), ("--engines", engines)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} draws nothing: give 1 or more")
    if ray and machine.server is not None:
        raise InputError("--ray and --server are both given: give one of them")
    if engines is not None and not ray:
        raise InputError(f"--engines {engines} is for Ray: add --ray, or leave it out")
    check_files(files)
    with Terminal(quiet) as terminal:
        if machine.server is None:
            agree_to_loras([*common.loras, *machine.merge_lora], machine, yes, terminal)
        wanted, bad = understand(prompts, common, machine, terminal, read_columns(columns or []), skip_bad)
        models = list(dict.fromkeys(one.request.model for one in wanted))
        remote = [model for model in models if is_remote(model)] if machine.server is None else []
        if ray and remote:
            raise InputError(f"{remote[0]} is not drawn on a cluster: leave --ray out")
        if machine.server is None and remote != models:
            check_machine(machine)
            for model in models:
                if model not in remote:
                    agree_to_download(model, yes, terminal, machine.commercial_only)
        from inkstream.clients.manifest import Manifest

        with closing(Manifest(out)) as manifest:
            changed = sum(manifest.changed(one) for one in wanted)
            todo = manifest.missing(wanted)
            terminal.say(f"{len(wanted) - len(todo)} of {len(wanted)} pictures are there, {len(todo)} to draw")
            if remote:
                foresee([one.request for one in todo], machine, terminal)
            if changed:
                terminal.say(f"{changed} rows have changed: they are drawn again, and the old pictures stay")
            drawn: list[dict[str, Any]] = []
            failed: list[tuple[Wanted, str]] = []
            try:
                with closing(way(todo, machine, slots, ray, engines, files)) as told:
                    follow(told, todo, manifest, drawn, failed, terminal, json)
            except KeyboardInterrupt:
                there = len(wanted) - len(todo) + len(drawn)
                terminal.say(f"stopped; {there} of {len(wanted)} pictures are in {out}: the same command resumes")
                raise
    for one, error in failed:
        print(f"{prompts}, line {one.row}: {one_line(error)}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(wanted)} pictures failed: the same command retries them", file=sys.stderr)
    if json:
        listed = [{"row": one.row, "index": one.index, "error": error} for one, error in failed]
        there = len(wanted) - len(todo)
        print_json({"manifest": str(manifest.path), "there": there, "drawn": drawn, "failed": listed, "bad": bad})
    return 1 if failed or bad else 0


# Requests of the file


def understand(
    prompts: Path, common: Request, machine: Anywhere, terminal: Terminal, columns: Mapping[str, str], skip_bad: bool
) -> tuple[list[Wanted], list[int]]:
    """Return the pictures of a file, and the lines of invalid rows.

    Prints an error for each invalid row. Raises InputError if there is one, unless `skip_bad` is set.
    """
    rows, problems, unused = read_rows(prompts, columns)
    if unused:
        terminal.say(f"columns that are left out: {', '.join(unused)}")
    check = offers(machine)
    wanted: list[Wanted] = []
    lines: dict[str, int] = {}  # of the files with names
    for line, fields in rows:
        try:
            name = name_of(fields)
            request = complete_row(line, fields, common, prompts.parent)
            for remark in check(request):
                terminal.say(remark, once=True)
            pictures = list(pictures_of(line, request, name))
            for one in pictures if name else ():
                if (first := lines.get(one.file.casefold())) is not None:
                    raise InputError(f"name {one.file!r} is that of line {first}, too: give each row a name of its own")
            lines |= {one.file.casefold(): line for one in pictures if name}
            wanted += pictures
        except ValidationError as error:
            problems += [(line, explain_value(wrong, str(wrong["loc"][0]))) for wrong in error.errors()]
        except InputError as error:
            problems.append((line, str(error)))
    for line, problem in sorted(problems):
        print(f"{prompts}, line {line}: {one_line(problem)}", file=sys.stderr)
    bad = sorted({line for line, _ in problems})
    if bad and not (skip_bad and wanted):
        remedy = "nothing was drawn" if skip_bad else "or add --skip-bad to draw the others; nothing was drawn"
        raise InputError(f"{len(bad)} rows of {prompts} cannot be drawn: fix the lines named above, {remedy}")
    if not rows:
        raise InputError(f"{prompts} has no rows: write one prompt a line")
    if bad:
        terminal.say(f"{len(bad)} rows are skipped")
    return wanted, bad


def name_of(fields: Mapping[str, Any]) -> str:
    """Return the name of a row's file without its ending, or "". Raises InputError if it is not possible."""
    name = str(fields.get(NAME) or "").strip()
    name = name[:-4] if name.lower().endswith(".png") else name
    if not name:
        return ""
    if len(name) > LONGEST_NAME or name.startswith(".") or any(one in '/\\:*?"<>|' or ord(one) < 32 for one in name):
        raise InputError(f"name {name[:100]!r} cannot be a file's name: leave out / \\ : * ? \" < > |")
    return name


def read_columns(given: Sequence[str]) -> dict[str, str]:
    """Read COLUMN=FIELD pairs. Raises InputError for others."""
    found: dict[str, str] = {}
    for text in given:
        column, equals, field = (part.strip() for part in text.rpartition("="))
        if not (column and equals):
            raise InputError(f"--columns {text!r} is no COLUMN=FIELD: write it as Title=prompt")
        if field not in FIELDS:
            raise InputError(f"--columns {text!r}: {unknown_field(field)}")
        found[column] = field
    if twice := [field for field in found.values() if list(found.values()).count(field) > 1 and field != LORA]:
        raise InputError(f"--columns names {twice[0]} twice: name it once")
    return found


def unknown_field(name: str) -> str:
    near = difflib.get_close_matches(name, sorted(FIELDS), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{name[:100]!r} is not a field of a request: {hint}see inkstream batch --help"


def complete_row(line: int, fields: Mapping[str, Any], common: Request, folder: Path) -> Request:
    """Return a row's request: its fields, the common fields and a seed. Paths are relative to `folder`."""
    for name in fields:
        if name not in FIELDS:
            raise InputError(unknown_field(name))
    own_fields = {name: value for name, value in fields.items() if name not in (NAME, SIZE, LORA)}
    given = {name: getattr(common, name) for name in common.model_fields_set} | own_fields
    if size := fields.get(SIZE):
        width, times, height = str(size).lower().replace("×", "x").partition("x")
        if not times or not (width.strip().isdecimal() and height.strip().isdecimal()):
            raise InputError(f"size {str(size)[:100]!r} is no size: write it as 1024x768")
        given |= {"width": int(width), "height": int(height)}
    if lora := fields.get(LORA):
        given["loras"] = [*given.get("loras", ()), *([lora] if isinstance(lora, str) else lora)]
    if fields.get("seed") is None:
        given["seed"] = seed_of(line, common.seed or 0)
    request = Request.model_validate(given)
    if not request.prompt.strip() and not request.reference:
        raise InputError("there is no prompt: say what to draw")
    if not any(name in fields for name in PICTURES):
        return request
    from inkstream.engine.pictures.inputs import read_source

    def there(source: str) -> str:
        place = source if source.startswith("data:") else str(folder / source)
        read_source(place)
        return place

    own: dict[str, Any] = {}
    for name in PICTURES:
        value = getattr(request, name)
        if name in fields and value:
            own[name] = there(value) if isinstance(value, str) else tuple(map(there, value))
    return request.model_copy(update=own)


def seed_of(line: int, base: int) -> int:
    """Return the seed of a row without one. It is the same in every run and differs between rows."""
    return int.from_bytes(hashlib.sha256(f"{base} {line}".encode()).digest()[:4], "big")


def pictures_of(line: int, request: Request, name: str = "") -> Iterator[Wanted]:
    """Yield the pictures of a row, each with its own request and seed. name: of the file, without its ending."""
    from inkstream.clients.manifest import Wanted, digest

    for index, one in enumerate(singles(request)):
        number = f"-{index + 1}" if request.count > 1 else ""
        mark = digest(one)
        file = f"{name}{number}" if name else f"{line:05}{number}-{slug(request.prompt)}-{mark[:6]}"
        yield Wanted(line, index, one, mark, f"{file}.png", named=bool(name))


def offers(machine: Anywhere) -> Callable[[Request], Collection[str]]:
    """Return a check of requests. It returns remarks on fields without effect, and raises InputError."""
    if machine.server is not None:
        offered = [spec.name for spec in make_drawer(machine).models()]

        def look(request: Request) -> Collection[str]:
            check_pictures(request)
            if "model" in request.model_fields_set and request.model not in offered:
                raise InputError(f"model {request.model} is not offered by the server: take {', '.join(offered)}")
            return ()

        return look
    from inkstream.engine.drawing.complete import complete
    from inkstream.engine.drawing.enhancer import able
    from inkstream.engine.engine import remarks
    from inkstream.engine.files.controls import check_controls, control_folder
    from inkstream.engine.files.loras import check_loras, lora_folder
    from inkstream.engine.files.names import downloads
    from inkstream.engine.files.sources import locate
    from inkstream.engine.files.upscalers import check_upscaler, upscaler_folder
    from inkstream.families import SPECS

    known: dict[str, Spec | InputError | None] = {}

    def spec_of(model: str) -> Spec | None:
        """Return the Spec, or None if a download is needed first. Raises InputError if there is no such model."""
        if model not in known:
            try:
                is_here = model not in SPECS and not downloads(model)
                known[model] = locate(model, chosen=machine.chosen).spec if is_here else SPECS.get(model)
            except InputError as error:
                known[model] = error
        found = known[model]
        if isinstance(found, InputError):
            raise found
        return found

    def look_here(request: Request) -> Collection[str]:
        check_pictures(request)
        if is_remote(request.model):
            from inkstream.clients.remote.drawer import Remote

            Remote(request.model, machine).check(request)
            return ()
        check_loras(request.loras, lora_folder(machine))
        check_controls(request, control_folder(machine))
        check_upscaler(request, upscaler_folder(machine))
        spec = spec_of(request.model)
        if spec is None:
            return ()
        spec = able(spec, machine)
        complete(request, spec)
        return remarks(request, spec)

    return look_here


def foresee(requests: Sequence[Request], machine: Anywhere, terminal: Terminal) -> None:
    """Say what the remote models among the requests will take. Raises InputError if that is more than `--max-cost`."""
    from inkstream.clients.remote.budget import Budget, money
    from inkstream.clients.remote.drawer import Remote

    costs = [Remote(one.model, machine).check(one) for one in requests if is_remote(one.model)]
    if costs:
        what = f"{len(costs)} remote pictures" if len(costs) > 1 else "a remote picture"
        Budget(machine.max_cost).check(sum(costs), what)
        terminal.say(f"{what}: about {money(sum(costs))}")


# Reading the file


def read_rows(path: Path, columns: Mapping[str, str]) -> tuple[list[Row], list[tuple[int, str]], list[str]]:
    """Return the rows, the line numbers and errors of invalid rows, and the columns that are left out.

    columns: the file's names for FIELDS. Raises InputError for other files.
    """
    readers = {".txt": read_text, ".csv": partial(read_csv, columns=columns), ".jsonl": read_json_lines}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path} is not a file of requests: its name must end in {', '.join(readers)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    rows: list[Row] = []
    problems: list[tuple[int, str]] = []
    unused: dict[str, None] = {}
    seen: set[str] = set()
    for line, found in readers[path.suffix.lower()](text):
        if isinstance(found, str):
            problems.append((line, found))
            continue
        seen |= found.keys()
        named = [(columns.get(name, name), value) for name, value in found.items()]
        fields = [field for field, _ in named if field != LORA]
        if twice := [field for field in fields if fields.count(field) > 1]:
            problems.append((line, f"has {twice[0]} twice: name it once in --columns"))
            continue
        row = {field: value for field, value in named if field != LORA}
        if loras := [value for field, value in named if field == LORA]:
            row[LORA] = loras
        if path.suffix.lower() == ".csv":
            row = {name: _parts(value) if name in LISTS else value for name, value in row.items()}
        if columns:
            unused |= dict.fromkeys(name for name in found if columns.get(name, name) not in FIELDS)
            row = {name: value for name, value in row.items() if name in FIELDS}
        rows.append((line, row))
    if missing := [name for name in columns if rows and name not in seen]:
        raise InputError(f"{path} has no column {missing[0]!r}: it has {', '.join(sorted(seen))}")
    return rows, problems, sorted(unused)


def _parts(cell: str) -> list[str]:
    return [one.strip() for one in cell.split(";") if one.strip()]


def read_text(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for line, prompt in enumerate(text.split("\n"), 1):
        if prompt.strip():
            yield line, {"prompt": prompt.strip()}


def read_csv(text: str, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield rows of CSV. Empty cells set nothing. Without `columns`, all of the first line must be FIELDS."""
    cells = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = cells.line_num + 1
        try:
            row = next(cells)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"is not valid CSV ({error}): put text with commas, quotes or line ends in double quotes"
            continue
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            unknown = [] if columns else [name for name in header if name not in FIELDS]
            if unknown:
                hint = "put commas between them" if ";" in row[0] or "\t" in row[0] else "see --columns in its help"
                yield line, f"column {unknown[0][:100]!r} is no field of a request: name fields such as prompt, {hint}"
                return
        elif len(row) > len(header):
            yield line, f"has {len(row)} cells under {len(header)} names: put text with commas in double quotes"
        else:
            yield line, {name: cell for name, cell in zip(header, row) if cell.strip()}


def read_json_lines(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        try:
            found = json_.loads(written)
        except ValueError as error:
            yield line, f'is not valid JSON ({error}): write it as {{"prompt": "a red circle"}}'
            continue
        yield line, found if isinstance(found, dict) else 'is not a JSON object: write it as {"prompt": "a red circle"}'


# Drawing


def way(
    todo: Sequence[Wanted],
    machine: Anywhere,
    slots: int,
    ray: bool,
    engines: int | None,
    files: Saving,
) -> Generator[Told, None, None]:
    """Yield events of the missing pictures, with their places in `todo`."""
    requests = [one.request for one in todo]
    if not requests:
        return
    if ray:
        from inkstream.clients.ray_data import draw_on_ray

        yield from draw_on_ray(requests, partial(make_engine, machine), slots, engines, files)
        return
    from inkstream.clients.many import draw_many

    drawer = make_drawer(machine, models=dict.fromkeys(request.model for request in requests))
    yield from draw_many(drawer, requests, slots, files)


def follow(
    told: Iterator[Told],
    todo: Sequence[Wanted],
    manifest: Manifest,
    drawn: list[dict[str, Any]],
    failed: list[tuple[Wanted, str]],
    terminal: Terminal,
    json: bool,
) -> None:
    """Write finished pictures, record failures, and show the progress."""
    progress = Progress(len(todo), terminal)
    for place, event in told:
        if isinstance(event, Loading):
            if event.what == "checked":
                terminal.say(f"line {todo[place].row}: {event.note}")
            else:
                terminal.show(event)
            continue
        one = todo[place]
        if isinstance(event, Failed):
            manifest.fail(one, event.error)
            failed.append((one, event.error))
        elif not isinstance(event, Step):
            path = manifest.add(one, event.data, event.seconds, event.seed)
            drawn.append({"path": str(path), "row": one.row, "index": one.index, "seed": event.seed})
            if not json:
                terminal.print(str(path))
        progress.move(place, event.step / event.steps if isinstance(event, Step) else None, len(failed))


class Progress:
    """Progress of a run: finished pictures, steps of unfinished ones, and the remaining time."""

    def __init__(self, total: int, terminal: Terminal):
        self.total = total
        self.terminal = terminal
        self.done = 0
        self.under_way: dict[int, float] = {}
        self.began: float | None = None  # time of the first step: loading does not count
        self.said = time.monotonic()

    def move(self, place: int, share: float | None, failed: int) -> None:
        """Record the finished share of a picture; None: it is complete or has failed."""
        now = time.monotonic()
        self.began = self.began or now
        if share is None:
            self.under_way.pop(place, None)
            self.done += 1
        else:
            self.under_way[place] = share
        passed, work = now - self.began, self.done + sum(self.under_way.values())
        left = f", {duration(passed / work * (self.total - work))} left" if work and passed > 1 else ""
        note = f"{self.done} of {self.total}{left}" + (f", {failed} failed" if failed else "")
        self.terminal.wait("pictures", self.done, self.total, note)
        if not sys.stderr.isatty() and now - self.said > EVERY:
            self.said = now
            self.terminal.say(note)


def duration(seconds: float) -> str:
    """Return a duration as text: 12 s, 5 min, 2 h 10 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
