"""A vm on local storage comes back from its last backup when its host is proven off, and from nothing less than that."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.operations.backup_kit import content_of, made_backup, ready_repo, write_to
from tests.operations.failover_kit import Story, story_of
from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.lost_disks import AFTER
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.lost_disks import LostDisksLoop
from trimtab_controller.services import backup_policies, lost_disks
from trimtab_controller.services.backup_policies import PolicySpec
from trimtab_controller.store import failover, vms

LONG = int(AFTER.total_seconds()) + 60


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=4))


def local_vm(story: Story, *, recovers: bool = True) -> Vm:
    """Return a vm on local storage with a backup, and what it wrote since."""
    fleet = story.fleet
    ready_repo(fleet)
    vm = story.kept_vm("db", pool=fleet.local)

    def work(session: Any) -> None:
        spec = PolicySpec(name="nightly", schedule="0 2 * * *", repo="main", recovers_lost=recovers)
        policy = backup_policies.create(session, spec, project=fleet.project, now=fleet.clock.now()).policy
        vms.update(session, vm.id, backup_policy_id=policy.id, backup_asked_at=fleet.clock.now())

    fleet.db.write(work)
    write_to(fleet, vm.id, 0, b"what was backed up")
    made_backup(fleet, vm)
    write_to(fleet, vm.id, 0, b"what came afterward")
    return vm


def rounds(story: Story, count: int, *, until: Callable[[], bool] = lambda: False) -> None:
    loop = LostDisksLoop(db=story.fleet.db, clock=story.fleet.clock, nudger=story.fleet.nudger)
    for _ in range(count):
        if until():
            return
        story.rounds(1)
        loop.run(story.fleet.term)
        story.fleet.engine.drive_due()
        story.fleet.wait_for_jobs()


def test_it_comes_back_from_its_backup_on_another_host_and_the_loss_is_told_before_and_after(story: Story) -> None:
    vm = local_vm(story)
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    rounds(story, 100)
    waiting = story.fleet.vm(vm.id)
    assert waiting.host_id == vm.host_id
    assert "unless its host returns it comes back" in waiting.problem
    assert "which loses" in waiting.problem
    rounds(story, LONG, until=lambda: story.is_home_again(vm))
    after = story.fleet.vm(vm.id)
    assert story.fleet.running_on(vm.id) == {after.host_id} != {vm.host_id}
    assert after.epoch > vm.epoch
    assert content_of(story.fleet, vm.id).startswith(b"what was backed up")
    rounds(story, 5)
    record = story.record(vm.host_id)
    assert any("of it are lost" in line["what"] for line in record.evidence)
    (outcome,) = story.fleet.db.read(lambda session: failover.vms_of(session, record.id))
    assert outcome.state == "running"

    old = story.fleet.hypervisor(vm.host_id)
    old.boot()
    story.return_of(vm.host_id)
    rounds(story, 60, until=lambda: vm.id not in old.domains)
    assert story.fleet.running_on(vm.id) == {after.host_id}, "what it left behind is put away, never started"
    assert audit_invariants(story.fleet) == []


def test_before_any_loss_it_is_known_what_would_come_back_and_what_would_be_lost(story: Story) -> None:
    fleet = story.fleet
    shared = story.kept_vm("web")
    bare = story.kept_vm("cache", pool=fleet.local)
    vm = local_vm(story)
    fleet.clock.advance(7200)

    def foreseen() -> dict[str, lost_disks.AtStake]:
        return {one.vm.id: one for one in fleet.db.read(lambda session: lost_disks.at_stake(session, now=fleet.clock.now()))}

    stakes = foreseen()
    assert shared.id not in stakes, "another host reaches its disks"
    assert (stakes[bare.id].answer.is_due, stakes[bare.id].loss_s, stakes[bare.id].backup) == (False, None, None)
    found = stakes[vm.id]
    assert found.answer.is_due
    assert "which loses 2 h" in found.answer.why
    assert found.backup is not None
    assert found.loss_s is not None
    assert 7200 <= found.loss_s < 7300

    policy_id = fleet.vm(vm.id).backup_policy_id
    fleet.db.write(lambda session: vms.update(session, vm.id, backup_policy_id=""))
    without = foreseen()[vm.id]
    assert (without.answer.is_due, without.loss_s is not None) == (False, True), "what a hand could restore is told all the same"
    assert "--recover-lost" in without.answer.why
    fleet.db.write(lambda session: vms.update(session, vm.id, backup_policy_id=policy_id, ha="none"))
    assert "--ha restart" in foreseen()[vm.id].answer.why


def test_a_host_that_returns_before_its_time_loses_nothing(story: Story) -> None:
    vm = local_vm(story)
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    rounds(story, 60)
    story.fleet.hypervisor(vm.host_id).boot()
    story.return_of(vm.host_id)
    rounds(story, LONG, until=lambda: bool(story.fleet.running_on(vm.id)))
    rounds(story, 10)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert content_of(story.fleet, vm.id).startswith(b"what came afterward")
    assert "vm.bring_back" not in [one.kind for one in story.operations(vm.id)]


def test_a_host_that_returns_while_the_disks_are_filled_keeps_its_vm_and_the_new_disks_go(story: Story) -> None:
    vm = local_vm(story)
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    rounds(story, LONG, until=lambda: "vm.bring_back" in [one.kind for one in story.operations(vm.id)])
    story.fleet.hypervisor(vm.host_id).boot()
    story.return_of(vm.host_id)
    rounds(story, 60, until=lambda: bool(story.fleet.running_on(vm.id)))
    rounds(story, 10)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert content_of(story.fleet, vm.id).startswith(b"what came afterward")
    assert [one.state.value for one in story.operations(vm.id) if one.kind == "vm.bring_back"] == ["failed"]
    assert audit_invariants(story.fleet) == []


def test_without_proof_or_without_the_policy_nothing_is_brought_back(story: Story) -> None:
    vm = local_vm(story, recovers=False)
    story.arm(vm.host_id)
    story.lose(vm.host_id)
    rounds(story, LONG + 60)
    assert story.fleet.running_on(vm.id) == frozenset()
    assert "vm.bring_back" not in [one.kind for one in story.operations(vm.id)]


def test_a_silent_host_that_nothing_proves_off_keeps_its_vms(story: Story) -> None:
    vm = local_vm(story)
    story.lose(vm.host_id)
    rounds(story, LONG + 60)
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert "vm.bring_back" not in [one.kind for one in story.operations(vm.id)]
    story.silence(vm.host_id, HostConnectivity.UP)
