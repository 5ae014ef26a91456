"""vm.purge: after the 24 h of grace the vm's disks, MACs, addresses, space and quota go; the row stays as a tombstone.

| step    | do                                             | undo                       |
|---------|------------------------------------------------|----------------------------|
| own     | refuse if the vm was brought back meanwhile     | -                          |
| wipe    | delete volumes, seed and NVRAM                  | - deleted bytes are gone   |
| erase   | free what SQL holds                             | - last                     |
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.core.model import Pool, Volume
from trimtab_controller.operations import move_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, fleet, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str


def _own(context: Transaction[Params]) -> None:
    vm = vms.get(context.session, context.params.vm_id)
    if vm.deleted_at is None:
        raise Conflict("vm-not-deleted", f"vm {vm.name} was brought back; nothing is purged")


def _reaching_host(session: Session, *, pool: Pool, volume: Volume) -> str:
    return fleet.host_for_volume(session, pool, volume)


def _wipe(context: Effect[Params]) -> Json:
    parts = context.read(lambda session: describe.read_vm(session, context.params.vm_id))
    deleted = []
    for volume in parts.volumes:
        pool = parts.pools[volume.pool_id]
        was_never_placed = not pool.is_shared and not volume.host_id
        if not volume.is_deleted_with_vm or was_never_placed:
            continue
        host_id = context.read(partial(_reaching_host, pool=pool, volume=volume))
        if not host_id:
            raise Unavailable("volume-unreachable", f"no host that is up reaches volume {volume.name} in pool {pool.name}")
        # Without epoch: this host may once have prepared for a migration that did not take place, under one that never became ours.
        key = context.key(subject_id=parts.vm.id, part=volume.id)
        context.agents.delete_volume(host_id, key, volume.id, volume.format, describe.pool_spec(pool))
        move_steps.wipe_other_place(context, volume)
        if volume.boot_order == 1:
            vm_steps.remove_domain(context, host_id, epoch=0, keep_state_files=False, part="files")
        deleted.append(volume.id)
    return {"volume_ids": deleted}


SAGA = Saga(
    name="vm.purge",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, None, because="it only looks", pivot=True),
        effect("wipe", _wipe, None, because="deleted bytes are gone"),
        transaction("erase", vm_steps.erase_vm, None, because="nothing follows it"),
    ),
)
