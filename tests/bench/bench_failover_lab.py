"""How long after a real host's cut its real guest counts elsewhere: `python -m tests.bench.bench_failover_lab [RUNS] [power|lease|beacon]`.

`power`: each host has a power device (the lab's Redfish), driven by fence_redfish. `lease`: by its lease alone. `beacon`: the same where
the hosts renew on shared storage too, power cuts only, since a host whose link alone is cut lives on.

Three libvirt hosts, one guest that writes a line each second to a lock-free disk; its server's log gives the instants. Each run cuts the
power or the link of the guest's home in turn, splits the time, and compares the guest's boot elsewhere with its own boot before the
cut, in the same run. Double runs are counted over all runs by the server's log. So are false failovers, for speed alone is trivial to
game: each host but the one that was cut that was called lost or fenced, and each guest beside (one more, on another host) that was moved
or ended.

A run that fails is told and the next one begins with every host up again. With `--evidence` (20 runs take about half an hour) what was
measured so far is written to tests/evidence/ after every run.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import HOSTS, wait_until
from tests.lab.host_faults import Hands
from tests.lab.host_loss_kit import Loss, LossFleet
from tests.soak.evidence import EVIDENCE, current_commit
from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab
from trimtab_lab.power import PowerDevices

RUNS = 4
GOALS_S = {"power": (15.0, 30.0), "lease": (25.0, kit.GOAL_MAX_S), "beacon": (25.0, kit.GOAL_MAX_S)}
TITLES = {
    "power": "with power fencing (fence_redfish)",
    "lease": "by its lease alone (T 15 s, K >= 3 s)",
    "beacon": "by its lease, counted from the last beat in its slot on shared storage",
}


@dataclass
class Measured:
    """What a bench found so far."""

    way: str
    began: str
    commit: str = field(default_factory=current_commit)
    losses: list[Loss] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    double_runs: list[str] = field(default_factory=list)
    false_failovers: list[str] = field(default_factory=list)
    """In words: a host that was not cut and was called lost or fenced, a guest of such a host that was moved or ended."""
    took_s: float = 0.0

    @property
    def totals_s(self) -> list[float]:
        return [loss.total_s for loss in self.losses]

    @property
    def is_met(self) -> bool:
        median_s, max_s = GOALS_S[self.way]
        is_sound = bool(self.losses) and not (self.failures or self.double_runs or self.false_failovers)
        return is_sound and statistics.median(self.totals_s) <= median_s and max(self.totals_s) <= max_s


def run(runs: int, way: str, *, evidence: Path | None = None) -> Measured:
    """Lose the guest's home so many times; a run that fails is one of them."""
    lab = Lab.named("bench-loss", state_directory=Path(tempfile.mkdtemp(prefix="tt-loss-")))
    devices = PowerDevices(lab)
    began, began_s = datetime.now(UTC), time.monotonic()
    found = Measured(way, began.isoformat(timespec="seconds"))
    try:
        fleet = kit.build(lab)
        if way == "power":
            devices.start()
            for host in HOSTS:
                Hands(fleet, devices).give_device(host)
        elif way == "beacon":
            kit.use_beacons(fleet)
        vm_id = fleet.keep("kept", to="node1")
        fleet.keep("beside", to="node2")
        for number in range(1, runs + 1):
            kind = "power" if number % 2 or way == "beacon" else "link"
            lose(found, fleet, vm_id, kind, number)
            found.double_runs, found.took_s = fleet.double_runs(), time.monotonic() - began_s
            if evidence is not None:
                write(found, evidence / f"failover-lab-{way}-{began:%Y-%m-%d-%H%M%S}")
        return found
    finally:
        devices.stop()
        lab.down()


def lose(found: Measured, fleet: LossFleet, vm_id: str, kind: str, number: int) -> None:
    """Measure one loss and bring everybody back, or say what failed."""
    try:
        home = make_apart(fleet, vm_id)
    except AssertionError as error:
        found.failures.append(f"run {number} ({kind}): {str(error)[:400]}")
        return
    before = Before.of(fleet, home)
    try:
        try:
            found.losses.append(kit.measure(fleet, vm_id, kind, fleet.lab.crash if kind == "power" else fleet.lab.cut))
            sys.stderr.write(f"run {number} ({kind}): {found.totals_s[-1]:.1f} s\n")
        finally:
            # A power device has switched a host off whose link was cut; its lease has not.
            is_off = fleet.lab.init_process_id(home) is None
            (fleet.lab.boot if is_off else fleet.lab.heal)(home)
            fleet.wait_until_armed()
            found.false_failovers += [f"run {number} ({kind} of {home}): {line}" for line in before.false_failovers(fleet)]
    except (AssertionError, LabError, ValueError) as error:
        found.failures.append(f"run {number} ({kind} of {home}): {str(error)[:400] or type(error).__name__}")
        sys.stderr.write(f"{found.failures[-1]}\n")


