"""`python -m tests.soak.host_loss --seed N --losses 20`: real hosts are lost in every way at random, and the dated report.

Kept guests write to lock-free disks whose server writes down who wrote. What must become of the guests of each fault says
`tests/lab/host_faults.py`; whatever the fault, no QEMU may ever have written after another had taken over, each guest runs in one place
in the end, nobody else is moved, and the host comes back with nothing of what moved running. In the second half the hosts renew on shared
storage too. Exit status 1 where anything of this failed. Run by `make soak`; `tests/lab/test_host_loss.py` is its short part.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import wait_until
from tests.lab.host_faults import HostFault, Must, all_faults
from tests.lab.host_loss_kit import LossFleet, boottime_s
from trimtab_lab.hosts import Lab
from trimtab_lab.power import PowerDevices

EVIDENCE = Path(__file__).resolve().parents[1] / "evidence"
GUESTS = 3
LATE_S = 150.0
STAYS_S = 2 * (kit.LEASE_S + kit.KILL_S)
"""A guest that counts on for so long after the fault was not ended by it."""


@dataclass
class Round:
    """One fault and what came of it."""

    number: int
    fault: str
    host: str
    guests: list[str]
    has_beacons: bool
    seconds: dict[str, float] = field(default_factory=dict)
    """To each guest's first line elsewhere, where it had to move."""
    failure: str = ""

    def fail(self, why: str) -> None:
        self.failure = self.failure or why


@dataclass
class Campaign:
    """A fleet, its kept guests and the faults that can be done to their hosts."""

    fleet: LossFleet
    rng: random.Random
    faults: dict[str, HostFault]
    has_beacons: bool = False
    vm_ids: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    """Of a pass through all faults, in an order of its own, what is still to come."""

    def begin(self) -> None:
        for number in range(1, GUESTS + 1):
            name = f"kept{number}"
            self.vm_ids[name] = self.fleet.keep(name, to=f"node{number}")

    def lose(self, number: int) -> Round:
        if not self.left:
            self.left = sorted(self.faults)
            self.rng.shuffle(self.left)
        fault = self.left.pop()
        homes = {name: self.fleet.home(vm_id) for name, vm_id in self.vm_ids.items()}
        host = self.rng.choice(sorted(set(homes.values())))
        guests = sorted(name for name, home in homes.items() if home == host)
        found = Round(number, fault, host, guests, self.has_beacons)
        chosen = self.faults[fault]
        must = chosen.must_with_beacon if self.has_beacons and chosen.must_with_beacon is not None else chosen.must
        at_s = boottime_s()
        try:
            try:
                chosen.inflict(host)
                self._watch(found, must, at_s)
            finally:
                chosen.end(host)
            self._settle(found, homes)
        except AssertionError as error:
            found.fail(str(error))
        return found

    def _watch(self, found: Round, must: Must, at_s: float) -> None:
        """Wait for what must become of the host's guests."""
        for name in found.guests:
            vm_id = self.vm_ids[name]
            match must:
                case Must.MOVE | Must.MOVE_LATE:
                    patience_s = 90.0 if must is Must.MOVE else LATE_S
                    first = self.fleet.first_elsewhere(vm_id, found.host, at_s, patience_s=patience_s)
                    found.seconds[name] = round(first.at_s - at_s, 2)
                    found.fail(self.fleet.overlap(vm_id, found.host, first))
                    if must is Must.MOVE and not self.has_beacons and found.seconds[name] > kit.GOAL_MAX_S:
                        found.fail(f"{name} took {found.seconds[name]:.0f} s, later than {kit.GOAL_MAX_S:.0f} s")
                case Must.STAY:
                    wait_until(lambda: boottime_s() > at_s + STAYS_S, "the time to pass in which a lease would end")
                    self._counts_on(name)
                    moved = {each.host for each in self.fleet.writes(vm_id) if each.at_s > at_s} - {found.host}
                    if moved:
                        found.fail(f"false failover: {name} left {found.host} for {', '.join(sorted(moved))}")
                case Must.RUN:
                    pass  # in the end, which `_settle` looks at

    def _counts_on(self, name: str, *, patience_s: float = 120.0) -> None:
        now_s = boottime_s()
        wait_until(lambda: self.fleet.writes(self.vm_ids[name])[-1].at_s > now_s, f"{name} to count on", patience_s=patience_s)

    def _settle(self, found: Round, homes: dict[str, str]) -> None:
        """Everybody is back: each guest counts in one place, and nobody was moved whose host was well."""
        self.fleet.wait_until_armed()
        for name, vm_id in self.vm_ids.items():
            self._counts_on(name, patience_s=180.0)
            # Asked of libvirt, not of Trimtab. A copy that is being cleaned up is no second run.
            places = wait_until(
                lambda vm_id=vm_id: one if len(one := self.fleet.runs_on(vm_id)) == 1 else None, f"{name} to run once"
            )
            if name not in found.guests and places != [homes[name]]:
                found.fail(f"false failover: {name} left {homes[name]}")
        doubles = self.fleet.double_runs()
        if doubles:
            found.fail(doubles[-1])


