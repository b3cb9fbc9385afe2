"""`inkstream upscale`: enlarges picture files with an upscaling model, or by Lanczos resampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from inkstream.cli.generate import find_place
from inkstream.cli.lines import print_json
from inkstream.cli.terminal import Terminal
from inkstream.types import Enlargement, InputError, Machine

if TYPE_CHECKING:
    from inkstream.engine.drawing.upscaling import Loaded

Text = Annotated[str | None, Parameter(show_default=False)]


def upscale(
    *pictures: str,
    output: Annotated[str | None, Parameter(alias="-o", show_default=False)] = None,
    model: Annotated[str | None, Parameter(alias="-m", show_default=False)] = None,
    scale: Text = None,
    tile: Annotated[int | None, Parameter(show_default=False)] = None,
    upscaler_folder: Text = None,
    device: Text = None,
    json: Annotated[bool, Parameter(show_default=False)] = False,
    quiet: Annotated[bool, Parameter(show_default=False)] = False,
) -> None:
    """Enlarge pictures with an upscaling model, or by Lanczos resampling. Without pictures, list the models.

    Parameters
    ----------
    pictures
        The pictures to enlarge. Transparency and the request in the metadata stay.
    output
        Output file (.png, .webp, .jpg) or folder; default: the current folder. Existing files are not overwritten.
    model
        An upscaling model's file, or its name in the folder of upscaling models; default: Lanczos resampling.
    scale
        A factor such as 2x, or a size such as 2048x1536; default: the model's own factor, or 2x.
    tile
        Side of the tiles in pixels of the smaller picture; default: 256. Larger tiles need more memory.
    upscaler_folder
        Folder of upscaling models, or that of ComfyUI or A1111 with its models; default: `upscalers` in the data folder
        of inkstream.
    device
        cpu, cuda, cuda:1 or mps; default: the best available device.
    json
        Print one JSON document on stdout.
    quiet
        Print no progress and no messages, only errors.
    """
    from inkstream.engine.files.upscalers import find_upscaler
    from inkstream.engine.files.upscalers import upscaler_folder as folder_of

    folder = folder_of(Machine(upscaler_folder=upscaler_folder))
    if not pictures:
        list_upscalers(folder, json)
        return
    wanted = None if scale is None else Enlargement.read(scale)
    if tile is not None and not 64 <= tile <= 8192:
        raise InputError(f"tile {tile} is out of range: take 64 to 8192")
    if model is not None:
        find_upscaler(model, folder)
    names = [""] * len(pictures)
    place = find_place(output, len(pictures), lambda request, index: names[index])

    from inkstream.engine.drawing.upscaling import TILE, Upscalers
    from inkstream.engine.machine.loader import choose_device
    from inkstream.engine.pictures.enlarged import name_for
    from inkstream.engine.pictures.inputs import is_deep, short_name

    deep = [is_deep(picture) for picture in pictures]  # a picture that cannot be read is told before any is enlarged
    done: list[dict[str, Any]] = []
    with Terminal(quiet) as terminal:
        loaded = None if model is None else Upscalers(folder, choose_device(device)).get(model)
        try:
            for index, picture in enumerate(pictures):
                if deep[index]:
                    terminal.say(f"{short_name(picture)} has more than 8 bits a channel: the result has 8")

                def free(size: tuple[int, int], index: int = index) -> Path:
                    names[index] = name_for(pictures[index], size)
                    return place(None, index)  # type: ignore[arg-type]  # the name does not depend on a request

                note = f"picture {index + 1} of {len(pictures)}" if len(pictures) > 1 else "picture"
                done.append(enlarge_file(picture, free, loaded, wanted, tile or TILE, terminal, note))
                if not json:
                    terminal.print(done[-1]["path"])
        except KeyboardInterrupt:
            terminal.say(f"stopped; {len(done)} of {len(pictures)} done")
            raise
        finally:
            if json:
                print_json({"pictures": done})


def enlarge_file(
    picture: str,
    free: Callable[[tuple[int, int]], Path],
    loaded: Loaded | None,
    wanted: Enlargement | None,
    tile: int,
    terminal: Terminal,
    note: str,
) -> dict[str, Any]:
    """Enlarge one picture and write it to the path that `free` gives for its size. Returns its facts."""
    from inkstream.engine.drawing.upscaling import enlarge, with_alpha
    from inkstream.engine.pictures.enlarged import encode_enlarged, line_of
    from inkstream.engine.pictures.inputs import open_layers
    from inkstream.engine.pictures.metadata import picture_format, write_new

    began = time.perf_counter()
    colour, alpha = open_layers(picture)
    size = (wanted or Enlargement(loaded.network.scale if loaded else 2)).of(*colour.size)
    path = free(size)
    steps = enlarge(colour, size, loaded, tile)
    while True:
        try:
            tiles, total = next(steps)
        except StopIteration as end:
            result = with_alpha(end.value, alpha)
            break
        terminal.wait(note, tiles, total, f"tile {tiles} of {total}")
    by = f"{loaded.name} ({loaded.architecture})" if loaded else "Lanczos resampling"
    line = line_of(colour.size, size, by)
    write_new(path, encode_enlarged(result, picture_format(path), picture, line, loaded is not None))
    seconds = round(time.perf_counter() - began, 3)
    terminal.say(f"{line}, {seconds} s")
    return {"path": str(path), "width": size[0], "height": size[1], "enlarged": line, "seconds": seconds}


def list_upscalers(folder: Path, as_json: bool) -> None:
    """Print the upscaling models in a folder."""
    from inkstream.engine.files.upscalers import upscalers_in

    known = upscalers_in(folder)
    if as_json:
        print_json([{"name": name, "path": str(file)} for name, file in known.items()])
        return
    if not known:
        raise InputError(
            f"there are no pictures, and no upscaling models in {folder}: inkstream upscale PICTURE enlarges by "
            "Lanczos resampling, and --model takes a model's file"
        )
    for name in known:
        print(name)
