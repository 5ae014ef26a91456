"""What the hosts of a lab store on: one shared directory, local directories, and lock-free disks over NBD.

The shared directory is a FUSE mount that calls itself GlusterFS, so that libvirt takes it for a cluster filesystem and
migrates without being told that it is safe. All hosts share one kernel: file locks on it survive a network cut, which real
storage may not grant. The NBD disks are the opposite: no locks at all, two hosts can write at once if the control plane
lets them.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from trimtab_lab.commands import mount_points, run, wait_until, write_atomically
from trimtab_lab.ctl import running_process_id, start_in_ctl
from trimtab_lab.errors import LabError
from trimtab_lab.specs import LabSpec

FIRST_NBD_PORT = 10809


@dataclass(frozen=True, slots=True)
class NbdDisk:
    """A disk that every host of the lab can open at the same time, without any lock."""

    name: str
    """Also the NBD export's name."""
    address: str
    port: int
    path: Path
    """The raw file behind it, on the machine."""

    @property
    def uri(self) -> str:
        return f"nbd://{self.address}:{self.port}/{self.name}"


def mount_shared(lab: LabSpec) -> None:
    """Must happen before the first host starts, since hosts bind what they find. Idempotent."""
    backing = lab.state_directory / "shared.backing"
    backing.mkdir(exist_ok=True)
    lab.shared_mount.mkdir(exist_ok=True)
    if _is_served(lab.shared_mount):
        return
    unmount_shared(lab)
    lab.shared_mount.mkdir(exist_ok=True)
    start_in_ctl(
        lab,
        ["bindfs", "-f", "-o", "subtype=glusterfs,allow_other", str(backing), str(lab.shared_mount)],
        log_name="bindfs",
        in_namespace=False,
    )
    if not wait_until(lambda: os.path.ismount(lab.shared_mount), timeout_s=10):
        raise LabError(f"bindfs did not mount {lab.shared_mount}; see {lab.log_directory / 'bindfs.log'}")


def _is_served(mount: Path) -> bool:
    """A mount whose file server died answers every call with ENOTCONN."""
    try:
        return os.path.ismount(mount) and mount.stat() is not None
    except OSError:
        return False


def hang(lab: LabSpec, *, is_hung: bool) -> None:
    """Stops the file server where it stands, or lets it go on. Callers wait in the kernel and can only be killed."""
    process_id = running_process_id(lab, "bindfs")
    if process_id is None:
        raise LabError("the shared storage's server does not run")
    os.kill(process_id, signal.SIGSTOP if is_hung else signal.SIGCONT)


def unmount_shared(lab: LabSpec) -> None:
    """Lazily, since a dead file server leaves a mount that cannot be unmounted otherwise. Idempotent."""
    while lab.shared_mount in mount_points():
        run(["umount", "--lazy", str(lab.shared_mount)])


def nbd_disk(lab: LabSpec, name: str, *, size_mib: int) -> NbdDisk:
    """Serves a raw disk of that size on the control plane's address; idempotent, contents are kept while the lab lives."""
    directory = lab.state_directory / "nbd"
    directory.mkdir(exist_ok=True)
    records = directory / "disks.json"
    ports: dict[str, int] = json.loads(records.read_text()) if records.exists() else {}
    port = ports.setdefault(name, max([FIRST_NBD_PORT - 1, *ports.values()]) + 1)
    disk = NbdDisk(name=name, address=lab.ctl_address, port=port, path=directory / f"{name}.raw")
    if not disk.path.exists():
        with disk.path.open("wb") as file:
            file.truncate(size_mib * 1024 * 1024)
    write_atomically(records, json.dumps(ports) + "\n")
    if not _answers(disk):
        start_in_ctl(
            lab,
            [
                *("qemu-nbd", "--persistent", "--shared=10", "--format=raw", "--cache=none", "--aio=threads"),
                *(f"--bind={disk.address}", f"--port={disk.port}", f"--export-name={name}", str(disk.path)),
            ],
            log_name=f"nbd-{name}",
        )
        if not wait_until(lambda: _answers(disk), timeout_s=10, interval_s=0.1):
            raise LabError(f"qemu-nbd does not serve {disk.uri}; see {lab.log_directory}")
    return disk


def serve_lock_free_disks(lab: LabSpec) -> None:
    """Serves every guest its lock-free disk (quorum.py), into every host; must run before guests start. Idempotent."""
    if running_process_id(lab, "quorum") is not None:
        return
    lab.log_directory.mkdir(exist_ok=True)
    sockets = []
    for host in lab.hosts():
        host.init_directory.mkdir(parents=True, exist_ok=True)
        sockets.append(f"{host.name}={host.init_directory / 'quorum.sock'}")
    command = [sys.executable, "-m", "trimtab_lab.quorum", str(lab.quorum_log), *sockets]
    start_in_ctl(lab, command, log_name="quorum", in_namespace=False)
    last = lab.hosts()[-1].init_directory / "quorum.sock"
    if not wait_until(last.exists, timeout_s=10):
        raise LabError(f"the server of lock-free disks did not start; see {lab.log_directory / 'quorum.log'}")


def _answers(disk: NbdDisk) -> bool:
    return run(["nbdinfo", "--size", disk.uri], check=False, timeout_s=5).returncode == 0
