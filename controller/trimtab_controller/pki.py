"""The fleet's certificate authority: one for agents, libvirt and the controller itself; nothing is trusted that it did not sign.

Files in `<data-dir>/pki`, mode 0700: `ca.pem` (the bundle that everybody trusts), `ca-signing.pem` (key and certificate of the CA
that signs now, in one file so that they are replaced at once), `ca-next.pem` (the same of the next CA, only between the stages of
a rotation), `controller.pem` and `controller.key`.

Rotation, so that no two members ever fail to trust each other:

    begin           a new CA enters the bundle, the old one keeps signing; hosts see another bundle and renew at once
    finish, first   once every host renewed since (so trusts both), the new CA signs; hosts renew again
    finish, second  once every certificate in force is of the new CA, the old one leaves the bundle

A CA that left is kept in `ca-retired.pem`, trusted by nobody: a host that was away for the whole rotation proves with a lapsed
certificate of it who it was, and keeps its id and vms.

A certificate says who its holder is by its SAN: a host's is its host id, the controller's is `trimtab-controller`.
"""

import fcntl
import hashlib
import ipaddress
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trimtab_protos.errors import Conflict, Internal, InvalidRequest, PermissionDenied

CONTROLLER_NAME = "trimtab-controller"
CA_LIFE = timedelta(days=3650)
BACKDATED = timedelta(minutes=5)
"""Certificates are valid a little earlier than made: a host's clock may lag, and joins refuse only more than 2 s of skew."""
BACKDATED_SHARE = 10
"""At most this part of a life: one that seems half over when it is made would be renewed at once, for ever."""
RETIRED_FILE = "ca-retired.pem"
CSR_MAX_BYTES = 16_384
RSA_MIN_BITS = 2048
_CURVES = (ec.SECP256R1, ec.SECP384R1)


class Purpose(StrEnum):
    """What a host's certificate is for."""

    AGENT = "agent"
    LIBVIRT = "libvirt"


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    pem: str
    serial: str
    """Lower-case hex without leading zeros."""
    not_after: datetime


@dataclass(frozen=True, slots=True)
class SigningAuthority:
    """A CA with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def fingerprint(self) -> str:
        """`sha256:<hex>` of the certificate's DER, as join commands carry it."""
        return "sha256:" + self.certificate.fingerprint(hashes.SHA256()).hex()

    def sign_agent(self, csr_pem: str, host_id: str, *, now: datetime, life: timedelta) -> IssuedCertificate:
        """Return a certificate for an agent's key; the request's names are ignored, its holder is `host_id`."""
        key = _requested_key(csr_pem, field="agent_csr_pem")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
            raise InvalidRequest("csr-key-refused", "agent_csr_pem: the key must be EC P-256 or P-384", field="agent_csr_pem")
        names: list[x509.GeneralName] = [x509.DNSName(host_id)]
        return self._sign(key, host_id, names, now=now, life=life, is_key_encipherment=False)

    def sign_libvirt(
        self, csr_pem: str, host_id: str, migration_address: str, *, now: datetime, life: timedelta
    ) -> IssuedCertificate:
        """Return a certificate for libvirt and QEMU, which are dialled by address and whose GnuTLS wants RSA key encipherment."""
        key = _requested_key(csr_pem, field="libvirt_csr_pem")
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size < RSA_MIN_BITS:
            raise InvalidRequest(
                "csr-key-refused", "libvirt_csr_pem: the key must be RSA of 2048 bits or more", field="libvirt_csr_pem"
            )
        names: list[x509.GeneralName] = [x509.DNSName(host_id)]
        if migration_address:
            names.append(x509.IPAddress(ipaddress.ip_address(migration_address)))
        return self._sign(key, host_id, names, now=now, life=life, is_key_encipherment=True)

    def sign_controller(
        self, key: ec.EllipticCurvePublicKey, addresses: Sequence[str], *, now: datetime, life: timedelta
    ) -> IssuedCertificate:
        return self._sign(key, CONTROLLER_NAME, controller_names(addresses), now=now, life=life, is_key_encipherment=False)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        common_name: str,
        names: Sequence[x509.GeneralName],
        *,
        now: datetime,
        life: timedelta,
        is_key_encipherment: bool,
    ) -> IssuedCertificate:
        not_after = min((now + life).replace(microsecond=0), self.certificate.not_valid_after_utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, not_after) - _backdated(life))
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_key_encipherment=is_key_encipherment), critical=True)
            # Both sides of a connection dial: gateways and agents call each other, libvirt daemons as well.
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return IssuedCertificate(_pem(certificate), serial_of(certificate), not_after)


