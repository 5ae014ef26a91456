"""A rebalancer never thrashes: load that goes up and down a little moves nothing, what moved rests, an hour has its budget."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from trimtab_controller.core.placement import FleetSnapshot, HostSnapshot, PlacementKind, PlacementRequest
from trimtab_controller.core.planning import Estate, VmSnapshot, plan_rebalance
from trimtab_controller.core.planning.drain import Terms
from trimtab_controller.core.planning.rebalance import History, RebalancePolicy

HOSTS, VMS, CORES = 8, 64, 16
ROUND_S = 600.0


def estate(load_millis: dict[int, int], host_of: dict[int, int]) -> Estate:
    hosts = [
        HostSnapshot(
            host_id=f"host-{n}",
            name=f"node{n}",
            vcpus_limit=64,
            memory_limit_mib=65_536,
            vcpus_claimed=2 * sum(1 for host in host_of.values() if host == n),
            memory_claimed_mib=1024 * sum(1 for host in host_of.values() if host == n),
        )
        for n in range(HOSTS)
    ]
    vms = [
        VmSnapshot(
            vm_id=f"vm-{n}",
            name=f"vm{n}",
            host_id=f"host-{host_of[n]}",
            request=PlacementRequest(
                request_id=f"vm-{n}",
                vm_id=f"vm-{n}",
                vm_name=f"vm{n}",
                project_id="p",
                kind=PlacementKind.MIGRATE,
                vcpus=2,
                memory_mib=1024,
            ),
            load_millis=load_millis[n],
        )
        for n in range(VMS)
    ]
    return Estate.of(FleetSnapshot.of(hosts), vms, cpu_millis={f"host-{n}": CORES * 1000 for n in range(HOSTS)})


class Days:
    """Runs the rebalancer round after round, every plan applied at once."""

    def __init__(self, policy: RebalancePolicy, seed: int) -> None:
        self.policy, self.rng = policy, random.Random(seed)
        # Skewed: the first hosts hold most of the vms.
        self.host_of = {n: min(n // 16, HOSTS - 1) for n in range(VMS)}
        self.base = {n: self.rng.randrange(200, 1500) for n in range(VMS)}
        self.moved_at: dict[str, list[float]] = {}

    def round(self, number: int, *, jitter: float) -> int:
        now_s = number * ROUND_S
        load = {n: round(own * (1 + self.rng.uniform(-jitter, jitter))) for n, own in self.base.items()}
        ago = {vm_id: now_s - times[-1] for vm_id, times in self.moved_at.items()}
        plan = plan_rebalance(estate(load, self.host_of), self.policy, Terms(), history=History(moved_ago_s=ago))
        for step in plan.moves:
            self.host_of[int(step.vm_id[3:])] = int(step.target_host_id[5:])
            self.moved_at.setdefault(step.vm_id, []).append(now_s)
        return len(plan.moves)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_load_that_goes_up_and_down_a_little_moves_nothing_once_it_is_even(seed: int) -> None:
    days = Days(RebalancePolicy(), seed)
    assert days.round(0, jitter=0.0) > 0
    assert [days.round(number, jitter=0.1) for number in range(1, 60)] == [0] * 59


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_under_wild_load_no_vm_moves_again_before_it_has_rested(seed: int) -> None:
    policy = RebalancePolicy(rest_s=6 * 3600.0)
    days = Days(policy, seed)
    for number in range(72):
        days.round(number, jitter=0.9)
    assert days.moved_at
    for times in days.moved_at.values():
        assert all(later - earlier >= policy.rest_s for earlier, later in pairwise(times))


def test_an_hour_has_no_more_moves_than_its_budget() -> None:
    policy = replace(RebalancePolicy(), moves_per_hour=3, rest_s=0.0)
    days = Days(policy, 5)
    moves = [days.round(number, jitter=0.5) for number in range(24)]
    assert sum(moves) > 3
    assert all(sum(moves[start : start + 6]) <= 3 for start in range(len(moves) - 5))
