"""Evaluations of a suite: drawn pictures, true pictures, autoencoder reconstructions, and sweeps of settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from inkstream.engine.drawing.model import Model
from inkstream.engine.pictures.inputs import to_image, to_pixels
from inkstream.evaluate.edits import grade_edit
from inkstream.evaluate.grades import Marks, grade
from inkstream.evaluate.measures import diversity, features, frechet_distance, held_out_loss, psnr
from inkstream.evaluate.ocr import read
from inkstream.evaluate.report import Judged, Row, shares
from inkstream.evaluate.run import Job, Settings, draw, open_picture, plan
from inkstream.evaluate.suites import Case
from inkstream.evaluate.variety import variety
from inkstream.pocket.draw import render
from inkstream.types import Event, InputError, Loading

Show = Callable[[Event], None]
Cases = Mapping[int, Case]  # cases by their numbers in the suite

STEPS = (2, 4, 8, 16, 50)
GUIDANCE = (1.0, 2.0, 3.0, 4.5, 6.0)
MOST_LOSSES = 64
"""Most scenes of the held-out loss. Each scene is measured at 8 times."""


def judge(path: Path, number: int, seed: int, case: Case, ocr: bool = False) -> Judged:
    """Judge the picture at `path` for case `number`. inkstream's graders judge it if the case has a scene.

    ocr: also use the second reader if the case has a text. Raises InputError if the extra `ocr` is not installed.
    """
    picture = open_picture(path)
    marks = None
    if case.edit is not None:
        found = grade_edit(picture, case.edit)
        marks = Marks(asked=found.asked, kept=found.kept)
    elif case.scene is not None:
        marks = grade(picture, case.scene, case.stated, case.open_colour)
    reading = read(picture, case.text) if ocr and case.text else None
    return Judged(path, number, seed, case.group, marks, reading)


def judge_drawings(
    model: Model, cases: Cases, jobs: Sequence[Job], folder: Path, ocr: bool, show: Show
) -> tuple[list[Judged], list[Row]]:
    """Draw the jobs that are not in the folder and judge all. The rows are shares and measures of the model."""
    for step in draw(model, jobs, folder):
        show(step)
    judged = []
    for number, job in enumerate(jobs, 1):
        show(Loading(f"judging picture {number} of {len(jobs)}"))
        judged.append(judge(job.path(folder), job.case, job.seed, cases[job.case], ocr))
    show(Loading("measuring"))
    seen = features(open_picture(picture.path) for picture in judged)
    rows = shares(judged)
    different = diversity(seen, [job.case for job in jobs])
    if different is not None:
        rows.append(Row("drawn", "diversity over seeds", "all", different, pictures=len(jobs)))
    shown = (
        (cases[job.case].prompt, job.request.seed, open_picture(job.path(folder)))
        for job in jobs
        if cases[job.case].edit is None
    )
    for name, found in variety(shown).items():
        rows.append(Row("drawn", "diversity against the renderer", name, found.ratio, pictures=found.pictures))
    known = [job for job in jobs if cases[job.case].scene is not None]
    if len(known) == len(jobs) > 1:
        distance = frechet_distance(*(patches.flatten(0, 1) for patches in (seen, features(_truths(cases, jobs)))))
        rows.append(Row("drawn", "Frechet distance", "all", distance, pictures=len(jobs)))
    return judged, rows


def grade_drawings(model: Model, cases: Cases) -> dict[str, float]:
    """Draw and judge one picture of each case. Returns shares by question. The pictures are not kept."""
    jobs = plan(model, cases, Settings(seeds=1))
    with TemporaryDirectory() as folder:
        for _ in draw(model, jobs, Path(folder)):
            pass
        judged = [judge(job.path(Path(folder)), job.case, job.seed, cases[job.case]) for job in jobs]
    return {row.measure: row.value for row in shares(judged) if row.group == "all"}


def judge_truths(
    model: Model, cases: Cases, jobs: Sequence[Job], folder: Path, ocr: bool, show: Show
) -> tuple[list[Judged], list[Row]]:
    """Judge the true pictures and their autoencoder reconstructions, which are the upper limit of the model.

    Each case with a scene has one picture of each kind, written to the folder. Returns the judged reconstructions and
    the rows of both kinds. Raises InputError if no case has a scene.
    """
    known = [job for job in _first_of_each(jobs) if cases[job.case].scene is not None]
    if not known:
        raise InputError("no prompt of this suite has a scene, so there is no true picture: take suite pocket")
    kinds = ("truth", "reconstruction")
    judged: dict[str, list[Judged]] = {kind: [] for kind in kinds}
    noise: list[float] = []
    for number, (job, truth) in enumerate(zip(known, _truths(cases, known)), 1):
        show(Loading(f"judging picture {number} of {len(known)}"))
        for kind, picture in zip(kinds, (truth, again := reconstruct(model, truth))):
            path = folder / kind / f"{job.case:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            judged[kind].append(judge(path, job.case, 0, cases[job.case], ocr))
        noise.append(psnr(truth, again))
    rows = [row for kind in kinds for row in shares(judged[kind], kind)]
    rows.append(Row("reconstruction", "PSNR in dB", "all", sum(noise) / len(noise), pictures=len(known)))
    if len(known) > 1:
        seen = [features(open_picture(picture.path) for picture in judged[kind]).flatten(0, 1) for kind in kinds]
        rows.append(Row("reconstruction", "Frechet distance", "all", frechet_distance(*seen), pictures=len(known)))
    return judged["reconstruction"], rows


def judge_sweep(model: Model, cases: Cases, settings: Settings, folder: Path, show: Show) -> list[Row]:
    """Judge one seed of each prompt at each number of STEPS and, if the model has guidance, at each of GUIDANCE."""
    points = [(f"{steps} steps", replace(settings, seeds=1, steps=steps)) for steps in STEPS]
    if "guidance" in model.spec.abilities:
        points += [(f"guidance {scale:g}", replace(settings, seeds=1, guidance=scale)) for scale in GUIDANCE]
    rows = []
    for name, point in points:
        there = folder / "sweep" / name.replace(" ", "-")
        _, found = judge_drawings(model, cases, plan(model, cases, point), there, False, show)
        rows += [replace(row, of=name) for row in found]
    return rows


def measure_loss(model: Model, cases: Cases, jobs: Sequence[Job], show: Show) -> list[Row]:
    """Measure the held-out loss on true pictures of at most MOST_LOSSES cases: the mean and the loss at each time."""
    known = [job for job in _first_of_each(jobs) if cases[job.case].scene and not cases[job.case].edit]
    chosen = known[:: max(1, -(-len(known) // MOST_LOSSES))]
    if not chosen:
        return []
    show(Loading("held-out loss"))
    found = held_out_loss(model, _truths(cases, chosen), [cases[job.case].prompt for job in chosen])
    named = {"held-out loss": sum(found.values()) / len(found)}
    named |= {f"held-out loss at {t:g}": loss for t, loss in found.items()}
    return [Row("drawn", name, "all", loss, pictures=len(chosen)) for name, loss in named.items()]


@torch.inference_mode()
def reconstruct(model: Model, picture: Image.Image) -> Image.Image:
    """Return the autoencoder's reconstruction of a picture. Its sides must be multiples of the model's unit."""
    pixels = to_pixels(picture, *picture.size)[None].to(model.device)
    return to_image(model.family.decode(model.family.encode_image(pixels))[0])


def _first_of_each(jobs: Iterable[Job]) -> list[Job]:
    """Return the job of each case's first seed."""
    first: dict[int, Job] = {}
    for job in jobs:
        first.setdefault(job.case, job)
    return list(first.values())


def _truths(cases: Cases, jobs: Iterable[Job]) -> Iterator[Image.Image]:
    """Yield the true pictures of jobs, at their sizes. All cases must have scenes."""
    for job in jobs:
        scene = cases[job.case].scene
        assert scene is not None
        yield render(scene, job.request.width, job.request.height)
