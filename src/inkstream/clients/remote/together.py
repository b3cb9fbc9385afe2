"""Together: one request, whose answer holds the picture.

Facts: the together package 3.1.1 (types/image_generate_params.py, image_file.py); docs.together.ai, images-overview.
It takes references by web address only, so they are not offered here.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from inkstream.clients.remote.contract import Drawn, News, Order, Provider, bearer, waiting
from inkstream.engine.wire import Peer, ask, reason_in
from inkstream.types import InputError, as_list, as_object


def draw(peer: Peer, order: Order) -> News:
    width, height = order.size
    body: dict[str, Any] = {
        "model": order.offer.model,
        "prompt": order.prompt,
        "n": 1,
        "width": width,
        "height": height,
        "output_format": "png",
        "response_format": "base64",
    }
    if order.has("seed"):
        body["seed"] = order.seed % 2**31
    if order.steps is not None:
        body["steps"] = order.steps
    if order.guidance is not None:
        body["guidance_scale"] = order.guidance
    if order.negative_prompt:
        body["negative_prompt"] = order.negative_prompt
    answer = yield from waiting(ask(peer, "POST", "v1/images/generations", {**body, **order.offer.send}))
    found = as_object((as_list((as_object(answer) or {}).get("data")) or [None])[0]) or {}
    try:
        yield Drawn(base64.b64decode(str(found["b64_json"]), validate=True))
    except (LookupError, binascii.Error, ValueError):
        raise InputError(f"{peer.title} sent a picture that is not complete: ask for it again") from None


PROVIDER = Provider(
    title="Together",
    address="https://api.together.ai",
    key_variable="TOGETHER_API_KEY",
    address_variable="TOGETHER_BASE_URL",
    authorise=bearer,
    moderated=lambda body: "nsfw" in reason_in(body).lower(),
    draw=draw,
)
