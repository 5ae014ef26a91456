"""What a host must not lose: domain events and jobs, acknowledged once durable, believed only where the host is concerned."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.controller_rpc.conftest import ON_BOTH_DATABASES, Fleet, Machine, domain
from trimtab_controller.core.model import Vm
from trimtab_controller.rpc import sessions as rpc_sessions
from trimtab_controller.store import operations, schema, vms
from trimtab_protos.agent.v1 import agent_service_pb2, command_pb2
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb


def insert_vm(fleet: Fleet, vm_id: str, *, host_id: str, epoch: int = 1, claims: Sequence[tuple[str, str, int]] = ()) -> None:
    """A vm on a host; `claims`: (host, role, epoch)."""
    now = fleet.clock.now()

    def insert(session: Any) -> None:
        project_id = session.execute(schema.project.select()).one().id
        values = {
            "id": vm_id,
            "uuid": str(uuid.uuid4()),
            "project_id": project_id,
            "name": vm_id,
            "labels": {},
            "arch": "x86_64",
            "cpu_features": [],
            "vcpus": 1,
            "vcpus_max": 1,
            "memory_mib": 96,
            "memory_max_mib": 96,
            "firmware": "bios",
            "device_addresses": {},
            "seed": {},
            "host_selector": {},
            "desired_power": "running",
            "host_id": host_id,
            "epoch": epoch,
            "observed_state": "absent",
            "observed_addresses": [],
            "created_at": now,
        }
        session.execute(schema.vm.insert().values(**values))
        for claimed, role, claim_epoch in claims or [(host_id, "home", epoch)]:
            session.execute(
                schema.claim.insert().values(
                    vm_id=vm_id,
                    host_id=claimed,
                    role=role,
                    epoch=claim_epoch,
                    vcpus=1,
                    memory_mib=96,
                    operation_id="op-1",
                    created_at=now,
                )
            )

    fleet.database.write(insert)


def vm_of(fleet: Fleet, vm_id: str) -> Vm:
    return fleet.database.read(lambda session: vms.get(session, vm_id))


def event(sequence: int, observation: Any, kind: str = "started") -> pb.OutboxItem:
    return pb.OutboxItem(sequence=sequence, domain_event=pb.DomainEvent(domain=observation, kind=kind))


def drifts(fleet: Fleet, subject_id: str) -> list[str]:
    return [one.context["drift"] for one in fleet.events(subject_id) if one.kind == "vm.drift"]


@ON_BOTH_DATABASES
async def test_a_domain_event_is_observed_and_acknowledged(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    insert_vm(fleet, "vm-1", host_id=machine.host_id)
    stream, _welcome = await machine.open()
    assert await stream.put(event(7, domain("vm-1", addresses=["10.0.0.5"]))) == 7
    vm = vm_of(fleet, "vm-1")
    assert (vm.observed_state.value, vm.observed_host_id) == ("running", machine.host_id)
    assert vm.observed_addresses == ("10.0.0.5",)
    assert vm.observed_at is not None
    assert "vm.observed" in fleet.kinds_of_events("vm-1")


@ON_BOTH_DATABASES
async def test_a_hello_lists_everything_so_that_what_is_missing_is_absent(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    for vm_id in ("vm-1", "vm-2"):
        insert_vm(fleet, vm_id, host_id=machine.host_id)
    await machine.open(domains=[domain("vm-1"), domain("vm-2")])
    assert vm_of(fleet, "vm-2").observed_state.value == "running"
    await machine.open(domains=[domain("vm-1")])
    assert vm_of(fleet, "vm-1").observed_state.value == "running"
    assert vm_of(fleet, "vm-2").observed_state.value == "absent"


async def test_a_hello_without_a_hypervisor_says_nothing_of_the_guests(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    insert_vm(fleet, "vm-1", host_id=machine.host_id)
    await machine.open(domains=[domain("vm-1")])
    await machine.open(inventory=None, domains=[])
    assert vm_of(fleet, "vm-1").observed_state.value == "running"
    assert not fleet.process.gateway.states[machine.host_id].is_hypervisor_up


@ON_BOTH_DATABASES
async def test_a_host_is_not_believed_about_vms_of_others(fleet: Fleet) -> None:
    home, liar = await fleet.member("node1"), await fleet.member("node2")
    insert_vm(fleet, "vm-1", host_id=home.host_id, epoch=3)
    stream, _welcome = await liar.open()
    assert await stream.put(event(1, domain("vm-1", epoch=9))) == 1
    assert vm_of(fleet, "vm-1").observed_state.value == "absent"
    assert drifts(fleet, "vm-1") == ["foreign-host"]
    await stream.put(event(2, domain("vm-1", epoch=9)))
    assert drifts(fleet, "vm-1") == ["foreign-host"]  # told once


async def test_an_observation_at_an_old_epoch_is_drift(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    insert_vm(fleet, "vm-1", host_id=machine.host_id, epoch=3)
    stream, _welcome = await machine.open()
    await stream.put(event(1, domain("vm-1", epoch=2)))
    assert drifts(fleet, "vm-1") == ["old-epoch"]
    assert vm_of(fleet, "vm-1").observed_state.value == "absent"


async def test_a_domain_of_an_unknown_vm_is_shown_at_its_host(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open(domains=[domain("vm-unheard-of")])
    assert drifts(fleet, machine.host_id) == ["unknown-vm"]
    assert (await stream.beat()).is_granted


async def test_an_unmanaged_domain_is_no_vm(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    await machine.open(domains=[domain("")])
    assert drifts(fleet, machine.host_id) == []


@ON_BOTH_DATABASES
async def test_during_a_migration_both_holders_are_believed_and_neither_hides_the_other(fleet: Fleet) -> None:
    source, target = await fleet.member("node1"), await fleet.member("node2")
    insert_vm(
        fleet,
        "vm-1",
        host_id=source.host_id,
        epoch=1,
        claims=[(source.host_id, "home", 1), (target.host_id, "target", 2)],
    )
    on_source, _welcome = await source.open(domains=[domain("vm-1", epoch=1)])
    on_target, _welcome = await target.open(domains=[domain("vm-1", "INCOMING", epoch=2)])
    assert vm_of(fleet, "vm-1").observed_host_id == source.host_id
    await on_target.put(event(1, domain("vm-1", epoch=2)))
    assert vm_of(fleet, "vm-1").observed_host_id == target.host_id
    await on_source.put(event(1, domain("vm-1", "STOPPED", epoch=1, reason="MIGRATED")))
    await on_source.put(event(2, domain("vm-1", "ABSENT", epoch=0)))
    vm = vm_of(fleet, "vm-1")
    assert (vm.observed_state.value, vm.observed_host_id) == ("running", target.host_id)
    assert drifts(fleet, "vm-1") == []


async def test_a_source_that_tells_late_that_its_side_is_gone_does_not_hide_the_guest_at_its_new_home(fleet: Fleet) -> None:
    source, target = await fleet.member("node1"), await fleet.member("node2")
    insert_vm(fleet, "vm-1", host_id=target.host_id, epoch=2, claims=[(target.host_id, "home", 2)])
    await target.open(domains=[domain("vm-1", epoch=2)])
    on_source, _welcome = await source.open()
    await on_source.put(event(1, domain("vm-1", "ABSENT", epoch=0)))
    vm = vm_of(fleet, "vm-1")
    assert (vm.observed_state.value, vm.observed_host_id) == ("running", target.host_id)
    assert drifts(fleet, "vm-1") == []


# --- jobs --------------------------------------------------------------------------------------------------------------------------


def insert_operation(fleet: Fleet, *, subject_id: str, params: dict[str, Any], kind: str = "image.import") -> str:
    now = fleet.clock.now()

    def insert(session: Any) -> str:
        operation = operations.insert(
            session,
            operation_id=f"op-{uuid.uuid4().hex[:26]}",
            kind=kind,
            saga_version=1,
            subject_id=subject_id,
            subject_name="subject",
            project_id="",
            is_exclusive=True,
            params=params,
            actor="admin",
            request_id="r",
            priority=0,
            deadline=None,
            now=now,
        )
        later = now.replace(year=now.year + 1)
        session.execute(schema.operation.update().values(state="waiting", next_run=later))
        return operation.id

    return fleet.database.write(insert)


def job(operation_id: str, state: str, *, sequence: int = 1, done_bytes: int = 0) -> pb.OutboxItem:
    return pb.OutboxItem(
        sequence=sequence,
        job=agent_service_pb2.Job(
            operation_id=operation_id,
            step="copy",
            state=command_pb2.JobState.Value(f"JOB_STATE_{state}"),
            progress=agent_service_pb2.JobProgress(done_bytes=done_bytes, total_bytes=100),
        ),
    )


@ON_BOTH_DATABASES
async def test_progress_is_shown_and_the_end_of_a_job_makes_its_operation_due(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    operation_id = insert_operation(fleet, subject_id="img-1", params={"host_id": machine.host_id})
    stream, _welcome = await machine.open()
    await stream.put(job(operation_id, "RUNNING", sequence=1, done_bytes=40))
    operation = fleet.database.read(lambda session: operations.get(session, operation_id))
    assert operation.progress is not None
    assert operation.progress["done_bytes"] == 40
    assert operation.next_run > fleet.clock.now()
    assert fleet.nudges == []
    await stream.put(job(operation_id, "SUCCEEDED", sequence=2, done_bytes=100))
    operation = fleet.database.read(lambda session: operations.get(session, operation_id))
    assert operation.next_run <= fleet.clock.now()
    assert fleet.nudges == [1]


async def test_running_figures_are_written_at_most_each_two_seconds_and_always_acknowledged(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    operation_id = insert_operation(fleet, subject_id="img-1", params={"host_id": machine.host_id})
    stream, _welcome = await machine.open()
    for number in (1, 2):
        assert await stream.put(job(operation_id, "RUNNING", sequence=number, done_bytes=number)) == number
    operation = fleet.database.read(lambda session: operations.get(session, operation_id))
    assert operation.progress is not None
    assert operation.progress["done_bytes"] == 1
    fleet.clock.shift_s += rpc_sessions.PROGRESS_EVERY_S
    await stream.put(job(operation_id, "RUNNING", sequence=3, done_bytes=3))
    operation = fleet.database.read(lambda session: operations.get(session, operation_id))
    assert operation.progress is not None
    assert operation.progress["done_bytes"] == 3


async def test_a_host_cannot_wake_operations_that_do_not_concern_it(fleet: Fleet) -> None:
    home, liar = await fleet.member("node1"), await fleet.member("node2")
    operation_id = insert_operation(fleet, subject_id="img-1", params={"host_id": home.host_id})
    stream, _welcome = await liar.open()
    # Refused items are acknowledged too: they would come again for ever, in front of good ones.
    assert await stream.put(job(operation_id, "FAILED", sequence=1)) == 1
    operation = fleet.database.read(lambda session: operations.get(session, operation_id))
    assert operation.next_run > fleet.clock.now()
    assert fleet.nudges == []


@ON_BOTH_DATABASES
async def test_one_bad_item_does_not_hold_back_the_others(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    insert_vm(fleet, "vm-1", host_id=machine.host_id)
    stream, _welcome = await machine.open()
    unknown_state = pb.OutboxItem(sequence=1)
    unknown_state.domain_event.domain.vm_id = "vm-1"
    unknown_state.domain_event.domain.state = 99  # type: ignore[assignment]
    items = [unknown_state, job("op-of-long-ago", "SUCCEEDED", sequence=2), event(3, domain("vm-1"))]
    assert await stream.put(*items) == 3
    assert vm_of(fleet, "vm-1").observed_state.value == "running"


async def test_a_batch_that_is_too_large_ends_the_session(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    stream, _welcome = await machine.open()
    items = [event(number, domain("vm-x")) for number in range(rpc_sessions.OUTBOX_ITEMS_MAX + 1)]
    await stream.send(pb.SessionRequest(outbox=pb.Outbox(items=items)))
    code, _details = await stream.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT


class HiddenDatabase:
    """Takes the database's file away, as a lost disk or a server that is gone would."""

    def __init__(self, fleet: Fleet) -> None:
        self._path = Path(fleet.settings.database_url.removeprefix("sqlite:///"))
        self._engine = fleet.database.engine

    def _move(self, old: str, new: str) -> None:
        for suffix in ("", "-wal", "-shm"):
            source = self._path.with_name(self._path.name + old + suffix)
            if source.exists():
                source.rename(self._path.with_name(self._path.name + new + suffix))

    def __enter__(self) -> None:
        self._engine.dispose()
        self._move("", ".hidden")
        self._path.mkdir()  # a directory cannot be opened as a database

    def __exit__(self, *_exception: object) -> None:
        self._path.rmdir()
        self._move(".hidden", "")


