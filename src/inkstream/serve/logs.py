"""The log on stderr: words on a terminal, else one JSON object for each line. Prompts are in it with --log-prompts."""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class Lines(logging.Formatter):
    """Formats a log record as JSON: time, level, event, and the values given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {name: value for name, value in vars(record).items() if name not in KNOWN}
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **facts,
        }
        if record.exc_info and record.exc_info[0] is not None:  # only places in the code: values may be prompts
            line["error"] = record.exc_info[0].__name__
            line["at"] = _places(record.exc_info[2])
        return json.dumps(line, ensure_ascii=False, default=str)


class Words(logging.Formatter):
    """Formats a log record for people: the time of day, the event, and the values given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = [
            f"{name} {value}" for name, value in vars(record).items() if name not in KNOWN and value not in ("", None)
        ]
        if record.exc_info and record.exc_info[0] is not None:
            facts += [record.exc_info[0].__name__, f"at {_places(record.exc_info[2])}"]
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return "  ".join([self.formatTime(record, "%H:%M:%S"), level + record.getMessage(), *facts])


def set_up(stream: TextIO = sys.stderr, as_json: bool = False) -> None:
    """Send the records of inkstream and uvicorn to one stream: as words if it is a terminal and `as_json` is unset."""
    words = stream.isatty() and not as_json
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Words() if words else Lines())
    for name in ("inkstream.serve", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(logging.INFO)
    if words:  # the command line tells the address
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").disabled = True  # app.Guard logs the answers


def _places(trace: object) -> str:
    """The last eight places of a traceback, as FILE:LINE."""
    places = []
    while trace is not None:
        code = trace.tb_frame.f_code  # type: ignore[attr-defined]
        places.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")  # type: ignore[attr-defined]
        trace = trace.tb_next  # type: ignore[attr-defined]
    return " > ".join(places[-8:])
