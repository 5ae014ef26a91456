"""`python -m tests.soak.without_lease_wait`: does the lab see a double run where one is let happen? The wait for the lease is taken out.

One fleet of real hosts on PostgreSQL, and one kept guest on a lock-free disk. The link of its home is cut, twice:

    with the wait      the product as it is: no line of the disk's log may overlap
    without the wait   the engines are replaced by `controller_without_lease_wait.py`: the guest must be seen to run twice

So "0 double runs" in the other reports is the word of a lab that can say another number. The guest of a host that was cut off goes on
writing until the host's warden ends it at the end of the lease; the lease is 30 s here (a setting of the product), so that the time in
which both write is longer than a guest's boot. The dated report goes to tests/evidence/; exit status 1 where either half differs.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.lab import host_loss_kit as kit
from tests.lab.fleet_kit import wait_until
from tests.lab.host_loss_kit import LossFleet, boottime_s
from tests.soak.evidence import EVIDENCE, REPOSITORY, current_commit
from trimtab_controller.loops.failover import LEADERS_WINDOW_S
from trimtab_lab.commands import own_programs
from trimtab_lab.hosts import Lab
from trimtab_lab.replicas import Replicas

ENGINES = ("engine1", "engine2")
LEASE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """One loss by a cut link. Seconds are from the cut."""

    waits: bool
    fenced_after_s: float
    opened_elsewhere_after_s: float
    """The copy's QEMU had opened the disk."""
    counted_elsewhere_after_s: float
    last_write_at_home_after_s: float
    """Of the guest that the host which was cut off still ran."""
    writes_after_takeover: int
    """Lines of the old guest after the copy's first."""
    double_runs: list[str] = field(default_factory=list)
    """What the disk's judge says of this loss."""

    @property
    def overlap_s(self) -> float:
        """How long the old guest wrote after the copy had opened the disk; negative: how long before it had ended."""
        return self.last_write_at_home_after_s - self.opened_elsewhere_after_s

    @property
    def is_as_expected(self) -> bool:
        has_run_twice = bool(self.double_runs) and self.overlap_s >= 0
        has_run_once = not self.double_runs and self.overlap_s < 0
        return has_run_once if self.waits else has_run_twice


def programs_without_wait(directory: Path) -> Path:
    """Return a directory of programs whose `trimtab-controller engine` does not wait for leases."""
    for name in ("trimtab", "trimtab-agent"):
        (directory / name).symlink_to(own_programs() / name)
    program = directory / "trimtab-controller"
    program.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = engine ] || exec {shlex.quote(str(own_programs() / "trimtab-controller"))} "$@"\n'
        f"cd {shlex.quote(str(REPOSITORY))}\n"
        f'exec {shlex.quote(sys.executable)} -m tests.soak.controller_without_lease_wait "$@"\n'
    )
    program.chmod(0o755)
    return directory


def lose(fleet: LossFleet, vm_id: str, *, waits: bool) -> Half:
    """Cut the link of the guest's home, and return what the disk's log shows once the old guest has ended and the host is back."""
    home, before = fleet.home(vm_id), len(fleet.double_runs())
    host_id = str(fleet.host(home)["id"])
    unix_to_boottime_s = boottime_s() - time.time()
    at_s = boottime_s()
    fleet.lab.cut(home)
    try:
        first = fleet.first_elsewhere(vm_id, home, at_s)
        # By then its own warden has ended the old guest, copy or no copy.
        wait_until(lambda: boottime_s() > at_s + LEASE_S + 2 * kit.KILL_S, "the lease to end")
        fenced_s = fleet.event_unix_s("failover.fenced", host_id, after_unix_s=at_s - unix_to_boottime_s) + unix_to_boottime_s
        seen = fleet.writes(vm_id)
        old = [each for each in seen if each.host == home and each.connection != first.connection]
        return Half(
            waits=waits,
            fenced_after_s=round(fenced_s - at_s, 2),
            opened_elsewhere_after_s=round(fleet.opened_s(first.connection) - at_s, 2),
            counted_elsewhere_after_s=round(first.at_s - at_s, 2),
            last_write_at_home_after_s=round(old[-1].at_s - at_s, 2),
            writes_after_takeover=sum(each.at_s > first.at_s for each in old),
            double_runs=fleet.double_runs()[before:],
        )
    finally:
        fleet.lab.heal(home)
        fleet.wait_until_armed()


