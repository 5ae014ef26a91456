"""What is kept along between decisions says exactly what a scan of the whole fleet says."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.properties.test_placement import Fleet, fleets, policy_of, requests
from trimtab_controller.core.placement import Books, FleetSnapshot, PlacementRequest, scan
from trimtab_controller.core.placement.shapes import Asked
from trimtab_controller.core.placement.standing import standing_decision


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[PlacementRequest, bool]]:
    """Return requests of few shapes, each asked several times; after some of them an earlier one is given back."""
    shapes = [draw(requests(number)) for number in range(draw(st.integers(1, 3)))]
    return draw(st.lists(st.tuples(st.sampled_from(shapes), st.booleans()), min_size=1, max_size=12))


@given(fleets(), histories(), st.integers(1, 3), st.data())
def test_a_kept_answer_equals_the_scan_whatever_was_claimed_and_given_back(
    fleet: Fleet, history: list[tuple[PlacementRequest, bool]], depth: int, data: Any
) -> None:
    books = Books(FleetSnapshot.of(*fleet))
    placed: list[tuple[PlacementRequest, str]] = []
    for request, gives_back in history:
        policy = policy_of(request)
        scanned = scan(books, request, policy=policy, listed_hosts=-1)
        asked = Asked.of(books, request, policy)
        kept = standing_decision(asked, count=depth, depth=depth) if asked is not None else None
        if kept is not None:
            assert (kept.fit_count, kept.refused_by, kept.cells) == (scanned.fit_count, scanned.refused_by, scanned.cells)
            assert kept.fitting.verdicts() == scanned.fitting.verdicts()[:depth]
        if scanned.chosen_host_id is not None:
            books.claim(request, scanned.chosen_host_id)
            placed.append((request, scanned.chosen_host_id))
        if gives_back and placed:
            books.release(*placed.pop(data.draw(st.integers(0, len(placed) - 1))))
