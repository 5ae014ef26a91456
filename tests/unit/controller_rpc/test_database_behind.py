"""A gateway whose database is a copy of yesterday learns so from the first host, and nothing honest looks like that."""

import asyncio
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.controller_rpc.conftest import (
    ON_BOTH_DATABASES,
    Fleet,
    Machine,
    certificate_request,
    domain,
    eventually,
    silent_for,
)
from tests.unit.controller_rpc.test_outbox import insert_vm
from trimtab_controller.core.behind import NUMBER_MAX, NUMBERS_AHEAD
from trimtab_controller.core.model import Actor
from trimtab_controller.rpc import server
from trimtab_controller.services import behind as service
from trimtab_controller.services import restored
from trimtab_controller.services.restored import Restored
from trimtab_controller.store import behind, hosts, leases, schema
from trimtab_controller.store.behind import Behind
from trimtab_controller.store.database import Database
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb

ADMIN = Actor(name="admin")


def state(fleet: Fleet) -> Behind:
    return fleet.database.read(behind.state)


def mark(fleet: Fleet) -> int:
    fleet.database.write(behind.raise_mark)
    return fleet.database.read(behind.mark)


async def restart(fleet: Fleet, *, with_copy: Path | None = None) -> None:
    """Stop the control plane and start it again, with a copy of the database where one is given."""
    await fleet.process.stop()
    url = fleet.settings.effective_database_url if with_copy is None else f"sqlite:///{with_copy}"
    fleet.database.close()
    fleet.database = Database(url)
    fleet.process = await server.start(
        fleet.settings, fleet.database, clock=fleet.clock, host_address="127.0.0.1:0", join_address="127.0.0.1:0"
    )


def save(fleet: Fleet, copy: Path) -> None:
    """Copy the database's file as a backup does."""
    with sqlite3.connect(str(sa.make_url(fleet.settings.effective_database_url).database)) as live:
        live.execute("VACUUM INTO ?", (str(copy),))


def recover(fleet: Fleet) -> None:
    what = Restored(findings=(), answered=(), silent={})
    fleet.database.write(lambda session: restored.apply(session, what, now=fleet.clock.now()))


# --- what is noticed -----------------------------------------------------------------------------------------------------------


async def test_the_file_of_yesterday_is_put_back_and_the_first_hello_makes_the_controller_read_only(
    fleet: Fleet, tmp_path: Path
) -> None:
    machine = await fleet.member("node1")
    await machine.open()
    save(fleet, tmp_path / "yesterday.db")
    stream = None
    for _session in range(4):
        stream, _welcome = await machine.open()
    assert stream is not None
    ack = await stream.beat()
    await restart(fleet, with_copy=tmp_path / "yesterday.db")
    assert fleet.host(machine.host_id).lease_number == 1
    assert not state(fleet).is_in_force
    stream, _welcome = await machine.open(lease_number=ack.lease_number)
    assert state(fleet).message == (
        "this controller's database is older than the fleet (host node1 has session 5, the database 1): "
        "stop every controller and run `trimtab-controller recover`"
    )
    (alarm,) = [one for one in fleet.events(machine.host_id) if one.kind == "alarm.database-behind"]
    assert alarm.context == {"witness": "session", "seen": 5, "known": 1}
    # The host lives: its lease is granted under a number that its agent and its beacon take.
    granted = await stream.beat(lease_number=ack.lease_number)
    assert granted.is_granted
    assert granted.lease_number == fleet.host(machine.host_id).lease_number > ack.lease_number + 1
    # It stays so, whoever starts.
    await restart(fleet, with_copy=tmp_path / "yesterday.db")
    assert state(fleet).is_in_force
    await machine.open(lease_number=granted.lease_number)
    assert [one.kind for one in fleet.events(machine.host_id)].count("alarm.database-behind") == 1
    recover(fleet)
    assert not state(fleet).is_in_force
    await machine.open(lease_number=granted.lease_number)
    assert not state(fleet).is_in_force


