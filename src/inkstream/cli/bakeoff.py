"""`inkstream bakeoff`: several models draw the same prompts, and are measured, checked, voted on and ranked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from inkstream.cli.batch import Progress, foresee
from inkstream.cli.download import agree_to_download, agree_to_loras
from inkstream.cli.errors import one_line
from inkstream.cli.generate import check, slug, try_folder
from inkstream.cli.lines import in_gigabytes, print_json
from inkstream.cli.machine import ANYWHERE, RUN, Anywhere, make_drawer, make_engine
from inkstream.cli.terminal import Terminal
from inkstream.clients.remote.catalogue import is_remote
from inkstream.evaluate.bakeoff.words import words
from inkstream.types import Drawer, Failed, InputError, Loading, Step

if TYPE_CHECKING:
    from inkstream.evaluate.bakeoff.plan import Entry, Plan
    from inkstream.evaluate.bakeoff.run import Told

bakeoff = App(name="bakeoff", help_format="plaintext", default_parameter=Parameter(negative=""))
Language = Annotated[Literal["en", "zh"], Parameter(help="Language of the pages: English or Chinese.")]
Json = Annotated[bool, Parameter(show_default=False, help="Print one JSON document on stdout.")]
MODELS = "models"
"""The folder of quantised models in the folder of a bake-off."""
SWITCH = {"true": True, "false": False}


@bakeoff.default
def run(
    prompts: str,
    *,
    models: Annotated[tuple[str, ...], Parameter(negative=())],
    seeds: int = 4,
    seed: int = 0,
    limit: Annotated[int | None, Parameter(show_default=False)] = None,
    out: Annotated[Path | None, Parameter(alias=("-o", "--output"), group=RUN, show_default=False)] = None,
    language: Language = "en",
    record: Annotated[str | None, Parameter(show_default=False)] = None,
    machine: Anywhere = ANYWHERE,
    json: Json = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> int:
    """Let several models draw the same prompts with the same seeds, measure and check the pictures, write a report.

    Parameters
    ----------
    prompts
        A suite, as for `inkstream eval --suite`: posters, products, characters, scenes, FILE.txt, geneval:FILE, ...
    models
        Models, with commas between them, each as MODEL[@QUANT][@OPTION=VALUE]...: pocket@int8, z-image@steps=20,
        bfl:flux-2-pro, pocket@server=http://127.0.0.1:8400. Options are those of requests and machines, and name.
    seeds
        Pictures of each prompt by each model.
    seed
        Seed of the first picture. Picture S of prompt N has the seed SEED + 1000 N + S, for all models.
    limit
        Number of prompts at most, spread evenly over the suite.
    out
        Folder of the bake-off; default: bakeoffs/PROMPTS.
    record
        Also write benchmarks/records/NAME.json.
    quiet
        Print no progress and no messages, only errors.
    yes
        Download missing files without asking.
    """
    for option, value in (("--seeds", seeds), ("--limit", limit)):
        if value is not None and not 1 <= value <= 1000:
            raise InputError(f"{option} {value} is out of range: give 1 to 1000")
    from inkstream.clients.manifest import NAME, read_lines
    from inkstream.evaluate.bakeoff.check import check_all
    from inkstream.evaluate.bakeoff.plan import Plan, freeze, read_entries
    from inkstream.evaluate.bakeoff.run import PICTURES, draw, open_manifest
    from inkstream.evaluate.suites import about_suite, open_suite, thin

    with Terminal(quiet) as terminal:
        cases = thin(open_suite(prompts), limit)
        if line := about_suite(prompts):
            terminal.say(line)
        if any(case.edit is not None for case in cases.values()):
            raise InputError(f"suite {prompts} has pictures to edit: a bake-off takes a suite of prompts")
        entries = [on_server(entry, machine.server) for entry in read_entries(models)]
        folder = out or Path("bakeoffs") / slug(Path(prompts).stem)
        try_folder(folder)
        places = {entry.name: machine_of(entry, machine) for entry in entries}
        remote = _remote([entry.model for entry in entries if is_remote(entry.model)], machine)
        facts = [examine(entry, places[entry.name], remote, folder, yes, terminal) for entry in entries]
        sources = [entry.model if entry.quant is None else str(written(entry, folder)) for entry in entries]
        plan = Plan(prompts_name(prompts), cases, entries, sources, facts, seeds, seed)
        freeze(plan, folder)
        with closing(open_manifest(folder)) as manifest:
            jobs = [list(plan.jobs(number)) for number in range(len(entries))]
            wanted = [job for of_model in jobs for job in of_model]
            missing = {job.key for job in manifest.missing(wanted)}
            todo = [[job for job in of_model if job.key in missing] for of_model in jobs]
            terminal.say(f"{len(wanted) - len(missing)} of {len(wanted)} pictures are there, {len(missing)} to draw")
            foresee([job.request for of_model in todo for job in of_model], machine, terminal)
            opening = partial(open_drawer, places=places, remote=remote, folder=folder, terminal=terminal)
            try:
                with closing(draw(plan, manifest, todo, opening)) as told:
                    follow(told, plan, len(missing), terminal)
                lines = [line for line in read_lines(folder / PICTURES / NAME) if "file" in line]
                for number in check_all(folder, lines, cases):
                    terminal.wait("checking", number, len(lines))
            except KeyboardInterrupt:
                there = sum("file" in line for line in read_lines(folder / PICTURES / NAME))
                terminal.say(f"stopped; {there} of {len(wanted)} pictures are in {folder}: the same command resumes")
                raise
        return report(folder, language, terminal, json, record)


def prompts_name(prompts: str) -> str:
    """The name of a suite in the plan; of a file, its name without the folder."""
    kind, colon, path = prompts.rpartition(":")
    return f"{kind}{colon}{Path(path).name}"


def on_server(entry: Entry, server: str | None) -> Entry:
    """A model, drawn by the command's server unless it says where. Raises InputError if it would be quantised there."""
    if server is not None and not entry.elsewhere:
        entry = replace(entry, machine=(*entry.machine, ("server", server)))
    if entry.elsewhere and entry.quant:
        raise InputError(f"model {entry.name} is on a server, which has its own weights: leave @{entry.quant} out")
    return entry


