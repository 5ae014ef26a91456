"""volume.delete: a volume that belongs to no vm is hidden for 24 h, then purged (`volume.purge`).

| step   | do                                                              | undo                         |
|--------|-----------------------------------------------------------------|------------------------------|
| hide   | refuse if a vm has it, else hide it, its bytes, space and quota stay | - `volume undelete` shows it |
"""

from dataclasses import dataclass
from datetime import timedelta

from trimtab_controller.operations.saga import Saga, Transaction, transaction
from trimtab_controller.store import describe, events, volume_claims

HIDDEN_FOR = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str


def _hide(context: Transaction[Params]) -> None:
    session, volume_id = context.session, context.params.volume_id
    volume_claims.hide_unattached(session, volume_id, now=context.now, purge_after=context.now + HIDDEN_FOR)
    volume = describe.get_volume(session, volume_id)
    events.append(
        session,
        kind="volume.deleted",
        project_id=volume.project_id,
        subject_id=volume.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"volume {volume.name} deleted; `trimtab volume undelete {volume.name}` brings it back within 24 h",
        now=context.now,
    )


SAGA = Saga(
    name="volume.delete",
    version=2,
    params=Params,
    steps=(transaction("hide", _hide, None, because="`volume undelete` shows it again"),),
    # Of version 1, which deleted the bytes at once.
    retired=frozenset({"own", "wipe", "erase"}),
)
