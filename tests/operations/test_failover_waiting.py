"""Recoveries that have to wait: for room, for a host without another member of their group, for an operator, for the breaker."""

from collections.abc import Callable, Iterator

import pytest

from tests.operations.claim_view import claims_of
from tests.operations.failover_kit import ROUNDS, Story, story_of
from tests.operations.kit import FleetStory
from tests.operations.test_vm_groups import group
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Vm
from trimtab_controller.core.model.failover import FailoverVmRow
from trimtab_controller.core.placement.needs import GroupRule, Relation
from trimtab_controller.services import failover_view, recovery, vm_groups
from trimtab_controller.store import failover

MOST_OF_A_HOST_MIB, HALF_OF_A_HOST_MIB = 80_000, 60_000


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=3))


def outcome(story: Story, vm: Vm) -> FailoverVmRow:
    """What `failover get` shows of the vm in the loss of its first host."""
    record = story.record(vm.host_id)
    view = story.fleet.db.read(lambda session: failover_view.get(session, record.id))
    return next(one.row for one in view.vms if one.row.vm_id == vm.id)


def waiting(story: Story) -> dict[str, str]:
    """Vm → why it waits, as `failover status` shows it."""
    return {one.vm: one.why for one in story.fleet.db.read(failover_view.status).waiting}


def pause(story: Story, *, is_on: bool) -> None:
    story.fleet.db.write(
        lambda session: recovery.set_paused(session, is_on, actor=story.fleet.actor, now=story.fleet.clock.now())
    )


def without_room(story: Story) -> tuple[Vm, list[Vm]]:
    """Return a kept vm whose host is proven off, and those that take the room of all others."""
    victim, *others = story.fleet.host_ids
    vm = story.kept_vm(to_host_id=victim, memory_mib=MOST_OF_A_HOST_MIB)
    fillers = [
        story.fleet.running_vm(f"big{number}", to_host_id=host_id, memory_mib=MOST_OF_A_HOST_MIB)
        for number, host_id in enumerate(others)
    ]
    story.arm(victim)
    story.lose(victim)
    story.rounds(60)
    assert story.record(victim).state == "fenced"
    return vm, fillers


def make_room(story: Story, filler: Vm) -> None:
    story.fleet.accept_power(filler, "stop", force=True)
    story.fleet.settle(until=lambda: not story.fleet.running_on(filler.id))


def test_a_vm_that_no_host_has_room_for_waits_says_why_and_goes_on_when_there_is_room(story: Story) -> None:
    vm, (filler, _other) = without_room(story)
    assert story.fleet.running_on(vm.id) == frozenset()
    assert "MiB free of" in story.fleet.vm(vm.id).problem
    shown = outcome(story, vm)
    assert shown.state == "waiting"
    assert "MiB free of" in shown.why
    assert "MiB free of" in waiting(story)[vm.name]
    story.rounds(ROUNDS)
    assert "MiB free of" in story.fleet.vm(vm.id).problem, "it waits as long as it takes"
    make_room(story, filler)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    assert story.fleet.running_on(vm.id) == {filler.host_id}
    story.rounds(3)
    assert story.fleet.vm(vm.id).problem == ""
    assert outcome(story, vm).state == "running"
    assert waiting(story) == {}
    assert claims_of(story.fleet, vm.id) == {filler.host_id: "home"}


def test_members_that_must_be_apart_wait_where_no_host_is_without_another_and_start_apart(
    new_story: Callable[..., FleetStory],
) -> None:
    for story in story_of(new_story(host_count=4)):
        free = story.fleet.host_ids[3]
        filler = story.fleet.running_vm("big", to_host_id=free, memory_mib=MOST_OF_A_HOST_MIB)
        group(story.fleet, "db", GroupRule(relation=Relation.APART))
        members = [
            story.kept_vm(f"db{number}", group="db", to_host_id=host_id, memory_mib=HALF_OF_A_HOST_MIB)
            for number, host_id in enumerate(story.fleet.host_ids[:3])
        ]
        victim = members[0].host_id
        story.arm(victim)
        story.lose(victim)
        story.rounds(60)
        assert story.record(victim).state == "fenced"
        assert story.fleet.running_on(members[0].id) == frozenset(), "hosts with room have a member"
        for told in (story.fleet.vm(members[0].id).problem, outcome(story, members[0]).why, waiting(story)["db0"]):
            assert "group db must anti-affinity by host" in told
        make_room(story, filler)
        story.rounds(ROUNDS, until=lambda: story.is_home_again(members[0]))  # noqa: B023
        assert [story.fleet.vm(one.id).host_id for one in members] == [free, members[1].host_id, members[2].host_id]


