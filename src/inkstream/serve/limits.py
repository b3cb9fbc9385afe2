"""What one server takes, and from whom: settings of the process, limits of a request. Frozen, without surroundings."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from inkstream.serve.errors import Refused
from inkstream.types import InputError, Machine, Request, Spec

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Limits:
    """The most that one request, one key or the whole server may ask for."""

    body_bytes: int = 64 << 20
    body_seconds: float = 30.0  # without a byte of the body
    upload_pixels: int = 32 << 20
    pixels: int = 2048 * 2048  # of a picture that is drawn
    pictures: int = 64  # of one job
    steps: int = 200
    prompt: int = 32_000  # characters
    queue: int = 200  # jobs waiting, of all keys
    seconds: float = 4 * 3600.0  # one job may run
    upload_total: int = 2 << 30  # bytes of uploads of one key
    reserve: int = 64 << 20  # bytes of the disk that are left free: with less, nothing is accepted or begun


@dataclass(frozen=True)
class Settings:
    """How a server was started."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8400
    models: tuple[str, ...] = ()  # names or NAME=PATH; none: all known ones that are here
    key_file: Path | None = None  # else keys.json in `data`
    machine: Machine = Machine()  # noqa: RUF009  (frozen)
    slots: int = 4  # jobs drawn at once, sharing the engine's forwards
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False
    fetch: bool = False  # pictures given by URL
    preload: bool = True
    aliases: tuple[str, ...] = ()  # NAME=MODEL: other names of models, of OpenAI's API
    strict: bool = False  # the only model does not answer to OpenAI's names of theirs

    @property
    def keys(self) -> Path:
        return self.key_file or self.data / "keys.json"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. Names other than localhost count as reachable."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, has_keys: bool) -> None:
    """InputError where others could reach a server that asks for no key."""
    if not has_keys and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached by others and no key is set: "
            "make one with `inkstream serve keys add NAME`, or leave --host out"
        )


def check_text(*texts: str) -> None:
    """Refused where a text holds half a surrogate pair, which JSON can name and UTF-8 cannot."""
    try:
        "\n".join(texts).encode()
    except UnicodeEncodeError:
        raise Refused(400, "a text has half a surrogate pair (\\ud800 to \\udfff): send both halves") from None


def check(request: Request, spec: Spec | None, limits: Limits) -> None:
    """Refused, with the field, where a request asks for more than is given."""
    if len(request.prompt) > limits.prompt or len(request.negative_prompt) > limits.prompt:
        name = "prompt" if len(request.prompt) > limits.prompt else "negative_prompt"
        raise Refused(400, f"{name} has more than {limits.prompt} characters: shorten it", param=name)
    width, height = request.width or 0, request.height or 0
    if spec is not None and request.image is None and not request.reference:
        width, height = width or spec.size[0], height or spec.size[1]
    if width * height > limits.pixels:
        most = int(limits.pixels**0.5) // 16 * 16
        raise Refused(
            400, f"{width}x{height} is larger than this server draws: take at most {most}x{most}", param="width"
        )
    if request.count > limits.pictures:
        raise Refused(
            400, f"count {request.count} is more than one job may have: take at most {limits.pictures}", param="count"
        )
    if (request.steps or 0) > limits.steps:
        raise Refused(400, f"steps {request.steps} is too many here: take at most {limits.steps}", param="steps")
