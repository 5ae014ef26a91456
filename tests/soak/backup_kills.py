"""`kill -9` of agent, pruner, QEMU and libvirtd at random instants of backups of real domains: what is listed restores byte-identical.

    python -m tests.soak.backup_kills [--kills 150] [--seed N] [--report FILE]     as root; one libvirt host in a namespace

Several domains share one repository. Each stands still and is written to through its QEMU, scattered and over old data, between the kills.
Instants are drawn over one and a half times what a backup takes just now, so that they fall before, in and after it. After every few kills
each listed backup of a domain is restored and compared with what its disk held at the instant. With `--report` the run becomes a part of
that report, so that a long campaign can be played in pieces; else a report of its own goes to tests/evidence.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench.accounts import clean_up_when_told_to_end
from tests.bench.bench_backup_peers import BACKEND, XML
from tests.lab.backup_in_host import opened
from tests.soak.evidence import EVIDENCE, current_commit
from tests.unit.agent.backup.kit import restore
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab

HOST = "node1"
VICTIM = Path(__file__).with_name("backup_victim.py")
SUMS = ("backups_that_finished", "restores_compared", "orphans_of_libvirtd", "seconds")
WHOM = ("agent", "qemu", "libvirtd", "pruner")
DISK_MIB = 64
CHECK_EVERY = 10
KEPT = 4
FIRST_GUESS_S = 0.8
SPREAD = 1.5
"""Of what a backup takes: the instants of the kills."""


class Lane:
    """One domain, backed up and killed again and again; lanes share the host, its libvirtd and the repository."""

    def __init__(self, lab: Lab, folder: Path, number: int, seed: int) -> None:
        self.lab, self.repository = lab, folder / "repository"
        self.folder, self.vm = folder / f"lane{number}", f"vm-victim{number}"
        self.domain = f"trimtab-{self.vm}"
        self.dice = random.Random(f"{seed}-{number}")
        self.contents: set[str] = set()
        self.killed: Counter[str] = Counter()
        self.killed_inside: Counter[str] = Counter()
        self.compared = 0
        self.finished = 0
        self.orphans = 0
        self.typical_s = FIRST_GUESS_S
        self.folder.mkdir()
        self.folder.chmod(0o777)  # QEMU, which is another user, makes its scratch file here
        (self.folder / "digests").touch()
        disk, definition = self.folder / "disk.qcow2", self.folder / "domain.xml"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), f"{DISK_MIB}M"], check=True)
        uuid = f"6f1b3c1e-7c1f-5d0a-9a53-0000000000{number:02}"
        definition.write_text(XML.format(name=self.domain, uuid=uuid, vm=self.vm, file=disk))
        self.virsh("define", str(definition))

    def virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.lab.run(HOST, ["virsh", "-q", *arguments], check=False, timeout_s=60)

    def play(self, count: int, until_s: float) -> "Lane":
        """Play so many rounds, fewer where the clock says so."""
        for number in range(1, count + 1):
            is_last = number == count or time.monotonic() > until_s
            self.round(number)
            if number % CHECK_EVERY == 0 or is_last:
                self.check()
                assert len(self.contents) > number // CHECK_EVERY, "the disk changed between the backups"
            if is_last:
                break
        return self

    def round(self, number: int) -> None:
        self.ready()
        self.write()
        whom = self.dice.choice(WHOM)
        for name in ("pid", "pruner"):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            victim = self.begin(stack, self.vm, f"bk-{number:04}")
            doomed = self.begin(stack, "prune") if whom == "pruner" else victim
            mark = self.folder / ("pruner" if whom == "pruner" else "pid")
            while not mark.exists() and doomed.poll() is None:
                time.sleep(0.01)
            began = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                doomed.wait(self.dice.random() * SPREAD * self.typical_s)  # the random instant
                if whom != "pruner" and doomed.returncode == 0:
                    self.typical_s += (time.monotonic() - began - self.typical_s) / 4
            self.killed_inside[whom] += doomed.poll() is None
            self.kill(whom)
            try:
                ended = victim.wait(90)
            except subprocess.TimeoutExpired:
                self.kill("agent")
                ended = victim.wait(10)
        self.finished += ended == 0

    def begin(self, stack: contextlib.ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
        log = stack.enter_context((self.folder / "victim.log").open("ab"))
        told = [sys.executable, str(VICTIM), str(self.repository.parent), str(self.folder), *arguments]
        environment = {**self.lab.environment(HOST), "PYTHONPATH": os.pathsep.join(sys.path)}
        started = subprocess.Popen(self.lab.command(HOST, told), stdout=log, stderr=log, env=environment)
        return stack.enter_context(started)

    def kill(self, whom: str) -> None:
        match whom:
            case "agent" | "pruner":
                with contextlib.suppress(FileNotFoundError):
                    process_id = (self.folder / ("pruner" if whom == "pruner" else "pid")).read_text() or "none"
                    self.lab.run(HOST, ["kill", "-9", process_id], check=False)
            case "qemu":
                self.lab.run(HOST, ["sh", "-c", f"kill -9 $(cat /run/libvirt/qemu/{self.domain}.pid)"], check=False)
            case "libvirtd":
                with contextlib.suppress(LabError):  # another lane killed it, and it is being started anew
                    self.lab.signal_service(HOST, "libvirtd", signal.SIGKILL)
        self.killed[whom] += 1

    def ready(self) -> None:
        deadline_s, why = time.monotonic() + 60, ""
        while (state := self.virsh("domstate", self.domain)).stdout.strip() != "paused":
            if time.monotonic() > deadline_s:
                raise AssertionError(f"the domain does not come up: {state.stdout} {state.stderr} {why}")
            if state.returncode == 0:
                why = self.virsh("start", "--paused", self.domain).stderr
                if "lock" in why:
                    self.end_orphan()
            time.sleep(0.1)  # libvirtd is being started anew

    def end_orphan(self) -> None:
        """End a QEMU that libvirtd knows nothing of: another lane killed it while it was starting this one. It keeps its disk locked."""
        pattern = f"guest=[t]{self.domain[1:]},"  # not the shell that looks for it
        self.orphans += self.lab.run(HOST, ["pkill", "-9", "-f", pattern], check=False).returncode == 0

    def write(self) -> None:
        piece = self.folder / "piece"
        for _ in range(self.dice.randrange(1, 4)):
            length = self.dice.choice([512, 65536, 1 << 20])
            piece.write_bytes(self.dice.randbytes(length))
            offset = self.dice.randrange(((DISK_MIB << 20) - length) // 512) * 512
            command = f'qemu-io -d {BACKEND} "write -q -s {piece} {offset} {length}"'
            self.virsh("qemu-monitor-command", self.domain, "--hmp", command)

    def check(self) -> None:
        """Restore every listed backup of this domain; then forget all but the last ones, so that the campaign does not grow."""
        repository = opened(self.repository)
        digests = dict(line.split() for line in (self.folder / "digests").read_text().splitlines())
        listing = repository.list_backups(self.vm)
        assert listing.unreadable == {}
        assert verify_all(repository).damaged_backups == []
        for manifest in listing.manifests:
            restored = hashlib.sha256(restore(repository, manifest.backup_id, vm=self.vm)).hexdigest()
            assert restored == digests[manifest.backup_id], manifest.backup_id
            self.contents.add(restored)
            self.compared += 1
        for manifest in listing.manifests[:-KEPT]:
            repository.forget(self.vm, manifest.backup_id)
        repository.close()


def campaign(lab: Lab, folder: Path, *, seed: int, count: int, lanes: int, minutes: float) -> dict[str, Any]:
    """Play it and return its figures, with `problem` where something was wrong: '' where nothing was."""
    (folder / "repository").mkdir()
    opened(folder / "repository").close()
    made = [Lane(lab, folder, number, seed) for number in range(1, lanes + 1)]
    problem, until_s = "", time.monotonic() + minutes * 60
    with ThreadPoolExecutor(lanes) as pool:
        playing = [pool.submit(lane.play, len(range(number, count, lanes)), until_s) for number, lane in enumerate(made)]
        for one in playing:
            error = one.exception()
            if error is not None:
                told = "".join(traceback.format_exception(error))
                problem = told.replace(f"{Path(__file__).resolve().parents[2]}/", "")  # no path of a machine
    return {
        "killed": _summed(lane.killed for lane in made),
        "killed_inside": _summed(lane.killed_inside for lane in made),
        "backups_that_finished": sum(lane.finished for lane in made),
        "restores_compared": sum(lane.compared for lane in made),
        "orphans_of_libvirtd": sum(lane.orphans for lane in made),
        "problem": problem,
    }


def _summed(counts: Iterable[Counter[str]]) -> dict[str, int]:
    return dict(sum(counts, Counter[str]()))


def played(asked: argparse.Namespace) -> dict[str, Any]:
    began = datetime.now(UTC)
    report: dict[str, Any] = {"began": began.isoformat(), "commit": current_commit(), "seed": asked.seed, "kills": asked.kills}
    with tempfile.TemporaryDirectory(prefix="tt-backup-kills-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        lab = Lab.named(f"bk-kills-{os.getpid()}", state_directory=folder / "lab")
        try:
            lab.up(hosts=1)
            report |= campaign(lab, folder, seed=asked.seed, count=asked.kills, lanes=asked.lanes, minutes=asked.minutes)
        finally:
            lab.down()
    report["seconds"] = round((datetime.now(UTC) - began).total_seconds())
    return report


def with_part(file: Path, part: dict[str, Any]) -> dict[str, Any]:
    """Return the report with one part more and the sums of all."""
    parts = [*(json.loads(file.read_text())["parts"] if file.exists() else ()), part]
    sums = {key: sum(one.get(key, 0) for one in parts) for key in SUMS}
    killed = {key: _summed(Counter(one.get(key, {})) for one in parts) for key in ("killed", "killed_inside")}
    problems = [one["problem"] for one in parts if one["problem"]]
    return {
        "kills": sum(sum(one.get("killed", {}).values()) for one in parts),
        **killed,
        **sums,
        "problems": problems,
        "parts": parts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--lanes", type=int, default=3, help="domains that are backed up side by side")
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins later than this")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where a report of its own goes")
    parser.add_argument("--report", type=Path, help="the report that this run becomes a part of")
    asked = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("backup_kills needs root: a real libvirt host lives in namespaces")
    clean_up_when_told_to_end()
    part = played(asked)
    file = asked.report or asked.evidence / f"backup-kills-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    report = with_part(file, part)
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))  # noqa: T201
    return 1 if part["problem"] else 0


if __name__ == "__main__":
    sys.exit(main())
