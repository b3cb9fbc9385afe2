"""An invisible mark in a picture's pixels: 24 bits, by quantising DCT coefficients of a wavelet's low band.

The picture's brightness is reduced to SIDE x SIDE, so that its size does not matter. A Haar transform gives the low
band, and 8 x 8 DCTs of it the coefficients. Each bit of the code moves some of them to the nearest point of one of two
lattices (quantisation index modulation, Chen and Wornell 2001). The code is the extended Golay code (24, 12), decoded
by maximum likelihood. A checksum tells a mark from none. Cropping and rotation remove the mark.
"""

from __future__ import annotations

import binascii
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 256
BLOCK = 8
PLACES = ((0, 2), (1, 1), (2, 0), (1, 2), (2, 1), (2, 2))
"""The DCT coefficients of a block that carry the mark."""
STEP = 20.0
"""Distance of two points of a lattice. Larger is more robust and more visible."""
ROUNDS = 4
"""Times that the mark is corrected for what resampling and rounding have lost."""
SEED = 20_260_101
VERSION = 0xA1
BITS = 24
"""Bits of a mark. With version and checksum, 48 bits are coded as 96."""

Floats = NDArray[np.float64]


def add_mark(image: Image.Image, mark: int) -> Image.Image:
    """Return the picture (RGB or RGBA) with a mark of BITS bits. Transparency stays."""
    signs = _signs(_encode(mark))
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    marked = pixels
    change = np.zeros((SIDE, SIDE))
    for _ in range(ROUNDS):
        coefficients = _coefficients(Image.fromarray(np.rint(marked).astype(np.uint8)))
        change = change + _picture_of(_nearest(coefficients, signs) - coefficients)
        grown = Image.fromarray(change.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
        marked = np.clip(pixels + np.asarray(grown, np.float64)[..., None], 0, 255)
    done = Image.fromarray(np.rint(marked).astype(np.uint8))
    if image.mode == "RGBA":
        done.putalpha(image.getchannel("A"))
    return done


def read_mark(image: Image.Image) -> int | None:
    """Return the mark of a picture; None if it has none."""
    coefficients = _coefficients(image.convert("RGB"))
    soft = np.cos(2 * np.pi * (coefficients - _dither()) / STEP).reshape(-1)
    bits = np.zeros(2 * (VERSION_BITS + BITS + CHECK_BITS))
    np.add.at(bits, _owners(), soft)
    return _decode(bits)


# The payload --------------------------------------------------------------------------------------------------------

VERSION_BITS, CHECK_BITS = 8, 16


def _encode(mark: int) -> NDArray[np.int8]:
    """The code of a mark: 96 signs, +1 for a bit 0 and -1 for a bit 1."""
    if not 0 <= mark < 1 << BITS:
        raise ValueError(f"mark {mark} has more than {BITS} bits")
    said = (VERSION << BITS) | mark
    whole = (said << CHECK_BITS) | binascii.crc_hqx(said.to_bytes(4, "big"), 0)
    return np.concatenate([_codewords()[whole >> shift & 0xFFF] for shift in (36, 24, 12, 0)])


def _decode(bits: Floats) -> int | None:
    """The mark of 96 soft bits; None if the checksum is wrong."""
    whole = 0
    for part in bits.reshape(4, 24):
        whole = whole << 12 | int(np.argmax(_codewords() @ part))
    said, check = whole >> CHECK_BITS, whole & 0xFFFF
    if said >> BITS != VERSION or binascii.crc_hqx(said.to_bytes(4, "big"), 0) != check:
        return None
    return said & ((1 << BITS) - 1)


@lru_cache(maxsize=1)
def _codewords() -> NDArray[np.int8]:
    """The 4096 words of the extended Golay code, as signs. (4096, 24)"""
    words = np.zeros((4096, 24), np.int8)
    for number in range(4096):
        rest = number << 11
        for shift in range(22, 10, -1):  # division by x^11 + x^10 + x^6 + x^5 + x^4 + x^2 + 1
            if rest >> shift & 1:
                rest ^= 0b110001110101 << (shift - 11)
        word = number << 11 | rest
        bits = [word >> at & 1 for at in range(22, -1, -1)]
        words[number] = [*bits, sum(bits) % 2]
    return (1 - 2 * words).astype(np.int8)


# Where it is --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _owners() -> NDArray[np.intp]:
    """The bit of the code that each coefficient carries, in a fixed random order."""
    chips = (SIDE // 2 // BLOCK) ** 2 * len(PLACES)
    return np.random.RandomState(SEED).permutation(chips) % 96


@lru_cache(maxsize=1)
def _dither() -> Floats:
    """The offset of each coefficient's lattices: without it, the mark of a flat picture would be one pattern."""
    blocks = (SIDE // 2 // BLOCK) ** 2
    return np.random.RandomState(SEED + 1).uniform(0, STEP, (blocks, len(PLACES)))


def _signs(code: NDArray[np.int8]) -> NDArray[np.int8]:
    return code[_owners()].reshape(-1, len(PLACES))


def _nearest(coefficients: Floats, signs: NDArray[np.int8]) -> Floats:
    """The nearest points of the lattices that the signs name. (blocks, places)"""
    offset = _dither() + np.where(signs > 0, 0, STEP / 2)
    return np.rint((coefficients - offset) / STEP) * STEP + offset


@lru_cache(maxsize=1)
def _dct() -> Floats:
    """The orthonormal DCT of BLOCK points."""
    k, n = np.mgrid[:BLOCK, :BLOCK]
    matrix = np.cos(np.pi * (n + 0.5) * k / BLOCK) * np.sqrt(2 / BLOCK)
    matrix[0] /= np.sqrt(2)
    return matrix


def _coefficients(image: Image.Image) -> Floats:
    """The coefficients that carry the mark. (blocks, places)"""
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.float64)
    light = small @ np.array([0.299, 0.587, 0.114])
    low = (light[::2, ::2] + light[1::2, ::2] + light[::2, 1::2] + light[1::2, 1::2]) / 2  # Haar, (128, 128)
    count = SIDE // 2 // BLOCK
    blocks = low.reshape(count, BLOCK, count, BLOCK).transpose(0, 2, 1, 3).reshape(-1, BLOCK, BLOCK)
    turned = _dct() @ blocks @ _dct().T
    return np.stack([turned[:, row, column] for row, column in PLACES], axis=-1)


def _picture_of(change: Floats) -> Floats:
    """The change of brightness that changes the coefficients so. (SIDE, SIDE)"""
    blocks = np.zeros((len(change), BLOCK, BLOCK))
    for at, (row, column) in enumerate(PLACES):
        blocks[:, row, column] = change[:, at]
    turned = _dct().T @ blocks @ _dct()
    count = SIDE // 2 // BLOCK
    low = turned.reshape(count, count, BLOCK, BLOCK).transpose(0, 2, 1, 3).reshape(SIDE // 2, SIDE // 2)
    return np.repeat(np.repeat(low / 2, 2, axis=0), 2, axis=1)
