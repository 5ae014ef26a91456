"""A controller that was started on a copy of yesterday's database acts on nothing once a host has spoken, until it is recovered."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.operations.failover_kit import story_of
from tests.operations.kit import FleetStory
from tests.operations.wire import FOR_EVER_S
from tests.saved_database import SavedDatabase
from trimtab_agent.hypervisor.base import Stamp
from trimtab_controller import pki
from trimtab_controller.core.lifecycle import HostConnectivity, OperationState
from trimtab_controller.core.model import Vm
from trimtab_controller.core.restored import Difference
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.services import behind as behind_service
from trimtab_controller.services import restored, sessions
from trimtab_controller.services.mutations import Answer, Mutation, perform
from trimtab_controller.services.restored import Restored
from trimtab_controller.services.sessions import Opened, Opening
from trimtab_controller.store import behind, certificates, describe, fleet, host_guards, hosts, leases, operations
from trimtab_controller.store.database import Session
from trimtab_controller.store.host_guards import HostGuard
from trimtab_protos.errors import Conflict


def hello(story: FleetStory, host_id: str, **given: int) -> Opened:
    """Let the host's agent open a session, as a gateway commits it."""
    host, now = story.db.read(lambda session: hosts.get(session, host_id)), story.clock.now()

    def work(session: Session) -> Opened:
        if certificates.get(session, f"serial-{host_id}") is None:
            later = now + timedelta(hours=72)
            certificates.record(
                session, serial=f"serial-{host_id}", host_id=host_id, purpose=pki.Purpose.AGENT, not_after=later, now=now
            )
        opening = Opening(
            host_id=host_id,
            certificate_serial=f"serial-{host_id}",
            gateway_id="gw-1",
            incarnation=host.incarnation,
            boot_id=host.boot_id,
            agent_address=host.agent_address,
            inventory=host.inventory,
            domains=story.hypervisor(host_id).list_domains(),
            **given,
        )
        return sessions.open_session(session, opening, now)

    opened = story.db.write(work)
    story.agents.agent(host_id).grant_lease(number=opened.lease_number, ttl_s=FOR_EVER_S)
    return opened


def change(story: FleetStory, *, ends_behind: bool = False) -> Answer:
    """Do what every mutation of the API does."""
    mutation = Mutation(
        actor=story.actor,
        verb="vm.start",
        resource="r",
        project_id="",
        fingerprint="",
        is_dry_run=False,
        now=story.clock.now(),
        ends_behind=ends_behind,
    )
    return story.db.write(lambda session: perform(session, mutation, lambda _session: Answer(status=204, body=b"")))


def take(story: FleetStory) -> Restored:
    seen, silent = restored.ask_hosts(story.db.read(hosts.live), story.client.list_domains)
    what = story.db.read(lambda session: restored.find(session, seen, silent))
    story.db.write(lambda session: restored.apply(session, what, now=story.clock.now()))
    story.term = story.db.read(lambda session: leases.read(session, leases.ENGINE)).term  # type: ignore[union-attr]
    return what


def is_behind(story: FleetStory) -> bool:
    return story.db.read(behind.state).is_in_force


def is_refused(work: Callable[[], Any]) -> bool:
    try:
        work()
    except Conflict as refused:
        return refused.code == "database-behind"
    return False


@pytest.fixture
def moved(story: FleetStory) -> tuple[FleetStory, Vm, Vm]:
    """Return a fleet on yesterday's database, a vm as that knows it, and as it is: it moved since. One was accepted and not begun."""
    vm = story.running_vm("web1", ha="restart")
    story.accept_create("web2")
    yesterday = SavedDatabase(story.db)
    for host_id in story.host_ids:
        hello(story, host_id)
    story.settle()
    story.accept_power(vm, "migrate")
    story.settle()
    now = story.vm(vm.id)
    assert now.host_id != vm.host_id
    yesterday.put_back()
    assert story.vm(vm.id).host_id == vm.host_id
    return story, vm, now


