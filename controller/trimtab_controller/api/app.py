"""Puts the REST API together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from trimtab_controller.api import docs, problems
from trimtab_controller.api.context import ApiContext
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import check_declarations
from trimtab_controller.api.shell import Shell
from trimtab_controller.api.v1 import (
    audit,
    backup_files,
    backup_instants,
    backup_repos,
    backups,
    consoles,
    doctor,
    events,
    failover,
    floating,
    hosts,
    images,
    networks,
    operations,
    placement,
    plans,
    pools,
    projects,
    recovery_plans,
    routers,
    secgroups,
    snapshots,
    system,
    templates,
    users,
    vm_adoption,
    vm_changes,
    vm_groups,
    vm_verbs,
    vms,
    volumes,
)
from trimtab_controller.release import RELEASE
from trimtab_protos.errors import TrimtabError

# Verbs before what they would be mistaken for: `{name}` also matches `web1:explain`. What is read most often first: each request is
# held against one route after the other, a third of a millisecond for all of them.
ROUTERS = (
    docs.router,
    system.router,
    operations.router,
    events.router,
    snapshots.router,
    templates.router,  # a verb of vms is among them
    vm_adoption.router,
    vm_changes.router,
    consoles.router,  # and here
    vm_verbs.router,
    vms.router,
    plans.router,  # verbs of hosts are among them
    failover.router,  # here too
    hosts.router,
    volumes.router,
    vm_groups.router,
    secgroups.router,
    placement.router,
    doctor.router,
    projects.router,
    users.router,
    audit.router,
    pools.router,
    networks.router,
    routers.router,
    floating.router,
    images.router,
    backup_files.router,
    backup_instants.router,
    backup_repos.router,
    recovery_plans.router,
    backups.router,
)


def create_app(context: ApiContext) -> FastAPI:
    """Return the application. TypeError where a route declares no right: such a route is never served."""
    runtime = Runtime(context)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        runtime.start()
        try:
            yield
        finally:
            await runtime.stop()

    app = FastAPI(
        title="Trimtab",
        version=RELEASE,
        description="A control plane for fleets of KVM hosts: explain, plan, apply, verify, record.",
        openapi_url=None,  # served by docs.py: FastAPI's own pages load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.runtime = runtime
    for router in ROUTERS:
        app.router.routes.extend(router.routes)
    check_declarations(list(app.routes))
    app.openapi = lambda: docs.document(app)  # type: ignore[method-assign]
    _translate_errors(app)
    app.add_middleware(Shell, runtime=runtime)
    return app


def _translate_errors(app: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, TrimtabError)
        return problems.of_error(error, request_id=request.state.request_id)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problems.of_validation(error, request, request_id=request.state.request_id)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problems.of_http(error, request_id=request.state.request_id)

    app.add_exception_handler(TrimtabError, on_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
