"""`python -m tests.soak.old_agent COMMIT`: the agent of an older commit of this repository on one of three real hosts, beside today's.

Nothing is imitated: the agent's, the warden's and the beacon's programs (those that the commit has) are taken out of the history by
`git archive` and run with today's interpreter and libraries, against today's controller. The old host joins, is heard from, takes vms
and lets them go, its agent is restarted, and in the end its power is cut. A refusal that says why is a result; an operation that never
ends, a guest in two places or a host that falls silent is a failure. The dated report goes to tests/evidence/; exit status 1 where
something failed. Not part of `make test`, which has no history to take an agent from.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.lab.fleet_kit import Fleet, Ran, fleet_settings, wait_until
from tests.soak.evidence import EVIDENCE, REPOSITORY, current_commit
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab

MODULES = {"trimtab-agent": "main", "trimtab-warden": "warden", "trimtab-beacon": "beacon"}
OLD, NEW, THIRD = "node1", "node2", "node3"
LEASE_S, WATCHED_S = 15.0, 40.0
REFUSED = {5, 7}
"""Exit codes of a request that cannot be met: conflict, no capacity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    what: str
    said: str
    is_well: bool
    took_s: float


@dataclass
class Told:
    commit: str
    date: str
    controller: str = field(default_factory=current_commit)
    programs: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)


def take_out(commit: str, directory: Path) -> list[str]:
    """Put the commit's agent into a directory, with a program for each of its modules that it has; return their names."""
    archive, source = directory / "agent.tar", directory / "source"
    source.mkdir()
    command = ["git", "archive", f"--output={archive}", commit, "agent", "protos"]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=60)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(source)], check=True, timeout=60)
    programs = directory / "bin"
    programs.mkdir()
    path = shlex.quote(f"{source / 'agent'}:{source / 'protos'}")
    for name, module in MODULES.items():
        if (source / "agent" / "trimtab_agent" / f"{module}.py").exists():
            program = programs / name
            program.write_text(
                f'#!/bin/sh\nPYTHONPATH={path} exec {shlex.quote(sys.executable)} -m trimtab_agent.{module} "$@"\n'
            )
            program.chmod(0o755)
    return sorted(each.name for each in programs.iterdir())


