"""Everything that will hurt, ranked, each with the command that cures it."""

import asyncio
from typing import Annotated

from fastapi import APIRouter
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.params import InRuntime
from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.resources.doctor import DoctorResource, render_doctor
from trimtab_controller.api.security import requires
from trimtab_controller.core.doctor import Finding, FleetFacts
from trimtab_controller.core.model import Role
from trimtab_controller.core.planning import Estate
from trimtab_controller.services import doctor, survival
from trimtab_controller.services.authorise import Access, Scope

router = APIRouter(tags=["doctor"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]


@router.get("/v1/doctor", response_model=DoctorResource)
async def get_doctor(runtime: InRuntime, _access: FleetViewer) -> Response:
    """Examine the fleet: everything that will hurt, worst first. Takes seconds for a large fleet."""
    context = runtime.context
    now = context.clock.now()

    def read(session: Session) -> tuple[FleetFacts, Estate]:
        return doctor.read(session, now=now), survival.read(session, now=now)

    facts, estate = await context.db.read(read)
    skews_ms = doctor.skews_of(context.host_states())

    def work() -> tuple[Finding, ...]:
        return doctor.judge(facts, uncovered=doctor.prove(estate), skews_ms=skews_ms)

    found = await asyncio.to_thread(work)
    return json_response(dump(render_doctor(found, at=now)))
