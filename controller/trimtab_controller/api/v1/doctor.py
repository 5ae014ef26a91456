"""One ranked screen of everything that will hurt."""

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter
from starlette.responses import Response

from trimtab_controller.api.params import InRuntime
from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Role
from trimtab_controller.services import doctor
from trimtab_controller.services.authorise import Access, Scope

router = APIRouter(tags=["system"])


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingResource:
    # critical, warning or notice.
    severity: str
    # Stable, for example host-lost.
    kind: str
    subject: str
    message: str
    # The command that cures it, or shows more.
    cure: str
    # None where nobody wrote it down.
    since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorResource:
    # No finding is critical or a warning.
    is_healthy: bool
    # The worst first.
    findings: tuple[FindingResource, ...]
    at: datetime


@router.get("/v1/doctor", response_model=DoctorResource)
async def get_doctor(runtime: InRuntime, _access: Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]) -> Response:
    """Tell everything that will hurt, ranked, each with the command that cures it."""
    now, states = runtime.context.clock.now(), runtime.context.host_states()
    patient = await runtime.context.db.read(lambda session: doctor.read(session, now=now, host_states=states))
    found = await asyncio.to_thread(doctor.diagnose, patient)
    findings = tuple(
        FindingResource(
            severity=one.severity.value, kind=one.kind, subject=one.subject, message=one.message, cure=one.cure, since=one.since
        )
        for one in found
    )
    is_healthy = all(one.severity == "notice" for one in findings)
    return json_response(dump(DoctorResource(is_healthy=is_healthy, findings=findings, at=now)))
