"""Providers of remote models on loopback: each speaks its dialect with the shapes that the real one was seen to have.

A provider does as it is told: `plays` names what goes wrong. Shapes: docs.bfl.ai, the packages openai 3.57, fal_client
1.0.3, replicate 1.0.7 and together 3.1.1, the reference of Model Studio's z-image-turbo.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "sk-planted-0123456789abcdef"
PLAYS = ("happy", "busy", "slow", "moderation", "broken", "expired", "garbage")


def png(size: tuple[int, int] = (64, 48), colour: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


class Pretended:
    """One provider. bodies: the JSON (or the raw bytes) of the requests that it took, in their order."""

    def __init__(self, dialect: Callable[[Pretended, Asked], Answer], plays: str = "happy"):
        self.dialect = dialect
        self.plays = plays
        self.polls = 0
        self.refused = 0
        self.keys: list[str] = []
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None: ...

            def _handle(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                provider._answer(self, self.rfile.read(length))

            do_GET = do_POST = do_PUT = _handle

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        self.paths.append(f"{handler.command} {handler.path}")
        key = handler.headers.get("x-key") or handler.headers.get("Authorization", "").rpartition(" ")[2]
        if handler.path.startswith("/picture"):
            assert not key, "the key must not go to where pictures lie"
            status, kind, body = self._picture()
        elif key != KEY:
            status, kind, body = 401, "application/json", _encode(self._words("wrong key", f"the key {key} is wrong"))
        elif self.plays == "busy" and self.refused < 2:
            self.refused += 1
            handler.send_response(429)
            handler.send_header("Retry-After", "0" if self.refused > 1 else "1")
            handler.end_headers()
            return
        elif self.plays == "garbage":
            status, kind, body = 200, "text/html", b"<html>a portal</html>"
        else:
            found = json.loads(data) if data[:1] == b"{" else data
            if handler.command == "POST":
                self.keys.append(key)
                self.bodies.append(found)
            status, kind, body = self.dialect(self, Asked(handler.command, handler.path, found))
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _picture(self) -> Answer:
        if self.plays == "expired":
            return 403, "application/xml", b"<Error><Code>AccessDenied</Code></Error>"
        return 200, "image/png", self.file()

    def file(self) -> bytes:
        return png()[:60] if self.plays == "broken" else png()

    def waits(self) -> bool:
        """Whether the picture is not finished yet. A slow one takes three polls."""
        self.polls += 1
        return self.polls < (4 if self.plays == "slow" else 1)

    def _words(self, code: str, message: str) -> Any:
        return {"error": {"message": message, "type": "x", "code": code}, "detail": message, "message": message}


class Asked:
    def __init__(self, method: str, path: str, body: Any):
        self.method, self.path, self.body = method, path, body


Answer = tuple[int, str, bytes]


def _encode(document: Any) -> bytes:
    return json.dumps(document).encode()


def _json(document: Any, status: int = 200) -> Answer:
    return status, "application/json", _encode(document)


def bfl(provider: Pretended, asked: Asked) -> Answer:
    if asked.method == "POST":
        url = f"{provider.address}/v1/get_result?id=abc"
        return _json({"id": "abc", "polling_url": url, "cost": 4.5, "input_mp": 0.0, "output_mp": 1.0})
    if provider.plays == "moderation":
        details = {"Moderation Reasons": ["Derivative Works Filter"]}
        return _json({"id": "abc", "status": "Request Moderated", "result": None, "progress": None, "details": details})
    if provider.waits():
        return _json({"id": "abc", "status": "Pending", "result": None, "progress": None, "details": None})
    result = {"sample": f"{provider.address}/picture.png?se=2026", "prompt": "a fox, written out", "seed": 7}
    return _json({"id": "abc", "status": "Ready", "result": result, "progress": None, "details": None})


def openai(provider: Pretended, asked: Asked) -> Answer:
    if provider.plays == "moderation":
        error = {"message": "Your request was rejected by the safety system.", "type": "image_generation_user_error",
                 "param": None, "code": "moderation_blocked"}  # fmt: skip
        return _json({"error": error}, 400)
    encoded = base64.b64encode(provider.file()).decode()
    kind = "image_edit" if "edits" in asked.path else "image_generation"
    usage = {"input_tokens": 10, "output_tokens": 1000, "total_tokens": 1010,
             "input_tokens_details": {"text_tokens": 10, "image_tokens": 0}}  # fmt: skip
    about = {"created_at": 1, "size": "1024x1024", "quality": "medium", "background": "opaque", "output_format": "png"}
    partial = {"type": f"{kind}.partial_image", "b64_json": base64.b64encode(png()).decode(), **about}
    done = {"type": f"{kind}.completed", "b64_json": encoded, "usage": usage, **about}
    events = [done]
    if isinstance(asked.body, dict) and asked.body["partial_images"]:
        events = [{**partial, "partial_image_index": 0}, {**partial, "partial_image_index": 1}, done]
    lines = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return 200, "text/event-stream", lines.encode()


def dashscope(provider: Pretended, asked: Asked) -> Answer:
    if provider.plays == "moderation":
        said = "Input text data may contain inappropriate content."
        return _json({"code": "DataInspectionFailed", "message": said, "request_id": "r"}, 400)
    content: list[Any] = [{"image": f"{provider.address}/picture.png?Expires=1767927258"}]
    content += [{"text": "a fox, written out"}]
    choices = [{"finish_reason": "stop", "message": {"role": "assistant", "content": content, "reasoning_content": ""}}]
    usage = {"width": 1024, "height": 1024, "image_count": 1}
    return _json({"output": {"choices": choices}, "usage": usage, "request_id": "r"})


def fal(provider: Pretended, asked: Asked) -> Answer:
    place = f"{provider.address}/fal-ai/z-image/requests/abc"
    if asked.method == "POST":
        urls = {"response_url": place, "status_url": f"{place}/status", "cancel_url": f"{place}/cancel"}
        return _json({"status": "IN_QUEUE", "request_id": "abc", "queue_position": 0, **urls})
    if asked.path.endswith("status"):
        if provider.waits():
            return _json({"status": "IN_QUEUE", "request_id": "abc", "queue_position": 3 - provider.polls})
        return _json({"status": "COMPLETED", "request_id": "abc", "logs": None, "metrics": {"inference_time": 1.2}})
    if provider.plays == "moderation":
        detail = {"loc": ["body", "prompt"], "msg": "The content was flagged by a content checker.",
                  "type": "content_policy_violation", "url": "https://docs.fal.ai/errors", "input": "x"}  # fmt: skip
        return _json({"detail": [detail]}, 422)
    image = {"url": f"{provider.address}/picture.png", "width": 1024, "height": 1024, "content_type": "image/png"}
    return _json({"images": [image], "timings": {}, "seed": 7, "has_nsfw_concepts": [False], "prompt": "a fox"})


def replicate(provider: Pretended, asked: Asked) -> Answer:
    here = f"{provider.address}/v1/predictions/abc"
    state = {"id": "abc", "urls": {"get": here, "cancel": f"{here}/cancel"}, "output": None, "error": None}
    if asked.path == "/v1/files":
        return _json({"id": "f", "urls": {"get": f"{provider.address}/v1/files/f"}}, 201)
    if asked.method == "POST":
        return _json({**state, "status": "starting"}, 201)
    if provider.plays == "moderation":
        said = "The input or output was flagged as sensitive. Please try again with different inputs. (E005)"
        return _json({**state, "status": "failed", "error": said})
    if provider.waits():
        return _json({**state, "status": "processing"})
    return _json({**state, "status": "succeeded", "output": f"{provider.address}/picture.png"})


def together(provider: Pretended, asked: Asked) -> Answer:
    if provider.plays == "moderation":
        said = "NSFW content detected in the prompt"
        return _json({"id": "x", "error": {"message": said, "type": "invalid_request_error", "param": None}}, 422)
    found = {"index": 0, "type": "b64_json", "b64_json": base64.b64encode(provider.file()).decode()}
    return _json({"id": "x", "model": "m", "object": "list", "data": [found]})


DIALECTS = {function.__name__: function for function in (bfl, openai, dashscope, fal, replicate, together)}
MODELS = {
    "bfl": "bfl:flux-2-pro", "openai": "openai:gpt-image-2", "dashscope": "dashscope:z-image-turbo",
    "fal": "fal:z-image-turbo", "replicate": "replicate:flux-2-pro", "together": "together:flux-1-schnell",
}  # fmt: skip
