"""Rules of vm groups in a rebalance: they bind their members alone, and what they allow changes with every move."""

import pytest

from trimtab_controller.core.placement import FleetSnapshot, HostSnapshot, PlacementKind, PlacementRequest
from trimtab_controller.core.placement.needs import GroupNeed, GroupRule, Relation
from trimtab_controller.core.placement.snapshot import GroupSnapshot
from trimtab_controller.core.planning import Estate, VmSnapshot, plan_rebalance
from trimtab_controller.core.planning.drain import Terms
from trimtab_controller.core.planning.rebalance import RebalancePolicy

EAGER = RebalancePolicy(start_spread=0.0, least_worth=0.005)
GROUP_ID = "grp-1"


def estate(memory_of: dict[str, int], homes: dict[str, str], members: set[str], rule: GroupRule) -> Estate:
    """`memory_of`: GiB by host, which are its vcpus too; every vm takes one of each; the first host is alone in rack 1 with the second."""
    group = GroupNeed(group_id=GROUP_ID, name="db", rules=(rule,))
    hosts = [
        HostSnapshot(
            host_id=host,
            name=host,
            vcpus_limit=gib,
            memory_limit_mib=gib * 1024,
            vcpus_claimed=list(homes.values()).count(host),
            memory_claimed_mib=list(homes.values()).count(host) * 1024,
            labels={"rack": "2" if host == "c" else "1"},
        )
        for host, gib in memory_of.items()
    ]
    vms = [
        VmSnapshot(
            vm_id=vm,
            name=vm,
            host_id=host,
            request=PlacementRequest(
                request_id=vm,
                vm_id=vm,
                vm_name=vm,
                project_id="p",
                kind=PlacementKind.MIGRATE,
                vcpus=1,
                memory_mib=1024,
                group=group if vm in members else None,
            ),
            load_millis=0,
        )
        for vm, host in homes.items()
    ]
    groups = [GroupSnapshot(group_id=GROUP_ID, members={vm: homes[vm] for vm in members})]
    return Estate.of(FleetSnapshot.of(hosts, [], groups=groups), vms, cpu_millis=dict.fromkeys(memory_of, 16_000))


@pytest.mark.parametrize("other_gib", [1, 2])
def test_a_move_that_a_rule_forbids_until_another_was_made_is_made_after_it(other_gib: int) -> None:
    """Three members in one rack that may hold two: none may enter its other host before one has left the rack."""
    rule = GroupRule(relation=Relation.APART, domain="rack", limit=2)
    homes = {"vm-0": "a", "vm-1": "a", "vm-2": "a"}
    plan = plan_rebalance(estate({"a": 3, "b": other_gib, "c": 1}, homes, set(homes), rule), EAGER, Terms())
    assert [(step.host_id, step.target_host_id) for step in plan.moves] == [("a", "c"), ("a", "b")]


@pytest.mark.parametrize("member", ["vm-0", "vm-1"])
def test_a_rule_of_one_vm_does_not_hold_its_neighbour_back(member: str) -> None:
    rule = GroupRule(relation=Relation.APART)
    homes = {"vm-0": "a", "vm-1": "a", "other": "b"}
    plan = plan_rebalance(estate({"a": 2, "b": 8}, homes, {member, "other"}, rule), EAGER, Terms())
    assert [step.vm_id for step in plan.moves] == [vm for vm in ("vm-0", "vm-1") if vm != member]
