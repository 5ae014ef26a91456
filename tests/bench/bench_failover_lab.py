"""How long after a real host's cut its real guest counts elsewhere: `python -m tests.bench.bench_failover_lab [RUNS] [power|lease|beacon]`.

`power`: each host has a power device (the lab's Redfish), driven by fence_redfish. `lease`: by its lease alone. `beacon`: the same where
the hosts renew on shared storage too, power cuts only, since a host whose link alone is cut lives on.

Three libvirt hosts, one guest that writes a line each second to a lock-free disk; its server's log gives the instants. Each run cuts the
power or the link of the guest's home in turn, splits the time, and compares the guest's boot elsewhere with its own boot before the
cut, in the same run. Double runs are counted over all runs by the server's log.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import HOSTS
from tests.lab.host_faults import Hands
from tests.lab.host_loss_kit import Loss
from trimtab_lab.hosts import Lab
from trimtab_lab.power import PowerDevices

RUNS = 4
GOALS_S = {"power": (15.0, 30.0), "lease": (25.0, kit.GOAL_MAX_S), "beacon": (25.0, kit.GOAL_MAX_S)}
TITLES = {
    "power": "with power fencing (fence_redfish)",
    "lease": "by its lease alone (T 15 s, K >= 3 s)",
    "beacon": "by its lease, counted from the last beat in its slot on shared storage",
}


def run(runs: int, way: str) -> tuple[list[Loss], list[str]]:
    """Return each loss, and what the disks' server saw of two writers."""
    lab = Lab.named("bench-loss", state_directory=Path(tempfile.mkdtemp(prefix="tt-loss-")))
    devices = PowerDevices(lab)
    found: list[Loss] = []
    try:
        fleet = kit.build(lab)
        if way == "power":
            devices.start()
            for host in HOSTS:
                Hands(fleet, devices).give_device(host)
        elif way == "beacon":
            kit.use_beacons(fleet)
        vm_id = fleet.keep("kept", to="node1")
        for number in range(runs):
            home = fleet.home(vm_id)
            if number % 2 == 0 or way == "beacon":
                found.append(kit.measure(fleet, vm_id, "power", lab.crash))
                lab.boot(home)
            else:
                found.append(kit.measure(fleet, vm_id, "link", lab.cut))
                # Its power device has switched it off, its lease has not.
                (lab.boot if way == "power" else lab.heal)(home)
            fleet.wait_until_armed()
        return found, fleet.double_runs()
    finally:
        devices.stop()
        lab.down()


def report(found: list[Loss], double_runs: list[str], way: str) -> str:
    goal_median_s, goal_max_s = GOALS_S[way]
    lines = [f"Real host lost, {TITLES[way]}: seconds from the cut to the guest counting elsewhere"]
    names = [field.name for field in fields(Loss)][1:]
    lines.append("run  kind   " + " ".join(f"{name:>11}" for name in [*names, "total_s"]))
    for number, loss in enumerate(found, start=1):
        figures = [getattr(loss, name) for name in [*names, "total_s"]]
        lines.append(f"{number:>3}  {loss.kind:<6} " + " ".join(f"{figure:11.2f}" for figure in figures))
    totals = [loss.total_s for loss in found]
    median_s, max_s = statistics.median(totals), max(totals)
    verdict = "met" if median_s <= goal_median_s and max_s <= goal_max_s and not double_runs else "NOT met"
    lines.append(
        f"median {median_s:.1f} s (goal {goal_median_s:.0f}), maximum {max_s:.1f} s (goal {goal_max_s:.0f}), "
        f"{len(double_runs)} double runs: {verdict}"
    )
    return "\n".join([*lines, *double_runs])


def main() -> int:
    began_s = time.monotonic()
    way = sys.argv[2] if len(sys.argv) > 2 else "lease"
    found, double_runs = run(int(sys.argv[1]) if len(sys.argv) > 1 else RUNS, way)
    text = report(found, double_runs, way)
    sys.stdout.write(f"{text}\n({time.monotonic() - began_s:.0f} s)\n")
    return 0 if text.partition("double runs: ")[2].startswith("met") else 1


if __name__ == "__main__":
    sys.exit(main())
