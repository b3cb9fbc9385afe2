"""Measures of a model: held-out loss, Frechet distance, diversity over seeds, PSNR."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from inkstream.engine.drawing.model import Model
from inkstream.engine.pictures.inputs import to_pixels
from inkstream.evaluate.run import pack
from inkstream.flow import add_noise
from inkstream.nn.forward import Sample

SIGMAS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92, 0.98)
"""Times of the held-out loss. Two are near 1, where a picture's layout is decided."""

SIDE = 64  # side of the pictures that features are computed from, in pixels
WIDTHS = (3, 32, 64, 64)
SEED = 20_260_101


@torch.inference_mode()
def held_out_loss(
    model: Model, pictures: Iterable[Image.Image], prompts: Iterable[str], seed: int = 0
) -> dict[float, float]:
    """Return the mean squared error of the velocity at each of SIGMAS, over pictures with prompts.

    Each picture has its own noise, drawn on the CPU, equal at all times and in all runs. The pictures' sides must be
    multiples of the model's unit.
    """
    losses: dict[float, list[float]] = {sigma: [] for sigma in SIGMAS}

    def questions() -> Iterator[tuple[Sample, Tensor]]:
        for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            pixels = to_pixels(picture, *picture.size)[None].to(model.device)
            image = model.family.encode_image(pixels)[0]
            generator = torch.Generator("cpu").manual_seed(seed + number)
            noise = torch.randn(image.shape, generator=generator).to(model.device)
            (entry,) = model.family.prepare(model.family.encode(prompt), *picture.size, SIGMAS)
            for sigma in SIGMAS:
                yield Sample(add_noise(image, noise, sigma), sigma, entry), noise - image

    for batch in pack(questions(), lambda question: question[1][0].numel() // 4):
        answers = model.family.answer([sample for sample, _ in batch])
        for (sample, wanted), v in zip(batch, answers):
            losses[sample.t].append(float(F.mse_loss(v, wanted)))
    return {sigma: sum(values) / len(values) for sigma, values in losses.items() if values}


def features(pictures: Iterable[Image.Image]) -> Tensor:
    """Compute features with a fixed random network. Returns (N, 16, 64) float32: 4 x 4 patches of 64 features.

    The network has three 5 x 5 convolutions of stride 2 with ReLU between them (widths 32, 64, 64) and a 2 x 2 average
    pooling. Its weights are normal with variance 2 / fan-in, from a seeded generator. Its input is the picture at
    64 x 64 in [-1, 1]. Random filters keep colours, edges and their positions. This is enough to measure the distance
    of two sets of pictures (Heusel et al. 2017, with another network) and needs no download. Distances are comparable
    only with distances of the same filters.
    """
    seen = [torch.zeros(0, 16, WIDTHS[-1])]
    waiting = iter(pictures)
    while batch := [_small(picture) for picture in islice(waiting, 64)]:
        x = torch.stack(batch)
        for layer, weight in enumerate(_filters()):
            x = F.conv2d(x, weight, stride=2, padding=2)
            x = F.relu(x) if layer < len(WIDTHS) - 2 else x
        seen.append(F.avg_pool2d(x, 2).flatten(2).transpose(1, 2))  # (B, 16, 64)
    return torch.cat(seen)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of vectors. a: (N, D), b: (M, D); N, M >= 2."""
    return frechet_of_gaussians(_mean_and_covariance(a), _mean_and_covariance(b))


def frechet_of_gaussians(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) for means (D,) and covariances (D, D). Dowson and Landau 1982."""
    (m, cov_a), (n, cov_b) = ([t.double() for t in pair] for pair in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # tr (A B)^(1/2)
    distance = (m - n).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def diversity(seen: Tensor, groups: Sequence[int]) -> float | None:
    """Return the mean distance of pictures of one prompt, divided by that of pictures of different prompts.

    seen: (N, P, D) `features`; groups: the prompt of each picture. The result is 0 if seeds make no difference, and
    None if no prompt has two pictures or all pictures have one prompt.
    """
    flat = seen.flatten(1).double()
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    group = torch.tensor(groups)
    same = group[:, None] == group[None]
    pairs = torch.ones_like(same).triu(1)
    within, between = apart[same & pairs], apart[~same & pairs]
    if not len(within) or not len(between) or between.mean() == 0:
        return None
    return float(within.mean() / between.mean())


def psnr(picture: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two pictures of equal size, in dB; infinite for equal pictures."""
    a, b = (to_pixels(p, *picture.size) for p in (picture, other))
    error = float(F.mse_loss(a, b))
    return math.inf if error == 0 else -10 * math.log10(error)


def _small(picture: Image.Image) -> Tensor:
    return to_pixels(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), SIDE, SIDE) * 2 - 1


def _mean_and_covariance(vectors: Tensor) -> tuple[Tensor, Tensor]:
    vectors = vectors.double()
    return vectors.mean(0), vectors.T.cov()


@lru_cache(maxsize=1)
def _filters() -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(SEED)
    shapes = [(after, before, 5, 5) for before, after in pairwise(WIDTHS)]
    return [torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:])) for shape in shapes]
