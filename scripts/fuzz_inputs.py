"""Give broken, hostile and absurd inputs to everything that takes a picture or a control net, and count the answers.

    python scripts/fuzz_inputs.py --date 2026-11-30 --record fuzz-inputs [--cases 5000] [--seed 0]
    python scripts/fuzz_inputs.py --only 1234          # one case again, with its traceback

Each case is made from its number alone. An input is taken, or refused by an InputError of one line; anything else is a
fault: another exception, an error of several lines, the end of the process, or more than LONGEST seconds. The cases run
in a child process, which is started again behind a case that ends it.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from inkstream import Engine, Machine, Request
from inkstream.bench.random_model import write_random
from inkstream.bench.records import write_record
from inkstream.engine.pictures.inputs import open_alpha, open_mask, open_numbers, open_picture
from inkstream.engine.pictures.maps import MAPS, map_of, missing
from inkstream.engine.pictures.metadata import describe, read_request
from inkstream.families.zimage.control import UNION, UnionConfig
from inkstream.families.zimage.specs import BASE
from inkstream.types import InputError
from inkstream.weights.files import write_state
from inkstream.weights.keymap import translate

LONGEST = 20.0
"""A case that takes more seconds than this is a fault."""
LONGEST_LINE = 600
"""Characters of an error's one line."""
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV")
NET = UnionConfig(dim=64, n_heads=2, n_layers=1, n_refiner_layers=1)


@dataclass(frozen=True)
class World:
    """What the cases use. folder: of their files. engine: a tiny model with random weights, and a folder of nets."""

    folder: Path
    engine: Engine
    model: str
    net: bytes


# Inputs ---------------------------------------------------------------------------------------------------------------


def some_picture(rng: random.Random, most: int = 96) -> Image.Image:
    """Return a picture of any mode and of a small size, often one pixel wide."""
    width, height = (rng.choice((1, 2, 3, 16, 17, 64, rng.randint(1, most))) for _ in range(2))
    mode = rng.choice(MODES)
    numbers = np.random.default_rng(rng.randrange(2**32))
    if mode == "F":
        values = numbers.standard_normal((height, width)).astype(np.float32) * 10.0 ** rng.randint(-3, 30)
        values[numbers.random((height, width)) < 0.1] = rng.choice((np.nan, np.inf, -np.inf))
        return Image.fromarray(values)
    if mode in ("I", "I;16"):
        values = numbers.integers(0, 65536, (height, width))
        return Image.fromarray(values.astype(np.int32 if mode == "I" else np.uint16))
    image = Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8))
    return image.convert("RGB").convert("RGBA").convert(mode) if mode in ("LA", "P") else image.convert(mode)


def saved(rng: random.Random, image: Image.Image) -> bytes:
    """Return a picture as a file of a format that takes its mode, sometimes with odd metadata."""
    for kind in (rng.choice(KINDS), "TIFF", "PNG"):
        options: dict[str, Any] = {}
        if rng.random() < 0.3:
            exif = Image.Exif()
            exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 65535))
            options["exif"] = exif.tobytes()
        if rng.random() < 0.2:
            options["icc_profile"] = rng.randbytes(rng.randint(0, 300))
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, **options)
        except Exception:
            continue
        return buffer.getvalue()
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with damage: flipped, cut, doubled, overwritten, or with a number that is too large."""
    broken = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 8, 64))):
        if not broken:
            break
        at = rng.randrange(min(len(broken), rng.choice((16, 64, 10**9))))
        match rng.randrange(7):
            case 0:
                broken[at] ^= 1 << rng.randrange(8)
            case 1:
                del broken[at:]
            case 2:
                del broken[at : at + rng.randint(1, 40)]
            case 3:
                broken[at:at] = rng.randbytes(rng.randint(1, 40))
            case 4:
                broken[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00"))
            case 5:
                broken += broken[at:]
            case _:
                start = rng.randrange(len(broken))
                broken[at : at + 16] = broken[start : start + 16]
    return bytes(broken)


def some_file(rng: random.Random, world: World, name: str) -> str:
    """Write a picture's file, damaged in most cases, and return its path. Some paths name something else."""
    if rng.random() < 0.04:
        other = [
            "",
            ".",
            "/dev/null",
            "/proc/self/mem",
            "no such file.png",
            "a\0b",
            "http://x/y.png",
            "data:image/png;base64,",
        ]
        return rng.choice([*other, "data:,x", "\ud800", "x" * 5000])
    data = saved(rng, some_picture(rng))
    path = world.folder / name
    path.write_bytes(damaged(rng, data) if rng.random() < 0.8 else data)
    return str(path)


