"""`trimtab-controller check`: looks at everything that this node needs and says what is wrong and what to do about it."""

import ctypes
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import redis
from cryptography import x509
from redis.exceptions import RedisError

from trimtab_controller import pki, supervisor
from trimtab_controller.clock import Clock
from trimtab_controller.config import PROCESSES, Settings, is_ip_address
from trimtab_controller.pki import FleetPki
from trimtab_controller.store import migrate, upkeep
from trimtab_controller.store.database import Database
from trimtab_protos.errors import TrimtabError

DISK_FAIL_BYTES = 256 << 20
DISK_WARN_BYTES = 2 << 30
EXPIRY_WARN = timedelta(days=30)
PROBE_TIMEOUT_S = 3.0
_STA_UNSYNC = 0x40


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    part: str
    verdict: Verdict
    message: str


def findings(settings: Settings, clock: Clock) -> Iterator[Finding]:
    """Yield what was found, part by part; a part that cannot be looked at is a failure of that part."""
    parts: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("settings", lambda: _settings(settings)),
        ("data directory", lambda: _data_directory(settings)),
        ("certificates", lambda: _certificates(settings, clock)),
        ("database", lambda: _database(settings)),
        ("redis", lambda: _redis(settings)),
        ("clock", _clock),
        ("disk space", lambda: _disk_space(settings)),
        ("ports", lambda: _ports(settings)),
    ]
    for part, look in parts:
        try:
            yield from look()
        except (OSError, ValueError, TrimtabError) as error:
            yield Finding(part, Verdict.FAIL, str(error))


def _settings(settings: Settings) -> list[Finding]:
    if not settings.file.exists():
        return [Finding("settings", Verdict.FAIL, f"{settings.file} is missing; run `trimtab-controller init`")]
    found = [Finding("settings", Verdict.OK, f"{settings.file} is read, {', '.join(settings.advertise)} advertised")]
    for address in settings.advertise:
        if is_ip_address(address) and not _is_local(address):
            message = (
                f"advertise: {address} is not an address of this machine; hosts must reach it all the same (NAT, a balancer)"
            )
            found.append(Finding("settings", Verdict.WARN, message))
    return found