def test_a_session_proves_it_and_nothing_is_placed_driven_or_changed_until_it_is_recovered(
    moved: tuple[FleetStory, Vm, Vm],
) -> None:
    story, vm, now = moved
    held = 2
    opened = hello(story, now.host_id, lease_number=held)
    assert is_behind(story)
    assert opened.lease_number > held
    (waiting,) = story.db.read(lambda session: operations.page(session, limit=9, is_done=False))
    before = {host_id: set(story.hypervisor(host_id).domains) for host_id in story.host_ids}
    assert is_refused(lambda: change(story))
    assert story.engine.drive_due() == 0
    story.clock.advance(3600)
    assert story.engine.drive_due() == 0
    assert is_refused(lambda: story.db.write(lambda session: leases.assert_leader(session, story.term)))
    assert story.operation(waiting.id) == waiting
    assert {host_id: set(story.hypervisor(host_id).domains) for host_id in story.host_ids} == before
    assert story.running_on(vm.id) == {now.host_id}
    # Every other host is heard, and its lease goes on.
    for host_id in story.host_ids:
        assert hello(story, host_id, lease_number=held).lease_number > held
    # The end.
    what = take(story)
    assert what.was_behind
    assert Difference.ELSEWHERE in {one.difference for one in what.findings}
    assert not is_behind(story)
    for host_id in story.host_ids:
        hello(story, host_id, lease_number=held)
    assert not is_behind(story)
    assert change(story).status == 204
    story.accept_power(story.vm(vm.id), "stop", force=True)
    story.settle()
    assert story.running_on(vm.id) == frozenset(), "it obeys the new control plane"
    Upkeep(db=story.db, clock=story.clock, nudger=story.nudger).prepare_hosts(story.term)  # as the leader does each second
    story.settle()
    new = story.running_vm("web3")
    assert story.running_on(new.id)


def test_no_loop_of_the_leader_writes_while_the_database_is_behind(moved: tuple[FleetStory, Vm, Vm]) -> None:
    """The home of yesterday is lost: failover would start the vm that moved away from it a second time."""
    story, vm, now = moved
    stories = story_of(story)
    leader = next(stories)
    hello(story, now.host_id, lease_number=9)
    rows = story.db.read(lambda session: operations.page(session, limit=50))
    leader.arm(vm.host_id)
    leader.silence(vm.host_id, HostConnectivity.LOST)
    refused = 0
    for _second in range(180):
        refused += is_refused(lambda: leader.loop.run(story.term))
        refused += is_refused(lambda: story.placement.run(story.term))
        story.clock.advance(1.0)
    assert refused
    assert story.db.read(lambda session: operations.page(session, limit=50)) == rows
    assert story.running_on(vm.id) == {now.host_id}
    assert leader.device.asked == [], "nobody's power is cut"
    assert story.db.read(leases.revocations) == (), "nobody's lease is ended"
    stories.close()


def test_a_host_is_told_of_no_network_and_pool_of_yesterday_and_of_today_s_once_the_database_is_trusted(
    moved: tuple[FleetStory, Vm, Vm],
) -> None:
    """A network that was deleted or renumbered since would be defined again, over the one that guests are on."""
    story, _vm, now = moved
    host_id = now.host_id
    host = story.hypervisor(host_id)
    opened = hello(story, host_id, lease_number=2)
    assert (opened.networks, opened.pools) == ((), ())
    guard = HostGuard(is_armed=True, beacon_pool_id=story.shared.id)
    story.db.write(
        lambda session: host_guards.write(session, host_id, guard, lease_number=opened.lease_number, now=story.clock.now())
    )
    opened = hello(story, host_id, lease_number=opened.lease_number)
    assert [one.pool_id for one in opened.pools] == [story.shared.id], "its beacon goes on where it renewed"
    assert opened.networks == ()
    host.crash()
    host.boot()  # and has none of its networks up
    number = hello(story, host_id, lease_number=opened.lease_number).lease_number
    story.db.write(lambda session: behind_service.trust(session, reason="a test", actor=story.actor, now=story.clock.now()))
    story.term = story.db.read(lambda session: leases.read(session, leases.ENGINE)).term  # type: ignore[union-attr]
    assert [one_id for one_id, _name in story.db.read(fleet.hosts_to_prepare)] == [host_id]
    Upkeep(db=story.db, clock=story.clock, nudger=story.nudger).prepare_hosts(story.term)
    story.settle()
    assert story.db.read(fleet.hosts_to_prepare) == (), "told by an operation, without a session of its own for it"
    opened = hello(story, host_id, lease_number=number)
    assert opened.networks
    assert {one.pool_id for one in opened.pools} >= {story.shared.id, story.local.id}


def test_a_driver_in_the_middle_of_an_operation_stops_at_its_next_record(story: FleetStory) -> None:
    vm, operation = story.accept_create("web1")
    host_id = story.host_ids[0]
    told: list[str] = []

    def prove(_kind: str, step: str, outcome: str, _seconds: float) -> None:
        if (step, outcome) == ("place", "succeeded") and not told:
            told.append(step)
            hello(story, host_id, lease_number=99)

    engine = story.new_engine(on_step=prove, shares_commits=False)
    for _round in range(6):
        is_refused(lambda: story.step(engine))
    assert told
    assert story.operation(operation.id).state is not OperationState.DONE
    assert all(vm.id not in story.hypervisor(one).domains for one in story.host_ids)
    length = len(story.journal(operation.id))
    story.lose_driver()
    assert story.engine.drive_due() == 0
    assert len(story.journal(operation.id)) == length