def odd_number(rng: random.Random) -> Any:
    return rng.choice((
        0, 1, -1, 7, 64, 1024, 10**6, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), True, None,
        "", "nan", "1e999", "０", "1,5", [], {}, "-7",
    ))  # fmt: skip


def odd_text(rng: random.Random) -> Any:
    return rng.choice((
        "", " ", ":", "alpha", "text", "text:", "colour:#f00", "colour:#12~999", "colour:red~5", "left:64",
        "left:9999999", "all:16", "64", "128x128", "0x0", "96x96@left", "-1x5@top", "1e3x1", "auto", "full",
        "\0", "\n", "é" * 300, "0:0", "5:nan", "union:1", "union@0-2", "union@1-0", "union:1e9", "union#canny",
        "../union", "/etc/passwd", 3, None, {}, [], ["a", 1], True, "0:0.5", "16px", "1.5", "telea", "noise",
        "blur",
    ))  # fmt: skip


# Cases ----------------------------------------------------------------------------------------------------------------


def picture_case(rng: random.Random, world: World) -> None:
    source = some_file(rng, world, "picture")
    rng.choice((open_picture, describe, read_request, open_numbers))(source)


def mask_case(rng: random.Random, world: World) -> None:
    size = (rng.choice((1, 2, 64, 300)), rng.choice((1, 2, 64, 300)))
    rng.choice((open_mask, open_alpha))(some_file(rng, world, "mask"), size)


def map_case(rng: random.Random, world: World) -> None:
    name = rng.choice([name for name, kind in MAPS.items() if kind.reads != "keypoints" and not missing(name)])
    source: Any = some_file(rng, world, "map") if rng.random() < 0.6 else some_picture(rng).convert("RGB")
    if MAPS[name].reads == "numbers" and not isinstance(source, str):
        source = some_file(rng, world, "map")
    table = MAPS[name].settings
    settings = {key: odd_number(rng) for key in table if key != "model" and rng.random() < 0.3}
    size = rng.choice((None, None, (1, 1), (64, 1), (16, 400)))
    map_of(name, source, size, **settings)


def pose_case(rng: random.Random, world: World) -> None:
    odd = rng.random() < 0.5

    def point() -> Any:
        numbers = (0, 1, 0.5, 64, -5, 1e9, float("nan"), "x", None) if odd else (0, 0.2, 0.5, 1, 64)
        return [rng.choice(numbers) for _ in range(rng.choice((2, 3)) if odd else 3)]

    def points() -> Any:
        count = rng.choice((0, 1, 17, 18, 25, 21, 70, 500) if odd else (18, 25))
        flat = not odd or rng.random() < 0.5
        made = [point() for _ in range(count)]
        return [value for one in made for value in one] if flat else made

    def value(depth: int = 0) -> Any:
        return rng.choice((
            lambda: odd_number(rng), points, dict, lambda: [] if depth > 2 else [value(depth + 1)],
            lambda: {"people": [person() for _ in range(rng.randint(0, 3))]},
        ))()  # fmt: skip

    def person() -> Any:
        keys = (
            "pose_keypoints_2d",
            "hand_left_keypoints_2d",
            "hand_right_keypoints_2d",
            "face_keypoints_2d",
            "keypoints",
        )
        keys = keys if odd else keys[:1]
        return {key: points() if not odd or rng.random() < 0.7 else value(3) for key in keys if rng.random() < 0.6}

    canvas = [odd_number(rng) if odd else rng.choice((64, 512)) for _ in range(2)]
    frame: Any = {"people": [person() for _ in range(rng.randint(0, 3))]}
    frame |= {"canvas_width": canvas[0], "canvas_height": canvas[1]}
    frame = rng.choice((frame, [frame], value() if odd else frame))
    try:
        text = json.dumps(frame)
    except (ValueError, OverflowError):
        text = "{"
    data = text.encode("utf-8", "surrogatepass")
    path = world.folder / "pose.json"
    path.write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)
    map_of("pose", str(path), rng.choice((None, (64, 64), (1, 1))))


