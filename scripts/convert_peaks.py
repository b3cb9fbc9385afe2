"""Measure the memory and the time to pack a model's weights.

    python scripts/convert_peaks.py --date 2026-11-21 MODEL [--kind q4_k ...] [--folder FOLDER] [--record convert-cpu]

MODEL: a folder or a name, or random:NAME for random weights with a known model's full size. A separate process of
`inkstream convert` writes each kind; its files are removed afterwards. `peak` is the process's peak resident memory,
including pages of memory-mapped files.
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
from inkstream.engine.files.quantise import QUANTS
from inkstream.families import SPECS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--kind", action="append", choices=QUANTS, help="a format; default: fp8, q8_0, q4_k")
    parser.add_argument("--folder", type=Path, help="folder for the files, with space for the largest model")
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
    """Convert a model. Returns wall seconds, CPU seconds, peak memory in bytes, and the files' size in bytes."""
    words = [sys.executable, "-m", "inkstream", "convert", model, str(place), "--quant", kind]
    began = time.perf_counter()
    child = os.posix_spawn(words[0], words, os.environ)
    _, status, used = os.wait4(child, 0)
    if status:
        sys.exit(f"{shlex.join(words)} failed with exit code {os.waitstatus_to_exitcode(status)}")
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
