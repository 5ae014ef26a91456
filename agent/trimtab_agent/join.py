"""Makes this machine a host of a fleet: `check` shows every change and every refusal, `join` makes the changes.

    fetch /v1/join ─► CA's fingerprint ─► CheckJoin ─► Join (token used up, identity stored) ─► host set up ─► agent started

The first fetch trusts nobody: what it brings counts only where its CA has the fingerprint of the paste line. After `Join` answered,
everything that follows is local and may be repeated; a join that was cut there goes on without a token.
"""

import errno
import ipaddress
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_OID, uuid5

import grpc
import tenacity
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from trimtab_agent import config
from trimtab_agent.certificates import IdentityFiles, new_agent_request, new_libvirt_request, write_file
from trimtab_agent.host_setup import AGENT_UNIT, BEACON_UNIT, WARDEN_UNIT, HostSetup, restart_libvirtd
from trimtab_agent.libvirt_tls import LibvirtCertificates
from trimtab_agent.systemd import Systemctl
from trimtab_agent.undo import UndoLog
from trimtab_agent.version import agent_version
from trimtab_protos import status, tls
from trimtab_protos.controller.v1 import join_service_pb2 as pb
from trimtab_protos.controller.v1.join_service_pb2_grpc import JoinServiceStub
from trimtab_protos.errors import Conflict, InvalidRequest, PermissionDenied, TrimtabError, Unavailable

ROUTE_PATIENCE_S = 8.0
"""Of a host whose link has just come up the kernel says for some seconds that there is no way to the neighbour that it looks for."""
FETCH_TIMEOUT_S = 10.0
FETCH_MAX_BYTES = 1 << 20
CALL_TIMEOUT_S = 20.0
CLOCK_SKEW_MAX_S = 2.0
STATE_DIRECTORY = "var/lib/trimtab"
CERTIFICATE_DIRECTORY = "etc/trimtab"


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """What the paste line and its flags say."""

    url: str
    token: str
    ca_fingerprint: str
    name: str = ""
    """Empty: the name that the token is for."""
    address: str = ""
    """Address at which the controller reaches this host; empty: the one from which this host reaches the controller."""
    migration_address: str = ""
    """Empty: the same."""
    agent_port: int = config.AGENT_PORT
    metrics_port: int = config.METRICS_PORT
    lease_fencing: bool | None = None
    """None: armed while the beacon renews."""
    beacon: bool = True
    root: Path = Path("/")
    """Another one in tests: every file is below it."""


@dataclass(frozen=True, slots=True)
class FleetPlace:
    """Where the fleet is, proven by its CA's fingerprint."""

    ca_pem: bytes
    join_addresses: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """What a join would do. It is refused unless `refusals` is empty."""

    changes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skew_s: float = 0.0


