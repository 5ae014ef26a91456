"""vm.change_cdrom: another ISO image comes into the vm's drive, or none.

| step          | do                                                         | undo                              |
|---------------|------------------------------------------------------------|-----------------------------------|
| own           | (the wish was recorded at acceptance)                       | the former image                  |
| note_images   | say where a copy of the image is about to be                | - says where a file may be        |
| bring_images  | copy it there                                               | - cache                           |
| record_images | record the replica                                          | - it exists                       |
| apply         | change the medium; a guest that locks its tray is waited for | the former medium                 |
| finish        | tell                                                        | - last                            |
"""

import secrets
from dataclasses import dataclass

from trimtab_controller.operations import live_changes, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import events, image_replicas, vms
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import ChangedPart, ChangeLeft


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    # '' ejects.
    image_id: str
    before_image_id: str


def _own(context: Transaction[Params]) -> Json:
    vm = vms.get(context.session, context.params.vm_id)
    return {"host_id": vm.host_id, "epoch": vm.epoch, "ticket": secrets.token_hex(32)}


def _disown(context: Transaction[Params]) -> None:
    vms.update(context.session, context.params.vm_id, cdrom_image_id=context.params.before_image_id)


def _note_images(context: Transaction[Params]) -> None:
    host_id = str(context.results["own"]["host_id"])
    if host_id:
        missing = image_replicas.missing_for_vm(context.session, context.params.vm_id, host_id)
        image_replicas.begin(context.session, missing, host_id, operation_id=context.operation.id, now=context.now)


def _bring_images(context: Effect[Params]) -> Json | Wait:
    host_id = str(context.results["own"]["host_id"])
    if not host_id:
        return {}  # its first start brings it where the vm is placed
    missing = context.read(lambda session: image_replicas.missing_for_vm(session, context.params.vm_id, host_id))
    ticket = str(context.results["own"]["ticket"])
    return vm_steps.copy_missing(context, host_id, missing, ticket=ticket) or {"host_id": host_id}


def _record_images(context: Transaction[Params]) -> None:
    host_id = str(context.results["own"]["host_id"])
    if host_id:
        missing = image_replicas.missing_for_vm(context.session, context.params.vm_id, host_id)
        image_replicas.record(context.session, missing, host_id, now=context.now)


def _apply(context: Effect[Params]) -> Json | Wait:
    left = _change(context, image_id=context.params.image_id)
    if not left:
        return {}
    if live_changes.may_follow(left) and context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {left[0].reason}")
    raise Conflict("guest-keeps-medium", f"{left[0].reason}; unmount it in the guest and try again, or stop the vm first")


def _unapply(context: Effect[Params]) -> Wait | None:
    left = _change(context, image_id=context.params.before_image_id)
    if live_changes.may_follow(left) and context.waited_s < live_changes.PATIENCE_S:
        return Wait(live_changes.POLL_S, f"the guest: {left[0].reason}")
    return None


def _change(context: Effect[Params], *, image_id: str) -> tuple[ChangeLeft, ...]:
    """Make the guest's drive have this image; return what of that is left."""
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    if not vm.host_id:
        return ()
    _seen, left = live_changes.ask_guest(
        context, host_id=vm.host_id, epoch=vm.epoch, parts_of=lambda parts: live_changes.with_medium(parts, image_id)
    )
    return tuple(each for each in left if each.part is ChangedPart.CDROM)


def _finish(context: Transaction[Params]) -> None:
    vm = vms.get(context.session, context.params.vm_id)
    events.append(
        context.session,
        kind="vm.cdrom_changed",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} has {context.params.image_id or 'nothing'} in its drive",
        now=context.now,
    )


SAGA = Saga(
    name="vm.change_cdrom",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        transaction("note_images", _note_images, None, because="the row says where a file may be"),
        effect("bring_images", _bring_images, None, because="a replica is a cache entry"),
        transaction("record_images", _record_images, None, because="the replica exists"),
        effect("apply", _apply, _unapply),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
