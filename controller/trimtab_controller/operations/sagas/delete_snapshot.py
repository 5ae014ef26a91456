"""snapshot.delete: what only this snapshot needed is merged into what is below, while the guest runs, or deleted.

| step    | do                                                                  | undo                          |
|---------|---------------------------------------------------------------------|-------------------------------|
| own     | mark it as being deleted                                             | as it was                     |
| prepare | what is to be merged and deleted; SQL: which layers are merged (pivot) | - from here on only forward |
| merge   | do it, one after the other                                           | - merged is merged            |
| forget  | delete the memory                                                    | - deleted bytes are gone      |
| finish  | record the layers that are left; the snapshot is gone                | - last                        |

A merge that finds no room waits until there is some: the guest runs on meanwhile, nothing of its disk is lost.
"""

from dataclasses import dataclass

from trimtab_controller.operations import layer_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import events, snapshots, vms


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    snapshot_id: str


def _own(context: Transaction[Params]) -> Json:
    before = snapshots.get(context.session, context.params.snapshot_id).state
    snapshots.update(context.session, context.params.snapshot_id, state="deleting")
    return {"before": before}


def _disown(context: Transaction[Params]) -> None:
    if "own" in context.results:
        snapshots.update(context.session, context.params.snapshot_id, state=context.results["own"]["before"])


def _prepare(context: Transaction[Params]) -> Json:
    return {"works": layer_steps.plan(context, without=context.params.snapshot_id)}


def _merge(context: Effect[Params]) -> Json | Wait:
    return layer_steps.do_works(context, context.results["prepare"]["works"]) or {}


def _forget(context: Effect[Params]) -> Json:
    snapshot = context.read(lambda session: snapshots.get(session, context.params.snapshot_id))
    if snapshot.has_memory:
        place = layer_steps.place_of(context)
        key = layer_steps.job_key(context, place)
        context.agents.delete_memory(place.host_id, key, snapshot.vm_id, snapshot.id, place.state_pool)
    return {}


def _finish(context: Transaction[Params]) -> None:
    session, params = context.session, context.params
    layer_steps.record_works(context, context.results["prepare"]["works"])
    snapshot, vm = snapshots.get(session, params.snapshot_id), vms.get(session, params.vm_id)
    snapshots.forget(session, snapshot, now=context.now)
    events.append(
        session,
        kind="snapshot.deleted",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"snapshot {snapshot.name} of vm {vm.name} deleted",
        context={"snapshot_id": snapshot.id},
        now=context.now,
    )


SAGA = Saga(
    name="snapshot.delete",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        transaction("prepare", _prepare, None, because="from here on only forward", pivot=True),
        effect("merge", _merge, None, because="merged is merged"),
        effect("forget", _forget, None, because="deleted bytes are gone"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