def run(seed: int, losses: int, *, budget_s: float, only: str = "") -> tuple[list[Round], list[str]]:
    lab = Lab.named("soak-loss", state_directory=Path(tempfile.mkdtemp(prefix="tt-soak-loss-")))
    devices = PowerDevices(lab)
    began_s = time.monotonic()
    try:
        fleet = kit.build(lab)
        devices.start()
        faults = {name: fault for name, fault in all_faults(fleet, devices).items() if not only or name in only.split(",")}
        campaign = Campaign(fleet, random.Random(seed), faults)
        campaign.begin()
        rounds: list[Round] = []
        with contextlib.suppress(KeyboardInterrupt):  # what was found so far is reported
            for number in range(1, losses + 1):
                spent_s = time.monotonic() - began_s
                if spent_s > budget_s:
                    break
                if not campaign.has_beacons and (number > losses / 2 or spent_s > budget_s / 2):
                    kit.use_beacons(fleet)
                    campaign.has_beacons = True
                rounds.append(campaign.lose(number))
                sys.stdout.write(json.dumps(asdict(rounds[-1])) + "\n")
                sys.stdout.flush()
        return rounds, campaign.fleet.double_runs()
    finally:
        devices.stop()
        lab.down()


def commit() -> str:
    here = Path(__file__).parent
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=120.0, help="no round is begun later than this")
    parser.add_argument("--only", default="", help="faults by name, with commas; default: all")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int(time.time())
    began = datetime.now(UTC)
    rounds, double_runs = run(seed, arguments.losses, budget_s=arguments.minutes * 60, only=arguments.only)
    took = sorted(seconds for each in rounds for seconds in each.seconds.values())
    failures = [f"loss {each.number} ({each.fault} of {each.host}): {each.failure}" for each in rounds if each.failure]
    told = {
        "commit": commit(),
        "seed": seed,
        "began": began.isoformat(timespec="seconds"),
        "faults": dict(sorted(Counter(each.fault for each in rounds).items())),
        "rounds_with_beacons": sum(each.has_beacons for each in rounds),
        "losses": [asdict(each) for each in rounds],
        "median_s": took[len(took) // 2] if took else None,
        "max_s": took[-1] if took else None,
        "double_runs": double_runs,
        "false_failovers": sum("false failover" in line for line in failures),
        "failures": failures,
    }
    path = arguments.evidence / f"host-loss-{began:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    sys.stdout.write(
        f"{len(rounds)} losses, median {told['median_s']} s, maximum {told['max_s']} s, {len(double_runs)} double runs, "
    )
    sys.stdout.write(f"{len(failures)} failures; {path}\n" + "".join(f"{line}\n" for line in [*failures, *double_runs]))
    return 1 if failures or double_runs else 0


if __name__ == "__main__":
    sys.exit(main())
