"""ComfyUI's prompt API for its standard graph. Any other node is refused by its name."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Collection
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple, get_args

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Response, WebSocket, WebSocketDisconnect
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from starlette.datastructures import UploadFile

from inkstream.engine.files.loras import lora_folder, names_in
from inkstream.engine.pictures.foreign.comfyui import read_comfyui
from inkstream.families.names import named
from inkstream.serve import schema
from inkstream.serve.api.gallery import file_answer, find_picture, send
from inkstream.serve.api.loras import find_use
from inkstream.serve.api.openai import BINARY, keep
from inkstream.serve.api.service import Parts, Service, Who
from inkstream.serve.errors import Refused, answers, explain_invalid
from inkstream.serve.keys import Caller
from inkstream.serve.queue.feed import Happening
from inkstream.serve.queue.inputs import PREFIX
from inkstream.serve.queue.jobs import PING
from inkstream.serve.queue.store import Job
from inkstream.types import Request, ScheduleName, SolverName

router = APIRouter(prefix="/comfyui", tags=["comfyui"])

Graph = dict[str, dict[str, Any]]
"""id -> {"class_type": str, "inputs": {name: a value, or [id of another node, number of its output]}}"""


class Kind(NamedTuple):
    """A class of nodes: its inputs with their types, and the types of its outputs."""

    inputs: dict[str, str]
    outputs: tuple[str, ...] = ()


EMPTY = Kind({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",))
NODES = {
    "CheckpointLoaderSimple": Kind({"ckpt_name": "MODELS"}, ("MODEL", "CLIP", "VAE")),
    "CLIPTextEncode": Kind({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "LoraLoader": Kind(
        {"model": "MODEL", "clip": "CLIP", "lora_name": "LORAS", "strength_model": "FLOAT", "strength_clip": "FLOAT"},
        ("MODEL", "CLIP"),
    ),
    "LoraLoaderModelOnly": Kind({"model": "MODEL", "lora_name": "LORAS", "strength_model": "FLOAT"}, ("MODEL",)),
    "ConditioningZeroOut": Kind({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "EmptyLatentImage": EMPTY,
    "EmptySD3LatentImage": EMPTY,
    "LoadImage": Kind({"image": "UPLOADS"}, ("IMAGE", "MASK")),
    "VAEEncode": Kind({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "KSampler": Kind(
        {"model": "MODEL", "seed": "INT", "steps": "INT", "cfg": "FLOAT", "sampler_name": "SOLVERS",
         "scheduler": "SCHEDULES", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT",
         "denoise": "FLOAT"},
        ("LATENT",),
    ),
    "VAEDecode": Kind({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": Kind({"images": "IMAGE", "filename_prefix": "STRING"}),
    "PreviewImage": Kind({"images": "IMAGE"}),
}  # fmt: skip
"""The nodes of the standard graph, the nodes that load LoRAs, and those to start from a picture."""
SAVES = {"SaveImage": "output", "PreviewImage": "temp"}
"""Class of an output node -> ComfyUI's type of its files."""
LINKED = frozenset(type for kind in NODES.values() for type in kind.outputs)
"""Types whose inputs are links to other nodes. Inputs of all other types are values."""
NUMBERS = {"INT": int, "FLOAT": float}
IN_GRAPH = {"guidance": "cfg", "count": "batch_size", "strength": "denoise"}
"""Field of a Request -> name of the input in the graph, for error messages."""
FROM_READING = {"solver": "sampler_name", "schedule": "scheduler"}
"""Name of an input in `read_comfyui` -> its name in the graph."""
Id = Annotated[str, Field(pattern=r"^[\w.:-]{1,64}$")]
"""Id of a node or a client."""


class Node(BaseModel):
    """One node of a graph. Other fields, such as its title, are ignored."""

    class_type: str = Field(max_length=200)
    inputs: dict[str, JsonValue]


