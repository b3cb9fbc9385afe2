"""Fused kernels equal the plain operations, and stay out of the way where these must serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inkstream.nn import gpu

CASES = Path(__file__).parent / "fused_cases.py"


def run_cases(**settings: str) -> str:
    """In a process of their own: Triton reads how it is to run when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(CASES)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, cwd=CASES.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_every_kernel_equals_the_plain_path_in_tritons_interpreter():
    said = run_cases(TRITON_INTERPRET="1")
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to compile for")
def test_every_kernel_equals_the_plain_path_on_the_gpu():
    said = run_cases()
    assert " passed" in said
    assert "skipped" not in said


def test_kernels_are_not_asked_for_on_the_cpu_nor_in_training():
    x = torch.ones(2, 4)
    with torch.inference_mode():
        assert gpu.kernels_for(x) is None
    meta = torch.ones(2, 4, device="meta")
    gpu.fused_devices.add("meta")
    try:
        assert torch.is_grad_enabled()
        assert gpu.kernels_for(meta) is None
        with torch.inference_mode():
            assert gpu.kernels_for(meta.double()) is None
    finally:
        gpu.fused_devices.discard("meta")


def test_where_the_kernels_do_not_work_it_is_said_once_and_the_plain_path_serves():
    """Without the interpreter nothing here is a GPU, so Triton fails to launch."""
    gpu.find_kernels.cache_clear()
    with pytest.warns(UserWarning, match="fused kernels fail here and are not used"):
        assert gpu.find_kernels(torch.device("cpu")) is None
    assert gpu.find_kernels(torch.device("cpu")) is None
    gpu.find_kernels.cache_clear()
