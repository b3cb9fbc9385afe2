"""`inkstream serve` and `inkstream studio`: the server and its API keys. Only the engine's process imports torch."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from inkstream.cli.lines import print_json
from inkstream.cli.machine import HERE
from inkstream.types import InputError, Machine, ProvenanceName, Saving

if TYPE_CHECKING:
    from inkstream.serve.limits import Settings

serve = App(name="serve", help_format="plaintext", default_parameter=Parameter(negative=""))
keys = App(name="keys", help="Make, list and remove the API keys of a server.", help_format="plaintext")
serve.command(keys)

MOST_PORT = 65535
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
    provenance: ProvenanceName = "basic",
    bakeoffs: Annotated[Path | None, Parameter(show_default=False)] = None,
    fetch: Annotated[bool, Parameter(show_default=False)] = False,
    log_prompts: Annotated[bool, Parameter(show_default=False)] = False,
    log_json: Annotated[bool, Parameter(show_default=False)] = False,
    encode_only: Annotated[bool, Parameter(show_default=False)] = False,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False)] = False,
) -> None:
    """Serve pictures over HTTP.

    On a terminal, the address of the studio is printed, with a QR code for a phone if other machines can connect.

    Parameters
    ----------
    host
        Address to listen on. An address that other machines can reach needs a key.
    port
        Port to listen on.
    model
        A model to offer: a known name, a path, or NAME=PATH; repeat the option for more. The first is the default.
        Without it, the server offers all known models that are downloaded.
    alias
        NAME=MODEL: another name for a model in OpenAI's API, such as dall-e-3=z-image-turbo; repeat for more.
    strict
        Refuse OpenAI's model names that are not aliases. Without it, a single offered model answers to them.
    api_key_file
        File of the keys; default: keys.json in the data folder.
    data
        Folder of queue, history and pictures; default: a folder in your home.
    slots
        Number of jobs drawn at once: they share each forward pass of the model.
    queue
        Number of jobs that may wait. Further jobs are refused with status 429.
    max_pixels
        Largest number of pixels of a picture.
    max_pictures
        Largest number of pictures of a job.
    max_body
        Largest request body in MiB.
    time_limit
        Longest time of a job in seconds.
    provenance
        Marks that a model made the pictures. basic: IPTC's digital source type; eu: also an invisible mark and a C2PA
        signature; cn: also an invisible mark, a visible label and the AIGC metadata of GB 45438-2025; none: no marks.
    bakeoffs
        Folder of bake-offs whose voting pages are served; default: bakeoffs in the data folder.
    fetch
        Also take input pictures by URL, but not from private addresses.
    log_prompts
        Write prompts to the log.
    log_json
        Write the log as JSON also to a terminal. Elsewhere it always is JSON.
    encode_only
        Draw nothing: only encode prompts for the --text-encoder-server of other machines, with one --model.
    yes
        Download missing files without asking.
    """
    check_port(host, port)
    for option, value in {"slots": slots, "queue": queue, "max-pictures": max_pictures}.items():
        if value < 1:
            raise InputError(f"--{option} {value} is out of range: give 1 or more")
    check(machine, model or [], yes)
    if provenance != "basic":
        from inkstream.engine.pictures.provenance import check_saving

        check_saving(Saving(provenance=provenance))
    from inkstream.serve.limits import Limits, Settings

    if encode_only:
        serve_encoder(model or [], host, port, api_key_file or folder(data) / "keys.json", machine, log_json)
        return
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
        provenance=provenance,
        bakeoffs=bakeoffs,
        fetch=fetch,
    )
    serve_until_stopped(settings, log_json)


def studio(
    *,
    port: int = 8400,
    model: Annotated[list[str] | None, Parameter(alias="-m", show_default=False, negative=())] = None,
    data: Data = None,
    machine: Annotated[Machine, Parameter(name="*", show_default=False)] = HERE,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False)] = False,
) -> None:
    """Open the studio in the browser. If no server runs at the port, one is started, until Ctrl-C.

    Parameters
    ----------
    port
        Port of the server, on this machine.
    model
        A model to offer: a known name, a path, or NAME=PATH; repeat the option for more. The first is the default.
        Without it, the studio offers all known models that are downloaded.
    data
        Folder of queue, history and pictures; default: a folder in your home.
    yes
        Download missing files without asking.
    """
    import webbrowser

    address = f"http://127.0.0.1:{port}"
    if 0 < port <= MOST_PORT and is_inkstream(address):
        print(f"a server runs at {address}: opening it", file=sys.stderr)
        webbrowser.open(address)
        return
    from inkstream.serve.limits import Settings

    check_port("127.0.0.1", port)
    check(machine, model or [], yes)
    settings = Settings(folder(data), port=port, models=tuple(model or ()), machine=machine)
    serve_until_stopped(settings, ready=lambda: webbrowser.open(address))


def check_port(host: str, port: int) -> None:
    """Raise InputError if a port is out of range or in use. An address that is not this machine's is told later."""
    if not 0 < port <= MOST_PORT:
        raise InputError(f"--port {port} is out of range: give 1 to {MOST_PORT}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as way, suppress(socket.gaierror):
        way.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: what is closing is not in use
        try:
            way.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(f"--port {port} cannot be opened ({error.strerror}): give another --port") from None


def check(machine: Machine, models: Sequence[str], yes: bool) -> None:
    """Raise InputError where a part, an adapter or a model of a server is missing, or not agreed to."""
    from inkstream.engine.files.loras import check_loras, lora_folder, read_merges
    from inkstream.engine.files.names import existing

    for part, path in machine.chosen.items():
        existing(part, path)
    read_merges(machine.merge_lora)
    check_loras(machine.merge_lora, lora_folder(machine))
    for name in models:
        agree(name, yes)


def serve_until_stopped(settings: Settings, log_json: bool = False, ready: Callable[[], object] | None = None) -> None:
    """Run the server until a signal. ready() is called once it listens. Raises InputError if no engine can start."""
    import uvicorn

    from inkstream.serve import logs
    from inkstream.serve.app import build
    from inkstream.serve.connections import Connection, allow_many
    from inkstream.serve.keys import read_keys

    logs.set_up(as_json=log_json)
    allow_many()
    app = build(settings)
    config = uvicorn.Config(
        app, settings.host, settings.port, http=Connection, log_config=None, timeout_graceful_shutdown=5
    )
    jobs = app.state.service.jobs

    def started() -> None:
        if sys.stderr.isatty() and not log_json:
            lines = banner(settings, len(read_keys(settings.keys)), lan_address())
            print("\n".join(lines), file=sys.stderr, flush=True)
        if ready is not None:
            ready()

    asyncio.run(listen(uvicorn.Server(config), jobs, started))
    if jobs.drawing.unusable:
        raise InputError(jobs.drawing.unusable)


def banner(settings: Settings, keys: int, lan: str | None) -> list[str]:
    """Return what a person wants to know of a server that has just started. lan: this machine's address for others."""
    from inkstream import __version__
    from inkstream.serve.limits import is_loopback

    everywhere, here = settings.host in ("0.0.0.0", "::"), is_loopback(settings.host)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    facts = [("studio", f"http://{'127.0.0.1' if everywhere else host}:{settings.port}")]
    reached = None if here else lan if everywhere else host
    outside = reached and f"http://{reached}:{settings.port}"
    if outside:
        facts.append(("for others", outside))
    facts.append(("models", ", ".join(settings.models) or "all that are downloaded"))
    facts.append(("pictures", str(settings.data)))
    access = [*(["this machine only"] if here else []), *([f"with a key ({keys} in use)"] if keys else [])]
    facts.append(("access", ", ".join(access)))
    lines = [f"inkstream {__version__}", *(f"  {name:<11}{value}" for name, value in facts)]
    if outside:
        lines += ["", *qr_code(outside), "  Scan it with a phone in the same network, then type a key."]
    elif here:
        lines.append("  For a phone or a team: `inkstream serve keys add NAME`, then --host 0.0.0.0")
    return [*lines, "  Ctrl-C stops the server; unfinished jobs continue at its next start.", ""]


def qr_code(text: str) -> list[str]:
    """Return lines of half blocks that show a QR code, for terminals of any colours."""
    import io

    import segno

    out = io.StringIO()
    segno.make(text, micro=False).terminal(out, compact=True, border=2)
    return out.getvalue().splitlines()


def lan_address() -> str | None:
    """Return the address by which machines of the network reach this one, if it has one. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 9))  # an address for documentation, RFC 5737: only the route is looked up
            return way.getsockname()[0]
        except OSError:
            return None


def is_inkstream(address: str) -> bool:
    """Whether a server of inkstream answers at an address."""
    import json
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"{address}/healthz", timeout=2) as answer:
            return "engine" in json.loads(answer.read())
    except (URLError, OSError, ValueError):
        return False


def serve_encoder(models: list[str], host: str, port: int, key_file: Path, machine: Machine, log_json: bool) -> None:
    """Serve the text encoders of a model. Only they are read. Raises InputError."""
    import uvicorn

    from inkstream.engine.machine.text_encoder import TextEncoder
    from inkstream.serve import logs
    from inkstream.serve.encoding import build
    from inkstream.serve.keys import Keys
    from inkstream.serve.limits import check_address

    if len(models) != 1:
        raise InputError(f"--encode-only takes one --model, {len(models)} are given: start a server for each")
    if machine.text_encoder_server is not None:
        raise InputError("--encode-only and --text-encoder-server are both given: leave one out")
    keys = Keys(key_file)
    check_address(host, bool(keys))
    logs.set_up(as_json=log_json)
    encoder = TextEncoder(models[0], machine)
    uvicorn.run(build(encoder.encode, keys), host=host, port=port, log_config=None, access_log=False)


async def listen(server: Any, jobs: Any, started: Callable[[], None]) -> None:
    """Serve until a signal, or until the engine cannot start at all. started() is called once the server listens.

    Event streams do not end by themselves, so they are closed first.
    """
    loop = asyncio.get_running_loop()
    stop = server.handle_exit

    def leave(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(jobs.feed.close)
        stop(number, frame)

    def give_up() -> None:
        jobs.feed.close()
        server.should_exit = True

    async def tell() -> None:
        while not server.started:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(started)  # a browser may take its time, and ask the server meanwhile

    server.handle_exit = leave
    jobs.drawing.give_up = give_up
    telling = asyncio.create_task(tell())
    await server.serve()
    telling.cancel()


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
    """Make a key and print it. Only its hash is stored: it cannot be shown again. A running server accepts it at once.

    Parameters
    ----------
    name
        Name of the key's owner in logs and records.
    per_minute
        Largest number of jobs per minute.
    pictures_per_day
        Largest number of pictures per day.
    queued
        Largest number of waiting jobs.
    priority
        Highest priority of its jobs, -10 to 10.
    admin
        The key may see the jobs of all keys, pause the queue, and read the metrics.
    data
        The server's data folder; default: the one in your home.
    api_key_file
        File of the keys; default: keys.json in the data folder.
    """
    from inkstream.serve.keys import add_key

    limits = {"per_minute": per_minute, "pictures_per_day": pictures_per_day, "queued": queued}
    for field, value in limits.items():
        if value is not None and value <= 0:
            raise InputError(f"--{field.replace('_', '-')} {value:g} is out of range: give 1 or more, or leave it out")
    if not -10 <= priority <= 10:
        raise InputError(f"--priority {priority} is out of range: give -10 to 10")
    print(add_key(file_of_keys(data, api_key_file), name, time.time(), **limits, priority=priority, admin=admin))


@keys.command(name="list")
def list_(
    *, data: Data = None, api_key_file: Data = None, json: Annotated[bool, Parameter(show_default=False)] = False
) -> None:
    """List the keys: names and limits, without secrets.

    Parameters
    ----------
    data
        The server's data folder; default: the one in your home.
    api_key_file
        File of the keys; default: keys.json in the data folder.
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
    """Remove a key. A running server refuses it at once.

    Parameters
    ----------
    name
        Name of the key's owner.
    data
        The server's data folder; default: the one in your home.
    api_key_file
        File of the keys; default: keys.json in the data folder.
    """
    from inkstream.serve.keys import remove_key

    remove_key(file_of_keys(data, api_key_file), name)


def describe(key: Any) -> dict[str, Any]:
    """Return the facts of a key, without its hash."""
    shown = {"name": key.name, "created": time.strftime("%Y-%m-%d", time.gmtime(key.created))}
    limits = {name: getattr(key, name) for name in ("per_minute", "pictures_per_day", "queued", "priority", "admin")}
    return shown | {name: value for name, value in limits.items() if value}


def folder(data: Path | None) -> Path:
    """Return the data folder: the given one, or the one in the user's home."""
    from platformdirs import user_data_path

    return data or user_data_path("inkstream", appauthor=False) / "server"


def file_of_keys(data: Path | None, api_key_file: Path | None) -> Path:
    return api_key_file or folder(data) / "keys.json"


def agree(name: str, yes: bool) -> None:
    """Raise InputError if a model must be downloaded without consent. The engine downloads it when it loads it."""
    from inkstream.cli.lines import in_gigabytes
    from inkstream.families import SPECS
    from inkstream.serve.engines.models import is_here

    spec = SPECS.get(name.rpartition("=")[2])
    if spec is not None and not yes and not is_here(spec):
        what = f"{in_gigabytes(spec.download_bytes or 0)}, licence {spec.licence}"
        raise InputError(f"--model {name} is not downloaded yet ({what}): add --yes to download it, or give a path")
