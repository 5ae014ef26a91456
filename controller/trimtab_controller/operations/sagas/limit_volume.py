"""volume.limit: other limits on how fast a guest may use a volume.

| step   | do                                                         | undo                    |
|--------|------------------------------------------------------------|-------------------------|
| own    | (the limits were recorded at acceptance)                   | the former limits       |
| apply  | give them to the vm's domain, at once where it runs        | give it the former ones |
| finish | tell                                                       | - last                  |

The subject is the vm that has the volume; a volume apart is limited from its next attaching on.
"""

from dataclasses import dataclass, replace

from trimtab_controller.operations import live_changes
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, events, vms, volumes
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import ChangedPart


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str
    vm_id: str
    iops: int
    bandwidth_mib_s: int
    before_iops: int
    before_bandwidth_mib_s: int


def _own(_context: Transaction[Params]) -> None:
    """The limits were recorded when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    params = context.params
    volumes.set_limits(context.session, params.volume_id, iops=params.before_iops, bandwidth_mib_s=params.before_bandwidth_mib_s)


def _apply(context: Effect[Params]) -> Json:
    return _limit(context, iops=context.params.iops, bandwidth_mib_s=context.params.bandwidth_mib_s)


def _unapply(context: Effect[Params]) -> None:
    _limit(context, iops=context.params.before_iops, bandwidth_mib_s=context.params.before_bandwidth_mib_s)


def _limit(context: Effect[Params], *, iops: int, bandwidth_mib_s: int) -> Json:
    params = context.params
    vm = context.read(lambda session: vms.get(session, params.vm_id)) if params.vm_id else None
    if vm is None or not vm.host_id:
        return {"host_id": ""}

    def limited(parts: describe.VmParts) -> describe.VmParts:
        return replace(
            parts,
            volumes=tuple(
                replace(volume, iops_limit=iops, bandwidth_limit_mib_s=bandwidth_mib_s)
                if volume.id == params.volume_id
                else volume
                for volume in parts.volumes
            ),
        )

    _seen, left = live_changes.ask_guest(context, host_id=vm.host_id, epoch=vm.epoch, parts_of=limited)
    mine = next((each for each in left if each.part is ChangedPart.DISK and each.device_id == params.volume_id), None)
    if mine is not None:
        raise Conflict("limit-refused", mine.reason)
    return {"host_id": vm.host_id}


def _finish(context: Transaction[Params]) -> None:
    volume = describe.get_volume(context.session, context.params.volume_id)
    events.append(
        context.session,
        kind="volume.limited",
        project_id=volume.project_id,
        subject_id=volume.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"volume {volume.name}: {volume.iops_limit or 'any'} IOPS, {volume.bandwidth_limit_mib_s or 'any'} MiB/s",
        now=context.now,
    )


SAGA = Saga(
    name="volume.limit",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("apply", _apply, _unapply),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
