"""Losses of hosts, what failover is doing, and power devices, as JSON. Secrets are in none of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.core.failover.drill import Assumptions, Drill
from trimtab_controller.services.failover_view import FailoverView, Status
from trimtab_controller.services.fencing import FenceView


@dataclass(frozen=True, slots=True, kw_only=True)
class FencePathResource:
    host: str
    name: str
    # From 1; they are tried in this order.
    order: int
    agent: str
    options: dict[str, str]
    has_secret: bool
    # The last readiness test: on, off, unknown; '' : never tested. It never switches anything.
    power: str
    # Whether it could be relied on: it answered, and what it said is not contradicted by the host's heartbeats.
    is_ready: bool
    message: str
    tested_at: datetime | None
    # A test is asked for and not made yet.
    is_test_due: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FencePathsResource:
    items: tuple[FencePathResource, ...]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentResource:
    at: datetime
    what: str
    # Set on the line that made certain that the host cannot write: clean_stop, power_off, lease_bound, operator.
    proof: str
    vm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmOutcomeResource:
    vm: str
    vm_id: str
    # waiting, starting, running, failed.
    state: str
    why: str
    host: str
    operation: str
    started_at: datetime
    ended_at: datetime | None
    # From the beginning of its restart; None while it lasts.
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverResource:
    id: str
    host: str
    host_id: str
    # lost, fenced, returned.
    state: str
    proof: str
    # When the host was held for lost, proven off, and back.
    created_at: datetime
    fenced_at: datetime | None
    returned_at: datetime | None
    # Vms by state.
    vms: dict[str, int]
    # Only where one is asked for.
    timeline: tuple[MomentResource, ...]
    outcomes: tuple[VmOutcomeResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordResource:
    """What an operator said of a host."""

    host: str
    by: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentHostResource:
    host: str
    connectivity: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingVmResource:
    vm: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverStatusResource:
    # Neither paused nor frozen, and the database not behind.
    is_active: bool
    is_paused: bool
    # Why it stands still by itself; ''.
    frozen: str
    # Why the database is held for older than the fleet, so that nothing may be changed; '' where it is not.
    database_behind: str
    database_behind_since: datetime | None
    silent: tuple[SilentHostResource, ...]
    released: tuple[WordResource, ...]
    confirmed_off: tuple[WordResource, ...]
    waiting: tuple[WaitingVmResource, ...]
    # Losses that are not over.
    failovers: tuple[FailoverResource, ...]
    at: datetime


def render_paths(found: tuple[FenceView, ...], *, at: datetime) -> FencePathsResource:
    return FencePathsResource(items=tuple(render_path(one) for one in found), at=at)


def render_path(view: FenceView) -> FencePathResource:
    path = view.path
    return FencePathResource(
        host=view.host_name,
        name=path.name,
        order=path.position + 1,
        agent=path.agent,
        options=dict(path.options),
        has_secret=bool(path.secret or path.secret_file),
        power=path.test_power,
        is_ready=path.is_ready,
        message=path.test_message,
        tested_at=path.tested_at,
        is_test_due=path.is_test_due,
    )


def render_failover(view: FailoverView) -> FailoverResource:
    row = view.row
    return FailoverResource(
        id=row.id,
        host=view.host_name,
        host_id=row.host_id,
        state=row.state,
        proof=row.proof,
        created_at=row.created_at,
        fenced_at=row.fenced_at,
        returned_at=row.returned_at,
        vms=dict(view.counts),
        timeline=tuple(MomentResource(at=one.at, what=one.what, proof=one.proof, vm=one.vm) for one in view.timeline),
        outcomes=tuple(
            VmOutcomeResource(
                vm=one.name,
                vm_id=one.row.vm_id,
                state=one.row.state,
                why=one.row.why,
                host=one.host_name,
                operation=one.row.operation_id,
                started_at=one.row.created_at,
                ended_at=one.row.ended_at,
                seconds=round((one.row.ended_at - one.row.created_at).total_seconds(), 1) if one.row.ended_at else None,
            )
            for one in view.vms
        ),
    )


def render_status(status: Status, *, at: datetime) -> FailoverStatusResource:
    control, names = status.control, status.host_names

    def words(said: object) -> tuple[WordResource, ...]:
        assert isinstance(said, dict)
        return tuple(
            WordResource(host=names.get(host_id, host_id), by=str(one["by"]), reason=str(one["reason"]))
            for host_id, one in sorted(said.items())
        )

    return FailoverStatusResource(
        is_active=not control.is_paused and not control.frozen and not status.behind.is_in_force,
        is_paused=control.is_paused,
        frozen=control.frozen,
        database_behind=status.behind.message,
        database_behind_since=status.behind.since,
        silent=tuple(
            SilentHostResource(host=one.name, connectivity=one.connectivity.value, since=one.connectivity_at)
            for one in status.silent
        ),
        released=words(control.released),
        confirmed_off=words(control.confirmed_off),
        waiting=tuple(WaitingVmResource(vm=one.vm, why=one.why) for one in status.waiting),
        failovers=tuple(render_failover(one) for one in status.open),
        at=at,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillOutcomeResource:
    vm: str
    # From the cut to its start having ended; None: it does not come back by itself, and `why`.
    seconds: float | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillResource:
    host: str
    # From the cut; None where it does not get so far.
    lost_s: float | None
    fenced_s: float | None
    proof: str
    # Why failover would stand still; ''.
    frozen: str
    # 0 to 100: the share of the kept vms that come back.
    score: float
    median_s: float | None
    max_s: float | None
    outcomes: tuple[DrillOutcomeResource, ...]
    # What was assumed, in seconds: revoke, power, place, boot.
    assumptions: dict[str, float]
    at: datetime


def render_drill(drill: Drill, *, host: str, names: Mapping[str, str], assumptions: Assumptions, at: datetime) -> DrillResource:
    return DrillResource(
        host=host,
        lost_s=drill.lost_s,
        fenced_s=drill.fenced_s,
        proof=drill.proof,
        frozen=drill.frozen,
        score=drill.score,
        median_s=drill.median_s,
        max_s=drill.max_s,
        outcomes=tuple(
            DrillOutcomeResource(vm=names.get(one.vm, one.vm), seconds=one.seconds, why=one.why) for one in drill.outcomes
        ),
        assumptions={
            "revoke": assumptions.revoke_s,
            "power": assumptions.power_s,
            "place": assumptions.place_s,
            "boot": assumptions.boot_s,
        },
        at=at,
    )
