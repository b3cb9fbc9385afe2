"""Answers that refuse: one exception, one body in OpenAI's form, whatever the route."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field, ValidationError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
MEANINGS = {
    400: "What was asked cannot be done; the message names the value and the remedy.",
    401: "No key, or one that is not known here.",
    403: "The key may not do this.",
    404: "There is no such thing, or it is another key's.",
    405: "The path does not take this method.",
    408: "The body came too slowly.",
    409: "The idempotency key was used for another body.",
    413: "The body is larger than is taken.",
    429: "The queue, the quota or the rate is spent: try again after Retry-After seconds.",
    500: "The drawing failed by an error of the server's own.",
    503: "The server is stopping, the engine is not there, or nothing can be written to the server's folder.",
}


class Error(BaseModel):
    """Why something was refused or failed."""

    message: str = Field(description="One line that names the value and the remedy.")
    type: str = Field(description="Kind of error, as OpenAI's API names them.")
    param: str | None = Field(None, description="The field that is wrong.")
    code: str | None = Field(None, description="A word that programs can go by.")


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: Error


class Refused(Exception):
    """An answer other than success. retry_after: seconds until it is worth asking again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = _as_text(message)
        self.param = None if param is None else _as_text(param)
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def is_broken(error: Exception) -> bool:
    """Whether SQLite met damage, not a full disk, a lock or a lack of rights."""
    return type(error) is sqlite3.DatabaseError


def _as_text(given: str) -> str:
    """What can be sent: half a surrogate pair, which JSON can name, cannot."""
    return given.encode(errors="replace").decode()


def reason_of(error: OSError | sqlite3.Error) -> str:
    """What the system or SQLite calls it, without the paths that OSError names."""
    return getattr(error, "strerror", None) or str(error)


def disk_full() -> Refused:
    """There is no room for what was asked."""
    line = "the server's disk is full: free some of it, then ask again"
    return Refused(503, line, code="disk_full", retry_after=60)


REFUSALS = ("EROFS", "EIO", "EACCES", "EPERM", "ENOENT")
"""What the system says of a folder that nothing can be written to, or that is gone."""


def explain_trouble(error: OSError | sqlite3.Error) -> Refused:
    """An error of the disk or the database as an answer: what has happened, what helps."""
    if is_broken(error):
        return Refused(500, "the server's database is damaged: start the server again, which mends it", code="damaged")
    name = getattr(error, "sqlite_errorname", None) or errno.errorcode.get(getattr(error, "errno", None) or 0, "")
    if name in ("SQLITE_FULL", "ENOSPC", "EDQUOT", "EFBIG"):
        return disk_full()
    if name.startswith(("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_BUSY")) or name in REFUSALS:
        line = f"the server cannot write to its folder ({reason_of(error)}): mend that, then ask again"
        return Refused(503, line, code="not_writable", retry_after=60)
    return Refused(500, f"{type(error).__name__} in the server, see its log")


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route declares for the statuses it may refuse with, beside those that the guard may."""
    declared = sorted({*statuses, 400, 401, 403})
    return {status: {"model": ErrorBody, "description": MEANINGS[status]} for status in declared}


def explain(problems: Iterable[Any]) -> Refused:
    """Pydantic's first complaint as an answer: the field, what was given, what is taken."""
    problem = next(iter(problems))
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    name = ".".join(place)
    message = " ".join(str(problem["msg"]).split())
    if problem["type"] == "json_invalid":
        return Refused(400, "the body is not JSON: send one JSON object", code="invalid_json")
    if not name:
        return Refused(400, f"the body cannot be taken: {message}")
    given = problem.get("input")
    shown = f" {given}" if isinstance(given, int | float | str) and len(str(given)) <= 100 else ""
    line = f"{name}{shown}: {message}"
    if problem["type"] == "extra_forbidden":
        line = f"{name} is not a field that is known here: leave it out"
    return Refused(400, line[:500], param=name[:200])


def explain_invalid(error: ValidationError) -> Refused:
    """The same, of an error that pydantic raised."""
    return explain(error.errors(include_url=False, include_context=False))