class Trial:
    """The steps; each is told, and one that fails does not keep the next from being tried."""

    def __init__(self, fleet: Fleet, old: ControlPlane, told: Told) -> None:
        self._fleet, self._old, self._told = fleet, old, told

    def run(self) -> None:
        steps: list[tuple[str, Callable[[], str]]] = [
            ("join", self._joins),
            ("heartbeats for longer than two leases", self._is_heard),
            ("pools and networks", self._reaches),
            ("create a vm there", self._creates),
            ("reboot, pause, resume, stop, start", self._changes_power),
            ("migrate from it to a host of today", lambda: self._moves(NEW)),
            ("migrate from a host of today to it", lambda: self._moves(OLD)),
            ("snapshot", self._snapshots),
            ("create a kept vm there", self._creates_kept),
            ("failover readiness", self._tells_readiness),
            ("restart the agent under its guests", self._restarts_agent),
            ("today's agent beside it is as well as ever", self._serves_beside),
            ("its power is cut; what is kept counts on elsewhere", self._is_lost),
            ("it is back", self._returns),
        ]
        for what, step in steps:
            began_s = time.monotonic()
            try:
                said, is_well = step(), True
            except Exception as error:
                # Whatever failed is what is to be found out, and the next step is tried.
                said, is_well = f"{type(error).__name__}: {error}"[:600], False
            self._told.outcomes.append(
                Outcome(what=what, said=said, is_well=is_well, took_s=round(time.monotonic() - began_s, 1))
            )
            sys.stderr.write(f"{'ok  ' if is_well else 'FAIL'} {what}: {said}\n")

    def _joins(self) -> str:
        self._old.join(OLD)
        self._fleet.wait_for_host(OLD)
        inventory = wait_until(lambda: self._fleet.host(OLD)["inventory"], "its inventory")
        return f"up; it announces {', '.join(inventory['capabilities'])}"

    def _is_heard(self) -> str:
        ages_s: list[float | None] = []
        until_s = time.monotonic() + WATCHED_S

        def has_been_watched() -> bool:
            host = self._fleet.host(OLD)
            assert host["connectivity"] == "up", f"it was called {host['connectivity']}"
            ages_s.append(host["protection"]["lease_age_s"])
            return time.monotonic() > until_s

        wait_until(has_been_watched, "the time to pass")
        # None in the first second: no gateway had yet told of it.
        known = [age_s for age_s in ages_s if age_s is not None]
        assert len(known) > len(ages_s) / 2, "nobody knows how old its lease is"
        assert max(known) < LEASE_S
        return f"up throughout; its lease was at most {max(known):.1f} s old"

    def _reaches(self) -> str:
        def is_ready() -> bool:
            return all(one["state"] == "ready" for one in self._fleet.host(OLD)["pools"])

        wait_until(is_ready, "its pools to be ready", patience_s=60)
        return ", ".join(f"{one['pool']} ready" for one in self._fleet.host(OLD)["pools"])

    def _creates(self) -> str:
        vm = self._fleet.create("plain", pool="shared", index=41, to=OLD)
        assert vm["host"] == OLD
        counted, _uptime = self._fleet.wait_for_ticks("plain", 2)
        return f"it counts ({counted})"

    def _changes_power(self) -> str:
        for verb in ("reboot", "pause", "resume", "stop", "start"):
            self._fleet.ok("vm", verb, "plain", *(["--force"] if verb in {"reboot", "stop"} else []), "--wait")
        if (host := self._fleet.vm("plain")["host"]) != OLD:
            self._fleet.ok("vm", "migrate", "plain", "--to", OLD, "--wait")
        return f"done; it was started on {host}"

    def _moves(self, to: str) -> str:
        ran = self._fleet.trimtab("vm", "migrate", "plain", "--to", to, "--wait")
        said = self._as_refusal(ran)
        vm = self._fleet.vm("plain")
        assert len(self._fleet.runs_on(vm["id"])) == 1, f"it runs on {self._fleet.runs_on(vm['id'])}"
        if said:
            return said
        assert vm["host"] == to
        self._fleet.wait_for_ticks("plain", self._fleet.ticks("plain")[0] + 2)
        return "it goes on counting"

    def _snapshots(self) -> str:
        ran = self._fleet.trimtab("vm", "snapshot", "create", "plain", "one", "--wait")
        return self._as_refusal(ran) or "made"

    def _as_refusal(self, ran: Ran) -> str:
        """Return why it was refused; '' where it was done. An end of another kind is a failure."""
        if ran.code == 0:
            return ""
        assert ran.code in REFUSED, f"it ended with {ran.code}: {ran.err}{ran.out}"
        return f"refused: {(ran.err or ran.out).strip().splitlines()[0].removeprefix('error: ')}"

    def _creates_kept(self) -> str:
        address = f"ip={self._fleet.lab.spec.guest_prefix}.42/24"
        made = ("--image", "micro", "--memory", "96MiB", "--pool", "shared", "--network", f"default,{address}", "--ha", "restart")
        ran = self._fleet.trimtab("vm", "create", "kept", *made, "--to", OLD, "--wait")
        said = self._as_refusal(ran)
        if not said:
            self._fleet.wait_for_ticks("kept", 2)
        return said or "it counts"

    def _tells_readiness(self) -> str:
        protection = self._fleet.host(OLD)["protection"]
        armed, best = protection["is_warden_armed"], protection["best_proof"]
        found = self._fleet.trimtab("doctor", "-o", "json").json()
        doctor = [
            one["message"] for one in found["findings"] if (one["kind"], one["subject"]) == ("host-unprotected", f"host {OLD}")
        ]
        assert armed or best != "warden", "a proof is counted on that nobody gives"
        assert best != "none" or doctor, "the doctor does not tell that nothing proves it off"
        missing = ", ".join(protection["warden_missing"]) or "it says nothing of one"
        return f"warden {'armed' if armed else f'not armed ({missing})'}; best proof: {best}" + (
            f"; doctor: {doctor[0]}" if doctor else ""
        )

    def _restarts_agent(self) -> str:
        counted, uptime = self._fleet.ticks("plain")
        self._fleet.lab.run(OLD, ["systemctl", "restart", "trimtab-agent"])
        wait_until(lambda: self._fleet.host(OLD)["connectivity"] == "up", "it to be up")
        _counted, later = self._fleet.wait_for_ticks("plain", counted + 8)
        assert later > uptime, "its guest was started anew"
        self._fleet.ok("vm", "reboot", "plain", "--force", "--wait")
        return "its guest counted on, and obeys the agent that was started"

    def _serves_beside(self) -> str:
        vm = self._fleet.create("beside", pool="shared", index=43, to=NEW)
        self._fleet.ok("vm", "migrate", "beside", "--to", THIRD, "--wait")
        assert len(self._fleet.runs_on(vm["id"])) == 1
        self._fleet.delete("beside")
        return "create, migrate, delete"

    def _is_lost(self) -> str:
        if self._fleet.trimtab("vm", "get", "kept").code != 0:
            return "there is no kept vm to lose"
        kept_id = self._fleet.vm("kept")["id"]
        best = self._fleet.host(OLD)["protection"]["best_proof"]
        began_s = time.monotonic()
        self._fleet.lab.crash(OLD)
        wait_until(lambda: self._fleet.host(OLD)["connectivity"] in {"lost", "fenced"}, "it to be missed", patience_s=60)
        word = ""
        if best == "none":
            until_s = time.monotonic() + 2 * LEASE_S
            wait_until(lambda: time.monotonic() > until_s, "two leases to pass")
            assert self._fleet.host(OLD)["connectivity"] == "lost", "it was taken as proven off, and nothing had proven it"
            self._fleet.ok("host", "confirm-off", OLD, "--reason", "its power was cut", "--yes")
            word = "nothing was done until an operator confirmed it; "

        def is_elsewhere() -> bool:
            vm = self._fleet.vm("kept")
            return vm["host"] != OLD and vm["observed"]["state"] == "running"

        wait_until(is_elsewhere, "the kept vm to run elsewhere", patience_s=120)
        assert len(self._fleet.runs_on(kept_id)) == 1
        return f"{word}it runs on {self._fleet.vm('kept')['host']} after {time.monotonic() - began_s:.0f} s"

    def _returns(self) -> str:
        self._old.lab.boot(OLD)
        self._fleet.wait_for_host(OLD)
        for name in ("plain", "kept"):
            ran = self._fleet.trimtab("vm", "get", name, "-o", "json")
            if ran.code == 0:
                assert len(self._fleet.runs_on(ran.json()["id"])) <= 1, f"{name} runs twice"
        return "up; nothing runs twice"


