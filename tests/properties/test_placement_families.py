"""Requests that differ in their sizes alone are told exactly what a scan of the whole fleet says."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.properties.test_placement import WISHES, Fleet, fleets, hosts, requests
from trimtab_controller.core.placement import (
    BEST_FIT,
    POLICIES,
    Books,
    FleetSnapshot,
    GroupNeed,
    GroupRule,
    PlacementRequest,
    Policy,
    Relation,
    scan,
)
from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.families import Sizes, family_decision
from trimtab_controller.core.placement.filters import FILTERS
from trimtab_controller.core.placement.filters.capacity import lacks_shared_space
from trimtab_controller.core.placement.fleet import ALL, MEMORY, VCPUS, RowIndex
from trimtab_controller.core.placement.ladders import Ladder
from trimtab_controller.core.placement.scorers import SCORERS
from trimtab_controller.core.placement.scorers.base import Extents
from trimtab_controller.core.placement.shapes import Asked

SPREAD, BALANCED = POLICIES["spread"], Policy("even", {"balanced": 1.0, "best-fit": 0.5, "taints": 2.0, "spare": 0.5})


@st.composite
def crowded_fleets(draw: st.DrawFn) -> Fleet:
    """Return fleets in which each kind of host comes several times, so that there are crowds and full tiles."""
    members, pools = draw(fleets())
    members = [*members, draw(hosts(6))]
    copies = [
        replace(host, host_id=f"{host.host_id}-{copy}", name=f"{host.name}{copy}")
        for host in members
        for copy in range(draw(st.sampled_from([0, 1, 3, 8])))
    ]
    places = [replace(pool, places=_copied(pool.places, copies)) for pool in pools]
    return [*members, *copies], places


def _copied(places: Any, copies: list[Any]) -> Any:
    own = {host.host_id: places.get(host.host_id.rsplit("-", 1)[0]) for host in copies}
    return {**places, **{host_id: place for host_id, place in own.items() if place is not None}}


# What two requests that are else alike may differ in; those that name hosts belong to no family.
APART = GroupNeed(group_id="grp-1", name="g", rules=(GroupRule(relation=Relation.APART),))
DIFFERENCES = [wish for wish in WISHES if not wish.keys() & {"required_host_id", "preferred_host_id", "excluded_host_ids"}]


@st.composite
def families(draw: st.DrawFn) -> list[tuple[PlacementRequest, bool]]:
    """Return requests of few families, each time of another size; after some of them an earlier one is given back."""
    kind = draw(requests(0))
    kinds = [kind, replace(kind, **draw(st.sampled_from(DIFFERENCES))), replace(kind, group=APART)]
    return [
        (_sized(draw, draw(st.sampled_from(kinds)), number), draw(st.booleans())) for number in range(draw(st.integers(1, 14)))
    ]


def _sized(draw: st.DrawFn, kind: PlacementRequest, number: int) -> PlacementRequest:
    sized = replace(
        kind,
        request_id=f"{kind.request_id}-{number}",
        vm_id=f"{kind.vm_id}-{number}",
        disks=tuple(replace(disk, size_bytes=draw(st.integers(0, 4))) for disk in kind.disks),
        devices={device: draw(st.integers(0, 2)) for device in kind.devices},
    )
    if kind.is_dedicated or kind.page_kib:
        return sized
    return replace(sized, vcpus=draw(st.integers(0, 4)), memory_mib=draw(st.integers(1, 4)))


small_sizes = st.builds(
    Sizes,
    fleet_at_least=st.just(0),
    asked_at_least=st.integers(0, 1),
    kept_rows=st.just(0),
    families_at_least=st.integers(1, 2),
    crowd_at_least=st.integers(2, 4),
    crowds_at_most=st.integers(0, 2),
    loose_at_most=st.integers(1, 4),
    spare_tiles=st.integers(0, 3),
    places=st.integers(2, 6),
    few_tiles=st.integers(0, 3),
    looked_into=st.integers(1, 2),
    forbidden_at_most=st.integers(0, 6),
)


@given(crowded_fleets(), families(), st.integers(1, 4), small_sizes, st.sampled_from([BEST_FIT, SPREAD, BALANCED]), st.data())
def test_an_answer_from_the_family_equals_the_scan_whatever_was_claimed_and_given_back(
    fleet: Fleet, history: list[tuple[PlacementRequest, bool]], count: int, sizes: Sizes, policy: Policy, data: Any
) -> None:
    books = Books(FleetSnapshot.of(*fleet))
    placed: list[tuple[PlacementRequest, str]] = []
    for request, gives_back in history:
        scanned = scan(books, request, policy=policy, listed_hosts=-1)
        asked = Asked.of(books, request, policy)
        kept = family_decision(asked, count=count, sizes=sizes) if asked is not None else None
        if kept is not None:
            assert (kept.fit_count, kept.refused_by, kept.cells) == (scanned.fit_count, scanned.refused_by, scanned.cells)
            assert kept.fitting.verdicts() == scanned.fitting.verdicts()[:count]
            assert (kept.refused, kept.host_count, kept.policy) == (scanned.refused, scanned.host_count, scanned.policy)
        if scanned.chosen_host_id is not None:
            books.claim(request, scanned.chosen_host_id)
            placed.append((request, scanned.chosen_host_id))
        if gives_back and placed:
            books.release(*placed.pop(data.draw(st.integers(0, len(placed) - 1))))


@given(crowded_fleets(), requests(0))
def test_a_filter_that_names_its_resources_lets_in_exactly_who_has_them_free(fleet: Fleet, request: PlacementRequest) -> None:
    books = Books(FleetSnapshot.of(*fleet))
    trial = Trial.of(books, request)
    for each in FILTERS:
        mask = each.fitting(trial, ALL)
        if each.resources is None or lacks_shared_space(trial):
            continue
        names = [name for name in each.resources(trial) if name in trial.amounts]
        has_all = [all(trial.free(name, row) >= trial.amounts[name] for name in names) for row in range(len(books.fleet))]
        assert all(has_all) if mask is None else mask.tolist() == has_all


@given(crowded_fleets(), requests(0), st.integers(1, 5))
def test_no_host_scores_more_than_its_set_is_said_to_and_one_alone_scores_just_that(
    fleet: Fleet, request: PlacementRequest, size: int
) -> None:
    books = Books(FleetSnapshot.of(*fleet))
    trial = Trial.of(books, request)
    rows = np.flatnonzero(
        [all(trial.free(name, row) >= amount for name, amount in trial.amounts.items()) for row in range(len(books.fleet))]
    )
    if not rows.size or request.is_dedicated or request.page_kib:
        return
    starts = np.arange(0, rows.size, size)
    for scorer in SCORERS.values():
        if scorer.bounds is None:
            continue
        scores = scorer.scores(trial, rows)
        assert scores is not None
        assert scorer.bounds(trial, extents(books, rows, np.arange(rows.size))).tolist() == scores.tolist()
        bounds = scorer.bounds(trial, extents(books, rows, starts))
        assert (np.maximum.reduceat(scores, starts) <= bounds).all()


def extents(books: Books, rows: RowIndex, starts: RowIndex) -> Extents:
    shares = {name: books.free_shares[name][rows] for name in (VCPUS, MEMORY)}
    inverse = {name: books.fleet.inverse_limits[name][rows] for name in (VCPUS, MEMORY)}
    return Extents(
        {name: np.minimum.reduceat(column, starts) for name, column in shares.items()},
        {name: np.maximum.reduceat(column, starts) for name, column in shares.items()},
        {name: np.minimum.reduceat(column, starts) for name, column in inverse.items()},
        {name: np.maximum.reduceat(column, starts) for name, column in inverse.items()},
    )


@given(crowded_fleets(), families(), st.integers(0, 3))
def test_a_ladder_counts_who_has_less_whatever_was_claimed(
    fleet: Fleet, history: list[tuple[PlacementRequest, bool]], beside: int
) -> None:
    books = Books(FleetSnapshot.of(*fleet))
    ladder = Ladder(books, VCPUS, beside=beside)
    for request, is_asked in history:
        chosen = scan(books, request, policy=BEST_FIT, listed_hosts=-1).chosen_host_id
        if chosen is not None:
            books.claim(request, chosen)
        if is_asked:
            below = int(np.count_nonzero(books.free[VCPUS] < request.vcpus))
            assert ladder.below(request.vcpus, books.changed_rows) == below
