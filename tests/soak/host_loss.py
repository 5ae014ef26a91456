"""`python -m tests.soak.host_loss --seed N --losses 20`: real hosts are lost in every way at random, and the dated report.

Kept guests write to lock-free disks whose server writes down who wrote. After each loss every kept guest must count elsewhere within
the goal, no QEMU may ever have written after another had taken over, and the host must come back with nothing of what moved running.
Exit status 1 where anything of this failed. Run by `make soak`; `tests/lab/test_host_loss.py` is its short part.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import wait_until
from tests.lab.host_loss_kit import LossFleet, boottime_s
from trimtab_lab.hosts import Lab

EVIDENCE = Path(__file__).resolve().parents[1] / "evidence"
GUESTS = 3


@dataclass
class Round:
    """One loss and what came of it."""

    number: int
    fault: str
    host: str
    guests: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass
class Campaign:
    """A fleet, its kept guests and the faults that can be done to their hosts."""

    fleet: LossFleet
    rng: random.Random
    vm_ids: dict[str, str] = field(default_factory=dict)

    def faults(self) -> dict[str, tuple[Callable[[str], None], Callable[[str], None]]]:
        """Return each fault with what ends it."""
        lab = self.fleet.lab

        def freeze_both(host: str) -> None:
            lab.signal_service(host, "trimtab-warden", signal.SIGSTOP)
            lab.freeze(host)

        def cut_with_frozen_warden(host: str) -> None:
            lab.signal_service(host, "trimtab-warden", signal.SIGSTOP)
            lab.cut(host)

        def cut_with_killed_warden(host: str) -> None:
            lab.signal_service(host, "trimtab-warden", signal.SIGKILL)
            lab.cut(host)

        def cut_with_killed_agent(host: str) -> None:
            lab.cut(host)
            lab.signal_service(host, "trimtab-agent", signal.SIGKILL)

        def thaw_and_heal(host: str) -> None:
            lab.thaw(host)
            lab.heal(host)

        return {
            "power": (lab.crash, lab.boot),
            "link": (lab.cut, lab.heal),
            "frozen-agent": (lab.freeze, lab.thaw),
            "both-frozen": (freeze_both, lab.thaw),
            "link-and-frozen-warden": (cut_with_frozen_warden, thaw_and_heal),
            "link-and-killed-warden": (cut_with_killed_warden, lab.heal),
            "link-and-killed-agent": (cut_with_killed_agent, lab.heal),
        }

    def begin(self) -> None:
        for number in range(1, GUESTS + 1):
            name = f"kept{number}"
            self.vm_ids[name] = self.fleet.keep(name, to=f"node{number}")

    def lose(self, number: int) -> Round:
        fault = self.rng.choice(sorted(self.faults()))
        inflict, end = self.faults()[fault]
        homes = {name: self.fleet.home(vm_id) for name, vm_id in self.vm_ids.items()}
        host = self.rng.choice(sorted(set(homes.values())))
        round_ = Round(number, fault, host, sorted(name for name, home in homes.items() if home == host))
        at_s = boottime_s()
        inflict(host)
        try:
            for name in round_.guests:
                first = self.fleet.first_elsewhere(self.vm_ids[name], host, at_s)
                round_.seconds[name] = round(first.at_s - at_s, 2)
                round_.failure = round_.failure or self.fleet.overlap(self.vm_ids[name], host, first)
        except AssertionError as error:
            round_.failure = str(error)
        finally:
            end(host)
        self.fleet.wait_until_armed()
        # Whoever comes back must not run what moved; asked of libvirt, not of Trimtab.
        for name in round_.guests:
            places = self.fleet.runs_on(self.vm_ids[name])
            if len(places) != 1 and not round_.failure:
                round_.failure = f"{name} runs on {places}"
        late = [name for name, took_s in round_.seconds.items() if took_s > kit.GOAL_MAX_S]
        if late and not round_.failure:
            round_.failure = f"later than {kit.GOAL_MAX_S:.0f} s: {late}"
        # Nobody else was lost meanwhile: the others count where they were.
        now_s = boottime_s()
        for name in sorted(set(homes) - set(round_.guests)):
            wait_until(lambda vm_id=self.vm_ids[name]: self.fleet.writes(vm_id)[-1].at_s > now_s, f"{name} to count on")
            if self.fleet.home(self.vm_ids[name]) != homes[name] and not round_.failure:
                round_.failure = f"false failover: {name} left {homes[name]}"
        return round_


def run(seed: int, losses: int) -> tuple[list[Round], list[str]]:
    lab = Lab.named("soak-loss", state_directory=Path(tempfile.mkdtemp(prefix="tt-soak-loss-")))
    try:
        campaign = Campaign(kit.build(lab), random.Random(seed))
        campaign.begin()
        rounds = []
        for number in range(1, losses + 1):
            rounds.append(campaign.lose(number))
            sys.stdout.write(json.dumps(asdict(rounds[-1])) + "\n")
            sys.stdout.flush()
        return rounds, campaign.fleet.double_runs()
    finally:
        lab.down()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int(time.time())
    began = datetime.now(UTC)
    rounds, double_runs = run(seed, arguments.losses)
    took = sorted(seconds for each in rounds for seconds in each.seconds.values())
    failures = [f"loss {each.number} ({each.fault} of {each.host}): {each.failure}" for each in rounds if each.failure]
    told = {
        "seed": seed,
        "began": began.isoformat(timespec="seconds"),
        "losses": [asdict(each) for each in rounds],
        "median_s": took[len(took) // 2] if took else None,
        "max_s": took[-1] if took else None,
        "double_runs": double_runs,
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
