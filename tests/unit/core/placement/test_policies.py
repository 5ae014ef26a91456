"""Which of the hosts that fit is taken, by policy."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from trimtab_controller.core.placement import (
    BEST_FIT,
    POLICIES,
    Books,
    FleetSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    Policy,
    decide,
    explain,
    policy_named,
)
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS
from trimtab_controller.core.placement.snapshot import CellSnapshot
from trimtab_protos.errors import InvalidRequest

MakeHost = Callable[..., HostSnapshot]
MakeRequest = Callable[..., PlacementRequest]


def order(fleet: FleetSnapshot, request: PlacementRequest, policy: Policy = BEST_FIT) -> list[str]:
    return list(explain(fleet, request, policy=policy).fitting.host_names)


def test_best_fit_takes_the_fullest_host_that_still_fits(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of(
        [
            make_host("node1"),
            make_host("node2", vcpus_claimed=12, memory_claimed_mib=12000),
            make_host("node3", vcpus_claimed=6, memory_claimed_mib=6000),
        ]
    )
    assert order(fleet, make_request()) == ["node2", "node3", "node1"]


def test_best_fit_scores_a_host_that_becomes_exactly_full_with_one(make_host: MakeHost, make_request: MakeRequest) -> None:
    decision = explain(FleetSnapshot.of([make_host()]), make_request(vcpus=16, memory_mib=15872))
    assert decision.fitting.totals == (1.0,)


def test_spread_takes_the_emptiest_host(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1", vcpus_claimed=4), make_host("node2"), make_host("node3", vcpus_claimed=8)])
    assert order(fleet, make_request(), POLICIES["spread"]) == ["node2", "node1", "node3"]


def test_spread_looks_at_memory_as_much_as_at_vcpus(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node1", memory_claimed_mib=8000), make_host("node2", vcpus_claimed=2)])
    decision = explain(fleet, make_request(vcpus=0, memory_mib=0), policy=POLICIES["spread"])
    assert decision.fitting.host_names == ("node2", "node1")
    assert decision.fitting.totals == pytest.approx((1 - 2 / 16 / 2, 1 - 8000 / 15872 / 2), abs=1e-6)


def test_balanced_takes_the_host_whose_two_resources_end_up_even(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of(
        [make_host("cpu-heavy", vcpus_claimed=12), make_host("memory-heavy", memory_claimed_mib=12000), make_host("even")]
    )
    big_memory = make_request(vcpus=1, memory_mib=3800)
    assert order(fleet, big_memory, Policy("balanced-only", {"balanced": 1.0}))[0] == "even"
    assert order(fleet, make_request(vcpus=1, memory_mib=11000), POLICIES["balanced"])[0] == "cpu-heavy"


def test_fragmentation_leaves_alone_what_a_larger_vm_could_still_use(make_host: MakeHost, make_request: MakeRequest) -> None:
    """Best fit takes the fuller host, into whose room a vm of twice the size still goes; of the other's it never would."""
    whole = make_host("whole", vcpus_claimed=12, memory_claimed_mib=15872 - 4096)
    crumbs = make_host("crumbs", vcpus_claimed=13, memory_claimed_mib=15872 - 9000)
    fleet, request = FleetSnapshot.of([whole, crumbs]), make_request(vcpus=2, memory_mib=2048)
    assert order(fleet, request) == ["whole", "crumbs"]
    assert order(fleet, request, Policy("fragmentation-only", {"fragmentation": 1.0})) == ["crumbs", "whole"]


def test_a_small_vm_leaves_alone_the_room_of_a_large_one(make_host: MakeHost, make_request: MakeRequest) -> None:
    """Of one host just a quarter is free, of the other a quarter and the room for one small vm, which best fit leaves over."""
    quarter = make_host("quarter", vcpus_claimed=12, memory_claimed_mib=15872 - 3968)
    and_some = make_host("and-some", vcpus_claimed=11, memory_claimed_mib=15872 - 4992)
    fleet, small = FleetSnapshot.of([quarter, and_some]), make_request(vcpus=1, memory_mib=1024)
    assert order(fleet, small) == ["quarter", "and-some"]
    assert order(fleet, small, POLICIES["fragmentation-aware"]) == ["and-some", "quarter"]