@ON_BOTH_DATABASES
async def test_a_host_that_did_nothing_since_proves_it_by_the_mark_that_it_was_told(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    told = [mark(fleet) for _minute in range(3)][-1]
    stream, welcome = await machine.open()
    assert welcome.database_mark == told
    later = mark(fleet)
    await eventually(lambda: fleet.process.gateway.database_mark == later)
    assert (await stream.beat()).database_mark == later
    lower = schema.turn.update().where(schema.turn.c.subject_id == behind.MARKED).values(value=told)
    fleet.database.write(lambda session: session.execute(lower))
    await machine.open(lease_number=1, database_mark=later)
    assert f"host node1 was told mark {later}, the database has {told}" in state(fleet).message
    recover(fleet)
    await machine.open(lease_number=2, database_mark=later)
    assert not state(fleet).is_in_force, "recover raises the mark above all that were told"


@ON_BOTH_DATABASES
async def test_an_older_agent_proves_it_by_the_lease_that_it_holds_and_is_given_one_that_it_takes(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    lost = await stream.beat(lease_number=41)
    assert lost.lease_number == 1, "which the agent does not take: it holds a higher one"
    await eventually(lambda: state(fleet).is_in_force)

    async def is_overtaken() -> bool:
        return (await stream.beat(lease_number=41)).lease_number > 41

    await eventually(is_overtaken)
    assert (await stream.beat(lease_number=41)).is_granted
    assert fleet.host(machine.host_id).lease_number == 41 + NUMBERS_AHEAD + 1


async def test_a_domain_that_was_worked_on_since_proves_it_in_a_hello_and_in_an_event(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    vm = add_vm(fleet, "vm-1", machine, turn=3)
    await machine.open(domains=[domain(vm, turn=3)])
    assert not state(fleet).is_in_force
    stream, _welcome = await machine.open(domains=[domain("vm-strange", turn=99, epoch=9), domain(vm, turn=3, epoch=9)])
    assert not state(fleet).is_in_force, "neither a stranger nor an epoch is proof"
    await stream.put(pb.OutboxItem(sequence=1, domain_event=pb.DomainEvent(domain=domain(vm, turn=4))))
    assert "host node1 has turn 4 of vm vm-1, the database 3" in state(fleet).message


def add_vm(fleet: Fleet, vm_id: str, machine: Machine, *, turn: int) -> str:
    insert_vm(fleet, vm_id, host_id=machine.host_id)
    fleet.database.write(lambda session: session.execute(schema.turn.insert().values(subject_id=vm_id, value=turn)))
    return vm_id


async def test_a_certificate_of_after_the_copy_is_taken_where_the_database_is_behind_and_else_refused(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    renewed = fleet.pki.signing().sign_agent(
        certificate_request(machine.key), machine.host_id, now=fleet.clock.now(), life=timedelta(hours=72)
    )
    stub = machine.stub(certificate=renewed.pem.encode())
    code, _details = await (await machine.say_hello(stub=stub)).end()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert not state(fleet).is_in_force
    stream, _welcome = await machine.open(stub=stub, lease_number=41)
    assert (await stream.beat()).is_granted
    assert state(fleet).is_in_force
    assert "host.certificate_recorded" in fleet.kinds_of_events(machine.host_id)


async def test_a_certificate_of_before_the_recovery_is_taken_after_it(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    now = fleet.clock.now()
    renewed = [
        fleet.pki.signing().sign_agent(certificate_request(machine.key), machine.host_id, now=at, life=timedelta(hours=72))
        for at in (now, now + timedelta(hours=12))
    ]
    recover(fleet)
    fleet.clock.shift_s += 24 * 3600
    await machine.open(stub=machine.stub(certificate=renewed[0].pem.encode()), lease_number=41)
    assert not state(fleet).is_in_force


async def test_a_host_whose_lease_was_revoked_when_the_copy_was_made_is_granted_one_all_the_same(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    fleet.database.write(lambda session: leases.revoke(session, machine.host_id, term=1, now=fleet.clock.now()))
    await fleet.process.watch.learn()
    stream, _welcome = await machine.open()
    assert not (await stream.beat()).is_granted
    stream, _welcome = await machine.open(lease_number=41)
    await fleet.process.watch.learn()
    assert (await stream.beat()).is_granted


async def test_nobody_joins_a_database_that_is_behind(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await machine.open(lease_number=41)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.member("node2")
    assert "stop every controller" in str(caught.value.details())


async def test_a_number_that_nobody_can_have_given_is_refused_and_proves_nothing(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    for given in ({"lease_number": NUMBER_MAX + 1}, {"database_mark": -1}):
        code, details = await (await machine.say_hello(**given)).end()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert next(iter(given)) in details
    assert not state(fleet).is_in_force


@ON_BOTH_DATABASES
async def test_two_gateways_that_hear_proof_at_once_both_write_it(fleet: Fleet) -> None:
    machines = [await fleet.member("node1"), await fleet.member("node2")]
    second = await server.start(
        fleet.settings, fleet.database, clock=fleet.clock, host_address="127.0.0.1:0", join_address="127.0.0.1:0"
    )
    try:
        await asyncio.gather(
            machines[0].open(lease_number=41), machines[1].open(stub=machines[1].stub_at(second.host_port), lease_number=51)
        )
    finally:
        await second.stop()
    assert set(state(fleet).evidence) <= {one.host_id for one in machines}
    assert state(fleet).is_in_force


# --- an operator's word --------------------------------------------------------------------------------------------------------


async def test_an_operator_trusts_the_database_and_the_host_that_was_wrong_is_not_believed_until_it_rejoins(fleet: Fleet) -> None:
    liar, other = await fleet.member("node1"), await fleet.member("node2")
    await liar.open(lease_number=41, database_mark=50)
    fleet.database.write(
        lambda session: service.trust(session, reason="its disk was swapped", actor=ADMIN, now=fleet.clock.now())
    )
    assert not state(fleet).is_in_force
    await liar.open(lease_number=NUMBER_MAX)
    assert not state(fleet).is_in_force
    await other.open(database_mark=50)
    assert not state(fleet).is_in_force, "numbers were raised: the same error proves nothing"
    await other.open(database_mark=50 + 2 * NUMBERS_AHEAD)
    assert state(fleet).is_in_force, "another host is believed as ever"


# --- what looks like it and is not -----------------------------------------------------------------------------------------------


@ON_BOTH_DATABASES
async def test_a_database_that_is_equal_starts_as_ever(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    told = mark(fleet)
    stream, _welcome = await machine.open()
    held = (await stream.beat()).lease_number
    await restart(fleet)
    stream, _welcome = await machine.open(lease_number=held, database_mark=told)
    assert (await stream.beat(lease_number=held)).lease_number == held + 1
    assert not state(fleet).is_in_force


@ON_BOTH_DATABASES
async def test_an_agent_that_goes_to_another_gateway_while_its_first_session_is_being_committed_proves_nothing(
    fleet: Fleet,
) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    held = (await stream.beat()).lease_number
    second = await server.start(
        fleet.settings, fleet.database, clock=fleet.clock, host_address="127.0.0.1:0", join_address="127.0.0.1:0"
    )
    try:
        opened = await asyncio.gather(
            machine.say_hello(lease_number=held),
            machine.say_hello(stub=machine.stub_at(second.host_port), lease_number=held),
        )
        for one in opened:
            assert (await one.receive()).WhichOneof("body") == "welcome"
        assert fleet.host(machine.host_id).lease_number == held + 2
    finally:
        await second.stop()
    assert not state(fleet).is_in_force


async def test_an_old_stream_that_hears_of_the_newer_sessions_lease_proves_nothing(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    older, _welcome = await machine.open()
    # A newer session by another gateway, whose lease the agent holds while it still beats here.
    number, _was = fleet.database.write(
        lambda session: hosts.open_session(
            session, machine.host_id, incarnation="inc-1", boot_id="boot-1", agent_address="a", now=fleet.clock.now()
        )
    )
    await older.beat(lease_number=number)
    await eventually(lambda: not fleet.process.gateway.states[machine.host_id].is_overtaking)
    assert not state(fleet).is_in_force
    assert fleet.host(machine.host_id).lease_number == number, "and takes nothing from the newer one"


async def test_a_gateway_that_knows_an_older_mark_tells_it_late_and_proves_nothing(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    told = mark(fleet)
    stream, _welcome = await machine.open(database_mark=told)
    fleet.process.gateway.database_mark = told - 1
    await stream.beat()
    await machine.open(lease_number=1, database_mark=told)
    assert not state(fleet).is_in_force


async def test_a_reinstalled_host_that_rejoins_or_lost_its_journal_proves_nothing(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    mark(fleet)
    await machine.open()
    await machine.open(incarnation="inc-2", lease_number=0, database_mark=0)
    assert not state(fleet).is_in_force
    before, token = machine.host_id, fleet.token("node1", is_rejoin=True)
    request = certificate_request(machine.key)
    proof = machine.key.sign(token.encode() + request.encode(), ec.ECDSA(hashes.SHA256()))
    await machine.join(token, request=request, proof=proof, previous_pem=machine.certificate_pem, previous_host_id=before)
    assert machine.host_id == before
    await machine.open(incarnation="inc-3")
    await machine.open(incarnation="inc-3", lease_number=3)
    assert not state(fleet).is_in_force


async def test_a_host_that_was_removed_and_joins_anew_is_another_host_and_proves_nothing(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    for _session in range(3):
        await machine.open()
    fleet.database.write(lambda session: hosts.mark_deleted(session, machine.host_id, now=fleet.clock.now()))
    code, _details = await (await machine.say_hello(lease_number=99)).end()
    assert code is grpc.StatusCode.NOT_FOUND
    assert not state(fleet).is_in_force, "a removed host is no witness"
    anew = fleet.machine("node1", machine_id=machine.machine_id, smbios_uuid=machine.smbios_uuid)
    await anew.join(fleet.token("node1"))
    assert anew.host_id != machine.host_id
    await anew.open()  # its agent's memory is by host id
    assert (fleet.host(anew.host_id).lease_number, state(fleet).is_in_force) == (1, False)


async def test_what_is_written_without_fsync_is_no_evidence(fleet: Fleet) -> None:
    """A power cut takes the beats of leases, observations and progress of the last moments: sessions open as ever after it."""
    machine = await fleet.member("node1")
    vm = add_vm(fleet, "vm-1", machine, turn=3)
    told = mark(fleet)
    await machine.open(domains=[domain(vm, turn=3)])
    await silent_for(fleet, 3)

    def lose_what_is_not_durable(session: Any) -> None:
        session.execute(schema.lease.update().values(beat=schema.lease.c.beat - 1))
        session.execute(schema.vm.update().values(observed_state="unknown", observed_at=None, observed_host_id=""))
        session.execute(schema.event.delete())

    fleet.database.write(lose_what_is_not_durable)
    await machine.open(domains=[domain(vm, turn=3)], lease_number=1, database_mark=told)
    assert not state(fleet).is_in_force
    assert fleet.database.read(lambda session: leases.named(session, leases.GATEWAY_PREFIX))
