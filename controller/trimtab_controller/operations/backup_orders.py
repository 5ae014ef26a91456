"""A backup as it is asked of a host, from what is known of the vm."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from trimtab_controller.agents.backups import BackupOrder, DiskWish
from trimtab_controller.operations.backup_steps import VM_NOTE
from trimtab_controller.operations.saga import Json
from trimtab_controller.store import describe
from trimtab_controller.store.database import Session


def order_of(
    read: Callable[[Callable[[Session], Any]], Any],
    settings: Json,
    *,
    backup_id: str,
    vm_id: str,
    scratch_pool_id: str = "",
    **wishes: Any,
) -> BackupOrder:
    """Return the order for one backup of the vm with these settings; `wishes` are the fields that are not derived."""
    scratch = read(partial(describe.get_pool, pool_id=scratch_pool_id)) if scratch_pool_id else None
    parts = read(lambda session: describe.read_vm(session, vm_id))
    generations = {volume.id: volume.generation for volume in parts.volumes}
    return BackupOrder(
        backup_id=backup_id,
        vm_id=vm_id,
        vm_name=str(settings["vm"]["name"]),
        disks=tuple(
            DiskWish(name=one["disk"], volume_id=one["id"], generation=generations.get(one["id"], 0))
            for one in settings["volumes"]
        ),
        scratch_pool=describe.pool_spec(scratch) if scratch is not None else None,
        notes={VM_NOTE: json.dumps(settings, sort_keys=True)},
        **wishes,
    )
