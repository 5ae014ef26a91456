"""The whole OpenAPI document, generated requests: never a 5xx, and every answer as documented.

The same few for each route in every run, on SQLite; with `TRIMTAB_FUZZ_EXAMPLES=100` as many for each, others every time, on
PostgreSQL too (`make soak`, whose report `tests/soak/fuzz.py` writes).
Two of three name what is there, in their path and in their body: what is named by chance is never found.
"""

import asyncio
import json
import os
import shutil
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
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

from tests.api.kit import Api, build_app, running_api
from tests.databases import PostgresServer

ASKED_FOR = os.environ.get("TRIMTAB_FUZZ_EXAMPLES", "")
FEW = 3
EXAMPLES = int(ASKED_FOR or FEW)
DATABASES = ["sqlite", *([pytest.param("postgres", marks=pytest.mark.postgres)] if EXAMPLES > FEW else [])]
START_TIMEOUT_S = 60
NAMES = {
    "/v1/hosts/": "node1",
    "/v1/host-classes/": "default",
    "/v1/networks/": "default",
    "/v1/pools/": "local",
    "/v1/projects/{project}/images/": "debian",
    "/v1/projects/{project}/networks/": "default",
    "/v1/projects/{project}/secgroups/": "web",
    "/v1/projects/{project}/vm-groups/": "apart",
    "/v1/projects/{project}/volumes/": "data1",
}
"""What is there, by how the path of its route begins."""
NAMES_TO_DELETE = {"/v1/hosts/": "node2", "/v1/projects/{project}/volumes/": "data2", "/v1/projects/{project}/secgroups/": "gone"}
"""What a route may delete that others need not find."""
IN_BODIES = {
    "host": "node1",
    "to_host": "node1",
    "host_class": "default",
    "image": "debian",
    "network": "default",
    "pool": "local",
}
VMS = "/v1/projects/{project}/vms/"


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
            await fill(api)
            # `running_api` runs the lifespan.
            config = uvicorn.Config(api.app, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
            self._server = uvicorn.Server(config)
            serving = asyncio.create_task(self._server.serve(sockets=[self.socket]))
            self._started.set()
            await serving


async def fill(api: Api) -> None:
    """Make what requests name: for each path of a vm one of its own, since nobody drives what it accepts; one more is deleted."""
    await api.equip()
    for number in range(len(VM_PATHS) + 1):
        await api.make_vm(f"vm{number}")
    for path, body in (
        ("volumes", {"name": "data1", "size_bytes": 1 << 30, "pool": "local"}),
        ("volumes", {"name": "data2", "size_bytes": 1 << 30, "pool": "local"}),
        ("secgroups", {"name": "web", "rules": []}),
        ("secgroups", {"name": "gone", "rules": []}),
        ("vm-groups", {"name": "apart", "rules": [{"relation": "anti-affinity"}]}),
    ):
        made = await api.call("admin", "POST", f"/v1/projects/p1/{path}", json=body)
        assert made.status_code in {201, 202}, made.text


@pytest.fixture(scope="module", params=DATABASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    directory = tmp_path_factory.mktemp("served")
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.new_database()
    else:
        shutil.copyfile(request.getfixturevalue("sqlite_template"), directory / "trimtab.db")
        url = f"sqlite:///{directory / 'trimtab.db'}"
    with ServedApi(url, directory) as running:
        yield running


@pytest.fixture
def answers(record_property: Callable[[str, object], None]) -> Iterator[Counter[int]]:
    """How many answers there were of each status: for the report of `make soak`."""
    seen: Counter[int] = Counter()
    yield seen
    record_property("answers", json.dumps(seen))


def document() -> dict[str, Any]:
    """Return the OpenAPI document of an application that nobody starts."""
    found: dict[str, Any] = build_app("sqlite:///unused.db", Path("unused")).app.openapi()
    return found


schema = from_dict(DOCUMENT := document())
VM_PATHS = [path for path in DOCUMENT["paths"] if path.startswith(VMS)]


def there(method: str, path: str) -> dict[str, str]:
    """Return what is there of the parameters of a route's path."""
    found = {"project": "p1" if method == "GET" or path != "/v1/projects/{project}" else "p2", "user": "p1-viewer"}
    if path.startswith(VMS):
        number = len(VM_PATHS) if method == "DELETE" else VM_PATHS.index(path)
        return {**found, "name": f"vm{number}"}
    names = {**NAMES, **(NAMES_TO_DELETE if method == "DELETE" else {})}
    name = next((name for start, name in names.items() if path.startswith(start)), "")
    return {**found, "name": name} if name else found


def name_what_is_there(case: Case[Any]) -> None:
    """Put names of what is there into two of three requests; which ones follows from what was generated."""
    if zlib.crc32(repr((case.path_parameters, case.query, case.body)).encode()) % 3 == 0:
        return
    known = there(case.method.upper(), case.path)
    case.path_parameters = {name: known.get(name, value) for name, value in (case.path_parameters or {}).items()}
    if isinstance(case.body, dict):
        case.body = {name: IN_BODIES[name] if name in IN_BODIES and value else value for name, value in case.body.items()}


def test_what_requests_name_is_there(served: ServedApi) -> None:
    asked = 0
    for path, methods in DOCUMENT["paths"].items():
        wanted = {one["name"] for one in methods.get("get", {}).get("parameters", ()) if one["in"] == "path"}
        known = there("GET", path) if "get" in methods and path.endswith("}") else {}  # what is done to it may be refused
        if "name" in wanted and wanted <= known.keys():
            url = served.url + path.format(**known)
            answer = httpx.get(url, headers={"Authorization": f"Bearer {served.secret}"}, timeout=30)
            assert answer.status_code == 200, f"{path}: {answer.text}"
            asked += 1
    assert asked >= len(NAMES)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=not ASKED_FOR,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_makes_a_defect(case: Case[Any], served: ServedApi, answers: Counter[int]) -> None:
    name_what_is_there(case)
    query = case.query if isinstance(case.query, dict) else {}
    query.pop("watch", None)  # a stream does not end
    if case.path.endswith(":wait"):
        query["timeout_s"] = 0
    case.query = query
    headers = {"Authorization": f"Bearer {served.secret}", "Accept": "application/json"}
    answer = case.call(base_url=served.url, headers=headers, timeout=30)
    answers[answer.status_code] += 1
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.validate_response(answer, checks=checks, headers=headers)
