"""Replicate: a prediction, which is polled. References are uploaded first.

Facts: the replicate package 1.0.7 (prediction.py, file.py, exceptions.py); replicate.com/docs (predictions/lifecycle);
the input schemas at replicate.com/prunaai/z-image-turbo and replicate.com/black-forest-labs/flux-2-pro.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from inkstream.clients.remote.contract import Drawn, News, Order, Provider, bearer, waiting
from inkstream.engine.wire import Peer, ask, clean, fetch, refusal, rest
from inkstream.types import InputError, as_list, as_object

POLL = 0.5
MODERATED = re.compile(r"nsfw|sensitive|moderat|E005", re.IGNORECASE)
"""What the error of a prediction says when its content is refused."""


def draw(peer: Peer, order: Order) -> News:
    uploaded: list[str] = []
    for data in order.references:
        file = as_object((yield from waiting(ask(peer, "POST", "v1/files", form=[("content", data)])))) or {}
        uploaded.append(str((as_object(file.get("urls")) or {}).get("get", "")))
    path = f"v1/models/{order.offer.model}/predictions"
    state = as_object((yield from waiting(ask(peer, "POST", path, {"input": _input(order, uploaded)})))) or {}
    urls = as_object(state.get("urls")) or {}
    ended = False
    try:
        while state.get("status") in ("starting", "processing"):
            yield from waiting(rest(peer, POLL))
            state = as_object((yield from waiting(ask(peer, "GET", str(urls.get("get", "")))))) or {}
        ended = True
    finally:
        if not ended and "cancel" in urls:  # whoever reads has stopped
            with suppress(InputError):
                for _ in ask(peer, "POST", str(urls["cancel"])):
                    break
    if state.get("status") != "succeeded":
        why = clean(peer, state.get("error") or state.get("status"))
        raise (
            refusal(peer, why) if MODERATED.search(why) else InputError(f"{peer.title} drew nothing ({why}): try again")
        )
    output = state.get("output")
    url = output if isinstance(output, str) else str((as_list(output) or [""])[0])
    yield Drawn((yield from waiting(fetch(peer, url))))


def _input(order: Order, references: list[str]) -> dict[str, Any]:
    width, height = order.size
    given: dict[str, Any] = {"prompt": order.prompt, "width": width, "height": height, "output_format": "png"}
    if order.has("reference"):
        given |= {"aspect_ratio": "custom", "input_images": references}
    if order.has("seed"):
        given["seed"] = order.seed % 2**31
    if order.steps is not None:
        given["num_inference_steps"] = order.steps
    if order.guidance is not None:
        given["guidance_scale"] = order.guidance
    return {**given, **order.offer.send}


PROVIDER = Provider(
    title="Replicate",
    address="https://api.replicate.com",
    key_variable="REPLICATE_API_TOKEN",
    address_variable="REPLICATE_BASE_URL",
    authorise=bearer,
    moderated=lambda body: bool(MODERATED.search(str((as_object(body) or {}).get("detail", "")))),
    draw=draw,
)
