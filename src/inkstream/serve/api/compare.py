"""What helps to decide: advice on models and costs, the verification of a picture, bake-offs with reports and votes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path as FilePath
from typing import Annotated, Any

from anyio import run_process, to_thread
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse

from inkstream.serve import schema
from inkstream.serve.api.gallery import BODY, GONE, find_picture
from inkstream.serve.api.gallery import Name as PictureId
from inkstream.serve.api.service import Parts, Service, Who
from inkstream.serve.errors import Refused, answers
from inkstream.types import InputError

router = APIRouter(tags=["compare"])

Name = Annotated[str, Path(max_length=100, description="The bake-off's name.")]
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of a bake-off's pages. Each is one file, with its own script and style in it."""
HTML: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
PNG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
}
PLAIN = r"^[\x20-\x7e]*$"
"""ASCII texts, which a process takes as an argument."""
OPTION = re.compile(r"--(use|pictures|card|budget|language)\b")
"""An option of the command line in a message. Here it is a field."""
HEADERS = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"}


@router.get("/v1/advice", responses=answers(400))
async def get_advice(
    parts: Parts,
    who: Who,
    use: Annotated[
        str, Query(pattern=PLAIN, max_length=40, description="photos, posters, editing, drafts or variety.")
    ] = "photos",
    pictures: Annotated[int, Query(ge=1, le=10**9, description="Number of pictures a month.")] = 500,
    card: Annotated[
        str | None, Query(pattern=PLAIN, max_length=100, description="The card that is there, or its memory.")
    ] = None,
    budget: Annotated[float | None, Query(gt=0, le=10**9, description="Most dollars for a card to buy.")] = None,
    commercial: Annotated[bool, Query(description="Only models whose licence allows commercial use.")] = False,
    language: Annotated[
        list[Annotated[str, Query(pattern=PLAIN, max_length=10)]] | None,
        Query(max_length=8, description="Languages of texts in pictures."),
    ] = None,
) -> schema.Advice:
    """Which model, on what, and what a picture costs, with the arithmetic and the source of each figure."""
    asked = [f"--use={use}", f"--pictures={pictures}", *(f"--language={one}" for one in language or ("en",))]
    asked += [f"--card={card}"] if card else []
    asked += [f"--budget={budget:g}"] if budget else []
    asked += ["--commercial"] if commercial else []
    command = [sys.executable, "-m", "inkstream", "advise", "--json", *asked]
    done = await run_process(command, check=False)  # the planner needs torch, which this process does without
    if done.returncode:
        line = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise Refused(400, OPTION.sub(r"\1", line.removeprefix("inkstream: ")))
    found = json.loads(done.stdout)
    pairs, place = found.pop("break_even_pictures_a_month"), found.pop("place")
    break_evens = [{"pair": pair, "pictures": count} for pair, count in pairs.items()]
    there = None if place is None else {**place, **place["fit"], "seconds": place["seconds"]}
    return schema.Advice.model_validate({**found, "place": there, "break_evens": break_evens})


@router.post("/v1/pictures/{id}/verify", responses=answers(400, 404))
async def verify_picture(parts: Parts, who: Who, id: PictureId, body: schema.VerifyBody) -> schema.Verified:
    """Whether a picture shows what its prompt asks for, or the texts and colours that are given."""
    path = parts.store.pictures / find_picture(parts, who, id).file

    def work() -> dict[str, Any]:
        from inkstream.engine.pictures.asked import Asked, asked_in, read_colour
        from inkstream.engine.pictures.inputs import open_picture
        from inkstream.engine.pictures.metadata import prompts_in
        from inkstream.evaluate.verify import verify

        if not path.exists():
            raise Refused(404, GONE, code="gone")
        given = Asked(tuple(filter(str.strip, body.texts)), tuple(map(read_colour, body.colours)))
        prompt, told = ("", "") if given else prompts_in(path)
        found = verify(open_picture(str(path)), given or asked_in(prompt, told), told)
        lines = [(text.line, text.exact) for text in found.checks.texts]
        lines += [(colour.line, colour.right) for colour in found.checks.colours]
        lines += [(thing.line, thing.right) for thing in found.things]
        checks = [{"line": line, "right": right} for line, right in lines]
        quality = found.to_json()["quality"]
        return {"passed": found.passed, "empty": found.empty, "checks": checks, "notes": found.notes, **quality}

    try:
        return schema.Verified.model_validate(await to_thread.run_sync(work))
    except InputError as error:
        raise Refused(400, str(error)) from None


