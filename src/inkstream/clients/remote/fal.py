"""fal: a queue with a place in it, then the result at an address of its own.

Facts: the fal_client package 1.0.3; fal.ai/docs/errors; fal.ai/models/fal-ai/z-image/turbo.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from inkstream.clients.remote.contract import Drawn, News, Order, Provider, Waiting, waiting
from inkstream.engine.wire import Peer, ask, clean, fetch, reason_in, refusal, rest
from inkstream.types import InputError, as_list, as_object

POLL = 0.5
MODERATED = "content_policy_violation"


def draw(peer: Peer, order: Order) -> News:
    place = as_object((yield from waiting(ask(peer, "POST", order.offer.model, _body(order))))) or {}
    if "status_url" not in place or "response_url" not in place:
        raise InputError(f"{peer.title} gave no place in its queue: check {peer.address}")
    ended = False
    try:
        while True:
            yield from waiting(rest(peer, POLL))
            state = as_object((yield from waiting(ask(peer, "GET", str(place["status_url"]))))) or {}
            if state.get("status") == "IN_QUEUE":
                ahead = state.get("queue_position")
                yield Waiting(f"waiting for {peer.title}", ahead if isinstance(ahead, int) else None)
            elif state.get("status") != "IN_PROGRESS":
                break
        ended = True
    finally:
        if not ended and "cancel_url" in place:  # whoever reads has stopped
            with suppress(InputError):
                for _ in ask(peer, "PUT", str(place["cancel_url"])):
                    break
    if state.get("error"):
        raise InputError(f"{peer.title} drew nothing ({clean(peer, reason_in(state))}): try again")
    answer = as_object((yield from waiting(ask(peer, "GET", str(place["response_url"]))))) or {}
    pictures = as_list(answer.get("images"))
    if not pictures:
        raise InputError(f"{peer.title} answered without a picture: try again")
    if True in as_list(answer.get("has_nsfw_concepts")):
        raise refusal(peer, "the picture was hidden by the safety checker")
    told = str(answer.get("prompt") or "")
    data = yield from waiting(fetch(peer, str((as_object(pictures[0]) or {}).get("url", ""))))
    yield Drawn(data, None, "" if told == order.prompt else told)


def _body(order: Order) -> dict[str, Any]:
    width, height = order.size
    body: dict[str, Any] = {
        "prompt": order.prompt,
        "image_size": {"width": width, "height": height},
        "num_images": 1,
        "output_format": "png",
    }
    if order.has("seed"):
        body["seed"] = order.seed % 2**32
    if order.has("upsample"):
        body["enable_prompt_expansion"] = order.upsample
    if order.steps is not None:
        body["num_inference_steps"] = order.steps
    if order.guidance is not None:
        body["guidance_scale"] = order.guidance
    return {**body, **order.offer.send}


def moderated(body: Any) -> bool:
    """Whether an error says that the content is refused."""
    found = as_list((as_object(body) or {}).get("detail")) or as_list(body)
    return any((as_object(one) or {}).get("type") == MODERATED for one in found)


PROVIDER = Provider(
    title="fal",
    address="https://queue.fal.run",
    key_variable="FAL_KEY",
    address_variable="FAL_BASE_URL",
    authorise=lambda key: {"Authorization": f"Key {key}"},
    moderated=moderated,
    draw=draw,
)
