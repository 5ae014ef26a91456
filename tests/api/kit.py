"""What the tests of the API share: a clock to turn, a small fleet in SQL, callers of every role."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI
from sqlalchemy.orm import Session

from trimtab_controller.agents.backups import BackupDisk, Piece
from trimtab_controller.api.app import create_app
from trimtab_controller.api.context import ApiContext, ApiSettings
from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.secret_box import SecretBox
from trimtab_controller.services import identity, projects, tokens
from trimtab_controller.services.hosts import JoinPlace
from trimtab_controller.store import host_reports, hosts, image_replicas, images, networks, pools, schema
from trimtab_controller.store.database import AsyncDatabase
from trimtab_protos.adoption_messages import Described
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import Inventory

T = TypeVar("T")
GIB = 1 << 30
INVENTORY = Inventory(
    hostname="node1",
    arch="x86_64",
    machine_id="1" * 32,
    smbios_uuid="x",
    boot_id="b",
    kernel="6.1",
    agent_version="0.1",
    libvirt_version="9.0",
    qemu_version="7.2",
    accelerator="tcg",
    cpu_vendor="AMD",
    cpu_model="EPYC",
    usable_cpu_models=("EPYC", "qemu64"),
    cpus=4,
    memory_mib=8192,
    machines=("pc-q35-7.2",),
    capabilities=("layers", "volume-move"),
    digest="d1",
)
ROOT = Actor(name="test", roles={"": Role.ADMIN})


class TurnedClock:
    """Shows the time it was turned to; the boot clock runs."""

    def __init__(self) -> None:
        self.at = datetime.now(UTC).replace(microsecond=0)

    def now(self) -> datetime:
        return self.at

    def boottime_s(self) -> float:
        return time.monotonic()

    def turn(self, **by: float) -> None:
        self.at += timedelta(**by)


class ConsoleReader:
    """Stands where agents are: has one console log per vm, and domains of others."""

    def __init__(self) -> None:
        self.logs: dict[str, bytes] = {}
        # What is on any host, by name or by vm id.
        self.domains: dict[str, Described] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        """What a disk of a backup is as a file, by disk and format; pieces are of 1000 bytes."""

    def describe_domain(self, host_id: str, *, domain: str = "", vm_id: str = "") -> Described:
        found = self.domains.get(domain or vm_id)
        if found is None:
            raise NotFound("domain-not-found", f"{host_id} has no domain {domain or vm_id}")
        return found

    def read_console(self, host_id: str, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]:
        if vm_id not in self.logs:
            raise Unavailable("peer-unreachable", f"{host_id} cannot be reached")
        log = self.logs[vm_id]
        begin = max(0, len(log) + offset) if offset < 0 else offset
        part = log[begin : begin + max_bytes]
        return part, begin + len(part)

    def read_backup(self, host_id: str, disk: BackupDisk, format: str, offset: int, length: int) -> Piece:
        file = self.files.get((disk.disk, format))
        if file is None:
            raise Unavailable("repository-not-open", f"{host_id} has no key of the repository now")
        return Piece(file[offset : offset + min(length, 1000)], 0, len(file))


class ConsoleDesk:
    """Stands where hosts are: a console says back what is typed, until the test lets the guest end it."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, str, str]] = []
        self.lines: list[EchoLine] = []
        # The next one is refused with this.
        self.refusal: TrimtabError | None = None

    async def open_console(self, host_id: str, vm_id: str, kind: ConsoleKind) -> "EchoLine":
        if self.refusal is not None:
            raise self.refusal
        self.opened.append((host_id, vm_id, kind.value))
        self.lines.append(EchoLine())
        return self.lines[-1]


class EchoLine:
    def __init__(self) -> None:
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        self.is_closed = False

    async def read(self) -> bytes:
        return await self._said.get()

    async def write(self, content: bytes) -> None:
        await self._said.put(b"heard " + content)

    async def close(self) -> None:
        self.is_closed = True

    def end(self) -> None:
        self._said.put_nowait(b"")