def edit_case(rng: random.Random, world: World) -> None:
    """A request that starts from a picture, with absurd fields, drawn by the tiny model."""
    fields: dict[str, Any] = {"image": some_file(rng, world, "start")}
    if rng.random() < 0.5:
        fields["mask"] = some_file(rng, world, "hole")
    for name in ("mask_from", "extend", "crop", "mask_fill", "variation", "control", "control_nets", "reference"):
        if rng.random() < 0.06:
            fields[name] = odd_text(rng)
    for name in (
        "mask_grow",
        "mask_blur",
        "strength",
        "seed_variance",
        "tile",
        "width",
        "height",
        "mask_invert",
        "mask_soft",
    ):
        if rng.random() < 0.04:
            fields[name] = odd_number(rng)
    if str(fields.get("mask_from")).startswith("text"):
        del fields["mask_from"]  # reading takes a second
    draw(world, fields)


def control_case(rng: random.Random, world: World) -> None:
    """A damaged or absurd file of a control net, and a control picture, in a request that the tiny model draws."""
    data = world.net
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((0, 1, 1, 3))):
        key = rng.choice(list(header))
        match rng.randrange(6):
            case 0:
                header.pop(key)
            case 1:
                header[key + rng.choice(("", ".x", "é", "\0"))] = odd_number(rng)
            case 2:
                header[rng.choice(("a", "control_layers.0.x", "x" * 3000))] = header[key]
            case 3 if isinstance(header[key], dict):
                header[key]["shape"] = rng.choice(([], [0], [-1, 5], [2**62, 2**62], "x", None, [1, 2, 3, 4]))
            case 4 if isinstance(header[key], dict):
                header[key]["dtype"] = rng.choice(("F64", "BOOL", "I4", "", None, "F8_E4M3", "F16"))
            case _ if isinstance(header[key], dict):
                header[key]["data_offsets"] = rng.choice(
                    ([0, 0], [5, 1], [-4, 4], [0, 2**62], None, ["a", "b"], [0.5, 1])
                )
    try:
        text = json.dumps(header).encode()
    except (ValueError, OverflowError):
        text = b"{}"
    whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
    path = world.folder / f"{rng.choice(('net', 'net', 'net.x'))}.safetensors"
    path.write_bytes(damaged(rng, whole) if rng.random() < 0.3 else whole)
    try:
        guide = some_file(rng, world, "guide") if rng.random() < 0.3 else some_picture(rng).convert("RGB")
        draw(world, {"control": [guide], "control_nets": [str(path)]})
    finally:
        path.unlink()


def draw(world: World, fields: dict[str, Any]) -> None:
    given = {"prompt": "a", "width": 64, "height": 64, "steps": 1, "seed": 0, "model": world.model} | fields
    try:
        request = Request.model_validate(given)
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"]) from error
    if (request.width or 0) * (request.height or 0) > 512 * 512:
        return  # it is a picture as any other, but takes long
    world.engine.generate(request)


CASES: dict[str, tuple[float, Callable[[random.Random, World], None]]] = {
    "pictures": (0.35, picture_case),
    "masks": (0.15, mask_case),
    "maps": (0.2, map_case),
    "keypoints": (0.1, pose_case),
    "edits": (0.1, edit_case),
    "control nets": (0.1, control_case),
}
"""Kind of case -> its share of all, and the function that runs it."""


