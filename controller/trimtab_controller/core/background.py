"""What may run on a vm beside its backup. The published table (docs/backups.md); a kind that it does not name is refused. Pure.

A backup reads an instant that QEMU keeps, so whatever leaves the guest's process and its disks where they are may go on beside it.
"""

from collections.abc import Mapping
from enum import StrEnum

BACKUP = "backup.run"
FILL = "vm.fill"


class Beside(StrEnum):
    RUNS = "runs"
    """Both go on."""
    REFUSED = "refused"
    """Whichever comes second is refused and told to wait."""
    ENDS = "ends"
    """The backup is cancelled for it; a backup that comes second is refused."""


BESIDE_BACKUP: Mapping[str, Beside] = {
    "vm.pause": Beside.RUNS,
    "vm.resume": Beside.RUNS,
    "vm.reboot": Beside.RUNS,  # the same process of QEMU
    "vm.resize": Beside.RUNS,
    "vm.change_cdrom": Beside.RUNS,
    "vm.set_resources": Beside.RUNS,
    "vm.set_ha": Beside.RUNS,
    "volume.limit": Beside.RUNS,
    "vm.start": Beside.REFUSED,  # the images of a stopped vm are open for reading
    "vm.undelete": Beside.REFUSED,
    "vm.migrate": Beside.REFUSED,  # libvirt has one job per domain
    "vm.attach": Beside.REFUSED,
    "vm.detach": Beside.REFUSED,
    "volume.resize": Beside.REFUSED,  # QEMU has the disk in use
    "volume.move": Beside.REFUSED,
    "volume.settle_move": Beside.REFUSED,
    "vm.replace": Beside.REFUSED,
    "vm.stop": Beside.ENDS,  # nobody waits for a backup to stop a guest
    "vm.delete": Beside.ENDS,
    "vm.purge": Beside.ENDS,
    "vm.recover": Beside.ENDS,  # its host is gone, and the backup with it
}


# Beside the filling of its disks from a backup. What it does not name is refused until the disks stand alone.
BESIDE_FILL = frozenset(
    {
        "vm.restore",  # it begins it
        "vm.pause",
        "vm.resume",
        "vm.reboot",
        "vm.resize",
        "vm.change_cdrom",
        "vm.set_resources",
        "vm.set_ha",  # it ends the filling where the vm had its ha; else the service refuses
        "volume.limit",
        # Filling waits while the guest is off, and goes on where it is started.
        "vm.start",
        "vm.stop",
        # Filling sees that there is nothing left to fill.
        "vm.delete",
        "vm.undelete",
        "vm.purge",
    }
)


def beside_backup(kind: str) -> Beside:
    """Return what an operation of this kind and a backup of the same vm do to each other."""
    return BESIDE_BACKUP.get(kind, Beside.REFUSED)


BESIDE_HALF_WRITTEN = frozenset({"vm.replace", "vm.stop", "vm.delete", "vm.undelete", "vm.purge", "vm.detach", "vm.release"})
"""What may be done with a vm one of whose disks holds half of a backup: make it whole, or be rid of it."""
