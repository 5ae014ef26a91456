"""A long history on one fleet: what requests of a family are told stays the scan's answer while hosts leave crowds and tiles."""

import random
from dataclasses import replace

import pytest

from tests.bench import placement_fleets
from trimtab_controller.core.placement import BEST_FIT, POLICIES, Books, FleetSnapshot, PlacementRequest, Policy, Toleration, scan
from trimtab_controller.core.placement.families import Sizes, family_decision
from trimtab_controller.core.placement.shapes import Asked

TINY = Sizes(
    fleet_at_least=0,
    asked_at_least=0,
    crowd_at_least=8,
    crowds_at_most=2,
    loose_at_most=8,
    spare_tiles=6,
    places=4,
    few_tiles=0,
    looked_into=1,
    forbidden_at_most=2,
)


def _fleet(rng: random.Random) -> FleetSnapshot:
    """Half of the hosts are alike but for their names."""
    hosts, pools = placement_fleets.make_fleet(120, rng)
    one = replace(hosts[0], vcpus_claimed=0, memory_claimed_mib=0, is_cordoned=False, taints=frozenset(), devices={})
    alike = [replace(one, host_id=host.host_id, name=host.name) for host in hosts[60:]]
    return FleetSnapshot.of([*hosts[:60], *alike], pools, groups=placement_fleets.make_groups(hosts, 50, rng))


def _requests(rng: random.Random) -> list[PlacementRequest]:
    requests = placement_fleets.mixed(400, rng, distinct_sizes=True)
    return [replace(one, tolerations=(Toleration("old"),)) if rng.random() < 0.1 else one for one in requests]


@pytest.mark.parametrize("sizes", [TINY, replace(TINY, few_tiles=100), replace(TINY, crowds_at_most=0, loose_at_most=20)])
@pytest.mark.parametrize("policy", [BEST_FIT, POLICIES["spread"], POLICIES["balanced"]], ids=lambda policy: policy.name)
def test_a_family_answers_as_the_scan_does_all_through_a_long_history(sizes: Sizes, policy: Policy) -> None:
    rng = random.Random(7)
    books, live, answered = Books(_fleet(rng)), [], 0
    for request in _requests(rng):
        scanned = scan(books, request, policy=policy, listed_hosts=-1)
        asked = Asked.of(books, request, policy)
        kept = family_decision(asked, count=2, sizes=sizes) if asked is not None else None
        if kept is not None:
            answered += 1
            assert (kept.fit_count, kept.refused_by) == (scanned.fit_count, scanned.refused_by)
            assert kept.fitting.verdicts() == scanned.fitting.verdicts()[:2]
        if scanned.chosen_host_id is not None:
            books.claim(request, scanned.chosen_host_id)
            live.append((request, scanned.chosen_host_id))
        if live and rng.random() < 0.5:
            books.release(*live.pop(rng.randrange(len(live))))
    assert answered > 200


def test_a_policy_whose_wishes_nobody_can_bound_is_left_to_the_scan() -> None:
    rng = random.Random(7)
    books = Books(_fleet(rng))
    for request in placement_fleets.plain(3, rng, distinct_sizes=True, vcpu=1):
        asked = Asked.of(books, request, POLICIES["fragmentation-aware"])
        assert asked is not None
        assert family_decision(asked, count=2, sizes=TINY) is None
