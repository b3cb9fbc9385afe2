"""Run contenders in separate processes that draw in turn, so that the machine's load affects all equally."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from inkstream.bench.cases import CONTENDERS, Case, rehearsed
from inkstream.bench.random_model import write_documents, write_random
from inkstream.engine.files.convert import convert
from inkstream.engine.machine.loader import DTYPES
from inkstream.types import InputError
from inkstream.weights.files import read_state

PEERS = Path("benchmarks/peers")
COMMANDS: Mapping[str, Sequence[str]] = {
    "ours": ("-m", "inkstream.bench.ours"),
    "diffusers": (str(PEERS / "with_diffusers.py"),),
    "sd": (str(PEERS / "with_sd.py"),),
}
"""Arguments of Python for each kind of contender."""
LEFT_OUT = 3
"""Exit code of a contender that is not installed or cannot draw the case."""
APART = 2
"""Largest allowed difference between pictures of the same weights and noise, in steps of 1/255."""


class Contender:
    """A process that draws. A context manager; the process is killed at the end of the `with` block."""

    def __init__(self, name: str, given: Mapping[str, Any]):
        how = CONTENDERS[name]
        self.name = name
        self.versions: dict[str, str] = {}
        self.trouble: str | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, *COMMANDS[how["by"]], json.dumps({**given, "how": how})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file is not None
            with suppress(BrokenPipeError):  # the process may have ended before it read its last order
                file.close()

    def opened(self) -> bool:
        """Wait until the process is ready. Returns False if it failed; `trouble` then holds the reason."""
        answer = self._read()
        self.versions = answer.get("versions", {})
        return self.trouble is None

    def draw(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Send an order and return the answer; an empty dict if the process failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; `_read` reports that
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        self.trouble = said[-1] if said else f"the process ended with exit code {code}"
        if code != LEFT_OUT:
            self.trouble = f"failed: {self.trouble}"
        return {}


@dataclass
class Drawn:
    """Measurements of one contender for one case."""

    seconds: list[dict[str, float]] = field(default_factory=list)  # stage -> seconds, for each timed order
    peak_bytes: int | None = None
    first: float = 0.0  # seconds of the very first order, including compilation

    @property
    def whole(self) -> list[float]:
        return [sum(stages.values()) for stages in self.seconds]


def run_cases(
    cases: Sequence[Case], threads: int, say: Callable[[str], None], rehearse: bool = False, repeats: int | None = None,
    until: float | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Measure the cases. Yields the rows of a record as they are measured, one for each case and contender.

    say: called with a line for each contender or case that is left out, with the reason. repeats: replaces the repeats
    of each case if given. until: a time of `time.monotonic`; a case that has not started by then is left out.
    """
    numbers = itertools.count(1)
    for _, together in itertools.groupby(cases, key=lambda case: case.home):
        group = list(together)
        case = rehearsed(group[0]) if rehearse else group[0]
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            folder = prepare(case, Path(scratch))
            given = {"case": group[0].name, "rehearse": rehearse, "folder": str(folder), "threads": threads}
            names = dict.fromkeys(name for one in group for name in one.contenders)
            contenders = [stack.enter_context(Contender(name, given)) for name in names]
            ready = [contender for contender in contenders if contender.opened()]
            for contender in contenders:
                if contender.trouble:
                    say(f"{case.name}: {contender.name} is left out: {contender.trouble}")
            for one in group:
                if until is not None and time.monotonic() > until:
                    say(f"{one.name} is left out: the time limit is reached")
                    continue
                able = [contender for contender in ready if contender.name in one.contenders]
                yield from run_case(one, able, numbers, Path(scratch), rehearse, repeats, say)


def prepare(case: Case, scratch: Path) -> Path:
    """Write the model's folder: its JSON files, and its weights if the contenders read them from there."""
    if case.weights == "package":
        return scratch
    if case.weights == "memory":
        return write_documents(case.spec, scratch / "model")
    native = write_random(case.spec, scratch / "native", DTYPES[case.dtype])
    return convert(str(native), str(scratch / "model"), "diffusers")


