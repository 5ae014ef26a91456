"""Machines become hosts with a token, and only the right ones do."""

from datetime import timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.unit.controller_rpc.conftest import ON_BOTH_DATABASES, Fleet, Machine, certificate_request, inventory
from trimtab_controller.core.model import Actor
from trimtab_controller.services import hosts as host_service
from trimtab_controller.store import audit, certificates, hosts
from trimtab_protos.errors import AlreadyExists, InvalidRequest, NotFound


async def refusal(machine: Machine, token: str, **options: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await machine.join(token, **options)  # type: ignore[arg-type]
    return caught.value


@ON_BOTH_DATABASES
async def test_a_token_admits_its_machine_with_certificates_of_the_fleet(fleet: Fleet) -> None:
    machine = await fleet.machine("node1").join(fleet.token("node1"))
    host = fleet.host(machine.host_id)
    assert (host.name, host.machine_id, host.connectivity.value) == ("node1", machine.machine_id, "new")
    agent = x509.load_pem_x509_certificate(machine.certificate_pem)
    libvirt = x509.load_pem_x509_certificate(machine.libvirt_certificate_pem)
    for certificate in (agent, libvirt):
        certificate.verify_directly_issued_by(fleet.pki.signing().certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [machine.host_id]
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} == set(usages)
    addresses = libvirt.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(one) for one in addresses.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert libvirt.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment
    recorded = fleet.database.read(lambda session: certificates.latest_of(session, [machine.host_id]))[machine.host_id]
    assert recorded["agent"].serial == f"{agent.serial_number:x}"
    assert recorded["libvirt"].serial == f"{libvirt.serial_number:x}"
    assert "host.joined" in fleet.kinds_of_events(machine.host_id)


async def test_check_lists_every_refusal_and_leaves_the_token_unused(fleet: Fleet) -> None:
    await fleet.member("node1")
    clone = fleet.machine("node2", machine_id=fleet.machines[0].machine_id, skew_s=5)
    token = fleet.token("node2")
    refusals = await clone.check(token, agent_address="somewhere", migration_address="0.0.0.0")
    assert any("machine-id" in one and "node1" in one for one in refusals)
    assert any("ahead of the controller's" in one for one in refusals)
    assert any("agent_address" in one for one in refusals)
    assert any("migration_address" in one for one in refusals)
    clone.machine_id, clone.skew_s = "ab" * 16, 0
    assert await clone.check(token) == []
    assert (await clone.join(token)).host_id


async def test_a_used_token_is_refused(fleet: Fleet) -> None:
    token = fleet.token("node1")
    await fleet.machine("node1").join(token)
    error = await refusal(fleet.machine("node1"), token)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "used already" in (error.details() or "")


async def test_an_expired_token_is_refused(fleet: Fleet) -> None:
    token = fleet.token("node1")
    fleet.clock.shift_s = timedelta(minutes=16).total_seconds()
    error = await refusal(fleet.machine("node1"), token)
    assert "expired" in (error.details() or "")


@pytest.mark.parametrize("wrong", ["", "jt-nothing.secret", "jt-x" * 500, "tt-1.2"])
async def test_a_stranger_learns_nothing_but_that_the_token_is_wrong(fleet: Fleet, wrong: str) -> None:
    await fleet.member("node1")
    clone = fleet.machine("node1", machine_id=fleet.machines[0].machine_id, skew_s=60)
    assert await clone.check(wrong) == ["the token is unknown; make one with `trimtab host token create NAME`"]


async def test_a_token_serves_only_the_name_it_was_made_for(fleet: Fleet) -> None:
    error = await refusal(fleet.machine("node2"), fleet.token("node1"))
    assert "is for host node1" in (error.details() or "")


async def test_a_clock_more_than_two_seconds_off_is_refused(fleet: Fleet) -> None:
    error = await refusal(fleet.machine("node1", skew_s=-2.5), fleet.token("node1"))
    assert error.code() is grpc.StatusCode.ABORTED
    assert "behind the controller's" in (error.details() or "")


async def test_a_migration_address_belongs_to_one_host(fleet: Fleet) -> None:
    first = await fleet.machine("node1").join(fleet.token("node1"), migration_address="192.0.2.11")
    second = fleet.machine("node2")
    error = await refusal(second, fleet.token("node2"), migration_address="192.0.2.11")
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    await second.join(fleet.token("node2"), migration_address="192.0.2.12")
    # A member cannot take it over either: its next libvirt certificate would name its neighbour.
    await second.open(inventory=inventory(migration_address="192.0.2.11"))
    assert fleet.host(second.host_id).migration_address == "192.0.2.12"
    await second.open(inventory=inventory(migration_address="192.0.2.13"))
    assert fleet.host(second.host_id).migration_address == "192.0.2.13"
    assert fleet.host(first.host_id).migration_address == "192.0.2.11"


async def test_joins_and_refusals_to_token_holders_are_audited(fleet: Fleet) -> None:
    token = fleet.token("node1")
    machine = fleet.machine("node1", skew_s=5)
    await refusal(machine, token)
    machine.skew_s = 0
    await machine.join(token)
    await refusal(fleet.machine("node2"), "jt-unknown.secret")
    records = fleet.database.read(lambda session: audit.page(session, limit=10, before_seq=None, filters={"verb": "host.join"}))
    assert [(one.resource, one.outcome, one.cause, one.actor) for one in records] == [
        ("host/node1", "accepted", "", "admin"),
        ("host/node1", "denied", "clock-skew", "admin"),
    ]


@ON_BOTH_DATABASES
async def test_an_equal_smbios_uuid_is_refused_and_writes_nothing(fleet: Fleet) -> None:
    first = await fleet.member("node1")
    token = fleet.token("node2")
    twin = fleet.machine("node2", smbios_uuid=first.smbios_uuid)
    error = await refusal(twin, token)
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert len(fleet.database.read(hosts.live)) == 1
    twin.smbios_uuid = "00000000-0000-0000-0000-00000000000a"
    assert (await twin.join(token)).host_id  # the refused join did not use the token up


async def test_keys_that_are_too_weak_or_unproven_are_refused(fleet: Fleet) -> None:
    machine = fleet.machine("node1")
    machine.key = ec.generate_private_key(ec.SECP192R1())
    error = await refusal(machine, fleet.token("node1"))
    assert "EC P-256" in (error.details() or "")


@ON_BOTH_DATABASES
async def test_a_lapsed_host_rejoins_with_its_old_key_and_keeps_its_id(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    stream.cancel()
    before, old_certificate, old_key = machine.host_id, machine.certificate_pem, machine.key
    fleet.clock.shift_s = timedelta(hours=100).total_seconds()  # beyond the life of its certificate
    token = fleet.token("node1", is_rejoin=True)
    machine.key = ec.generate_private_key(ec.SECP256R1())
    request = certificate_request(machine.key)
    proof = old_key.sign(token.encode() + request.encode(), ec.ECDSA(hashes.SHA256()))
    await machine.join(token, request=request, proof=proof, previous_pem=old_certificate, previous_host_id=before)
    assert machine.host_id == before
    known = fleet.database.read(lambda session: certificates.latest_of(session, [before]))[before]
    fresh = x509.load_pem_x509_certificate(machine.certificate_pem)
    assert known["agent"].serial == f"{fresh.serial_number:x}"
    assert "host.rejoined" in fleet.kinds_of_events(before)


async def test_a_claim_on_an_id_without_the_old_key_is_refused(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    stream.cancel()
    thief = fleet.machine("node1", machine_id=machine.machine_id, smbios_uuid=machine.smbios_uuid)
    token = fleet.token("node1", is_rejoin=True)
    proof = thief.key.sign(token.encode(), ec.ECDSA(hashes.SHA256()))
    error = await refusal(thief, token, proof=proof, previous_pem=machine.certificate_pem, previous_host_id=machine.host_id)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "previous certificate's key" in (error.details() or "")
    error = await refusal(thief, token)
    assert "lost the key" in (error.details() or "")


async def test_an_identity_of_another_fleet_is_refused(fleet: Fleet) -> None:
    machine = fleet.machine("node1")
    refusals = await machine.check(fleet.token("node1"), previous_host_id="host-01jd0000000000000000000000")
    assert any("another fleet" in one for one in refusals)


async def test_an_identity_of_another_host_is_refused(fleet: Fleet) -> None:
    first = await fleet.member("node1")
    refusals = await fleet.machine("node2").check(fleet.token("node2"), previous_host_id=first.host_id)
    assert any("drop its old identity" in one for one in refusals)


@ON_BOTH_DATABASES
async def test_a_join_whose_answer_was_lost_is_repeated_with_another_token(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    first_id, first_certificate = machine.host_id, machine.certificate_pem
    await machine.join(fleet.token("node1"))
    assert machine.host_id == first_id
    serial = f"{x509.load_pem_x509_certificate(first_certificate).serial_number:x}"
    known = fleet.database.read(lambda session: certificates.get(session, serial))
    assert known is not None
    assert known.revoked_at is not None


def test_the_paste_line_is_one_line_and_names_the_controller(fleet: Fleet) -> None:
    place = host_service.JoinPlace(api_url="https://192.0.2.1:8443", ca_fingerprint="sha256:ab")
    issued = fleet.database.write(
        lambda session: host_service.create_token(session, "node9", Actor(name="admin"), fleet.clock.now(), place=place)
    )
    assert issued.command == (f"trimtab-agent join https://192.0.2.1:8443 --token {issued.secret} --ca-fingerprint sha256:ab")
    assert issued.secret.startswith("jt-")
    assert issued.expires_at - fleet.clock.now() <= timedelta(minutes=15)


async def test_a_token_for_a_member_needs_to_be_asked_for(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    stream.cancel()
    with pytest.raises(AlreadyExists, match="rejoin"):
        fleet.token("node1")
    with pytest.raises(NotFound):
        fleet.token("node7", is_rejoin=True)
    with pytest.raises(InvalidRequest, match="a-z"):
        fleet.token("Node_1")
