"""The agent's lease runs from the sending of the acknowledged heartbeat, and never longer."""

from hypothesis import given
from hypothesis import strategies as st

from trimtab_agent.lease import Lease

TTL_S = 15.0


def acknowledge(lease: Lease, sequence: int, *, number: int = 1, is_granted: bool = True) -> bool:
    return lease.acknowledged(sequence, number=number, is_granted=is_granted, ttl_s=TTL_S)


def test_there_is_no_lease_before_the_first_ack() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    state = lease.current(now=100.0)
    assert (state.number, state.is_live) == (0, False)
    assert not state.allows(0)


def test_the_lease_runs_from_the_sending_and_not_from_the_ack() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    acknowledge(lease, 1)  # came ten seconds later, which does not matter
    assert lease.current(now=114.9).is_live
    assert not lease.current(now=115.0).is_live
    assert lease.current(now=110.0).expires_at_boottime == 115.0


def test_a_refused_ack_extends_nothing_and_takes_nothing_away() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    lease.sent(2, at_boottime=103.0)
    acknowledge(lease, 1)
    assert not acknowledge(lease, 2, is_granted=False)
    assert lease.current(now=114.0).is_live
    assert not lease.current(now=115.0).is_live


def test_an_ack_of_an_unknown_or_repeated_heartbeat_grants_nothing() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    assert not acknowledge(lease, 7)
    assert acknowledge(lease, 1)
    assert not acknowledge(lease, 1)


def test_a_lower_lease_number_is_the_past() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    lease.sent(2, at_boottime=101.0)
    acknowledge(lease, 1, number=5)
    assert not acknowledge(lease, 2, number=4)
    assert lease.current(now=101.0).number == 5


def test_acks_out_of_order_never_shorten_the_lease() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    lease.sent(2, at_boottime=103.0)
    acknowledge(lease, 2)
    acknowledge(lease, 1)
    assert lease.current(now=110.0).expires_at_boottime == 118.0


def test_heartbeats_of_an_ended_session_grant_nothing() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    lease.forget_sent()
    assert not acknowledge(lease, 1)


def test_a_command_acts_only_under_the_very_lease_that_is_held() -> None:
    lease = Lease()
    lease.sent(1, at_boottime=100.0)
    acknowledge(lease, 1, number=3)
    assert lease.current(now=101.0).allows(3)
    assert not lease.current(now=101.0).allows(2)
    assert not lease.current(now=101.0).allows(0)
    assert not lease.current(now=200.0).allows(3)


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 30), st.booleans()), min_size=1, max_size=30))
def test_whatever_is_lost_or_late_the_lease_ends_one_ttl_after_the_last_acknowledged_sending(
    beats: list[tuple[float, float, bool]],
) -> None:
    """The property that keeps two copies of a guest apart: no order of acks lets the agent believe longer."""
    lease, now, acknowledged = Lease(), 1000.0, [0.0]
    pending: list[tuple[float, int, float]] = []
    for sequence, (gap_s, delay_s, is_lost) in enumerate(beats, 1):
        now += gap_s
        lease.sent(sequence, at_boottime=now)
        if not is_lost:
            pending.append((now + delay_s, sequence, now))
        for arrival in sorted(entry for entry in pending if entry[0] <= now):
            pending.remove(arrival)
            if acknowledge(lease, arrival[1]):
                acknowledged.append(arrival[2])
        state = lease.current(now=now)
        assert state.is_live == (now < max(acknowledged) + TTL_S and max(acknowledged) > 0)
