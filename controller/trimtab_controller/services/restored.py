"""`trimtab-controller recover`: a control plane whose database is from the past meets hosts that went on without it.

Reads everything first and shows the differences; only then, in one transaction, raises epochs and turns above all that were seen,
takes vms over where they run, closes operations of the past, and pauses failover until an operator resumes it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.behind import NUMBERS_AHEAD
from trimtab_controller.core.lifecycle import LIVE_STATES, OperationState
from trimtab_controller.core.model import Actor, Host, OperationError
from trimtab_controller.core.restored import Difference, Finding, KnownVm, compare
from trimtab_controller.services import recovery
from trimtab_controller.store import behind, claims, events, hosts, leases, operations, schema, vms
from trimtab_controller.store.claims import ClaimRefused
from trimtab_protos.errors import Conflict, TrimtabError
from trimtab_protos.messages import DomainObservation

SYSTEM = Actor(name="system:recover")
HOSTS_AT_ONCE = 16
ATTENTION = "restored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was found. `silent`: names of hosts that did not answer, with the reason."""

    findings: tuple[Finding, ...]
    answered: tuple[str, ...]
    silent: Mapping[str, str]
    was_behind: bool = False
    """The controllers had noticed, and changed nothing since."""


def ask_hosts(
    found: Sequence[Host], list_domains: Callable[[str], Sequence[DomainObservation]]
) -> tuple[dict[str, tuple[DomainObservation, ...]], dict[str, str]]:
    """Return what each host holds of ours, and why others did not say."""

    def ask(host: Host) -> tuple[str, Sequence[DomainObservation] | str]:
        try:
            return host.id, list_domains(host.id)
        except TrimtabError as error:
            return host.id, error.message

    seen: dict[str, tuple[DomainObservation, ...]] = {}
    silent: dict[str, str] = {}
    with ThreadPoolExecutor(HOSTS_AT_ONCE, thread_name_prefix="recover") as pool:
        for host_id, answer in pool.map(ask, found):
            if isinstance(answer, str):
                silent[host_id] = answer
            else:
                seen[host_id] = tuple(one for one in answer if one.vm_id)
    return seen, silent


def known_vms(session: Session) -> tuple[KnownVm, ...]:
    """Return every vm that the database remembers, deleted ones too."""
    vm, turn = schema.vm, schema.turn
    query = (
        sa.select(vm.c.id, vm.c.name, vm.c.host_id, vm.c.epoch, sa.func.coalesce(turn.c.value, 0).label("turn"), vm.c.deleted_at)
        .select_from(vm.outerjoin(turn, turn.c.subject_id == vm.c.id))
        .order_by(vm.c.id)
    )
    return tuple(
        KnownVm(
            id=row.id, name=row.name, host_id=row.host_id, epoch=row.epoch, turn=row.turn, is_deleted=row.deleted_at is not None
        )
        for row in session.execute(query)
    )


def find(session: Session, seen: Mapping[str, Sequence[DomainObservation]], silent: Mapping[str, str]) -> Restored:
    names = {host.id: host.name for host in hosts.live(session)}
    return Restored(
        findings=compare(known_vms(session), seen, names),
        answered=tuple(sorted(names[host_id] for host_id in seen)),
        silent={names[host_id]: why for host_id, why in silent.items()},
        was_behind=behind.state(session).is_in_force,
    )


def apply(session: Session, restored: Restored, *, now: datetime) -> None:
    """Bring the database up to what was seen, in the caller's transaction. Starts, ends and deletes nothing."""
    recovery.set_paused(session, True, actor=SYSTEM, now=now)
    _close_operations(session, now=now)
    _raise_numbers(session)
    behind.end(session, disbelieved={}, now=now)
    behind.note_recovery(session, now=now)
    for finding in restored.findings:
        _apply(session, finding, now=now)
    told = f"the database was restored: {len(restored.findings)} differences, {len(restored.silent)} hosts silent; failover is paused"
    told += "; the controllers, which had noticed, are not read-only any more" if restored.was_behind else ""
    events.append(session, kind="alarm.database-restored", subject_id="failover", actor=SYSTEM.name, message=told, now=now)


def _raise_numbers(session: Session) -> None:
    """Raise leases, turns, mark and the leader's term above all that were given since: agents and fence intents take no lower ones.

    Of every turn, not only of those that were seen: agents remember those of volumes and images, too, and silent hosts come back.
    """
    lease = schema.lease
    behind.raise_numbers(session)
    session.execute(lease.update().where(lease.c.name == leases.ENGINE).values(term=lease.c.term + NUMBERS_AHEAD))


def _close_operations(session: Session, *, now: datetime) -> None:
    """End what was under way when the database was saved: whether it took place since is the hosts' to say."""
    table = schema.operation
    live = session.execute(sa.select(table).where(table.c.state.in_([one.value for one in LIVE_STATES])))
    error = OperationError.of(Conflict("database-restored", "the database was restored from before this operation ended"))
    for operation in [operations.from_row(row) for row in live]:
        operations.raise_turn(session, operation.subject_id)
        operations.close(session, operation, state=OperationState.FAILED, now=now, error=error)
    session.execute(schema.placement_request.delete().where(schema.placement_request.c.state == "pending"))


def _apply(session: Session, finding: Finding, *, now: datetime) -> None:
    match finding.difference:
        case Difference.STRANGER | Difference.UNKNOWN | Difference.DELETED:
            pass
        case Difference.GONE | Difference.TWICE:
            vms.update(session, finding.vm_id, attention=ATTENTION, problem=finding.message[:1000], epoch=finding.epoch)
        case Difference.NEWER:
            vms.update(session, finding.vm_id, epoch=finding.epoch)
        case Difference.ELSEWHERE:
            _take_over(session, finding, now=now)
    if finding.difference is not Difference.STRANGER:
        operations.raise_turn_to(session, finding.vm_id, finding.turn + 1)
    # A stranger's id is none of ours and cannot be the subject.
    subject_id = finding.host_id if finding.difference is Difference.STRANGER else finding.vm_id
    kind = f"restored.{finding.difference.value}"
    events.append(session, kind=kind, subject_id=subject_id, actor=SYSTEM.name, message=finding.message, now=now)


def _take_over(session: Session, finding: Finding, *, now: datetime) -> None:
    vm = vms.get(session, finding.vm_id)
    claims.end_migration(session, vm.id)
    claims.give_back(session, vm.id)
    vms.update(session, vm.id, host_id=finding.host_id, epoch=finding.epoch)
    try:
        with session.begin_nested():
            claims.take(
                session,
                vm_id=vm.id,
                host_id=finding.host_id,
                role="home",
                epoch=finding.epoch,
                vcpus=vm.vcpus,
                memory_mib=vm.memory_mib,
                operation_id="",
                generation=None,
                now=now,
            )
    except ClaimRefused:
        # It runs there all the same; its next placement claims.
        vms.update(
            session, vm.id, problem="it runs without a claim: its host had no room on record when the database was restored"
        )
