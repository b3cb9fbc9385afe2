"""Black Forest Labs: submit, then poll the address that the answer gives. The picture's address lives 10 minutes.

Facts: docs.bfl.ai (api_integration/errors, flux_2, flux_3, quick_start/pricing). 1 credit is 1 cent.
"""

from __future__ import annotations

import base64
from typing import Any

from inkstream.clients.remote.contract import Drawn, News, Order, Provider, waiting
from inkstream.engine.wire import Peer, ask, clean, fetch, reason_in, refusal, rest
from inkstream.types import InputError, as_object

POLL = 0.75
"""Seconds between two polls. The provider asks for half a second or more."""
MODERATED = ("Request Moderated", "Content Moderated")


def draw(peer: Peer, order: Order) -> News:
    task = yield from waiting(ask(peer, "POST", f"v1/{order.offer.model}", _body(order)))
    if not isinstance(task, dict) or "polling_url" not in task:
        raise InputError(f"{peer.title} gave no address to ask for the picture: check {peer.address}")
    while True:
        yield from waiting(rest(peer, POLL))
        state = as_object((yield from waiting(ask(peer, "GET", str(task["polling_url"]))))) or {}
        status = state.get("status")
        if status == "Ready":
            break
        if status in MODERATED:
            raise refusal(peer, reason_in(state.get("details")) or str(status))
        if status not in ("Pending", "Queued", "Processing"):
            why = clean(peer, reason_in(state.get("details")) or status)
            raise InputError(f"{peer.title} drew nothing ({why}): try again")
    result = as_object(state.get("result")) or {}
    cost = next((one["cost"] for one in (state, task) if isinstance(one.get("cost"), int | float)), None)
    data = yield from waiting(fetch(peer, str(result.get("sample", ""))))
    told = str(result.get("prompt") or "")
    yield Drawn(data, None if cost is None else cost / 100, "" if told == order.prompt else told)


def _body(order: Order) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": order.prompt, "output_format": "png"}
    pictures = [base64.b64encode(data).decode() for data in order.references]
    if order.offer.name == "bfl:flux-3-image":
        del body["output_format"]
        body["aspect_ratio"], body["resolution"] = order.offer.shape_of(order.size)
        return {**body, **({"images": pictures} if pictures else {}), **order.offer.send}
    if order.offer.shapes:
        body["aspect_ratio"] = order.offer.shape_of(order.size)[0]
    else:
        body["width"], body["height"] = order.size
    for number, picture in enumerate(pictures, 1):
        body["input_image" if number == 1 else f"input_image_{number}"] = picture
    if order.has("seed"):
        body["seed"] = order.seed % 2**32
    if order.has("upsample"):
        body["prompt_upsampling"] = order.upsample
    for name in ("steps", "guidance"):
        if (value := getattr(order, name)) is not None:
            body[name] = value
    return {**body, **order.offer.send}


PROVIDER = Provider(
    title="Black Forest Labs",
    address="https://api.bfl.ai",
    key_variable="BFL_API_KEY",
    address_variable="BFL_BASE_URL",
    authorise=lambda key: {"x-key": key},
    moderated=lambda body: (as_object(body) or {}).get("status") in MODERATED,
    draw=draw,
)