def _is_local(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _data_directory(settings: Settings) -> list[Finding]:
    found = []
    for path in (settings.data_dir, settings.pki_dir, settings.uploads_dir):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            message = f"{path} is open to others (mode {mode:o}); chmod 700 {path}"
            found.append(Finding("data directory", Verdict.FAIL, message))
        elif not os.access(path, os.W_OK):
            found.append(Finding("data directory", Verdict.FAIL, f"{path} cannot be written by this user"))
    return found or [Finding("data directory", Verdict.OK, f"{settings.data_dir} is private and writable")]


def _certificates(settings: Settings, clock: Clock) -> list[Finding]:
    fleet, now = FleetPki(settings.pki_dir), clock.now()
    found = []
    authority = fleet.signing().certificate
    if authority.not_valid_after_utc - now < EXPIRY_WARN:
        message = f"the CA expires at {authority.not_valid_after_utc:%Y-%m-%d}; `trimtab-controller ca rotate begin`"
        found.append(Finding("certificates", Verdict.WARN, message))
    for name in ("ca-signing.pem", "controller.key"):
        path = fleet.directory / name
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            found.append(Finding("certificates", Verdict.FAIL, f"{path} holds a key and is open to others; chmod 600 {path}"))
    fleet.controller_pair()
    own = fleet.controller_certificate()
    pki.verify_signed_by(fleet.authorities(), own)
    if own.not_valid_after_utc <= now:
        found.append(Finding("certificates", Verdict.FAIL, "the controller's certificate has expired; start the controller"))
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if not set(pki.controller_names(settings.advertise)) <= set(names):
        message = "the controller's certificate lacks an advertised address; restart the controller"
        found.append(Finding("certificates", Verdict.WARN, message))
    stage = fleet.rotation_stage()
    if stage != "none":
        message = f"a rotation of the CA is under way ({stage}); `trimtab-controller ca rotate finish`"
        found.append(Finding("certificates", Verdict.WARN, message))
    days = (own.not_valid_after_utc - now).days
    return found or [Finding("certificates", Verdict.OK, f"the CA is good, the controller's certificate for {days} more days")]


def _database(settings: Settings) -> list[Finding]:
    database = Database(settings.effective_database_url, pool_size=1)
    try:
        database.read(lambda session: session.connection())
        dialect = database.dialect
    finally:
        database.close()
    present, needed = migrate.current(settings.effective_database_url), migrate.head()
    if present < needed:
        message = f"revision {present or 'none'}, this release needs {needed}; `trimtab-controller migrate`"
        return [Finding("database", Verdict.FAIL, message)]
    return [Finding("database", Verdict.OK, f"{dialect} answers, revision {present}"), _audit(settings)]


def _audit(settings: Settings) -> Finding:
    """Follow the chain of seals that the leader lays over the audit trail."""
    database = Database(settings.effective_database_url, pool_size=1)
    try:
        broken_at = database.read(upkeep.verify_audit)
    finally:
        database.close()
    if broken_at is None:
        return Finding("audit", Verdict.OK, "every sealed row is as it was written")
    message = f"row {broken_at} does not fit its seal: it was changed, or the row before it taken out; compare it with a copy of the database"
    return Finding("audit", Verdict.FAIL, message)


def _redis(settings: Settings) -> list[Finding]:
    is_up = supervisor.is_running(settings.data_dir)
    if settings.is_redis_private and not is_up:
        program = settings.redis_server or shutil.which("redis-server") or shutil.which("valkey-server")
        if program:
            return [Finding("redis", Verdict.OK, f"{program} will be started with the controller")]
        message = "no redis-server: operations are driven by the engine alone, more slowly; apt-get install redis-server"
        return [Finding("redis", Verdict.WARN, message)]
    client = redis.Redis.from_url(
        settings.effective_redis_url, socket_timeout=PROBE_TIMEOUT_S, socket_connect_timeout=PROBE_TIMEOUT_S
    )
    try:
        client.ping()
        policy = client.config_get("maxmemory-policy")
    except RedisError as error:
        return [Finding("redis", Verdict.WARN, f"redis does not answer ({error}); work goes on without it, more slowly")]
    finally:
        client.close()
    if isinstance(policy, dict) and policy.get("maxmemory-policy") not in ("noeviction", None):
        return [Finding("redis", Verdict.WARN, "redis may evict messages; set maxmemory-policy noeviction")]
    return [Finding("redis", Verdict.OK, "redis answers")]


def _clock() -> list[Finding]:
    """Ask the kernel whether somebody disciplines its clock; leases do not need it, joins and audit do."""
    buffer = ctypes.create_string_buffer(512)  # struct timex, modes 0: read only
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    # `status` is the fifth field: int modes, then three longs.
    status = ctypes.c_int.from_buffer(buffer, 4 * ctypes.sizeof(ctypes.c_long)).value
    if state == -1 or status & _STA_UNSYNC:
        message = (
            "the clock is not synchronised; hosts with more than 2 s of difference cannot join. Run chrony or systemd-timesyncd"
        )
        return [Finding("clock", Verdict.WARN, message)]
    return [Finding("clock", Verdict.OK, "the clock is synchronised")]


def _disk_space(settings: Settings) -> list[Finding]:
    free = shutil.disk_usage(settings.data_dir).free
    message = f"{free >> 20} MiB free below {settings.data_dir}"
    if free < DISK_FAIL_BYTES:
        return [Finding("disk space", Verdict.FAIL, f"{message}; the database needs {DISK_FAIL_BYTES >> 20} MiB")]
    if free < DISK_WARN_BYTES:
        return [Finding("disk space", Verdict.WARN, f"{message}; uploads need more")]
    return [Finding("disk space", Verdict.OK, message)]


def _ports(settings: Settings) -> list[Finding]:
    ports = {"api": settings.api_port, "gateway": settings.gateway_port, "join": settings.join_port}
    ports |= {f"metrics of {name}": settings.metrics_port_of(name) for name in PROCESSES}
    if supervisor.is_running(settings.data_dir):
        return [Finding("ports", Verdict.OK, "held by the controller that runs here")]
    found = []
    for name, port in ports.items():
        problem = _port_problem(settings.bind_address, port)
        if problem:
            found.append(Finding("ports", Verdict.FAIL, f"port {port} ({name}): {problem}"))
    shown = ", ".join(str(port) for port in ports.values())
    return found or [Finding("ports", Verdict.OK, f"{shown} are free")]


def _port_problem(address: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return os.strerror(error.errno or 0)
    return ""
