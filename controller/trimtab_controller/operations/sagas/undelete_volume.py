"""volume.undelete: a deleted volume is shown again, with its bytes.

| step    | do                                                        | undo                       |
|---------|-----------------------------------------------------------|----------------------------|
| restore | clear deleted_at; AlreadyExists where the name was reused  | - it is the only step      |
"""

from dataclasses import dataclass

from trimtab_controller.operations.saga import Saga, Transaction, transaction
from trimtab_controller.store import describe, events, volume_claims, volumes
from trimtab_protos.errors import AlreadyExists, Conflict


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str


def _restore(context: Transaction[Params]) -> None:
    session = context.session
    volume = describe.get_volume(session, context.params.volume_id)
    if volume.deleted_at is None:
        return
    if volume.purge_after is None or volume.purge_after <= context.now:
        raise Conflict("volume-purged", f"volume {volume.name} is past its 24 h; its bytes are gone")
    if volumes.find(session, volume.project_id, volume.name) is not None:
        raise AlreadyExists(
            "volume-exists", f"another volume is called {volume.name} now; delete that one first", name=volume.name
        )
    volume_claims.show_again(session, volume.id)
    events.append(
        session,
        kind="volume.undeleted",
        project_id=volume.project_id,
        subject_id=volume.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"volume {volume.name} is back",
        now=context.now,
    )


SAGA = Saga(
    name="volume.undelete",
    version=1,
    params=Params,
    steps=(transaction("restore", _restore, None, because="it is the only step"),),
)