class Joiner:
    """One machine's way into a fleet."""

    def __init__(self, options: JoinOptions, *, systemctl: Systemctl, tell: Callable[[str], None] = lambda _line: None) -> None:
        """`tell` gets a line for people at each thing done."""
        self._options = options
        self._systemctl = systemctl
        self._tell = tell
        root = options.root
        self._state = root / STATE_DIRECTORY
        self._identity = IdentityFiles(root / CERTIFICATE_DIRECTORY)
        self._undo = UndoLog(self._state / "undo.json", root=root)
        self._libvirt = LibvirtCertificates(root)
        self._configuration = self._state / "agent.toml"
        self._answer_path = self._state / "join.json"
        self._setup = HostSetup(
            root=root, undo=self._undo, systemctl=systemctl, configuration=Path("/") / STATE_DIRECTORY / "agent.toml"
        )

    def check(self) -> Report:
        """Return every change and refusal; nothing is changed, the token stays unused. Raises where no fleet answers."""
        report = Report(notes=self._notes())
        report.refusals += self._local_refusals()
        self._refuse_other_fleet()
        place = self._find_fleet()
        if not self._is_cut_short():
            report.changes.append(f"store the host's identity in /{CERTIFICATE_DIRECTORY} and its state in /{STATE_DIRECTORY}")
            answer, report.skew_s = self._ask_to_check(place)
            report.refusals += answer
        report.changes += [change.what for change in self._setup.changes() if not change.is_done()]
        if any(change.restarts_libvirtd and not change.is_done() for change in self._setup.changes()):
            report.changes.append("restart libvirtd (guests go on running)")
        return report

    def join(self) -> str:
        """Join, or finish a join that was cut short; return the host id. Idempotent for a member."""
        self._refuse_other_fleet()
        if self._configuration.exists() and not self._has_lapsed():
            self._tell(f"this host is {self._own_id()} of this fleet already")
            self._set_up()
            return self._own_id()
        refusals = self._local_refusals()
        if refusals:
            raise Conflict("join-refused", refusals[0], refusals=len(refusals))
        if not self._is_cut_short():
            self._enter(self._find_fleet())
        self._set_up()
        return self._own_id()

    # The fleet.

    def _find_fleet(self) -> FleetPlace:
        document = fetch_join_document(self._options.url)
        ca_pem = str(document.get("ca_bundle_pem", "")).encode()
        if not tls.bundle_has_fingerprint(ca_pem, self._options.ca_fingerprint):
            raise PermissionDenied(
                "ca-fingerprint-differs",
                f"the controller at {self._options.url} is not of the fleet that the command was made for: its CA has another "
                "fingerprint. Copy the line from `trimtab host token create` again; if it differs still, somebody is in between",
            )
        addresses = tuple(str(address) for address in document.get("join_addresses", ()))
        if not addresses:
            raise Unavailable("join-addresses-missing", f"the controller at {self._options.url} tells no address to join at")
        return FleetPlace(ca_pem, addresses)

    def _ask_to_check(self, place: FleetPlace) -> tuple[list[str], float]:
        """Return the controller's refusals and this clock's offset from its own, seconds."""
        began_ms = time.time() * 1000
        request = pb.CheckJoinRequest(token=self._options.token, facts=self._facts(place))
        answer = _call(place, lambda stub: stub.CheckJoin(request, timeout=CALL_TIMEOUT_S))
        middle_ms = (began_ms + time.time() * 1000) / 2
        skew_s = (middle_ms - answer.controller_unix_ms) / 1000
        refusals = list(answer.refusals)
        if abs(skew_s) > CLOCK_SKEW_MAX_S and not any("clock" in refusal for refusal in refusals):
            refusals.append(
                f"this host's clock is {skew_s:+.1f} s off the controller's; at most {CLOCK_SKEW_MAX_S:g} s: run a time service"
            )
        return refusals, skew_s

    def _enter(self, place: FleetPlace) -> None:
        refusals, _skew_s = self._ask_to_check(place)
        if refusals:
            raise Conflict("join-refused", refusals[0], refusals=len(refusals))
        agent, libvirt = new_agent_request(), new_libvirt_request()
        request = pb.JoinRequest(
            token=self._options.token,
            facts=self._facts(place),
            agent_csr_pem=agent.csr_pem,
            libvirt_csr_pem=libvirt.csr_pem,
        )
        if self._identity.exists():
            previous = self._identity.current()
            request.previous_certificate_pem = previous.certificate_pem.decode()
            request.rejoin_proof = prove(previous.key_pem, token=self._options.token, csr_pem=agent.csr_pem)
        answer = _call(place, lambda stub: stub.Join(request, timeout=CALL_TIMEOUT_S))
        self._tell(f"the fleet took this host in as {answer.host_id}")
        self._store(answer, agent_key_pem=agent.key_pem, libvirt_key_pem=libvirt.key_pem, facts=request.facts)

    def _store(self, answer: pb.JoinResponse, *, agent_key_pem: bytes, libvirt_key_pem: bytes, facts: pb.HostFacts) -> None:
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (*(self._identity.directory / name for name in ("ca.pem", "identity.pem")), *self._libvirt.links()):
            self._undo.remember_path(path)
        ca_pem = answer.ca_bundle_pem.encode()
        # The identity last: with it and the answer on disk the rest needs no controller.
        self._libvirt.install(ca_pem=ca_pem, certificate_pem=answer.libvirt_certificate_pem.encode(), key_pem=libvirt_key_pem)
        told = {
            "host_id": answer.host_id,
            "gateway_addresses": list(answer.gateway_addresses),
            "agent_address": facts.agent_address,
            "migration_address": facts.migration_address,
        }
        write_file(self._answer_path, json.dumps(told).encode(), mode=0o600)
        self._identity.replace(tls.Credentials(ca_pem, answer.agent_certificate_pem.encode(), agent_key_pem))

    # This machine.

    def _set_up(self) -> None:
        must_restart = False
        for change in self._setup.changes():
            if change.is_done():
                continue
            change.apply()
            self._tell(change.what)
            must_restart |= change.restarts_libvirtd
        if must_restart:
            restart_libvirtd(self._systemctl)
            self._tell("libvirtd restarted (guests went on running)")
        if self._is_cut_short():
            self._write_configuration()
        for unit in (WARDEN_UNIT, BEACON_UNIT, AGENT_UNIT):
            self._systemctl.run("start", unit)

    def _write_configuration(self) -> None:
        told = json.loads(self._answer_path.read_text())
        address = told["agent_address"].rpartition(":")[0]
        family = "[::]" if address.startswith("[") else "0.0.0.0"  # noqa: S104 peers and controller reach it by any address
        values: dict[str, Any] = {
            **told,
            "listen_address": f"{family}:{self._options.agent_port}",
            "metrics_address": f"{family}:{self._options.metrics_port}",
            "lease_fencing": {None: "auto", True: "on", False: "off"}[self._options.lease_fencing],
            "beacon": self._options.beacon,
        }
        self._undo.remember_path(self._configuration)
        write_file(self._configuration, config.render(values).encode(), mode=0o600)
        self._answer_path.unlink()
        self._tell(f"wrote /{STATE_DIRECTORY}/agent.toml")

    def _facts(self, place: FleetPlace) -> pb.HostFacts:
        options = self._options
        address = options.address or _own_address(place.join_addresses[0])
        return pb.HostFacts(
            name=options.name,
            machine_id=self._read("etc/machine-id"),
            smbios_uuid=self._smbios_uuid(),
            agent_version=agent_version(),
            agent_address=f"[{address}]:{options.agent_port}" if ":" in address else f"{address}:{options.agent_port}",
            migration_address=options.migration_address or address,
            sent_unix_ms=time.time_ns() // 1_000_000,
            previous_host_id=self._own_id() if self._identity.exists() else "",
        )

    def _smbios_uuid(self) -> str:
        """The firmware's UUID; a machine without firmware tables gets one that its machine-id decides."""
        found = self._read("sys/class/dmi/id/product_uuid")
        return found or str(uuid5(NAMESPACE_OID, self._read("etc/machine-id")))

    def _read(self, name: str) -> str:
        path = self._options.root / name
        return path.read_text().strip() if path.exists() else ""

    def _own_id(self) -> str:
        certificate = self._identity.current().certificate()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return str(names.get_values_for_type(x509.DNSName)[0])

    def _is_cut_short(self) -> bool:
        """Tell whether the fleet took this host in and the local part is not finished."""
        return self._identity.exists() and self._answer_path.exists()

    def _has_lapsed(self) -> bool:
        certificate = self._identity.current().certificate()
        return certificate.not_valid_after_utc.timestamp() < time.time()

    # What stands against it.

    def _refuse_other_fleet(self) -> None:
        """Raise Conflict where this host is a member elsewhere. One that lapsed may have missed a rotation of its fleet's CA:
        whether it was a member there is then for the controller to say, which wants a proof of it."""
        if not self._identity.exists() or self._has_lapsed():
            return
        ca_pem = (self._identity.directory / "ca.pem").read_bytes()
        if not tls.bundle_has_fingerprint(ca_pem, self._options.ca_fingerprint):
            raise Conflict(
                "member-of-another-fleet",
                f"this host is {self._own_id()} of another fleet; leave that one first with `trimtab-agent leave`",
            )

    def _local_refusals(self) -> list[str]:
        root = self._options.root
        refusals = []
        if root == Path("/") and os.geteuid() != 0:
            refusals.append("joining changes libvirt's settings and needs root")
        if not (root / "usr/sbin/libvirtd").exists():
            refusals.append("libvirtd is not installed: install libvirt-daemon-system and qemu-system-x86")
        if not self._read("etc/machine-id"):
            refusals.append("/etc/machine-id is missing: run systemd-machine-id-setup")
        if self._options.migration_address and not _is_ip(self._options.migration_address):
            refusals.append("--migration-address must be an IP address: names fail when it matters")
        if self._options.address and not _is_ip(self._options.address):
            refusals.append("--address must be an IP address of this host")
        if not self._configuration.exists():
            refusals += self._taken_ports()
        return refusals

    def _taken_ports(self) -> list[str]:
        wanted = {
            self._options.agent_port: "the agent",
            self._options.metrics_port: "the agent's metrics",
        }
        return [f"TCP port {port}, for {whom}, is in use by another program" for port, whom in wanted.items() if _is_taken(port)]

    def _notes(self) -> list[str]:
        notes = []
        base = self._options.root / "etc/libvirt/qemu"
        for directory, noun in ((base / "autostart", "domain"), (base / "networks/autostart", "network")):
            names = sorted(path.stem for path in directory.glob("*.xml"))
            if names:
                notes.append(f"libvirt starts at boot, and goes on doing so: {noun} {', '.join(names)}")
        return notes