@dataclass
class Api:
    """A running application over a database of its own."""

    app: FastAPI
    db: AsyncDatabase
    clock: TurnedClock
    consoles: ConsoleReader
    desk: ConsoleDesk
    uploads_dir: Path
    nudges: list[int] = field(default_factory=list)
    # Token by caller: `admin` of the fleet, `p1-viewer`, ...
    secrets: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    # Host id -> its state as a gateway would have written it.
    host_states: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_(self, caller: str, **headers: str) -> httpx.AsyncClient:
        """Return a client with the caller's token; '' has none."""
        if caller:
            headers["Authorization"] = f"Bearer {self.secrets[caller]}"
        transport = httpx.ASGITransport(app=self.app)
        return httpx.AsyncClient(transport=transport, base_url="https://trimtab.test", headers=headers, timeout=30)

    async def call(self, caller: str, method: str, path: str, **options: Any) -> httpx.Response:
        async with self.as_(caller) as client:
            return await client.request(method, path, **options)

    async def write(self, work: Callable[[Session], T]) -> T:
        return await self.db.write(work, durable=False)

    async def rows(self, table: Any, **equal: Any) -> list[Mapping[str, Any]]:
        import sqlalchemy as sa

        query = sa.select(table).where(*(table.c[name] == value for name, value in equal.items()))
        return await self.db.read(lambda session: [dict(row._mapping) for row in session.execute(query)])

    async def make_vm(self, name: str = "web1", *, caller: str = "p1-operator", **fields: Any) -> dict[str, Any]:
        """Create a vm and return it; its operation is accepted, nobody drives it."""
        body = {"name": name, "image": "debian", "memory_mib": 512, **fields}
        answer = await self.call(caller, "POST", f"/v1/projects/{caller.split('-', maxsplit=1)[0]}/vms", json=body)
        assert answer.status_code == 202, answer.text
        vm: dict[str, Any] = answer.json()["vm"]
        return vm

    async def end_operations(self) -> None:
        """Say of every live operation that it is done, as if somebody had driven it."""
        table = schema.operation
        await self.write(
            lambda session: session.execute(
                table.update().where(table.c.ended_at.is_(None)).values(state="done", ended_at=self.clock.now())
            )
        )

    def stream(self, caller: str, path: str, **headers: str) -> "Stream":
        """Open a server-sent stream as the caller: `async with api.stream(...) as stream`."""
        headers = {"authorization": f"Bearer {self.secrets[caller]}", **headers}
        return Stream(self.app, path, headers)

    async def equip(self, *names: str, memory_mib: int = 8192) -> None:
        """Let these hosts (none named: node1 and node2) be up, with an inventory, reaching every pool and network."""
        for name in names or ("node1", "node2"):
            await self.write(lambda session, name=name: self._equip(session, self.ids[name], name, memory_mib))  # type: ignore[misc]

    def _equip(self, session: Session, host_id: str, name: str, memory_mib: int) -> None:
        now = self.clock.now()
        inventory = replace(INVENTORY, hostname=name, memory_mib=memory_mib, digest=f"{name}-{memory_mib}")
        host_reports.store_inventory(session, host_id, inventory, now=now)
        hosts.open_session(session, host_id, incarnation="inc-1", boot_id="b", agent_address="192.0.2.11:8446", now=now)
        host_reports.map_everything(session, host_id)
        for table in (schema.pool_host, schema.network_host):
            session.execute(table.update().where(table.c.host_id == host_id).values(state="ready", observed_at=now))
        space = {"capacity_bytes": 100 * GIB, "available_bytes": 100 * GIB, "claimed_bytes": 0, "observed_at": now}
        session.execute(schema.pool_space.insert().values(pool_id=self.ids["local"], host_id=host_id, **space))

    async def set_vm(self, vm_id: str, **values: Any) -> None:
        table = schema.vm
        await self.write(lambda session: session.execute(table.update().where(table.c.id == vm_id).values(**values)))


@dataclass
class Message:
    """One server-sent message."""

    id: str = ""
    event: str = ""
    content: Any = None


class Stream:
    """A client of one stream, straight on ASGI: httpx's transport gives an answer only once it has ended."""

    def __init__(self, app: FastAPI, path: str, headers: Mapping[str, str]) -> None:
        self._app, self._headers = app, headers
        self._path, _, self._query = path.partition("?")
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._hung_up = asyncio.Event()
        # Cleared, the client reads nothing: what is sent waits, as on a full socket.
        self.reads = asyncio.Event()
        self.reads.set()
        self._buffer = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Stream":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._hung_up.set()
        self.reads.set()
        await asyncio.wait_for(self._task, 10)

    async def _run(self) -> None:
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "scheme": "https",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": self._query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in self._headers.items()],
            "client": ("192.0.2.99", 1234),
            "server": ("trimtab.test", 443),
            "state": {},
        }
        try:
            await self._app(scope, self._receive, self._send)
        finally:
            await self._chunks.put(None)

    async def _receive(self) -> dict[str, Any]:
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        await self.reads.wait()
        await self._chunks.put(message.get("body", b""))

    async def block(self, timeout_s: float = 10) -> bytes | None:
        """Return the next block between empty lines, comments too; None at the end."""
        while b"\n\n" not in self._buffer:
            chunk = await asyncio.wait_for(self._chunks.get(), timeout_s)
            if chunk is None:
                return None
            self._buffer += chunk
        found, _, self._buffer = self._buffer.partition(b"\n\n")
        return found

    async def message(self, timeout_s: float = 10) -> Message:
        """Return the next message that is no comment. EOFError at the end."""
        while True:
            found = await self.block(timeout_s)
            if found is None:
                raise EOFError
            fields = dict(line.split(": ", 1) for line in found.decode().splitlines() if not line.startswith(":"))
            if fields:
                return Message(fields.get("id", ""), fields.get("event", ""), json.loads(fields.get("data", "null")))


