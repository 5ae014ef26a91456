"""Memory in a rebalance: a host on which tasks wait for it, or that has nearly used it up, is relieved; what is short takes no vm."""

from collections.abc import Mapping

import pytest

from trimtab_controller.core.placement import FleetSnapshot, HostSnapshot, PlacementKind, PlacementRequest
from trimtab_controller.core.planning import Estate, Plan, VmSnapshot, plan_rebalance
from trimtab_controller.core.planning.drain import Terms
from trimtab_controller.core.planning.load import HostUse
from trimtab_controller.core.planning.rebalance import NO_HISTORY, History, RebalancePolicy

HOSTS = ("a", "b", "c")


def rebalanced(use: Mapping[str, HostUse]) -> Plan:
    """Three hosts of 16 GiB, each with four vms of 2 GiB that use no processor to speak of."""
    homes = {f"vm-{host}{number}": host for host in HOSTS for number in range(4)}
    hosts = [
        HostSnapshot(
            host_id=host, name=host, vcpus_limit=16, memory_limit_mib=16384, vcpus_claimed=4, memory_claimed_mib=4 * 2048
        )
        for host in HOSTS
    ]
    vms = [
        VmSnapshot(
            vm_id=vm,
            name=vm,
            host_id=host,
            request=PlacementRequest(
                request_id=vm, vm_id=vm, vm_name=vm, project_id="p", kind=PlacementKind.MIGRATE, vcpus=1, memory_mib=2048
            ),
            load_millis=10,
        )
        for vm, host in homes.items()
    ]
    estate = Estate.of(FleetSnapshot.of(hosts, []), vms, cpu_millis=dict.fromkeys(HOSTS, 16_000), use=use)
    return plan_rebalance(estate, RebalancePolicy(), Terms())


@pytest.mark.parametrize("pressure", [0.0, 0.09])
def test_hosts_that_are_even_and_not_short_are_left_alone(pressure: float) -> None:
    plan = rebalanced({"a": HostUse(memory_pressure=pressure)})
    assert (plan.steps, "none is short of memory" in plan.summary) == ((), True)


def test_a_host_on_which_tasks_wait_for_memory_is_relieved_until_the_others_are_as_full() -> None:
    plan = rebalanced({"a": HostUse(memory_pressure=0.4)})
    assert {step.host_id for step in plan.moves} == {"a"}
    assert sorted(step.target_host_id for step in plan.moves) == ["b", "c"]


def test_memory_that_is_free_on_paper_and_not_available_takes_no_vm() -> None:
    plan = rebalanced({"a": HostUse(memory_pressure=0.4), "b": HostUse(memory_withheld_mib=16384 - 4 * 2048 - 2047)})
    assert {step.target_host_id for step in plan.moves} == {"c"}


def test_a_host_on_which_tasks_wait_for_memory_takes_no_vm_and_the_plan_says_what_it_is_about() -> None:
    waits = HostUse(memory_pressure=0.4)
    plan = rebalanced({"a": waits, "b": HostUse(memory_pressure=0.2)})
    assert {(step.host_id, step.target_host_id) for step in plan.moves} == {("a", "c")}
    assert "tasks wait for memory on a 40% of the time, b 20% of the time" in plan.summary
    assert all(step.why.endswith("after its cost; tasks wait for memory on a 40% of the time") for step in plan.moves)


REAL_MIB, OTHERS_MIB = 16384, 300


def used(
    used_mib: Mapping[str, int],
    *,
    policy: RebalancePolicy | None = None,
    history: History = NO_HISTORY,
    homes: Mapping[str, str] | None = None,
    millis: Mapping[str, int] | None = None,
    waiting: str = "",
) -> Plan:
    """Three hosts with 16 cores, 16 GiB and claims for 32, four vms each that claim 4 GiB and really hold and use so much.

    `used_mib`, `millis`: of each vm by the letter of the host where it was first. `waiting`: a host on which tasks wait for memory.
    """
    homes = homes or {f"{host}{number}": host for host in HOSTS for number in range(4)}
    hosts = [
        HostSnapshot(
            host_id=host,
            name=host,
            vcpus_limit=16,
            memory_limit_mib=2 * REAL_MIB,
            vcpus_claimed=sum(home == host for home in homes.values()),
            memory_claimed_mib=sum(4096 for home in homes.values() if home == host),
        )
        for host in HOSTS
    ]
    vms = [
        VmSnapshot(
            vm_id=vm,
            name=vm,
            host_id=host,
            request=PlacementRequest(
                request_id=vm, vm_id=vm, vm_name=vm, project_id="p", kind=PlacementKind.MIGRATE, vcpus=1, memory_mib=4096
            ),
            load_millis=(millis or {}).get(vm[0], 10),
            used_mib=used_mib[vm[0]],
        )
        for vm, host in homes.items()
    ]
    use = {
        host: HostUse(memory_mib=REAL_MIB, memory_others_mib=OTHERS_MIB, memory_pressure=0.2 if host == waiting else 0.0)
        for host in HOSTS
    }
    estate = Estate.of(FleetSnapshot.of(hosts, []), vms, cpu_millis=dict.fromkeys(HOSTS, 16_000), use=use)
    return plan_rebalance(estate, policy or RebalancePolicy(), Terms(), history=history)


