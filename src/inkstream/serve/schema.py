"""Types of the native API. They validate request bodies and define the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inkstream.serve.errors import Error
from inkstream.types import Lora as LoraText
from inkstream.types import Request

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
"""Two numbers. It is not a tuple because few tools can read the JSON schema of a tuple."""
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")


class Axis(BaseModel):
    """One axis of a grid: a field of the request, and its value in each row or column."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    field: str = Field(max_length=40, description="A field of the request.")
    values: list[Any] = Field(min_length=1, max_length=64, description="Its value in each column or row.")


class Grid(BaseModel):
    """A job with one picture for each pair of values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    x: Axis
    y: Axis | None = None


class JobBody(Request, frozen=True):
    """A request, and options for the queue. Pictures are data URLs or `upload:ID`."""

    priority: int = Field(0, ge=-10, le=10, description="Jobs with a higher priority are drawn earlier.")
    note: str = Field("", max_length=1000, description="Stored with the job. It has no effect on the picture.")
    grid: Grid | None = Field(None, description="Draw one picture for each pair of values.")


class PromptBody(BaseModel):
    """A prompt, and the fields that decide how a model writes it out. Defaults are those of a request."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("pocket", max_length=200, description="One of /v1/models. The default is the first of them.")
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = Field(None, ge=0, lt=2**63, description="Another seed can give other words. The default is 0.")
    upsample: bool | None = Field(None, description="As in a request: null is the model's default.")
    loras: tuple[LoraText, ...] = Field(
        (), max_length=16, description="As in a request: their words stay in the prompt."
    )


class PromptTold(BaseModel):
    """The prompt that a model would read."""

    told: str = Field(description="The prompt as the model's grammar writes it out, or unchanged without a grammar.")
    notes: list[str] = Field(description="One line for each part that the grammar did not understand.")


class JobPatch(BaseModel):
    """A new place in the queue for a waiting job."""

    model_config = ConfigDict(extra="forbid")

    priority: int | None = Field(None, ge=-10, le=10, description="Jobs with a higher priority are drawn earlier.")
    before: str | None = Field(
        None, max_length=64, description="Id of the job that comes next after this one; null moves it to the end."
    )


class QueuePatch(BaseModel):
    """Whether the server starts waiting jobs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    paused: bool


class PicturePatch(BaseModel):
    """Changes to a picture. For one week, `deleted: false` restores a deleted picture."""

    model_config = ConfigDict(extra="forbid", strict=True)

    favourite: bool | None = None
    deleted: bool | None = None


class Progress(BaseModel):
    """Progress of a running job."""

    picture: int = Field(description="Index of the picture that is being drawn, from 0.")
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
    seconds: float = Field(description="Drawing time.")
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
    request: dict[str, Any] = Field(description="The complete request that draws only this picture.")
    url: str
    thumbnail: str


class Job(BaseModel):
    """A job: a request with its state and its pictures."""

    id: str
    state: State
    created: float = Field(description="Unix seconds.")
    started: float | None
    ended: float | None
    priority: int
    note: str
    key: str = Field(description="Name of the key that sent it; empty on a server without keys.")
    position: int | None = Field(description="Number of jobs of the same key that start earlier; null unless queued.")
    eta: float | None = Field(description="Estimated seconds until it ends; null if ended or unknown.")
    progress: Progress | None
    request: dict[str, Any] = Field(description="The request as sent, with its seed.")
    grid: Grid | None
    pictures: list[Picture]
    error: Error | None
    remarks: list[str] = Field(description="Fields of the request that have no effect or a poor one.")


class Jobs(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[Job]
    next: str | None = Field(description="Value of `before` for the next page; null on the last page.")


class Queue(BaseModel):
    """Running jobs, and waiting jobs in their order."""

    paused: bool
    running: list[Job]
    queued: list[Job]
    eta: float | None = Field(description="Estimated seconds until all listed jobs have ended; null if unknown.")


class Pictures(BaseModel):
    """A page of pictures, newest first."""

    pictures: list[Picture]
    next: str | None = Field(description="Value of `before` for the next page; null on the last page.")
    total: int = Field(description="Number of matching pictures on all pages.")


class Upload(BaseModel):
    """An uploaded picture. A request refers to it as `upload:ID`."""

    id: str
    width: int
    height: int
    type: str


class Recalled(BaseModel):
    """The request found in a picture's metadata."""

    request: dict[str, Any]
    tool: str = Field(description="The program that wrote the metadata.")
    remarks: list[str] = Field(description="Parts of the metadata that are not in the request.")


class Details(BaseModel):
    """Our additions to an entry of OpenAI's list of models."""

    title: str
    licence: str
    commercial: bool
    abilities: list[str]
    size: Pair
    multiple: int
    defaults: dict[str, Any]
    loaded: bool
    ready: bool = Field(description="False until the engine has read the model's description.")


class Model(BaseModel):
    """An offered model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    inkstream: Details


class Models(BaseModel):
    """OpenAI's list of models, with our details in each."""

    object: Literal["list"] = "list"
    data: list[Model]


class Lora(BaseModel):
    """A LoRA file, or a relative, in the server's folder."""

    name: str = Field(description="The name for requests.")
    title: str
    trigger_words: list[str] = Field(description="Words of a prompt that call what the file was trained on.")
    base: str = Field(description="The base model that the file names; empty if it names none.")
    family: str = Field(description="Family of the known models with its sizes; empty if none or several have them.")
    fits: dict[str, bool] = Field(
        description="Offered model -> whether it has the file's sizes. Models of which this is unknown are left out."
    )
    ranks: list[int]
    bytes: int
    strength: float | None = Field(description="The preferred strength, if a file of A1111 beside it names one.")
    hint: str = Field(description="The file's own text about its use.")
    preview: str | None = Field(description="Path of a small picture.")
    error: str | None = Field(description="Why the file cannot be used.")


