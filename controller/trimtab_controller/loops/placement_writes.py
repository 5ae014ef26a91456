"""What the leader writes for its decisions: claims, epochs, records, answers; many decisions in one transaction.

Vms that are created or started and ask for nothing scarce go together (`store/placement_commit.py`). If the database refuses one
of them, that attempt is undone and all are written one by one, each in a savepoint, so that the refused one falls out alone.
Refusals, migrations, and vms with devices, pinned cpus, huge pages or a group are always written one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.core.baseline import Baseline
from trimtab_controller.core.model import Claim, Host, PlacementAsk
from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.space import scarce_amounts
from trimtab_controller.core.placement.verdict import Decision
from trimtab_controller.operations import admission
from trimtab_controller.store import (
    claims,
    events,
    fleet,
    leases,
    operations,
    placement_commit,
    placements,
    vms,
    volume_claims,
)
from trimtab_controller.store.database import Session

PLACED, REFUSED, RACED, WITHDRAWN = "placed", "refused", "raced", "withdrawn"


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that one round decides on, as of one snapshot."""

    asks: tuple[PlacementAsk, ...]
    rows: fleet.FleetRows
    needs: Mapping[str, fleet.VmNeeds]
    homes: Mapping[str, Claim]
    hosts: Mapping[str, Host]
    baselines: Mapping[str, Baseline]
    snapshot: FleetSnapshot
    revision: int
    """The newest event before the fleet was read: all that was committed up to it is in what was read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A decision with the request that it answers."""

    ask: PlacementAsk
    decision: Decision
    decision_id: str
    stored: Mapping[str, Any]
    """The decision as it is kept."""
    inputs_sha256: str


def write_answers(
    session: Session,
    answers: Sequence[Answer],
    batch: Batch,
    generations: Mapping[str, int],
    *,
    term: int,
    now: datetime,
) -> tuple[dict[str, str], Mapping[str, int]]:
    """Write these answers; return what became of each by operation, and the groups' generations after it.

    What becomes of one is `PLACED`, `REFUSED`, or `RACED` and still pending.
    """
    leases.assert_leader(session, term)
    together: list[Answer] = []
    alone: list[Answer] = []
    for answer in answers:
        (together if _goes_together(answer, batch) else alone).append(answer)
    outcomes = {answer.ask.operation_id: PLACED for answer in together}
    try:
        with session.begin_nested():  # undone as a whole where one is refused
            placement_commit.place_many(session, [_placed(answer, batch) for answer in together], now=now)
            _fix_baselines(session, together, batch)
    except claims.ClaimRefused:
        alone = [*together, *alone]
    known = dict(generations)
    for answer in alone:
        try:
            with session.begin_nested():
                outcomes[answer.ask.operation_id] = _write_one(session, answer, batch, known, now)
            group = answer.decision.request.group
            if group is not None and outcomes[answer.ask.operation_id] == PLACED:
                known[group.group_id] += 1
        except claims.ClaimRefused:
            outcomes[answer.ask.operation_id] = RACED
    return outcomes, known


def _goes_together(answer: Answer, batch: Batch) -> bool:
    decision, request = answer.decision, answer.decision.request
    if decision.chosen_host_id is None or answer.ask.kind == "migrate" or _refusal(answer, batch):
        return False
    return not (request.devices or request.resources or request.is_dedicated or request.page_kib or request.group)


def _refusal(answer: Answer, batch: Batch) -> str:
    """Return why the vm is not placed, '' where it is."""
    host_id = answer.decision.chosen_host_id
    if host_id is None:
        return answer.decision.summary()
    return _lacks_baseline(host_id, batch) if answer.ask.kind == "create" else ""


# --- together ----------------------------------------------------------------------------------------------------------------


