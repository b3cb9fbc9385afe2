"""Where kernels of our own stand in for plain operations: `kernels_for` finds `nn/fused.py` if it can serve."""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

fused_devices = {"cuda"}
"""Types of devices whose tensors the fused kernels take. Emptied, all is computed plainly."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)
"""The compute capability that Triton supports from."""


def kernels_for(x: Tensor) -> ModuleType | None:
    """`nn.fused` where its kernels take x, else None: in training, on other devices, without Triton, and inside a
    compiler, which joins operations by itself."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return find_kernels(x.device) if x.device.type in fused_devices and x.dtype in DTYPES else None


@lru_cache
def find_kernels(device: torch.device) -> ModuleType | None:
    """`nn.fused`, tried out on the device; None where Triton is not installed or does not work, the latter told once.

    Triton takes a second to import, which only a GPU's work is worth.
    """
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return None
    try:
        from inkstream.nn import fused

        fused.try_out(device)
    except ImportError:
        return None
    except Exception as error:  # most often there is no C compiler, which Triton builds its launchers with
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(f"fused kernels do not work here and are left out ({reason}): install gcc", stacklevel=2)
        return None
    return fused
