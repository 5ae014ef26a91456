"""Tries the ways from this host to another: agent, libvirt, migration ports, size of packets, rate, clock.

Nothing listens for it and nothing stays: the agent's own port carries the rate, libvirt's port is spoken to as a migration would, and
of the migration's range it is enough to be refused by the host itself, since only a firewall lets a packet vanish.
"""

import contextlib
import errno
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from trimtab_agent.certificates import CredentialSource
from trimtab_protos import status, tls
from trimtab_protos.agent.v1 import network_service_pb2 as pb
from trimtab_protos.agent.v1.network_service_pb2_grpc import ProbeServiceStub
from trimtab_protos.network_messages import Peer, PeerFinding

AGENT_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
ECHO_TIMEOUT_S = 0.5
ECHO_TRIES = 2
"""Of the size that should pass; smaller ones are tried once, to say how far it is off."""
LIBVIRT_TLS_PORT = 16514
MIGRATION_PORTS = (49152, 49215)
"""The ends of QEMU's range; a firewall that opens one and not the other is as wrong as one that opens none."""
_SMALLEST_MTU = 576
_COMMON_MTUS = (9000, 8950, 4000, 1500, 1450, 1400, 1280, 576)
_IP_HEADER, _ICMP_HEADER = 20, 8
_NO_WAY = frozenset({errno.EMSGSIZE, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN})
"""A packet of the size does not leave, or nobody is there to answer: something met on the way, and no failure of the look."""
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO, _IP_MTU = 10, 2, 14
_LIBVIRT_PKI = Path("/etc/pki")


@dataclass(frozen=True, slots=True)
class PeerCheck:
    """What of this host takes part in a check. Thread-safe."""

    credentials: CredentialSource | None
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    pki: Path = _LIBVIRT_PKI
    monotonic_s: Callable[[], float] = time.monotonic
    """What the rate is measured by."""
    agent_timeout_s: float = AGENT_TIMEOUT_S

    def run(self, peer: Peer, rate_bytes: int) -> PeerFinding:
        """Return what was met on the way to the peer; takes up to a quarter of a minute where nothing answers."""
        agent_problem, ahead_ms, rate_bytes_s = self._ask_agent(peer, rate_bytes)
        if not peer.migration_address:
            return PeerFinding(
                host_id=peer.host_id,
                agent_problem=agent_problem,
                rate_bytes_s=rate_bytes_s,
                clock_ahead_ms=ahead_ms or 0,
                has_clock=ahead_ms is not None,
            )
        mtu = _mtu_towards(peer.migration_address)
        return PeerFinding(
            host_id=peer.host_id,
            agent_problem=agent_problem,
            libvirt_problem=self._greet_libvirt(peer.migration_address),
            migration_problem=_knock(peer.migration_address),
            mtu=mtu,
            mtu_passed=_largest_echo(peer.migration_address, mtu),
            rate_bytes_s=rate_bytes_s,
            clock_ahead_ms=ahead_ms or 0,
            has_clock=ahead_ms is not None,
        )

    def _ask_agent(self, peer: Peer, rate_bytes: int) -> tuple[str, int | None, int]:
        """Return (problem, how far its clock is ahead, bytes per second) of the peer's agent."""
        options = tls.channel_options(peer.host_id, is_own_connection=True)
        if self.credentials is None:
            channel = grpc.insecure_channel(peer.agent_address, options=options)
        else:
            channel = grpc.secure_channel(peer.agent_address, self.credentials.current().for_channel(), options=options)
        with contextlib.closing(channel):
            try:
                grpc.channel_ready_future(channel).result(timeout=self.agent_timeout_s)
                stub, sent_ms = ProbeServiceStub(channel), self.now_ms()
                call = stub.ReadProbe(pb.ReadProbeRequest(size_bytes=rate_bytes), timeout=self.agent_timeout_s)
                first = next(iter(call))
                ahead_ms = first.now_ms - (sent_ms + self.now_ms()) // 2
                began_s, received = self.monotonic_s(), 0
                for message in call:
                    received += len(message.content)
                elapsed_s = max(self.monotonic_s() - began_s, 1e-6)
                return "", ahead_ms, int(received / elapsed_s)
            except grpc.FutureTimeoutError:
                return f"no agent answered at {peer.agent_address} within {self.agent_timeout_s:g} s", None, 0
            except grpc.RpcError as error:
                return status.from_rpc_error(error, peer=f"host {peer.host_id}").message, None, 0

    def _greet_libvirt(self, address: str) -> str:
        """Return why libvirt's TLS port did not take this host's certificate, '' where it did."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(self.pki / "CA/cacert.pem")
            context.load_cert_chain(self.pki / "libvirt/clientcert.pem", self.pki / "libvirt/private/clientkey.pem")
        except OSError as error:
            return f"this host has no certificate for libvirt: {error}"
        try:
            with (
                socket.create_connection((address, LIBVIRT_TLS_PORT), timeout=CONNECT_TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=address) as secured,
            ):
                # One byte says that the server took our certificate too, or the end of the connection that it did not.
                return "" if secured.recv(1) == b"\x01" else "libvirt there did not take this host's certificate"
        except ssl.SSLError as error:
            return f"TLS with libvirt failed: {error.reason or error}"
        except OSError as error:
            return f"port {LIBVIRT_TLS_PORT}: {_reason(error)}"


def _knock(address: str) -> str:
    """Return why a port of the migration's range is out of reach; a host that refuses by itself was reached."""
    for port in MIGRATION_PORTS:
        try:
            with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S):
                pass
        except ConnectionRefusedError:
            pass
        except OSError as error:
            return f"port {port}: {_reason(error)}"
    return ""


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _mtu_towards(address: str) -> int:
    """Return the MTU of the link that packets to the address leave by; 0 where there is no way."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return int(probe.getsockopt(socket.IPPROTO_IP, _IP_MTU)) if probe.family == socket.AF_INET else 0
    except OSError:
        return 0


def _largest_echo(address: str, mtu: int) -> int:
    """Return the largest packet of the common sizes that comes back uncut; 0 where none does, or of IPv6."""
    if mtu < _SMALLEST_MTU or _family(address) != socket.AF_INET:
        return 0
    sizes = [*[mtu] * ECHO_TRIES, *(size for size in _COMMON_MTUS if size < mtu)]
    return next((size for size in sizes if _echoes(address, size)), 0)


def _echoes(address: str, size: int) -> bool:
    """Tell whether an ICMP echo of `size` bytes, headers counted, comes back without being cut up on its way."""
    ours = int.from_bytes(os.urandom(2), "big")
    payload = os.urandom(8) + bytes(size - _IP_HEADER - _ICMP_HEADER - 8)
    request = struct.pack("!BBHHH", 8, 0, _checksum(struct.pack("!BBHHH", 8, 0, 0, ours, 1) + payload), ours, 1) + payload
    deadline = time.monotonic() + ECHO_TIMEOUT_S
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as echo:
            echo.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
            echo.sendto(request, (address, 0))
            while (left_s := deadline - time.monotonic()) > 0:
                echo.settimeout(left_s)
                answer, source = echo.recvfrom(65535)
                body = answer[(answer[0] & 15) * 4 :]
                if source[0] == address and body[0] == 0 and body[4:6] == ours.to_bytes(2, "big"):
                    return len(answer) == size and body[8:16] == payload[:8]
    except TimeoutError:
        return False
    except OSError as error:
        if error.errno in _NO_WAY:
            return False
        raise
    return False


def _checksum(packet: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(packet) // 2}H", packet[: len(packet) // 2 * 2]))
    total += packet[-1] << 8 if len(packet) % 2 else 0
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
