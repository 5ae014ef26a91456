"""Renders resources: frozen dataclasses to JSON bytes by pydantic's serializer, which is several times faster than a model's."""

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter
from starlette.responses import Response

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def dump(resource: object) -> bytes:
    """Return the JSON of one resource."""
    kind: Any = type(resource)
    return _adapter(kind).dump_json(resource)


def dump_as(kind: Any, resource: object) -> bytes:
    """Return the JSON of one resource that is no object of its kind: a dict of a TypedDict."""
    return _adapter(kind).dump_json(resource)


def dump_list(kind: type[T], items: "list[T]", next_page_token: str) -> bytes:
    """Return the JSON of one page of a list."""
    return page_of(_adapter(list[kind]).dump_json(items), next_page_token)  # type: ignore[valid-type]


def page_of(body: bytes, next_page_token: str) -> bytes:
    """Return one page of a list whose items' JSON is there. The token stands first: who reads on may ask for the next page before
    reading this one."""
    token = _adapter(str).dump_json(next_page_token)
    return b'{"next_page_token":' + token + b',"items":' + body + b"}"


def json_response(body: bytes, *, status: int = 200, etag: str = "") -> Response:
    headers = {"ETag": etag} if etag else {}
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def etag_of(version: int) -> str:
    return f'W/"{version}"'
