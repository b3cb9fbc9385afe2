"""`inkstream generate`: a Request's fields are its options; pictures are written as they are done."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from inkstream.cli.download import agree_to_download
from inkstream.cli.lines import print_json
from inkstream.cli.terminal import Terminal
from inkstream.types import Done, Failed, InputError, Request, Step

SHORT = {
    "negative_prompt": "-n",
    "model": "-m",
    "width": "-W",
    "height": "-H",
    "guidance": "--cfg-scale",
    "seed": "-s",
    "count": "-c",
}
RUN = Group("This run", sort_key=1)


class Wish(Request):
    """A Request as options; only the prompt may stand without its name."""


for _name, _field in Wish.model_fields.items():
    _field.kw_only = _name != "prompt"
    _option = Parameter(alias=SHORT.get(_name), show_default=_field.default not in (None, ""))
    _field.metadata = [*_field.metadata, _option]  # a new list: the old one is shared with Request

NOTHING = Wish.model_validate({})


def generate(
    wish: Annotated[Wish, Parameter(name="*")] = NOTHING,
    *,
    source: Annotated[Path | None, Parameter(name="--from", group=RUN)] = None,
    output: Annotated[str | None, Parameter(alias="-o", group=RUN)] = None,
    metadata: Annotated[Literal["full", "minimal", "none"], Parameter(group=RUN)] = "full",
    device: Annotated[str | None, Parameter(group=RUN)] = None,
    dtype: Annotated[str | None, Parameter(group=RUN)] = None,
    json: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    quiet: Annotated[bool, Parameter(show_default=False, group=RUN)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False, group=RUN)] = False,
) -> None:
    """Draw pictures of a prompt, or draw a picture again.

    Parameters
    ----------
    source
        Take the request from this picture's metadata; options given beside it win.
    output
        File (.png, .webp, .jpg) or folder to write to, else the current folder. Nothing is overwritten.
    metadata
        What a picture carries: its request and that a model made it, only the latter, or nothing.
    device
        cpu, cuda, cuda:1, mps; else the best there is.
    dtype
        bf16, fp32 or fp16; else what suits the device.
    json
        Print one JSON document on stdout when all is done.
    quiet
        No progress and no talk, only errors.
    yes
        Download what is missing without asking.
    """
    with Terminal(quiet) as terminal:
        request = understand(wish, source, terminal.say)
        piped = output is None and not json and not sys.stdout.isatty()
        if piped and request.count > 1:
            raise InputError(f"--count {request.count} does not go into a pipe, which holds one picture: give --output")
        place = None if piped else find_place(output, request.count)
        check(request)
        agree_to_download(request.model, yes, terminal)
        done: list[dict[str, Any]] = []
        try:
            for picture in draw(request, place, metadata, device, dtype, terminal):
                done.append(picture)
                if not (piped or json):
                    terminal.print(picture["path"])
                terminal.say(f"seed {picture['seed']}, {picture['seconds']} s")
        except KeyboardInterrupt:
            terminal.say(f"stopped; {len(done)} of {request.count} done")
            raise
        finally:
            if done:
                again = repeat(request, done[0]["seed"], device, dtype)
                terminal.say(f"again: {again}")
                if json:
                    print_json({"pictures": done, "again": again})


def understand(wish: Wish, source: Path | None, say: Callable[[str], None]) -> Request:
    """The request that the options, stdin and the metadata of `source` make together; options win."""
    given = {name: getattr(wish, name) for name in wish.model_fields_set}
    if given.get("prompt") == "-":
        given["prompt"] = sys.stdin.read().strip()
    if source is not None:
        from inkstream.engine.metadata import read_request

        found = read_request(source)
        for name, value in found.ignored.items():
            say(f"{source}: {name} is not taken over: {value}")
        given = found.request.model_dump(include=found.request.model_fields_set) | given
    elif not given.get("prompt", "").strip():
        raise InputError("there is no prompt: say what to draw, as in inkstream generate 'a lighthouse in fog'")
    return Request.model_validate(given)


def find_place(output: str | None, count: int) -> Callable[[Request, int], Path]:
    """From a picture's complete request and its index to the path it is written to, which is free.

    InputError where nothing can be written, or where what was asked for is taken.
    """
    from inkstream.engine.metadata import free_name, picture_format

    path = Path(output or ".")
    if path.is_dir() or str(output or "/").endswith(("/", "\\")) or not path.suffix:
        try_folder(path)
        return lambda request, index: free_name(path, f"{slug(request.prompt)}-{request.seed}", ".png")
    picture_format(path)
    try_folder(path.parent)
    stems = [path.stem] if count == 1 else [f"{path.stem}-{index + 1}" for index in range(count)]
    for taken in (path.with_stem(stem) for stem in stems if path.with_stem(stem).exists()):
        raise InputError(f"{taken} is already there and is not overwritten: give another --output")
    return lambda request, index: free_name(path.parent, stems[index], path.suffix)


def try_folder(folder: Path) -> None:
    """Make the folder if need be and write in it, so that no picture is drawn in vain."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise InputError(f"{folder} cannot be written to ({reason}): give another --output") from None


