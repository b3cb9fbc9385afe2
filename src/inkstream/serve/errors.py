"""Error answers: all routes use one exception and one body, in the form of OpenAI's API."""

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
    400: "The request cannot be done; the message names the value and the remedy.",
    401: "The request has no key, or the server does not know the key.",
    403: "The key does not allow this.",
    404: "It does not exist, or it belongs to another key.",
    405: "The path does not support this method.",
    408: "The body arrived too slowly.",
    409: "The idempotency key was used with another body, or the job is not in the right state.",
    413: "The body is too large.",
    429: "The queue is full, or the quota or the rate limit is reached: try again after Retry-After seconds.",
    500: "The drawing failed because of an error in the server.",
    503: "The server is stopping, the engine is not running, or the server cannot write to its folder.",
}


class Error(BaseModel):
    """The reason why a request was refused or a job failed."""

    message: str = Field(description="One line that names the value and the remedy.")
    type: str = Field(description="Kind of error, by OpenAI's names.")
    param: str | None = Field(None, description="The field that is wrong.")
    code: str | None = Field(None, description="A code for programs.")


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: Error


class Refused(Exception):
    """An error answer. retry_after: seconds after which the client should try again."""

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
    """Whether the error means a damaged database, and not a full disk, a lock or missing permission."""
    return type(error) is sqlite3.DatabaseError


def _as_text(given: str) -> str:
    """The text with `?` in place of half surrogate pairs: UTF-8 cannot encode them."""
    return given.encode(errors="replace").decode()


def reason_of(error: OSError | sqlite3.Error) -> str:
    """The error's text from the system or SQLite, without the paths that OSError adds."""
    return getattr(error, "strerror", None) or str(error)


def disk_full() -> Refused:
    """The answer to a request that the disk has no space for."""
    line = "the server's disk is full: free some space, then try again"
    return Refused(503, line, code="disk_full", retry_after=60)


REFUSALS = ("EROFS", "EIO", "EACCES", "EPERM", "ENOENT")
"""Error codes of the system for a folder that is not writable or does not exist."""


def explain_trouble(error: OSError | sqlite3.Error) -> Refused:
    """The answer to an error of the disk or the database: one line with the cause and the remedy."""
    if is_broken(error):
        return Refused(500, "the server's database is damaged: restart the server to repair it", code="damaged")
    name = getattr(error, "sqlite_errorname", None) or errno.errorcode.get(getattr(error, "errno", None) or 0, "")
    if name in ("SQLITE_FULL", "ENOSPC", "EDQUOT", "EFBIG"):
        return disk_full()
    if name.startswith(("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_BUSY")) or name in REFUSALS:
        line = f"the server cannot write to its folder ({reason_of(error)}): fix that, then try again"
        return Refused(503, line, code="not_writable", retry_after=60)
    return Refused(500, f"{type(error).__name__} in the server, see its log")


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers that a route declares: the given statuses, and 400, 401 and 403, which the guard may give."""
    declared = sorted({*statuses, 400, 401, 403})
    return {status: {"model": ErrorBody, "description": MEANINGS[status]} for status in declared}


def explain(problems: Iterable[Any]) -> Refused:
    """The answer to pydantic's first error: the field, the given value and the rule."""
    problem = next(iter(problems))
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    name = ".".join(place)
    message = " ".join(str(problem["msg"]).split())
    if problem["type"] == "json_invalid":
        return Refused(400, "the body is not JSON: send one JSON object", code="invalid_json")
    if not name:
        return Refused(400, f"the body is not valid: {message}")
    given = problem.get("input")
    shown = f" {given}" if isinstance(given, int | float | str) and len(str(given)) <= 100 else ""
    line = f"{name}{shown}: {message}"
    if problem["type"] == "extra_forbidden":
        line = f"{name} is not a known field: leave it out"
    return Refused(400, line[:500], param=name[:200])


def explain_invalid(error: ValidationError) -> Refused:
    """The answer to an error that pydantic raised."""
    return explain(error.errors(include_url=False, include_context=False))
