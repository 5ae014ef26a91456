"""The fleet's CA: what it signs, what it refuses, and a rotation in which nobody stops trusting anybody."""

import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.unit.controller_rpc.conftest import LIBVIRT_KEY, certificate_request
from trimtab_controller import pki
from trimtab_controller.pki import FleetPki
from trimtab_protos.errors import Conflict, InvalidRequest, PermissionDenied

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
LIFE = timedelta(hours=72)


@pytest.fixture
def fleet_pki(tmp_path: Path) -> FleetPki:
    made = FleetPki(tmp_path / "pki")
    made.create(now=NOW)
    return made


def test_keys_are_private_and_the_ca_is_made_once(fleet_pki: FleetPki) -> None:
    assert stat.S_IMODE(fleet_pki.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((fleet_pki.directory / "ca-signing.pem").stat().st_mode) == 0o600
    fleet_pki.ensure_controller_certificate([], now=NOW, life=LIFE)
    assert stat.S_IMODE((fleet_pki.directory / "controller.key").stat().st_mode) == 0o600
    with pytest.raises(Conflict):
        fleet_pki.create(now=NOW)


def test_the_controllers_certificate_names_every_address_it_is_reached_at(fleet_pki: FleetPki) -> None:
    fleet_pki.ensure_controller_certificate(["192.0.2.10", "2001:db8::1", "control.example"], now=NOW, life=LIFE)
    names = fleet_pki.controller_certificate().extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"trimtab-controller", "localhost", "control.example"}
    addresses = {str(one) for one in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "::1", "192.0.2.10", "2001:db8::1"}


def test_the_controllers_certificate_is_renewed_at_half_life_and_for_other_addresses(fleet_pki: FleetPki) -> None:
    def ensure(address: str, now: datetime) -> bool:
        return fleet_pki.ensure_controller_certificate([address], now=now, life=LIFE)

    assert ensure("192.0.2.10", NOW)
    assert not ensure("192.0.2.10", NOW + LIFE / 2 - timedelta(minutes=10))
    assert ensure("192.0.2.11", NOW)
    assert ensure("192.0.2.11", NOW + LIFE / 2 + timedelta(minutes=10))


def test_key_and_certificate_are_read_as_a_pair_while_they_are_replaced(fleet_pki: FleetPki) -> None:
    fleet_pki.ensure_controller_certificate([], now=NOW, life=LIFE)
    stopping = threading.Event()

    def replace_all_the_time() -> None:
        for round_number in range(60):
            fleet_pki.ensure_controller_certificate([f"192.0.2.{round_number}"], now=NOW, life=LIFE)
        stopping.set()

    writer = threading.Thread(target=replace_all_the_time)
    writer.start()
    pairs = 0
    while not stopping.is_set():
        key, certificate = fleet_pki.controller_pair()
        loaded = serialization.load_pem_private_key(key, password=None)
        assert loaded.public_key() == x509.load_pem_x509_certificate(certificate).public_key()
        pairs += 1
    writer.join(timeout=30)
    assert pairs > 0


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (ec.generate_private_key(ec.SECP192R1()), "EC P-256"),
        (ed25519.Ed25519PrivateKey.generate(), None),
        (LIBVIRT_KEY, "EC P-256"),
    ],
)
def test_an_agents_key_must_be_of_the_agreed_kind(fleet_pki: FleetPki, key: object, message: str | None) -> None:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .sign(key, None)
            .public_bytes(serialization.Encoding.PEM)
            .decode()
        )
    else:
        csr = certificate_request(key)
    with pytest.raises(InvalidRequest, match=message or "agent_csr_pem"):
        fleet_pki.signing().sign_agent(csr, "host-1", now=NOW, life=LIFE)


def test_libvirts_key_must_be_rsa_of_2048_bits(fleet_pki: FleetPki) -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    with pytest.raises(InvalidRequest, match="2048"):
        fleet_pki.signing().sign_libvirt(certificate_request(weak), "host-1", "192.0.2.1", now=NOW, life=LIFE)


@pytest.mark.parametrize(
    "csr", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----", "x" * 20_000]
)
def test_what_is_no_request_is_refused_by_field(fleet_pki: FleetPki, csr: str) -> None:
    with pytest.raises(InvalidRequest, match="agent_csr_pem"):
        fleet_pki.signing().sign_agent(csr, "host-1", now=NOW, life=LIFE)


def test_names_in_a_request_are_ignored(fleet_pki: FleetPki) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = fleet_pki.signing().sign_agent(certificate_request(key, name="trimtab-controller"), "host-1", now=NOW, life=LIFE)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    assert pki.dns_names(certificate) == ["host-1"]
    assert "trimtab-controller" not in certificate.subject.rfc4514_string()
    assert issued.serial == pki.serial_of(certificate)
    assert certificate.not_valid_after_utc == issued.not_after == NOW + LIFE


