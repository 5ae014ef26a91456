"""Steps that `volume.move` and `volume.settle_move` share: where a move is worked on, and what is asked of the host there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.core.model import Pool, Volume
from trimtab_controller.operations.saga import Effect
from trimtab_controller.store import describe, fleet, hosts, reach, vms, volume_moves
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, Unavailable
from trimtab_protos.messages import DiskFormat, DomainSpec
from trimtab_protos.volume_messages import VolumeMove


class MoveParams(Protocol):
    @property
    def volume_id(self) -> str: ...

    @property
    def vm_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A volume that moves, its pools, and the host that works on it: the home of its vm, else one that reaches both."""

    volume: Volume
    own: Pool
    other: Pool
    host_id: str
    epoch: int
    # None: no vm has it, or its vm has no home.
    domain: DomainSpec | None
    keeps_running: bool
    has_state_files: bool

    def as_asked(self, *, bandwidth_mib_s: int = 0) -> VolumeMove:
        """Return the move as the agent is told of it: from where the volume was to where it shall be, or is."""
        volume, is_left = self.volume, self.volume.move_state == volume_moves.LEFT
        own, other = (
            (describe.pool_spec(self.own), volume.format),
            (describe.pool_spec(self.other), DiskFormat(volume.other_format)),
        )
        (source, source_format), (target, target_format) = (other, own) if is_left else (own, other)
        return VolumeMove(
            volume_id=volume.id,
            source_pool=source,
            target_pool=target,
            source_format=source_format,
            target_format=target_format,
            size_bytes=volume.size_bytes,
            vm_id=volume.vm_id if volume.vm_id and self.domain is not None else "",
            keeps_running=self.keeps_running,
            bandwidth_bytes_s=bandwidth_mib_s << 20,
            takes_state_files=self.has_state_files and self.domain is not None,
        )


def place_of(context: Effect[Any]) -> Place:
    """Return where the move is worked on. Conflict (`volume-not-moving`); Unavailable where no host that is up reaches both pools."""
    place: Place = context.read(partial(read_place, volume_id=context.params.volume_id))
    if not place.host_id:
        raise Unavailable(
            "volume-unreachable",
            f"no host that is up reaches pools {place.own.name} and {place.other.name} of {place.volume.name}",
        )
    return place


def read_place(session: Session, volume_id: str) -> Place:
    volume = describe.get_volume(session, volume_id)
    if not volume.move_state or volume.other_pool_id is None:
        raise Conflict("volume-not-moving", f"volume {volume.name} does not move")
    own, other = describe.get_pool(session, volume.pool_id), describe.get_pool(session, volume.other_pool_id)
    vm = vms.get(session, volume.vm_id) if volume.vm_id is not None else None
    if vm is None or not vm.host_id:
        host_id = host_without_home(session, volume, own, other)
        return Place(volume, own, other, host_id, 0, None, keeps_running=False, has_state_files=False)
    parts = describe.read_vm(session, vm.id)
    state = describe.state_volume(parts.volumes)
    return Place(
        volume,
        own,
        other,
        vm.host_id,
        vm.epoch,
        describe.domain_spec(session, parts, vm.host_id),
        keeps_running=vm.desired_power is DesiredPower.RUNNING,
        has_state_files=state is not None and state.id == volume.id,
    )


def host_without_home(session: Session, volume: Volume, own: Pool, other: Pool) -> str:
    """Return a host that is up and reaches both pools, where the volume's bytes are; "" for none."""
    ready = {host.id for host in reach.ready_hosts(session, own.id)} & {host.id for host in reach.ready_hosts(session, other.id)}
    bound = {volume.host_id, volume.other_host_id} - {""}
    return min((host_id for host_id in ready if not bound or bound == {host_id}), default="")


def settle(context: Effect[Any], place: Place, *, is_recorded: bool) -> bool:
    """Have the host remove the side that is not the volume, and return whether the new place is it.

    A side on the local storage of another host than the one that works on the move is removed there: its vm was started anew elsewhere.
    """
    key = context.key(subject_id=context.operation.subject_id, epoch=place.epoch, part="settle")
    is_moved = context.agents.settle_volume_move(place.host_id, key, place.as_asked(), place.domain, is_recorded=is_recorded)
    if not is_moved:
        _drop_far_copy(context, place)
    return is_moved


def wipe_other_place(context: Effect[Any], volume: Volume) -> None:
    """Remove what is of a volume that goes for good at the other place of a move that was cut off."""
    if not volume.move_state or volume.other_pool_id is None:
        return
    pool: Pool = context.read(partial(describe.get_pool, pool_id=volume.other_pool_id))
    if not pool.is_shared and not context.read(partial(hosts.is_live, host_id=volume.other_host_id)):
        return  # its host left the fleet, and the bytes with it
    there = replace(volume, host_id=volume.other_host_id)
    host_id = context.read(partial(fleet.host_for_volume, pool=pool, volume=there))
    if not host_id:
        raise Unavailable("volume-unreachable", f"no host that is up reaches what is left of {volume.name} in pool {pool.name}")
    key = context.key(subject_id=context.operation.subject_id, part=f"other-{volume.id}")
    format = DiskFormat(volume.other_format)
    context.agents.delete_volume(host_id, key, volume.id, format, describe.pool_spec(pool))


def _drop_far_copy(context: Effect[Any], place: Place) -> None:
    far = place.volume.other_host_id
    is_live: Callable[[Session], bool] = partial(hosts.is_live, host_id=far)
    if far in {"", place.host_id} or not context.read(is_live):
        return
    key = context.key(subject_id=place.volume.id, part="far")
    format = DiskFormat(place.volume.other_format)
    context.agents.delete_volume(far, key, place.volume.id, format, describe.pool_spec(place.other))
