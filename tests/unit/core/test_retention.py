"""Which backups stay: the periods, what may never go, and schedules that say when the next one is due."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trimtab_controller.core.retention import Candidate, Proof, Retention, judge
from trimtab_controller.core.schedule import JITTER_MAX_S, parse_schedule
from trimtab_protos.errors import InvalidRequest

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


def at(days: float = 0, *, proof: Proof = Proof.NONE, held_until: datetime | None = None) -> Candidate:
    created = NOW - timedelta(days=days)
    return Candidate(f"bk-{created:%Y%m%dT%H%M}", created, proof, held_until)


def kept(candidates: list[Candidate], policy: Retention) -> list[str]:
    return [verdict.backup_id for verdict in judge(candidates, policy, now=NOW) if verdict.is_kept]


def ids(*candidates: Candidate) -> list[str]:
    return [found.backup_id for found in candidates]


def test_the_newest_of_each_day_is_kept() -> None:
    hours = [at(hour / 24) for hour in range(0, 24 * 4, 6)]
    verdicts = judge(hours, Retention(daily=3), now=NOW)
    assert [v.backup_id for v in verdicts if v.is_kept] == ["bk-20261125T1200", "bk-20261124T1800", "bk-20261123T1800"]
    assert [v.reason for v in verdicts if v.is_kept][1] == "keep-daily 2 of 3"
    assert {v.reason for v in verdicts if not v.is_kept} == {"no period is left for it"}


def test_a_longer_period_begins_where_a_shorter_one_ended() -> None:
    days = [at(day) for day in range(400)]
    stay = kept(days, Retention(daily=7, weekly=4, monthly=12, yearly=1))
    assert len(stay) == 7 + 4 + 12
    assert stay[:7] == ids(*days[:7])


def test_a_day_begins_where_the_zone_says() -> None:
    late, early = Candidate("late", datetime(2026, 11, 24, 23, 30, tzinfo=UTC)), Candidate("early", NOW)
    assert len([v for v in judge([late, early], Retention(daily=9), now=NOW) if v.is_kept]) == 2
    berlin = judge([late, early], Retention(daily=9), now=NOW, zone=ZoneInfo("Europe/Berlin"))
    assert [v.backup_id for v in berlin if v.is_kept] == ["early"]


def test_a_policy_without_numbers_keeps_everything() -> None:
    assert len(kept([at(day) for day in range(50)], Retention())) == 50


def test_a_damaged_backup_fills_no_place() -> None:
    broken, good, old = at(0, proof=Proof.DAMAGED), at(1), at(2)
    verdicts = judge([broken, good, old], Retention(last=1), now=NOW)
    assert [v.backup_id for v in verdicts if v.is_kept] == ids(good)
    assert verdicts[0].reason == "damaged, and a better one is kept"


def test_a_damaged_backup_that_may_be_repaired_stays_beside_a_better_one() -> None:
    broken = Candidate("broken", NOW - timedelta(days=3), Proof.DAMAGED, may_be_repaired=True)
    verdicts = judge([at(0), broken, at(9, proof=Proof.DAMAGED)], Retention(last=1), now=NOW)
    assert [v.is_kept for v in verdicts] == [True, True, False]
    assert verdicts[1].reason == "damaged; the vm's next backup may repair it"


def test_the_last_verified_backup_never_goes() -> None:
    proven = at(30, proof=Proof.VERIFIED)
    assert kept([at(0), at(1), proven, at(60, proof=Proof.VERIFIED)], Retention(last=1)) == ids(at(0), proven)


def test_what_is_not_proven_yet_waits_for_its_proof() -> None:
    fresh, proven, never = at(0), at(1, proof=Proof.VERIFIED), at(2)
    verdicts = judge([fresh, proven, never, at(3, proof=Proof.VERIFIED)], Retention(last=1, needs_proof=True), now=NOW)
    assert [v.is_kept for v in verdicts] == [True, True, False, False]
    assert verdicts[2].reason == "never verified, and a verified one is newer"


def test_a_hold_keeps_until_its_end() -> None:
    held, over = at(50, held_until=NOW + timedelta(1)), at(51, held_until=NOW)
    assert kept([at(0), held, over], Retention(last=1)) == ids(at(0), held)


def test_where_all_are_damaged_none_is_removed() -> None:
    broken = [at(day, proof=Proof.DAMAGED) for day in range(3)]
    assert len(kept(broken, Retention(last=1))) == 3


def test_a_number_out_of_range_is_named() -> None:
    with pytest.raises(InvalidRequest, match="keep_daily is -1"):
        Retention(daily=-1)


@given(
    st.lists(st.tuples(st.integers(0, 900), st.sampled_from(Proof)), max_size=40),
    st.builds(
        Retention,
        last=st.integers(0, 3),
        hourly=st.integers(0, 3),
        daily=st.integers(0, 3),
        weekly=st.integers(0, 3),
        monthly=st.integers(0, 3),
        yearly=st.integers(0, 3),
        needs_proof=st.booleans(),
    ),
)
def test_pruning_twice_removes_nothing_more_and_never_the_best(found: list[tuple[int, Proof]], policy: Retention) -> None:
    candidates = [Candidate(f"bk-{i:03}", NOW - timedelta(days=day), proof) for i, (day, proof) in enumerate(found)]
    first = [verdict.backup_id for verdict in judge(candidates, policy, now=NOW) if verdict.is_kept]
    left = [candidate for candidate in candidates if candidate.backup_id in first]
    again = [verdict.backup_id for verdict in judge(left, policy, now=NOW) if verdict.is_kept]
    assert again == first
    assert bool(first) == bool(candidates)
    if any(candidate.proof is Proof.VERIFIED for candidate in candidates):
        assert any(candidate.proof is Proof.VERIFIED for candidate in left)


def test_a_schedule_is_due_at_its_hour_and_each_vm_a_little_later() -> None:
    schedule = parse_schedule(" 0  2 * * * ", jitter_s=1800)
    one, two = (schedule.next_after(NOW, subject_id=vm) for vm in ("vm-1", "vm-2"))
    two_o_clock = datetime(2026, 11, 26, 2, tzinfo=UTC)
    assert one != two
    for due in (one, two):
        assert two_o_clock <= due <= two_o_clock + timedelta(seconds=1800)
    assert schedule.next_after(one, subject_id="vm-1") == one + timedelta(days=1)
    assert schedule.next_after(one - timedelta(seconds=1), subject_id="vm-1") == one


def test_a_clock_change_neither_skips_nor_repeats_a_backup() -> None:
    schedule = parse_schedule("30 2 * * *", zone="Europe/Berlin")
    due, at_ = [], datetime(2026, 3, 27, tzinfo=UTC)
    for _ in range(4):
        at_ = schedule.next_after(at_, subject_id="vm-1")
        due.append(at_.day)
    assert due == [27, 28, 29, 30]
    autumn = parse_schedule("30 2 * * *", zone="Europe/Berlin")
    first = autumn.next_after(datetime(2026, 10, 24, 12, tzinfo=UTC), subject_id="vm-1")
    assert autumn.next_after(first, subject_id="vm-1").day == 26


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("", "0 of 5 fields"),
        ("0 2 * *", "4 of 5 fields"),
        ("0 2 * * * *", "6 of 5 fields"),
        ("61 2 * * *", "cannot be parsed"),
        ("0 25 * * *", "cannot be parsed"),
        ("every day at two o", "cannot be parsed"),
        ("0 0 30 2 *", "Bad day-of-month"),
    ],
)
def test_a_schedule_that_cannot_be_parsed_says_why_and_shows_one_that_can(expression: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_schedule(expression)
    assert told in refused.value.message
    assert "`0 2 * * *`" in refused.value.message
    assert refused.value.context["field"] == "schedule"


def test_zone_and_jitter_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="Middle/Earth"):
        parse_schedule("0 2 * * *", zone="Middle/Earth")
    with pytest.raises(InvalidRequest, match=str(JITTER_MAX_S)):
        parse_schedule("0 2 * * *", jitter_s=-1)
