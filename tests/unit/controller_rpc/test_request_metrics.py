"""The API's own figures: by route template, with watches apart."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.responses import StreamingResponse

from trimtab_controller.request_metrics import measured


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()

    @app.get("/v1/things/{name}")
    async def thing(name: str) -> dict[str, str]:
        return {"name": name}

    @app.get("/v1/watch")
    async def watch() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "data: 1\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    transport: Any = httpx.ASGITransport(app=measured(app))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_requests_are_counted_by_template_and_never_by_name(client: httpx.AsyncClient) -> None:
    labels = {"method": "GET", "route": "/v1/things/{name}"}
    before = count("trimtab_api_requests_total", status="200", **labels)
    for name in ("a", "b"):
        assert (await client.get(f"/v1/things/{name}")).status_code == 200
    assert count("trimtab_api_requests_total", status="200", **labels) == before + 2
    assert count("trimtab_api_request_seconds_count", **labels) >= 2


async def test_unknown_paths_and_methods_share_one_label(client: httpx.AsyncClient) -> None:
    before = count("trimtab_api_requests_total", method="other", route="unmatched", status="404")
    await client.request("BREW", "/nowhere/at/all")
    assert count("trimtab_api_requests_total", method="other", route="unmatched", status="404") == before + 1


async def test_a_watch_has_no_duration(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/watch")).text == "data: 1\n\n"
    assert count("trimtab_api_requests_total", method="GET", route="/v1/watch", status="200") == 1
    assert count("trimtab_api_request_seconds_count", method="GET", route="/v1/watch") == 0
    assert count("trimtab_api_watchers") == 0
