"""A database of yesterday meets hosts that went on without it: nothing is doubled, lost or resurrected."""

import uuid
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.operations.claim_view import claims_of
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.base import Stamp
from trimtab_controller.clock import mint
from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.core.restored import Difference
from trimtab_controller.services import restored
from trimtab_controller.services.restored import Restored
from trimtab_controller.store import describe, failover, hosts, schema
from trimtab_protos.errors import Unavailable


def look(story: FleetStory) -> Restored:
    found = story.db.read(hosts.live)
    seen, silent = restored.ask_hosts(found, story.client.list_domains)
    return story.db.read(lambda session: restored.find(session, seen, silent))


def take(story: FleetStory) -> Restored:
    what = look(story)
    story.db.write(lambda session: restored.apply(session, what, now=story.clock.now()))
    return what


def set_back(story: FleetStory, vm_id: str, **values: object) -> None:
    """Let the database be of before."""
    story.db.write(lambda session: session.execute(schema.vm.update().where(schema.vm.c.id == vm_id).values(**values)))


def turn_of(story: FleetStory, vm_id: str) -> int:
    query = sa.select(schema.turn.c.value).where(schema.turn.c.subject_id == vm_id)
    return int(story.db.read(lambda session: session.execute(query).scalar_one()))


def test_a_vm_that_moved_since_is_taken_over_where_it_runs_and_old_commands_are_too_old(story: FleetStory) -> None:
    vm = story.running_vm()
    story.accept_power(vm, "migrate")
    story.settle()
    now = story.vm(vm.id)
    turn = turn_of(story, vm.id)
    set_back(story, vm.id, host_id=vm.host_id, epoch=vm.epoch)
    story.db.write(lambda session: session.execute(schema.turn.update().values(value=1)))
    what = take(story)
    assert [(one.difference, one.vm_id, one.host_id) for one in what.findings] == [(Difference.ELSEWHERE, vm.id, now.host_id)]
    after = story.vm(vm.id)
    assert (after.host_id, after.epoch) == (now.host_id, now.epoch)
    assert claims_of(story, vm.id) == {now.host_id: "home"}
    assert turn_of(story, vm.id) > turn - 1
    story.accept_power(after, "stop", force=True)
    story.settle()
    assert story.running_on(vm.id) == frozenset(), "it obeys the new control plane"
    assert look(story).findings == ()


def test_a_vm_that_was_deleted_since_is_not_started_again(story: FleetStory) -> None:
    vm = story.running_vm()
    story.hypervisor(vm.host_id).crash_guest(vm.id)
    story.hypervisor(vm.host_id).undefine_domain(vm.id, (), kill_if_running=True, keep_state_files=False)
    what = take(story)
    assert [one.difference for one in what.findings] == [Difference.GONE]
    assert story.vm(vm.id).attention == "restored", "failover leaves it alone"
    assert "vm start" in story.vm(vm.id).problem
    kept = story.db.read(failover.kept_vms)
    assert [one.id for one in kept] == []


def test_a_vm_that_was_made_since_is_shown_and_not_touched(story: FleetStory) -> None:
    vm = story.running_vm()
    spec = story.db.read(lambda session: describe.domain_spec(session, describe.read_vm(session, vm.id), vm.host_id))
    other = replace(spec, vm_id=mint("vm"), uuid=str(uuid.uuid4()), name="made-later")
    story.hypervisor(vm.host_id).define_domain(other, Stamp(epoch=3, turn=7))
    what = take(story)
    assert [(one.difference, one.vm_id) for one in what.findings] == [(Difference.STRANGER, other.vm_id)]
    assert other.vm_id in story.hypervisor(vm.host_id).domains


def test_what_a_silent_host_holds_stays_unknown_and_failover_waits_for_an_operator(story: FleetStory) -> None:
    vm = story.running_vm(ha="restart")
    story.hypervisor(vm.host_id).stop_answering()
    what = take(story)
    assert [(one.difference, one.vm_id) for one in what.findings] == [(Difference.UNKNOWN, vm.id)]
    assert len(what.silent) == 1
    after = story.vm(vm.id)
    assert (after.host_id, after.desired_power, after.attention) == (vm.host_id, DesiredPower.RUNNING, "")
    assert story.db.read(failover.control).is_paused
    with pytest.raises(Unavailable):
        story.client.list_domains(vm.host_id)


def test_operations_of_the_past_are_closed_and_looking_changes_nothing(story: FleetStory) -> None:
    vm = story.running_vm()
    operation = story.accept_power(vm, "stop")
    assert look(story).findings == ()
    assert story.operation(operation.id).ended_at is None
    take(story)
    ended = story.operation(operation.id)
    assert ended.error is not None
    assert ended.error.code == "database-restored"
    story.settle()
    assert story.running_on(vm.id) == {vm.host_id}