def run_case(number: int, seed: int, world: World) -> dict[str, Any]:
    """Run one case. Returns its kind, its outcome and what was said."""
    rng = random.Random(f"{seed}/{number}")
    (kind,) = rng.choices(list(CASES), [share for share, _ in CASES.values()])
    began = time.perf_counter()
    outcome, said = "taken", ""
    try:
        CASES[kind][1](rng, world)
    except InputError as error:
        said = str(error)
        outcome = "refused" if "\n" not in said and 0 < len(said) <= LONGEST_LINE else "not one line"
    except Exception as error:
        outcome, said = "another exception", "".join(traceback.format_exception(error)[-6:])
    seconds = time.perf_counter() - began
    if seconds > LONGEST:
        outcome = "too slow"
    return {"case": number, "kind": kind, "outcome": outcome, "said": said, "seconds": round(seconds, 3)}


def make_world(folder: Path) -> World:
    spec = replace(BASE.tiny, text_encoder=replace(BASE.tiny.text_encoder, vocab_size=2048))
    write_random(spec, folder / "model")
    generator = torch.Generator().manual_seed(0)
    state = UNION.build(NET).state_dict()
    for weight in state.values():
        weight.normal_(0, 0.1, generator=generator)
    net = folder / "union.safetensors"
    write_state(net, translate(UNION.layouts["published"], state, back=True))
    engine = Engine(Machine(device="cpu", dtype="fp32", control_folder=str(folder)))
    return World(folder, engine, str(folder / "model"), net.read_bytes())


# Processes ------------------------------------------------------------------------------------------------------------


def child(first: int, last: int, seed: int) -> None:
    """Run cases and print each result as a line of JSON. An alarm ends the process in a case that hangs."""
    warnings.simplefilter("error")  # a warning on the terminal is a second line
    faulthandler.enable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for number in range(first, last):
            print(json.dumps({"begins": number}), flush=True)
            signal.alarm(round(2 * LONGEST))
            print(json.dumps(run_case(number, seed, world)), flush=True)


def results(cases: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the result of each case, from as many child processes as it takes."""
    at = 0
    while at < cases:
        words = [sys.executable, __file__, "--child", str(at), "--cases", str(cases), "--seed", str(seed)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                if "outcome" in found:
                    at = found["case"] + 1
                    yield found
        if at < cases:
            outcome = "hung" if process.returncode == -signal.SIGALRM else f"ended the process ({process.returncode})"
            yield {"case": at, "kind": "unknown", "outcome": outcome, "said": "", "seconds": 2 * LONGEST}
            at += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", default="", help="date of the record")
    parser.add_argument("--record", help="name of the record to write")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.cases, options.seed)
        return
    if options.only is not None:
        child(options.only, options.only + 1, options.seed)
        return
    counted: Counter[tuple[str, str]] = Counter()
    slowest: dict[str, float] = {}
    for found in results(options.cases, options.seed):
        counted[found["kind"], found["outcome"]] += 1
        slowest[found["kind"]] = max(slowest.get(found["kind"], 0), found["seconds"])
        if found["outcome"] not in ("taken", "refused"):
            print(json.dumps(found), flush=True)
        elif found["case"] % 100 == 99:
            print(f"{found['case'] + 1} of {options.cases}", file=sys.stderr, flush=True)
    rows = []
    for kind in sorted(slowest):
        own = {outcome: count for (name, outcome), count in counted.items() if name == kind}
        good = {outcome: own.pop(outcome, 0) for outcome in ("taken", "refused")}
        rows.append({"kind": kind, "cases": sum(good.values()) + sum(own.values()), **good, "faults": sum(own.values()),
                     "slowest_seconds": slowest[kind]})  # fmt: skip
        print(json.dumps(rows[-1]))
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))
    if any(row["faults"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
