"""Settings of the server process and limits of a request: frozen data, and functions that check a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from inkstream.serve.errors import Refused
from inkstream.types import Enlargement, InputError, Machine, ProvenanceName, Request, Spec

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Limits:
    """Upper limits for one request, one key or the whole server."""

    body_bytes: int = 64 << 20
    body_seconds: float = 30.0  # longest pause between two pieces of a body
    upload_pixels: int = 32 << 20
    pixels: int = 2048 * 2048  # of a drawn picture
    enlarged: int = 64 << 20  # pixels of a picture that is enlarged and not drawn again
    pictures: int = 64  # of one job
    steps: int = 200
    prompt: int = 32_000  # characters
    queue: int = 200  # waiting jobs of all keys together
    seconds: float = 4 * 3600.0  # running time of one job
    upload_total: int = 2 << 30  # bytes of all uploads of one key
    reserve: int = 64 << 20  # bytes of free disk space: with less, the server accepts and starts no job


@dataclass(frozen=True)
class Settings:
    """The options that the server was started with."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8400
    models: tuple[str, ...] = ()  # names or NAME=PATH; empty: all known models that are downloaded
    key_file: Path | None = None  # None: keys.json in `data`
    machine: Machine = Machine()  # noqa: RUF009  (frozen)
    slots: int = 4  # jobs drawn at the same time; they share the model's forward passes
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False
    fetch: bool = False  # download pictures that are given by URL
    preload: bool = True
    aliases: tuple[str, ...] = ()  # NAME=MODEL: more names of models in OpenAI's API
    provenance: ProvenanceName = "basic"  # the marks that a model made the pictures
    bakeoffs: Path | None = None  # folder of bake-offs to vote on; None: bakeoffs in `data`
    strict: bool = False  # True: OpenAI's model names do not mean the only model

    @property
    def keys(self) -> Path:
        return self.key_file or self.data / "keys.json"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. Any name except localhost counts as reachable by others."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, has_keys: bool) -> None:
    """Raise InputError if other machines could reach a server that asks for no key."""
    if not has_keys and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached by others and no key is set: "
            "make one with `inkstream serve keys add NAME`, or leave --host out"
        )


def check_text(*texts: str) -> None:
    """Raise Refused if a text holds half a surrogate pair. JSON can express such a half, UTF-8 cannot."""
    try:
        "\n".join(texts).encode()
    except UnicodeEncodeError:
        raise Refused(400, "a text has half a surrogate pair (\\ud800 to \\udfff): send both halves") from None


def check(request: Request, spec: Spec | None, limits: Limits) -> None:
    """Raise Refused, with the name of the field, if a request exceeds a limit. spec: None while it is not known."""
    if len(request.prompt) > limits.prompt or len(request.negative_prompt) > limits.prompt:
        name = "prompt" if len(request.prompt) > limits.prompt else "negative_prompt"
        raise Refused(400, f"{name} has more than {limits.prompt} characters: shorten it", param=name)
    width, height = request.width or 0, request.height or 0
    if spec is not None and request.image is None and not request.reference:
        width, height = width or spec.size[0], height or spec.size[1]
    if width * height > limits.pixels:
        most = int(limits.pixels**0.5) // 16 * 16
        raise Refused(
            400, f"{width}x{height} is more than this server draws: take at most {most}x{most}", param="width"
        )
    if request.count > limits.pictures:
        raise Refused(
            400, f"count {request.count} is too many for one job: take at most {limits.pictures}", param="count"
        )
    if (most := request.count * (1 + request.until_verified)) > limits.pictures:
        line = (
            f"until_verified {request.until_verified} may draw {most} pictures: take at most {limits.pictures} in all"
        )
        raise Refused(400, line, param="until_verified")
    if (request.steps or 0) > limits.steps:
        raise Refused(400, f"steps {request.steps} is too many: take at most {limits.steps}", param="steps")


def check_enlarged(request: Request, spec: Spec | None, start: tuple[int, int] | None, limits: Limits) -> None:
    """Raise Refused if a request makes its pictures larger than the limit. start: the size of its start picture."""
    if request.upscale is None:
        return
    own = start if request.keeps_start and start else (request.width or 0, request.height or 0)
    if not all(own):
        own = start or (spec.size if spec else (1024, 1024))
    width, height = Enlargement.read(request.upscale).of(*own)
    most = limits.pixels if request.upscale_strength else limits.enlarged
    if width * height > most:
        limit = f"{most / 2**20:g} megapixels"
        line = f"upscale {request.upscale} makes {width}x{height}, more than this server's limit of {limit}: take less"
        raise Refused(400, line, param="upscale")