def slug(prompt: str) -> str:
    """The first words of a prompt as a file name."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-_") or "picture"


def check(request: Request) -> None:
    """Refuse what can be seen to be wrong before anything big is fetched or read."""
    from inkstream.engine.inputs import open_header
    from inkstream.engine.model import complete
    from inkstream.families import SPECS

    for picture in (request.image, request.mask, *request.reference):
        if picture is not None:
            open_header(picture)
    if request.model in SPECS:
        complete(request, SPECS[request.model])


def draw(
    request: Request,
    place: Callable[[Request, int], Path] | None,
    metadata: Literal["full", "minimal", "none"],
    device: str | None,
    dtype: str | None,
    terminal: Terminal,
) -> Iterator[dict[str, Any]]:
    """Draw the pictures and write each, to its place or to stdout; what is yielded describes it, as JSON."""
    from inkstream.engine.engine import Engine, advice
    from inkstream.engine.metadata import free_name, save_picture

    engine = Engine(device, dtype)
    for event in engine.submit(request):
        terminal.show(event)
        if isinstance(event, Step) and event.step == 1 and event.index == 0:
            for line in advice(request, engine.model):
                terminal.say(line)
        elif isinstance(event, Failed):
            raise InputError(event.error) if event.kind == "input" else RuntimeError(event.error)
        elif isinstance(event, Done):
            path = place(event.request, event.index) if place else None
            ran = {"device": str(engine.model.device), "dtype": str(engine.model.dtype).removeprefix("torch.")}
            facts: Any = {"request": event.request, "spec": engine.model.spec, "metadata": metadata, "extra": ran}
            try:
                save_picture(event.image, path or sys.stdout.buffer, **facts)
            except InputError as error:  # a JPEG's metadata has little room; the picture must not be lost
                if path is None:
                    raise
                path = free_name(path.parent, path.stem, ".png")
                save_picture(event.image, path, **facts)
                terminal.say(f"{error}; so it was saved as {path.name}")
            yield {
                "path": str(path) if path else None,
                "seed": event.request.seed,
                "width": event.image.width,
                "height": event.image.height,
                "seconds": round(event.seconds, 3),
                **ran,
                "request": event.request.model_dump(exclude_none=True),
            }


def repeat(request: Request, seed: int, device: str | None, dtype: str | None) -> str:
    """The command that draws the same again: what was asked for, and the seed."""
    fields = request.model_copy(update={"seed": seed}).model_dump(exclude_defaults=True)
    fields |= {name: value for name, value in (("device", device), ("dtype", dtype)) if value}
    prompt = fields.pop("prompt", "")
    words = [f"--prompt={prompt}" if prompt.startswith("-") else prompt] if prompt else []
    for name, value in fields.items():
        option = "--" + name.replace("_", "-")
        words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    return shlex.join(["inkstream", "generate", *words])
