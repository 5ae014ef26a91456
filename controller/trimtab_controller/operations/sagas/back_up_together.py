"""backup.together: several vms as they were at one moment, also across hosts. Each has a backup.run of its own, which follows its job.

| step   | do                                                                       | undo                                      |
|--------|--------------------------------------------------------------------------|-------------------------------------------|
| own    | (the instant and its members' backups were accepted with this)             | the instant is broken, and why            |
| find   | where each is, its disks and settings; a host holds so many at most         | - it only looks                           |
| take   | begin all jobs, wait until every guest stands still, let all go on (pivot)   | - guests go on by themselves at the bound |
| gather | wait until every member's backup has ended                                   | - it only looks                           |
| finish | consistent, or broken and why; skew and pause                               | - last                                    |

It is one instant exactly where every guest was still held when it was released, since the first release is sent after the last was
seen to stand still. No clock has a say. A member that fails makes the instant broken; backups of the others stay good by themselves.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trimtab_controller.agents.backups import Held
from trimtab_controller.core.together import Member, judge
from trimtab_controller.operations import backup_orders, backup_steps, encrypted
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import backup_instants, backup_settings, backups, describe, events
from trimtab_protos.errors import Conflict, DeadlineExceeded, TrimtabError, Unavailable

# As many as an agent begins at once (its class of jobs `together`).
ON_ONE_HOST_MAX = 8
# No guest stands still for longer, whatever becomes of this operation.
HOLD_MAX_MS = 10_000
# For one member to stand still; in sum they stay below the bound, else the first would go on before the last is held.
AWAIT_S = 6.0
GATHER_POLL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    instant_id: str
    repo_id: str
    # vm id -> backup id.
    members: Mapping[str, str]
    needs_filesystem: bool = False
    needs_application: bool = False
    bandwidth_mib_s: int = 0


def _own(_context: Transaction[Params]) -> None:
    """The rows were inserted, and the members' operations accepted, with this one."""


def _disown(context: Transaction[Params]) -> None:
    error = context.operation.error
    problem = error.message if error is not None else "it was not finished"
    backup_instants.update(context.session, context.params.instant_id, state="broken", problem=problem[:1000])


def _find(context: Transaction[Params]) -> Json:
    session, params = context.session, context.params
    repo = backup_steps.require_ready(session, params.repo_id)
    found: dict[str, Any] = {}
    for vm_id in params.members:
        vm = describe.read_vm(session, vm_id).vm
        if not vm.host_id or vm.deleted_at is not None:
            raise Conflict("vm-not-placed", f"vm {vm.name} is on no host, so there is nobody to read its disks")
        backup_steps.require_reach(repo, vm.host_id)
        if params.needs_application:
            backup_steps.require_hooks(session, vm.host_id)
        scratch = encrypted.scratch_pool_id(session, vm_id)
        settings = backup_settings.read(session, vm_id, repo_id=params.repo_id)
        found[vm_id] = {"host_id": vm.host_id, "settings": settings, "scratch_pool_id": scratch}
    refuse_crowd(Counter(str(one["host_id"]) for one in found.values()))
    return {"vms": found}


def refuse_crowd(on_hosts: Mapping[str, int]) -> None:
    """Raise Conflict where a host would hold more guests than it begins at once."""
    for host_id, count in on_hosts.items():
        if count > ON_ONE_HOST_MAX:
            raise Conflict(
                "group-too-crowded",
                f"{count} vms of the group are on one host, which holds {ON_ONE_HOST_MAX} at once at most; spread them, or make two groups",
                host_id=host_id,
            )


def _take(context: Effect[Params]) -> Json:
    places = {vm_id: str(one["host_id"]) for vm_id, one in context.results["find"]["vms"].items()}
    problems = _begin(context, places)
    held: dict[str, Held] = {}
    try:
        if not problems:
            for vm_id, host_id in places.items():
                found = context.agents.await_instant(host_id, context.params.instant_id, vm_id, timeout_s=AWAIT_S)
                if found.state not in {"held", "released"}:
                    problems[vm_id] = f"it did not stand still in time ({found.state})"
                    break
    except TrimtabError as error:
        problems["await"] = error.message
    finally:
        # The first release goes out after the last guest was seen to stand still, or where the group is broken anyway.
        for vm_id, host_id in places.items():
            try:
                held[vm_id] = _release(context, host_id, vm_id)
            except TrimtabError as error:
                problems[vm_id] = f"its host does not say whether it stood still: {error.message}"
    return {
        "problems": problems,
        "held": {vm_id: {"state": one.state, "taken_ms": one.taken_ms} for vm_id, one in held.items()},
    }


