"""Backups of a domain through its host's libvirt: the agent's own way beside Debian's virtnbdbackup, `nbdcopy` as the floor.

    python -m tests.bench.bench_backup_peers [--rounds 2]          as root; one libvirt host in a namespace, about two minutes

Two domains with equal disks stand still while both are changed equally through their QEMU: about 46 MiB, scattered and in one piece.
Ours is one job of an agent, which is a daemon: `wall` counts from its call to its return, `whole process` an interpreter that does nothing
else, as virtnbdbackup is one for each backup. virtnbdbackup neither hashes nor compresses. Every restore is compared with its disk.
Ends with 1 where a goal is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tests.bench.accounts import clean_up_when_told_to_end, load_note, table
from tests.bench.bench_backup import MIB, change_arguments, folder_bytes, make_image, measured, run, served
from tests.bench.goals import Goal, end
from trimtab_lab.hosts import Lab

HOST = "node1"
OWN = Path(__file__).with_name("backup_in_lab.py")
REPOSITORY = OWN.parents[2]
SIZE_BYTES, DATA_MIB = 2 << 30, 1024
BACKEND = "/machine/peripheral/virtio-disk0/virtio-backend"
XML = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid>
<metadata><t:domain xmlns:t='urn:trimtab:domain:1'><t:vm id='{vm}' name='bench' project='default'/><t:stamp epoch='1' turn='1' boot=''/>
</t:domain></metadata><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' discard='unmap'/><source file='{file}'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""


class Bench:
    """The domains are made anew for each round."""

    def __init__(self, lab: Lab, folder: Path, image: Path) -> None:
        self.lab, self.folder, self.image = lab, folder, image
        self.figures: dict[str, list[dict[str, float]]] = defaultdict(list)

    def round(self, number: int) -> None:
        work = self.folder / f"round{number}"
        work.mkdir()
        work.chmod(0o777)  # QEMU, which is another user, makes sockets and scratch files here
        disks = {vm: work / f"{vm}.qcow2" for vm in ("vm-own", "vm-peer")}
        for vm, disk in disks.items():
            run("cp", "--sparse=always", str(self.image), str(disk))
            self._define(vm, disk, work)
        with served(self.image) as path:
            floor, _ = measured(["nbdcopy", "--flush", f"nbd+unix:///vda?socket={path}", str(work / "floor.raw")])
        self.figures["nbdcopy, full to raw"].append(floor)
        (work / "floor.raw").unlink()
        repository, peer = work / "repository", work / "peer"
        for step, level in (("full", "full"), ("increment", "inc")):
            if step == "increment":
                for vm in disks:
                    self._change(vm, work, number)
            stored = (folder_bytes(repository) if repository.exists() else 0, folder_bytes(peer) if peer.exists() else 0)
            self._own(step, str(repository), before=stored[0], folder=repository)
            self._peer(step, ["virtnbdbackup", "-n", "-d", "trimtab-vm-peer", "-l", level, "-o", str(peer), "-S", str(work),
                              "-f", str(work / "peer.sock")], before=stored[1], folder=peer)  # fmt: skip
        for vm in disks:
            self.lab.run(HOST, ["virsh", "-q", "destroy", f"trimtab-{vm}"])
        restored = work / "own-restored.qcow2"
        self._own("restore", str(repository), str(restored))
        run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", str(restored), str(disks["vm-own"]))
        restored.unlink()
        self._peer("restore", ["virtnbdrestore", "-n", "-a", "restore", "-i", str(peer), "-o", str(work / "peer-restored"), "-L",
                               str(work / "restore.log"), "-f", str(work / "peer.sock")])  # fmt: skip
        [restored] = [file for file in (work / "peer-restored").iterdir() if file.stat().st_size > 64 * MIB]
        run("qemu-img", "compare", "-q", "-U", "-f", "qcow2", "-F", "qcow2", str(restored), str(disks["vm-peer"]))
        for vm in disks:
            self.lab.run(HOST, ["virsh", "-q", "undefine", f"trimtab-{vm}", "--checkpoints-metadata"])
        run("rm", "-r", str(work))

    def _define(self, vm: str, disk: Path, work: Path) -> None:
        file = work / f"{vm}.xml"
        uuid = f"6f1b3c1e-7c1f-5d0a-9a53-{sum(vm.encode()):012x}"
        file.write_text(XML.format(name=f"trimtab-{vm}", uuid=uuid, vm=vm, file=disk))
        self.lab.run(HOST, ["virsh", "-q", "define", str(file)])
        self.lab.run(HOST, ["virsh", "-q", "start", "--paused", f"trimtab-{vm}"])

    def _change(self, vm: str, work: Path, number: int) -> None:
        piece = work / "piece"
        for write in change_arguments(piece, SIZE_BYTES, number):
            # By the device: a node that a device has is nobody else's to write to.
            command = f'qemu-io -d {BACKEND} "{write}"'
            said = self.lab.run(HOST, ["virsh", "-q", "qemu-monitor-command", f"trimtab-{vm}", "--hmp", command]).stdout
            if said.strip():
                raise SystemExit(f"QEMU did not write: {said}")

    def _own(self, step: str, *arguments: str, before: int = 0, folder: Path | None = None) -> None:
        figures, output = self._in_host([sys.executable, str(OWN), step, *arguments])
        told = json.loads(output.splitlines()[-1])
        stored = {"stored_mib": (folder_bytes(folder) - before) / MIB} if folder else {}
        self.figures[f"{step}, Trimtab"].append({"process_s": figures["wall_s"], **told, **stored})

    def _peer(self, step: str, command: list[str], *, before: int = 0, folder: Path | None = None) -> None:
        figures, _ = self._in_host(command)
        stored = {"stored_mib": (folder_bytes(folder) - before) / MIB} if folder else {}
        self.figures[f"{step}, virtnbdbackup"].append({**figures, **stored})

    def _in_host(self, command: list[str]) -> tuple[dict[str, float], str]:
        try:
            return measured(
                self.lab.command(HOST, command), environment={**self.lab.environment(HOST), "PYTHONPATH": str(REPOSITORY)}
            )
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{command[0]}: {error.stdout[-1500:]} {error.stderr[-3000:]}") from error

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in self.figures.items()
        }

    def report(self, load: str) -> str:
        rows = [["medians", "wall s", "CPU s", "stored MiB", "whole process s"]]
        for name, row in self.medians().items():
            cells = [row["wall_s"], row["cpu_s"], row.get("stored_mib"), row.get("process_s", row["wall_s"])]
            rows.append([name, *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
        return table(f"Backups of a domain beside virtnbdbackup, {load}", rows)


def goals_of(medians: Mapping[str, Mapping[str, float]]) -> list[Goal]:
    own = {step: medians[f"{step}, Trimtab"] for step in ("full", "increment", "restore")}
    peer = {step: medians[f"{step}, virtnbdbackup"] for step in ("full", "increment", "restore")}
    increment, floor = own["increment"], medians["nbdcopy, full to raw"]["wall_s"]
    cpu = Goal("full, CPU s per GiB of data", own["full"]["cpu_s"] * 1024 / DATA_MIB, 3.2)
    return [
        Goal("full, wall over nbdcopy's", own["full"]["wall_s"] / floor, 1.5, instead=cpu),
        Goal("increment, wall s", increment["wall_s"], 1),
        Goal("increment, job over virtnbdbackup's", increment["wall_s"] / peer["increment"]["wall_s"], 0.5),
        Goal("increment, process over process", increment["process_s"] / peer["increment"]["wall_s"], 0.5),
        Goal("increment, stored over dirty", increment["stored_mib"] * MIB / increment["dirty_bytes"], 1.3),
        Goal("restore, over virtnbdrestore's", own["restore"]["wall_s"] / peer["restore"]["wall_s"], 0.5),
        Goal("peak memory of any, MiB", max(row["peak_mib"] for row in own.values()), 200),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    if os.geteuid() != 0:
        raise SystemExit("bench_backup_peers needs root: a real libvirt host lives in namespaces")
    clean_up_when_told_to_end()
    load = load_note()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        image = make_image(folder, SIZE_BYTES, DATA_MIB)
        lab = Lab.named(f"peers-{os.getpid()}", state_directory=folder / "lab")
        try:
            lab.up(hosts=1)
            bench = Bench(lab, folder, image)
            for number in range(rounds):
                bench.round(number)
        finally:
            lab.down()
    sys.stdout.write(bench.report(load) + "\n")
    end(goals_of(bench.medians()))


if __name__ == "__main__":
    main()