async def test_nothing_is_acknowledged_while_the_database_is_gone_and_all_in_order_after(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    insert_vm(fleet, "vm-1", host_id=machine.host_id)
    stream, _welcome = await machine.open()
    with HiddenDatabase(fleet):
        for number, state in enumerate(("PAUSED", "RUNNING"), 1):
            await stream.send(pb.SessionRequest(outbox=pb.Outbox(items=[event(number, domain("vm-1", state))])))
        assert (await stream.beat()).sequence == 1  # heartbeats go on; the outbox has no answer
        # What is queued need not be queued again.
        await stream.send(pb.SessionRequest(outbox=pb.Outbox(items=[event(1, domain("vm-1", "PAUSED"))])))
    acknowledged = [(await stream.receive()).outbox_ack.sequence for _number in range(2)]
    assert acknowledged == [1, 2]
    assert vm_of(fleet, "vm-1").observed_state.value == "running"
    assert await stream.put(event(2, domain("vm-1"))) == 2  # an acknowledgement that was missed is given again


async def test_a_host_that_reports_faster_than_the_database_writes_is_put_off(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    insert_vm(fleet, "vm-1", host_id=machine.host_id)
    stream, _welcome = await machine.open()
    with HiddenDatabase(fleet):
        for number in range(1, rpc_sessions.OUTBOX_BATCHES_WAITING_MAX + 3):
            await stream.send(pb.SessionRequest(outbox=pb.Outbox(items=[event(number, domain("vm-1"))])))
        code, _details = await stream.end()
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_host_that_opens_sessions_in_a_loop_is_put_off(fleet: Fleet) -> None:
    machine, other = await fleet.member("node1"), await fleet.member("node2")
    stub = machine.stub()
    codes = set()
    for _number in range(40):
        stream = await machine.say_hello(stub=stub, inventory=None)
        try:
            await stream.receive()
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())
    assert codes == {grpc.StatusCode.UNAVAILABLE}
    calm, _welcome = await other.open()
    assert (await calm.beat()).is_granted


# --- uploads -------------------------------------------------------------------------------------------------------------------------


async def read_upload(machine: Machine, upload_id: str, offset: int = 0) -> bytes:
    call = machine.stub().ReadUpload(pb.ReadUploadRequest(upload_id=upload_id, offset=offset), timeout=10)
    return b"".join([chunk.content async for chunk in call])


async def test_an_upload_is_read_only_by_the_host_that_imports_it(fleet: Fleet) -> None:
    importer, other = await fleet.member("node1"), await fleet.member("node2")
    upload_id = "up-" + "0" * 26
    content = bytes(range(256)) * 10_000
    (fleet.settings.uploads_dir / upload_id).write_bytes(content)
    insert_operation(fleet, subject_id="img-1", params={"host_id": importer.host_id, "source": {"upload_id": upload_id}})
    assert await read_upload(importer, upload_id) == content
    assert await read_upload(importer, upload_id, offset=2_559_990) == content[2_559_990:]
    for machine, wanted in ((other, upload_id), (importer, "up-" + "1" * 26)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_upload(machine, wanted)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    for wanted in ("../pki/ca-signing.pem", "", "up-..", "/etc/passwd"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_upload(importer, wanted)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_upload_that_is_a_link_is_not_followed(fleet: Fleet) -> None:
    importer = await fleet.member("node1")
    upload_id = "up-" + "2" * 26
    (fleet.settings.uploads_dir / upload_id).symlink_to(fleet.settings.pki_dir / "ca-signing.pem")
    insert_operation(fleet, subject_id="img-1", params={"host_id": importer.host_id, "upload_id": upload_id})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_upload(importer, upload_id)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
