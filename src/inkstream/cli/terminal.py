"""Events on stderr: a progress bar on a terminal, else only lines."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from inkstream.cli.lines import in_gigabytes
from inkstream.types import Event, Loading, Queued, Step, in_time

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Terminal:
    """Shows events on stderr while it is open. quiet: shows nothing and only prints results."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._said: set[str] = set()
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,  # results must stay on stdout
                redirect_stderr=False,
            )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hide()

    def print(self, result: str) -> None:
        """Print a result on stdout."""
        self._hide()
        print(result, flush=True)

    def say(self, line: str, once: bool = False) -> None:
        """Print a message on stderr. once: do not repeat a message."""
        if not self.quiet and not (once and line in self._said):
            self._said.add(line)
            self._hide()
            print(line, file=sys.stderr, flush=True)

    def ask(self, question: str) -> bool:
        """Ask a question. Returns whether the user answers yes."""
        return self.read(f"{question} [y/N]").lower() in ("y", "yes")

    def read(self, question: str) -> str:
        """Ask a question. Returns the answer, which is empty without input."""
        self._hide()
        print(f"{question} ", file=sys.stderr, end="", flush=True)
        return sys.stdin.readline().strip()

    def show(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Queued) and event.position:
            self._move(f"{event.position} ahead", 0, None, "")
        elif isinstance(event, Loading) and event.note:
            self.say(event.note)
        elif isinstance(event, Loading):
            done, total = event.done_bytes or 0, event.total_bytes
            note = f"{in_gigabytes(done)} of {in_gigabytes(total)}" if total else ""
            self._move(event.what, done, total, f"{len(event.text.split())} words" if event.text else note)
        elif isinstance(event, Step):
            picture = f"picture {event.index + 1} of {event.count}" if event.count > 1 else "picture"
            slow = event.seconds >= 1
            rate = f"{event.seconds:.2f} s/step" if slow else f"{1 / max(event.seconds, 1e-9):.1f} steps/s"
            left = event.seconds * (event.steps - event.step + event.steps * (event.count - event.index - 1))
            rest = f", {in_time(left)} left" if left >= 5 else ""
            self._move(picture, event.step, event.steps, f"step {event.step} of {event.steps}, {rate}{rest}")

    def wait(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show progress that is not an event: `done` of `total`."""
        self._move(what, done, total or None, note or (f"{done} of {total}" if total else ""))

    def _move(self, what: str, done: int, total: int | None, note: str) -> None:
        if self._progress is None:
            return
        self._progress.start()
        if self._task is None:
            self._task = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._task, description=what, completed=done, total=total, note=note)

    def _hide(self) -> None:
        """Hide the progress bar until the next event."""
        if self._progress is not None and self._progress.live.is_started:
            self._progress.stop()