def test_no_certificate_outlives_its_ca(fleet_pki: FleetPki) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = fleet_pki.signing().sign_agent(certificate_request(key), "host-1", now=NOW, life=timedelta(days=9999))
    assert issued.not_after == fleet_pki.signing().certificate.not_valid_after_utc


@pytest.mark.parametrize(("life", "earlier"), [(LIFE, timedelta(minutes=5)), (timedelta(seconds=60), timedelta(seconds=6))])
def test_a_certificate_is_backdated_for_lagging_clocks_but_never_by_much_of_its_life(
    fleet_pki: FleetPki, life: timedelta, earlier: timedelta
) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    issued = fleet_pki.signing().sign_controller(key, [], now=NOW, life=life)
    assert NOW - x509.load_pem_x509_certificate(issued.pem.encode()).not_valid_before_utc == earlier


def test_a_rejoin_proof_is_bound_to_token_and_request(fleet_pki: FleetPki) -> None:
    from cryptography.hazmat.primitives import hashes

    key = ec.generate_private_key(ec.SECP256R1())
    issued = fleet_pki.signing().sign_agent(certificate_request(key), "host-1", now=NOW, life=LIFE)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    proof = key.sign(b"jt-1.secret" + b"csr", ec.ECDSA(hashes.SHA256()))
    pki.verify_rejoin_proof(certificate, proof, token="jt-1.secret", agent_csr_pem="csr")
    for token, csr in (("jt-2.secret", "csr"), ("jt-1.secret", "another"), ("jt-1.secretc", "sr2")):
        with pytest.raises(PermissionDenied):
            pki.verify_rejoin_proof(certificate, proof, token=token, agent_csr_pem=csr)


# --- rotation ------------------------------------------------------------------------------------------------------------------------


def trusted_by(fleet_pki: FleetPki, certificate_pem: str) -> bool:
    try:
        pki.verify_signed_by(fleet_pki.authorities(), x509.load_pem_x509_certificate(certificate_pem.encode()))
    except PermissionDenied:
        return False
    return True


def sign(fleet_pki: FleetPki) -> str:
    request = certificate_request(ec.generate_private_key(ec.SECP256R1()))
    return fleet_pki.signing().sign_agent(request, "host-1", now=NOW, life=LIFE).pem


def test_a_rotation_trusts_both_until_its_end(fleet_pki: FleetPki) -> None:
    old = sign(fleet_pki)
    first_bundle = fleet_pki.bundle_sha256()
    new_authority = fleet_pki.begin_rotation(now=NOW)
    assert fleet_pki.rotation_stage() == "begun"
    assert fleet_pki.bundle_sha256() != first_bundle
    assert fleet_pki.signing().fingerprint != new_authority.fingerprint  # nobody trusts the new one yet
    fleet_pki.switch_rotation()
    assert fleet_pki.rotation_stage() == "switched"
    assert fleet_pki.signing().fingerprint == new_authority.fingerprint
    new = sign(fleet_pki)
    assert trusted_by(fleet_pki, old)
    assert trusted_by(fleet_pki, new)
    assert fleet_pki.ensure_controller_certificate([], now=NOW, life=LIFE)
    fleet_pki.end_rotation()
    assert fleet_pki.rotation_stage() == "none"
    assert not trusted_by(fleet_pki, old)
    assert trusted_by(fleet_pki, new)


def test_a_retired_ca_is_remembered_for_proofs_and_trusted_by_nobody(fleet_pki: FleetPki) -> None:
    old = x509.load_pem_x509_certificate(sign(fleet_pki).encode())
    for _rotation in range(2):
        fleet_pki.begin_rotation(now=NOW)
        fleet_pki.switch_rotation()
        fleet_pki.end_rotation()
    assert len(fleet_pki.authorities_ever()) == 3
    pki.verify_signed_by(fleet_pki.authorities_ever(), old)
    with pytest.raises(PermissionDenied):
        pki.verify_signed_by(fleet_pki.authorities(), old)


def test_stages_of_a_rotation_come_in_order(fleet_pki: FleetPki) -> None:
    with pytest.raises(Conflict):
        fleet_pki.switch_rotation()
    with pytest.raises(Conflict):
        fleet_pki.end_rotation()
    fleet_pki.begin_rotation(now=NOW)
    with pytest.raises(Conflict):
        fleet_pki.begin_rotation(now=NOW)
    with pytest.raises(Conflict):
        fleet_pki.end_rotation()


def test_a_switch_that_was_cut_is_repeated_without_losing_the_old_ca(fleet_pki: FleetPki) -> None:
    old = sign(fleet_pki)
    fleet_pki.begin_rotation(now=NOW)
    pending = (fleet_pki.directory / "ca-next.pem").read_bytes()
    fleet_pki.switch_rotation()
    (fleet_pki.directory / "ca-next.pem").write_bytes(pending)  # as if cut before its last step
    assert fleet_pki.rotation_stage() == "begun"
    fleet_pki.switch_rotation()
    assert len(fleet_pki.authorities()) == 2
    assert trusted_by(fleet_pki, old)
