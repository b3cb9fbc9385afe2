"""One node: it sends a request to an inkstream server and returns the pictures. The server runs the model."""

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
"""Seconds between two polls of a job."""
OPEN = -1
"""The value of a number that takes the model's default."""


class Draw:
    """Draws a prompt, with optional input pictures. The variable INKSTREAM_API_KEY holds the server's key, if any."""

    CATEGORY = "inkstream"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "requests")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI. A number of -1 takes the model's default."""
        side = {"default": OPEN, "min": OPEN, "max": 8192, "step": 1}
        return {
            "required": {
                "server": ("STRING", {"default": "http://127.0.0.1:8400"}),
                "model": ("STRING", {"default": "", "tooltip": "Empty: the server's first model."}),
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
                "image": ("IMAGE", {"tooltip": "The image to start from."}),
                "mask": ("MASK", {"tooltip": "The area of the image to repaint."}),
                "strength": ("FLOAT", {"default": OPEN, "min": OPEN, "max": 1, "step": 0.05}),
                "references": ("IMAGE", {"tooltip": "Reference images, all of the batch."}),
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
        image: Tensor | None = None,  # (B, H, W, 3); only the first is used
        mask: Tensor | None = None,  # (B, H, W); only the first is used
        strength: float = OPEN,
        references: Tensor | None = None,  # (B, H, W, 3)
    ) -> tuple[Tensor, str]:
        """Returns the images (count, H, W, 3) in [0, 1], and a JSON list of the requests that reproduce them."""
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
    """A client of an inkstream server. Raises RuntimeError with the server's message where a request fails."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        key = os.environ.get("INKSTREAM_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._opener = urllib.request.build_opener(_Direct)

    def run(self, request: dict[str, Any], watch: Callable[[float], None]) -> dict[str, Any]:
        """Runs a job and returns it on success. watch: gets the progress in [0, 1]; its exceptions cancel the job."""
        job = json.loads(self.ask("POST", "/v1/jobs", json.dumps(request).encode(), "application/json"))
        path = f"/v1/jobs/{job['id']}"
        try:
            while job["state"] in ("queued", "running"):
                at = job["progress"]
                watch(0.0 if at is None else (at["picture"] + at["step"] / at["steps"]) / at["of"])
                time.sleep(PAUSE)
                job = json.loads(self.ask("GET", path))
        except BaseException:
            with suppress(RuntimeError):  # the job may be gone; the first exception is the one to report
                self.ask("DELETE", path)
            raise
        if job["state"] != "succeeded":
            raise RuntimeError(job["error"]["message"] if job["error"] else "the job was cancelled on the server")
        watch(1.0)
        return job

    def upload(self, pixels: Tensor) -> str:
        """Uploads pixels (H, W, 3) or (H, W) in [0, 1] and returns their name for a request, `upload:ID`."""
        buffer = io.BytesIO()
        Image.fromarray((pixels.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)).save(buffer, "PNG")
        answer = self.ask("POST", "/v1/uploads", buffer.getvalue(), "application/octet-stream")
        return "upload:" + json.loads(answer)["id"]

    def picture(self, path: str) -> Tensor:
        """Downloads a picture: (H, W, 3) in [0, 1]."""
        with Image.open(io.BytesIO(self.ask("GET", path))) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        """Sends an HTTP request and returns the body of the answer."""
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
    """Follows no redirects, so that the key is never sent to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _message(status: int, body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"the server answered {status} without a message: check that its address is an inkstream server's"


def watcher() -> Callable[[float], None]:
    """A function that moves ComfyUI's progress bar and raises if the user stops the run; a no-op outside ComfyUI."""
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
