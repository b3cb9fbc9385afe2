"""Results of timed runs as JSON files, each with the machine it ran on, from which the docs' tables are rendered."""

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
    """What the times depend on: processor, its usable cores, torch's threads and version, the accelerator if any."""
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
    """The processor's name as Linux gives it, elsewhere what Python knows."""
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
    """Write NAME.json: what ran (`command`), when, on what machine, beside which `peers` (name -> version), and the
    measurements, one flat row each."""
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
    """The record of that name."""
    return json.loads((folder / f"{name}.json").read_text())
