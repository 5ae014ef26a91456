"""Addresses within the API."""

from collections.abc import Mapping
from urllib.parse import quote

Query = Mapping[str, str | int | bool | None]


def join(*segments: str) -> str:
    """Return `/v1/a/b` with each segment escaped."""
    return "/v1/" + "/".join(quote(segment, safe="") for segment in segments)
