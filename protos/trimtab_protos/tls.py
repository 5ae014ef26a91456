"""Mutual TLS as both sides use it: credentials from PEM, channel and server options, and who the peer is.

Everybody's certificate is of the fleet's CA and says who its holder is by one DNS name in its SAN: a host's is its host id, the
controller's is `trimtab-controller`. Addresses prove nothing: clients override the name they expect with the peer's identity.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from trimtab_protos.errors import Internal, InvalidRequest, PermissionDenied

# gRPC's newer event engine wakes a pool of threads for every message; its older poller lets the thread that waits for a message read
# it. Heartbeats that come one by one cost half as much CPU by it, on both sides, and calls a quarter less (docs/benchmarks.md).
# Read when the first channel or server is made, which needs this module; whoever sets the variable has the last word.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

CONTROLLER_NAME = "trimtab-controller"
HOST_ID_PREFIX = "host-"

MAX_MESSAGE_BYTES = 16 << 20
"""Both ways; gRPC's own default refuses what it receives above 4 MiB, and an inventory with many domains can be larger."""

KEEPALIVE_TIME_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
SERVER_MIN_PING_INTERVAL_MS = 10_000
"""A server closes the connection of a client that pings faster (`too_many_pings`), so it must stay below KEEPALIVE_TIME_MS."""
SERVER_KEEPALIVE_TIME_MS = 30_000
MAX_CONNECTION_AGE_MS = 3_600_000
MAX_CONNECTION_AGE_GRACE_MS = 60_000

Options = tuple[tuple[str, int | str], ...]

_SIZE_OPTIONS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


class AuthContext(Protocol):
    """What the servicer contexts of the sync and the aio API share."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]: ...


@dataclass(frozen=True, slots=True)
class Credentials:
    """One side's proof of who it is, and whom it believes. PEM throughout."""

    ca_pem: bytes
    """Every CA that is trusted now: one, or two during a rotation."""
    certificate_pem: bytes
    key_pem: bytes

    @property
    def ca_bundle_sha256(self) -> str:
        """Hex over the bundle's bytes, as the gateway's Welcome carries it."""
        return hashlib.sha256(self.ca_pem).hexdigest()

    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate_pem)

    def for_channel(self) -> grpc.ChannelCredentials:
        """Return credentials for a client. gRPC never reloads these: build a new channel when the certificate changes."""
        return grpc.ssl_channel_credentials(self.ca_pem, self.key_pem, self.certificate_pem)


def load_credentials(*, ca_path: Path, certificate_path: Path, key_path: Path) -> Credentials:
    """Return the credentials in these files.

    Internal(`credentials-torn`): key and certificate do not belong together; a writer is between the two files, read again.
    InvalidRequest(`credentials-unreadable`): a file is missing or is not PEM.
    """
    try:
        credentials = Credentials(ca_path.read_bytes(), certificate_path.read_bytes(), key_path.read_bytes())
        public_key = credentials.certificate().public_key()
        key = load_pem_private_key(credentials.key_pem, password=None)
        x509.load_pem_x509_certificates(credentials.ca_pem)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            "credentials-unreadable", f"certificate {certificate_path} or its key or CA cannot be read: {error}"
        ) from error
    if not isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)) or key.public_key() != public_key:
        raise Internal("credentials-torn", f"{key_path} is not the key of {certificate_path}")
    return credentials


def fingerprint(certificate: x509.Certificate) -> str:
    """Return `sha256:<64 hex>` of the certificate's DER, as join commands carry it."""
    return "sha256:" + certificate.fingerprint(hashes.SHA256()).hex()


def bundle_has_fingerprint(ca_bundle_pem: bytes, expected: str) -> bool:
    """Tell whether a CA of the bundle has this fingerprint. InvalidRequest where the bundle or the fingerprint is malformed."""
    algorithm, _, digest = expected.strip().lower().partition(":")
    if algorithm != "sha256" or len(digest) != 64 or any(letter not in "0123456789abcdef" for letter in digest):
        raise InvalidRequest(
            "fingerprint-malformed",
            "the CA fingerprint must be sha256: and 64 hex digits, as printed by `trimtab host token create`",
        )
    try:
        authorities = x509.load_pem_x509_certificates(ca_bundle_pem)
    except ValueError as error:
        raise InvalidRequest("ca-bundle-malformed", "the controller's CA bundle is not PEM") from error
    return any(fingerprint(authority) == f"sha256:{digest}" for authority in authorities)


def channel_options(peer_name: str, *, is_own_connection: bool = False) -> Options:
    """Return options for a client that expects `peer_name` (a host id or CONTROLLER_NAME) whatever address it dials.

    `is_own_connection`: do not share a connection with another channel of this process to the same address; needed where one
    process plays many hosts, since they would otherwise all speak through the first one's certificate.
    """
    return (
        ("grpc.ssl_target_name_override", peer_name),
        ("grpc.default_authority", peer_name),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # The back-off after a failed dial defaults to up to 120 s; a lease is 15 s.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 3000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", int(is_own_connection)),
        *_SIZE_OPTIONS,
    )


def server_options(*, max_connection_age_ms: int = MAX_CONNECTION_AGE_MS) -> Options:
    """Return options for a server. Its connections are closed after an hour, so that revoked or replaced certificates end."""
    return (
        ("grpc.http2.min_ping_interval_without_data_ms", SERVER_MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", SERVER_KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.max_connection_age_ms", max_connection_age_ms),
        ("grpc.max_connection_age_grace_ms", MAX_CONNECTION_AGE_GRACE_MS),
        # Two processes that bind one port would share its connections silently.
        ("grpc.so_reuseport", 0),
        *_SIZE_OPTIONS,
    )


def server_credentials(fetch: Callable[[], Credentials]) -> grpc.ServerCredentials:
    """Return credentials that ask `fetch` at every new connection, so that renewal needs no restart.

    Client certificates of the fleet's CA are required. `fetch` runs in a thread of gRPC's; when it fails, the last good
    credentials stay in force, since raising would break the handshake.
    """
    last = fetch()

    def configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
        pair = (credentials.key_pem, credentials.certificate_pem)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=credentials.ca_pem)

    def current() -> grpc.ServerCertificateConfiguration:
        nonlocal last
        try:
            last = fetch()
        except (Internal, InvalidRequest, OSError):
            return configuration(last)
        return configuration(last)

    return grpc.dynamic_ssl_server_credentials(configuration(last), current, require_client_authentication=True)


def peer_names(context: AuthContext) -> frozenset[str]:
    """Return the DNS names in the SAN of the peer's certificate; empty for a peer without one (an in-process test server)."""
    return frozenset(name.decode() for name in context.auth_context().get("peer_dns", ()))


def peer_host_id(context: AuthContext) -> str:
    """Return the host id that the peer's certificate proves. PermissionDenied where it is no host's."""
    host_ids = [name for name in peer_names(context) if name.startswith(HOST_ID_PREFIX)]
    if len(host_ids) != 1:
        raise PermissionDenied("peer-not-a-host", "only a host of the fleet may call this")
    return host_ids[0]


def require_controller(context: AuthContext) -> None:
    """Raise PermissionDenied unless the peer's certificate names the controller."""
    if CONTROLLER_NAME not in peer_names(context):
        raise PermissionDenied("peer-not-the-controller", "only the fleet's controller may call this")
