"""One node: a request to the server, pictures back. The model runs there, so nothing is loaded here."""

from __future__ import annotations

import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PAUSE = 0.3
"""Seconds between two looks at a job."""
OPEN = -1
"""What a number is that is left to the model."""


class Draw:
    """Draws a prompt, from pictures where they are given. The key that a server asks for is in INKSTREAM_API_KEY."""

    CATEGORY = "inkstream"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "requests")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows; -1 leaves a number to the model."""
        side = {"default": OPEN, "min": OPEN, "max": 8192, "step": 1}
        return {
            "required": {
                "server": ("STRING", {"default": "http://127.0.0.1:8400"}),
                "model": ("STRING", {"default": "", "tooltip": "Empty: the server's first."}),
                "prompt": ("STRING", {"default": "", "multiline": True}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
                "width": ("INT", side),
                "height": ("INT", side),
                "steps": ("INT", {"default": OPEN, "min": OPEN, "max": 1000}),
                "guidance": ("FLOAT", {"default": OPEN, "min": OPEN, "max": 100, "step": 0.1}),
                "count": ("INT", {"default": 1, "min": 1, "max": 64}),
            },
            "optional": {
                "negative_prompt": ("STRING", {"default": "", "multiline": True}),
                "image": ("IMAGE", {"tooltip": "To start from."}),
                "mask": ("MASK", {"tooltip": "What of the image is repainted."}),
                "strength": ("FLOAT", {"default": OPEN, "min": OPEN, "max": 1, "step": 0.05}),
                "references": ("IMAGE", {"tooltip": "To look at, each of the batch."}),
            },
        }

    def draw(
        self,
        server: str,
        model: str,
        prompt: str,
        seed: int,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        count: int,
        negative_prompt: str = "",
        image: Tensor | None = None,  # (B, H, W, 3), of which the first
        mask: Tensor | None = None,  # (B, H, W)
        strength: float = OPEN,
        references: Tensor | None = None,  # (B, H, W, 3)
    ) -> tuple[Tensor, str]:
        """(count, H, W, 3) in [0, 1], and as JSON the request that draws each."""
        there = Server(server)
        request: dict[str, Any] = {"prompt": prompt, "seed": seed, "count": count}
        numbers = {"width": width, "height": height, "steps": steps, "guidance": guidance, "strength": strength}
        request |= {name: value for name, value in numbers.items() if value >= 0}
        request |= {name: value for name, value in (("model", model), ("negative_prompt", negative_prompt)) if value}
        if image is not None:
            request["image"] = there.upload(image[0])
        if mask is not None:
            request["mask"] = there.upload(mask[0])
        if references is not None:
            request["reference"] = [there.upload(one) for one in references]
        job = there.run(request, watcher())
        images = torch.stack([there.picture(one["url"]) for one in job["pictures"]])
        return images, json.dumps([one["request"] for one in job["pictures"]], ensure_ascii=False)


class Server:
    """An inkstream server. RuntimeError where it refuses, with its own words."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        key = os.environ.get("INKSTREAM_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._opener = urllib.request.build_opener(_Direct)

    def run(self, request: dict[str, Any], watch: Callable[[float], None]) -> dict[str, Any]:
        """The job once it has succeeded. watch: told how far it is; what it raises cancels the job."""
        job = json.loads(self.ask("POST", "/v1/jobs", json.dumps(request).encode(), "application/json"))
        path = f"/v1/jobs/{job['id']}"
        try:
            while job["state"] in ("queued", "running"):
                at = job["progress"]
                watch(0.0 if at is None else (at["picture"] + at["step"] / at["steps"]) / at["of"])
                time.sleep(PAUSE)
                job = json.loads(self.ask("GET", path))
        except BaseException:
            with suppress(RuntimeError):  # it is gone; what is told is why
                self.ask("DELETE", path)
            raise
        if job["state"] != "succeeded":
            raise RuntimeError(job["error"]["message"] if job["error"] else "the job was cancelled on the server")
        watch(1.0)
        return job

    def upload(self, pixels: Tensor) -> str:
        """Pixels (H, W, 3) or (H, W) in [0, 1], kept by the server, as a request names them."""
        buffer = io.BytesIO()
        Image.fromarray((pixels.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)).save(buffer, "PNG")
        answer = self.ask("POST", "/v1/uploads", buffer.getvalue(), "application/octet-stream")
        return "upload:" + json.loads(answer)["id"]

    def picture(self, path: str) -> Tensor:
        """(H, W, 3) in [0, 1]."""
        with Image.open(io.BytesIO(self.ask("GET", path))) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        """The body of the answer."""
        headers = {**self._headers, **({"Content-Type": kind} if kind else {})}
        asked = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with self._opener.open(asked, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as refused:
            with refused:
                raise RuntimeError(_message(refused.code, refused.read())) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise RuntimeError(
                f"the inkstream server at {self.url} does not answer ({reason}): start it, or give another address"
            ) from None


class _Direct(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: a key must not be carried on to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _message(status: int, body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"the server answered {status}: is this an inkstream server?"


def watcher() -> Callable[[float], None]:
    """Moves ComfyUI's bar, and raises where its user stops the run; outside of ComfyUI does nothing."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted as check
        from comfy.utils import ProgressBar
    except ImportError:
        return lambda part: None
    bar = ProgressBar(100)

    def watch(part: float) -> None:
        check()
        bar.update_absolute(round(100 * part))

    return watch