class Prompt(BaseModel):
    """A graph to draw."""

    model_config = ConfigDict(extra="forbid")

    prompt: dict[Id, Node] = Field(min_length=1, max_length=200)
    client_id: Id | None = Field(None, description="The client at /comfyui/ws that gets its messages.")
    extra_data: dict[str, JsonValue] | None = Field(None, description="No effect.")


class Accepted(BaseModel):
    """An accepted graph."""

    prompt_id: str
    number: int = Field(description="Number of jobs of the same key that start earlier.")
    node_errors: dict[str, JsonValue] = {}


class Uploaded(BaseModel):
    """An uploaded picture for LoadImage."""

    name: str
    subfolder: str = ""
    type: Literal["input"] = "input"


class Origin(NamedTuple):
    """The client and the nodes that a job came from. The job's note stores them."""

    client: str  # "-" if the client gave no id
    sampler: str  # id of the KSampler in the graph
    saves: dict[str, str]  # id of an output node -> type of its files

    def note(self) -> str:
        return " ".join(["comfyui", self.client, self.sampler, *(f"{kind}:{id}" for id, kind in self.saves.items())])


def origin_of(job: Job) -> Origin | None:
    """The Origin in a job's note; None for a job of another API."""
    name, *words = job.note.split(" ")
    if name != "comfyui" or len(words) < 3:
        return None
    saves = {id: kind for kind, _, id in (word.partition(":") for word in words[2:])}
    return Origin(words[0], words[1], saves)


# Routes -------------------------------------------------------------------------------------------------------------


@router.post("/prompt", responses=answers(400, 404, 409, 429, 503))
async def draw_prompt(parts: Parts, who: Who, body: Prompt) -> Accepted:
    """Accept a graph. It is drawn even if the client leaves."""
    graph = {id: node.model_dump() for id, node in body.prompt.items()}
    known = await to_thread.run_sync(names_in, lora_folder(parts.settings.machine))
    request, origin = read_graph(graph, body.client_id or "-", list(parts.models), known)
    try:
        request = await parts.take_pictures(who, request)
        job = parts.jobs.submit(who, request, note=origin.note())
    except Refused as refusal:
        raise _renamed(refusal) from None
    return Accepted(prompt_id=job.id, number=parts.jobs.tell(job).position or 0)


@router.get("/history/{id}", responses=answers(400))
async def get_history(
    parts: Parts, who: Who, id: Annotated[str, Path(max_length=64, description="The prompt's id.")]
) -> dict[str, JsonValue]:
    """The outputs of a prompt that has ended. Empty if it has not ended or does not exist."""
    job = parts.store.job(id, who.scope)
    origin = None if job is None else origin_of(job)
    if job is None or origin is None or job.state not in schema.ENDED:
        return {}
    told = parts.jobs.tell(job)
    ended = told.state == "succeeded"
    status = {"status_str": "success" if ended else "error", "completed": ended, "messages": messages(told, origin)}
    return {id: {"outputs": outputs(told, origin), "status": status}}


FILE = file_answer("image/png")


@router.get("/view", responses=FILE | answers(400, 404), response_class=Response)
async def view(
    parts: Parts,
    who: Who,
    filename: Annotated[str, Query(max_length=200)],
    subfolder: Annotated[str, Query(max_length=200)] = "",
    type: Literal["output", "temp"] = "output",
) -> Any:
    """A picture of a prompt."""
    picture = find_picture(parts, who, filename.removesuffix(".png"))
    return send(parts.store.pictures / picture.file, picture.type, picture.sha256, None)


UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": BINARY}, "required": ["image"]},
            }
        },
    }
}


@router.post("/api/upload/image", responses=answers(400, 429, 503), openapi_extra=UPLOAD)
async def upload_image(parts: Parts, who: Who, http: HTTPRequest) -> Uploaded:
    """Store a picture for LoadImage. The same bytes get the same name."""
    async with http.form(max_files=1, max_fields=10) as form:
        file = form.get("image")
        if not isinstance(file, UploadFile):
            raise Refused(400, "image is missing: send the picture as a file in a form", param="image")
        return Uploaded(name=(await keep(parts, who, file, "image")).removeprefix(PREFIX))


