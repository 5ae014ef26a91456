"""Admission control: what a class accepts only if it could be restarted after the loss of one host."""

import pytest

from tests.operations import examples_changes as changes
from tests.operations.invariants import audit_invariants
from tests.operations.kit import GIB, FleetStory
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.operations import estates, placement_snapshot
from trimtab_controller.operations.admission import Gatekeeper
from trimtab_controller.services import hosts_admin
from trimtab_controller.store import fleet, hosts, placements, schema
from trimtab_controller.store.database import Session

WHOLE_HOST = {"vcpus": 8, "memory_mib": 1024}


def admit(story: FleetStory, admission: str) -> None:
    story.db.write(
        lambda session: hosts_admin.change_class(
            session,
            hosts.DEFAULT_CLASS,
            {"admission": admission},
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def shrink(story: FleetStory) -> None:
    """Let each host have room for one vm of `WHOLE_HOST`; a change of their class gives them their own limits back."""
    story.db.write(lambda session: session.execute(schema.host.update().values(vcpus_limit=8)))


def asked(story: FleetStory, name: str, **wishes: object) -> Operation:
    _, operation = story.accept_create(name, **WHOLE_HOST, **wishes)
    story.settle()
    return story.operation(operation.id)


@pytest.mark.parametrize(("admission", "accepted"), [("any", 3), ("one-host-loss", 2)])
def test_a_class_that_holds_to_it_keeps_room_for_the_loss_of_one_host(story: FleetStory, admission: str, accepted: int) -> None:
    admit(story, admission)
    shrink(story)
    ends = [asked(story, f"web{number}", ha="restart") for number in range(3)]
    assert [end.state for end in ends] == [OperationState.DONE] * accepted + [OperationState.FAILED] * (3 - accepted)
    if admission == "any":
        return
    error = ends[-1].error
    assert error is not None
    assert error.code == "admission-refused"
    assert "could not be restarted if host" in error.message
    assert "--admission any" in error.message
    decision = story.db.read(lambda session: placements.decision_of_operation(session, ends[-1].id))
    assert decision is not None
    assert decision.chosen_host_id == ""
    assert audit_invariants(story) == []


def test_a_vm_that_nobody_restarts_may_not_take_the_room_that_others_need(story: FleetStory) -> None:
    admit(story, "one-host-loss")
    shrink(story)
    for number in range(2):
        assert asked(story, f"web{number}", ha="restart").state is OperationState.DONE
    refused = asked(story, "batch", ha="none").error
    assert refused is not None
    assert refused.code == "admission-refused"
    assert "with it, vms web" in refused.message


def test_what_could_not_survive_before_is_no_reason_to_refuse(story: FleetStory) -> None:
    shrink(story)
    for number in range(2):
        asked(story, f"web{number}", ha="restart")
    admit(story, "one-host-loss")
    shrink(story)
    for host_id in story.host_ids[2:]:
        story.db.write(
            lambda session, host_id=host_id: session.execute(  # type: ignore[misc]
                schema.host.update().where(schema.host.c.id == host_id).values(vcpus_limit=4)
            )
        )
    _, operation = story.accept_create("small", vcpus=1, memory_mib=64)
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE


def test_a_start_is_not_refused_when_the_next_loss_would_not_be_survived(story: FleetStory) -> None:
    admit(story, "one-host-loss")
    shrink(story)
    for number in range(2):
        assert asked(story, f"web{number}", ha="restart").state is OperationState.DONE
    free = {story.vm(vm_id).host_id for vm_id in story.fleet_vms()} ^ set(story.host_ids)
    story.db.write(lambda session: session.execute(schema.host.update().where(schema.host.c.id.in_(free)).values(vcpus_limit=1)))
    vm = story.vm(min(story.fleet_vms()))
    story.accept_power(vm, "stop", force=True)
    story.settle()
    start = story.accept_power(story.vm(vm.id), "start")
    story.settle()
    assert story.operation(start.id).state is OperationState.DONE, story.operation(start.id).error


def test_what_is_kept_from_batch_to_batch_is_what_the_database_says(story: FleetStory) -> None:
    """Whatever is done to a vm: the marks by which a batch knows what changed leave nothing out that matters."""
    kept = Gatekeeper()

    def check(session: Session) -> None:
        rows = fleet.read_rows(session)
        kept.follow(session, rows, placement_snapshot.snapshot_of(rows, placement_snapshot.baselines_of(rows)))
        assert kept.vms == {vm.vm_id: vm for vm in estates.read_vms(session, rows, kept.vms)}
        on_hosts = schema.vm.select().where(schema.vm.c.host_id != "", schema.vm.c.deleted_at.is_(None))
        assert set(kept.vms) == {row.id for row in session.execute(on_hosts)}

    def did(operation: Operation) -> None:
        story.settle()
        assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
        story.db.read(check)

    web = changes.growing_vm(story, "web", ha="restart")
    story.db.read(check)
    did(changes.accept_resize(story, story.vm(web.id), vcpus=4))
    did(changes.accept_volume_resize(story, story.volumes(web.id)[0].id, 3 * GIB))
    did(changes.attaches(story, "db"))
    did(changes.detaches(story, "cache"))
    did(story.accept_power(story.vm(web.id), "migrate"))
    did(story.accept_power(story.vm(web.id), "stop", force=True))
    did(changes.accept_resize(story, story.vm(web.id), vcpus=2))
    did(story.accept_power(story.vm(web.id), "start"))
    did(story.accept_power(story.vm(web.id), "delete"))
