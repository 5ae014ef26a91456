"""Vms backed up at one instant: it is one where every guest was still at once, and is never shown as one where it was not."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.operations.backup_kit import accept_together, content_of, ready_repo, write_to
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.wire import How, WireFault
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import BackupInstant, Operation, Vm
from trimtab_controller.loops.backups import BackupLoop
from trimtab_controller.services import backup_instants as service
from trimtab_controller.services import backup_policies
from trimtab_controller.services.backup_instants import RestoreAllSpec
from trimtab_controller.services.backup_policies import PolicySpec
from trimtab_controller.store import backup_instants, backups, vms
from trimtab_protos.errors import Conflict, InvalidRequest, Unavailable


def group(story: FleetStory) -> list[Vm]:
    """Return vms on all hosts, with something on each disk, and a repository."""
    ready_repo(story)
    members = []
    for host_id in story.host_ids[:2]:
        vm = story.running_vm(f"vm{len(members)}")
        write_to(story, vm.id, 0, f"of {vm.name} on {host_id}".encode())
        members.append(vm)
    return members


def instant_of(story: FleetStory, operation: Operation) -> BackupInstant:
    return story.db.read(lambda session: backup_instants.get(session, operation.subject_id))


def test_all_stand_still_at_once_and_all_come_back_to_that_moment(story: FleetStory) -> None:
    members = group(story)
    before = {vm.id: content_of(story, vm.id) for vm in members}
    operation = accept_together(story, members)
    story.settle()
    assert story.operation(operation.id).state is OperationState.DONE, story.operation(operation.id).error
    instant = instant_of(story, operation)
    assert (instant.state, instant.problem) == ("consistent", "")
    assert instant.taken_at is not None
    calls = [call.verb for call in story.wire.calls]
    assert calls.count("StartBackup") == len(members)
    for vm in members:
        write_to(story, vm.id, 0, b"what came afterwards")

    def restore(session: Any) -> tuple[Operation, ...]:
        spec = RestoreAllSpec(name_pattern="{vm}-again")
        return service.restore(session, instant.id, spec, project=story.project, actor=story.actor, now=story.clock.now())[1]

    restored = story.db.write(restore)
    story.settle()
    assert {story.operation(one.id).state for one in restored} == {OperationState.DONE}
    for vm, one in zip(members, restored, strict=True):
        assert content_of(story, one.subject_id) == before[vm.id]
        assert story.vm(one.subject_id).name == f"{vm.name}-again"
    assert audit_invariants(story) == []


def test_a_member_that_fails_breaks_the_instant_and_the_backups_of_the_others_stay_good(story: FleetStory) -> None:
    members = group(story)
    source: Any = story.agents.agent(members[1].host_id).parts.backups
    source.look_at(members[1].id).is_busy = True  # as while something else holds libvirt's one job
    operation = accept_together(story, members)
    story.settle()
    instant = instant_of(story, operation)
    assert instant.state == "broken"
    assert members[1].name in instant.problem
    states = {one["vm_name"]: story.db.read(lambda s, one=one: backups.get(s, one["backup_id"]).state) for one in instant.members}
    assert states == {members[0].name: "ready", members[1].name: "failed"}
    with pytest.raises(Conflict) as refused:
        story.db.write(
            lambda session: service.restore(
                session, instant.id, RestoreAllSpec(), project=story.project, actor=story.actor, now=story.clock.now()
            )
        )
    assert refused.value.code == "instant-not-consistent"
    assert "--allow-broken" in refused.value.message


def test_a_release_that_got_lost_is_repeated_and_tells_what_the_first_did(story: FleetStory) -> None:
    members = group(story)
    fault = story.wire.plan(WireFault(How.REPLY_LOST, verb="ReleaseInstant", host_id=members[1].host_id))
    operation = accept_together(story, members)
    story.settle()
    assert fault.met.is_set()
    instant = instant_of(story, operation)
    assert (instant.state, instant.problem) == ("consistent", "")


@pytest.mark.parametrize("verb", ["StartBackup", "AwaitInstant"])
def test_a_host_that_does_not_answer_in_the_middle_breaks_the_instant_and_holds_nobody(story: FleetStory, verb: str) -> None:
    members = group(story)
    fault = WireFault(How.REFUSED, verb=verb, host_id=members[1].host_id, error=Unavailable("agent-gone", "nobody answers"))
    story.wire.plan(fault)
    operation = accept_together(story, members)
    story.settle()
    assert fault.met.is_set()
    instant = instant_of(story, operation)
    assert instant.state == "broken"
    assert "nobody answers" in instant.problem
    for vm in members:
        holds = story.agents.agent(vm.host_id).holds
        assert holds.wait_for(instant.id, vm.id, timeout_s=0).state != "held"
    assert audit_invariants(story) == []


def test_what_cannot_be_a_group_is_refused_by_name(story: FleetStory) -> None:
    (first, second) = group(story)
    with pytest.raises(InvalidRequest):
        accept_together(story, [first])
    with pytest.raises(InvalidRequest):
        accept_together(story, [first, first])
    accept_together(story, [first, second])
    with pytest.raises(Conflict) as busy:
        accept_together(story, [first, second])
    assert busy.value.code == "operation-in-progress"
    story.settle()


def test_a_policy_takes_all_its_vms_at_one_instant(new_story: Callable[..., FleetStory]) -> None:
    story = new_story()
    members = group(story)
    loop = BackupLoop(db=story.db, clock=story.clock, nudger=story.nudger)
    now = story.clock.now()

    def work(session: Any) -> None:
        spec = PolicySpec(name="hourly", schedule="0 * * * *", repo="main", is_together=True)
        policy = backup_policies.create(session, spec, project=story.project, now=now).policy
        for vm in members:
            vms.update(session, vm.id, backup_policy_id=policy.id, backup_asked_at=None)

    story.db.write(work)
    loop.ask(story.term)
    story.settle()
    instant = story.db.read(lambda session: backup_instants.find(session, story.project.id, "hourly"))
    assert instant is not None
    assert (instant.state, len(instant.members)) == ("consistent", len(members)), instant.problem
    loop.ask(story.term)
    again = story.db.read(lambda session: backup_instants.find(session, story.project.id, "hourly"))
    assert again is not None
    assert again.id == instant.id, "it is not due again"