def test_members_that_would_rather_be_apart_are_not_held_back_by_it(story: Story) -> None:
    group(story.fleet, "web", GroupRule(relation=Relation.APART, is_must=False))
    members = [story.kept_vm(f"web{number}", group="web", vcpus=1) for number in range(3)]
    victim = members[0].host_id
    assert len({one.host_id for one in members}) == 3
    story.arm(victim)
    story.lose(victim)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(members[0]))
    assert story.is_home_again(members[0])


def test_members_of_one_lost_host_start_apart_from_each_other(story: Story) -> None:
    group(story.fleet, "db")
    victim = story.fleet.host_ids[0]
    members = [story.kept_vm(f"db{number}", group="db", vcpus=1, to_host_id=victim) for number in range(2)]
    rules, now = [GroupRule(relation=Relation.APART)], story.fleet.clock.now()
    story.fleet.db.write(
        lambda session: vm_groups.change(
            session, "db", rules, project=story.fleet.project, expected_version=None, actor=story.fleet.actor, now=now
        )
    )
    story.arm(victim)
    story.lose(victim)
    story.rounds(ROUNDS, until=lambda: all(story.is_home_again(one) for one in members))
    assert {story.fleet.vm(one.id).host_id for one in members} == set(story.fleet.host_ids[1:])
    assert all(story.is_home_again(one) for one in members)


def test_an_operators_pause_keeps_a_recovery_that_waits_waiting_although_there_is_room(story: Story) -> None:
    vm, (filler, _other) = without_room(story)
    pause(story, is_on=True)
    make_room(story, filler)
    story.rounds(ROUNDS)
    assert story.fleet.running_on(vm.id) == frozenset()
    assert "paused" in story.fleet.vm(vm.id).problem
    assert "paused" in outcome(story, vm).why
    pause(story, is_on=False)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    assert story.fleet.running_on(vm.id) == {filler.host_id}
    assert [one.kind for one in story.operations(vm.id)].count("vm.recover") == 1, "it was never given up"


def test_a_pause_keeps_the_vms_of_a_host_that_is_proven_off_waiting(story: Story) -> None:
    vm = story.kept_vm()
    story.lose(vm.host_id)
    story.rounds(5)
    pause(story, is_on=True)
    story.power_cut(vm.host_id)
    story.confirm_off(vm.host_id)
    story.rounds(ROUNDS)
    assert story.fleet.running_on(vm.id) == frozenset()
    assert "vm.recover" not in [one.kind for one in story.operations(vm.id)]
    pause(story, is_on=False)
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    assert story.is_home_again(vm)


def test_the_breaker_leaves_a_recovery_that_waits_waiting_and_it_goes_on_afterwards(story: Story) -> None:
    vm, fillers = without_room(story)
    for standing in (HostConnectivity.SUSPECT, HostConnectivity.LOST):
        for filler in fillers:
            story.silence(filler.host_id, standing)
        story.rounds(3)
    story.rounds(ROUNDS)
    assert "of 3 hosts are lost at once" in story.fleet.db.read(failover.control).frozen
    assert story.fleet.running_on(vm.id) == frozenset()
    assert outcome(story, vm).state == "waiting"
    for filler in fillers:
        story.return_of(filler.host_id)
    story.rounds(ROUNDS)
    assert story.fleet.db.read(failover.control).frozen == ""
    make_room(story, fillers[0])
    story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))
    assert story.fleet.running_on(vm.id) == {fillers[0].host_id}
    assert [one.kind for one in story.operations(vm.id)].count("vm.recover") == 1, "it was never given up"


def test_the_breaker_fences_nobody_and_holds_up_no_vm_whose_host_was_proven_off_before(
    new_story: Callable[..., FleetStory],
) -> None:
    for story in story_of(new_story(host_count=5)):
        kept = [story.kept_vm(f"kept{number}", to_host_id=host_id) for number, host_id in enumerate(story.fleet.host_ids[1:3])]
        vm, fillers = without_room(story)
        lost, living = fillers[:2], fillers[2]
        for one in lost:
            story.arm(one.host_id)
        asked = list(story.device.asked)
        for standing in (HostConnectivity.SUSPECT, HostConnectivity.LOST):
            for one in lost:
                story.silence(one.host_id, standing)
            story.rounds(3)
        make_room(story, living)
        story.rounds(ROUNDS, until=lambda: story.is_home_again(vm))  # noqa: B023
        assert "of 5 hosts are lost at once" in story.fleet.db.read(failover.control).frozen
        assert story.fleet.running_on(vm.id) == {living.host_id}
        assert story.device.asked == asked, "nobody is fenced"
        assert [story.fleet.vm(one.id).host_id for one in kept] == [one.host_id for one in lost]
