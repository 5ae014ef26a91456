"""Guests that run on a backup: an empty layer over the export of a disk, filled by QEMU while the guest runs.

    lay_over ── define (the layer's header says that it lies over an export) ── start ── fill ──► stands alone, export ended

Whether a volume still needs its export stands in its own header: every definition looks there, so that no restart of a guest, an agent
or a host can start it as if it were whole. QEMU waits for an export that went away for `RECONNECT_S`: longer than an agent needs to
come back and start another.
"""

import contextlib
import threading
from pathlib import Path
from typing import Any

import libvirt

from trimtab_agent.backup.export import exports as export_processes
from trimtab_agent.backup.export.exports import Exported, Exports
from trimtab_agent.backup.export.process import export_name
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.kvm import qemu_img, volumes
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import Domains, require
from trimtab_agent.hypervisor.kvm.filling import export_of
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.pool_layout import VOLUMES, PoolLayout, volume_name
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict, Unavailable
from trimtab_protos.messages import DomainSpec, JobProgress, PoolSpec, VolumeSpec

_POLL_S = 0.25


class Instants:
    """The `InstantSource` of this host. Thread-safe."""

    def __init__(self, connection: Connection, domains: Domains, *, socket_dir: Path) -> None:
        self._connection = connection
        self._domains = domains
        self._socket_dir = socket_dir

    def serve(self, volume_id: str, exported: Exported, exports: Exports) -> None:
        """See `InstantSource.serve`. The socket is QEMU's alone, as its directory is."""
        owner = self._socket_dir.stat()
        exports.ensure(exported, self._socket_of(volume_id), owner=(owner.st_uid, owner.st_gid))

    def lay_over(self, volume: VolumeSpec, pool: PoolSpec, exported: Exported, disk: DiskReader) -> None:
        """See `InstantSource.lay_over`."""
        layout = PoolLayout.of(pool)
        if disk.manifest.size_bytes != volume.size_bytes:
            raise Conflict(
                "volume-size-differs",
                f"the volume has {volume.size_bytes} bytes and the disk of the backup {disk.manifest.size_bytes}",
                field="size_bytes",
            )
        self._domains.refuse_if_used(volumes.names_of(volume.volume_id, layout), f"volume {volume.volume_id}")
        volumes.delete(volume.volume_id, layout)  # of an attempt that broke off
        volumes.ensure(volume, layout)
        backing = f"nbd+unix:///{export_name(exported.backup_id, exported.disk)}?socket={self._socket_of(volume.volume_id)}"
        with layout.open(VOLUMES) as directory:
            name = volume_name(volume.volume_id, volume.format)
            arguments = ["rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", name]
            qemu_img.run(arguments, directory=directory, limits=qemu_img.Limits())

    def fill(
        self,
        spec: DomainSpec,
        volume: VolumeSpec,
        pool: PoolSpec,
        stamp: Stamp,
        *,
        bandwidth_bytes_s: int,
        control: JobControl,
    ) -> int:
        """See `InstantSource.fill`. The vm's lock is not held while QEMU copies: a forced stop must not wait for it."""
        layout, copied = PoolLayout.of(pool), 0
        with self._connection.use(f"fill volume {volume.volume_id}", changes=True) as connection:
            domain = require(connection, spec.vm_id)
            if export_of(volume.volume_id, layout) is not None:
                if not domain.isActive():
                    raise _waits(volume.volume_id)
                target = _target(domain, volume.volume_id)
                if not domain.blockJobInfo(target, 0):
                    domain.blockPull(target, bandwidth_bytes_s, libvirt.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES)
                copied = self._await(domain, target, control)
                if export_of(volume.volume_id, layout) is not None:
                    raise _waits(volume.volume_id)
            with self._domains.locks.hold(spec.vm_id):
                self._domains.define_locked(spec, stamp)
        self.forget(volume.volume_id)
        return copied

    def forget(self, volume_id: str) -> None:
        """End the volume's export, if it has one."""
        path = self._socket_of(volume_id)
        if path.exists():
            export_processes.end(path)

    def _await(self, domain: Any, target: str, control: JobControl) -> int:
        wait, done = threading.Event(), 0
        while True:
            try:
                job = domain.blockJobInfo(target, 0)
            except libvirt.libvirtError:
                if domain.isActive():
                    raise
                return done  # the guest ended, and the job with it
            if not job:
                return done
            done = int(job.get("cur", 0))
            control.report(JobProgress(done_bytes=done, total_bytes=max(done, int(job.get("end", 0))), phase="filling"))
            if control.cancelled.is_set():
                with contextlib.suppress(libvirt.libvirtError):
                    domain.blockJobAbort(target, 0)
                raise Conflict("job-cancelled", "filling the volume was cancelled; it still reads from its backup")
            wait.wait(_POLL_S)

    def _socket_of(self, volume_id: str) -> Path:
        return self._socket_dir / f"trimtab-{check_id(volume_id, 'volume_id')}.nbd"


def _waits(volume_id: str) -> Unavailable:
    return Unavailable(
        "fill-waits", f"volume {volume_id} still reads from its backup; it is filled on while its guest runs", volume_id=volume_id
    )


def _target(domain: Any, volume_id: str) -> str:
    for disk in parse(domain.XMLDesc(0)).findall("devices/disk"):
        alias, target = disk.find("alias"), disk.find("target")
        if alias is not None and target is not None and alias.get("name") == f"ua-{volume_id}":
            return target.get("dev", "")
    raise Conflict("volume-not-attached", f"the guest does not have volume {volume_id}")
