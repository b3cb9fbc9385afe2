"""OpenAI's Images API: one request, whose answer streams unfinished pictures and then the finished one.

Facts: the openai package 3.57 (types/image_generate_params.py, image_gen_completed_event.py, image_edit_*.py).
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from inkstream.clients.remote.contract import Drawn, News, Order, Provider, Sketch, Waiting, bearer
from inkstream.engine.wire import Peer, clean, reason_in, refusal, stream
from inkstream.types import InputError, as_list, as_object

SKETCHES = 2
"""Unfinished pictures to ask for, if they are shown. Each costs 100 tokens."""
MODERATED = ("moderation_blocked", "content_policy_violation")


def draw(peer: Peer, order: Order) -> News:
    body: dict[str, Any] = {
        "model": order.offer.model,
        "prompt": order.prompt,
        "n": 1,
        "size": "x".join(map(str, order.size)),
        "output_format": "png",
        "stream": True,
        "partial_images": SKETCHES if order.previews else 0,
        **order.offer.send,
    }
    if order.references:
        fields = [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in body.items()]
        told = stream(peer, "images/edits", form=[*fields, *(("image[]", data) for data in order.references)])
    else:
        told = stream(peer, "images/generations", body)
    for item in told:
        if isinstance(item, str):
            yield Waiting(item)
            continue
        name, event = item[0], as_object(item[1]) or {}
        if name == "error" or "error" in event:
            if moderated(event):
                raise refusal(peer, reason_in(event))
            raise InputError(f"{peer.title} drew nothing ({clean(peer, reason_in(event))}): try again")
        if name.endswith(".partial_image"):
            yield Sketch(_decoded(peer, event), int(event.get("partial_image_index", 0)) + 1, SKETCHES)
        elif name.endswith(".completed") or not name:
            found = as_object((as_list(event.get("data")) or [event])[0]) or {}
            yield Drawn(_decoded(peer, found), _cost(order, event.get("usage")), str(found.get("revised_prompt") or ""))
            return
    raise InputError(f"{peer.title} ended its answer without a picture: try again")


def moderated(body: Any) -> bool:
    """Whether an error says that the content is refused."""
    event = as_object(body) or {}
    error = as_object(event.get("error")) or event
    return error.get("code") in MODERATED


def _decoded(peer: Peer, event: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(str(event["b64_json"]), validate=True)
    except (LookupError, binascii.Error, ValueError):
        raise InputError(f"{peer.title} sent a picture that is not complete: ask for it again") from None


def _cost(order: Order, usage: Any) -> float | None:
    """The cost in US dollars of the tokens that an answer counts."""
    counted = as_object(usage) or {}
    inside = as_object(counted.get("input_tokens_details")) or {}
    numbers = inside.get("text_tokens"), inside.get("image_tokens"), counted.get("output_tokens")
    if not all(isinstance(number, int) for number in numbers):
        return None
    return order.offer.price.of_tokens(*numbers)  # type: ignore[arg-type]


PROVIDER = Provider(
    title="OpenAI",
    address="https://api.openai.com/v1",
    key_variable="OPENAI_API_KEY",
    address_variable="OPENAI_BASE_URL",
    authorise=bearer,
    moderated=moderated,
    draw=draw,
)
