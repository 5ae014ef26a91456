"""Each look at the way to another host over real sockets, and what is made of it: named, with its cure.

The peer is a real agent, libvirt's port a TLS server that asks for certificates as libvirtd does, and a narrow way is a link of two
MTUs between network namespaces.
"""

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from tests.unit.agent.factories import ca_pem, host_credentials, new_fleet_authority
from tests.unit.agent.servicer_kit import Host, World, world
from trimtab_agent.certificates import FixedCredentials, new_libvirt_request
from trimtab_agent.libvirt_tls import LibvirtCertificates
from trimtab_agent.packets import RATE_BYTES_MAX
from trimtab_agent.peer_check import LIBVIRT_TLS_PORT, PeerCheck
from trimtab_controller.core import host_check
from trimtab_controller.pki import SigningAuthority
from trimtab_protos.codec import from_json
from trimtab_protos.network_messages import Peer, PeerFinding

__all__ = ["world"]

# Addresses of the loopback device that nothing else listens on.
ADDRESS, SILENT_ADDRESS = "127.0.0.88", "127.0.0.89"
RATE_BYTES = 1 << 20
WAIT_S = 10.0


def certificates(authority: SigningAuthority, host_id: str, root: Path) -> Path:
    """Put libvirt's certificates of a host below `root` as its join does; return its /etc/pki."""
    request = new_libvirt_request()
    issued = authority.sign_libvirt(request.csr_pem, host_id, ADDRESS, now=datetime.now(UTC), life=timedelta(hours=1))
    files = LibvirtCertificates(root)
    for path, target in files.links().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    files.install(ca_pem=ca_pem(authority), certificate_pem=issued.pem.encode(), key_pem=request.key_pem)
    return root / "etc/pki"


class Libvirtd:
    """libvirt's TLS port: says one byte to whoever shows a certificate that it trusts, and hangs up on everybody else."""

    def __init__(self, pki: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pki / "libvirt/servercert.pem", pki / "libvirt/private/serverkey.pem")
        self._context.load_verify_locations(pki / "CA/cacert.pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server((ADDRESS, LIBVIRT_TLS_PORT))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _peer = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(plain, server_side=True) as secured:
                    secured.send(b"\x01")
            except OSError:
                plain.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_S)


@pytest.fixture(scope="module")
def fleet() -> SigningAuthority:
    return new_fleet_authority()


@pytest.fixture
def pki(tmp_path: Path, fleet: SigningAuthority) -> Path:
    return certificates(fleet, "host-a", tmp_path / "host-a")


@pytest.fixture
def libvirtd(tmp_path: Path, fleet: SigningAuthority) -> Iterator[Libvirtd]:
    opened = Libvirtd(certificates(fleet, "host-b", tmp_path / "host-b"))
    yield opened
    opened.close()


@pytest_asyncio.fixture
async def peer(world: World) -> Host:
    return await world.start("host-b")


async def look(check: PeerCheck, agent_address: str, *, address: str = ADDRESS) -> PeerFinding:
    peer = Peer(host_id="host-b", agent_address=agent_address, migration_address=address)
    return await asyncio.to_thread(check.run, peer, RATE_BYTES)


def judged(finding: PeerFinding) -> dict[str, tuple[str, str]]:
    """Return what is said to be wrong and what cures it, by kind."""
    problems = host_check.judge(finding, seen_by="node1", peer="node2", address=ADDRESS)
    return {one.kind: (one.message, one.cure) for one in problems}


async def test_nothing_is_said_of_a_way_on_which_all_is_well(world: World, peer: Host, libvirtd: Libvirtd, pki: Path) -> None:
    check = PeerCheck(FixedCredentials(host_credentials(world.authority, "host-a")), pki=pki)
    finding = await look(check, peer.agent.address)
    assert (finding.agent_problem, finding.libvirt_problem, finding.migration_problem) == ("", "", "")
    assert finding.has_clock
    assert abs(finding.clock_ahead_ms) < host_check.SKEW_MS
    assert finding.rate_bytes_s > 0
    assert finding.mtu == finding.mtu_passed > 0
    assert judged(replace(finding, rate_bytes_s=max(finding.rate_bytes_s, host_check.SLOW_BYTES_S))) == {}


