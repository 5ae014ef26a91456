"""What needs no project: health, version, how to join, where Prometheus finds its targets."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Role
from trimtab_controller.release import RELEASE
from trimtab_controller.services import health, hosts
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.store import hosts as host_store
from trimtab_protos.errors import Unavailable

router = APIRouter(tags=["system"])
Public = Annotated[Access, requires(Role.VIEWER, Scope.PUBLIC)]


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthResource:
    # ok, degraded or failed.
    status: str
    # ok, or what is wrong; unknown where nobody can be asked.
    components: dict[str, str]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionResource:
    version: str
    api: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinResource:
    ca_bundle_pem: str
    join_addresses: tuple[str, ...]
    gateway_addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetGroup:
    targets: tuple[str, ...]
    labels: dict[str, str]


@router.get("/v1/health", response_model=HealthResource, responses={503: {"model": HealthResource}})
async def get_health(request: Request, _access: Public) -> Response:
    """Tell whether the control plane works; 503 where it cannot take work."""
    runtime: Runtime = request.app.state.runtime
    now = runtime.context.clock.now()
    components = {"database": "ok", "engine": "unknown", "gateway": "unknown"}
    try:
        components |= await runtime.context.db.read(lambda session: health.processes(session, now))
    except Unavailable as error:
        components["database"] = error.message
    components |= {"worker": "unknown", "redis": "unknown", **runtime.context.probes()}
    status = health.verdict(components)
    resource = HealthResource(status=status, components=components, at=now)
    return json_response(dump(resource), status=503 if status == "failed" else 200)


@router.get("/v1/version", response_model=VersionResource)
async def get_version(_access: Public) -> Response:
    return json_response(dump(VersionResource(version=RELEASE, api="v1")))


@router.get("/v1/join", response_model=JoinResource)
async def get_join(request: Request, _access: Public) -> Response:
    """Tell a machine where to join and whom to trust: it checks the bundle against the fingerprint of its paste line."""
    runtime: Runtime = request.app.state.runtime
    settings = runtime.context.settings
    resource = JoinResource(
        ca_bundle_pem=runtime.context.ca_bundle_pem(),
        join_addresses=settings.join_addresses,
        gateway_addresses=settings.gateway_addresses,
    )
    return json_response(dump(resource))


@router.get("/v1/service-discovery/prometheus", response_model=list[TargetGroup])
async def get_prometheus_targets(request: Request, _access: Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]) -> Response:
    """Return Prometheus' HTTP service discovery: every agent and this node's processes."""
    runtime: Runtime = request.app.state.runtime
    settings = runtime.context.settings

    def targets(session: Session) -> list[dict[str, Any]]:
        return hosts.discovery_targets(
            host_store.live(session),
            controller_targets=settings.controller_targets,
            agent_metrics_port=settings.agent_metrics_port,
        )

    return json_response(dump(await runtime.context.db.read(targets)))
