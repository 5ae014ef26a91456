"""backup.verify: every record that a backup needs is read and checked against its id (level 1).

| step   | do                                         | undo                |
|--------|--------------------------------------------|---------------------|
| choose | a host that works on the repository         | - it only looks     |
| read   | the agent's job                             | cancel the job      |
| finish | record level and age, or what is damaged;   | - last              |
|        | of every backup that shares what is damaged |                     |

A damaged record is noted in the repository: the next backup does not rely on it and stores its content anew. Chunks are shared, so the
host judges the repository's other backups by the damage that is known. Those that need it are marked, whoever's they are, and those that
were marked and need none any more, since what was damaged is stored anew, are good again.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from trimtab_controller.agents.client import Job
from trimtab_controller.core.model import Backup
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import backups, events, vms
from trimtab_controller.store.database import Session
from trimtab_protos.errors import NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    backup_id: str
    repo_id: str


def _choose(context: Transaction[Params]) -> Json:
    session = context.session
    backup = backups.get(session, context.params.backup_id)
    repo = backup_steps.require_ready(session, context.params.repo_id)
    try:
        home = vms.get(session, backup.vm_id).host_id
    except NotFound:
        home = ""
    # Only these may become good by the host's judgement: what another verification marks from now on may be newer than it.
    marked = [one.id for one in backups.damaged(session, repo.id) if one.id != backup.id]
    return {"host_id": backup_steps.host_for(session, repo, prefer=home), "vm_id": backup.vm_id, "marked": marked}


def _read(context: Effect[Params]) -> Json | Wait:
    chosen, params = context.results["choose"], context.params
    host_id = str(chosen["host_id"])
    backup_steps.open_on(context, host_id, params.repo_id)
    job = context.agents.start_verify(
        host_id,
        backup_steps.job_key(context),
        repo_id=params.repo_id,
        vm_id=str(chosen["vm_id"]),
        backup_id=params.backup_id,
        judges_others=bool(chosen.get("marked")),
    )
    return backup_steps.follow(job, "the verification", _verified)


def _verified(job: Job) -> Json:
    assert job.verify is not None
    parts = [part for one in job.verify.damaged for part in one.parts]
    return {
        "read_bytes": job.verify.read_bytes,
        "damaged_records": job.verify.damaged_records,
        "damaged_parts": parts,
        "others": {one.backup_id: list(one.parts) for one in job.verify.others},
        "are_others_judged": job.verify.are_others_judged,
    }


def _cancel_read(context: Effect[Params]) -> Json | Wait | Stopped:
    return backup_steps.cancel(context, str(context.results["choose"]["host_id"]), backup_steps.job_key(context), _verified)


def _unread(context: Effect[Params]) -> Wait | None:
    chosen = context.results.get("choose")
    if chosen is None:
        return None
    ended = backup_steps.end_job(context, str(chosen["host_id"]), backup_steps.job_key(context))
    return ended if isinstance(ended, Wait) else None


def _finish(context: Transaction[Params]) -> None:
    session, read = context.session, context.results["read"]
    backup = backups.get(session, context.params.backup_id)
    parts = ", ".join(read["damaged_parts"])
    if parts:
        problem = f"{read['damaged_records']} records are damaged: {parts} cannot be restored whole"
        backups.update(session, backup.id, state="damaged", problem=problem[:1000], verified_at=context.now)
    else:
        level = max(1, backup.level)
        backups.update(session, backup.id, state="ready", problem="", level=level, verified_at=context.now)
        _tell(context, "backup.verified", [backup], f"backup {backup.id} of vm {backup.vm_name} was read whole")
    spoilt = [backup] if parts and backup.state != "damaged" else []  # known already: it was told then
    spoilt += _mark_others(session, backup, read.get("others", {}))
    for vm in _by_vm(spoilt):
        names = ", ".join(one.id for one in vm)
        message = f"of vm {vm[0].vm_name} damaged: {names}, found by the verification of backup {backup.id}"
        _tell(context, "backup.damaged", vm, message)
    for vm in _by_vm(_unmark_others(context)):
        names = ", ".join(one.id for one in vm)
        _tell(context, "backup.repaired", vm, f"of vm {vm[0].vm_name} whole again: {names}; what was damaged is stored anew")


def _mark_others(session: Session, verified: Backup, damaged: dict[str, list[str]]) -> list[Backup]:
    """Mark every other backup that needs what is damaged; return those that nobody knew of. None is dated: none was read."""
    known = {one.id: one for one in backups.of_repo(session, verified.repo_id)} if damaged else {}
    found = [known[id] for id in sorted(damaged) if id in known and known[id].state == "ready"]
    for one in found:
        parts = ", ".join(damaged[one.id])
        problem = f"{parts} cannot be restored whole: it needs what the verification of backup {verified.id} found damaged"
        backups.update(session, one.id, state="damaged", problem=problem[:1000])
    return found


def _unmark_others(context: Transaction[Params]) -> list[Backup]:
    """Make good what was marked when this began and needs nothing damaged any more; return it."""
    session, read = context.session, context.results["read"]
    if not read.get("are_others_judged"):  # also of an agent that does not judge yet
        return []
    marked = set(context.results["choose"].get("marked", ())) - set(read["others"])
    found = [one for one in backups.damaged(session, context.params.repo_id) if one.id in marked]
    for one in found:
        backups.update(session, one.id, state="ready", problem="")
    return found


def _by_vm(found: Iterable[Backup]) -> list[list[Backup]]:
    by_vm: dict[str, list[Backup]] = defaultdict(list)
    for one in found:
        by_vm[one.vm_id].append(one)
    return list(by_vm.values())


def _tell(context: Transaction[Params], kind: str, about: list[Backup], message: str) -> None:
    """Append one event for one vm, whichever of its backups it is about."""
    events.append(
        context.session,
        kind=kind,
        project_id=about[0].project_id,
        subject_id=about[0].vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=message[:500],
        now=context.now,
    )


SAGA = Saga(
    name="backup.verify",
    version=1,
    params=Params,
    result=lambda results: {
        "read_bytes": results["read"]["read_bytes"],
        "damaged_records": results["read"]["damaged_records"],
        "damaged_parts": results["read"]["damaged_parts"],
        "damaged_others": sorted(results["read"].get("others", {})),
    },
    steps=(
        transaction("choose", _choose, None, because="it only looks"),
        effect("read", _read, _unread, cancel=_cancel_read),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
