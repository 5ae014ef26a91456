"""Single decisions of plans that properties meet too seldom."""

from dataclasses import replace

import pytest

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.placement import (
    FleetSnapshot,
    GroupNeed,
    GroupRule,
    GroupSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    Relation,
)
from trimtab_controller.core.planning import Cause, Estate, Rates, Slots, StepKind, Terms, VmSnapshot, plan_drain
from trimtab_controller.core.planning.estate import Power
from trimtab_controller.core.planning.plan import Step
from trimtab_controller.core.planning.timeline import migration_network, timed
from trimtab_controller.core.planning.what_if import WhatIf


def vm(name: str, host: str, vcpus: int) -> VmSnapshot:
    request = PlacementRequest(
        request_id=name,
        vm_id=name,
        vm_name=name,
        project_id="p",
        kind=PlacementKind.MIGRATE,
        vcpus=vcpus,
        memory_mib=1024,
    )
    return VmSnapshot(vm_id=name, name=name, host_id=host, request=request)


def estate(limits: dict[str, int], *vms: VmSnapshot) -> Estate:
    hosts = [
        HostSnapshot(
            host_id=name,
            name=name,
            vcpus_limit=limit,
            memory_limit_mib=65536,
            vcpus_claimed=sum(one.request.vcpus for one in vms if one.host_id == name),
        )
        for name, limit in limits.items()
    ]
    return Estate.of(FleetSnapshot.of(hosts), vms)


def test_a_move_waits_for_the_one_that_makes_its_room_and_so_does_every_later_move_to_that_host() -> None:
    first, second, third = vm("a", "one", 3), vm("b", "two", 2), vm("c", "two", 1)
    what_if = WhatIf(estate({"one": 3, "two": 3, "three": 8}, first, second, third))
    assert what_if.move(first, StepKind.MIGRATE, "three").after == ()
    assert what_if.move(second, StepKind.MIGRATE, "one").after == (0,)
    assert what_if.move(third, StepKind.MIGRATE, "one").after == (0,), "the room that is left is that of the first, too"


def test_a_move_that_has_room_as_things_are_waits_for_nothing() -> None:
    first, second = vm("a", "one", 2), vm("b", "two", 2)
    what_if = WhatIf(estate({"one": 4, "two": 4, "three": 4}, first, second))
    what_if.move(first, StepKind.MIGRATE, "three")
    assert what_if.move(second, StepKind.MIGRATE, "one").after == ()


def test_a_second_move_of_a_vm_waits_for_its_first() -> None:
    only = vm("a", "one", 1)
    what_if = WhatIf(estate({"one": 2, "two": 2, "three": 2}, only))
    what_if.move(only, StepKind.MIGRATE, "two")
    assert what_if.move(only, StepKind.MIGRATE, "three").after == (0,)


def test_a_move_without_room_is_refused_and_books_nothing() -> None:
    first, second = vm("a", "one", 2), vm("b", "two", 2)
    what_if = WhatIf(estate({"one": 2, "two": 2}, first, second))
    with pytest.raises(ValueError, match="vcpus"):
        what_if.move(first, StepKind.MIGRATE, "two")
    assert what_if.host_of["a"] == "one"
    assert what_if.steps == []


def test_rates_are_those_that_were_measured_and_defaults_until_three_were() -> None:
    assert not Rates.measured([(1 << 30, 10.0)]).is_measured
    measured = Rates.measured([(1 << 30, 11.0), (2 << 30, 21.0), (4 << 30, 41.0)])
    assert measured.is_measured
    assert measured.overhead_s == 5.0


