"""Gives lab hosts the certificates that a join would issue for libvirt and QEMU, and turns libvirt's TLS port on."""

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFE = datetime.timedelta(days=2)
_LISTEN = "listen_tls = 1\n"


def give_certificates(lab: Any) -> None:
    """Make migrations over TLS possible between all hosts of the lab; idempotent."""
    hosts = lab.spec.hosts()
    if all((host.path_on_machine("/etc") / "pki/CA/cacert.pem").exists() for host in hosts):
        return
    authority_key, authority = _authority()
    for host in hosts:
        key, certificate = _certificate(host.name, host.address, authority_key, authority)
        pki = host.path_on_machine("/etc") / "pki"
        for path, content in _places(_pem(authority), _pem(certificate), _key_pem(key)).items():
            _write_private(pki / path, content)
        configuration = host.path_on_machine("/etc") / "libvirt/libvirtd.conf"
        if _LISTEN not in configuration.read_text():
            configuration.write_text(configuration.read_text() + _LISTEN)
        lab.run(host.name, ["systemctl", "restart", "libvirtd"])


def _places(authority: bytes, certificate: bytes, key: bytes) -> dict[str, bytes]:
    return {
        "CA/cacert.pem": authority,
        "libvirt/servercert.pem": certificate,
        "libvirt/clientcert.pem": certificate,
        "libvirt/private/serverkey.pem": key,
        "libvirt/private/clientkey.pem": key,
        "qemu/ca-cert.pem": authority,
        "qemu/server-cert.pem": certificate,
        "qemu/client-cert.pem": certificate,
        "qemu/server-key.pem": key,
        "qemu/client-key.pem": key,
    }


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)


def _authority() -> tuple[rsa.RSAPrivateKey, x509.Certificate]:
    key = _key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lab authority")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return key, builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())


def _certificate(
    name: str, address: str, authority_key: rsa.RSAPrivateKey, authority: x509.Certificate
) -> tuple[rsa.RSAPrivateKey, x509.Certificate]:
    key = _key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    # QEMU's TLS wants key encipherment, which only RSA keys may have.
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address(address))])
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(subject, authority.subject, key).add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    for extension, critical in ((usage, True), (names, False), (purposes, False)):
        builder = builder.add_extension(extension, critical=critical)
    return key, builder.sign(authority_key, hashes.SHA256())


def _builder(subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + _LIFE)
    )


def _key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
