"""`python -m tests.soak.host_loss --replicated --labs 2`: real hosts are lost in every way there is, and the dated report.

Without `--losses` each kind of fault comes once, in an order of the seed; with it, so many losses, pass after pass.

Kept guests write to lock-free disks whose server writes down who wrote. What must become of the guests of each fault say
`tests/lab/host_faults.py` and, with `--replicated` (five hosts, two engines and two gateways on PostgreSQL, in place of three hosts and
the embedded control plane), `tests/lab/replica_faults.py`. Whatever the fault, no QEMU may ever have written after another had taken
over, each guest runs in one place in the end, nobody else is moved, and the host comes back with nothing of what moved running. In the
second half the hosts renew on shared storage too. With `--labs 2` two fleets at once take half of the kinds each: most of a loss is
waiting. Exit status 1 where anything of this failed. Run by `make soak`;
`tests/lab/test_host_loss.py` is its short part.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial, reduce
from pathlib import Path

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import wait_until
from tests.lab.host_faults import Hands, HostFault, Must, all_faults
from tests.lab.host_loss_kit import LossFleet, boottime_s
from tests.lab.replica_faults import ReplicaFaults
from tests.soak.evidence import EVIDENCE
from tests.soak.host_loss_report import Told, write_report
from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab
from trimtab_lab.power import PowerDevices
from trimtab_lab.replicas import PROCESSES, Replicas
from trimtab_lab.specs import CTL

GUESTS = 3
MOVE_S, LATE_S = 120.0, 240.0
"""Patience until a guest counts elsewhere: its boot is the machine's matter. How soon it is started is checked."""
STAYS_S = 2 * (kit.LEASE_S + kit.KILL_S)
"""A guest that counts on for so long after the fault was not ended by it."""


@dataclass
class Round:
    """One fault and what came of it."""

    number: int
    fault: str
    hosts: list[str]
    guests: list[str]
    has_beacons: bool
    started_s: dict[str, float] = field(default_factory=dict)
    """From the fault until each guest that had to move was started elsewhere: its disk was opened."""
    counting_s: dict[str, float] = field(default_factory=dict)
    """The same until its first line, after its boot."""
    restarted: list[str] = field(default_factory=list)
    """Guests that started anew in this round; the others ran all the time."""
    took_s: float = 0.0
    """From the fault until everybody was back."""
    failure: str = ""

    def fail(self, why: str) -> None:
        self.failure = self.failure or why


