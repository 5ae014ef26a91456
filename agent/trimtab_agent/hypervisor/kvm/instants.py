"""Guests that run on a backup: an empty layer over the export of a disk, filled by QEMU while the guest runs.

    lay_over ── define (the layer's header says that it lies over an export) ── start ── fill ──► stands alone, export ended

Whether a volume still needs its export stands in its own header: every definition looks there, so that no restart of a guest, an agent
or a host can start it as if it were whole.

A guest that reads while its export is away is paused on the error (`rerror_policy`), in its firmware and boot loader too, none of which
sees it. Whoever fills its disks has an export started first, and then lets it go on: QEMU, which tries to connect by itself at growing
intervals, answers with errors until it has, so once is not enough. Not left to QEMU (`<reconnect delay>`): libvirt 9.0
drops that silently, and a QEMU that waits cannot end the guest's reads, so that a pause hangs as long.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import libvirt

from trimtab_agent.backup.export import exports as export_processes
from trimtab_agent.backup.export.exports import Exported, Exports
from trimtab_agent.backup.export.process import export_name
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.backup.restoring import holes, served_volume
from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.kvm import memory_bitmaps, monitor, qemu_img, volumes
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import Domains, require
from trimtab_agent.hypervisor.kvm.filling import export_of
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.pool_layout import VOLUMES, PoolLayout, volume_name
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict, Internal, TrimtabError, Unavailable
from trimtab_protos.messages import DomainSpec, JobProgress, PoolSpec, VolumeSpec

_POLL_S = 0.25
REVIVE_EVERY_S = 1.0
REVIVE_FOR_S = 40.0
"""QEMU tries to connect after 1, 2, 4, 8, then each 16 s; a guest that pauses again for longer has another trouble than its export."""


class Instants:
    """The `InstantSource` of this host. Thread-safe."""

    def __init__(self, connection: Connection, domains: Domains, pauses: GuestPauses, *, socket_dir: Path) -> None:
        self._connection = connection
        self._domains = domains
        self._pauses = pauses
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
        self._write_holes(volume, layout, disk)
        backing = f"nbd+unix:///{export_name(exported.backup_id, exported.disk)}?socket={self._socket_of(volume.volume_id)}"
        with layout.open(VOLUMES) as directory:
            name = volume_name(volume.volume_id, volume.format)
            arguments = ["rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", name]
            qemu_img.run(arguments, directory=directory, limits=qemu_img.Limits())

    def _write_holes(self, volume: VolumeSpec, layout: PoolLayout, disk: DiskReader) -> None:
        """Have the layer say itself what is zeros, since its export does not (`backup/export/process.py`): nobody reads those from there,
        and filling does not count them against its bandwidth. Costs 8 bytes for each 64 KiB of zeros."""
        file = Path(layout.volume(volume.volume_id, volume.format))
        socket = self._socket_dir / f"trimtab-{check_id(volume.volume_id, 'volume_id')}-holes.sock"
        with served_volume(file, format=volume.format.value, socket=socket) as client:
            for offset, length in holes(disk, volume.size_bytes):
                client.begin_zero(offset, length)
            client.flush()

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
                copied = self._copy(domain, spec.vm_id, volume.volume_id, bandwidth_bytes_s, control)
                if export_of(volume.volume_id, layout) is not None:
                    raise _waits(volume.volume_id)
            if domain.isActive():
                _tell_libvirt(domain, _target(domain, volume.volume_id), control)
            with self._domains.locks.hold(spec.vm_id):
                self._domains.define_locked(spec, stamp)
        self.forget(volume.volume_id)
        return copied

    def forget(self, volume_id: str) -> None:
        """End the volume's export, if it has one."""
        path = self._socket_of(volume_id)
        if path.exists():
            export_processes.end(path)

    def _copy(self, domain: Any, vm_id: str, volume_id: str, bandwidth_bytes_s: int, control: JobControl) -> int:
        """Have QEMU copy what is missing, begun here or by an earlier agent; return how far it came where the guest ended first."""
        target, job_id = _target(domain, volume_id), f"fill-{volume_id}"
        wait, done, trouble_s = threading.Event(), 0, 0.0
        if not _job_of(domain, job_id):
            # Not by libvirt, whose jobs end at an error: QEMU (7.2) dies where its nodes are asked for between such an end and its
            # acknowledgement, by a filter that has lost what it filters. This one stands still instead.
            node = _node_of(domain, volume_id)
            monitor.ask(
                domain, "block-stream", **{"job-id": job_id, "device": node, "speed": bandwidth_bytes_s, "on-error": "stop"}
            )
        while job := _job_of(domain, job_id):
            done = int(job["offset"])
            control.report(JobProgress(done_bytes=done, total_bytes=max(done, int(job["len"])), phase="filling"))
            if control.cancelled.is_set():
                with contextlib.suppress(TrimtabError):
                    monitor.ask(domain, "block-job-cancel", device=job_id)
                raise Conflict("job-cancelled", "filling the volume was cancelled; it still reads from its backup")
            is_in_trouble = is_paused_by_its_export(domain, target) and self._pauses.resume_unless_kept(domain, vm_id)
            # Its status is "ok" again once the guest goes on; and it is paused for moments by QEMU itself, which nobody may end.
            if job["io-status"] != "ok" or job["paused"]:
                with contextlib.suppress(Internal):
                    monitor.ask(domain, "block-job-resume", device=job_id)
                    is_in_trouble = True
            trouble_s = trouble_s or time.monotonic() if is_in_trouble else 0.0
            if trouble_s and time.monotonic() - trouble_s > REVIVE_FOR_S:
                raise _waits(volume_id)
            wait.wait(REVIVE_EVERY_S if is_in_trouble else _POLL_S)
        return done

    def _socket_of(self, volume_id: str) -> Path:
        return self._socket_dir / f"trimtab-{check_id(volume_id, 'volume_id')}.nbd"


