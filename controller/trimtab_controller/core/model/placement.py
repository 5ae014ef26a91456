"""Requests for placement and the record of decisions."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementAsk:
    """What a saga waits for; the leader's batch loop answers it."""

    operation_id: str
    vm_id: str
    project_id: str
    kind: str
    to_host_id: str
    previous_host_id: str
    state: str
    chosen_host_id: str
    epoch: int
    decision_id: str
    refusal: str
    refusal_code: str = "no-host-fits"
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    id: str
    vm_id: str
    operation_id: str
    kind: str
    chosen_host_id: str
    policy: str
    verdicts: Mapping[str, Any]
    # The newest event when the fleet was read; None of decisions that were made before it was kept.
    fleet_revision: int | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """A stored plan; `changes` is `core.planning.Plan` in its stored form."""

    id: str
    kind: str
    # open, applying, applied, incomplete, cancelled
    state: str
    changes: Mapping[str, Any]
    created_by: str
    created_at: datetime
    summary: str
    operation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStepRow:
    """How far one step of an applied plan has come."""

    plan_id: str
    position: int
    # pending, stopping, running, done, skipped, failed, cancelled
    state: str
    host_id: str
    target_host_id: str
    operation_id: str
    attempts: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintenance:
    """A host that an operator holds out of service."""

    host_id: str
    plan_id: str
    was_cordoned: bool
    created_by: str
    created_at: datetime