def new_authority(*, now: datetime) -> SigningAuthority:
    """Return a fresh CA. Its subject is unique: GnuTLS and OpenSSL look issuers up by name, and a bundle may hold two."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"trimtab fleet CA {secrets.token_hex(4)}")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return SigningAuthority(certificate, key)


class FleetPki:
    """The files of the fleet's PKI on this node. Reads are cheap; writers take a lock, so several processes may call at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # What is in force.

    def exists(self) -> bool:
        return (self.directory / "ca-signing.pem").exists()

    def bundle_pem(self) -> str:
        return (self.directory / "ca.pem").read_text()

    def bundle_sha256(self) -> str:
        """Hex over the bundle's bytes as agents store them; another value tells a host to renew."""
        return hashlib.sha256((self.directory / "ca.pem").read_bytes()).hexdigest()

    def authorities(self) -> list[x509.Certificate]:
        return x509.load_pem_x509_certificates((self.directory / "ca.pem").read_bytes())

    def authorities_ever(self) -> list[x509.Certificate]:
        """Return the trusted CAs and those that rotations retired; for proofs of who somebody was, never for a connection."""
        try:
            retired = x509.load_pem_x509_certificates((self.directory / RETIRED_FILE).read_bytes())
        except FileNotFoundError:
            retired = []
        return [*self.authorities(), *retired]

    def signing(self) -> SigningAuthority:
        return self._load("signing")

    # Changes.

    def create(self, *, now: datetime) -> SigningAuthority:
        """Make the first CA. Conflict where there is one already: everything it signed would be worthless."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            if self.exists():
                raise Conflict("ca-exists", f"{self.directory} already holds the fleet's CA")
            authority = new_authority(now=now)
            self._store("signing", authority)
            self._write("ca.pem", _pem(authority.certificate))
        return authority

    def ensure_controller_certificate(self, addresses: Sequence[str], *, now: datetime, life: timedelta) -> bool:
        """Make or renew this node's certificate: past half of its life, other addresses, or another CA. True where changed."""
        with self._locked():
            if self._is_controller_certificate_good(addresses, now=now):
                return False
            key = ec.generate_private_key(ec.SECP256R1())
            issued = self.signing().sign_controller(key.public_key(), addresses, now=now, life=life)
            # Two files, since every TLS library wants two; readers look again when they do not match (`controller_pair`).
            self._write("controller.key", _key_pem(key), mode=0o600)
            self._write("controller.pem", issued.pem)
        return True

    def controller_pair(self) -> tuple[bytes, bytes]:
        """Return (key, certificate) that belong together."""
        for _attempt in range(5):
            key_pem = (self.directory / "controller.key").read_bytes()
            certificate_pem = (self.directory / "controller.pem").read_bytes()
            key = serialization.load_pem_private_key(key_pem, password=None)
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            if key.public_key() == certificate.public_key():
                return key_pem, certificate_pem
            with self._locked():  # a writer is between the two files; wait for it
                pass
        raise Internal("controller-certificate-torn", "the controller's key and certificate do not belong together")

    def controller_certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.directory / "controller.pem").read_bytes())

    # Rotation.

    def rotation_stage(self) -> str:
        """Return `none`, `begun` (both trusted, the old signs) or `switched` (both trusted, the new signs)."""
        if (self.directory / "ca-next.pem").exists():
            return "begun"
        return "switched" if len(self.authorities()) > 1 else "none"

    def begin_rotation(self, *, now: datetime) -> SigningAuthority:
        """Add a new CA to the bundle. Conflict while a rotation is under way."""
        with self._locked():
            if self.rotation_stage() != "none":
                raise Conflict("ca-rotation-begun", "a rotation is under way; end it with `trimtab-controller ca rotate finish`")
            authority = new_authority(now=now)
            self._store("next", authority)
            self._write("ca.pem", _pem(self.signing().certificate) + _pem(authority.certificate))
        return authority

    def switch_rotation(self) -> SigningAuthority:
        """Let the new CA sign; both stay trusted. The caller has made sure that every host trusts both."""
        with self._locked():
            if self.rotation_stage() != "begun":
                raise Conflict("ca-rotation-not-begun", "begin with `trimtab-controller ca rotate begin`")
            new = self._load("next")
            older = [certificate for certificate in self.authorities() if certificate != new.certificate]
            self._write("ca.pem", "".join(_pem(certificate) for certificate in [new.certificate, *older]))
            self._store("signing", new)
            (self.directory / "ca-next.pem").unlink()
            self._sync_directory()
        return new

    def end_rotation(self) -> SigningAuthority:
        """Drop every CA but the signing one. The caller has made sure that no certificate of another is in force."""
        with self._locked():
            if self.rotation_stage() != "switched":
                raise Conflict("ca-rotation-not-switched", "the new CA does not sign yet")
            authority = self.signing()
            left = [one for one in self.authorities_ever() if one != authority.certificate]
            # First: a cut between the two leaves a CA in both, which says the same.
            self._write(RETIRED_FILE, "".join(_pem(one) for one in dict.fromkeys(left)))
            self._write("ca.pem", _pem(authority.certificate))
        return authority

    # Files.

    def _load(self, name: str) -> SigningAuthority:
        pem = (self.directory / f"ca-{name}.pem").read_bytes()
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise Internal("ca-file-damaged", f"ca-{name}.pem in {self.directory} does not hold a CA of ours")
        return SigningAuthority(certificate, key)

    def _store(self, name: str, authority: SigningAuthority) -> None:
        self._write(f"ca-{name}.pem", _key_pem(authority.key) + _pem(authority.certificate), mode=0o600)

    def _is_controller_certificate_good(self, addresses: Sequence[str], *, now: datetime) -> bool:
        try:
            certificate = self.controller_certificate()
            self._check_controller_key(certificate)
            verify_signed_by([self.signing().certificate], certificate)
        except (OSError, ValueError, PermissionDenied):
            return False
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return set(names) == set(controller_names(addresses)) and now < certificate.not_valid_after_utc - life / 2

    def _check_controller_key(self, certificate: x509.Certificate) -> None:
        key = serialization.load_pem_private_key((self.directory / "controller.key").read_bytes(), password=None)
        if key.public_key() != certificate.public_key():
            raise ValueError("controller.key is of another certificate")

    def _write(self, name: str, content: str, *, mode: int = 0o644) -> None:
        """Replace the file at once: a reader sees the old or the new one, also after a power cut."""
        temporary = self.directory / f".{name}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / name)
        self._sync_directory()

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