def machine_of(entry: Entry, machine: Anywhere) -> Anywhere:
    """The machine that a model is drawn on: the command's, with the model's own options; or a server."""
    known = {field.name: field.type for field in fields(Anywhere)}
    own: dict[str, Any] = {}
    for name, text in entry.machine:
        if known[name] == "bool":
            if text not in SWITCH:
                raise InputError(f"model {entry.name}: {name} is {text!r}: give true or false")
            own[name] = SWITCH[text]
        else:
            own[name] = (text,) if name == "merge_lora" else text
    return replace(ANYWHERE if entry.elsewhere else machine, **own)


def examine(
    entry: Entry, place: Anywhere, remote: dict[str, Any], folder: Path, yes: bool, terminal: Terminal
) -> dict[str, Any]:
    """Check a model before anything big is read, and return the facts that are frozen. Raises InputError."""
    from inkstream.evaluate.bakeoff.plan import Hashes, describe

    asked = entry.asked(prompt="a prompt")
    if not entry.elsewhere:
        agree_to_loras([*asked.loras, *place.merge_lora], place, yes, terminal)
        check(asked, place)
        agree_to_download(entry.model, yes, terminal, place.commercial_only)
    hashes = Hashes(folder, lambda done, total: terminal.wait("hashing weights", done, total, in_gigabytes(done)))
    return describe(entry, remote.get(entry.model) or make_drawer(place), place, hashes)


def _remote(names: Sequence[str], machine: Anywhere) -> dict[str, Any]:
    """The Drawers of remote models, which share one budget."""
    if not names:
        return {}
    from inkstream.clients.remote.drawer import remote_drawers

    return dict(remote_drawers(names, machine))


def open_drawer(
    entry: Entry, places: dict[str, Anywhere], remote: dict[str, Any], folder: Path, terminal: Terminal
) -> Drawer:
    """Open what draws with a model. A quantised one is written to the folder first, unless it is there."""
    if entry.model in remote:
        return remote[entry.model]
    place = places[entry.name]
    if entry.quant is None:
        return make_drawer(place)
    from inkstream.engine.files.convert import convert

    target = written(entry, folder)
    if not target.exists():
        terminal.say(f"quantising {entry.model} to {entry.quant}")
        convert(entry.model, target, None, terminal.show, entry.quant, place.chosen)  # type: ignore[arg-type]
    return make_engine(replace(place, text_encoder=None, vae=None))  # which the written model has


def written(entry: Entry, folder: Path) -> Path:
    """Where a quantised model is written."""
    return folder / MODELS / slug(entry.name)


