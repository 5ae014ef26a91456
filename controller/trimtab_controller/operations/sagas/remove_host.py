"""host.remove: a host leaves the fleet; what runs there runs on as plain libvirt domains.

| step   | do                                                                        | undo                          |
|--------|---------------------------------------------------------------------------|-------------------------------|
| cordon | refuse while it is busy or holds what may not be left behind; cordon       | uncordon, unless it was        |
| leave  | the agent undoes the join (an unreachable host: only with `force`; pivot)  | - a host that left has left   |
| finish | revoke certificates, let go of vms, volumes and mappings; tombstone        | - last                        |
"""

from dataclasses import dataclass

from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, effect, transaction
from trimtab_controller.store import certificates, events, fleet, hosts, reach
from trimtab_protos.errors import Conflict, DeadlineExceeded, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    host_id: str
    # Vms, volumes and images that are only there stay behind, and the fleet forgets them.
    keep_guests: bool = False
    # Remove a host that does not answer; it must be cleaned by hand before it joins anything again.
    force: bool = False


def _cordon(context: Transaction[Params]) -> Json:
    session, host_id = context.session, context.params.host_id
    reach.check_no_work_on(session, host_id)
    left = reach.left_behind(session, host_id)
    if left and not context.params.keep_guests:
        listed = "; ".join(f"{noun} {', '.join(names)}" for noun, names in left.items())
        raise Conflict("host-not-empty", f"the host has {listed}; move them away, or leave them behind with `--keep-guests`")
    return {"was_cordoned": reach.set_cordon(session, host_id, is_cordoned=True)}


def _uncordon(context: Transaction[Params]) -> None:
    done = context.results.get("cordon")
    if done is not None and not done["was_cordoned"]:
        reach.set_cordon(context.session, context.params.host_id, is_cordoned=False)


def _leave(context: Effect[Params]) -> Json:
    host_id = context.params.host_id
    # Placed in the instant before the cordon: better seen now than left behind unseen.
    context.read(lambda session: reach.check_no_work_on(session, host_id))
    try:
        undone = context.agents.leave_fleet(host_id, context.key(subject_id=host_id))
    except (Unavailable, DeadlineExceeded) as error:
        if context.params.force:
            return {"was_reached": False, "undone": []}
        name = context.read(lambda session: fleet.name_of(session, host_id))
        raise Unavailable(
            "host-unreachable",
            f"host {name} does not answer ({error.message}); remove it without its help with `trimtab host remove {name} --force`",
        ) from error
    return {"was_reached": True, "undone": list(undone)}


def _finish(context: Transaction[Params]) -> Json:
    session, host_id = context.session, context.params.host_id
    name = fleet.name_of(session, host_id)
    revoked = certificates.revoke_all_of(session, host_id, now=context.now)
    released = reach.release_everything(session, host_id, now=context.now)
    reach.unmap_host(session, host_id)
    hosts.mark_deleted(session, host_id, now=context.now)
    events.append(
        session,
        kind="host.removed",
        subject_id=host_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"host {name} left the fleet; {len(released)} vms stay behind on it",
        context={"vm_ids": list(released)[:100]},
        now=context.now,
    )
    return {"revoked_certificates": revoked, "released_vm_ids": list(released)}


def _result(results: dict[str, Json]) -> Json:
    return {**results["leave"], **results["finish"]}


SAGA = Saga(
    name="host.remove",
    version=1,
    params=Params,
    result=_result,  # type: ignore[arg-type]
    steps=(
        transaction("cordon", _cordon, _uncordon),
        effect("leave", _leave, None, because="a host that left has left", pivot=True),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