async def test_an_agent_that_is_not_there_is_named(world: World, pki: Path) -> None:
    with socket.create_server((ADDRESS, 0)) as nobody:
        address = f"{ADDRESS}:{nobody.getsockname()[1]}"
    check = PeerCheck(FixedCredentials(host_credentials(world.authority, "host-a")), pki=pki, agent_timeout_s=0.5)
    finding = await look(check, address, address="")
    assert (finding.has_clock, finding.rate_bytes_s) == (False, 0), "nothing was measured"
    message, cure = judged(finding)["agent"]
    assert f"no agent answered at {address} within 0.5 s" in message
    assert cure == "on node2: systemctl status trimtab-agent, and let node1 reach its port"


async def test_an_agent_that_does_not_take_this_hosts_certificate_is_named(peer: Host, pki: Path) -> None:
    stranger = FixedCredentials(host_credentials(new_fleet_authority(), "host-a"))
    finding = await look(PeerCheck(stranger, pki=pki, agent_timeout_s=0.5), peer.agent.address, address="")
    assert "agent" in judged(finding)
    assert not finding.has_clock


async def test_an_agent_that_answers_with_a_refusal_is_named_with_it(world: World, peer: Host, pki: Path) -> None:
    check = PeerCheck(FixedCredentials(host_credentials(world.authority, "host-a")), pki=pki)
    there = Peer(host_id="host-b", agent_address=peer.agent.address, migration_address="")
    finding = await asyncio.to_thread(check.run, there, RATE_BYTES_MAX + 1)
    assert "size_bytes must be" in judged(finding)["agent"][0]


@pytest.mark.parametrize(("ahead_ms", "said"), [(1500, "1.5 s ahead of"), (-1500, "1.5 s behind")])
async def test_a_clock_that_is_off_is_named_with_its_side(world: World, peer: Host, pki: Path, ahead_ms: int, said: str) -> None:
    now_ms = PeerCheck(None).now_ms
    credentials = FixedCredentials(host_credentials(world.authority, "host-a"))
    finding = await look(PeerCheck(credentials, now_ms=lambda: now_ms() - ahead_ms, pki=pki), peer.agent.address, address="")
    message, cure = judged(finding)["clock"]
    assert message.startswith("its clock is ")
    assert abs(finding.clock_ahead_ms - ahead_ms) < 500
    assert said.rpartition(" s ")[2] in message
    assert cure == "on node1 and node2: timedatectl set-ntp true"


@pytest.mark.parametrize(("took_s", "is_slow"), [(0.01, False), (0.5, True)])
async def test_a_rate_is_what_came_in_the_time_that_it_took(
    world: World, peer: Host, pki: Path, took_s: float, is_slow: bool
) -> None:
    at_s = iter((100.0, 100.0 + took_s))
    credentials = FixedCredentials(host_credentials(world.authority, "host-a"))
    finding = await look(PeerCheck(credentials, pki=pki, monotonic_s=lambda: next(at_s)), peer.agent.address, address="")
    assert finding.rate_bytes_s == pytest.approx(RATE_BYTES / took_s, rel=1e-6)
    found = judged(finding)
    assert ("rate" in found) is is_slow
    if is_slow:
        message, cure = found["rate"]
        assert message == "2.1 MB/s only"
        assert "ethtool" in cure


# --- libvirt's port and the migration's --------------------------------------------------------------------------------------


async def test_a_libvirt_of_another_authority_is_named(tmp_path: Path, pki: Path) -> None:
    opened = Libvirtd(certificates(new_fleet_authority(), "host-b", tmp_path / "host-b"))
    try:
        finding = await look(PeerCheck(None, pki=pki, agent_timeout_s=0.2), "unix:/nowhere")
    finally:
        opened.close()
    message, cure = judged(finding)["libvirt"]
    assert message.startswith("libvirt: TLS with libvirt failed: ")
    assert "systemctl restart trimtab-agent" in cure