def is_paused_by_its_export(domain: Any, target: str) -> bool:
    """Tell whether the guest stands still since this disk could not be read or written; not where its pool is full."""
    state, reason = domain.state()
    if (state, reason) != (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR):
        return False
    return bool(domain.diskErrors().get(target) == libvirt.VIR_DOMAIN_DISK_ERROR_UNSPEC)


def _node_of(domain: Any, volume_id: str) -> str:
    """Return QEMU's name of what the guest's device of the volume writes to."""
    found = memory_bitmaps.followed(domain).get(f"ua-{volume_id}")
    if found is None:
        raise Conflict("volume-not-attached", f"the guest does not have volume {volume_id}")
    return found.node


def _job_of(domain: Any, job_id: str) -> Mapping[str, Any]:
    """Return how far QEMU's job is; empty where there is none, or no guest any more."""
    try:
        jobs = monitor.ask(domain, "query-block-jobs")
    except libvirt.libvirtError:
        if domain.isActive():
            raise
        return {}
    return next((one for one in jobs if one["device"] == job_id), {})


def _tell_libvirt(domain: Any, target: str, control: JobControl) -> None:
    """Have libvirt see that the disk stands alone, by a pull that finds nothing to do: it closes what it had open below."""
    while any(one.startswith("nbd") for one in _below(domain, target)):
        if not domain.blockJobInfo(target, 0):
            domain.blockPull(target, 0, 0)
        if control.cancelled.wait(_POLL_S):
            raise Conflict("job-cancelled", "filling the volume was cancelled; it is whole")


def _below(domain: Any, target: str) -> Iterator[str]:
    """Yield the protocols of what libvirt believes to lie below a disk in the network."""
    for disk in parse(domain.XMLDesc(0)).findall("devices/disk"):
        name = disk.find("target")
        if name is not None and name.get("dev") == target:
            yield from (source.get("protocol", "") for source in disk.findall("backingStore//source"))


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
