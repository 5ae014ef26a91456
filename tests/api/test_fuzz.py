"""The whole OpenAPI document, generated requests: never a 5xx, and every answer as documented."""

import asyncio
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.openapi import from_dict
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api.kit import build_app, running_api

EXAMPLES = 3
START_TIMEOUT_S = 60


class ServedApi:
    """The application behind a real HTTP server on loopback, in a thread."""

    def __init__(self, url: str, directory: Path) -> None:
        self._database_url, self._directory = url, directory
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.secret = ""
        self._started = threading.Event()
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="served-api")

    def __enter__(self) -> "ServedApi":
        self._thread.start()
        assert self._started.wait(START_TIMEOUT_S), "the API did not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(START_TIMEOUT_S)
        self.socket.close()

    async def _serve(self) -> None:
        async with running_api(self._database_url, self._directory) as api:
            self.secret = api.secrets["admin"]
            await api.make_vm("web1")
            # `running_api` runs the lifespan.
            config = uvicorn.Config(api.app, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
            self._server = uvicorn.Server(config)
            serving = asyncio.create_task(self._server.serve(sockets=[self.socket]))
            self._started.set()
            await serving


@pytest.fixture(scope="module")
def served(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    directory = tmp_path_factory.mktemp("served")
    shutil.copyfile(sqlite_template, directory / "trimtab.db")
    with ServedApi(f"sqlite:///{directory / 'trimtab.db'}", directory) as running:
        yield running


def document() -> dict[str, Any]:
    """Return the OpenAPI document of an application that nobody starts."""
    found: dict[str, Any] = build_app("sqlite:///unused.db", Path("unused")).app.openapi()
    return found


schema = from_dict(document())


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_makes_a_defect(case: Case[Any], served: ServedApi) -> None:
    query = case.query if isinstance(case.query, dict) else {}
    query.pop("watch", None)  # a stream does not end
    if case.path.endswith(":wait"):
        query["timeout_s"] = 0
    case.query = query
    case.call_and_validate(
        base_url=served.url,
        headers={"Authorization": f"Bearer {served.secret}", "Accept": "application/json"},
        checks=[not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance],
        timeout=30,
    )
