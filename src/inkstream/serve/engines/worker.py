"""The engine process: it reads jobs from stdin and writes events to stdout, one JSON object a line. Pictures are files.

    python -m inkstream.serve.engines.worker

It does not know queues, keys or HTTP. When stdin closes, the server is gone, and the process ends.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inkstream.families.fits import Sizes, sizes_of
from inkstream.types import Done, Drawer, Failed, InputError, Loading, Machine, Request, Saving, Spec, Step

if TYPE_CHECKING:
    from PIL.Image import Image

    from inkstream.engine.engine import Engine

FACTS = (
    "name", "family", "steps", "guidance", "shift", "guides", "shift_rule", "size", "multiple", "solver", "schedule",
    "strength", "licence", "commercial", "title", "writer",
)  # fmt: skip
"""Fields of a Spec that the server uses."""
THREADS = 256
"""Most threads: one for each slot of the server and each other message. A thread is started only when it is needed."""


class Unsaved(Exception):
    """A finished picture could not be written to the disk."""


class Voice:
    """Writes messages to a file descriptor, one JSON line each. Many threads may use it at the same time."""

    def __init__(self, handle: int):
        self._handle = handle
        self._turn = threading.Lock()

    def say(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._turn:
            while data:
                data = data[os.write(self._handle, data) :]


class Worker:
    """An engine and its present runs.

    drawer: what draws; default: the engine. parts: folder for finished pictures. say: called with the fields of each
    message. free: cleared while a model is preloaded; runs wait until it is set, because their model would replace the
    preloaded one in the engine's memory. Workers that share an engine share `free`.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Path,
        say: Callable[..., None],
        free: threading.Event | None = None,
        drawer: Drawer | None = None,
    ):
        self.engine = engine
        self.drawer = drawer or engine
        self.parts = parts
        self.say = say
        self.free = free or open_gate()
        self.live: set[str] = set()
        self.cancelled: set[str] = set()

    def draw(self, message: Mapping[str, Any]) -> None:
        """Draw one request and send a message for each step. The last message always says how the run ended."""
        run = message["draw"]
        self.free.wait()
        try:
            request = Request.model_validate(read_pictures(message["request"]))
            end = self._draw(run, request, message)
        except InputError as error:
            end = {"event": "failed", "kind": "input", "error": str(error)}
        except Unsaved as error:
            end = {"event": "unsaved", "error": str(error)}
        except Exception as error:
            report(error)
            end = {"event": "failed", "kind": "internal", "error": f"{type(error).__name__} in the engine, see the log"}
        self.live.discard(run)
        self.cancelled.discard(run)
        self.say(run=run, memory=memory(), **end)

    def cancel(self, run: str) -> None:
        """Stop a run at its next event, unless it has ended."""
        if run in self.live:
            self.cancelled.add(run)

    def _draw(self, run: str, request: Request, message: Mapping[str, Any]) -> dict[str, Any]:
        written, advised = "", False
        noted: list[str] = []
        events = self.drawer.submit(request)
        try:
            for event in events:
                if run in self.cancelled:
                    return {"event": "cancelled"}
                if isinstance(event, Loading):
                    written = event.text or written
                    noted += [event.note] if event.note else []
                    if event.note and advised:
                        self.say(run=run, event="noted", remark=event.note)
                    if not advised:  # between two pictures of a job, Loading only means that a prompt is written out
                        done, total = event.done_bytes, event.total_bytes
                        self.say(run=run, event="loading", what=event.what, done=done, total=total)
                elif isinstance(event, Step):
                    if not advised:
                        advised = True
                        as_drawn = request.model_copy(update={"prompt": written} if written else {})
                        self.say(run=run, event="remarks", device=self.drawer.ran_on(request.model)["device"],
                             remarks=noted + self.drawer.remarks(as_drawn))  # fmt: skip
                    preview = None if event.preview is None else data_url(event.preview)
                    self.say(run=run, event="step", picture=event.index, of=event.count, step=event.step,
                             steps=event.steps, t=event.t, seconds=round(event.seconds, 4),
                             preview=preview)  # fmt: skip
                elif isinstance(event, Done):
                    self.say(run=run, event="picture", **self._save(run, event, request, message))
                elif isinstance(event, Failed):
                    return {"event": "failed", "kind": event.kind, "error": event.error}
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()
        return {"event": "done"}

    def _save(self, run: str, done: Done, request: Request, message: Mapping[str, Any]) -> dict[str, Any]:
        """Write a picture into the folder `parts`, where the server takes it. Its metadata contains no path."""
        from inkstream.engine.drawing.writing import cost_of, wording
        from inkstream.engine.pictures.metadata import PICTURE_FIELDS, encode_picture

        spec = self.drawer.spec(request.model)
        typed = message.get("upsampled_from") or request.prompt
        extra = self.drawer.ran_on(request.model) | wording(typed, done) | cost_of(done)
        complete = done.request.model_copy(update={"model": message["name"]})
        saving = Saving(provenance=message.get("provenance", "basic"))
        data = encode_picture(done.image, "PNG", complete, spec, saving=saving, extra=extra)
        path = self.parts / f"{run}-{done.index}.png"
        try:
            path.write_bytes(data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise Unsaved(error.strerror or type(error).__name__) from None
        return {
            "index": done.index,
            "file": path.name,
            "seconds": round(done.seconds, 4),
            "width": done.image.width,
            "height": done.image.height,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "request": complete.model_dump(mode="json", exclude_none=True, exclude=set(PICTURE_FIELDS)),
        }

    def load(self, name: str, source: str) -> None:
        """Preload a model before the first job. The caller has cleared `free`; this method sets it again."""
        try:
            for event in self.engine.load(source):
                self.say(event="loading", what=event.what, done=event.done_bytes, total=event.total_bytes)
            self.say(event="loaded", model=name, device=str(self.engine.model.device), memory=memory())
        except InputError as error:
            self.say(event="unloadable", model=name, error=str(error))
        except Exception as error:
            report(error)
            self.say(event="unloadable", model=name, error=f"{type(error).__name__} in the engine, see the log")
        finally:
            self.free.set()

    def describe(self, name: str, source: str) -> None:
        """Send the description of a model that is given by its path. The weights are not read."""
        from inkstream.engine.drawing.enhancer import able
        from inkstream.engine.files.sources import locate

        try:
            spec = able(locate(source, chosen=self.engine.machine.chosen).spec, self.engine.machine)
            facts = {field: getattr(spec, field) for field in FACTS}
            said = {**facts, "abilities": sorted(spec.abilities)}
            self.say(event="described", model=name, spec=said, sizes=write_sizes(sizes_of(spec)))
        except InputError as error:
            self.say(event="unloadable", model=name, error=str(error))
        except Exception as error:
            report(error)
            self.say(event="unloadable", model=name, error=f"{type(error).__name__} in the engine, see the log")


def open_gate() -> threading.Event:
    """A new event that is already set."""
    gate = threading.Event()
    gate.set()
    return gate


def read_spec(facts: Mapping[str, Any]) -> Spec:
    """The Spec from the message of `describe`, without the configs of the model's parts."""
    known = {**facts, "size": tuple(facts["size"]), "abilities": frozenset(facts["abilities"])}
    return Spec(transformer=None, text_encoder=None, vae=None, **known)


def write_sizes(sizes: Sizes) -> dict[str, Any]:
    """Sizes as JSON, for the message of `describe`."""
    return {"inputs": sorted(sizes.inputs), "inside": sorted(sizes.inside), "blocks": dict(sizes.blocks)}


def read_sizes(said: Mapping[str, Any]) -> Sizes:
    """The Sizes from the message of `describe`."""
    return Sizes(frozenset(said["inputs"]), frozenset(said["inside"]), said["blocks"])


def read_pictures(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request with file contents, as data URLs, in place of paths: a picture's metadata must not contain paths.

    Data URLs in the request stay as they are.
    """
    from inkstream.engine.pictures.metadata import PICTURE_FIELDS

    def data(path: str) -> str:
        if path.startswith("data:"):
            return path
        return "data:application/octet-stream;base64," + base64.b64encode(Path(path).read_bytes()).decode()

    fields = dict(request)
    for name in PICTURE_FIELDS:
        given = fields.get(name)
        if isinstance(given, str):
            fields[name] = data(given)
        elif given:
            fields[name] = [data(path) for path in given]
    return fields


def data_url(image: Image) -> str:
    """A preview as a JPEG in a data URL, small enough to be sent at each step."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def memory() -> dict[str, int]:
    """Bytes of memory: `process`, in use by this process now; `gpu`, the peak on the GPU."""
    import torch

    used = {}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used["process"] = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        pass
    if torch.cuda.is_available():
        used["gpu"] = torch.cuda.max_memory_allocated()
    return used


def report(error: Exception) -> None:
    """Print where an internal error happened, without values: a value may be a prompt."""
    place, trace = [], error.__traceback__
    while trace is not None:
        place.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    print(f"{type(error).__name__} at {' > '.join(place[-8:])}", file=sys.stderr, flush=True)


def make_engine(machine: Mapping[str, Any]) -> Engine:
    """Make an engine with previews. machine: the fields of a Machine. Raises InputError for one that is not there."""
    from inkstream.engine.engine import Engine

    return Engine(Machine(**machine), previews=True)


def with_remote(engine: Engine, names: Sequence[str]) -> Drawer:
    """Return what draws: the engine, and the remote models that the server's owner named."""
    if not names:
        return engine
    from inkstream.clients.remote.drawer import remote_drawers
    from inkstream.clients.router import Router

    return Router(engine, remote_drawers(names, engine.machine, previews=True))


def listen(messages: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Put each message from stdin into the queue. End the process when stdin closes: the server is gone."""
    for line in sys.stdin.buffer:
        messages.put(json.loads(line))
    os._exit(0)


def obey(worker: Worker, threads: ThreadPoolExecutor, message: Mapping[str, Any]) -> None:
    """Start the action of a message. Messages come in their order."""
    if "draw" in message:
        worker.live.add(message["draw"])
        threads.submit(worker.draw, message)
    elif "cancel" in message:
        worker.cancel(message["cancel"])
    elif "load" in message:
        if not worker.live:  # a run loads its own model
            worker.free.clear()
            threads.submit(worker.load, message["load"], message["source"])
    elif "describe" in message:
        threads.submit(worker.describe, message["describe"], message["source"])


def main() -> None:
    """Handle the messages of the server that started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the server closes our stdin
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(messages,), daemon=True).start()
    voice = Voice(os.dup(1))
    os.dup2(2, 1)  # libraries that print to stdout must not disturb the messages
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    first = messages.get()
    began = time.perf_counter()
    try:
        engine = make_engine(first["machine"])
        drawer = with_remote(engine, first["remote"])
    except InputError as error:
        voice.say(event="unusable", error=str(error))
        return
    worker = Worker(engine, Path(first["parts"]), voice.say, drawer=drawer)
    threads = ThreadPoolExecutor(THREADS)  # reused, because each new thread would cost memory and helper threads
    voice.say(event="ready", seconds=round(time.perf_counter() - began, 3), memory=memory())
    while True:
        obey(worker, threads, messages.get())


if __name__ == "__main__":
    main()