def test_a_host_whose_memory_is_nearly_used_up_is_relieved_however_even_processors_and_claims_are() -> None:
    plan = used({"a": 3900, "b": 1000, "c": 1200})
    (step,) = plan.moves
    assert (step.host_id, step.target_host_id) == ("a", "b"), "to where most is left"
    assert step.why == "memory: a is predicted to use 97% of it, 3900 MiB for this vm"
    assert plan.summary.startswith("rebalance: 1 move, predicted use of memory a 97% to 73%, CPU spread")
    assert plan.before["memory_used_fullest"] == round((4 * 3900 + OTHERS_MIB) / REAL_MIB, 4)
    assert plan.expected["memory_used_fullest"] == round((3 * 3900 + OTHERS_MIB) / REAL_MIB, 4)
    homes = {f"{host}{number}": host for host in HOSTS for number in range(4)} | {step.vm_id: step.target_host_id}
    assert used({"a": 3900, "b": 1000, "c": 1200}, homes=homes).steps == (), "the state that it leaves gives no second plan"


def test_below_the_mark_and_between_the_marks_nothing_is_moved_for_memory() -> None:
    for held_mib in (3300, 3700, 3815):
        plan = used({"a": held_mib, "b": 1000, "c": 1000})
        assert (4 * held_mib + OTHERS_MIB) / REAL_MIB < 0.95
        assert (plan.steps, "none is short of memory" in plan.summary) == ((), True)
    assert used({"a": 3820, "b": 1000, "c": 1000}).steps


def test_no_host_is_filled_with_memory_that_it_would_lack_by_what_was_measured() -> None:
    room_mib = int(0.9 * REAL_MIB) - OTHERS_MIB - 3900
    assert [step.target_host_id for step in used({"a": 3900, "b": room_mib // 4, "c": 3500}).moves] == ["b"]
    plan = used({"a": 3900, "b": room_mib // 4 + 1, "c": 3500})
    assert plan.steps == ()
    assert plan.summary == (
        "no beneficial move: a is predicted to use 97% of its memory, but no vm that may move has a place with memory to spare"
    )


def test_a_vm_that_was_never_measured_is_taken_to_need_what_it_claims_and_relieves_nobody() -> None:
    # On b: 4096 for each of its own, whatever they hold.
    assert [step.target_host_id for step in used({"a": 3900, "b": 0, "c": 1000}).moves] == ["c"]
    assert used({"a": 0, "b": 1000, "c": 1000}).steps == ()


def test_relief_keeps_to_the_budget_and_lets_vms_rest() -> None:
    short = {"a": 3900, "b": 1000, "c": 1200}
    assert "budget of 0 moves" in used(short, policy=RebalancePolicy(moves_per_hour=0)).summary
    resting = {f"a{number}": 60.0 for number in range(3)}
    assert [step.vm_id for step in used(short, history=History(moved_ago_s=resting)).moves] == ["a3"]
    assert used(short, history=History(moved_ago_s=dict.fromkeys(["a3", *resting], 60.0))).steps == ()


def test_relief_does_not_go_where_tasks_wait_for_memory_however_much_is_left() -> None:
    plan = used({"a": 3900, "b": 10, "c": 1200}, waiting="b", policy=RebalancePolicy(memory_weight=0.0))
    assert [(step.host_id, step.target_host_id) for step in plan.moves] == [("a", "c")]


def test_what_evening_out_makes_room_for_is_relieved_in_the_same_plan() -> None:
    # At first b's processors are too busy for another vm, and c has too little memory for one of a's.
    plan = used({"a": 3900, "b": 1000, "c": 2800}, millis={"b": 3600})
    assert ("b", "c") in {(step.host_id, step.target_host_id) for step in plan.moves}
    assert [(step.target_host_id, step.why[:9]) for step in plan.moves if step.host_id == "a"] == [("b", "memory: a")]


def test_a_vm_that_is_moved_on_for_evenness_goes_there_at_once_and_says_why_it_left() -> None:
    plan = used({"a": 3900, "b": 1000, "c": 1200}, millis={"a": 2000, "b": 1500})
    (step, *_) = [step for step in plan.moves if step.host_id == "a"]
    assert (step.target_host_id, step.why[:9]) == ("c", "memory: a")