def run_case(
    case: Case, contenders: Sequence[Contender], numbers: Iterator[int], scratch: Path, rehearse: bool,
    repeats: int | None, say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure one case: warm up, compare the pictures if all contenders read the same weights, then draw in turn."""
    name, case = case.name, rehearsed(case) if rehearse else case
    found = {contender.name: Drawn() for contender in contenders}

    def order(contender: Contender, number: int, warm: bool = False, save: Path | None = None) -> None:
        line = {"case": name, "rehearse": rehearse, "number": number, "warm": warm, "save": str(save) if save else None}
        if contender.trouble or not (answer := contender.draw(line)):
            return
        drawn = found[contender.name]
        drawn.peak_bytes = answer["peak_bytes"]
        if warm or save:
            drawn.first = drawn.first or sum(answer["seconds"].values())
        else:
            drawn.seconds.append(answer["seconds"])

    pictures = {contender.name: scratch / f"{name}-{i}.safetensors" for i, contender in enumerate(contenders)}
    for contender in contenders:
        order(contender, 0, save=None if case.weights == "memory" else pictures[contender.name], warm=True)
        for _ in range(case.warm - 1):
            order(contender, next(numbers), warm=True)
    apart = differences({who: path for who, path in pictures.items() if path.exists()})
    for _ in range(repeats or case.repeats):
        number = next(numbers)
        for contender in contenders:
            order(contender, number)
    for contender in contenders:
        if contender.trouble:
            say(f"{name}: {contender.name} {contender.trouble}")
    done = {contender.name: contender for contender in contenders if found[contender.name].seconds}
    rival = next((who for who in done if CONTENDERS[who]["by"] != "ours"), "ours")
    base = median(found[rival].whole) if rival in done else None
    return [as_row(name, case, done[who], found[who], base, apart.get(who)) for who in done]


def differences(pictures: Mapping[str, Path]) -> dict[str, float]:
    """Return the largest difference of each picture from the first, in steps of 1/255.

    Raises InputError if a difference is above APART, or if the first picture is almost uniform.
    """
    pixels = {who: read_state(path)["pixels"] for who, path in pictures.items()}
    if not pixels:
        return {}
    ours, *_ = pixels.values()
    assert isinstance(ours, torch.Tensor)
    if ours.float().std() < 5:
        raise InputError("the pictures are flat, so they cannot be compared: use other random weights")
    apart = {who: (other.int() - ours.int()).abs().max().item() for who, other in pixels.items()}  # type: ignore[union-attr]
    for who, steps in apart.items():
        if steps > APART:
            raise InputError(
                f"the picture of {who} is {steps}/255 from ours, the limit is {APART}/255: check its settings"
            )
    return apart


def as_row(
    name: str, case: Case, contender: Contender, drawn: Drawn, base: float | None, apart: float | None
) -> dict[str, Any]:
    """Return a flat row of a record.

    Its ratio is the contender's median divided by `base`, the first peer's median in seconds.
    """
    whole = drawn.whole
    middle = median(whole)
    stages = {f"{stage}_median": round(median(s[stage] for s in drawn.seconds), 5) for stage in drawn.seconds[0]}
    return {
        "case": name,
        "contender": contender.name,
        "ratio": round(middle / base, 4) if base else None,
        "model": case.spec.name,
        "width": case.width,
        "height": case.height,
        "steps": case.steps,
        "evaluations": case.evaluations,
        "pictures": case.count,
        "device": case.device,
        "dtype": case.dtype,
        "median": round(middle, 5),
        "least": round(min(whole), 5),
        "most": round(max(whole), 5),
        **stages,
        "first": round(drawn.first, 3),
        "warm": case.warm,
        "repeats": len(whole),
        "peak_bytes": drawn.peak_bytes,
        "apart_255": apart,
        "versions": contender.versions,
    }


def describe(row: Mapping[str, Any]) -> str:
    """Format a row as one line that begins with the ratio."""
    stages = ", ".join(f"{stage} {row[f'{stage}_median']:.3f}" for stage in ("prompt", "steps", "pixels")
                       if f"{stage}_median" in row)  # fmt: skip
    ratio = "      -" if row["ratio"] is None else f"{row['ratio']:7.3f}"
    spread = f"{row['least']:.3f} to {row['most']:.3f}"
    return f"ratio {ratio}  {row['case']:<18} {row['contender']:<18} {row['median']:.3f} s ({spread}; {stages})"
