"""template.create: an image of a vm's boot disk as a snapshot keeps it, and its settings beside; the vm runs on.

| step    | do                                                              | undo                                  |
|---------|-----------------------------------------------------------------|---------------------------------------|
| wait    | for the snapshot; the rows were inserted at acceptance            | forget template and image              |
| choose  | a host that reaches the pool; note where the file will be        | - the undo of `wait` forgets the note  |
| import  | the agent's job: read through all layers, write one file, hash   | cancel the job, delete the replica     |
| finish  | record sizes, hashes and the replica                             | - last                                |

The snapshot is temporary: the leader's upkeep deletes it once this has ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_controller.operations.saga import Saga, Transaction, Wait, effect, transaction
from trimtab_controller.operations.sagas import import_image
from trimtab_controller.operations.sagas.create_vm import wait_for_snapshot
from trimtab_controller.store import events, templates


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    template_id: str
    image_id: str
    pool_id: str
    # {volume_id, layer_id, host_id?}
    source: Mapping[str, Any]
    snapshot_id: str
    after_operation_id: str


def _wait(context: Transaction[Params]) -> Wait | None:
    return wait_for_snapshot(context, context.params.after_operation_id)


def _forget(context: Transaction[Params]) -> None:
    templates.hide(context.session, context.params.template_id, now=context.now)
    import_image.forget(context)


def _finish(context: Transaction[Params]) -> None:
    import_image.record(context)
    template = templates.get(context.session, context.params.template_id)
    events.append(
        context.session,
        kind="template.created",
        project_id=template.project_id,
        subject_id=template.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"template {template.name} has revision {template.revision}",
        context={"image_id": template.image_id},
        now=context.now,
    )


SAGA = Saga(
    name="template.create",
    version=1,
    params=Params,
    result=lambda results: {"host_id": results["choose"]["host_id"], **results["import"]},
    steps=(
        transaction("wait", _wait, _forget),
        transaction("choose", import_image.choose, None, because="the undo of `wait` forgets the note"),
        effect("import", import_image.bring, import_image.unbring, cancel=import_image.cancel_bringing),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