@router.get("/object_info", responses=answers())
async def list_nodes(parts: Parts, who: Who) -> dict[str, JsonValue]:
    """The supported nodes with the values of their inputs."""
    choices = await find_choices(parts)
    return {name: describe(name, choices) for name in NODES}


@router.get("/object_info/{name}", responses=answers(400))
async def get_node(
    parts: Parts, who: Who, name: Annotated[str, Path(max_length=200, description="A class of nodes.")]
) -> dict[str, JsonValue]:
    """One class of nodes; empty if it is not supported."""
    return {name: describe(name, await find_choices(parts))} if name in NODES else {}


async def find_choices(parts: Service) -> dict[str, list[str]]:
    """Type of an input -> its values, for the types with a fixed list of them."""
    loras = await to_thread.run_sync(names_in, lora_folder(parts.settings.machine))
    return {
        "MODELS": list(parts.models),
        "LORAS": [f"{name}.safetensors" for name in loras],
        "SOLVERS": list(get_args(SolverName)),
        "SCHEDULES": list(get_args(ScheduleName)),
        "UPLOADS": [],
    }


@router.websocket("/ws")
async def follow(socket: WebSocket, clientId: str = "") -> None:
    """ComfyUI's messages about the prompts of one client."""
    parts: Service = socket.app.state.service
    who: Caller = socket.scope["caller"]
    client = clientId or secrets.token_hex(16)
    with parts.jobs.feed.listen(key=who.scope) as listener:
        await socket.accept()
        remaining = sum(who.scope in (None, job.key) for job in parts.store.active())
        queue = {"exec_info": {"queue_remaining": remaining}}
        await socket.send_json({"type": "status", "data": {"status": queue, "sid": client}})

        async def send_messages() -> None:
            began: set[str] = set()
            async for happening in listener.all(PING):
                if not parts.keys.holds(who):
                    return
                job = parts.store.job(happening.job) if happening.job else None
                origin = None if job is None else origin_of(job)
                if origin is None or origin.client != client:
                    continue
                for name, data in messages_for(happening, origin, first=happening.job not in began):
                    await socket.send_json({"type": name, "data": data | {"prompt_id": happening.job}})
                if happening.name != "queued":
                    began.add(happening.job)

        sending = asyncio.create_task(send_messages())
        leaving = asyncio.create_task(_wait_for_disconnect(socket))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(WebSocketDisconnect):
                    sending.result()
                    await socket.close(1001)  # the server stops, the key was removed, or the client reads too slowly
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)


