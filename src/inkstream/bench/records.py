"""Records: benchmark results as JSON files, with the machine that they ran on. The docs' tables are rendered from
them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import inkstream

RECORDS = Path("benchmarks/records")


def machine() -> dict[str, Any]:
    """Return the facts that times depend on: processor, usable cores, torch's threads, accelerator, versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "inkstream": inkstream.__version__,
    }


def cpu_model() -> str:
    """Return the processor's name: from /proc/cpuinfo on Linux, elsewhere from Python's `platform`."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_record(
    name: str,
    date: str,
    command: str,
    peers: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    folder: Path = RECORDS,
) -> Path:
    """Write NAME.json and return its path.

    It holds the command, the date, the machine, the peers (name -> version) and the measurements as flat rows.
    """
    record = {
        "name": name,
        "date": date,
        "command": command,
        "machine": machine(),
        "peers": dict(peers),
        "rows": [dict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return path


def read_record(name: str, folder: Path = RECORDS) -> dict[str, Any]:
    """Return the record of this name."""
    return json.loads((folder / f"{name}.json").read_text())