# --- reading certificates ------------------------------------------------------------------------------------------------


def load_certificate(pem: str, *, field: str) -> x509.Certificate:
    if len(pem) > CSR_MAX_BYTES:
        raise InvalidRequest("certificate-too-large", f"{field}: at most {CSR_MAX_BYTES} bytes", field=field)
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise InvalidRequest("certificate-malformed", f"{field}: no certificate in PEM", field=field) from error


def dns_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def serial_of(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def verify_signed_by(authorities: Sequence[x509.Certificate], certificate: x509.Certificate) -> None:
    """Raise PermissionDenied unless one of these CAs signed the certificate; its dates are not looked at."""
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return
    raise PermissionDenied("certificate-foreign", "the certificate was not signed by this fleet's CA")


def verify_rejoin_proof(certificate: x509.Certificate, proof: bytes, *, token: str, agent_csr_pem: str) -> None:
    """Raise PermissionDenied unless the certificate's key signed token and request (ECDSA over their SHA-256)."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise PermissionDenied("rejoin-proof-wrong", "the previous certificate is not an agent's")
    try:
        key.verify(proof, token.encode() + agent_csr_pem.encode(), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise PermissionDenied("rejoin-proof-wrong", "the proof was not made with the previous certificate's key") from error


def controller_names(addresses: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName(CONTROLLER_NAME), x509.DNSName("localhost")]
    numbers = [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    for address in addresses:
        try:
            number = ipaddress.ip_address(address)
        except ValueError:
            if address not in {"localhost", CONTROLLER_NAME}:
                names.append(x509.DNSName(address))
        else:
            if number not in numbers:
                numbers.append(number)
    return names + [x509.IPAddress(number) for number in numbers]


def _requested_key(csr_pem: str, *, field: str) -> object:
    if len(csr_pem) > CSR_MAX_BYTES:
        raise InvalidRequest("csr-too-large", f"{field}: at most {CSR_MAX_BYTES} bytes", field=field)
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        is_proven = request.is_signature_valid
        key = request.public_key()
    except ValueError as error:
        raise InvalidRequest("csr-malformed", f"{field}: no certificate request in PEM", field=field) from error
    if not is_proven:
        raise InvalidRequest("csr-unproven", f"{field}: the request is not signed with its own key", field=field)
    return key


def _backdated(life: timedelta) -> timedelta:
    return min(BACKDATED, max(timedelta(seconds=1), life / BACKDATED_SHARE))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()


def _key_usage(*, is_ca: bool = False, is_key_encipherment: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=is_key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def expires_in_s(certificate: x509.Certificate, *, now: datetime) -> float:
    return (certificate.not_valid_after_utc - now.astimezone(UTC)).total_seconds()
