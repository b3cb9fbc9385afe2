"""The studio: a page with its own scripts and styles, which use only the public API. There is no build step."""

from __future__ import annotations

import hashlib
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response

from inkstream.serve.errors import Refused

FOLDER = FilePath(__file__).parent.parent / "studio"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy: scripts and styles come from this server's files, never inline."""

router = APIRouter(include_in_schema=False)


def read_files(folder: FilePath = FOLDER) -> dict[str, bytes]:
    """Every file of the studio, by its path below the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in TYPES)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def digest_of(files: dict[str, bytes]) -> str:
    """A hash of all files. It is part of their URLs, so browsers may cache them without limit."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


FILES = read_files()
DIGEST = digest_of(FILES)


@router.api_route("/", methods=["GET", "HEAD"])
async def studio(match: Annotated[str | None, Header(alias="If-None-Match")] = None) -> Response:
    """The page. Its links contain the digest, so a browser asks again only for the page itself."""
    headers = {"ETag": f'"{DIGEST}"', "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    if match is not None and f'"{DIGEST}"' in match:
        return Response(status_code=304, headers=headers)
    page = FILES["index.html"].replace(b"{digest}", DIGEST.encode())
    return Response(page, media_type="text/html", headers=headers)


@router.api_route("/studio/{digest}/{name:path}", methods=["GET", "HEAD"])
async def studio_file(digest: str, name: Annotated[str, Path(max_length=100)]) -> Response:
    """One of the studio's files. A URL with an old digest gives the present file, which browsers must not cache."""
    if name not in FILES:
        raise Refused(404, f"there is nothing at /studio/{digest[:100]}/{name}: load / again")
    caching = "public, max-age=31536000, immutable" if digest == DIGEST else "no-cache"
    kind = TYPES[FilePath(name).suffix]
    return Response(FILES[name], media_type=kind, headers={"Cache-Control": caching})