def _begin(context: Effect[Params], places: Mapping[str, str]) -> dict[str, str]:
    """Begin the members' jobs; return why one could not be begun: then none is waited for."""
    params, problems = context.params, dict[str, str]()
    try:
        for host_id in sorted(set(places.values())):
            backup_steps.open_on(context, host_id, params.repo_id)
    except TrimtabError as error:
        return {"open": error.message}
    for vm_id, host_id in places.items():
        order = backup_orders.order_of(
            context.read,
            context.results["find"]["vms"][vm_id]["settings"],
            repo_id=params.repo_id,
            backup_id=params.members[vm_id],
            vm_id=vm_id,
            scratch_pool_id=context.results["find"]["vms"][vm_id].get("scratch_pool_id", ""),
            project_id=context.operation.project_id,
            needs_filesystem=params.needs_filesystem,
            needs_application=params.needs_application,
            bandwidth_mib_s=params.bandwidth_mib_s,
            instant_id=params.instant_id,
            hold_max_ms=HOLD_MAX_MS,
        )
        try:
            context.agents.start_backup(host_id, backup_steps.job_key(context, vm_id), order)
        except TrimtabError as error:
            problems[vm_id] = error.message
            break
    return problems


def _release(context: Effect[Params], host_id: str, vm_id: str) -> Held:
    try:
        return context.agents.release_instant(host_id, context.params.instant_id, vm_id)
    except (Unavailable, DeadlineExceeded):
        # Once more: it is asked what it was, too, and else its guest stands still until the bound.
        return context.agents.release_instant(host_id, context.params.instant_id, vm_id)


def _gather(context: Transaction[Params]) -> Json | Wait:
    running = [one.vm_name for one in _members(context) if one.state == "running"]
    if running:
        return Wait(GATHER_POLL_S, f"the backups of {', '.join(running[:5])}")
    return {}


def _members(context: Transaction[Params]) -> Sequence[Any]:
    return [backups.get(context.session, backup_id) for backup_id in context.params.members.values()]


def _finish(context: Transaction[Params]) -> Json:
    taken = context.results["take"]
    members = [
        Member(
            vm_name=backup.vm_name,
            is_listed=backup.state == "ready",
            problem=taken["problems"].get(backup.vm_id, "") or backup.problem,
            was_held=taken["held"].get(backup.vm_id, {}).get("state") == "released"
            and backup.manifest.get("notes", {}).get("instant_state") == "released",
            taken_ms=int(taken["held"].get(backup.vm_id, {}).get("taken_ms", 0)),
            held_ms=int(backup.manifest.get("notes", {}).get("held_ms", 0)),
        )
        for backup in _members(context)
    ]
    verdict = judge(members, common=[text for what, text in taken["problems"].items() if what in {"open", "await"}])
    at = datetime.fromtimestamp(verdict.taken_ms / 1000, UTC) if verdict.taken_ms else None
    state = "consistent" if verdict.is_consistent else "broken"
    backup_instants.update(
        context.session,
        context.params.instant_id,
        state=state,
        problem=verdict.problem[:1000],
        skew_ms=verdict.skew_ms,
        pause_ms=verdict.pause_ms,
        taken_at=at,
    )
    told = verdict.problem or f"guests stood still for {verdict.pause_ms} ms at most"
    message = f"instant {context.params.instant_id} of {len(members)} vms is {state}: {told}"
    events.append(
        context.session,
        kind=f"backup_instant.{state}",
        project_id=context.operation.project_id,
        subject_id=context.params.instant_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=message[:1000],
        now=context.now,
    )
    return {"state": state, "problem": verdict.problem, "skew_ms": verdict.skew_ms, "pause_ms": verdict.pause_ms}


SAGA = Saga(
    name="backup.together",
    version=1,
    params=Params,
    is_exclusive=False,
    result=lambda results: results["finish"],
    steps=(
        transaction("own", _own, _disown),
        transaction("find", _find, None, because="it only looks"),
        effect("take", _take, None, because="guests go on by themselves at the bound", pivot=True),
        transaction("gather", _gather, None, because="it only looks"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