@contextmanager
def fleet_with(programs: Path) -> Iterator[tuple[Fleet, ControlPlane]]:
    """Bring up three hosts, the first of which runs those programs and has not joined."""
    lab = Lab.named(f"old-{os.getpid()}", state_directory=Path(tempfile.mkdtemp(prefix="tt-old-")))
    try:
        lab.up(hosts=3)
        lab.crash(OLD)
        older = Lab(lab.spec, agent_command=[str(programs / "trimtab-agent")])
        older.boot(OLD)
        plane = ControlPlane(lab, settings=fleet_settings(lab))
        plane.start()
        for host in (NEW, THIRD):
            plane.join(host)
        fleet = Fleet(lab, plane)
        fleet.wait_for_host(NEW)
        fleet.wait_for_host(THIRD)
        fleet.ok("pool", "create", "shared", "--path", "/srv/trimtab-shared", "--shared", "--default")
        fleet.ok("pool", "create", "local", "--path", "/srv/trimtab-local")
        fleet.ok("network", "create", "default", "--bridge", "br-guest")
        fleet.ok("image", "import", "micro", str(build_guest_image().qcow2), "--pool", "shared", "--wait")
        yield fleet, ControlPlane(older)
    finally:
        lab.down()


def lines(told: Told, began: datetime) -> list[str]:
    return [
        f"# An agent of {told.date}, {began:%Y-%m-%d %H:%M} UTC",
        "",
        f"Agent `{told.commit}` ({', '.join(told.programs)}) on one of three real hosts, controller and the other agents "
        f"`{told.controller}`; `python -m tests.soak.old_agent {told.commit}`.",
        "",
        "| what | | it took, s | what was seen |",
        "| --- | --- | ---: | --- |",
        *[
            f"| {one.what} | {'ok' if one.is_well else '**failed**'} | {one.took_s} | {' '.join(one.said.replace('|', '/').split())} |"
            for one in told.outcomes
        ],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="whose agent, for example of three days ago: `git log --before`")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    given = parser.parse_args()
    named = ["git", "log", "-1", "--format=%h %as", given.commit]
    commit, date = subprocess.run(named, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=10).stdout.split()
    began, told = datetime.now(UTC), Told(commit, date)
    with tempfile.TemporaryDirectory(prefix="tt-old-agent-") as directory:
        told.programs = take_out(commit, Path(directory))
        with fleet_with(Path(directory) / "bin") as (fleet, old):
            Trial(fleet, old, told).run()
    given.evidence.mkdir(exist_ok=True, parents=True)
    stem = given.evidence / f"old-agent-{commit}-{began:%Y-%m-%d-%H%M%S}"
    stem.with_suffix(".json").write_text(
        json.dumps({"began": began.isoformat(timespec="seconds"), **asdict(told)}, indent=1) + "\n"
    )
    text = "\n".join(lines(told, began)) + "\n"
    stem.with_suffix(".md").write_text(text)
    sys.stdout.write(text)
    return 0 if all(one.is_well for one in told.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
