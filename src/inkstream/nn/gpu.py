"""The choice between fused kernels and plain operations: `kernels_for` returns `nn/fused.py` where it can run."""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

fused_devices = {"cuda"}
"""Device types whose tensors go to the fused kernels. If the set is empty, all operations are plain."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)
"""The oldest compute capability that Triton supports."""


def kernels_for(x: Tensor) -> ModuleType | None:
    """Returns `nn.fused` where its kernels take x, else None.

    None: in training, on other devices, without Triton, and inside a compiler, which fuses operations itself.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return find_kernels(x.device) if x.device.type in fused_devices and x.dtype in DTYPES else None


@lru_cache
def find_kernels(device: torch.device) -> ModuleType | None:
    """Returns `nn.fused` after a trial run on the device; None where Triton is missing or fails.

    A failure gives one warning. Importing Triton takes a second, so it is imported only for a GPU.
    """
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return None
    try:
        from inkstream.nn import fused

        fused.try_out(device)
    except ImportError:
        return None
    except Exception as error:  # the usual cause: no C compiler, which Triton needs to build its launchers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(f"fused kernels fail here and are not used ({reason}): install gcc", stacklevel=2)
        return None
    return fused
