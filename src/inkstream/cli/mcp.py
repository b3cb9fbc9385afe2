"""`inkstream mcp`: tools for agents, over the Model Context Protocol on stdin and stdout."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import ValidationError

from inkstream.cli.download import agree_to_download
from inkstream.cli.generate import check, find_place
from inkstream.cli.machine import ANYWHERE, Anywhere, make_drawer
from inkstream.cli.terminal import Terminal
from inkstream.clients.remote.catalogue import is_remote
from inkstream.types import REPAINTING, Done, Drawer, Event, Failed, InputError, Request, Step

if TYPE_CHECKING:
    from mcp.server import Server, ServerRequestContext
    from mcp.types import CallToolRequestParams, CallToolResult, ContentBlock


FROM_PICTURES = ("image", *REPAINTING, "strength", "reference")
"""Fields of a Request that only `edit` takes."""
OWN = "pocket"
"""The model that is always here."""
TOOLS = {
    "generate": "Draw pictures of a prompt. Returns each at reduced size, with its seed and the path of the full file.",
    "edit": "Draw from pictures: start from one (image), repaint a part of it (mask, mask_from), draw beyond its "
    "edges (extend), or use some as references (reference). Pictures are file paths, such as those that generate and "
    "edit return, or data URLs.",
    "list_models": "List the available models: what each takes, its default size and its licence.",
}
SHOWN = 1024
"""Longer side in pixels of the picture that an agent gets. The file has the full size."""
LISTED = ("name", "title", "licence", "commercial", "abilities", "size", "steps", "guidance")


def mcp(
    *,
    model: Annotated[str | None, Parameter(alias="-m", show_default=False)] = None,
    output: Annotated[Path | None, Parameter(alias="-o", show_default=False)] = None,
    machine: Anywhere = ANYWHERE,
    yes: Annotated[bool, Parameter(alias="-y", show_default=False)] = False,
) -> None:
    """Let agents draw: a server of the Model Context Protocol.

    Parameters
    ----------
    model
        Model for requests without one; default: Pocket, or the server's first model.
    output
        Output folder; default: inkstream in your pictures folder.
    yes
        Download models that the agent requests without asking.
    """
    try:
        import anyio
        from mcp.server.stdio import stdio_server
    except ImportError:
        raise InputError("the MCP SDK is not installed: pip install 'inkstream[mcp]'") from None
    from platformdirs import user_pictures_path

    server = build(machine, output or user_pictures_path() / "inkstream", model, yes)

    async def run() -> None:
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())

    anyio.run(run)


def build(machine: Anywhere, folder: Path, model: str | None = None, yes: bool = False) -> Server[Any]:
    """Return the MCP server. Pictures are written to a folder. Raises InputError if that is not possible."""
    import mcp.types as protocol
    from mcp.server import Server

    from inkstream import __version__

    drawer = make_drawer(machine, models=[model or OWN, OWN])
    place = find_place(f"{folder}/", 1)
    schemas = {"generate": _schema(FROM_PICTURES), "edit": _schema(()), "list_models": {"type": "object"}}
    tools = [protocol.Tool(name=name, description=text, input_schema=schemas[name]) for name, text in TOOLS.items()]

    async def list_tools(context: ServerRequestContext[Any], params: Any) -> protocol.ListToolsResult:
        return protocol.ListToolsResult(tools=tools)

    async def call_tool(context: ServerRequestContext[Any], params: CallToolRequestParams) -> CallToolResult:
        try:
            if params.name == "list_models":
                return protocol.CallToolResult(content=[_text(list_models(drawer))])
            if params.name not in TOOLS:
                raise InputError(f"there is no tool {params.name}: take {', '.join(TOOLS)}")
            request = understand(params.name, params.arguments or {}, model)
            if is_remote(request.model) and request.model != model:
                raise InputError(f"{request.model} would send the request away: only inkstream mcp -m allows that")
            if machine.server is None:
                check(request, machine)
            if machine.server is None and not is_remote(request.model):
                agree_to_download(request.model, yes, Terminal(quiet=True), machine.commercial_only)
            content: list[ContentBlock] = []
            with closing(drawer.submit(request)) as events:  # type: ignore[type-var]
                async for event in _each(events):
                    if isinstance(event, Failed):
                        raise InputError(event.error)
                    if isinstance(event, Step):
                        at = event.index * event.steps + event.step
                        await context.session.report_progress(at, event.count * event.steps)
                    elif isinstance(event, Done):
                        content += keep(drawer, event, place(event.request, event.index))
            return protocol.CallToolResult(content=content)
        except InputError as error:
            return protocol.CallToolResult(content=[_text(str(error))], is_error=True)

    return Server("inkstream", version=__version__, on_list_tools=list_tools, on_call_tool=call_tool)


def understand(tool: str, given: dict[str, Any], model: str | None) -> Request:
    """Return the request of a tool's arguments. Raises InputError for invalid ones."""
    if tool == "generate" and (pictures := sorted(given.keys() & set(FROM_PICTURES))):
        raise InputError(f"{pictures[0]} is not an argument of generate: call edit instead")
    if tool == "edit" and not (given.get("image") or given.get("reference")):
        raise InputError("there is no picture to edit: give image or reference")
    fields = given if model is None else {"model": model, **given}
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{name}: {problem['msg']}") from None


def list_models(drawer: Drawer) -> str:
    """Return the drawer's models as JSON."""
    models = [{name: getattr(spec, name) for name in LISTED} for spec in drawer.models()]
    return json.dumps([{**one, "abilities": sorted(one["abilities"])} for one in models], ensure_ascii=False)


def keep(drawer: Drawer, done: Done, path: Path) -> list[ContentBlock]:
    """Write a picture. Returns its path, its facts and a small copy."""
    from mcp.types import ImageContent

    from inkstream.engine.pictures.metadata import save_picture

    model = done.request.model
    save_picture(done.image, path, done.request, drawer.spec(model), extra=drawer.ran_on(model))
    small = done.image.copy()
    small.thumbnail((SHOWN, SHOWN))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=85)
    facts = {"path": str(path), "seed": done.request.seed, "width": done.image.width, "height": done.image.height}
    data = base64.b64encode(buffer.getvalue()).decode()
    return [_text(json.dumps(facts, ensure_ascii=False)), ImageContent(type="image", data=data, mime_type="image/jpeg")]


async def _each(events: Iterator[Event]) -> AsyncIterator[Event]:
    """Yield events, each computed in a thread. A cancelled task ends after the present step."""
    from anyio import to_thread

    while (event := await to_thread.run_sync(next, events, None)) is not None:
        yield event


def _schema(without: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON schema of a tool's arguments: the fields of a Request."""
    schema = Request.model_json_schema()
    fields = {name: field for name, field in schema["properties"].items() if name not in without}
    return {"type": "object", "properties": fields, "required": ["prompt"], "additionalProperties": False}


def _text(text: str) -> Any:
    from mcp.types import TextContent

    return TextContent(type="text", text=text)
