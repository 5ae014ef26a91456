"""What is judged wrong on the way between two hosts, and that every way is looked at."""

from dataclasses import replace
from itertools import permutations

import pytest

from trimtab_controller.core import host_check
from trimtab_protos.network_messages import PeerFinding

FINE = PeerFinding(host_id="host-b", mtu=9000, mtu_passed=9000, rate_bytes_s=1 << 30, clock_ahead_ms=20, has_clock=True)


def judged(finding: PeerFinding) -> list[tuple[str, str]]:
    found = host_check.judge(finding, seen_by="node1", peer="node2", address="192.0.2.12")
    assert all(problem.cure and problem.seen_by == "node1" and problem.peer == "node2" for problem in found)
    return [(problem.kind, problem.message) for problem in found]


def test_a_way_that_is_fine_is_not_spoken_of() -> None:
    assert judged(FINE) == []


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"agent_problem": "refused"}, "agent", "refused"),
        ({"libvirt_problem": "port 16514: no answer"}, "libvirt", "16514"),
        ({"migration_problem": "port 49152: no answer"}, "migration-ports", "49152"),
        ({"mtu_passed": 1500}, "mtu", "9000 bytes do not pass uncut, 1500 bytes do"),
        ({"mtu_passed": 0}, "mtu", "ICMP"),
        ({"rate_bytes_s": 4_000_000}, "rate", "4.0 MB/s"),
        ({"clock_ahead_ms": 1700}, "clock", "1.7 s ahead of that of node1"),
        ({"clock_ahead_ms": -900}, "clock", "0.9 s behind"),
    ],
)
def test_each_mismatch_is_named(change: dict[str, object], kind: str, says: str) -> None:
    ((found, message),) = judged(replace(FINE, **change))  # type: ignore[arg-type]
    assert found == kind
    assert says in message


def test_an_unmeasured_clock_and_rate_accuse_nobody() -> None:
    assert judged(replace(FINE, rate_bytes_s=0, clock_ahead_ms=9000, has_clock=False)) == []


@pytest.mark.parametrize("count", [2, 3, 7])
def test_each_host_looks_at_each_other_once_and_is_looked_at_by_one_at_a_time(count: int) -> None:
    hosts = [f"host-{i}" for i in range(count)]
    ways = set()
    for turn in range(host_check.turns(count)):
        looks = host_check.ring(hosts, turn)
        assert sorted(looks.values()) == hosts
        ways |= set(looks.items())
    assert ways == set(permutations(hosts, 2))


def test_a_large_fleet_looks_at_neighbours_only() -> None:
    assert host_check.turns(1) == host_check.turns(0) == 0
    assert host_check.turns(300) == host_check.PEERS_MAX
