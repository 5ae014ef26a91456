"""What the scheduler would have made of the past."""

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from trimtab_controller.api.params import InRuntime
from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Role
from trimtab_controller.core.placement.journal_replay import replay_journal
from trimtab_controller.core.placement.policies import policy_named
from trimtab_controller.services import placement_replay
from trimtab_controller.services.authorise import Access, Scope
from trimtab_protos.errors import InvalidRequest

router = APIRouter(tags=["placement"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]
Since = Annotated[datetime, Query(description="With a time zone.", examples=["2026-11-20T02:00:00Z"])]
PolicyName = Annotated[str, Query(max_length=40, pattern=r"^[a-z][a-z0-9-]{0,39}$", examples=["spread"])]


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalReplayResource:
    """The fleet's own decisions under another policy, beside what came of them then."""

    policy: str
    since: datetime
    until: datetime
    decisions: int
    placements: int
    refused: int
    refused_then: int
    # Of the vms that were placed both times.
    same_host: int
    peak_hosts: int
    peak_hosts_then: int
    time_avg_hosts: float
    time_avg_hosts_then: float
    cpu_s: float
    decision_us_p50: float


@router.get("/v1/placement-replay", response_model=JournalReplayResource)
async def replay_placement(runtime: InRuntime, _access: FleetViewer, since: Since, policy: PolicyName = "best-fit") -> Response:
    """Place what was placed since then once more, by another policy, on the hosts that there are; changes nothing.

    Left out, since they would not have been the same: live migrations, cordons, lost hosts, space of disks.
    """
    chosen, now = policy_named(policy), runtime.context.clock.now()
    if since.tzinfo is None:
        raise InvalidRequest("instant-naive", "since: give a time zone, for example 2026-11-20T02:00:00Z", field="since")
    history = await runtime.context.db.read(lambda session: placement_replay.read(session, since=since))
    report = await asyncio.to_thread(
        replay_journal,
        history.fleet,
        history.events,
        policy=chosen,
        until_s=now.timestamp(),
        cpu_time_ns=time.thread_time_ns,
    )
    decisions = sum(1 for event in history.events if event.request is not None and not event.is_before)
    shown = JournalReplayResource(policy=policy, since=since, until=now, decisions=decisions, **report.as_json())
    return json_response(dump(shown))
