"""Fault test of `inkstream batch`: kill the command while it draws, run it again, then check all results.

    python scripts/batch_fault.py [--rows 200] [--kills 1] [--ray] [--engines 1] [--model pocket] [--seed 0]

The command gets SIGKILL at a random moment between its first picture and its last. At the end every row must be in the
manifest exactly once. The file of each row must match its manifest line and contain the row's prompt. The folder must
hold no other files. The script prints one JSON document; the exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATIENCE = 1800.0
"""Time limit of a fault test in seconds."""
DRAW = ("-W", "64", "-H", "64", "--steps", "8")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")


def ordeal(folder: Path, rows: int, kills: int, words: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Run the fault test in an empty folder. words: the command's other arguments, after the file and the folder."""
    dice = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    prompts, out = folder / "prompts.txt", folder / "pictures"
    prompts.write_text("".join(f"{number} {COLOURS[number % len(COLOURS)]} circles\n" for number in range(rows)))
    command = [sys.executable, "-m", "inkstream", "batch", str(prompts), "--out", str(out), *words]
    killed_at: list[int] = []
    began = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        for kill in range(kills):
            moment = dice.uniform(kill + 0.2, kill + 0.8) * rows / kills
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while lines_of(out) < moment and process.poll() is None and time.monotonic() - began < PATIENCE:
                time.sleep(0.02)
            process.kill()
            process.wait()
            killed_at.append(lines_of(out))
        code = subprocess.run(command, stdout=log, stderr=log, timeout=PATIENCE, check=False).returncode
    problems = [] if code == 0 else [f"the last run ended with {code}: {(folder / 'log.txt').read_text()[-500:]}"]
    problems += examine(out, prompts.read_text().splitlines())
    pictures = len(list(out.glob("*.png")))
    return {
        "rows": rows,
        "killed at": killed_at,
        "pictures": pictures,
        "lines": lines_of(out),
        "seconds": round(time.monotonic() - began, 1),
        "problems": problems,
    }


def lines_of(out: Path) -> int:
    """Return the number of complete lines in the manifest."""
    path = out / "manifest.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def examine(out: Path, prompts: Sequence[str]) -> list[str]:
    """Check the manifest and the files. Returns one line for each problem."""
    from inkstream.engine.pictures.metadata import read_request

    problems = []
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    times = Counter(line["row"] for line in lines)
    for row, prompt in enumerate(prompts, 1):
        if times[row] != 1:
            problems.append(f"row {row} is {times[row]} times in the manifest")
            continue
        line = next(line for line in lines if line["row"] == row)
        path = out / line.get("file", "nothing")
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != line["sha256"]:
            problems.append(f"row {row}: the picture does not match its manifest line: {line}")
            continue
        request = read_request(path).request
        if (request.prompt, request.seed) != (prompt, line["seed"]):
            problems.append(f"row {row}: {path.name} is a picture of {request.prompt!r}")
    known = {line.get("file") for line in lines} | {"manifest.jsonl", ".lock"}
    problems += [f"{path.name} belongs to no row" for path in out.iterdir() if path.name not in known]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    words = ["-m", given.model, *DRAW, *(("--ray", "--engines", str(given.engines)) if given.ray else ())]
    with tempfile.TemporaryDirectory() as folder:
        outcome = ordeal(Path(folder) / "batch", given.rows, given.kills, words, given.seed)
    print(json.dumps({"command": " ".join(["batch", *words]), **outcome}, indent=2))
    return 1 if outcome["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
