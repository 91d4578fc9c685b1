"""The chat page at `/`, the endpoints' at `/docs`: a handful of static files of this package, and
nothing else.

They hold no secret, so they are served without a key; what they call asks for one.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from earnest.serve.http import PAGE_PARTS, ApiError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts, styles and calls of this server only, whatever a model writes: no inline script, no
# frame, no form, no image of another host, no string that becomes markup.
_POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'"),
        *("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Asked for again each time and mostly not sent again: parts of two versions never mix.
    "cache-control": "no-cache",
}


def router() -> APIRouter:
    """The pages and their parts."""
    api = APIRouter(include_in_schema=False)
    parts = _parts()

    @api.api_route("/", methods=["GET", "HEAD"])
    async def chat(request: Request) -> Response:
        """The chat page itself."""
        return _sent(request, *parts["index.html"])

    @api.api_route("/docs", methods=["GET", "HEAD"])
    async def docs(request: Request) -> Response:
        """The page of all endpoints."""
        return _sent(request, *parts["docs.html"])

    @api.api_route(PAGE_PARTS + "{name}", methods=["GET", "HEAD"])
    async def part(name: str, request: Request) -> Response:
        """A script, a style, a picture."""
        if name not in parts or name.endswith(".html"):
            raise ApiError(404, f"the page has no part {name!r:.100}")
        return _sent(request, *parts[name])

    return api


def _parts() -> dict[str, tuple[bytes, str]]:
    """Name to content and type; whatever else lies in the folder is not for the world."""
    found = {}
    for file in resources.files("earnest.serve").joinpath("web").iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            found[file.name] = (file.read_bytes(), kind)
    return found


def _sent(request: Request, content: bytes, kind: str) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _HEADERS | {"etag": tag}
    known = request.headers.get("if-none-match", "")
    if tag in (given.strip().removeprefix("W/") for given in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind)