def test_a_vm_that_was_worked_on_since_proves_it_where_its_host_has_no_newer_session(story: FleetStory) -> None:
    vm = story.running_vm()
    yesterday = SavedDatabase(story.db)
    story.accept_power(vm, "reboot", force=True)
    story.settle()
    story.accept_power(vm, "migrate")
    story.settle()
    at = story.vm(vm.id).host_id
    yesterday.put_back()
    hello(story, at)
    assert is_behind(story)
    assert "of vm web1" in story.db.read(behind.state).message


def test_a_vm_that_was_deleted_since_is_noticed_by_the_mark_and_not_started(story: FleetStory) -> None:
    """Nothing of it is left to be seen: only the mark tells, which every host was told."""
    vm = story.running_vm(ha="restart")
    story.db.write(behind.raise_mark)
    yesterday = SavedDatabase(story.db)
    story.db.write(behind.raise_mark)
    told = hello(story, vm.host_id).database_mark
    story.accept_power(vm, "delete")
    story.settle()
    yesterday.put_back()
    hello(story, vm.host_id, database_mark=told)
    assert is_behind(story)
    story.clock.advance(600)
    assert story.engine.drive_due() == 0
    assert story.running_on(vm.id) == frozenset()
    assert [one.difference for one in take(story).findings if one.vm_id == vm.id] == [Difference.GONE]
    hello(story, vm.host_id, database_mark=told)
    story.settle()
    assert not is_behind(story)
    assert story.running_on(vm.id) == frozenset(), "nothing is resurrected"


# --- what looks like it and is not -----------------------------------------------------------------------------------------------


def test_whatever_is_done_with_vms_proves_nothing_on_the_database_that_knows_of_it(story: FleetStory) -> None:
    vm = story.running_vm()
    for verb, wishes in (
        ("migrate", {}),
        ("stop", {"force": True}),
        ("start", {}),
        ("pause", {}),
        ("resume", {}),
        ("migrate", {}),
    ):
        story.accept_power(story.vm(vm.id), verb, **wishes)
        story.settle()
        for host_id in story.host_ids:
            hello(story, host_id)
    story.accept_power(story.vm(vm.id), "delete")
    story.settle()
    for host_id in story.host_ids:
        hello(story, host_id)
    assert not is_behind(story)


def test_the_half_copy_of_a_migration_that_was_undone_proves_nothing(story: FleetStory) -> None:
    """It carries the target's epoch, which the vm's row does not have any more."""
    vm = story.running_vm()
    spec = story.db.read(lambda session: describe.domain_spec(session, describe.read_vm(session, vm.id), vm.host_id))
    target = next(one for one in story.host_ids if one != vm.host_id)
    turn = story.db.write(lambda session: operations.raise_turn(session, vm.id))
    story.hypervisor(target).define_domain(spec, Stamp(epoch=vm.epoch + 1, turn=turn))
    for host_id in story.host_ids:
        hello(story, host_id)
    assert not is_behind(story)


def test_a_domain_of_a_vm_that_the_database_has_never_known_proves_nothing(story: FleetStory) -> None:
    vm = story.running_vm()
    spec = story.db.read(lambda session: describe.domain_spec(session, describe.read_vm(session, vm.id), vm.host_id))
    other = replace(spec, vm_id="vm-01hf7y2m3n4p5q6r7s8t9v0wxy", uuid="7d3a1c52-52c8-4f0b-9f0e-0b6a3c1f9a11", name="strange")
    story.hypervisor(vm.host_id).define_domain(other, Stamp(epoch=30, turn=70))
    hello(story, vm.host_id)
    assert not is_behind(story)


def test_a_host_that_was_silent_while_the_database_was_recovered_does_not_make_it_read_only_again(
    moved: tuple[FleetStory, Vm, Vm],
) -> None:
    story, _vm, now = moved
    story.hypervisor(now.host_id).stop_answering()
    what = take(story)
    assert len(what.silent) == 1
    story.hypervisor(now.host_id).answer_again()
    hello(story, now.host_id, lease_number=2, database_mark=5)
    assert not is_behind(story)


def test_the_mark_is_raised_by_the_leader_and_only_grows(story: FleetStory) -> None:
    upkeep = Upkeep(db=story.db, clock=story.clock, nudger=story.nudger)
    marks = []
    for _minute in range(3):
        upkeep.mark_database(story.term)
        marks.append(story.db.read(behind.mark))
    assert marks == [1, 2, 3]
    with pytest.raises(Conflict, match="another engine"):
        upkeep.mark_database(story.term - 1)
