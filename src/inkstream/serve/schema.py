"""What the native API says, as types: they check the bodies and are the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inkstream.serve.errors import Error
from inkstream.types import Request

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
"""Two numbers. Not a tuple: its schema in JSON is one that few tools read."""
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")


class Axis(BaseModel):
    """One side of a grid: a field of the request, and the value it takes in each row or column."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    field: str = Field(max_length=40, description="A field of the request.")
    values: list[Any] = Field(min_length=1, max_length=64, description="What it is in each column or row.")


class Grid(BaseModel):
    """One picture for every pair of values, as one job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    x: Axis
    y: Axis | None = None


class JobBody(Request, frozen=True):
    """A request, and how it is to be queued. Pictures are data URLs or `upload:ID`."""

    priority: int = Field(0, ge=-10, le=10, description="Higher is drawn earlier.")
    note: str = Field("", max_length=1000, description="Kept with the job, not drawn.")
    grid: Grid | None = Field(None, description="Draw one picture for each pair of values.")


class PromptBody(BaseModel):
    """A prompt, and what decides how a model writes it out. What is left out is as in a request."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("pocket", max_length=200, description="One of /v1/models; the first when left out.")
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = Field(None, ge=0, lt=2**63, description="Other seeds give other words; 0 when left out.")
    upsample: bool | None = Field(None, description="As in a request: null is the model's own habit.")


class PromptTold(BaseModel):
    """What a model would be told."""

    told: str = Field(description="The prompt as the model's grammar writes it out; as given where it has none.")
    notes: list[str] = Field(description="What the grammar did not understand, a line each.")


class JobPatch(BaseModel):
    """Where in the queue a waiting job stands."""

    model_config = ConfigDict(extra="forbid")

    priority: int | None = Field(None, ge=-10, le=10, description="Higher is drawn earlier.")
    before: str | None = Field(None, max_length=64, description="The job to be drawn before; null is the end.")


class QueuePatch(BaseModel):
    """Whether new jobs are begun."""

    model_config = ConfigDict(extra="forbid", strict=True)

    paused: bool


class PicturePatch(BaseModel):
    """What is changed of a picture. Deleting is undone by `deleted: false` for a week."""

    model_config = ConfigDict(extra="forbid", strict=True)

    favourite: bool | None = None
    deleted: bool | None = None


class Progress(BaseModel):
    """How far a running job is."""

    picture: int = Field(description="The picture being drawn, from 0.")
    of: int
    step: int
    steps: int


class Picture(BaseModel):
    """A finished picture."""

    id: str
    job: str
    index: int
    cell: Pair | None = Field(None, description="Column and row in a grid.")
    created: float = Field(description="Unix seconds.")
    seconds: float = Field(description="Drawing it took.")
    width: int
    height: int
    bytes: int
    type: str = Field(description="Media type of the file.")
    sha256: str
    seed: int
    model: str
    prompt: str
    favourite: bool
    deleted: bool
    request: dict[str, Any] = Field(description="The complete request that draws it alone.")
    url: str
    thumbnail: str


class Job(BaseModel):
    """A wish and what became of it."""

    id: str
    state: State
    created: float = Field(description="Unix seconds.")
    started: float | None
    ended: float | None
    priority: int
    note: str
    key: str = Field(description="Name of the key it was given with; empty without keys.")
    position: int | None = Field(description="Jobs of the same key that are begun before it; null unless queued.")
    eta: float | None = Field(description="Seconds until it ends, as far as that can be foreseen.")
    progress: Progress | None
    request: dict[str, Any] = Field(description="As it was given, with its seed.")
    grid: Grid | None
    pictures: list[Picture]
    error: Error | None
    remarks: list[str] = Field(description="What of the request has no effect, or not a good one.")


class Jobs(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[Job]
    next: str | None = Field(description="Give it as `before` for the next page; null at the end.")


class Queue(BaseModel):
    """What is drawn now and what will be, in order."""

    paused: bool
    running: list[Job]
    queued: list[Job]
    eta: float | None = Field(description="Seconds until all that is listed is drawn.")


class Pictures(BaseModel):
    """A page of pictures, newest first."""

    pictures: list[Picture]
    next: str | None = Field(description="Give it as `before` for the next page; null at the end.")
    total: int = Field(description="Pictures that match, on all pages.")


class Upload(BaseModel):
    """A picture that was sent; requests name it `upload:ID`."""

    id: str
    width: int
    height: int
    type: str


class Recalled(BaseModel):
    """The request found in a picture's metadata."""

    request: dict[str, Any]
    tool: str = Field(description="The program that wrote it.")
    remarks: list[str] = Field(description="What could not be taken over.")


class Details(BaseModel):
    """What is ours in an entry of the list of models."""

    title: str
    licence: str
    commercial: bool
    abilities: list[str]
    size: Pair
    multiple: int
    defaults: dict[str, Any]
    loaded: bool
    ready: bool = Field(description="False while the engine has not said yet what this model is.")


class Model(BaseModel):
    """A model that may be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    inkstream: Details


class Models(BaseModel):
    """OpenAI's list of models, with our details in each."""

    object: Literal["list"] = "list"
    data: list[Model]


class Field_(BaseModel):
    """One field of a model's form."""

    model_config = ConfigDict(title="Field")

    name: str
    title: str
    help: str
    type: Literal["text", "integer", "number", "boolean", "choice", "picture", "pictures"]
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: list[str] | None = None
    group: Literal["prompt", "size", "sampling", "guidance", "pictures", "more"]
    effect: Literal["honours", "ignores", "rejects"]
    needed: bool = False
    why: str = ""


class Form(BaseModel):
    """The fields that a model's form shows."""

    model: str
    fields: list[Field_]


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "starting"]
    version: str
    engine: Literal["ready", "starting", "stopped"]
    model: str | None = Field(description="The model in the engine's memory.")
    device: str | None