async def test_a_libvirt_that_does_not_take_this_hosts_certificate_is_named(
    tmp_path: Path, fleet: SigningAuthority, libvirtd: Libvirtd
) -> None:
    """It trusts the peer, and is not trusted: its own certificate is of an authority that is no more."""
    pki = certificates(new_fleet_authority(), "host-a", tmp_path / "host-a")
    trusted = pki / "CA/cacert.pem"
    trusted.unlink()
    trusted.write_bytes(ca_pem(fleet))
    finding = await look(PeerCheck(None, pki=pki, agent_timeout_s=0.2), "unix:/nowhere")
    assert "libvirt" in judged(finding)


async def test_a_port_of_libvirt_that_nobody_listens_on_and_a_host_without_certificates_are_named(
    tmp_path: Path, pki: Path
) -> None:
    finding = await look(PeerCheck(None, pki=pki, agent_timeout_s=0.2), "unix:/nowhere", address=SILENT_ADDRESS)
    assert finding.libvirt_problem == "port 16514: connection refused"
    assert "libvirt" in judged(finding)
    without = await look(PeerCheck(None, pki=tmp_path / "nothing", agent_timeout_s=0.2), "unix:/nowhere")
    assert without.libvirt_problem.startswith("this host has no certificate for libvirt: ")


async def test_migration_ports_that_the_host_itself_refuses_are_within_reach(pki: Path) -> None:
    assert (await look(PeerCheck(None, pki=pki, agent_timeout_s=0.2), "unix:/nowhere")).migration_problem == "", (
        "no firewall is between"
    )


# --- a way with a narrow place -------------------------------------------------------------------------------------------------

WAY = """
import json, sys
from pathlib import Path
from trimtab_agent.peer_check import PeerCheck
from trimtab_protos.codec import as_json
from trimtab_protos.network_messages import Peer
check = PeerCheck(None, pki=Path(sys.argv[1]), agent_timeout_s=0.2)
print(json.dumps([as_json(check.run(Peer(host_id="host-b", agent_address="", migration_address=each), 0)) for each in sys.argv[2:]]))
"""
NARROW, NOWHERE = "192.0.2.2", "198.51.100.1"


@pytest.fixture
def peers_namespace() -> Iterator[int]:
    """A network namespace of its own: the id of the process that keeps it."""
    keeper = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo there; exec sleep 300"], stdout=subprocess.PIPE)
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == b"there\n"
    yield keeper.pid
    keeper.kill()
    keeper.wait()
    keeper.stdout.close()


def test_packets_that_do_not_pass_and_ports_without_a_way_are_named(pki: Path, peers_namespace: int) -> None:
    """This host's link takes 9000 bytes, the peer's 1500. Namespaces and raw sockets take root."""
    commands = (
        f"ip link add here mtu 9000 type veth peer name there mtu 1500 netns {peers_namespace}",
        "ip addr add 192.0.2.1/24 dev here && ip link set here up",
        f"nsenter -t {peers_namespace} -n sh -c 'ip addr add {NARROW}/24 dev there && ip link set there up'",
        f"exec {sys.executable} -c '{WAY}' {pki} {NARROW} {NOWHERE}",
    )
    done = subprocess.run(
        ["unshare", "-n", "sh", "-ec", "\n".join(commands)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    narrow, nowhere = (from_json(one, PeerFinding) for one in json.loads(done.stdout))
    assert (narrow.mtu, narrow.mtu_passed, narrow.migration_problem) == (9000, 1500, "")
    message, cure = judged(narrow)["mtu"]
    assert message == "packets of 9000 bytes do not pass uncut, 1500 bytes do"
    assert cure == f"give node1, node2 and every switch between them one MTU; on node1: ip route get {ADDRESS}"
    assert nowhere.migration_problem == "port 49152: network is unreachable"
    message, cure = judged(nowhere)["migration-ports"]
    assert message.startswith("migrations would not arrive: port 49152")
    assert cure == f"on node2: let node1 reach tcp ports 49152 to 49215 of {ADDRESS}"