def _placed(answer: Answer, batch: Batch) -> placement_commit.Placed:
    ask, host_id = answer.ask, answer.decision.chosen_host_id or ""
    needs, host = batch.needs[ask.vm_id], batch.hosts[host_id]
    baseline = batch.baselines[host.host_class_id]
    return placement_commit.Placed(
        operation_id=ask.operation_id,
        vm_id=ask.vm_id,
        project_id=ask.project_id,
        kind=ask.kind,
        host_id=host_id,
        host_name=host.name,
        epoch_before=needs.vm.epoch,
        vcpus=needs.vm.vcpus,
        memory_mib=needs.vm.memory_mib,
        machine=baseline.machine,
        cpu_model=baseline.cpu_model,
        spaces=_spaces(needs, host_id, batch),
        local_volume_ids=_local_volume_ids(needs, batch),
        decision_id=answer.decision_id,
        policy=answer.decision.policy,
        verdicts=answer.stored,
        inputs_sha256=answer.inputs_sha256,
        fleet_revision=batch.revision,
    )


def _spaces(needs: fleet.VmNeeds, host_id: str, batch: Batch) -> tuple[placement_commit.SpaceTaken, ...]:
    """Return the space that is not claimed yet, at its place."""
    found = []
    for volume in needs.volumes:
        if volume.unit:
            continue  # a LUN takes room from nobody else
        pool = batch.snapshot.pools[volume.pool_id]
        if volume.id not in needs.claimed_volume_ids:
            found.append(
                placement_commit.SpaceTaken(
                    volume_id=volume.id,
                    pool_id=pool.pool_id,
                    host_id="" if pool.is_shared else host_id,
                    size_bytes=volume.size_bytes,
                    limit_bytes=pool.claim_limit_bytes(host_id),
                )
            )
    return tuple(found)


def _local_volume_ids(needs: fleet.VmNeeds, batch: Batch) -> tuple[str, ...]:
    return tuple(volume.id for volume in needs.volumes if not batch.rows.pools[volume.pool_id].is_shared)


def _fix_baselines(session: Session, answers: Sequence[Answer], batch: Batch) -> None:
    """Fix the baseline of each class that got a vm, once."""
    for class_id in sorted({batch.hosts[answer.decision.chosen_host_id or ""].host_class_id for answer in answers}):
        baseline = batch.baselines[class_id]
        fleet.fix_class_baseline(session, class_id, machine=baseline.machine, cpu_model=baseline.cpu_model)


# --- one by one --------------------------------------------------------------------------------------------------------------


def _write_one(session: Session, answer: Answer, batch: Batch, generations: Mapping[str, int], now: datetime) -> str:
    refusal = _refusal(answer, batch)
    if refusal:
        _refuse(session, answer, refusal, batch, now)
        return REFUSED
    is_answered = _place(session, answer, answer.decision.chosen_host_id or "", batch, now)
    if is_answered:
        _take_scarce(session, answer, generations)
    return PLACED if is_answered else WITHDRAWN


def _take_scarce(session: Session, answer: Answer, generations: Mapping[str, int]) -> None:
    """Claim what is counted besides, and the place in the group."""
    request, host_id = answer.decision.request, answer.decision.chosen_host_id or ""
    if request.group is not None:
        claims.join_group(session, request.group.group_id, generation=generations[request.group.group_id])
    taken = scarce_amounts(request, answer.decision.cells)
    if taken:
        claims.take_stock(session, vm_id=request.vm_id, host_id=host_id, amounts=taken)
    for kind, count in request.devices.items():
        claims.take_devices(session, vm_id=request.vm_id, host_id=host_id, kind=kind, count=count)


def _refuse(session: Session, answer: Answer, refusal: str, batch: Batch, now: datetime) -> None:
    _record(session, answer, batch, now)
    placements.settle(
        session,
        answer.ask.operation_id,
        state="refused",
        decision_id=answer.decision_id,
        refusal=refusal,
        refusal_code=admission.code_of(answer.decision),
        now=now,
    )
    operations.wake(session, answer.ask.operation_id, now)


