"""`inkstream eval`: draws a suite of prompts, grades the pictures, and writes a table, a record and a contact sheet."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from inkstream.cli.download import agree_to_download, agree_to_loras
from inkstream.cli.generate import check, slug, try_folder
from inkstream.cli.lines import print_json
from inkstream.cli.machine import HERE, RUN, Here, make_engine
from inkstream.cli.terminal import Terminal
from inkstream.types import InputError, Request

if TYPE_CHECKING:
    from inkstream.engine.drawing.model import Model
    from inkstream.evaluate.report import Row
    from inkstream.evaluate.run import Job, Settings

SWEPT = 40  # prompts of a sweep, unless --limit says otherwise
IN_SWEEPS = ("all right", "object and colour", "relation", "count", "text exact", "Frechet distance")


def evaluate(
    model: str,
    *,
    suite: str = "pocket",
    seeds: int = 2,
    limit: Annotated[int | None, Parameter(show_default=False)] = None,
    steps: int | None = None,
    guidance: float | None = None,
    width: Annotated[int | None, Parameter(alias="-W")] = None,
    height: Annotated[int | None, Parameter(alias="-H")] = None,
    upsample: Annotated[bool, Parameter(show_default=False, negative="--no-upsample")] = True,
    loras: Annotated[tuple[str, ...], Parameter(name="--lora", negative=())] = (),
    sweep: Annotated[bool, Parameter(show_default=False)] = False,
    ceiling: Annotated[bool, Parameter(show_default=False)] = False,
    ocr: Annotated[bool, Parameter(show_default=False)] = False,
    output: Annotated[Path | None, Parameter(alias="-o", group=RUN)] = None,
    machine: Here = HERE,
    json: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> None:
    """Draw a suite of prompts with a model and grade the pictures.

    Parameters
    ----------
    model
        A model's name, a repository on the hub, or a local path.
    suite
        pocket: 200 scenes outside the training data; text: 200 strings; edits: 120 edits of scenes, for models that
        take references; people, people2: 300 and 160 prompts as people type them; posters, products, characters,
        scenes: 42 prompts each in English and Chinese; a .jsonl file with one {"prompt": ...} a line; a .txt file with
        one prompt a line; or a file of others that you downloaded: geneval:FILE, dpg:FILE, cvtg:FILE, longtext:FILE,
        oneig:FILE.
    seeds
        Pictures per prompt, each with its own seed.
    limit
        Number of prompts at most, spread evenly over the suite.
    steps
        Steps of the solver; default: the model's.
    guidance
        Classifier-free guidance scale, 1 is off; default: the model's.
    width
        Width in pixels of prompts without one; default: the model's.
    height
        Height in pixels of prompts without one; default: the model's.
    upsample
        Prompts are rewritten by the model's own grammar, if it has one; --no-upsample draws them as they are.
    loras
        LoRA or a relative, as PATH[:STRENGTH][@FROM-UNTIL]; repeat for more.
    sweep
        Also draw 40 prompts, or --limit, with 2 to 50 steps, and with guidance 1 to 6 if the model takes guidance.
    ceiling
        Grade the true pictures, and their reconstructions by the model's autoencoder, instead of drawing.
    ocr
        Also read text with a second, independent reader; needs the extra "ocr".
    output
        Output folder; default: evaluation/MODEL-SUITE.
    json
        Print one JSON document on stdout at the end.
    quiet
        Print no progress and no messages, only errors.
    yes
        Download missing files without asking.
    """
    for name, value, most in (("--seeds", seeds, 1000), ("--limit", limit, None)):
        if value is not None and not 1 <= value <= (most or value):
            raise InputError(f"{name} {value} is out of range: give 1 {f'to {most}' if most else 'or more'}")
    from inkstream.engine.pictures.ocr import open_reader
    from inkstream.evaluate.judge import judge_drawings, judge_sweep, judge_truths, measure_loss
    from inkstream.evaluate.report import matrix, record, table, write_sheet
    from inkstream.evaluate.run import Settings, claim, plan
    from inkstream.evaluate.suites import about_suite, open_suite, thin

    with Terminal(quiet) as terminal:
        whole = open_suite(suite)
        if line := about_suite(suite):
            terminal.say(line)
        cases = thin(whole, limit)
        settings = Settings(seeds, steps, guidance, width, height, None if upsample else False, loras)
        agree_to_loras([*loras, *machine.merge_lora], machine, yes, terminal)
        check(Request.model_validate({"model": model, **settings.fields()}), machine)
        if ocr:
            open_reader()
        folder = output or Path("evaluation") / f"{slug(Path(model).name)}-{slug(Path(suite).stem)}"
        agree_to_download(model, yes, terminal, machine.commercial_only)
        engine = make_engine(machine)
        for event in engine.load(model):
            terminal.show(event)
        jobs = plan(engine.model, cases, settings)
        try_folder(folder)
        swept: list[Row] = []
        if ceiling:
            judged, rows = judge_truths(engine.model, cases, jobs, folder, ocr, terminal.show)
        else:
            claim(folder, suite, model, whole, settings)
            try:
                judged, rows = judge_drawings(engine.model, cases, jobs, folder, ocr, terminal.show)
                rows += measure_loss(engine.model, cases, jobs, terminal.show)
                if sweep:
                    few = thin(whole, limit or SWEPT)
                    swept = judge_sweep(engine.model, few, settings, folder, terminal.show)
            except KeyboardInterrupt:
                drawn = sum(job.path(folder).exists() for job in jobs)
                terminal.say(f"stopped; {drawn} of {len(jobs)} pictures are in {folder}: the same command resumes")
                raise
        name = "ceiling" if ceiling else "report"
        ran = facts(engine.model, model, suite, jobs, len(cases), seeds)
        words = repeat(model, suite, limit, settings, sweep, ceiling, ocr)
        place = record(name, date.today().isoformat(), words, ran, [*rows, *swept], folder)
        sheet = folder / f"{name}.png"
        write_sheet(judged, {number: case.prompt for number, case in cases.items()}, sheet)
        if json:
            numbers = [asdict(row) for row in (*rows, *swept)]
            print_json({**ran, "record": str(place), "sheet": str(sheet), "rows": numbers})
            return
        if all(picture.right is None for picture in judged):
            terminal.say("nothing was graded: give the prompts a scene, or a text and --ocr")
        for line in (*table(rows), *(["", *matrix(swept, IN_SWEEPS)] if swept else [])):
            terminal.print(line)
        for path in (place, sheet):
            terminal.say(str(path))


def facts(model: Model, name: str, suite: str, jobs: Sequence[Job], prompts: int, seeds: int) -> dict[str, Any]:
    """Return the settings of a run as JSON. Settings that differ between prompts are left out."""
    shown = ("width", "height", "steps", "guidance", "shift", "solver", "schedule", "upsample", "loras")
    values = {field: {getattr(job.request, field) for job in jobs} for field in shown}
    return {
        "model": name,
        "suite": suite,
        "prompts": prompts,
        "seeds": seeds,
        **{field: found.pop() for field, found in values.items() if len(found) == 1},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def repeat(model: str, suite: str, limit: int | None, settings: Settings, sweep: bool, ceiling: bool, ocr: bool) -> str:
    """Return the command that repeats the evaluation."""
    words = ["inkstream", "eval", model, "--suite", suite]
    for name, value in {**asdict(settings), "limit": limit}.items():
        if name == "loras":
            words += [word for lora in value for word in ("--lora", lora)]
        elif value is not None:
            words += ["--no-upsample"] if value is False else [f"--{name}", str(value)]
    flags = {"--sweep": sweep, "--ceiling": ceiling, "--ocr": ocr}
    return shlex.join([*words, *(flag for flag, given in flags.items() if given)])
