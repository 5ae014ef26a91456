"""The session of a host: who may open one."""

from datetime import timedelta

import grpc
import pytest

from tests.unit.controller_rpc.conftest import (
    Fleet,
    certificate_request,
)
from trimtab_controller import pki
from trimtab_controller.store import hosts
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb


async def test_no_certificate_no_connection(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stub = machine.stub(key=b"", certificate=b"")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RenewCertificates(pb.RenewCertificatesRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_ca_is_refused_by_tls(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    other = pki.new_authority(now=fleet.clock.now())
    forged = other.sign_agent(certificate_request(machine.key), machine.host_id, now=fleet.clock.now(), life=timedelta(hours=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await machine.stub(certificate=forged.pem.encode()).RenewCertificates(pb.RenewCertificatesRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_expired_certificate_is_refused_by_tls(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    expired = fleet.pki.signing().sign_agent(
        certificate_request(machine.key),
        machine.host_id,
        now=fleet.clock.now() - timedelta(hours=80),
        life=timedelta(hours=72),
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await machine.stub(certificate=expired.pem.encode()).RenewCertificates(pb.RenewCertificatesRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_another_hosts_certificate_is_refused(fleet: Fleet) -> None:
    first, second = await fleet.member("node1"), await fleet.member("node2")
    stream = await first.say_hello(host_id=second.host_id)
    code, details = await stream.end()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "another host" in details
    assert fleet.host(second.host_id).lease_number == 0


async def test_a_certificate_that_the_fleet_signed_and_never_recorded_is_refused(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stolen = fleet.pki.signing().sign_agent(
        certificate_request(machine.key), machine.host_id, now=fleet.clock.now(), life=timedelta(hours=1)
    )
    stream = await machine.say_hello(stub=machine.stub(certificate=stolen.pem.encode()))
    code, details = await stream.end()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "was not given to this host" in details


async def test_the_controllers_own_certificate_opens_no_session(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    key, certificate = fleet.pki.controller_pair()
    stream = await machine.say_hello(stub=machine.stub(key=key, certificate=certificate))
    code, details = await stream.end()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "does not name a host" in details


async def test_a_removed_host_is_refused(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    fleet.database.write(lambda session: hosts.mark_deleted(session, machine.host_id, now=fleet.clock.now()))
    code, details = await (await machine.say_hello()).end()
    assert code is grpc.StatusCode.NOT_FOUND
    assert "no member" in details


async def test_a_session_starts_with_a_hello(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream = await machine.say_hello()
    await stream.receive()
    await stream.send(pb.SessionRequest(hello=pb.Hello(host_id=machine.host_id)))
    code, _details = await stream.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
