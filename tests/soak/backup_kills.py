"""`kill -9` of agent, QEMU and libvirtd at random instants of backups of a real domain: what is listed restores byte-identical.

    python -m tests.soak.backup_kills [--kills 60] [--seed N]        as root; one libvirt host in a namespace, some 3 s for each kill

The domain stands still and is written to through its QEMU, scattered and over old data, between the kills. After every few of them each
listed backup is restored and compared with what its disk held at the instant. The report goes to tests/evidence.
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
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.accounts import clean_up_when_told_to_end
from tests.bench.bench_backup_peers import BACKEND, XML
from tests.lab.backup_in_host import opened
from tests.soak.chaos import EVIDENCE, _commit
from tests.unit.agent.backup.kit import restore
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_lab.hosts import Lab

HOST, VM = "node1", "vm-victim"
DOMAIN = f"trimtab-{VM}"
VICTIM = Path(__file__).with_name("backup_victim.py")
DISK_MIB = 64
CHECK_EVERY = 10
KEPT = 4
DELAY_S = 0.8
"""A backup takes about half a second: kills fall before, in and after it."""


class Campaign:
    def __init__(self, lab: Lab, folder: Path, seed: int) -> None:
        self.lab, self.folder = lab, folder
        self.dice = random.Random(seed)
        self.contents: set[str] = set()
        self.killed: Counter[str] = Counter()
        self.compared = 0
        self.finished = 0
        self.piece = folder / "piece"
        disk = folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), f"{DISK_MIB}M"], check=True)
        definition = folder / "domain.xml"
        definition.write_text(XML.format(name=DOMAIN, uuid="6f1b3c1e-7c1f-5d0a-9a53-0000000000aa", vm=VM, file=disk))
        self.virsh("define", str(definition))

    def virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.lab.run(HOST, ["virsh", "-q", *arguments], check=False, timeout_s=60)

    def round(self, number: int) -> None:
        self.ready()
        self.write()
        command = self.lab.command(HOST, [sys.executable, str(VICTIM), str(self.folder), VM, f"bk-{number:04}"])
        (self.folder / "pid").unlink(missing_ok=True)
        log = (self.folder / "victim.log").open("ab")
        with log, subprocess.Popen(command, stdout=log, stderr=log, env=self.environment()) as victim:
            while not (self.folder / "pid").exists() and victim.poll() is None:
                time.sleep(0.01)
            time.sleep(self.dice.random() * DELAY_S)  # the random instant
            self.kill(self.dice.choice(["agent", "qemu", "libvirtd"]))
            try:
                ended = victim.wait(90)
            except subprocess.TimeoutExpired:
                self.kill("agent")
                ended = victim.wait(10)
        self.finished += ended == 0

    def environment(self) -> dict[str, str]:
        return {**self.lab.environment(HOST), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def kill(self, whom: str) -> None:
        match whom:
            case "agent":
                with contextlib.suppress(FileNotFoundError):
                    self.lab.run(HOST, ["kill", "-9", (self.folder / "pid").read_text() or "none"], check=False)
            case "qemu":
                self.lab.run(HOST, ["sh", "-c", f"kill -9 $(cat /run/libvirt/qemu/{DOMAIN}.pid)"], check=False)
            case "libvirtd":
                self.lab.signal_service(HOST, "libvirtd", signal.SIGKILL)
        self.killed[whom] += 1

    def ready(self) -> None:
        deadline_s = time.monotonic() + 60
        while (state := self.virsh("domstate", DOMAIN)).stdout.strip() != "paused":
            if time.monotonic() > deadline_s:
                raise AssertionError(f"the domain does not come up: {state.stdout} {state.stderr}")
            if state.returncode == 0:
                self.virsh("start", "--paused", DOMAIN)
            time.sleep(0.2)  # libvirtd is being started anew

    def write(self) -> None:
        for _ in range(self.dice.randrange(1, 5)):
            length = self.dice.choice([512, 65536, 1 << 20])
            self.piece.write_bytes(self.dice.randbytes(length))
            offset = self.dice.randrange(((DISK_MIB << 20) - length) // 512) * 512
            command = f'qemu-io -d {BACKEND} "write -q -s {self.piece} {offset} {length}"'
            self.virsh("qemu-monitor-command", DOMAIN, "--hmp", command)

    def check(self) -> None:
        """Restore every listed backup; then forget all but the last ones, so that the campaign does not grow."""
        repository = opened(self.folder / "repository")
        digests = dict(line.split() for line in (self.folder / "digests").read_text().splitlines())
        listing = repository.list_backups()
        assert listing.unreadable == {}
        assert verify_all(repository).damaged_backups == []
        for manifest in listing.manifests:
            restored = hashlib.sha256(restore(repository, manifest.backup_id, vm=VM)).hexdigest()
            assert restored == digests[manifest.backup_id], manifest.backup_id
            self.contents.add(restored)
            self.compared += 1
        for manifest in listing.manifests[:-KEPT]:
            repository.forget(VM, manifest.backup_id)
        repository.close()


def campaign(lab: Lab, folder: Path, *, seed: int, count: int) -> Campaign:
    played = Campaign(lab, folder, seed)
    opened_once = folder / "repository"
    opened_once.mkdir()
    opened(opened_once).close()
    (folder / "digests").touch()
    for number in range(1, count + 1):
        played.round(number)
        if number % CHECK_EVERY == 0 or number == count:
            played.check()
            assert len(played.contents) > number // CHECK_EVERY, "the disk changed between the backups"
    return played


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where the report goes")
    asked = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("backup_kills needs root: a real libvirt host lives in namespaces")
    clean_up_when_told_to_end()
    began = datetime.now(UTC)
    report: dict[str, object] = {"began": began.isoformat(), "commit": _commit(), "seed": asked.seed, "kills": asked.kills}
    with tempfile.TemporaryDirectory(prefix="tt-backup-kills-") as name:
        folder = Path(name)
        folder.chmod(0o777)  # QEMU, which is another user, makes its scratch file here
        lab = Lab.named(f"bk-kills-{os.getpid()}", state_directory=folder / "lab")
        try:
            lab.up(hosts=1)
            played = campaign(lab, folder, seed=asked.seed, count=asked.kills)
            report |= {"killed": played.killed, "backups_that_finished": played.finished, "restores_compared": played.compared}
            report["problem"] = ""
        except AssertionError as error:
            report["problem"] = str(error) or "a restore differed"
        finally:
            lab.down()
    report["seconds"] = round((datetime.now(UTC) - began).total_seconds())
    asked.evidence.mkdir(exist_ok=True, parents=True)
    (asked.evidence / f"backup-kills-{began:%Y-%m-%d-%H%M%S}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))  # noqa: T201
    return 1 if report["problem"] else 0


if __name__ == "__main__":
    sys.exit(main())
