"""What the sagas that swap a vm's disks for new ones share. Their Params have `replaced`: new volume -> the old one."""

from typing import Any

from trimtab_controller.core.model import Volume
from trimtab_controller.operations.saga import Effect, Transaction
from trimtab_controller.store import describe, volume_claims
from trimtab_protos.messages import PoolSpec


def own(_context: Transaction[Any]) -> None:
    """The rows were inserted when the operation was accepted."""


def disown(context: Transaction[Any]) -> None:
    """Free the names, space and quota of the new disks."""
    for volume_id in context.params.replaced:
        volume_claims.release(context.session, describe.get_volume(context.session, volume_id), now=context.now)


def unplace(context: Transaction[Any]) -> None:
    """Give the space back where the new disks were about to be."""
    for volume_id in context.params.replaced:
        volume_claims.leave_place(context.session, volume_id)


def volume_in_pool(context: Effect[Any], volume_id: str) -> tuple[Volume, PoolSpec]:
    def read(session: Any) -> tuple[Volume, PoolSpec]:
        volume = describe.get_volume(session, volume_id)
        return volume, describe.pool_spec(describe.get_pool(session, volume.pool_id))

    found: tuple[Volume, PoolSpec] = context.read(read)
    return found