def build_app(url: str, directory: Path, **settings: Any) -> Api:
    """Put the application together without starting it; nothing is read or written."""
    clock, consoles, desk = TurnedClock(), ConsoleReader(), ConsoleDesk()
    db = AsyncDatabase(url)
    nudges: list[int] = []
    host_states: dict[str, dict[str, Any]] = {}
    chosen: dict[str, Any] = {
        "uploads_dir": directory / "uploads",
        "gateway_address": "192.0.2.1:8444",
        "join_addresses": ("192.0.2.1:8445",),
        "gateway_addresses": ("192.0.2.1:8444",),
        "rate_limit_per_s": 100_000.0,
        "login_failures_burst": 100_000.0,
        "spool_keep_free_bytes": 0,
        "disk_keep_free_bytes": 0,
        "tail_poll_s": 0.02,
        "sse_heartbeat_s": 0.2,
        "image_url_hosts": ("images.example.org",),
        **settings,
    }
    app = create_app(
        ApiContext(
            db=db,
            clock=clock,
            agents=consoles,
            consoles=desk,
            settings=ApiSettings(**chosen),
            join_place=lambda: JoinPlace(api_url="https://192.0.2.1:8443", ca_fingerprint="sha256:aa"),
            ca_bundle_pem=lambda: "-----BEGIN CERTIFICATE-----\n",
            nudge=lambda: nudges.append(1),
            secrets=SecretBox(directory),
            host_states=lambda: host_states,
        )
    )
    return Api(
        app=app,
        db=db,
        clock=clock,
        consoles=consoles,
        desk=desk,
        uploads_dir=chosen["uploads_dir"],
        nudges=nudges,
        host_states=host_states,
    )


@asynccontextmanager
async def running_api(url: str, directory: Path, **settings: Any) -> AsyncIterator[Api]:
    """Start the application over a migrated database and fill it with a small fleet."""
    api = build_app(url, directory, **settings)
    await api.db.write(lambda session: _fill(session, api), durable=False)
    async with api.app.router.lifespan_context(api.app):
        yield api
    await api.db.close()


def _fill(session: Session, api: Api) -> None:
    now = api.clock.now()
    api.secrets["admin"] = identity.bootstrap_admin(session, now)
    for name in ("p1", "p2"):
        project = projects.create(session, projects.ProjectSpec(name=name, quotas={}), actor=ROOT, now=now)
        api.ids[name] = project.id
        for role in Role:
            _caller(session, api, f"{name}-{role.value}", project.id, role, now)
    for role in (Role.VIEWER, Role.OPERATOR):
        _caller(session, api, f"fleet-{role.value}", "", role, now)
    _caller(session, api, "nobody", None, Role.VIEWER, now)
    _add_hosts(session, api, now)
    _add_storage(session, api, now)
    _add_networks(session, api, now)


def _caller(session: Session, api: Api, name: str, project_id: str | None, role: Role, now: datetime) -> None:
    view = identity.create(session, name=name, kind="user", actor=ROOT, now=now)
    if project_id is not None:
        identity.set_role(session, view.user.id, project_id=project_id, role=role, actor=ROOT, now=now)
    api.secrets[name] = tokens.create(session, view.user, name="t", lifetime=timedelta(days=30), now=now).secret
    api.ids[name] = view.user.id


def _add_hosts(session: Session, api: Api, now: datetime) -> None:
    host_class = hosts.find_class(session, hosts.DEFAULT_CLASS)
    assert host_class is not None
    for i, name in enumerate(("node1", "node2"), start=1):
        host = hosts.insert(
            session,
            host_id=mint("host"),
            name=name,
            host_class_id=host_class.id,
            agent_address=f"192.0.2.{10 + i}:8446",
            migration_address=f"192.0.2.{10 + i}",
            machine_id=f"{i:032x}",
            smbios_uuid=f"00000000-0000-0000-0000-{i:012x}",
            now=now,
        )
        api.ids[name] = host.id


def _add_storage(session: Session, api: Api, now: datetime) -> None:
    pool = pools.insert(
        session,
        pool_id=mint("pool"),
        name="local",
        kind="dir",
        path="/var/lib/trimtab/local",
        is_shared=False,
        is_default=False,
        now=now,
    )
    api.ids["local"] = pool.id
    for name, project_id in (("debian", ""), ("p2-image", api.ids["p2"])):
        image = images.insert(
            session,
            image_id=mint("img"),
            project_id=project_id,
            name=name,
            kind="disk",
            format="qcow2",
            source_sha256="",
            labels={},
            now=now,
        )
        api.ids[name] = image.id
        values = {"state": "ready", "virtual_size_bytes": GIB, "file_size_bytes": GIB // 4}
        session.execute(schema.image.update().where(schema.image.c.id == image.id).values(**values))
        image_replicas.add(session, image_id=image.id, pool_id=pool.id, host_id=api.ids["node1"], now=now)


def _add_networks(session: Session, api: Api, now: datetime) -> None:
    for name, project in (("default", ""), ("p2-net", "p2")):
        network = networks.insert(
            session,
            network_id=mint("net"),
            bridges={},
            now=now,
            project_id=api.ids[project] if project else "",
            name=name,
            kind="nat",
            subnet="10.20.0.0/24",
            has_dhcp=True,
        )
        api.ids[name] = network.id
