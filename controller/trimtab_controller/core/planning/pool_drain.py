"""Plans that empty a pool: each volume goes to another pool that its host reaches and that has room beside its reserve. Pure.

What was on shared storage goes to shared storage only: on a host's own it would no longer restart elsewhere. What was on a host's own
goes to that host's other pools first, then to shared ones. Large volumes choose first, since small ones find a place anywhere.
"""

from dataclasses import dataclass, field

from trimtab_controller.core.planning.plan import Blocker, Cause, Pin, Plan, PlanKind, Step, StepKind
from trimtab_controller.core.planning.timeline import Rates, Slots, timed


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRoom:
    """A pool as a place to go."""

    pool_id: str
    name: str
    is_shared: bool
    is_proven: bool
    """False: shared, and not every host has read what another wrote."""
    hosts: frozenset[str]
    """Hosts on which it is ready."""
    free_bytes: dict[str, int]
    """What may still be claimed beside the reserve, by host; '' for a shared pool."""

    def place(self, host_id: str) -> str:
        return "" if self.is_shared else host_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolVolume:
    volume_id: str
    name: str
    size_bytes: int
    version: int
    host_ids: tuple[str, ...]
    """Hosts that could work on its move: the home of its vm, else those that reach it."""
    vm_id: str = ""
    vm_name: str = ""
    refusal: str = ""
    """Why it cannot move now, with the command that helps; '' where it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolContents:
    """What is to leave, and where it could go."""

    pool: PoolRoom
    volumes: tuple[PoolVolume, ...]
    others: tuple[PoolRoom, ...]
    image_names: tuple[str, ...] = ()
    """Images that lie in this pool alone."""


@dataclass(slots=True)
class _Books:
    free: dict[tuple[str, str], int] = field(default_factory=dict)

    def take(self, room: PoolRoom, place: str, size_bytes: int) -> bool:
        key = (room.pool_id, place)
        left = self.free.setdefault(key, room.free_bytes.get(place, 0)) - size_bytes
        if left < 0:
            return False
        self.free[key] = left
        return True


def plan_pool_drain(contents: PoolContents, slots: Slots, rates: Rates) -> Plan:
    """Return the moves that empty the pool, and what stays with its cure."""
    books, steps, blockers = _Books(), list[Step](), list[Blocker]()
    for volume in sorted(contents.volumes, key=lambda one: (-one.size_bytes, one.name, one.volume_id)):
        step = None if volume.refusal else _step(contents, volume, books, position=len(steps))
        if step is not None:
            steps.append(step)
        else:
            blockers.append(_blocker(contents, volume))
    blockers += [_image_blocker(name) for name in contents.image_names]
    timed_steps, duration_s = timed(steps, slots, rates)
    moves, blocked = len(steps), len(blockers)
    told = f"drain pool {contents.pool.name}: {moves} {'volume' if moves == 1 else 'volumes'}, about {duration_s:.0f} s"
    if not moves and not blocked:
        told = f"drain pool {contents.pool.name}: nothing to move"
    elif blocked:
        told += f", {blocked} {'blocker' if blocked == 1 else 'blockers'}"
    return Plan(
        kind=PlanKind.DRAIN_POOL,
        scope=(contents.pool.pool_id,),
        steps=timed_steps,
        blockers=tuple(blockers),
        pins=tuple(_pin(one) for one in sorted(contents.volumes, key=lambda one: one.volume_id)),
        duration_s=duration_s,
        summary=told,
    )


def changes(plan: Plan, contents: PoolContents) -> tuple[str, ...]:
    """Return what changed since the plan was made in a way that matters; empty: it may be applied.

    A volume that left by itself does not matter, nor one whose limits or name changed.
    """
    now = {one.volume_id: one for one in contents.volumes}
    known = {pin.object_id: pin.fingerprint for pin in plan.pins}
    found = [f"volume {one.name} came to the pool" for one in contents.volumes if one.volume_id not in known]
    found += [f"volume {now[key].name} was resized" for key, was in known.items() if key in now and _fingerprint(now[key]) != was]
    books, rooms = _Books(), {room.pool_id: room for room in contents.others}
    for step in plan.steps:
        volume, room = now.get(step.volume_id), rooms.get(step.target_pool_id)
        if volume is None:
            continue
        if room is None or step.host_id not in room.hosts or not books.take(room, room.place(step.host_id), volume.size_bytes):
            found.append(f"volume {volume.name} has no place in the pool that the plan chose")
        elif volume.refusal:
            found.append(f"volume {volume.name} cannot move now: {volume.refusal}")
    return tuple(found)


def _step(contents: PoolContents, volume: PoolVolume, books: _Books, *, position: int) -> Step | None:
    for room in sorted(contents.others, key=lambda one: (one.is_shared, -max(one.free_bytes.values(), default=0), one.name)):
        if (contents.pool.is_shared and not room.is_shared) or not room.is_proven:
            continue
        for host_id in volume.host_ids:
            if host_id in room.hosts and books.take(room, room.place(host_id), volume.size_bytes):
                return Step(
                    position=position,
                    kind=StepKind.MOVE_VOLUME,
                    host_id=host_id,
                    vm_id=volume.vm_id,
                    vm_name=volume.vm_name,
                    copied_bytes=volume.size_bytes,
                    why=f"pool {room.name} has room beside its reserve",
                    volume_id=volume.volume_id,
                    volume_name=volume.name,
                    pool_id=contents.pool.pool_id,
                    target_pool_id=room.pool_id,
                )
    return None


def _blocker(contents: PoolContents, volume: PoolVolume) -> Blocker:
    host_id = volume.host_ids[0] if volume.host_ids else ""
    if volume.refusal:
        message, _semicolon, cure = volume.refusal.partition("; ")
        return _blocked(Cause.VOLUME_STAYS, volume, host_id, message, cure or f"trimtab volume get {volume.name}")
    if not volume.host_ids:
        message = f"no host that is up reaches volume {volume.name}"
        return _blocked(Cause.STATE_UNKNOWN, volume, "", message, f"trimtab pool get {contents.pool.name}")
    kind = "shared pool" if contents.pool.is_shared else "pool"
    message = (
        f"no other {kind} that its host reaches has room for the {volume.size_bytes} bytes of {volume.name} beside its reserve"
    )
    cure = "trimtab pool create, or free space in another one: `trimtab pool list -o wide`"
    return _blocked(Cause.NO_ROOM, volume, host_id, message, cure)


def _blocked(cause: Cause, volume: PoolVolume, host_id: str, message: str, cure: str) -> Blocker:
    return Blocker(
        cause=cause, vm_id=volume.vm_id, vm_name=volume.vm_name or volume.name, host_id=host_id, message=message, cure=cure
    )


def _image_blocker(name: str) -> Blocker:
    return Blocker(
        cause=Cause.IMAGE_STAYS,
        vm_id="",
        vm_name=name,
        host_id="",
        message=f"image {name} lies in this pool alone",
        cure=f"import it into another pool, then `trimtab image delete {name}`",
    )


def _fingerprint(volume: PoolVolume) -> str:
    return str(volume.size_bytes)


def _pin(volume: PoolVolume) -> Pin:
    return Pin(object_id=volume.volume_id, name=volume.name, version=volume.version, fingerprint=_fingerprint(volume))
