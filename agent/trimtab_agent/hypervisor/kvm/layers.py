"""Snapshots of domains as layers: libvirt lays new files over a guest's disks, saves its memory, merges layers while it runs.

libvirt is told to remember nothing of it (NO_METADATA): its snapshot metadata forbids a live migration, and it cannot revert to an
external snapshot anyway (9.0: `revert to external snapshot not supported yet`). Which layers there are, and which one a guest is on,
stands in the controller's rows; here only files and what QEMU has open are looked at.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import libvirt
import structlog

from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.kvm import block_pools, domain_facts, layer_files, rbd_layers, volumes
from trimtab_agent.hypervisor.kvm.block_jobs import Disk, disks_of, is_ready, job_of, job_unless_ended, run_on
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domain_xml import state_layout
from trimtab_agent.hypervisor.kvm.domains import Domains, find, require, write_stamp
from trimtab_agent.hypervisor.kvm.freezes import GuestFreezes
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.migration_xml import retarget
from trimtab_agent.hypervisor.kvm.networks import Networks
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.errors import Conflict, Internal, NoCapacity, NotFound, Unavailable
from trimtab_protos.messages import (
    DiskFormat,
    DomainSpec,
    JobProgress,
    LayerMerge,
    LayerResult,
    PoolSpec,
    VolumeObservation,
    VolumeSpec,
)

log = structlog.get_logger(__name__)

_POLL_S = 0.05
_REPORT_EVERY_S = 1.0
_FULL_BELOW_BYTES = 1 << 20
"""A file system with less than this is full, whatever else QEMU may say about a merge that failed."""
_SNAPSHOT_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)


class Layers:
    """Switches, saves, restores and merges. Thread-safe."""

    def __init__(
        self,
        connection: Connection,
        domains: Domains,
        networks: Networks,
        keys: VolumeKeys,
        freezes: GuestFreezes,
        *,
        boot_id: str,
    ) -> None:
        self._connection = connection
        self._freezes = freezes
        self._keys = keys
        self._domains = domains
        self._networks = networks
        self._boot_id = boot_id

    def switch(self, spec: DomainSpec, stamp: Stamp, *, wants_freeze: bool) -> LayerResult:
        """See `Hypervisor.switch_layers`."""
        result = LayerResult(consistency="crash")
        with self._domains.locks.hold(check_id(spec.vm_id, "vm_id")):
            with self._connection.use(f"switch layers of {spec.vm_id}", changes=True) as connection:
                domain = find(connection, spec.vm_id)
                images = self._to_keep(spec)
                if domain is not None and domain.isActive():
                    result = self._switch_live(domain, spec, images, wants_freeze=wants_freeze)
                else:
                    _keep(images)
            self._domains.define_locked(spec, stamp)
        return result

    def _to_keep(self, spec: DomainSpec) -> dict[tuple[str, str], rbd_layers.Image]:
        """Return (layer to keep, new layer) → image of each disk that is an image of Ceph's and not on its new layer yet.

        Only while the rows say that the new one is merged back should this be undone: otherwise the disk is where it shall be.
        """
        pools = {pool.pool_id: pool for pool in spec.pools if rbd_layers.has_layers(pool)}
        found = {}
        for disk in spec.disks:
            if disk.pool_id in pools and disk.layer_id and disk.is_merging:
                image = self._image(disk.volume_id, pools[disk.pool_id])
                if image.head() != disk.layer_id:
                    found[disk.merge_layer_id, disk.layer_id] = image
        return found

    def refuse_half(self, spec: DomainSpec) -> None:
        """Raise Conflict where a disk was cut off while it went back to a snapshot."""
        pools = {pool.pool_id: pool for pool in spec.pools if rbd_layers.has_layers(pool)}
        for disk in spec.disks:
            # One that was never kept has no layer, and nothing to go back to.
            if disk.pool_id in pools and disk.layer_id:
                self._image(disk.volume_id, pools[disk.pool_id]).refuse_half()

    def _image(self, volume_id: str, pool: PoolSpec) -> rbd_layers.Image:
        return rbd_layers.Image(volume_id, pool, self._keys.of_pool(pool))

    def _switch_live(
        self, domain: Any, spec: DomainSpec, images: Mapping[tuple[str, str], rbd_layers.Image], *, wants_freeze: bool
    ) -> LayerResult:
        new = _to_switch(domain, spec)
        notes: dict[str, str] = {}
        # Where an agent of ours was killed in between, or the guest's own did not answer, it may be frozen still.
        self._freezes.settle(domain, spec.vm_id)
        if not new and not images:
            return LayerResult(consistency="crash", note="the instant was fixed before its consistency could be recorded")
        freeze = self._freezes.frozen(domain, spec.vm_id, notes) if wants_freeze else contextlib.nullcontext(enter_result=False)
        with freeze as is_frozen:
            if images and not is_frozen and len(images) + len(new) > 1:
                raise Conflict(
                    "guest-agent-needed",
                    f"some disks of {spec.vm_id} are images of Ceph, and no guest agent holds all of them still at one instant; "
                    "start one in the guest, or stop the vm first",
                )
            _keep(images)
            if new:
                flags = _SNAPSHOT_FLAGS | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
                domain.snapshotCreateXML(_snapshot_xml(domain, new), flags)
        if is_frozen:
            return LayerResult(consistency="filesystem", paused_ms=int(notes["frozen_ms"]))
        return LayerResult(consistency="crash", note=notes.get("downgrade", ""))

    # --- memory ----------------------------------------------------------------------------------------------------------

    def save_memory(self, spec: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        """See `Hypervisor.snapshot_memory`. The vm's lock is not held while memory is written: a forced stop must not wait for it."""
        path = state_layout(spec).memory(check_id(spec.vm_id, "vm_id"), snapshot_id)
        with self._connection.use(f"save the memory of {spec.vm_id}", changes=True) as connection:
            domain = require(connection, spec.vm_id)
            if not domain.isActive():
                raise Conflict("wrong-domain-state", f"{spec.vm_id} does not run and has no memory to save")
            new = _to_switch(domain, spec)
            if new:
                xml = _snapshot_xml(domain, new, memory=path)
                flags = _SNAPSHOT_FLAGS | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
                with self._followed(spec.vm_id, control, phase="saving memory"):
                    _save(domain, xml, flags, path, is_cancelled=control.cancelled.is_set)
            elif not os.path.exists(path):
                raise Conflict("memory-missing", f"the layers of {spec.vm_id} were switched without saving its memory")
        self._domains.define(spec, stamp)
        return LayerResult(consistency="memory", size_bytes=os.stat(path).st_blocks * 512)

    def restore_memory(self, spec: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        """See `Hypervisor.restore_memory`."""
        path = state_layout(spec).memory(spec.vm_id, snapshot_id)
        with (
            self._domains.locks.hold(check_id(spec.vm_id, "vm_id")),
            self._connection.use(f"restore the memory of {spec.vm_id}", changes=True) as connection,
        ):
            domain = require(connection, spec.vm_id)
            if domain.isActive():
                return LayerResult(consistency="memory")
            if not os.path.exists(path):
                raise NotFound("memory-not-found", f"the memory of snapshot {snapshot_id} is not on this host")
            facts = domain_facts.read(domain.XMLDesc(0))
            for network in facts.networks:
                self._networks.start(connection, network)
            # Before the guest runs: after a crash it tells that this host may hold its state.
            write_stamp(domain, facts, stamp, boot_id=self._boot_id)
            saved = connection.saveImageGetXMLDesc(path, libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
            control.report(JobProgress(phase="restoring memory", total_bytes=os.stat(path).st_size))
            connection.restoreFlags(
                path, retarget(saved, spec, stamp, cpu_shares=self._domains.cpu_shares), libvirt.VIR_DOMAIN_SAVE_RUNNING
            )
            domain = require(connection, spec.vm_id)
            write_stamp(domain, domain_facts.read(domain.XMLDesc(0)), stamp, boot_id=self._boot_id)
        return LayerResult(consistency="memory")

    @contextlib.contextmanager
    def _followed(self, vm_id: str, control: JobControl, *, phase: str) -> Iterator[None]:
        """Report libvirt's job of the domain, and abort it where a cancel is asked for, while the block runs."""
        ended = threading.Event()

        def follow() -> None:
            with self._connection.use(f"follow the job of {vm_id}") as connection:
                domain = require(connection, vm_id)
                while not ended.wait(_REPORT_EVERY_S):
                    with contextlib.suppress(libvirt.libvirtError):
                        if control.cancelled.is_set():
                            domain.abortJob()
                        seen = domain.jobStats(0)
                        done, total = int(seen.get("data_processed", 0)), int(seen.get("data_total", 0))
                        control.report(JobProgress(done_bytes=done, total_bytes=max(done, total), phase=phase))

        thread = threading.Thread(target=follow, name=f"follow-{vm_id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()

    # --- merging ---------------------------------------------------------------------------------------------------------

    def merge(self, merge: LayerMerge, pool: PoolSpec, spec: DomainSpec | None, stamp: Stamp, control: JobControl) -> LayerResult:
        """See `Hypervisor.merge_layer`. The vm's lock is not held while QEMU copies: a forced stop must not wait for it."""
        lock = merge.vm_id or merge.volume_id
        if rbd_layers.has_layers(pool):
            with self._domains.locks.hold(lock):
                self._image(merge.volume_id, pool).merge(merge.top_layer_id, merge.base_layer_id)
                if spec is not None:
                    self._define_again(spec, stamp, merge.vm_id)
            return LayerResult()
        layout = PoolLayout.of(pool)
        with self._connection.use(f"merge layers of {merge.volume_id}", changes=True) as connection:
            domain = find(connection, merge.vm_id) if merge.vm_id else None
            with self._domains.locks.hold(lock):
                disk = _begin_merge(domain, merge, layout)
            if disk is not None:
                _await_job(domain, disk.target, control, until_ready=disk.chain[0] == _top(merge, layout))
            with self._domains.locks.hold(lock):
                paused_ms = _end_merge(domain, merge, layout, control)
                layer_files.lay_children_over(merge, merge.children, layout)
                layer_files.unlink_merged(merge, layout)
                if domain is not None and merge.keeps_running and domain.isActive():
                    run_on(domain)
                if spec is not None and domain is not None:
                    self._domains.define_locked(spec, stamp)
        return LayerResult(paused_ms=paused_ms)

    def _define_again(self, spec: DomainSpec, stamp: Stamp, vm_id: str) -> None:
        """Write the definition where there is a domain. The caller holds the vm's lock."""
        with self._connection.use(f"define {vm_id} on other layers", changes=True) as connection:
            if find(connection, vm_id) is not None:
                self._domains.define_locked(spec, stamp)

    def delete(self, volume_id: str, layer_id: str, pool: PoolSpec) -> None:
        """See `Hypervisor.delete_layer`; of an image of Ceph's."""
        self._image(volume_id, pool).delete(layer_id)

    def lay(self, volume: VolumeSpec, pool: PoolSpec) -> VolumeObservation:
        """See `Hypervisor.copy_volume`; a layer of an image of Ceph's: over what is written to, or a copy of what was kept."""
        image = self._image(volume.volume_id, pool)
        if volume.copy_volume_id:
            image.go_back(volume.copy_layer_id, volume.layer_id)
        else:
            image.keep(volume.base_layer_id, volume.layer_id)
        whole = replace(volume, layer_id="", base_volume_id="", base_layer_id="", copy_volume_id="", copy_layer_id="")
        return block_pools.observe_volume(whole, pool, self._keys.of_pool(pool))

    def copy(self, volume: VolumeSpec, pool: PoolSpec, control: JobControl) -> LayerResult:
        """See `Hypervisor.copy_volume`."""
        if rbd_layers.has_layers(pool):
            control.report(JobProgress(total_bytes=volume.size_bytes, phase="rolling back"))
            return LayerResult(size_bytes=self.lay(volume, pool).size_bytes)

        def report(written: int) -> None:
            control.report(JobProgress(done_bytes=written, total_bytes=max(volume.size_bytes, written), phase="copying"))

        watch = volumes.CopyWatch(cancelled=control.cancelled, on_bytes=report)
        key = self._keys.of_volume(volume)
        seen = volumes.ensure(volume, PoolLayout.of(pool), watch=watch, key=key)
        return LayerResult(size_bytes=seen.size_bytes)


def _keep(images: Mapping[tuple[str, str], rbd_layers.Image]) -> None:
    for (over, layer_id), image in images.items():
        image.keep(over, layer_id)


# --- what QEMU has open ------------------------------------------------------------------------------------------------------


def _to_switch(domain: Any, spec: DomainSpec) -> dict[str, str]:
    """Return target → the new layer's path of each disk that is not on it yet. Conflict where it would not lie over the present one."""
    layouts = PoolLayout.of_files(spec.pools)
    disks = disks_of(domain)
    wanted = {}
    for disk in layer_files.resolve(spec).disks:
        live = disks.get(f"ua-{disk.volume_id}")
        if (layout := layouts.get(disk.pool_id)) is None:
            continue
        path = layout.volume(disk.volume_id, disk.format, disk.layer_id)
        if live is None or live.chain[:1] == (path,):
            continue
        if not disk.layer_id or layer_files.below(layout, disk.volume_id, disk.layer_id) != live.chain[0]:
            raise Conflict("layer-unexpected", f"the guest is on another layer of volume {disk.volume_id} than was thought")
        wanted[live.target] = path
    return wanted


def _snapshot_xml(domain: Any, new: Mapping[str, str], *, memory: str = "") -> str:
    root = Element("domainsnapshot")
    if memory:
        SubElement(root, "memory", snapshot="external", file=memory)
    table = SubElement(root, "disks")
    for disk in disks_of(domain).values():
        if disk.target not in new:
            SubElement(table, "disk", name=disk.target, snapshot="no")
            continue
        element = SubElement(table, "disk", name=disk.target, snapshot="external", type="file")
        SubElement(element, "driver", type="qcow2")
        SubElement(element, "source", file=new[disk.target])
    return ElementTree.tostring(root, encoding="unicode")


def _save(domain: Any, xml: str, flags: int, path: str, *, is_cancelled: Callable[[], bool]) -> None:
    try:
        domain.snapshotCreateXML(xml, flags)
    except libvirt.libvirtError as error:
        # Half a memory is worth nothing, and would fill the pool.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if is_cancelled():
            raise Conflict("job-cancelled", "saving the memory was cancelled") from error
        raise


# --- merging under a running guest -------------------------------------------------------------------------------------------


def _top(merge: LayerMerge, layout: PoolLayout) -> str:
    return layout.volume(merge.volume_id, DiskFormat.QCOW2, merge.top_layer_id)


def _base(merge: LayerMerge, layout: PoolLayout) -> str:
    return layout.volume(merge.volume_id, DiskFormat.QCOW2, merge.base_layer_id)


def _live_disk(domain: Any, merge: LayerMerge, layout: PoolLayout) -> Disk | None:
    """Return the disk where a guest that runs has the lower layer open; None where the files are nobody's."""
    if domain is None or not domain.isActive():
        return None
    disk = disks_of(domain).get(f"ua-{merge.volume_id}")
    return disk if disk is not None and _base(merge, layout) in disk.chain else None


def _begin_merge(domain: Any, merge: LayerMerge, layout: PoolLayout) -> Disk | None:
    """Let QEMU begin, or find it at it; None where there is nothing for it to do."""
    disk, top = _live_disk(domain, merge, layout), _top(merge, layout)
    if disk is None or top not in disk.chain:
        return None
    if not job_of(domain, disk.target):
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if disk.chain[0] == top else 0
        # The base by name: left out, it would be the last of the chain, which others may be clones of.
        domain.blockCommit(disk.target, _base(merge, layout), top, 0, flags)
    return disk


def _end_merge(domain: Any, merge: LayerMerge, layout: PoolLayout, control: JobControl) -> int:
    """Make sure that the lower layer has it all; return for how many milliseconds the guest was held still.

    The guest may have ended meanwhile: then it is done on the files.
    """
    disk, top = _live_disk(domain, merge, layout), _top(merge, layout)
    if disk is None:
        _commit(merge, layout, control)
        return 0
    if top in disk.chain and disk.chain[0] == top and job_of(domain, disk.target):
        return _pivot(domain, disk, merge, layout, top)
    _require_merged(domain, merge, layout, top)
    return 0


def _commit(merge: LayerMerge, layout: PoolLayout, control: JobControl) -> None:
    control.report(JobProgress(phase="merging"))
    try:
        layer_files.commit(merge, layout, volumes.CopyWatch(cancelled=control.cancelled))
    except NoCapacity as error:
        raise Unavailable("pool-full", f"the merge of volume {merge.volume_id} waits for space in its pool") from error


def _pivot(domain: Any, disk: Disk, merge: LayerMerge, layout: PoolLayout, top: str) -> int:
    """Let the guest write to the lower layer alone, and remove the upper one before it writes anything more."""
    began = time.monotonic()
    is_running = domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    if is_running:
        domain.suspend()
    try:
        domain.blockJobAbort(disk.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        _require_merged(domain, merge, layout, top)
        layer_files.unlink_merged(merge, layout)
    finally:
        if is_running:
            run_on(domain)
    return int((time.monotonic() - began) * 1000)


def _await_job(domain: Any, target: str, control: JobControl, *, until_ready: bool) -> None:
    wait = threading.Event()
    while job := job_unless_ended(domain, target):
        done, total = int(job.get("cur", 0)), int(job.get("end", 0))
        control.report(JobProgress(done_bytes=done, total_bytes=total, phase="merging"))
        if until_ready and is_ready(domain, target):
            return
        if control.cancelled.is_set():
            domain.blockJobAbort(target, 0)
            raise Conflict("job-cancelled", "the merge was cancelled; the layers are as they were")
        wait.wait(_POLL_S)


def _require_merged(domain: Any, merge: LayerMerge, layout: PoolLayout, top: str) -> None:
    """Raise what ended the job where the guest is still on the upper layer."""
    disk = disks_of(domain).get(f"ua-{merge.volume_id}")
    if disk is None or top not in disk.chain:
        return
    space = os.statvfs(layout.path)
    if space.f_bavail * space.f_frsize < _FULL_BELOW_BYTES:
        # Retryable: what was begun must be finished once there is room.
        raise Unavailable("pool-full", f"the merge of volume {merge.volume_id} waits for space in pool {layout.pool_id}")
    raise Internal("merge-failed", f"QEMU ended the merge of volume {merge.volume_id} before it was whole; see the domain's log")
