"""Wishes bend and rules do not: a rule that should hold decides while it can be had, and refuses nobody."""

from collections.abc import Callable
from dataclasses import replace

from trimtab_controller.core.placement import (
    Books,
    FleetSnapshot,
    HostSnapshot,
    PlacementRequest,
    Taint,
    decide,
)
from trimtab_controller.core.placement.needs import GroupNeed, GroupRule, Relation
from trimtab_controller.core.placement.policies import BEST_FIT
from trimtab_controller.core.placement.snapshot import TaintEffect

MakeHost = Callable[..., HostSnapshot]
MakeRequest = Callable[..., PlacementRequest]


def member(request: PlacementRequest, number: int, rule: GroupRule) -> PlacementRequest:
    name = f"db{number}"
    return replace(
        request, request_id=name, vm_id=name, vm_name=name, group=GroupNeed(group_id="grp-1", name="db", rules=(rule,))
    )


def placed(books: Books, request: PlacementRequest) -> str | None:
    chosen = decide(books, request, policy=BEST_FIT).chosen_host_id
    if chosen is not None:
        books.claim(request, chosen)
    return chosen


def test_members_that_should_be_apart_are_while_racks_last_and_then_share_one(
    make_host: MakeHost, make_request: MakeRequest
) -> None:
    hosts = [make_host("node1", labels={"rack": "r1"}), make_host("node2", labels={"rack": "r2"})]
    books, rule = Books(FleetSnapshot.of(hosts, [])), GroupRule(relation=Relation.APART, domain="rack", is_must=False)
    chosen = [placed(books, member(make_request(), number, rule)) for number in range(3)]
    assert set(chosen[:2]) == {"host-node1", "host-node2"}, "packing alone would have put both on the first"
    assert chosen[2] is not None


def test_members_that_should_be_together_are_though_another_host_is_fuller(
    make_host: MakeHost, make_request: MakeRequest
) -> None:
    hosts = [make_host("node1"), make_host("node2", vcpus_claimed=8, memory_claimed_mib=8192)]
    books, rule = Books(FleetSnapshot.of(hosts, [])), GroupRule(relation=Relation.TOGETHER, is_must=False)
    first = member(make_request(), 1, rule)
    books.claim(first, "host-node1")
    assert placed(books, member(make_request(), 2, rule)) == "host-node1"
    assert placed(books, make_request()) == "host-node2", "who is in no group goes where it packs"


def test_a_taint_that_says_avoid_is_avoided_and_used_when_nothing_else_is_left(
    make_host: MakeHost, make_request: MakeRequest
) -> None:
    old = make_host("node1", taints=frozenset({Taint("old", effect=TaintEffect.AVOID)}))
    books = Books(FleetSnapshot.of([old, make_host("node2", vcpus_limit=2)], []))
    assert placed(books, make_request(request_id="a", vm_id="a")) == "host-node2"
    assert placed(books, make_request(request_id="b", vm_id="b")) == "host-node1"


def test_a_vm_that_shall_restart_elsewhere_goes_where_its_host_can_be_proven_off_while_there_is_room(
    make_host: MakeHost, make_request: MakeRequest
) -> None:
    bare = make_host("node1", vcpus_claimed=8, memory_claimed_mib=8192, can_be_proven_off=False)
    books = Books(FleetSnapshot.of([bare, make_host("node2", vcpus_limit=2)], []))
    assert placed(books, make_request(request_id="a", vm_id="a")) == "host-node1", "packing alone decides for who stays down"
    kept = [make_request(request_id=name, vm_id=name, restarts_elsewhere=True) for name in ("b", "c")]
    assert [placed(books, one) for one in kept] == ["host-node2", "host-node1"]


def test_where_no_host_can_be_proven_off_packing_decides(make_host: MakeHost, make_request: MakeRequest) -> None:
    hosts = [make_host("node1", can_be_proven_off=False), make_host("node2", vcpus_claimed=8, can_be_proven_off=False)]
    books = Books(FleetSnapshot.of(hosts, []))
    decision = decide(books, make_request(restarts_elsewhere=True), policy=BEST_FIT)
    assert decision.chosen_host_id == "host-node2"
    assert decision.chosen is not None
    assert "protected" not in decision.chosen.scores