class Loras(BaseModel):
    """All LoRA files of the server, by name."""

    data: list[Lora]


class ControlNet(BaseModel):
    """A control net's file in the server's folder."""

    name: str = Field(description="The name for requests.")
    family: str = Field(description="Family of the models that it guides; empty if it is no known control net.")
    fits: dict[str, bool] = Field(
        description="Offered model -> whether the net guides it. Models of which this is unknown are left out."
    )
    modes: list[str] = Field(description="Kinds of control pictures, of which such a net is told one; else empty.")
    bytes: int
    error: str | None = Field(description="Why the file cannot be used.")


class ControlNets(BaseModel):
    """All control nets of the server, by name."""

    data: list[ControlNet]


class Upscaler(BaseModel):
    """An upscaling model's file in the server's folder."""

    name: str = Field(description="The name for requests.")
    bytes: int


class Upscalers(BaseModel):
    """All upscaling models of the server, by name."""

    data: list[Upscaler]


class MapSetting(BaseModel):
    """A number that a map takes."""

    name: str
    help: str
    default: float
    minimum: float
    maximum: float


class Map(BaseModel):
    """A kind of map of a picture."""

    name: str
    help: str
    reads: Literal["picture", "depth", "keypoints"] = Field(
        description="What it is drawn from: any picture, a depth map, or keypoints as OpenPose writes them."
    )
    settings: list[MapSetting]
    missing: str | None = Field(description="What the server lacks for it, and how to install that.")


class Maps(BaseModel):
    """All kinds of maps."""

    data: list[Map]


class MapBody(BaseModel):
    """What to draw a map of."""

    model_config = ConfigDict(extra="forbid")

    map: str = Field(max_length=40, description="One of /v1/maps, or another program's name for it.")
    picture: str | None = Field(None, description="A data URL or `upload:ID`.")
    keypoints: dict[str, Any] | None = Field(None, description="For a pose, instead of a picture: OpenPose's JSON.")
    width: int | None = Field(None, ge=16, le=8192, description="With height. The default is the picture's size.")
    height: int | None = Field(None, ge=16, le=8192)
    settings: dict[str, float] = Field({}, max_length=16)


class Field_(BaseModel):
    """One field of a model's form."""

    model_config = ConfigDict(title="Field")

    name: str
    title: str
    help: str
    type: Literal[
        "text", "integer", "number", "boolean", "choice", "picture", "pictures", "loras", "control_nets", "regions"
    ]
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
    """The fields of a model's form."""

    model: str
    fields: list[Field_]


class AdvisedPlace(BaseModel):
    """Where the advised model runs."""

    card: str
    precision: str
    placement: str
    peak: int = Field(description="Bytes of the card's memory.")
    seconds: float = Field(description="For one picture.")
    measured: str = Field(description="Who measured the time; empty: it is an estimate.")


class AdvisedCost(BaseModel):
    """What one way to draw costs, in dollars."""

    way: str
    month: float
    each: float = Field(description="For one picture.")
    arithmetic: list[str] = Field(description="How it is computed, line by line.")


class BreakEven(BaseModel):
    """From how many pictures a month on the first way of a pair is the cheaper one."""

    pair: str
    pictures: float | None = Field(description="null: never.")


class Advice(BaseModel):
    """The advised model, where it runs, and the costs of each way."""

    model: str
    licence: str
    commercial: bool = Field(description="Whether the licence allows commercial use.")
    why: str
    left_out: list[str] = Field(description="Models that were not taken, and why.")
    place: AdvisedPlace | None
    costs: list[AdvisedCost]
    best: str | None = Field(description="The cheapest way.")
    break_evens: list[BreakEven]
    notes: list[str]
    sources: list[str] = Field(description="Where each figure is from, and its date.")


class VerifyBody(BaseModel):
    """What a picture must show. Without both, its own prompt says it."""

    model_config = ConfigDict(extra="forbid")

    texts: list[Annotated[str, Field(max_length=1000)]] = Field([], max_length=16)
    colours: list[Annotated[str, Field(max_length=20)]] = Field([], max_length=16, description="Hex codes.")


class Check(BaseModel):
    """One thing that was checked."""

    line: str
    right: bool


class Verified(BaseModel):
    """What was found in a picture."""

    passed: bool
    empty: bool = Field(description="Whether nothing was asked for.")
    checks: list[Check]
    notes: list[str]
    sharpness: float = Field(description="Variance of the Laplacian of the brightness.")
    dark: float = Field(description="Share of black pixels.")
    bright: float = Field(description="Share of white pixels.")
    blank: bool = Field(description="Whether all pixels have one colour.")
    seams: list[str] = Field(description="Straight lines across the whole picture, such as x=512.")


class Bakeoff(BaseModel):
    """A bake-off that people can vote on."""

    name: str
    prompts: int
    models: int
    pictures: int
    votes: int
    voters: int
    vote: str = Field(description="Path of the voting page.")
    report: str | None = Field(description="Path of the report, if the key may read it.")


class Bakeoffs(BaseModel):
    """All bake-offs of the server."""

    data: list[Bakeoff]


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok", "starting"]
    version: str
    engine: Literal["ready", "starting", "stopped"]
    model: str | None = Field(description="The model in the engine's memory.")
    device: str | None
