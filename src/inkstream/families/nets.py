"""What a control net's file is for, by the keys and shapes in its header. Torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

INPUTS = {
    "control_all_x_embedder.2-1.weight": "zimage",
    "control_img_in.weight": "flux2",
    "controlnet_x_embedder.weight": "flux1",
    "pos_embed_input.weight": "flux1",  # XLabs
}
"""The layer that takes in the control picture, in the names of published files -> the family of models."""
MODES = "controlnet_mode_embedder.weight"
CONTROL_MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "low-quality")
"""The modes of InstantX's and Shakker's Union nets of FLUX.1, by number."""


@dataclass(frozen=True)
class NetFacts:
    """family: of the models that the net guides. width: that of their tokens. modes: those that it is told."""

    family: str
    width: int
    modes: tuple[str, ...] = ()


def facts_of(shapes: Shapes) -> NetFacts | None:
    """What a file with these tensors is for; None if it is no control net that is known here."""
    for key, family in INPUTS.items():
        if len(shape := shapes.get(key, ())) == 2:
            count = shapes.get(MODES, (0,))[0]
            return NetFacts(family, shape[0], CONTROL_MODES[:count])
    return None