async def _wait_for_disconnect(socket: WebSocket) -> None:
    """Return when the client has disconnected. Messages from it are ignored."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


# Reading graphs -----------------------------------------------------------------------------------------------------


def read_graph(graph: Graph, client: str, models: list[str], loras: Collection[str]) -> tuple[Request, Origin]:
    """The Request for the pictures that a graph saves, and its Origin.

    models: names of the offered models. loras: names in the server's folder of LoRAs. Raises Refused, with the node's
    id, if the graph is not the standard one.
    """
    saves = {id: SAVES[node["class_type"]] for id, node in graph.items() if node["class_type"] in SAVES}
    if not saves:
        raise Refused(400, "the graph saves no picture: end it with SaveImage", param="prompt")
    nodes = check_nodes(graph, list(saves))
    samplers = [id for id, node in nodes.items() if node["class_type"] == "KSampler"]
    if len(samplers) != 1:
        raise Refused(400, f"the graph has {len(samplers)} KSampler nodes: send exactly one", param="prompt")
    inputs = nodes[samplers[0]]["inputs"]
    if not 0 <= inputs["denoise"] <= 1:
        raise _refused(samplers[0], f"denoise {inputs['denoise']:g} is out of range: give 0 to 1")
    if inputs["latent_image"][0] == samplers[0]:
        raise _refused(samplers[0], "latent_image comes from the same node: link an EmptyLatentImage")
    for id in saves:
        _expect(nodes, id, "images", "VAEDecode")
    for id, node in nodes.items():
        if node["class_type"] == "VAEDecode":
            _expect(nodes, id, "samples", "KSampler")
        elif node["class_type"] == "VAEEncode":
            _expect(nodes, id, "pixels", "LoadImage")
        elif node["class_type"] == "LoraLoader":
            _check_strengths(id, node["inputs"])
        elif node["class_type"] == "ConditioningZeroOut" and inputs["cfg"] != 1:
            raise _refused(id, "ConditioningZeroOut needs cfg 1: link an empty CLIPTextEncode instead, or give cfg 1")
    reading = read_comfyui(nodes)
    assert reading is not None  # the graph has a sampler
    model = _model(nodes, reading.fields.get("model"), models)
    reading.settle(named(model))
    fields = {name: value for name, value in reading.fields.items() if value is not None} | {"model": model}
    ignored = {name: value for name, value in reading.ignored.items() if name != "model"}
    fields["count"] = ignored.pop("batch_size", 1)
    if "loras" in ignored:
        fields["loras"] = [str(find_use(tag, loras)) for tag in ignored.pop("loras")]
    if "image" in ignored:
        fields["image"] = PREFIX + str(ignored.pop("image"))
    for name, value in ignored.items():
        name = FROM_READING.get(name, name)
        raise _refused(samplers[0], f"{name} {str(value)[:100]} is not supported: see /comfyui/object_info")
    try:
        return Request.model_validate(fields), Origin(client, samplers[0], saves)
    except ValidationError as error:
        raise _renamed(explain_invalid(error)) from None


def _renamed(refusal: Refused) -> Refused:
    """The refusal with the field's name in the graph."""
    name = refusal.param or ""
    refusal.message = refusal.message.replace(name, IN_GRAPH.get(name, name), 1)
    refusal.param = "prompt"
    return refusal


def _model(nodes: Graph, known: str | None, models: list[str]) -> str:
    """The offered model that the graph loads. known: the known model that a file of that name contains, if any."""
    names = {node["inputs"]["ckpt_name"] for node in nodes.values() if "ckpt_name" in node["inputs"]}
    named = " and ".join(sorted(names))[:200]
    if len(names) > 1:
        raise Refused(400, f"the graph loads {named}: load one model", param="prompt")
    for name in (named, known):
        if name in models:
            return name
    message = f"ckpt_name {named} is not offered: take {', '.join(models)}"
    raise Refused(404, message, param="prompt", code="model_not_found")


def check_nodes(graph: Graph, saves: list[str]) -> Graph:
    """The nodes that the saved pictures depend on, with numbers converted. Raises Refused if a node is not valid.

    saves: ids of the output nodes.
    """
    found: Graph = {}
    pending = list(saves)
    while pending:
        id = pending.pop()
        if id in found:
            continue
        given, inputs = graph[id]["inputs"], {}
        for name, type in _kind(graph, id).inputs.items():
            if name not in given:
                raise _refused(id, f"{name} is missing: give it, see /comfyui/object_info")
            inputs[name] = _check_input(graph, id, name, type, given[name])
            if isinstance(inputs[name], list):
                pending.append(inputs[name][0])
        found[id] = {"class_type": graph[id]["class_type"], "inputs": inputs}
    return found


def _kind(graph: Graph, id: str) -> Kind:
    name = graph[id]["class_type"]
    if name not in NODES:
        raise _refused(id, f"{name} is not supported: take {', '.join(NODES)}")
    return NODES[name]


