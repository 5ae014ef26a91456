"""Volumes of a simulated host that go from one pool to another: the same promises as QEMU's block copy and `qemu-img convert`.

A planned fault `move.copying` (`HANG`) holds a move while both sides are there and the copy is not whole.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.simulated_domains import ACTIVE, SimulatedDomain
from trimtab_agent.hypervisor.simulated_layer_files import content, resolve
from trimtab_agent.hypervisor.simulation import FaultKind, PoolStore, StoredLayer, StoredVolume
from trimtab_protos.errors import Conflict, NoCapacity, NotFound, Unavailable
from trimtab_protos.messages import DomainSpec, JobProgress, LayerResult
from trimtab_protos.volume_messages import VolumeMove

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

COPY_BYTES = 196_624
_POLL_S = 0.01


def move(
    host: "SimulatedHypervisor", asked: VolumeMove, spec: DomainSpec | None, stamp: Stamp, control: JobControl
) -> LayerResult:
    source, target = host.open_store(asked.source_pool), host.open_store(asked.target_pool)
    control.report(JobProgress(phase="copying", total_bytes=asked.size_bytes))
    _hold(host, control)
    with host.fleet.changed:
        domain = _running(host, asked)
        volume = source.volumes.get(asked.volume_id)
        if volume is None:
            _require_whole(target, asked)
            return LayerResult(size_bytes=asked.size_bytes)
        writer = (host.host_id, asked.vm_id)
        if volume.writer is not None and (domain is None or volume.writer != writer):
            raise Conflict("image-locked", f"volume {asked.volume_id} is in use by another QEMU")
        if target.capacity_bytes - target.used_bytes < COPY_BYTES:
            raise NoCapacity("pool-full", f"pool {asked.target_pool.pool_id} has no room left")
        copied = _copy_of(source, volume, asked)
        target.put_volume(copied)
        if domain is not None and spec is not None:
            copied.writer = writer
            source.drop_volume(asked.volume_id)
            domain.open_layers[asked.volume_id] = ""
            domain.spec, domain.stamp = resolve(host, spec), stamp
            _take_state_files(asked, source, target)
        host.fleet.changed.notify_all()
        return LayerResult(size_bytes=asked.size_bytes)


def settle(host: "SimulatedHypervisor", asked: VolumeMove, spec: DomainSpec | None, stamp: Stamp, *, is_recorded: bool) -> bool:
    source, target = host.open_store(asked.source_pool), host.open_store(asked.target_pool)
    with host.fleet.changed:
        if not is_recorded and asked.volume_id in source.volumes:
            target.drop_volume(asked.volume_id)
            if asked.takes_state_files:
                target.state_files.discard(asked.vm_id)
            return False
        _require_whole(target, asked)
        domain = host.domains.get(asked.vm_id)
        if domain is not None and spec is not None:
            domain.spec, domain.stamp = resolve(host, spec), stamp
        if is_recorded:
            source.drop_volume(asked.volume_id)
        _take_state_files(asked, source, target)
        return True


def _hold(host: "SimulatedHypervisor", control: JobControl) -> None:
    if control.cancelled.is_set():
        raise Conflict("job-cancelled", "the move was cancelled; the volume is where it was")
    fault = host.fleet.take_fault(host.host_id, "move.copying")
    if fault is None:
        return
    if fault.kind is FaultKind.FAIL_BEFORE:
        raise fault.error
    while not fault.released.wait(_POLL_S):
        if not host.is_up():
            raise Unavailable("hypervisor-down", "the hypervisor does not answer")
        if control.cancelled.is_set():
            raise Conflict("job-cancelled", "the move was cancelled; the volume is where it was")


def _running(host: "SimulatedHypervisor", asked: VolumeMove) -> SimulatedDomain | None:
    domain = host.domains.get(asked.vm_id)
    has_it = domain is not None and domain.state in ACTIVE and asked.volume_id in domain.open_layers
    return domain if has_it else None


def _copy_of(source: PoolStore, volume: StoredVolume, asked: VolumeMove) -> StoredVolume:
    """Return an independent volume with all that is seen through the source's bottom layer."""
    spec = replace(
        volume.spec,
        pool_id=asked.target_pool.pool_id,
        format=asked.target_format,
        base_image_id="",
        base_image_format=None,
        copy_image_id="",
        base_volume_id="",
        base_layer_id="",
        copy_volume_id="",
        copy_layer_id="",
    )
    marks = set(content(source, asked.volume_id, ""))
    return StoredVolume(spec, COPY_BYTES, layers={"": StoredLayer(None, marks)})


def _require_whole(target: PoolStore, asked: VolumeMove) -> None:
    if asked.volume_id not in target.volumes:
        raise NotFound("volume-not-found", f"volume {asked.volume_id} is in neither of the pools that it moves between")


def _take_state_files(asked: VolumeMove, source: PoolStore, target: PoolStore) -> None:
    if asked.takes_state_files and asked.vm_id in source.state_files:
        source.state_files.discard(asked.vm_id)
        target.state_files.add(asked.vm_id)
