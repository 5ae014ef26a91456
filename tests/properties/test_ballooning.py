"""Balloons: whatever host and guests are like, no guest is squeezed below what it uses, and one that is short is helped at once."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from trimtab_agent.ballooning import GuestMemory, HostMemory, Remembered, Round, Rules, Why, decide, margin_mib

RULES = Rules()
HOST = HostMemory(total_mib=16_384, available_mib=1_000)


@st.composite
def guests_of(draw: st.DrawFn) -> tuple[GuestMemory, ...]:
    found = []
    for i in range(draw(st.integers(1, 6))):
        ceiling = draw(st.integers(64, 65_536))
        floor = draw(st.integers(16, ceiling))
        given_mib = draw(st.integers(floor, ceiling))
        found.append(
            GuestMemory(
                vm_id=f"vm-{i}",
                floor_mib=floor,
                ceiling_mib=ceiling,
                given_mib=given_mib,
                usable_mib=draw(st.none() | st.integers(0, given_mib)),
                swapped_in_kib=draw(st.integers(0, 4)),
                age_s=draw(st.sampled_from([0.0, 5.0, 19.0, 21.0, 1e6])),
            )
        )
    return tuple(found)


hosts = st.builds(
    HostMemory, total_mib=st.just(16_384), available_mib=st.integers(0, 16_384), pressure_percent=st.integers(0, 100)
)
memories = st.dictionaries(
    st.sampled_from([f"vm-{i}" for i in range(6)]),
    st.builds(Remembered, swapped_in_kib=st.integers(0, 4), rests_until_s=st.sampled_from([0.0, 900.0, 1100.0])),
)


def guest(**changes: object) -> GuestMemory:
    made = GuestMemory(vm_id="vm-1", floor_mib=512, ceiling_mib=2048, given_mib=2048, usable_mib=1500)
    return replace(made, **changes)  # type: ignore[arg-type]


def once(*guests: GuestMemory, host: HostMemory = HOST, remembered: dict[str, Remembered] | None = None) -> Round:
    return decide(host, guests, remembered or {}, now_s=1000.0, rules=RULES)


@given(host=hosts, guests=guests_of(), remembered=memories)
def test_no_target_is_below_the_floor_nor_below_what_the_guest_uses_and_a_margin(
    host: HostMemory, guests: tuple[GuestMemory, ...], remembered: dict[str, Remembered]
) -> None:
    known = {each.vm_id: each for each in guests}
    for change in decide(host, guests, remembered, now_s=1000.0, rules=RULES).changes:
        seen = known[change.vm_id]
        assert seen.floor_mib <= change.target_mib <= seen.ceiling_mib
        if change.target_mib < seen.given_mib:
            assert seen.usable_mib is not None, "nothing is taken from a guest that says nothing"
            assert seen.age_s <= RULES.fresh_s
            used_mib = seen.given_mib - seen.usable_mib
            assert change.target_mib >= used_mib + margin_mib(seen, RULES)
            assert seen.given_mib - change.target_mib <= max(1, seen.ceiling_mib // 10)


@given(host=hosts, guests=guests_of(), remembered=memories)
def test_a_guest_that_is_short_or_silent_has_its_ceiling_after_one_round(
    host: HostMemory, guests: tuple[GuestMemory, ...], remembered: dict[str, Remembered]
) -> None:
    targets = {change.vm_id: change.target_mib for change in decide(host, guests, remembered, now_s=1000.0, rules=RULES).changes}
    for each in guests:
        is_silent = each.usable_mib is None or each.age_s > RULES.fresh_s
        if is_silent or (each.usable_mib or 0) < margin_mib(each, RULES) // 2:
            assert targets.get(each.vm_id, each.given_mib) == each.ceiling_mib


@given(guests=guests_of(), available=st.integers(1639, 3276))
def test_between_the_marks_nothing_is_taken_and_nothing_given(guests: tuple[GuestMemory, ...], available: int) -> None:
    host = HostMemory(total_mib=16_384, available_mib=available)
    assert {change.why for change in once(*guests, host=host).changes} <= {Why.GUEST_SHORT, Why.GUEST_SILENT}


@given(guests=guests_of(), available=st.integers(0, 16_384))
def test_no_more_is_taken_than_is_missing_and_no_more_given_than_is_spare(
    guests: tuple[GuestMemory, ...], available: int
) -> None:
    known = {each.vm_id: each.given_mib for each in guests}
    changes = once(*guests, host=HostMemory(total_mib=16_384, available_mib=available)).changes
    taken = sum(known[change.vm_id] - change.target_mib for change in changes if change.why is Why.HOST_SHORT)
    given_mib = sum(change.target_mib - known[change.vm_id] for change in changes if change.why is Why.HOST_HAS_PLENTY)
    assert taken <= max(0, 1638 - available)
    assert given_mib <= max(0, available - 3276)


def test_a_short_host_is_helped_in_steps_until_the_guest_has_nothing_to_spare() -> None:
    host, seen, targets = HostMemory(total_mib=16_384, available_mib=0), guest(), []
    for _ in range(20):
        changes = once(seen, host=host).changes
        if not changes:
            break
        targets.append(changes[0].target_mib)
        used_mib = seen.given_mib - (seen.usable_mib or 0)
        seen = guest(given_mib=changes[0].target_mib, usable_mib=changes[0].target_mib - used_mib)
    assert targets[:2] == [2048 - 204, 2048 - 408]
    assert targets[-1] == 548 + 256, "what it uses, and the margin"


def test_pressure_counts_although_enough_seems_available() -> None:
    host = HostMemory(total_mib=16_384, available_mib=12_000, pressure_percent=30)
    assert [change.why for change in once(guest(), host=host).changes] == [Why.HOST_SHORT]


def test_a_guest_that_swaps_in_has_everything_back_and_is_left_alone_for_a_while() -> None:
    squeezed = guest(given_mib=1024, usable_mib=600, swapped_in_kib=8)
    round_ = once(squeezed, remembered={"vm-1": Remembered(0)})
    assert [(change.target_mib, change.why) for change in round_.changes] == [(2048, Why.GUEST_SHORT)]
    well = guest(swapped_in_kib=8)
    assert once(well, remembered=dict(round_.remembered)).changes == ()
    later = decide(HOST, [well], round_.remembered, now_s=1000.0 + RULES.rest_s, rules=RULES)
    assert [change.why for change in later.changes] == [Why.HOST_SHORT]


def test_those_with_most_to_spare_give_first() -> None:
    rich, poor = guest(vm_id="vm-rich", usable_mib=1800), guest(vm_id="vm-poor", usable_mib=700)
    host = HostMemory(total_mib=16_384, available_mib=1538)
    assert [change.vm_id for change in once(poor, rich, host=host).changes] == ["vm-rich"]
