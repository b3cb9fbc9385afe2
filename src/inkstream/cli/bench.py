"""`inkstream bench`: times cases with inkstream and other implementations in one run; prints lines, writes a record."""

from __future__ import annotations

import os
import shlex
import time
from datetime import date
from typing import Annotated, Any

from cyclopts import Parameter

from inkstream.cli.lines import print_json
from inkstream.cli.terminal import Terminal
from inkstream.types import InputError


def bench(
    *,
    cases: str = "cpu",
    repeats: Annotated[int | None, Parameter(show_default=False)] = None,
    threads: Annotated[int | None, Parameter(show_default=False)] = None,
    seconds: Annotated[float | None, Parameter(show_default=False)] = None,
    rehearse: Annotated[bool, Parameter(show_default=False)] = False,
    record: Annotated[str | None, Parameter(show_default=False)] = None,
    json: Annotated[bool, Parameter(show_default=False)] = False,
) -> None:
    """Time inkstream and other implementations in turns, in one run.

    Parameters
    ----------
    cases
        Cases, separated by commas. cpu and gpu are all cases of a device; tiny, medium, real-width, turbo-1024 and
        others are single cases.
    repeats
        Timed pictures of each implementation and case; default: the case's number.
    threads
        CPU threads of each implementation; default: one for each core.
    seconds
        Start no further case after this time.
    rehearse
        Run all cases with tiny models of 2 blocks, at 64 pixels, on the CPU. The times mean nothing.
    record
        Write benchmarks/records/NAME.json.
    json
        Print one JSON document on stdout at the end.
    """
    for name, value in (("--repeats", repeats), ("--threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is out of range: give 1 or more")
    from inkstream.bench.cases import find
    from inkstream.cli import cores_allowed

    chosen = find([name.strip() for name in cases.split(",")])
    from inkstream.bench.records import RECORDS, write_record
    from inkstream.bench.turns import PEERS, describe, run_cases
    from inkstream.engine.machine.loader import choose_device

    if not rehearse:
        for device in {case.device for case in chosen}:
            choose_device(device)
    if record and not RECORDS.is_dir():
        raise InputError(f"there is no folder {RECORDS} here to write --record {record} to: run it in the repository")
    count = threads or cores_allowed() or os.cpu_count() or 1
    with Terminal() as terminal:
        if not PEERS.is_dir():
            terminal.say(f"there is no folder {PEERS} here, so only inkstream is timed: run it in the repository")
        until = None if seconds is None else time.monotonic() + seconds
        words = repeat(cases, repeats, threads, seconds, rehearse, record)
        rows: list[dict[str, Any]] = []
        peers: dict[str, str] = {}
        place = None
        for row in run_cases(chosen, count, terminal.say, rehearse, repeats, until):
            peers |= {name: version for name, version in row.pop("versions").items() if name != "inkstream"}
            rows.append(row)
            if not json:
                terminal.print(describe(row))
            if record:  # after every row, so that an interrupted run leaves its rows
                place = write_record(record, date.today().isoformat(), words, peers, rows)
        if place:
            terminal.say(str(place))
        if json:
            print_json({"peers": peers, "rows": rows})


def repeat(
    cases: str, repeats: int | None, threads: int | None, seconds: float | None, rehearse: bool, record: str | None
) -> str:
    """Return the command that repeats the measurement."""
    words = ["inkstream", "bench", "--cases", cases]
    for name, value in (("repeats", repeats), ("threads", threads), ("seconds", seconds)):
        words += [] if value is None else [f"--{name}", f"{value:g}"]
    words += ["--rehearse"] if rehearse else []
    return shlex.join([*words, *(["--record", record] if record else [])])
