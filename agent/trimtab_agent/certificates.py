"""The host's own certificates: where they lie, when they are renewed, and how that disturbs nobody.

`<config dir>/ca.pem` (every CA that is trusted) and `<config dir>/identity.pem` (the agent's key and certificate in one file, so that
they are replaced at once). libvirt's are in `libvirt_tls.py`. New keys are made for each renewal and never leave the host.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from trimtab_protos.errors import Internal, InvalidRequest
from trimtab_protos.messages import Certificate
from trimtab_protos.tls import Credentials

CA_FILE = "ca.pem"
IDENTITY_FILE = "identity.pem"
PURPOSE_AGENT = "agent"
PURPOSE_LIBVIRT = "libvirt"
LIBVIRT_KEY_BITS = 2048
"""RSA, since GnuTLS in libvirt and QEMU wants key encipherment, which EC certificates refuse."""


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """A new key and the certificate request that proves it."""

    key_pem: bytes
    csr_pem: str


def new_agent_request() -> KeyRequest:
    return _request(ec.generate_private_key(ec.SECP256R1()))


def new_libvirt_request() -> KeyRequest:
    return _request(rsa.generate_private_key(public_exponent=65537, key_size=LIBVIRT_KEY_BITS))


def _request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> KeyRequest:
    # No names: the controller decides who the holder is.
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return KeyRequest(key_pem, csr.public_bytes(serialization.Encoding.PEM).decode())


class CredentialSource(Protocol):
    """Where the agent's proof of itself comes from; thread-safe."""

    def current(self) -> Credentials: ...

    def replace(self, credentials: Credentials) -> None:
        """Put renewed credentials into force."""


class FixedCredentials:
    """Credentials in memory, for simulated hosts and tests."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def current(self) -> Credentials:
        return self._credentials

    def replace(self, credentials: Credentials) -> None:
        self._credentials = credentials


class IdentityFiles:
    """The agent's credentials on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] = ()
        self._credentials: Credentials | None = None

    def exists(self) -> bool:
        return (self.directory / IDENTITY_FILE).exists()

    def current(self) -> Credentials:
        """Return what the files say; they are read again when they changed. InvalidRequest(`credentials-unreadable`)."""
        with self._lock:
            try:
                stamp = tuple(
                    value
                    for name in (CA_FILE, IDENTITY_FILE)
                    for status in ((self.directory / name).stat(),)
                    for value in (status.st_mtime_ns, status.st_ino)
                )
                if self._credentials is None or stamp != self._stamp:
                    ca_pem = (self.directory / CA_FILE).read_bytes()
                    self._credentials = parse_identity(ca_pem, (self.directory / IDENTITY_FILE).read_bytes())
                    self._stamp = stamp
            except OSError as error:
                raise InvalidRequest(
                    "credentials-unreadable", f"the agent's certificate in {self.directory} cannot be read: {error}"
                ) from error
            return self._credentials

    def replace(self, credentials: Credentials) -> None:
        """Store new credentials. The CA first: a certificate of a new CA is of no use without it."""
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._lock:
            write_file(self.directory / CA_FILE, credentials.ca_pem, mode=0o644)
            identity = credentials.key_pem.rstrip() + b"\n" + credentials.certificate_pem
            write_file(self.directory / IDENTITY_FILE, identity, mode=0o600)


def parse_identity(ca_pem: bytes, identity_pem: bytes) -> Credentials:
    """Split key and certificate of an identity file and check that they belong together."""
    key_pem, begin, rest = identity_pem.partition(b"-----BEGIN CERTIFICATE-----")
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
        credentials = Credentials(ca_pem, begin + rest, key_pem)
        certificate = credentials.certificate()
    except ValueError as error:
        raise InvalidRequest("credentials-unreadable", "the agent's identity file is damaged; join again") from error
    if key.public_key() != certificate.public_key():
        raise Internal("credentials-torn", "the agent's key and certificate do not belong together; join again")
    return credentials


def write_file(path: Path, content: bytes, *, mode: int) -> None:
    """Replace a file at once and durably: a reader sees the old or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def report(purpose: str, certificate_pem: bytes) -> Certificate:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return Certificate(
        purpose=purpose,
        serial=f"{certificate.serial_number:x}",
        not_after_s=int(certificate.not_valid_after_utc.timestamp()),
    )


def is_past_half_life(certificate_pem: bytes, *, now: datetime) -> bool:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return now >= certificate.not_valid_before_utc + life / 2


def life_s(certificate_pem: bytes) -> float:
    """Return for how long the certificate was made, seconds."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()


CertificateReports = Callable[[], Sequence[Certificate]]
