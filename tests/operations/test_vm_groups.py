"""Vm groups on a fleet: placed by their rules, moved by them, and proven to survive by them."""

import pytest

from tests.operations.invariants import audit_invariants
from tests.operations.kit import FleetStory
from tests.operations.test_plans import apply, make
from trimtab_controller.core.model import Vm
from trimtab_controller.core.placement.needs import GroupRule, Relation
from trimtab_controller.core.planning import PlanKind
from trimtab_controller.core.planning.domains import domains_of
from trimtab_controller.core.planning.proof import FailoverProof
from trimtab_controller.operations.estates import read_estate
from trimtab_controller.services import vm_groups
from trimtab_controller.store import schema
from trimtab_protos.errors import TrimtabError

APART, TOGETHER = GroupRule(relation=Relation.APART), GroupRule(relation=Relation.TOGETHER)


def group(story: FleetStory, name: str, *rules: GroupRule) -> None:
    story.db.write(
        lambda session: vm_groups.create(
            session, name=name, rules=rules, project=story.project, actor=story.actor, now=story.clock.now()
        )
    )


def hosts_of(story: FleetStory, vms: list[Vm]) -> list[str]:
    return [story.vm(vm.id).host_id for vm in vms]


def label(story: FleetStory, **racks: str) -> None:
    table = schema.host
    for name, rack in racks.items():
        story.db.write(
            lambda session, name=name, rack=rack: session.execute(  # type: ignore[misc]
                table.update().where(table.c.name == name).values(labels={"rack": rack})
            )
        )


def test_members_are_placed_apart_and_one_too_many_is_refused_by_the_rule(story: FleetStory) -> None:
    group(story, "db", APART)
    members = [story.running_vm(f"db{number}", group="db") for number in range(3)]
    assert len(set(hosts_of(story, members))) == 3
    with pytest.raises((TrimtabError, AssertionError), match="group db must anti-affinity by host"):
        story.running_vm("db3", group="db")
    assert audit_invariants(story) == []


def test_members_that_belong_together_share_a_host(story: FleetStory) -> None:
    group(story, "app", TOGETHER)
    members = [story.running_vm(f"app{number}", group="app") for number in range(3)]
    assert len(set(hosts_of(story, members))) == 1


def test_a_drain_moves_a_member_where_no_other_is(story: FleetStory) -> None:
    group(story, "db", APART)
    members = [story.running_vm(f"db{number}", group="db") for number in range(2)]
    first, second = hosts_of(story, members)
    free = next(host_id for host_id in story.host_ids if host_id not in {first, second})
    view = make(story, PlanKind.DRAIN, first)
    assert [step.target_host_id for step in view.plan.moves] == [free]
    apply(story, view)
    story.settle()
    assert hosts_of(story, members) == [free, second]
    assert audit_invariants(story) == []


def test_a_member_that_has_nowhere_to_go_blocks_its_drain_and_is_not_proven_to_survive(story: FleetStory) -> None:
    group(story, "db", APART)
    members = [story.running_vm(f"db{number}", group="db", ha="restart") for number in range(3)]
    other = story.running_vm("web1", ha="restart")
    (blocker,) = make(story, PlanKind.DRAIN, hosts_of(story, members)[0]).plan.blockers
    assert blocker.vm_id == members[0].id
    assert "group" in blocker.message + blocker.cure
    estate = story.db.read(lambda session: read_estate(session, now=story.clock.now()))
    uncovered = FailoverProof(estate, domains_of(estate, ["host"])).uncovered()
    assert set(uncovered) == {vm.id for vm in members}
    assert other.id not in uncovered


def test_a_limit_holds_in_each_rack(story: FleetStory) -> None:
    names = {host.host_id: host.name for host in _fleet(story)}
    label(story, **{names[story.host_ids[0]]: "r1", names[story.host_ids[1]]: "r1", names[story.host_ids[2]]: "r2"})
    group(story, "db", GroupRule(relation=Relation.APART, domain="rack", limit=2))
    members = [story.running_vm(f"db{number}", group="db") for number in range(4)]
    in_r2 = [host_id for host_id in hosts_of(story, members) if host_id == story.host_ids[2]]
    assert len(in_r2) == 2
    with pytest.raises((TrimtabError, AssertionError), match="at most 2 each"):
        story.running_vm("db4", group="db")


def _fleet(story: FleetStory) -> tuple[object, ...]:
    return story.db.read(lambda session: read_estate(session, now=story.clock.now())).fleet.hosts
