"""`inkstream serve`: the server, and the keys it knows. Torch is only ever imported by the engine's process."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from inkstream.cli.lines import print_json
from inkstream.cli.machine import HERE
from inkstream.types import InputError, Machine

serve = App(name="serve", help_format="plaintext", default_parameter=Parameter(negative=""))
keys = App(name="keys", help="Make, list and remove the keys that a server knows.", help_format="plaintext")
serve.command(keys)

Data = Annotated[Path | None, Parameter(show_default=False)]


@serve.default
def run(
    *,
    host: str = "127.0.0.1",
    port: int = 8400,
    model: Annotated[list[str] | None, Parameter(alias="-m", show_default=False, negative=())] = None,
    alias: Annotated[list[str] | None, Parameter(show_default=False, negative=())] = None,
    strict: Annotated[bool, Parameter(show_default=False)] = False,
    api_key_file: Annotated[Path | None, Parameter(show_default=False)] = None,
    data: Data = None,
    machine: Annotated[Machine, Parameter(name="*", show_default=False)] = HERE,
    slots: int = 4,
    queue: int = 200,
    max_pixels: int = 2048 * 2048,
    max_pictures: int = 64,
    max_body: int = 64,
    time_limit: float = 4 * 3600,
    fetch: Annotated[bool, Parameter(show_default=False)] = False,
    log_prompts: Annotated[bool, Parameter(show_default=False)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False)] = False,
) -> None:
    """Serve pictures over HTTP.

    Parameters
    ----------
    host
        Address to listen on. One that others can reach is refused until there is a key.
    port
        Port to listen on.
    model
        A model that may be asked for: a known name, a path, or NAME=PATH; again for more. The first is the default.
        Left out, every known model that is downloaded.
    alias
        NAME=MODEL: another name of a model in OpenAI's API, as in dall-e-3=z-image-turbo; again for more.
    strict
        Refuse OpenAI's names of models that are no alias. Else the only model that is offered answers to them.
    api_key_file
        File of the keys; else keys.json in the data folder.
    data
        Folder of queue, history and pictures; else one in your home.
    slots
        Jobs that are drawn at once: they share every pass through the model.
    queue
        Jobs that may wait; more are answered with 429.
    max_pixels
        Pixels of the largest picture that is drawn.
    max_pictures
        Pictures of one job.
    max_body
        MiB of a request's body.
    time_limit
        Seconds one job may take.
    fetch
        Take pictures by URL, too; never from private addresses.
    log_prompts
        Write prompts into the log.
    yes
        Download what is missing without asking.
    """
    import uvicorn

    from inkstream.serve import logs
    from inkstream.serve.app import build
    from inkstream.serve.connections import Connection, allow_many
    from inkstream.serve.limits import Limits, Settings

    for option, value in {"port": port, "slots": slots, "queue": queue, "max-pictures": max_pictures}.items():
        if value < 1:
            raise InputError(f"--{option} {value} leaves nothing: give 1 or more")
    for name in model or []:
        agree(name, yes)
    limits = Limits(
        queue=queue, pixels=max_pixels, pictures=max_pictures, body_bytes=max_body << 20, seconds=time_limit
    )
    settings = Settings(
        data=folder(data),
        host=host,
        port=port,
        models=tuple(model or ()),
        aliases=tuple(alias or ()),
        strict=strict,
        key_file=api_key_file,
        machine=machine,
        slots=slots,
        limits=limits,
        log_prompts=log_prompts,
        fetch=fetch,
    )
    logs.set_up()
    allow_many()
    app = build(settings)
    config = uvicorn.Config(app, host, port, http=Connection, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    jobs = app.state.service.jobs
    asyncio.run(listen(server, jobs))
    if jobs.drawing.unusable:
        raise InputError(jobs.drawing.unusable)


async def listen(server: Any, jobs: Any) -> None:
    """Serve until a signal, or until the engine turns out to be impossible.

    Streams of events have no end of their own and would be waited for, so they are ended first.
    """
    loop = asyncio.get_running_loop()
    stop = server.handle_exit

    def leave(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(jobs.feed.close)
        stop(number, frame)

    def give_up() -> None:
        jobs.feed.close()
        server.should_exit = True

    server.handle_exit = leave
    jobs.drawing.give_up = give_up
    await server.serve()


@keys.command
def add(
    name: str,
    *,
    per_minute: Annotated[float | None, Parameter(show_default=False)] = None,
    pictures_per_day: Annotated[int | None, Parameter(show_default=False)] = None,
    queued: Annotated[int | None, Parameter(show_default=False)] = None,
    priority: int = 0,
    admin: Annotated[bool, Parameter(show_default=False, negative="")] = False,
    data: Data = None,
    api_key_file: Annotated[Path | None, Parameter(show_default=False)] = None,
) -> None:
    """Make a key and print it, once: only its hash is kept. A running server takes it at once.

    Parameters
    ----------
    name
        Whose it is, as logs and records name it.
    per_minute
        Jobs it may ask for in a minute.
    pictures_per_day
        Pictures it may have in a day.
    queued
        Jobs of it that may wait at once.
    priority
        The highest priority it may give, -10 to 10.
    admin
        It sees the jobs of all keys, may pause the queue, and reads the metrics.
    data
        The server's data folder; else the one in your home.
    api_key_file
        File of the keys; else keys.json in the data folder.
    """
    from inkstream.serve.keys import add_key

    limits = {"per_minute": per_minute, "pictures_per_day": pictures_per_day, "queued": queued}
    for field, value in limits.items():
        if value is not None and value <= 0:
            raise InputError(f"--{field.replace('_', '-')} {value:g} leaves nothing: give 1 or more, or leave it out")
    if not -10 <= priority <= 10:
        raise InputError(f"--priority {priority} is out of range: give -10 to 10")
    print(add_key(file_of_keys(data, api_key_file), name, time.time(), **limits, priority=priority, admin=admin))


@keys.command(name="list")
def list_(
    *, data: Data = None, api_key_file: Data = None, json: Annotated[bool, Parameter(show_default=False)] = False
) -> None:
    """List the keys, without what makes them work.

    Parameters
    ----------
    data
        The server's data folder; else the one in your home.
    api_key_file
        File of the keys; else keys.json in the data folder.
    json
        Print one JSON document on stdout.
    """
    from inkstream.serve.keys import read_keys

    shown = [describe(key) for key in read_keys(file_of_keys(data, api_key_file))]
    if json:
        print_json(shown)
    for key in [] if json else shown:
        print(f"{key['name']}  " + ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in key.items() if n != "name"))


@keys.command
def remove(name: str, *, data: Data = None, api_key_file: Data = None) -> None:
    """Remove a key. A running server knows it no more.

    Parameters
    ----------
    name
        Whose it is.
    data
        The server's data folder; else the one in your home.
    api_key_file
        File of the keys; else keys.json in the data folder.
    """
    from inkstream.serve.keys import remove_key

    remove_key(file_of_keys(data, api_key_file), name)


def describe(key: Any) -> dict[str, Any]:
    """What may be shown of a key."""
    shown = {"name": key.name, "created": time.strftime("%Y-%m-%d", time.gmtime(key.created))}
    limits = {name: getattr(key, name) for name in ("per_minute", "pictures_per_day", "queued", "priority", "admin")}
    return shown | {name: value for name, value in limits.items() if value}


def folder(data: Path | None) -> Path:
    """The data folder: as asked, or in the user's home."""
    from platformdirs import user_data_path

    return data or user_data_path("inkstream", appauthor=False) / "server"


def file_of_keys(data: Path | None, api_key_file: Path | None) -> Path:
    return api_key_file or folder(data) / "keys.json"


def agree(name: str, yes: bool) -> None:
    """InputError where a model would have to be downloaded and nobody agreed; the engine downloads it when it loads."""
    from inkstream.cli.lines import in_gigabytes
    from inkstream.families import SPECS
    from inkstream.serve.engines.models import is_here

    spec = SPECS.get(name.rpartition("=")[2])
    if spec is not None and not yes and not is_here(spec):
        what = f"{in_gigabytes(spec.download_bytes or 0)}, licence {spec.licence}"
        raise InputError(f"--model {name} is not downloaded yet ({what}): add --yes to download it, or give a path")
