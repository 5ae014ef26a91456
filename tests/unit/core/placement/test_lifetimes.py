"""What is learned about how long vms live, and where they are put because of it."""

import pytest

from trimtab_controller.core.placement.lifetimes import Kind, Lifetimes, Occupancy, family_of, span_of
from trimtab_controller.core.placement.replay import Fleet

HOUR_S = 3600.0
SHORT, LONG = Kind("job", 1, 1024), Kind("db", 1, 2048)


def learned() -> Lifetimes:
    """Jobs end after ten minutes, databases after four days."""
    lifetimes = Lifetimes()
    for _ in range(1000):
        lifetimes.ended(SHORT, 600)
        lifetimes.ended(LONG, 96 * HOUR_S)
    return lifetimes


def expected_s(lifetimes: Lifetimes, kind: Kind) -> float:
    return float(Occupancy(1, lifetimes).longer_s(kind, slice(None))[0])


def test_a_kind_that_ends_soon_is_expected_to() -> None:
    lifetimes = learned()
    assert expected_s(lifetimes, SHORT) < 2 * HOUR_S
    assert 48 * HOUR_S < expected_s(lifetimes, LONG) < 144 * HOUR_S


def test_nothing_known_of_a_family_is_what_is_known_of_its_size() -> None:
    lifetimes = learned()
    stranger = SHORT._replace(family="other")
    assert expected_s(lifetimes, SHORT) < expected_s(lifetimes, stranger) < expected_s(lifetimes, LONG) / 10
    unlike_any = Kind("other", 64, 1)
    assert expected_s(lifetimes, stranger) < expected_s(lifetimes, unlike_any) < expected_s(lifetimes, LONG)


def test_who_outlived_most_of_its_kind_is_expected_to_stay() -> None:
    lifetimes, kind = Lifetimes(), Kind("mixed", 1, 1024)
    for _ in range(90):
        lifetimes.ended(kind, 600)
    for _ in range(10):
        lifetimes.ended(kind, 96 * HOUR_S)
    newborn = lifetimes.chances(kind, 0.0, 0.0)
    survivor = lifetimes.chances(kind, 2 * HOUR_S, 0.0)
    assert newborn[5] < 0.3  # some four hours from now
    assert survivor[5] > 0.8


def test_one_that_still_lives_counts_as_one_that_lived_so_long() -> None:
    with_living, without = learned(), learned()
    for _ in range(1000):
        with_living.lived(SHORT, 0, span_of(48 * HOUR_S))
    assert expected_s(with_living, SHORT) > 4 * expected_s(without, SHORT)


def test_a_host_that_stays_in_use_anyway_is_not_used_longer_for_a_short_vm() -> None:
    occupancy = Occupancy(3, learned())
    occupancy.put(0, "vm-1", LONG)
    occupancy.put(1, "vm-2", SHORT)
    longer = occupancy.longer_s(SHORT, slice(None)).tolist()
    assert longer[0] < longer[1] < longer[2]
    assert longer[0] < 600
    occupancy.take(0, "vm-1", is_end=False)
    assert occupancy.longer_s(SHORT, slice(None))[0] == pytest.approx(longer[2])


def test_hosts_grow_old_with_their_vms() -> None:
    occupancy = Occupancy(1, learned())
    occupancy.put(0, "vm-1", SHORT)
    young = occupancy.longer_s(LONG, slice(None))[0]
    occupancy.pass_time(HOUR_S)  # it should have ended long ago, and did not: who knows how long it stays
    assert occupancy.longer_s(LONG, slice(None))[0] != young


def fleet(policy: str) -> tuple[Fleet, float]:
    """Empty hosts that have seen jobs of ten minutes and databases of four days, and the time when they had."""
    fleet, now_s = Fleet(3, 16, 1024, policy), 0.0
    for kind, vcpus, lives_s in (("job", 7, 600.0), ("db", 2, 96 * HOUR_S)):
        for number in range(100):
            fleet.place(f"old-{kind}-{number}", vcpus, 1, kind, now_s)
            now_s += lives_s
            fleet.remove(f"old-{kind}-{number}", now_s)
    return fleet, now_s


def test_the_policy_puts_what_stays_beside_what_stays_and_best_fit_does_not() -> None:
    chosen = {}
    for policy in ("best-fit", "lifetime-aware"):
        one, now_s = fleet(policy)
        databases = {one.place(f"db-{number}", 2, 1, "db", now_s) for number in range(5)}
        jobs = {one.place(f"job-{number}", 7, 1, "job", now_s) for number in range(2)}
        assert len(databases) == len(jobs) == 1, "they are packed, and a job has no room beside the databases"
        assert databases != jobs
        chosen[policy] = one.place("db-5", 2, 1, "db", now_s)
        assert chosen[policy] in (jobs if policy == "best-fit" else databases), policy
    assert chosen["best-fit"] != chosen["lifetime-aware"]


def test_the_same_history_gets_the_same_answer() -> None:
    answers = []
    for _ in range(2):
        one, now_s = fleet("lifetime-aware")
        answers.append([one.place(f"vm-{number}", 2, 1, "db" if number % 2 else "job", now_s + number) for number in range(12)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "family"), [("web-1", "proj-1/web"), ("web12", "proj-1/web"), ("db", "proj-1/db"), ("7", "proj-1/")]
)
def test_vms_that_are_numbered_are_one_family(name: str, family: str) -> None:
    assert family_of("proj-1", name) == family