@dataclass
class Campaign:
    """A fleet, its kept guests and the faults that can be done to their hosts."""

    fleet: LossFleet
    rng: random.Random
    faults: dict[str, HostFault]
    hands: Hands
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
        host, chosen = self.rng.choice(sorted(set(homes.values()))), self.faults[fault]
        hosts = list(chosen.takes(host))
        guests = sorted(name for name, home in homes.items() if home in hosts)
        found = Round(number, fault, hosts, guests, self.has_beacons)
        must = chosen.must_with_beacon if self.has_beacons and chosen.must_with_beacon is not None else chosen.must
        at_s, boots = boottime_s(), self._boots()
        try:
            try:
                chosen.inflict(host)
                self._watch(found, must, at_s, homes)
            finally:
                chosen.end(host)
            self._settle(found, homes)
            found.fail(next((line for vm_id in self.vm_ids.values() for line in self.fleet.overlaps(vm_id, at_s)), ""))
            found.restarted = sorted(name for name, boot in self._boots().items() if boot != boots[name])
            if chosen.keeps_migrated and self.hands.migrated in found.restarted:
                found.fail(f"{self.hands.migrated} started anew, although the side that was lost did not have it")
        except Exception as error:
            # Whatever failed is this round's finding, and the next one begins with a whole fleet.
            found.fail(f"{type(error).__name__}: {error}"[:600])
            with contextlib.suppress(Exception):
                self._show()
            self._mend()
        found.took_s = round(boottime_s() - at_s, 1)
        return found

    def _boots(self) -> dict[str, str]:
        return {name: str(self.fleet.writes(vm_id)[-1].boot) for name, vm_id in self.vm_ids.items()}

    def _mend(self) -> None:
        """Take back whatever a fault may have left."""
        lab, plane = self.fleet.lab, self.fleet.plane
        ways: list[Callable[[], object]] = [partial(lab.hang_storage, is_hung=False), partial(lab.heal, CTL)]
        if isinstance(plane, Replicas):
            for name in PROCESSES:
                ways += [partial(plane.thaw_one, name), partial(plane.heal_database, name)]
        ways.append(plane.start)
        for host in self.fleet.hosts:
            ways += [
                partial(lab.boot, host),
                partial(lab.heal, host),
                partial(lab.thaw, host),
                partial(lab.run, host, ["iptables", "-F", "OUTPUT"]),
            ]
        for way in ways:
            with contextlib.suppress(LabError, OSError):
                way()
        with contextlib.suppress(AssertionError):
            self.fleet.wait_until_armed()

    def _show(self) -> None:
        """Print what an operator would look at, to find out why a round failed: the lab is gone when the campaign ends."""
        for words in (("host", "list"), ("vm", "list", "-o", "wide"), ("op", "list"), ("failover", "list"), ("event", "list")):
            ran = self.fleet.trimtab(*words)
            sys.stderr.write(f"--- trimtab {' '.join(words)}\n{ran.out}{ran.err}\n")
        for name in self.vm_ids:
            sys.stderr.write(f"--- trimtab vm get {name}\n{self.fleet.trimtab('vm', 'get', name, '-o', 'yaml').out}\n")

    def _watch(self, found: Round, must: Must, at_s: float, homes: dict[str, str]) -> None:
        """Wait for what must become of the hosts' guests."""
        if must is Must.STAY:
            wait_until(lambda: boottime_s() > at_s + STAYS_S, "the time to pass in which a lease would end")
        for name in found.guests:
            vm_id = self.vm_ids[name]
            match must:
                case Must.MOVE | Must.MOVE_LATE:
                    self._moved(found, name, at_s, homes[name], is_late=must is Must.MOVE_LATE)
                case Must.LAND:
                    self._landed(name)
                case Must.STAY:
                    self._counts_on(name)
                    moved = {each.host for each in self.fleet.writes(vm_id) if each.at_s > at_s} - {homes[name]}
                    if moved:
                        found.fail(f"false failover: {name} left {homes[name]} for {', '.join(sorted(moved))}")
                case Must.RUN:
                    pass  # in the end, which `_settle` looks at

    def _moved(self, found: Round, name: str, at_s: float, home: str, *, is_late: bool) -> None:
        vm_id = self.vm_ids[name]
        first = self.fleet.first_elsewhere(vm_id, home, at_s, patience_s=LATE_S if is_late else MOVE_S)
        found.started_s[name] = round(self.fleet.opened_s(first.connection) - at_s, 2)
        found.counting_s[name] = round(first.at_s - at_s, 2)
        found.fail(self.fleet.overlap(vm_id, home, first))
        if not is_late and found.started_s[name] > kit.GOAL_MAX_S:
            found.fail(f"{name} was started elsewhere after {found.started_s[name]:.0f} s, later than {kit.GOAL_MAX_S:.0f} s")

    def _landed(self, name: str) -> None:
        def has_landed() -> bool:
            lost = [host for host in self.fleet.hosts if self.fleet.lab.init_process_id(host) is None]
            vm = self.fleet.vm(name)
            is_well = vm["host"] not in lost and vm["observed"]["state"] == "running" and vm["operation"] is None
            return is_well and self.fleet.home(self.vm_ids[name]) == vm["host"]

        wait_until(has_landed, f"{name} to count on on a host that was not lost", patience_s=LATE_S)
        self._counts_on(name)

    def _counts_on(self, name: str, *, patience_s: float = 120.0) -> None:
        now_s = boottime_s()
        wait_until(lambda: self.fleet.writes(self.vm_ids[name])[-1].at_s > now_s, f"{name} to count on", patience_s=patience_s)

    def _settle(self, found: Round, homes: dict[str, str]) -> None:
        """Everybody is back: each guest counts in one place, and nobody was moved whose host was well."""
        self.fleet.wait_until_armed()
        for name, vm_id in self.vm_ids.items():
            self._counts_on(name, patience_s=240.0)
            # Asked of libvirt, not of Trimtab. A copy that is being cleaned up is no second run.
            places = wait_until(
                lambda vm_id=vm_id: one if len(one := self.fleet.runs_on(vm_id)) == 1 else None, f"{name} to run once"
            )
            if name not in found.guests and places != [homes[name]]:
                found.fail(f"false failover: {name} left {homes[name]}")
        doubles = self.fleet.double_runs()
        if doubles:
            found.fail(doubles[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a campaign is to do. `losses` 0: each kind once. `with_beacons`: "half" of the rounds, "all" or "none"."""

    seed: int
    losses: int
    budget_s: float
    only: str
    is_replicated: bool
    with_beacons: str
    lab: int = 0
    labs: int = 1

    def faults(self, known: Mapping[str, HostFault]) -> dict[str, HostFault]:
        """Return the kinds that are asked for, or this lab's share of them."""
        names = sorted(name for name in known if not self.only or name in self.only.split(","))
        # A share is no neighbourhood: kinds of one sort go to both.
        return {name: known[name] for name in names[self.lab :: self.labs]}


def run(order: Order) -> Told[Round]:
    """Run one lab's campaign."""
    name = f"loss{order.lab + 1}-{os.getpid()}"
    lab = Lab.named(name, state_directory=Path(tempfile.mkdtemp(prefix=f"tt-{name}-")))
    devices = PowerDevices(lab)
    told = Told[Round](seed=order.seed, is_replicated=order.is_replicated)
    try:
        fleet = kit.build(lab, hosts=5 if order.is_replicated else 3, is_replicated=order.is_replicated)
        devices.start()
        hands = Hands(fleet, devices)
        replica_faults = ReplicaFaults(fleet, fleet.plane, hands) if isinstance(fleet.plane, Replicas) else None
        known = {**all_faults(fleet, hands), **(replica_faults.all() if replica_faults is not None else {})}
        campaign = Campaign(fleet, random.Random(order.seed), order.faults(known), hands)
        campaign.begin()
        began_s = time.monotonic()
        losses = order.losses or len(campaign.faults)
        with contextlib.suppress(KeyboardInterrupt):  # what was found so far is reported
            for number in range(1, losses + 1):
                spent_s = time.monotonic() - began_s
                if spent_s > order.budget_s:
                    break
                is_second_half = number > losses / 2 or spent_s > order.budget_s / 2
                if not campaign.has_beacons and (
                    order.with_beacons == "all" or (order.with_beacons == "half" and is_second_half)
                ):
                    kit.use_beacons(fleet)
                    campaign.has_beacons = True
                told.rounds.append(campaign.lose(number))
                sys.stdout.write(json.dumps(asdict(told.rounds[-1])) + "\n")
                sys.stdout.flush()
        told.double_runs, told.writes = fleet.double_runs(), len(fleet.writes())
        told.struck = list(replica_faults.told) if replica_faults is not None else []
        told.left = sorted(set(campaign.faults) - {each.fault for each in told.rounds})
        return told
    finally:
        devices.stop()
        lab.down()


def run_all(order: Order) -> Told[Round]:
    """Run each lab's share at once, and return what they found together."""
    with ThreadPoolExecutor(order.labs) as threads:
        return reduce(Told[Round].and_of, threads.map(run, [replace(order, lab=number) for number in range(order.labs)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--losses", type=int, default=0, help="of each lab; default: each kind of fault once")
    parser.add_argument("--labs", type=int, choices=[1, 2], default=1, help="fleets at once, each with its share of the kinds")
    parser.add_argument("--minutes", type=float, default=120.0, help="no round is begun later than this after the fleet is up")
    parser.add_argument("--only", default="", help="faults by name, with commas; default: all")
    parser.add_argument("--replicated", action="store_true", help="five hosts and several controllers on PostgreSQL")
    parser.add_argument(
        "--beacons", choices=["half", "all", "none"], default="half", help="in how many of the rounds hosts have one"
    )
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int(time.time())
    began = datetime.now(UTC)
    told = run_all(
        Order(
            seed=seed,
            losses=arguments.losses,
            budget_s=arguments.minutes * 60,
            only=arguments.only,
            is_replicated=arguments.replicated,
            with_beacons=arguments.beacons,
            labs=arguments.labs,
        )
    )
    path = write_report(told, arguments.evidence, began=began)
    started = [seconds for each in told.rounds for seconds in each.started_s.values()]
    sys.stdout.write(
        f"{len(told.rounds)} losses, guests started elsewhere after {statistics.median(started) if started else 0:.1f} s in the median, "
        f"{len(told.double_runs)} double runs, {len(told.failures)} failures; {path}\n"
        + "".join(f"{line}\n" for line in [*told.failures, *told.double_runs])
    )
    return 1 if told.failures or told.double_runs or not told.rounds else 0


if __name__ == "__main__":
    sys.exit(main())