@router.get("/v1/bakeoffs", responses=answers())
async def list_bakeoffs(parts: Parts, who: Who) -> schema.Bakeoffs:
    """The bake-offs of the server that have a voting page."""

    def work() -> schema.Bakeoffs:
        from inkstream.evaluate.bakeoff.votes import REPORT, all_votes, read_key

        listed: list[schema.Bakeoff] = []
        for folder in sorted(_root(parts).iterdir()) if _root(parts).is_dir() else ():
            try:
                pictures, votes = read_key(folder).pictures, all_votes(folder)
            except (InputError, OSError):
                continue  # a folder of something else
            base = f"/v1/bakeoffs/{folder.name}"
            shown = who.admin and (folder / REPORT).exists()
            listed.append(
                schema.Bakeoff(
                    name=folder.name,
                    prompts=len({one["prompt"] for one in pictures.values()}),
                    models=len({one["model"] for one in pictures.values()}),
                    pictures=len(pictures),
                    votes=len(votes),
                    voters=len({line["voter"] for line in votes}),
                    vote=f"{base}/vote",
                    report=f"{base}/report" if shown else None,
                )
            )
        return schema.Bakeoffs(data=listed)

    return await to_thread.run_sync(work)


@router.get("/v1/bakeoffs/{name}/report", responses=HTML | answers(400, 404), response_class=Response)
async def get_report(parts: Parts, who: Who, name: Name) -> Response:
    """The report of a bake-off. It tells which model is which, so on a server with keys it needs an admin's key."""
    from inkstream.evaluate.bakeoff.votes import REPORT

    path = _file(parts, name, REPORT)
    if not who.admin:
        raise Refused(403, "this key may not read the report, which names the models: use an admin's key")
    return FileResponse(path, media_type="text/html", headers=HEADERS)


@router.get("/v1/bakeoffs/{name}/vote", responses=HTML | answers(400, 404), response_class=Response)
async def get_ballot(parts: Parts, who: Who, name: Name) -> Response:
    """The page where people vote blindly on the pictures of a bake-off."""
    from inkstream.evaluate.bakeoff.votes import PAGE

    return FileResponse(_file(parts, name, PAGE), media_type="text/html", headers=HEADERS)


@router.get("/v1/bakeoffs/{name}/vote/{picture}", responses=PNG | answers(400, 404), response_class=Response)
async def get_shown(
    parts: Parts,
    who: Who,
    name: Name,
    picture: Annotated[str, Path(max_length=40, description="A picture of the voting page.")],
) -> Response:
    """A picture of the voting page. Its name does not tell the model."""
    from inkstream.evaluate.bakeoff.votes import SHOWN

    if not re.fullmatch(r"[0-9a-f]{16}\.png", picture):
        raise Refused(404, f"there is no picture {picture}: see the voting page", code="not_found")
    return FileResponse(_file(parts, name, f"{SHOWN}/{picture}"), media_type="image/png")


@router.post("/v1/bakeoffs/{name}/votes", status_code=204, responses=answers(400, 404), openapi_extra=BODY)
async def add_votes(parts: Parts, who: Who, name: Name, request: Request) -> Response:
    """Save all votes of one voter, one JSON object a line. On a server with keys the voter is the key's name."""
    folder, text = _file(parts, name, ".").resolve(), (await request.body()).decode("utf-8", "replace")

    def work() -> None:
        from inkstream.evaluate.bakeoff.votes import save_votes

        save_votes(folder, text, "the body", who.name)

    try:
        await to_thread.run_sync(work)
    except InputError as error:
        raise Refused(400, str(error)) from None
    return Response(status_code=204)


def _root(parts: Service) -> FilePath:
    return parts.settings.bakeoffs or parts.settings.data / "bakeoffs"


def _file(parts: Service, name: str, file: str) -> FilePath:
    """A file of a bake-off. Raises Refused if there is no bake-off with this name, or no such file in it."""
    folder = _root(parts) / name
    if folder.parent != _root(parts) or name in (".", "..") or not (folder / file).exists():
        raise Refused(404, f"there is no bake-off {name[:100]} with {file}: see /v1/bakeoffs", code="not_found")
    return folder / file