def run() -> list[Half]:
    """Lose the guest's home with the wait, replace the engines, and lose it without."""
    lab = Lab.named(f"no-wait-{os.getpid()}", state_directory=Path(tempfile.mkdtemp(prefix="tt-no-wait-")))
    settings = {"TRIMTAB_LEASE_TTL_S": f"{LEASE_S:g}"}
    try:
        fleet = kit.build(lab, settings=settings, is_replicated=True)
        vm_id = fleet.keep("kept", to="node1")
        told = [lose(fleet, vm_id, waits=True)]
        sys.stdout.write(json.dumps(asdict(told[0])) + "\n")
        assert isinstance(fleet.plane, Replicas)
        for engine in ENGINES:
            fleet.plane.kill(engine)
        with tempfile.TemporaryDirectory() as programs:
            replaced = Replicas(lab, settings=settings, programs=programs_without_wait(Path(programs)))
            fleet.plane = replaced
            replaced.start()
            # One takes over a lease after the last leader's; what it has not seen for a while it does not judge.
            wait_until(replaced.leader, "one of the new engines to lead")
            led_s = boottime_s()
            wait_until(lambda: boottime_s() > led_s + LEADERS_WINDOW_S + 5, "the new leader's window to pass")
            fleet.wait_until_armed()
            told.append(lose(fleet, vm_id, waits=False))
        return told
    finally:
        lab.down()


def lines(told: list[Half], began: datetime, commit: str) -> list[str]:
    def row(half: Half) -> str:
        cells = [
            "waited for" if half.waits else "taken out",
            f"{half.fenced_after_s:.1f}",
            f"{half.opened_elsewhere_after_s:.1f}",
            f"{half.last_write_at_home_after_s:.1f}",
            f"{half.overlap_s:.1f}" if half.overlap_s >= 0 else f"none ({-half.overlap_s:.1f} s apart)",
            str(half.writes_after_takeover),
            str(len(half.double_runs)),
            "as expected" if half.is_as_expected else "NOT as expected",
        ]
        return f"| {' | '.join(cells)} |"

    return [
        f"# The wait for the lease, taken out, {began:%Y-%m-%d %H:%M} UTC",
        "",
        f"Commit `{commit}`, `python -m tests.soak.without_lease_wait`: three real hosts, lease {LEASE_S:g} s, the link of a kept guest's "
        "home cut. Seconds from the cut. The second row's engines run with one core function in place of another "
        "(`tests/soak/controller_without_lease_wait.py`); the product has no such switch.",
        "",
        "| lease | host fenced | disk opened elsewhere | last write at home | both had it open | lines at home after the first elsewhere | "
        "double runs by the disk's log | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *[row(half) for half in told],
        "",
        *[f"- {line}" for half in told for line in half.double_runs],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    given = parser.parse_args()
    began, commit = datetime.now(UTC), current_commit()
    told = run()
    given.evidence.mkdir(exist_ok=True, parents=True)
    stem = given.evidence / f"without-lease-wait-{began:%Y-%m-%d-%H%M%S}"
    document = {
        "began": began.isoformat(timespec="seconds"),
        "commit": commit,
        "lease_s": LEASE_S,
        "halves": [{**asdict(half), "overlap_s": round(half.overlap_s, 2)} for half in told],
    }
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    text = "\n".join(lines(told, began, commit)) + "\n"
    stem.with_suffix(".md").write_text(text)
    sys.stdout.write(text)
    return 0 if all(half.is_as_expected for half in told) else 1


if __name__ == "__main__":
    sys.exit(main())
