"""Recovery plans and their runs as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.api.render import etag_of
from trimtab_controller.core.recovery_plans import Run
from trimtab_controller.services.recovery_plans import PlanView


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryGroupResource:
    name: str
    vms: tuple[str, ...]
    # After the group before is back.
    delay_s: int
    # started, agent, pattern.
    awaits: str
    pattern: str
    # Where its boot test is answered; 0: nowhere.
    tcp: int
    timeout_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredVmResource:
    vm: str
    # waiting, running, present (one of its name is here), back, failed.
    outcome: str
    backup: str
    operation: str
    # What it loses by coming back from this backup, as of the beginning of the run.
    loss_window_s: float
    recovery_ms: int
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredGroupResource:
    name: str
    vms: tuple[RecoveredVmResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRunResource:
    # '' of a preview.
    operation: str
    # test or real.
    mode: str
    # planned, running, done, stopped (a group did not come back), cancelled.
    state: str
    problem: str
    began_at: str
    groups: tuple[RecoveredGroupResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlanResource:
    id: str
    name: str
    project: str
    repo: str
    groups: tuple[RecoveryGroupResource, ...]
    # Names in the backups -> names here.
    networks: dict[str, str]
    pools: dict[str, str]
    cpu_model: str
    # None before the first.
    last_run: RecoveryRunResource | None
    version: int
    etag: str
    created_at: datetime


def render_plan(view: PlanView) -> RecoveryPlanResource:
    plan = view.plan
    return RecoveryPlanResource(
        id=plan.id,
        name=plan.name,
        project=view.project_name,
        repo=view.repo_name,
        groups=tuple(
            RecoveryGroupResource(
                name=group.name,
                vms=tuple(group.vms),
                delay_s=group.delay_s,
                awaits=group.awaits.value,
                pattern=group.pattern,
                tcp=group.tcp,
                timeout_s=group.timeout_s,
            )
            for group in view.groups
        ),
        networks=dict(plan.networks),
        pools=dict(plan.pools),
        cpu_model=plan.cpu_model,
        last_run=_written(plan.last_run) if plan.last_run else None,
        version=plan.version,
        etag=etag_of(plan.version),
        created_at=plan.created_at,
    )


def render_preview(run: Run, *, mode: str) -> RecoveryRunResource:
    groups = tuple(
        RecoveredGroupResource(
            name=group.name,
            vms=tuple(
                RecoveredVmResource(
                    vm=one.vm,
                    outcome=one.outcome.value,
                    backup=one.backup_id,
                    operation="",
                    loss_window_s=round(one.loss_window_s, 1),
                    recovery_ms=0,
                    problem=one.problem,
                )
                for one in group.vms
            ),
        )
        for group in run.groups
    )
    return RecoveryRunResource(operation="", mode=mode, state="planned", problem="", began_at="", groups=groups)


def _written(run: Mapping[str, Any]) -> RecoveryRunResource:
    return RecoveryRunResource(
        operation=run["operation_id"],
        mode=run["mode"],
        state=run["state"],
        problem=run["problem"],
        began_at=run["began_at"],
        groups=tuple(
            RecoveredGroupResource(
                name=group["name"],
                vms=tuple(
                    RecoveredVmResource(
                        vm=one["vm"],
                        outcome=one["outcome"],
                        backup=one["backup_id"],
                        operation=one["operation_id"],
                        loss_window_s=round(one["loss_window_s"], 1),
                        recovery_ms=one["recovery_ms"],
                        problem=one["problem"],
                    )
                    for one in group["vms"]
                ),
            )
            for group in run["groups"]
        ),
    )
