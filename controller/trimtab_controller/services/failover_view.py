"""Failover as an operator sees it: losses with their timelines, why it stands still, what a host's loss would meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import UNHEARD
from trimtab_controller.core.model import Host
from trimtab_controller.core.model.failover import FailoverControl, FailoverRow, FailoverVmRow
from trimtab_controller.store import behind, failover, hosts, keyset, lookup, operations, schema
from trimtab_controller.store.behind import Behind
from trimtab_protos.errors import NotFound

WAITING_MAX = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One line of a timeline; `vm` '' where it is about the host."""

    at: datetime
    what: str
    proof: str = ""
    vm: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmOutcome:
    row: FailoverVmRow
    name: str
    host_name: str
    """Where it was started; '' before that is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverView:
    """`counts`: vms by state. The timeline and the vms only where one loss is asked for."""

    row: FailoverRow
    host_name: str
    counts: Mapping[str, int]
    timeline: tuple[Moment, ...] = ()
    vms: tuple[VmOutcome, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    vm: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Whether failover works, and what it works on. `silent`: hosts that are not heard from."""

    control: FailoverControl
    host_names: Mapping[str, str]
    silent: tuple[Host, ...]
    open: tuple[FailoverView, ...]
    waiting: tuple[Waiting, ...]
    behind: Behind


def page(session: Session, asked: keyset.Page) -> tuple[tuple[FailoverView, ...], tuple[str, str] | None]:
    found, after = failover.page(session, asked)
    return _views(session, found), after


def get(session: Session, failover_id: str) -> FailoverView:
    """Return one loss with its timeline. NotFound."""
    row = failover.get_record(session, failover_id)
    if row is None:
        raise NotFound(
            "failover-not-found", f"there is no failover {failover_id}; see `trimtab failover list`", failover=failover_id
        )
    (view,) = _views(session, (row,))
    outcomes = _outcomes(session, row)
    lines = [Moment(at=datetime.fromisoformat(one["at"]), what=one["what"], proof=one.get("proof", "")) for one in row.evidence]
    lines += [moment for outcome in outcomes for moment in _moments(outcome)]
    return FailoverView(
        row=row,
        host_name=view.host_name,
        counts=view.counts,
        timeline=tuple(sorted(lines, key=lambda line: line.at)),
        vms=outcomes,
    )


def status(session: Session) -> Status:
    control = failover.control(session)
    live = hosts.live(session)
    rows = failover.open_records(session)
    names = {host.id: host.name for host in live} | lookup.names(session, schema.host, {row.host_id for row in rows})
    waiting = session.execute(
        sa.select(schema.vm.c.name, schema.failover_vm.c.why)
        .join(schema.vm, schema.vm.c.id == schema.failover_vm.c.vm_id)
        .where(failover.IS_WAITING)
        .order_by(schema.vm.c.priority.desc(), schema.vm.c.name)
        .limit(WAITING_MAX)
    )
    return Status(
        control=control,
        host_names=names,
        silent=tuple(host for host in live if host.connectivity in UNHEARD),
        open=_views(session, rows),
        waiting=tuple(Waiting(vm=name, why=why) for name, why in waiting),
        behind=behind.state(session),
    )


def _views(session: Session, rows: Sequence[FailoverRow]) -> tuple[FailoverView, ...]:
    names = lookup.names(session, schema.host, {row.host_id for row in rows})
    counts = failover.count_vms(session, [row.id for row in rows])
    return tuple(FailoverView(row=row, host_name=names.get(row.host_id, row.host_id), counts=counts[row.id]) for row in rows)


def _outcomes(session: Session, row: FailoverRow) -> tuple[VmOutcome, ...]:
    found = failover.vms_of(session, row.id)
    names = lookup.names(session, schema.vm, {one.vm_id for one in found})
    placed = {one.vm_id: _host_of(session, one) for one in found}
    host_names = lookup.names(session, schema.host, set(filter(None, placed.values())))
    return tuple(
        VmOutcome(row=_shown(one), name=names.get(one.vm_id, one.vm_id), host_name=host_names.get(placed[one.vm_id], ""))
        for one in found
    )


def _shown(row: FailoverVmRow) -> FailoverVmRow:
    """A recovery that has begun and stands is one that waits, as `failover.IS_WAITING` says it."""
    return replace(row, state="waiting") if row.state == "starting" and row.why else row


def _host_of(session: Session, outcome: FailoverVmRow) -> str:
    if not outcome.operation_id:
        return ""
    try:
        result = operations.get(session, outcome.operation_id).result
    except NotFound:
        return ""  # operations are forgotten earlier than losses
    return str((result or {}).get("host_id", ""))


def _moments(outcome: VmOutcome) -> list[Moment]:
    row, name = outcome.row, outcome.name
    began = "waits for its restart" if row.state == "waiting" else "its restart begins"
    found = [Moment(at=row.created_at, what=f"{name}: {began}{f': {row.why}' if row.state == 'waiting' else ''}", vm=name)]
    if row.ended_at is not None:
        seconds = (row.ended_at - row.created_at).total_seconds()
        place = f" on {outcome.host_name}" if outcome.host_name else ""
        ended = f"runs{place}, {seconds:.1f} s later" if row.state == "running" else f"did not start: {row.why}"
        found.append(Moment(at=row.ended_at, what=f"{name}: {ended}", vm=name))
    return found