def _check_input(graph: Graph, id: str, name: str, type: str, value: Any) -> Any:
    """An input's value, or its link as [id, output number]. Raises Refused if it does not have the input's type."""
    if type in LINKED:
        source, number = value if isinstance(value, list) and len(value) == 2 else ("", 0)
        if str(source) not in graph:
            raise _refused(id, f"{name} is not a link to a node of the graph: give [id, output number]")
        gives = dict(enumerate(_kind(graph, str(source)).outputs))
        if not isinstance(number, int) or gives.get(number) != type:
            raise _refused(id, f"output {str(number)[:100]} of node {source} is not a {type}: link one to {name}")
        return [str(source), number]
    if isinstance(value, list | dict):
        raise _refused(id, f"{name} is a list or an object: give the value itself")
    if type not in NUMBERS:
        text = "" if value is None else str(value)
        if not text and type in ("SOLVERS", "SCHEDULES"):
            raise _refused(id, f"{name} is empty: see /comfyui/object_info")
        return text
    try:
        number = NUMBERS[type](value)
    except (TypeError, ValueError, OverflowError):
        raise _refused(id, f"{name} {str(value)[:100]} is not a number: give a number") from None
    if not math.isfinite(number) or (isinstance(value, float) and number != value):
        raise _refused(id, f"{name} {value} is not valid: give a {'whole' if type == 'INT' else 'finite'} number")
    return number


def _check_strengths(id: str, inputs: dict[str, Any]) -> None:
    """A LoRA changes no text encoder here. Programs that do not know this send one of three strengths for it."""
    model, clip = inputs["strength_model"], inputs["strength_clip"]
    if clip not in (model, 0, 1):
        raise _refused(id, f"strength_clip {clip:g} is not supported, text encoders stay as they are: give {model:g}")


def _expect(nodes: Graph, id: str, name: str, kind: str) -> None:
    source = nodes[id]["inputs"][name][0]
    if nodes[source]["class_type"] != kind:
        raise _refused(id, f"{name} comes from {nodes[source]['class_type']}: link it to {kind}")


def _refused(id: str, message: str) -> Refused:
    return Refused(400, f"node {id}: {message}", param="prompt")


# Answers ------------------------------------------------------------------------------------------------------------


def messages_for(happening: Happening, origin: Origin, first: bool) -> list[tuple[str, dict[str, Any]]]:
    """An event of a job as ComfyUI's messages: (type, data). first: it is the job's first event after `queued`."""
    if happening.name in ("queued", "ping", "picture"):
        return []
    told: list[tuple[str, dict[str, Any]]] = []
    if first:
        told += [("execution_start", {}), ("executing", {"node": origin.sampler})]
    if happening.name == "step":
        data = happening.data
        told.append(("progress", {"node": origin.sampler, "value": data["step"], "max": data["steps"]}))
    if happening.name in schema.ENDED:
        job = schema.Job.model_validate(happening.data)
        told += [("executed", {"node": id, "output": output}) for id, output in outputs(job, origin).items()]
        told += [(name, data) for name, data in messages(job, origin)]
        told.append(("executing", {"node": None}))
    return told


def messages(job: schema.Job, origin: Origin) -> list[Any]:
    """The end of a job as ComfyUI's messages: [type, data]."""
    if job.state == "succeeded":
        return [["execution_success", {"prompt_id": job.id}]]
    place = {"prompt_id": job.id, "node_id": origin.sampler, "node_type": "KSampler", "executed": []}
    if job.error is None:
        return [["execution_interrupted", place]]
    error = {"exception_message": job.error.message, "exception_type": job.error.type, "traceback": []}
    return [["execution_error", place | error]]


def outputs(job: schema.Job, origin: Origin) -> dict[str, Any]:
    """Id of an output node -> its pictures. Empty unless the job has succeeded."""
    if job.state != "succeeded":
        return {}
    names = [f"{picture.id}.png" for picture in job.pictures]
    return {
        id: {"images": [{"filename": name, "subfolder": "", "type": kind} for name in names]}
        for id, kind in origin.saves.items()
    }


def describe(name: str, choices: dict[str, list[str]]) -> dict[str, Any]:
    """A class of nodes in the form of ComfyUI's object_info. choices: type of an input -> its values."""
    kind = NODES[name]
    return {
        "input": {"required": {input: [choices.get(type, type)] for input, type in kind.inputs.items()}},
        "input_order": {"required": list(kind.inputs)},
        "output": list(kind.outputs),
        "output_is_list": [False] * len(kind.outputs),
        "output_name": list(kind.outputs),
        "name": name,
        "display_name": name,
        "description": "",
        "category": "inkstream",
        "output_node": name in SAVES,
    }
