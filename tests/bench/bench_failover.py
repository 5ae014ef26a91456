"""How long after a host's cut its guests run elsewhere: 500 simulated cuts per way of fencing, on the virtual clock.

The decisions are the real core's with its defaults (T 15, renewals every 3 s, K 3, rho 1 %, d 1); the world is the scenarios': ticks of
1 s, 0.5 s to revoke, 1.5 s for a power device to switch off and read back, 2 s for a guest to boot. The boot is not ours to shorten:
it is shown apart. False failovers and double runs are counted over all runs; the invariants are checked after every event.
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass

from tests.scenarios.schema import Run, build
from trimtab_controller.core.failover import FailoverSettings

CUTS = 500
SETTLED_S = 60.0
GOALS_S = {"works": (15.0, 30.0), "none": (25.0, 45.0)}
"""Median and maximum, for power fencing and for the lease alone."""
PARTS = ("detect", "fence", "place", "boot", "total")


@dataclass(frozen=True)
class Cut:
    detect: float
    fence: float
    place: float
    boot: float

    @property
    def total(self) -> float:
        return self.detect + self.fence + self.place + self.boot


def cut_host(seed: int, device: str, *, beacon: bool = False) -> tuple[Cut, Run]:
    rng = random.Random(seed)
    hosts = {f"h{number}": {"powered": True, "power_fence": device} for number in range(1, 6)}
    vms = {f"v{number}": {"kind": "vm", "host": f"h{number}", "desired": "started"} for number in range(1, 6)}
    cluster = {"storage": "shared", "beacon": beacon, "lease": {}, "hosts": hosts}
    run = build(
        {"id": "bench", "seed": seed, "cluster": cluster, "vms": vms, "rules": [], "timeline": []}, settings=FailoverSettings()
    )
    world = run.world
    world.begin()
    world.run_until(SETTLED_S)
    at = SETTLED_S + rng.random() * 3
    victim = world.hosts[f"h{rng.randint(1, 5)}"]
    vm = f"v{victim.name[1:]}"
    world.faults += 1
    # With its link cut and its beacon alive a host lives on, and so do its guests.
    world.at(at, victim.cut_power if beacon or rng.random() < 0.5 else lambda: setattr(victim, "link_is_cut", True))
    world.run_until(at + 90)
    instants = [
        next(one.t for one in world.happened(what, subject, host) if one.t >= at)
        for what, subject, host in (
            ("host_lost", "", victim.name),
            ("host_fenced", "", victim.name),
            ("begun_StartVm", vm, ""),
            ("started", vm, ""),
        )
    ]
    gaps = [later - earlier for earlier, later in zip([at, *instants], instants, strict=False)]
    return Cut(*gaps), run


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def main() -> int:
    missed = 0
    for device, beacon, name in (
        ("works", False, "power fencing"),
        ("none", False, "lease alone"),
        ("none", True, "lease alone, with beacon"),
    ):
        began = time.process_time()
        played = [cut_host(seed, device, beacon=beacon) for seed in range(CUTS)]
        cpu_ms = (time.process_time() - began) * 1000 / CUTS
        false = sum(len({one.host for one in run.world.happened("fence_confirmed")}) - 1 for _cut, run in played)
        say(f"{name}: {CUTS} cuts, {false} false failovers, 0 double runs (checked after every event), {cpu_ms:.0f} CPU-ms a cut")
        for part in PARTS:
            values = [getattr(cut, part) for cut, _run in played]
            say(
                f"  {part:7} p50 {statistics.median(values):6.2f} s  p99 {percentile(values, 0.99):6.2f} s  max {max(values):6.2f} s"
            )
        totals = [cut.total for cut, _run in played]
        if not beacon:
            median_s, maximum_s = GOALS_S[device]
            is_met = statistics.median(totals) <= median_s and max(totals) <= maximum_s and false == 0
            say(f"  goal: median <= {median_s:.0f} s, maximum <= {maximum_s:.0f} s: {'met' if is_met else 'MISSED'}")
            missed += not is_met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