def room_after(policy: Policy, rng: random.Random, make_request: MakeRequest, shape: tuple[int, int]) -> int:
    """Return how many vms of this shape (vcpus, GiB) there is room for on 20 hosts, four fifths in use, after many came and went."""
    hosts = [HostSnapshot(host_id=f"h{i:02}", name=f"h{i:02}", vcpus_limit=64, memory_limit_mib=262_144) for i in range(20)]
    books, live, used = Books(FleetSnapshot.of(hosts)), [], 0.0
    for number in range(700):
        vcpus, memory_gib = rng.choice([(1, 2), (1, 6), (2, 4), (2, 12), (4, 8), (4, 24), (8, 16), (8, 48)])
        vm = make_request(request_id=f"op-{number}", vm_id=f"vm-{number}", vcpus=vcpus, memory_mib=memory_gib * 1024)
        chosen = decide(books, vm, policy=policy).chosen_host_id
        assert chosen is not None
        books.claim(vm, chosen)
        live.append((vm, chosen))
        used += vcpus / 64 + memory_gib / 256
        while used > 2 * 0.8 * len(hosts):
            gone, host_id = live.pop(rng.randrange(len(live)))
            books.release(gone, host_id)
            used -= gone.vcpus / 64 + gone.memory_mib / 262_144
    vcpus_free, memory_free = books.free[VCPUS] // shape[0], books.free[MEMORY] // (shape[1] * 1024)
    return int(np.minimum(vcpus_free, memory_free).sum())


def test_fragmentation_aware_keeps_more_room_for_large_vms_than_best_fit_does(make_request: MakeRequest) -> None:
    def room(policy: Policy) -> list[int]:
        return [room_after(policy, random.Random(seed), make_request, (16, 64)) for seed in range(4)]

    aware, best_fit = room(POLICIES["fragmentation-aware"]), room(BEST_FIT)
    assert all(one >= other for one, other in zip(aware, best_fit, strict=True))
    assert sum(aware) > sum(best_fit)


def test_equal_hosts_are_taken_in_order_of_name(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host(name) for name in ("node3", "node1", "node2")])
    assert order(fleet, make_request()) == ["node1", "node2", "node3"]


def test_among_equal_hosts_the_one_with_more_of_the_images_is_taken(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of(
        [
            make_host("node1"),
            make_host("node2", image_ids=frozenset({"img-a"})),
            make_host("node3", image_ids=frozenset({"img-a", "img-b"})),
        ]
    )
    decision = explain(fleet, make_request(image_ids=("img-a", "img-b")))
    assert decision.fitting.host_names == ("node3", "node2", "node1")
    assert decision.fitting.scores["image-locality"] == (1.0, 0.5, 0.0)


def test_a_start_stays_home_where_home_fits(make_host: MakeHost, make_request: MakeRequest) -> None:
    hosts = [make_host("node1", vcpus_claimed=12, memory_claimed_mib=12000), make_host("node2")]
    request = make_request(kind=PlacementKind.START, preferred_host_id="host-node2")
    assert order(FleetSnapshot.of(hosts), request)[0] == "node2"
    full = [hosts[0], make_host("node2", vcpus_claimed=16)]
    assert order(FleetSnapshot.of(full), request) == ["node1"]


def test_a_wish_that_nothing_is_known_about_leaves_the_choice_to_the_name(make_host: MakeHost, make_request: MakeRequest) -> None:
    fleet = FleetSnapshot.of([make_host("node2"), make_host("node1", vcpus_claimed=9)])
    decision = explain(fleet, make_request(), policy=Policy("home-only", {"home": 1.0}))
    assert (decision.fitting.host_names, decision.fitting.totals) == (("node1", "node2"), (0.0, 0.0))


def test_a_policy_is_found_by_name_and_an_unknown_one_is_refused_with_the_choices() -> None:
    assert policy_named("best-fit") is BEST_FIT
    with pytest.raises(InvalidRequest, match="policies are best-fit, spread, balanced") as refused:
        policy_named("lottery")
    assert refused.value.code == "policy-unknown"


def test_a_policy_weighs_only_known_scorers_with_weights_above_zero() -> None:
    with pytest.raises(InvalidRequest, match="weighs luck"):
        Policy("odd", {"luck": 1.0})
    with pytest.raises(InvalidRequest, match="above 0"):
        Policy("odd", {"best-fit": 0.0})
    with pytest.raises(InvalidRequest, match="above 0"):
        Policy("odd", {})


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_vm_on_cpus_of_its_own_is_scored_as_any_other_where_shared_vcpus_are_overdrawn(
    make_host: MakeHost, make_request: MakeRequest, policy: Policy
) -> None:
    host = make_host(vcpus_limit=1, unmanaged_vcpus=3, cells=(CellSnapshot(cell=0, cpus_limit=4),))
    decision = explain(FleetSnapshot.of([host]), make_request(is_dedicated=True), policy=policy)
    assert decision.chosen is not None
    assert decision.chosen.score is not None
    assert 0 <= decision.chosen.score <= 1