def test_a_vm_for_which_no_host_has_room_is_a_blocker_and_so_is_one_whose_group_forbids_every_other() -> None:
    room = plan_drain(estate({"one": 4, "two": 1}, vm("a", "one", 2)), ["one"], Terms())
    assert [(one.vm_name, one.cause) for one in room.blockers] == [("a", Cause.NO_TARGET)]
    assert "trimtab vm explain a" in room.blockers[0].cure
    group = GroupNeed(group_id="grp-1", name="db", rules=(GroupRule(relation=Relation.APART),))
    members = [replace(one, request=replace(one.request, group=group)) for one in (vm("a", "one", 1), vm("b", "two", 1))]
    plain = estate({"one": 4, "two": 4}, *members)
    groups = [GroupSnapshot(group_id="grp-1", members={"a": "one", "b": "two"})]
    apart = plan_drain(Estate.of(FleetSnapshot.of(plain.fleet.hosts, groups=groups), members), ["one"], Terms())
    assert [(one.vm_name, one.cause) for one in apart.blockers] == [("a", Cause.ANTI_AFFINITY)]


@pytest.mark.parametrize(
    ("address", "labels", "network"),
    [
        ("192.0.2.11", {}, "192.0.2.0/24"),
        ("192.0.2.200", {"rack": "r1"}, "192.0.2.0/24"),
        ("192.0.3.11", {}, "192.0.3.0/24"),
        ("192.0.3.11", {"migration-network": "blue"}, "blue"),
        ("2001:db8:0:1::5", {}, "2001:db8:0:1::/64"),
        ("127.0.0.1", {}, ""),
        ("", {}, ""),
    ],
)
def test_the_migration_network_of_a_host_is_its_labels_or_its_addresss_subnet(
    address: str, labels: dict[str, str], network: str
) -> None:
    assert migration_network(address, labels) == network


def begins(network_of: dict[str, str], *ends: tuple[str, str]) -> list[float]:
    """Return when each of these moves begins, one after the other on each network; each takes ten seconds."""
    steps = [
        Step(position=position, kind=StepKind.MIGRATE, host_id=source, target_host_id=target, vm_id=f"vm{position}")
        for position, (source, target) in enumerate(ends)
    ]
    slots = Slots(per_host=4, per_network=1, network_of=network_of)
    return [step.starts_s for step in timed(steps, slots, Rates(overhead_s=10.0))[0]]


def test_moves_count_against_the_slots_of_the_network_that_they_use_and_of_no_other() -> None:
    apart = {"a": "blue", "b": "blue", "c": "red", "d": "red"}
    assert begins(apart, ("a", "b"), ("c", "d"), ("b", "a"), ("d", "c")) == [0, 0, 10, 10]
    assert begins(dict.fromkeys("abcd", "blue"), ("a", "b"), ("c", "d"), ("b", "a")) == [0, 10, 20]
    assert begins({}, ("a", "b"), ("c", "d")) == [0, 10], "hosts of which nothing is known share one"
    assert begins(apart, ("a", "c"), ("b", "a"), ("d", "c")) == [0, 10, 10], "one between two networks takes a slot of both"


@pytest.mark.parametrize(
    ("seen_as", "cause", "cure"),
    [
        (ObservedState.STOPPED, Cause.NOT_RUNNING, "trimtab vm start a"),
        (ObservedState.CRASHED, Cause.NOT_RUNNING, "trimtab vm stop a"),
        (ObservedState.PAUSED, Cause.NOT_RUNNING, "trimtab vm resume a"),
        (ObservedState.INCOMING, Cause.STATE_UNKNOWN, "wait until its host is heard of"),
        (ObservedState.UNKNOWN, Cause.STATE_UNKNOWN, "wait until its host is heard of"),
    ],
)
def test_a_vm_that_is_not_seen_running_keeps_its_host_from_being_drained_and_says_as_what_it_is_seen(
    seen_as: ObservedState, cause: Cause, cure: str
) -> None:
    seen = replace(vm("a", "one", 1), power=Power.UNKNOWN, seen_as=seen_as)
    plan = plan_drain(estate({"one": 4, "two": 4}, seen), ("one",), Terms())
    (blocker,) = plan.blockers
    assert (plan.moves, blocker.cause) == ((), cause)
    assert cure in blocker.cure