def _place(session: Session, answer: Answer, host_id: str, batch: Batch, now: datetime) -> bool:
    """Write a placement; False, and nothing is claimed, where the request was withdrawn while we decided."""
    ask = answer.ask
    vm = vms.get(session, ask.vm_id)
    epoch = vm.epoch + 1
    _record(session, answer, batch, now)
    is_answered = placements.settle(
        session,
        ask.operation_id,
        state="placed",
        decision_id=answer.decision_id,
        chosen_host_id=host_id,
        epoch=epoch,
        now=now,
    )
    if not is_answered:
        return False
    claims.take(
        session,
        vm_id=vm.id,
        host_id=host_id,
        role="target" if ask.kind == "migrate" else "home",
        epoch=epoch,
        # Pinned cpus and huge pages are claimed of their cells instead.
        vcpus=0 if answer.decision.request.is_dedicated else vm.vcpus,
        memory_mib=0 if answer.decision.request.page_kib else vm.memory_mib,
        operation_id=ask.operation_id,
        generation=None,
        now=now,
    )
    needs = batch.needs[ask.vm_id]
    local_ids = _local_volume_ids(needs, batch)
    _take_space(session, needs, host_id, batch)
    if ask.kind == "migrate":
        claims.begin_migration(
            session,
            vm_id=vm.id,
            operation_id=ask.operation_id,
            source_host_id=vm.host_id,
            target_host_id=host_id,
            epoch=vm.epoch,
            copied_volume_ids=local_ids,
            now=now,
        )
    else:
        vms.update(session, vm.id, host_id=host_id, epoch=epoch)
        volume_claims.bind(session, local_ids, host_id)
        _fix_machine(session, vm.id, host_id, batch)
    _tell(session, answer, host_id, now)
    operations.wake(session, ask.operation_id, now)
    return True


def _record(session: Session, answer: Answer, batch: Batch, now: datetime) -> None:
    placements.record_decision(
        session,
        decision_id=answer.decision_id,
        vm_id=answer.ask.vm_id,
        operation_id=answer.ask.operation_id,
        kind=answer.ask.kind,
        chosen_host_id=answer.decision.chosen_host_id or "",
        policy=answer.decision.policy,
        verdicts=answer.stored,
        inputs_sha256=answer.inputs_sha256,
        fleet_revision=batch.revision,
        now=now,
    )


def _tell(session: Session, answer: Answer, host_id: str, now: datetime) -> None:
    events.append(
        session,
        kind="vm.placed",
        project_id=answer.ask.project_id,
        subject_id=answer.ask.vm_id,
        operation_id=answer.ask.operation_id,
        actor="system:placement",
        message=f"placed on {fleet.name_of(session, host_id)} for {answer.ask.kind}",
        context={"host_id": host_id, "decision_id": answer.decision_id},
        now=now,
    )


def _take_space(session: Session, needs: fleet.VmNeeds, host_id: str, batch: Batch) -> None:
    for volume in needs.volumes:
        if volume.unit:
            continue
        pool = batch.snapshot.pools[volume.pool_id]
        claims.take_space(
            session,
            volume_id=volume.id,
            pool_id=pool.pool_id,
            host_id="" if pool.is_shared else host_id,
            size_bytes=volume.size_bytes,
            limit_bytes=pool.claim_limit_bytes(host_id),
        )


def _fix_machine(session: Session, vm_id: str, host_id: str, batch: Batch) -> None:
    """Fix the class's baseline and the vm's concrete machine type and CPU model, once each."""
    class_id = batch.hosts[host_id].host_class_id
    baseline = batch.baselines[class_id]
    fleet.fix_class_baseline(session, class_id, machine=baseline.machine, cpu_model=baseline.cpu_model)
    fleet.fix_machine(session, vm_id, machine=baseline.machine, cpu_model=baseline.cpu_model)


def _lacks_baseline(host_id: str, batch: Batch) -> str:
    """Return why no vm can be given a machine type and CPU model in this host's class, '' where one can."""
    class_id = batch.hosts[host_id].host_class_id
    baseline, name = batch.baselines[class_id], batch.rows.classes[class_id].name
    if baseline.machine and baseline.cpu_model:
        return ""
    return (
        f"the hosts of class {name} share no machine type and CPU model; "
        f"set them with `trimtab host-class update {name}`, or put unlike hosts into classes of their own"
    )
