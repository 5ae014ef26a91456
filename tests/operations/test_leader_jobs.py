"""When the leader's periodic jobs run."""

from tests.unit.agent.manual_clock import ManualClock
from trimtab_controller.loops.leader_loop import Job


class Rounds:
    """A job of whose rounds each takes so long."""

    def __init__(self, clock: ManualClock, took_s: float = 0.0) -> None:
        self.clock, self.took_s = clock, took_s
        self.at_s: list[float] = []
        self.is_urgent = False

    def run(self, _term: int) -> None:
        self.at_s.append(self.clock.boottime_s())
        self.clock.advance(self.took_s)


def pauses(rounds: Rounds, *, until_s: float) -> set[float]:
    """Let the lane look every twentieth of a second; return the seconds between rounds."""
    clock, began_s = rounds.clock, rounds.clock.boottime_s()
    job = Job("failover", 1.0, rounds.run, is_urgent=lambda: rounds.is_urgent)
    while clock.boottime_s() < began_s + until_s:
        job.run_if_due(1, clock)
        clock.advance(0.05)
    return {round(later - earlier, 2) for earlier, later in zip(rounds.at_s, rounds.at_s[1:], strict=False)}


def test_a_job_keeps_its_period_while_nothing_is_urgent() -> None:
    assert max(pauses(Rounds(ManualClock()), until_s=10)) <= 1.05


def test_an_urgent_job_comes_four_times_as_often() -> None:
    rounds = Rounds(ManualClock())
    rounds.is_urgent = True
    assert max(pauses(rounds, until_s=10)) <= 0.3


def test_an_urgent_job_of_long_rounds_takes_no_more_than_half_of_the_time() -> None:
    rounds = Rounds(ManualClock(), took_s=0.4)
    rounds.is_urgent = True
    assert min(pauses(rounds, until_s=10)) >= 0.8