# --- parts without state -------------------------------------------------------------------------------------------------


def fetch_join_document(url: str) -> dict[str, Any]:
    """Return the controller's `/v1/join`. Its certificate is not looked at: the caller compares the CA's fingerprint."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise InvalidRequest("url-malformed", "the controller's URL must be https, as in https://192.0.2.1:8443", field="url")
    address = f"{url.rstrip('/')}/v1/join"
    try:
        document = json.loads(_read(address))
    except (OSError, ValueError) as error:
        raise Unavailable(
            "controller-unreachable", f"{address} does not answer as a controller does: {error}", url=url
        ) from error
    if not isinstance(document, dict):
        raise Unavailable("controller-unreachable", f"{address} does not answer as a controller does", url=url)
    return document


def _has_no_route(error: BaseException) -> bool:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(reason, OSError) and reason.errno in {errno.EHOSTUNREACH, errno.ENETUNREACH}


@tenacity.retry(
    retry=tenacity.retry_if_exception(_has_no_route),
    stop=tenacity.stop_after_delay(ROUTE_PATIENCE_S),
    wait=tenacity.wait_fixed(1),
    reraise=True,
)
def _read(address: str) -> bytes:
    context = ssl._create_unverified_context()  # noqa: S323 see `fetch_join_document`
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    with urllib.request.build_opener(*handlers).open(address, timeout=FETCH_TIMEOUT_S) as answer:
        return bytes(answer.read(FETCH_MAX_BYTES))


def prove(previous_key_pem: bytes, *, token: str, csr_pem: str) -> bytes:
    """Return the signature by which a lapsed host shows that it holds its previous key."""
    key = load_pem_private_key(previous_key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidRequest("previous-key-refused", "the previous identity is not an agent's; leave, then join anew")
    return key.sign(token.encode() + csr_pem.encode(), ec.ECDSA(hashes.SHA256()))


def _call(place: FleetPlace, call: Callable[[JoinServiceStub], Any]) -> Any:
    """Call the first join address that can be reached. An address that may have acted is the last one tried."""
    credentials = grpc.ssl_channel_credentials(place.ca_pem)
    failed: TrimtabError | None = None
    for address in place.join_addresses:
        options = tls.channel_options(tls.CONTROLLER_NAME, is_own_connection=True)
        with grpc.secure_channel(address, credentials, options=options) as channel:
            try:
                return call(JoinServiceStub(channel))
            except grpc.RpcError as error:
                failed = status.from_rpc_error(error, peer=f"the controller at {address}")
                if failed.code != "peer-unreachable":
                    raise failed from error
    assert failed is not None
    raise failed


def _own_address(join_address: str) -> str:
    """Return the address from which this host reaches the controller. No packet is sent."""
    host, _, port = join_address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))
        except OSError as error:
            raise Unavailable(
                "no-route", f"this host has no route to {join_address}; give --address", address=join_address
            ) from error
        return str(probe.getsockname()[0])


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 to learn whether anybody listens, on any address
        except OSError:
            return True
    return False


def lines_of(report: Report) -> Sequence[str]:
    """Return the report for people."""
    lines = ["This would be changed:", *(f"  - {change}" for change in report.changes)]
    lines += ["Worth knowing:", *(f"  - {note}" for note in report.notes)] if report.notes else []
    lines += [f"The clocks differ by {abs(report.skew_s):.2f} s."]
    if report.refusals:
        return [*lines, "The join is refused:", *(f"  - {refusal}" for refusal in report.refusals)]
    return [*lines, "Nothing stands against the join."]
