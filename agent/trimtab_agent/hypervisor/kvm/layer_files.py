"""The files of layers: which one a guest writes to, what lies over what, and how they come and go.

The rule that survives any crash: a guest's disk is the layer that its spec names. While that layer is being merged into the one below
(`is_merging`), it is the layer's file if that is there, else the lower one's. The merge removes the upper file in the very instant in
which the lower one became complete, with the guest held still, so that neither ever lacks what the guest has written.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace

from trimtab_agent.hypervisor.kvm import move_files, os_errors, qemu_img, volumes
from trimtab_agent.hypervisor.kvm.pool_layout import (
    VOLUMES,
    PoolLayout,
    memory_name,
    regular_file,
    sync_directory,
    volume_name,
)
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import DiskFormat, DiskSpec, DomainSpec, LayerMerge, LayerRef, PoolSpec

_FLOOR_BYTES_S = 4 << 20
"""Storage slower than this is broken; bounds how long a merge may take."""


def resolve(domain: DomainSpec) -> DomainSpec:
    """Return the spec with the pools and layers that its disks are on now: what a move or merge that ended has made of them."""
    if not any(disk.is_merging or disk.move_pool_id for disk in domain.disks):
        return domain
    layouts = PoolLayout.of_files(domain.pools)
    disks = (move_files.resolve(disk, layouts) if disk.move_pool_id else disk for disk in domain.disks)
    return replace(
        domain, disks=tuple(_resolve(disk, layouts[disk.pool_id]) if disk.pool_id in layouts else disk for disk in disks)
    )


def _resolve(disk: DiskSpec, layout: PoolLayout) -> DiskSpec:
    if not disk.is_merging:
        return disk
    if exists(layout, disk.volume_id, disk.layer_id):
        return replace(disk, is_merging=False, merge_layer_id="")
    return replace(disk, layer_id=disk.merge_layer_id, is_merging=False, merge_layer_id="")


def exists(layout: PoolLayout, volume_id: str, layer_id: str) -> bool:
    with layout.open(VOLUMES) as directory:
        return regular_file(directory, volume_name(volume_id, DiskFormat.QCOW2, layer_id)) is not None


def below(layout: PoolLayout, volume_id: str, layer_id: str) -> str:
    """Return the path that the layer lies over. NotFound where it is not there."""
    name = volume_name(volume_id, DiskFormat.QCOW2, layer_id)
    with layout.open(VOLUMES) as directory:
        if regular_file(directory, name) is None:
            raise NotFound("layer-not-found", f"layer {layer_id} of volume {volume_id} is not in pool {layout.pool_id}")
        return volumes.backing_file(directory, name)


def delete(volume_id: str, layer_id: str, layout: PoolLayout) -> None:
    """Remove a layer's file. Conflict: another layer lies over it."""
    if not layer_id:
        raise InvalidRequest("layer-missing", "the bottom layer of a volume goes with the volume", field="layer_id")
    name = volume_name(volume_id, DiskFormat.QCOW2, layer_id)
    try:
        with layout.open(VOLUMES) as directory:
            if name in volumes.frozen_names(directory):
                raise Conflict("layer-in-use", f"another layer lies over layer {layer_id} of volume {volume_id}")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            sync_directory(directory)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"remove layer {layer_id} of volume {volume_id}") from error


def delete_memory(vm_id: str, snapshot_id: str, pool: PoolSpec) -> None:
    try:
        with PoolLayout.of(pool).open_vm(vm_id, create=False) as directory:
            if directory is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(memory_name(snapshot_id), dir_fd=directory)
                sync_directory(directory)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"remove the memory of snapshot {snapshot_id}") from error


def unlink_merged(merge: LayerMerge, layout: PoolLayout) -> None:
    """Remove the upper layer's file: from this instant on the lower one is the disk."""
    with layout.open(VOLUMES) as directory:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(volume_name(merge.volume_id, DiskFormat.QCOW2, merge.top_layer_id), dir_fd=directory)
        sync_directory(directory)


def commit(merge: LayerMerge, layout: PoolLayout, watch: volumes.CopyWatch) -> None:
    """Write what the upper layer holds into the lower one; no guest of any host may have either open for writing."""
    top = volume_name(merge.volume_id, DiskFormat.QCOW2, merge.top_layer_id)
    base = layout.volume(merge.volume_id, DiskFormat.QCOW2, merge.base_layer_id)
    with layout.open(VOLUMES) as directory:
        if regular_file(directory, top) is None:
            return
        size_bytes = os.stat(top, dir_fd=directory, follow_symlinks=False).st_blocks * 512
        limits = qemu_img.Limits(timeout_s=60 + size_bytes / _FLOOR_BYTES_S, cpu_s=60 + size_bytes // (16 << 20))
        arguments = ["commit", "-q", "-d", "-f", "qcow2", "-b", base, top]
        qemu_img.run(arguments, directory=directory, limits=limits, cancelled=watch.cancelled)


def lay_children_over(merge: LayerMerge, children: Sequence[LayerRef], layout: PoolLayout) -> None:
    """Have the layers that lie over the upper one lie over the lower one: their content is the same."""
    base = layout.volume(merge.volume_id, DiskFormat.QCOW2, merge.base_layer_id)
    with layout.open(VOLUMES) as directory:
        for child in children:
            name = volume_name(child.volume_id, DiskFormat.QCOW2, child.layer_id)
            if regular_file(directory, name) is None or volumes.backing_file(directory, name) == base:
                continue
            arguments = ["rebase", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", name]
            qemu_img.run(arguments, directory=directory, limits=qemu_img.Limits())
