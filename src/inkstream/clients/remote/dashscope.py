"""Alibaba Model Studio: one request, which waits for the picture. The picture's address lives a day.

Facts: alibabacloud.com/help/en/model-studio/z-image-api-reference; a recorded answer of the same endpoint in public
code (output.choices, usage). Beijing's address is https://dashscope.aliyuncs.com/api/v1, with a key of its own.
"""

from __future__ import annotations

from typing import Any

from inkstream.clients.remote.contract import Drawn, News, Order, Provider, bearer, waiting
from inkstream.engine.wire import Peer, ask, fetch
from inkstream.types import InputError, as_list, as_object

PATH = "services/aigc/multimodal-generation/generation"
MODERATED = ("DataInspectionFailed", "data_inspection_failed", "InappropriateContent")


def draw(peer: Peer, order: Order) -> News:
    parameters: dict[str, Any] = {"size": "*".join(map(str, order.size)), "prompt_extend": order.upsample}
    if order.has("seed"):
        parameters["seed"] = order.seed % 2**31
    message = {"role": "user", "content": [{"text": order.prompt}]}
    body = {
        "model": order.offer.model,
        "input": {"messages": [message]},
        "parameters": {**parameters, **order.offer.send},
    }
    answer = as_object((yield from waiting(ask(peer, "POST", PATH, body)))) or {}
    choices = as_list((as_object(answer.get("output")) or {}).get("choices"))
    told = as_object((as_object(choices[0]) or {}).get("message")) if choices else None
    parts = [as_object(part) or {} for part in as_list((told or {}).get("content"))]
    url = next((str(part["image"]) for part in parts if "image" in part), "")
    if not url:
        raise InputError(f"{peer.title} answered without a picture: try again")
    written = next((str(part["text"]) for part in parts if part.get("text")), "") if order.upsample else ""
    yield Drawn((yield from waiting(fetch(peer, url))), None, written)


PROVIDER = Provider(
    title="Alibaba Model Studio",
    address="https://dashscope-intl.aliyuncs.com/api/v1",
    key_variable="DASHSCOPE_API_KEY",
    address_variable="DASHSCOPE_HTTP_BASE_URL",
    authorise=bearer,
    moderated=lambda body: str((as_object(body) or {}).get("code")).partition(".")[0] in MODERATED,
    draw=draw,
)
