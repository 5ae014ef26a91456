"""The numbers of failover and the arithmetic of the lease. Pure; all durations are seconds of a monotonic clock."""

from dataclasses import dataclass

STARTS_PER_HOST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverSettings:
    """What an operator may tune. The defaults detect within 10 s and let a lease alone decide within 20 s."""

    lease_ttl_s: float = 15.0
    """T: a host's guests may run so long after the renewal that it last sent and saw acknowledged."""
    renew_every_s: float = 3.0
    kill_s: float = 3.0
    """K: the longest time from "kill" to "no process, no write in flight". Hosts that measured a longer one report it."""
    rate_error: float = 0.01
    """rho: the bound on how much faster one monotonic clock runs than another."""
    extra_s: float = 1.0
    """d: what is waited beyond the proof, for what nobody thought of."""
    suspect_after_s: float = 6.0
    """Silence of two renewals."""
    lost_after_s: float = 9.5
    """Silence of three renewals and half a second. Longer than `suspect_after_s` by more than one renewal, so that hosts which
    were cut off at the same instant are all suspect before the first of them is lost: the circuit breaker sees them together."""
    held_up_s: float = 3.0
    """Ticks further apart than this mean that we ourselves were paused."""
    breaker_share: float = 0.2
    breaker_window_s: float = 120.0
    power_timeout_s: float = 90.0
    """A power device that has not answered for so long is taken as failed; the outcome is unknown, not "off"."""
    power_retry_s: float = 10.0
    starts_per_host: int = STARTS_PER_HOST
    """Slots: recoveries that may be starting on one host at a time."""
    moves_per_host: int = 2
    start_timeout_s: float = 120.0
    drain_timeout_s: float = 60.0
    """A host that was asked to go down goes down with what could not leave by then; nothing is killed before."""
    crash_window_s: float = 600.0
    crash_limit: int = 5
    """The guest that crashed so often within the window is left to its owner."""
    crash_backoff_s: float = 2.0
    """Doubles with every crash in the window."""
    steady_s: float = 60.0
    """Quarantine after a loss: no guest is placed on the host until it was heard for so long. Doubles with every loss."""
    steady_max_s: float = 3600.0
    flap_window_s: float = 3600.0
    storage_grace_s: float = 30.0
    """A guest paused by lost storage is moved only when its host did not get the storage back by then."""

    def lease_wait_s(self, kill_s: float) -> float:
        """Return how long after the last handled renewal a copy may start: (T+K)(1+rho)/(1-rho)+d.

        The host counts T from when it sent the renewal, on its clock, and its guests are dead K later. Its clock may be slow and
        ours fast by `rate_error` each; handling came after sending, so counting from it only adds to the wait.
        """
        longest_kill_s = max(self.kill_s, kill_s)
        return (self.lease_ttl_s + longest_kill_s) * (1 + self.rate_error) / (1 - self.rate_error) + self.extra_s

    def breaker_limit(self, host_count: int) -> int:
        """Return how many hosts may be lost in one window before we suspect ourselves."""
        return max(1, int(host_count * self.breaker_share))