def follow(told: Iterator[Told], plan: Plan, total: int, terminal: Terminal) -> None:
    """Show the progress of a bake-off."""
    progress, failed = Progress(total, terminal), 0
    for job, event in told:
        if isinstance(event, Loading):
            terminal.say(event.note, once=True) if event.note else terminal.show(event)
            continue
        if isinstance(event, Failed):
            failed += 1
            terminal.say(
                f"{plan.entries[job.index // plan.seeds].name}, prompt {job.row}: {one_line(event.error)}", once=True
            )
        share = event.step / event.steps if isinstance(event, Step) else None
        progress.move(job.row * 10_000 + job.index, share, failed)


@bakeoff.command
def vote(
    folder: Path,
    *,
    port: int = 8401,
    language: Language = "en",
) -> None:
    """Serve the voting page on this machine, and save the votes in the folder. Ctrl-C ends it.

    Parameters
    ----------
    folder
        Folder of a bake-off.
    port
        Port on 127.0.0.1.
    """
    from inkstream.evaluate.bakeoff.ballot import write_ballot
    from inkstream.evaluate.bakeoff.polls import serve_votes
    from inkstream.evaluate.bakeoff.results import read_results

    write_ballot(read_results(folder), language)
    with serve_votes(folder, port) as server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


@bakeoff.command
def rank(
    folder: Path,
    *,
    votes: Annotated[tuple[Path, ...], Parameter(negative=(), consume_multiple=True)] = (),
    judge: Annotated[str | None, Parameter(show_default=False)] = None,
    judge_model: Annotated[str | None, Parameter(show_default=False)] = None,
    questions: int = 100,
    language: Language = "en",
    json: Json = False,
    quiet: Annotated[bool, Parameter(show_default=False)] = False,
) -> int:
    """Rank the models of a bake-off by votes, and write the report again.

    Parameters
    ----------
    folder
        Folder of a bake-off. Votes that were saved there by `inkstream bakeoff vote` count.
    votes
        Files of votes that voters downloaded from vote.html. They are copied to the folder.
    judge
        Address of a chat server with OpenAI's API, such as http://127.0.0.1:8080/v1, whose model sees pictures: it
        answers questions too. The pictures go there. Its key is INKSTREAM_JUDGE_KEY.
    judge_model
        Name of the judge's model at its server; default: the first that the server lists.
    questions
        Pairs of pictures that the judge is asked about, those of earlier runs included. Each is asked in both orders.
    quiet
        Print no progress and no messages, only errors.
    """
    from inkstream.evaluate.bakeoff.ballot import write_ballot
    from inkstream.evaluate.bakeoff.results import read_results
    from inkstream.evaluate.bakeoff.votes import add_votes

    with Terminal(quiet) as terminal:
        write_ballot(read_results(folder), language)
        for path in votes:
            terminal.say(f"{path}: {add_votes(folder, path)} votes")
        if judge is not None:
            from inkstream.evaluate.bakeoff.judge import Judge, ask_judge

            try:
                for number in ask_judge(read_results(folder), Judge(judge, judge_model), questions):
                    terminal.wait("judge", number, questions)
            except KeyboardInterrupt:
                terminal.say("stopped; the same command resumes")
                raise
        return report(folder, language, terminal, json, None)


def report(folder: Path, language: Language, terminal: Terminal, json: bool, record: str | None) -> int:
    """Write the report, and print the table of all measures. Returns the exit code: 1 if pictures are missing."""
    from inkstream.evaluate.bakeoff.ballot import rank_votes, write_ballot
    from inkstream.evaluate.bakeoff.page import write_report, write_sheets
    from inkstream.evaluate.bakeoff.results import as_lines, as_record, read_results, write_tables

    terminal.wait("writing the report", 0, 0)
    results = read_results(folder)
    rankings = rank_votes(results)
    write_ballot(results, language)
    path = write_report(results, language, rankings, write_sheets(results))
    write_tables(results, {"rankings": rankings})
    if record is not None:
        terminal.say(str(as_record(results, record)))
    short = sum(picture.failure == "error" for picture in results.pictures)
    if json:
        print_json({"report": str(path), "missing": short, "rankings": rankings,
                    "rows": [asdict(row) for row in results.rows]})  # fmt: skip
        return 1 if short else 0
    for line in as_lines(results):
        terminal.print(line)
    for ranking in rankings:
        terminal.print(f"\n{words('en', ranking['title'], votes=ranking['votes'])}")
        for model in sorted(ranking["models"], key=lambda model: -model["points"]):
            interval = f"{model['low']:.0f} - {model['high']:.0f}"
            terminal.print(
                f"  {model['rank']}  {model['name']}  {model['points']:.0f} ({interval}), {model['votes']} votes"
            )
    terminal.say(str(path))
    if short:
        terminal.say(f"{short} pictures failed: the same command tries them again")
    return 1 if short else 0
