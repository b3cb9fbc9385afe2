"""Measure how often the invisible mark of `--provenance eu` and `cn` is read after a picture was changed.

    python scripts/measure_marks.py --date 2026-11-30 [--pictures 20] [--record NAME] [--picture FILE]

The pictures are Pocket's scenes at 128, 512 and 1024 pixels, and noise of photographs' spectrum at 768 x 512. Each has
a mark of its own. A mark counts as read if all its 24 bits are right. The error is of the marked picture, unchanged.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inkstream.bench.records import write_record
from inkstream.engine.pictures.watermark import BITS, add_mark, read_mark
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample

KINDS = ("scenes 128x128", "scenes 512x512", "scenes 1024x1024", "noise 768x512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--pictures", type=int, default=20, help="of each kind")
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--picture", type=Path, help="write a picture, the marked one, and 16 times the change")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        read, errors, found = dict.fromkeys(CHANGES, 0), [], 0
        for number in range(options.pictures):
            image, mark = picture(kind, number), (number * 2_654_435_761) % (1 << BITS)
            marked = add_mark(image, mark)
            errors.append(np.mean((np.asarray(marked, float) - np.asarray(image, float)) ** 2))
            found += read_mark(image) is not None
            for name, change in CHANGES.items():
                read[name] += read_mark(change(marked)) == mark
        shares = {name: round(count / options.pictures, 4) for name, count in read.items()}
        psnr = round(float(10 * np.log10(255**2 / np.mean(errors))), 1)
        rows.append({"kind": kind, "pictures": options.pictures, "psnr": psnr, **shares, "found_in_unmarked": found})
        print(rows[-1], flush=True)
    if options.picture:
        image = picture(KINDS[1], 3)
        marked = add_mark(image, 0xC0FFEE)
        change = (np.asarray(marked, float) - np.asarray(image, float)) * 16 + 128
        shown = [image, marked, Image.fromarray(change.clip(0, 255).astype(np.uint8))]
        sheet = Image.new("RGB", (3 * 320 + 2 * 10, 320), "white")
        for at, one in enumerate(shown):
            sheet.paste(one.resize((320, 320), Image.Resampling.LANCZOS), (at * 330, 0))
        sheet.save(options.picture)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def picture(kind: str, number: int) -> Image.Image:
    if kind.startswith("scenes"):
        return render(sample(Grammar(), 8_000_000 + number, "any"), int(kind.rpartition("x")[2]))
    rng = np.random.default_rng(number)
    height, width = 512, 768
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    waves = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency, s=(height, width))
    waves = waves / waves.std((1, 2), keepdims=True) * 45 + 128
    return Image.fromarray(waves.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def resized(image: Image.Image, share: float) -> Image.Image:
    return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.LANCZOS)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "unchanged": lambda image: image,
    "jpeg_80": lambda image: jpeg(image, 80),
    "resized_75": lambda image: resized(image, 0.75),
    "resized_75_jpeg_80": lambda image: jpeg(resized(image, 0.75), 80),
    "jpeg_50": lambda image: jpeg(image, 50),
    "resized_50": lambda image: resized(image, 0.5),
    "brighter_10": lambda image: image.point(lambda value: min(value * 1.1, 255)),
    "cropped_5": lambda image: image.crop((0, 0, round(image.width * 0.95), image.height)),
}


if __name__ == "__main__":
    main()
