"""Measure the memory and time that packing a model's weights takes.

    python scripts/convert_peaks.py --date 2026-11-21 MODEL [--kind q4_k ...] [--folder FOLDER] [--record convert-cpu]

MODEL: a folder or a name, or random:NAME for random weights at a known model's full size. Each kind is written by an
`inkstream convert` of its own and removed again; `peak` is the most memory that the process had, pages of the mapped
files included.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from inkstream.bench.random_model import write_random
from inkstream.bench.records import write_record
from inkstream.engine.quantise import QUANTS
from inkstream.families import SPECS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--date", default="", help="the day, for the record")
    parser.add_argument("--kind", action="append", choices=QUANTS, help="which kinds; fp8, q8_0, q4_k when left out")
    parser.add_argument("--folder", type=Path, help="where to write, with room for the largest")
    parser.add_argument("--record", help="name of the record to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = options.model
        if model.startswith("random:"):
            model = str(write_random(SPECS[model.removeprefix("random:")], Path(folder) / "full"))
        rows = []
        for kind in options.kind or ("fp8", "q8_0", "q4_k"):
            rows.append({"model": Path(options.model).name, "kind": kind, **convert(model, Path(folder) / kind, kind)})
            print(rows[-1], flush=True)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def convert(model: str, place: Path, kind: str) -> dict[str, Any]:
    """Seconds, seconds of the processor, the peak in bytes, and the bytes that were written."""
    words = [sys.executable, "-m", "inkstream", "convert", model, str(place), "--quant", kind]
    began = time.perf_counter()
    child = os.posix_spawn(words[0], words, os.environ)
    _, status, used = os.wait4(child, 0)
    if status:
        sys.exit(f"{shlex.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    shutil.rmtree(place)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak": used.ru_maxrss * 1024,
        "bytes": written,
    }


if __name__ == "__main__":
    main()