def make_apart(fleet: LossFleet, vm_id: str) -> str:
    """Return the vm's home, with the other guest on another host than it: only that one shows a guest moved without need."""
    home = fleet.home(vm_id)
    if fleet.home(str(fleet.vm("beside")["id"])) == home:
        away = next(host for host in fleet.hosts if host != home)
        fleet.ok("vm", "migrate", "beside", "--to", away, "--wait")
        beside = str(fleet.vm("beside")["id"])
        wait_until(lambda: fleet.home(beside) == away, "the other guest to count apart")
    return home


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """Where each guest was when a host was cut."""

    cut: str
    at_unix_s: float
    guests: dict[str, tuple[str, str]]
    """By vm: its home and its boot."""

    @classmethod
    def of(cls, fleet: LossFleet, cut: str) -> "Before":
        last = {each.vm: each for each in fleet.writes()}
        guests = {vm_id: (each.host, each.boot) for vm_id, each in last.items()}
        return cls(cut=cut, at_unix_s=time.time(), guests=guests)

    def false_failovers(self, fleet: LossFleet) -> list[str]:
        """Return, in words, who was struck since then besides the host that was cut and its guests."""
        judged = [
            f"{name} was called {kind} and was not cut"
            for kind in ("lost", "fenced")
            for name in sorted(
                {each["subject"]["name"] for each in fleet.events(f"failover.{kind}", after_unix_s=self.at_unix_s)}
            )
            if name != self.cut
        ]
        last = {each.vm: each for each in fleet.writes()}
        struck = [
            f"{vm_id} of {home}, which was not cut, began anew on {last[vm_id].host}"
            for vm_id, (home, boot) in sorted(self.guests.items())
            if home != self.cut and (last[vm_id].host, last[vm_id].boot) != (home, boot)
        ]
        return [*judged, *struck]


def report(found: Measured) -> str:
    goal_median_s, goal_max_s = GOALS_S[found.way]
    lines = [f"Real host lost, {TITLES[found.way]}: seconds from the cut to the guest counting elsewhere"]
    names = [field.name for field in fields(Loss)][1:]
    lines.append("run  kind   " + " ".join(f"{name:>11}" for name in [*names, "total_s"]))
    for number, loss in enumerate(found.losses, start=1):
        figures = [getattr(loss, name) for name in [*names, "total_s"]]
        lines.append(f"{number:>3}  {loss.kind:<6} " + " ".join(f"{figure:11.2f}" for figure in figures))
    if found.losses:
        medians = [statistics.median(getattr(loss, name) for loss in found.losses) for name in [*names, "total_s"]]
        lines.append("median      " + " ".join(f"{figure:11.2f}" for figure in medians))
        lines.append(
            f"median {medians[-1]:.1f} s (goal {goal_median_s:.0f}), maximum {max(found.totals_s):.1f} s (goal {goal_max_s:.0f}), "
            f"{len(found.double_runs)} double runs (goal 0), {len(found.failures)} failed runs: {'met' if found.is_met else 'NOT met'}"
        )
    lines.append(f"false failovers {len(found.false_failovers)} (goal 0), counted in each run by hosts judged and guests moved")
    lines.append(f"({len(found.losses) + len(found.failures)} runs in {found.took_s:.0f} s, commit {found.commit})")
    return "\n".join([*lines, *found.failures, *found.double_runs, *found.false_failovers])


def write(found: Measured, stem: Path) -> None:
    stem.parent.mkdir(exist_ok=True, parents=True)
    document = {**asdict(found), "totals_s": [round(one, 2) for one in found.totals_s], "is_met": found.is_met}
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    title = f"# Failover of a real host, {found.way}, {found.began}"
    stem.with_suffix(".md").write_text(f"{title}\n\n```\n{report(found)}\n```\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=RUNS)
    parser.add_argument("way", nargs="?", choices=sorted(GOALS_S), default="lease")
    parser.add_argument(
        "--evidence", type=Path, nargs="?", const=EVIDENCE, default=None, help="keep what is measured, in tests/evidence or there"
    )
    given = parser.parse_args()
    found = run(given.runs, given.way, evidence=given.evidence)
    sys.stdout.write(report(found) + "\n")
    return 0 if found.is_met else 1


if __name__ == "__main__":
    sys.exit(main())
