"""stable-diffusion.cpp as a contender of `inkstream bench`. Its program runs once for each order and prints its times.

It reads the published weights, so the model must be downloaded first. Its loading time is not counted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from inkstream.bench.child import Draw, Order, Setup, Stages, attend
from inkstream.bench.turns import LEFT_OUT
from inkstream.engine.files.sources import locate
from inkstream.weights.hub import cached

STAGES = {
    "prompt": r"get_learned_condition completed, taking ([\d.]+) ?(ms|s)",
    "steps": r"sampling completed, taking ([\d.]+) ?(ms|s)",
    "pixels": r"decode_first_stage completed, taking ([\d.]+) ?(ms|s)",
}
"""Stage -> pattern of the log line that ends it."""


def open_sd(setup: Setup) -> tuple[Draw, dict[str, str]]:
    program = find_program()
    spec = setup.case.spec
    if program is None:
        leave("neither sd-cli nor sd is installed")
    if spec.repo is None or not cached(spec.repo, ["*.safetensors"]):
        leave(f"sd.cpp needs the published weights: run inkstream generate -m {spec.name}")
    parts = locate(spec.name).parts
    files = {
        "--diffusion-model": parts["transformer"].path, "--llm": parts["text_encoder"].path, "--vae": parts["vae"].path
    }  # fmt: skip
    told = subprocess.run([program, "--version"], capture_output=True, text=True)
    version = (told.stdout or told.stderr).strip().partition("\n")[0]
    return lambda order, stages: draw(program, files, order, stages), {"sd.cpp": version}


def draw(program: str, files: dict[str, Path], order: Order, stages: Stages) -> Tensor:
    case = order.case
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        options = {
            **files, "-p": order.prompt, "-n": order.negative, "--cfg-scale": case.guidance, "--steps": order.steps,
            "-W": case.width, "-H": case.height, "-b": case.count, "-s": 0, "-o": picture,
        }  # fmt: skip
        words = [program, "--diffusion-fa", *(str(word) for pair in options.items() for word in pair)]
        told = subprocess.run(words, capture_output=True, text=True)
        if told.returncode:
            raise RuntimeError((told.stderr or told.stdout).strip().rpartition("\n")[2])
        stages.seconds.update(times_told(told.stdout + told.stderr))
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(folder).glob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def times_told(log: str) -> dict[str, float]:
    """Return the seconds of each stage from the program's log. The times of several pictures are added."""
    found = {stage: re.findall(pattern, log) for stage, pattern in STAGES.items()}
    if not all(found.values()):
        missing = ", ".join(stage for stage, times in found.items() if not times)
        raise RuntimeError(f"the log of sd.cpp has no time of: {missing}")
    return {
        stage: sum(float(value) / (1000 if unit == "ms" else 1) for value, unit in times)
        for stage, times in found.items()
    }


def find_program() -> str | None:
    return shutil.which("sd-cli") or shutil.which("sd")


def leave(why: str) -> None:
    print(why, file=sys.stderr)
    sys.exit(LEFT_OUT)


if __name__ == "__main__":
    attend(open_sd)
