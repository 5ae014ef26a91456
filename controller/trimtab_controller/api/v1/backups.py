"""Backups of a project's vms, and the policies that make them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api import lists
from trimtab_controller.api.fields import Body, Bool, Name, Ref, RefOrNone
from trimtab_controller.api.mutate import NO_CONTENT, Order, accepted, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.backups import (
    BackupAnswer,
    BackupPolicyResource,
    BackupResource,
    ProtectionResource,
    render_backup,
    render_policy,
    render_protection,
)
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, OperationResource, render
from trimtab_controller.api.resources.vms import VmAnswer, render_vm
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import backup_policies, backup_restore, backup_status, backups, vm_power
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["backups"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]

Keep = Annotated[int, Field(strict=True, ge=0, le=10_000, examples=[7])]
Mib = Annotated[int, Field(strict=True, ge=0, le=1_000_000, examples=[100])]
Seconds = Annotated[int, Field(strict=True, ge=0, le=10 * 366 * 86400, examples=[90000])]
Schedule = Annotated[str, Field(pattern=r"^[ -~]{1,120}$", max_length=120, examples=["0 2 * * *"])]
Zone = Annotated[str, Field(pattern=r"^[A-Za-z0-9_+/-]{1,64}$", max_length=64, examples=["Europe/Berlin"])]
Pattern = Annotated[str, Field(pattern=r"^[ -~]*$", max_length=200, examples=["login:"])]
# 0: none.
TcpPort = Annotated[int, Field(strict=True, ge=0, le=65535, examples=[22])]
Proof = Literal["none", "read", "boot"]
CpuModelOrAuto = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,79})?$", examples=["auto"])]
Renamed = Annotated[dict[Ref, Ref], Field(max_length=64, examples=[{"local": "fast"}])]


class BackupPolicyBody(Body):
    name: Name
    schedule: Schedule
    zone: Zone = "UTC"
    # Each vm begins up to so much later, always the same.
    jitter_s: Annotated[int, Field(strict=True, ge=0, le=86400, examples=[600])] = 0
    repo: RefOrNone = ""
    keep_last: Keep = 0
    keep_hourly: Keep = 0
    keep_daily: Keep = 0
    keep_weekly: Keep = 0
    keep_monthly: Keep = 0
    keep_yearly: Keep = 0
    verify: Proof = "none"
    # Of a boot test, all of it: a regular expression on the serial port, a TCP port that answers; of neither, the guest agent.
    verify_pattern: Pattern = ""
    verify_tcp: TcpPort = 0
    needs_filesystem: Bool = False
    # Fail where the guest has no hook that holds its applications, or where it fails.
    needs_application: Bool = False
    bandwidth_mib_s: Mib = 0
    # All its vms at one instant.
    is_together: Bool = False
    # A vm whose disks are lost with its host comes back from its last good backup by itself.
    recovers_lost: Bool = False
    max_age_s: Seconds = 0


class BackupBody(Body):
    """What is left out is as the vm's policy says."""

    vm: Ref
    repo: RefOrNone = ""
    needs_filesystem: Bool | None = None
    needs_application: Bool | None = None
    bandwidth_mib_s: Mib | None = None
    verify: Proof | None = None


class RestoreVolumeBody(Body):
    name: Name
    # As the vm names it.
    disk: Annotated[str, Field(pattern=r"^[a-z]{2,8}$", max_length=8, examples=["vda"])]
    pool: RefOrNone = ""


class ReplaceBody(Body):
    vm: Ref


class VerifyBody(Body):
    # Restore it to a vm without a network and wait for its guest agent, or for the pattern on its serial port and the TCP port.
    boot: Bool = False
    boot_pattern: Pattern = ""
    boot_tcp: TcpPort = 0
    boot_timeout_s: Annotated[int, Field(strict=True, ge=1, le=3600, examples=[300])] = 300


class RestoreBody(Body):
    """A new vm of this name. Pools and networks keep their names unless they are renamed here."""

    name: Name
    to_host: RefOrNone = ""
    pools: Renamed = Field(default_factory=dict)
    networks: Renamed = Field(default_factory=dict)
    # '' as it was, `auto` chosen anew.
    cpu_model: CpuModelOrAuto = ""
    start: Bool = True
    # It runs on the backup at once; its disks are filled while it does, so fast at most (0: as fast as it goes).
    instant: Bool = False
    bandwidth_mib_s: Mib = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedAnswer:
    # None for a backup that came to nothing: only its row was there.
    operation: OperationResource | None


class HoldBody(Body):
    # None lets it go again.
    until: Annotated[datetime, Field(examples=["2027-01-01T00:00:00Z"])] | None = None


async def newest_first(
    request: Request,
    page_size: lists.PageSize = lists.PAGE_SIZE,
    page_token: lists.PageToken = "",
    filter_text: lists.FilterText = "",
    order_by: lists.OrderBy = "",
) -> lists.ListQuery:
    return lists.parse(
        request,
        page_size=page_size,
        page_token=page_token,
        filter_text=filter_text,
        selector="",
        order_by=order_by or "created_at desc",
    )


NewestFirst = Annotated[lists.ListQuery, Depends(newest_first)]


# --- policies ----------------------------------------------------------------------------------------------------------------


@router.get("/v1/projects/{project}/backup-policies", response_model=ListOf[BackupPolicyResource])
async def list_backup_policies(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's policies with the vms that have them; filter by name, repo."""
    owner, now = access.own_project, runtime.context.clock.now()
    found, after = await runtime.context.db.read(
        lambda session: backup_policies.page(session, query.page, project=owner, now=now)
    )
    return json_response(dump_list(BackupPolicyResource, [render_policy(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/backup-policies", status_code=201, response_model=BackupPolicyResource)
async def create_backup_policy(request: Request, access: ProjectOperator, body: BackupPolicyBody, asked: Asked) -> Response:
    owner = access.own_project
    spec = backup_policies.PolicySpec(**body.model_dump(exclude={"request_id"}))

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        view = backup_policies.create(session, spec, project=owner, now=now)
        return answered(render_policy(view), status=201, version=view.policy.version)

    order = Order(request=request, access=access, wish=asked, verb="backup_policy.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/backup-policies/{name}", response_model=BackupPolicyResource)
async def get_backup_policy(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner, now = access.own_project, runtime.context.clock.now()
    view = await runtime.context.db.read(lambda session: backup_policies.get(session, name, project=owner, now=now))
    return json_response(dump(render_policy(view)), etag=etag_of(view.policy.version))


@router.delete("/v1/projects/{project}/backup-policies/{name}", status_code=204)
async def delete_backup_policy(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Remove a policy that no vm has; what it made stays."""
    owner = access.own_project

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        backup_policies.delete(session, name, project=owner, expected_version=asked.if_match, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_policy.delete"), work)


# --- backups -----------------------------------------------------------------------------------------------------------------


@router.get("/v1/projects/{project}/backup-status", response_model=ListOf[ProtectionResource])
async def get_backup_status(runtime: InRuntime, access: ProjectViewer) -> Response:
    """Show of each vm what would be lost now, what was proven of its backups, and what is wrong with that."""
    now = runtime.context.clock.now()
    found = await runtime.context.db.read(
        lambda session: backup_status.status(session, project_ids=(access.project_id,), now=now)
    )
    return json_response(dump_list(ProtectionResource, [render_protection(one) for one in found], ""))


@router.get("/v1/projects/{project}/backups", response_model=ListOf[BackupResource])
async def list_backups(runtime: InRuntime, access: ProjectViewer, query: NewestFirst) -> Response:
    """List the project's backups, newest first; filter by vm, repo, state."""
    owner, now = access.own_project, runtime.context.clock.now()
    found, after = await runtime.context.db.read(lambda session: backups.page(session, query.page, project=owner))
    items = [render_backup(one, now=now) for one in found]
    return json_response(dump_list(BackupResource, items, query.next_token(after)))


@router.post("/v1/projects/{project}/backups", status_code=202, response_model=BackupAnswer)
async def run_backup(request: Request, access: ProjectOperator, body: BackupBody, asked: Asked) -> Response:
    """Back a vm up now, running or stopped."""
    owner = access.own_project
    spec = backups.RunSpec(
        repo=body.repo,
        needs_filesystem=body.needs_filesystem,
        needs_application=body.needs_application,
        bandwidth_mib_s=body.bandwidth_mib_s,
        verify=body.verify,
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, body.vm, project=owner)
        view, operation = backups.run(session, vm, spec, project_id=owner.id, actor=actor, now=now)
        shown = render(operation, project_name=owner.name)
        return accepted(BackupAnswer(operation=shown, backup=render_backup(view, now=now)))

    order = Order(request=request, access=access, wish=asked, verb="backup.run", body=body, name=body.vm)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/backups/{name}", response_model=BackupResource)
async def get_backup(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    """Show a backup by its id, or the end of it."""
    owner, now = access.own_project, runtime.context.clock.now()
    view = await runtime.context.db.read(lambda session: backups.get(session, name, project=owner))
    return json_response(dump(render_backup(view, now=now)))


@router.post("/v1/projects/{project}/backups/{name}:verify", status_code=202, response_model=OperationAnswer)
async def verify_backup(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: VerifyBody) -> Response:
    """Read everything that a backup needs and check it; with `boot` restore it and wait for its guest to come up."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        backup = backups.listed(session, name, project=owner)
        if body.boot:
            operation = backup_restore.boot_test(
                session,
                backup,
                project=owner,
                pattern=body.boot_pattern,
                tcp_port=body.boot_tcp,
                timeout_s=body.boot_timeout_s,
                actor=actor,
                now=now,
            )
        else:
            operation = backups.accept_verify(session, backup, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup.verify", body=body), work)


@router.post("/v1/projects/{project}/backups/{name}:hold", response_model=BackupResource)
async def hold_backup(request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: HoldBody) -> Response:
    """Keep a backup from being pruned until an instant, or let it go again."""
    owner = access.own_project

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        return answered(render_backup(backups.hold(session, name, body.until, project=owner), now=now))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup.hold", body=body), work)


@router.post("/v1/projects/{project}/backups/{name}:restore", status_code=202, response_model=VmAnswer)
async def restore_backup(
    request: Request, runtime: InRuntime, access: ProjectOperator, name: NamePath, body: RestoreBody, asked: Asked
) -> Response:
    """Make a new vm of a backup, with an identity of its own."""
    owner = access.own_project
    spec = backup_restore.RestoreSpec(
        name=body.name,
        to_host=body.to_host,
        pools=body.pools,
        networks=body.networks,
        cpu_model=body.cpu_model,
        start=body.start,
        is_instant=body.instant,
        bandwidth_mib_s=body.bandwidth_mib_s,
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = backup_restore.restore(session, name, spec, project=owner, actor=actor, now=now)
        return accepted(
            VmAnswer(
                operation=render(operation, project_name=owner.name),
                vm=render_vm(view, now=now, heard=runtime.context.heard()),
                would_be_placed_on="",
                placement_summary="",
            )
        )

    order = Order(request=request, access=access, wish=asked, verb="backup.restore", body=body, name=body.name)
    return await mutate(order, work)


@router.post("/v1/projects/{project}/backups/{name}:restore-volume", status_code=202, response_model=OperationAnswer)
async def restore_volume(
    request: Request, access: ProjectOperator, name: NamePath, body: RestoreVolumeBody, asked: Asked
) -> Response:
    """Make a volume of one disk of a backup."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = backup_restore.restore_volume(
            session, name, body.disk, body.name, body.pool, project=owner, actor=actor, now=now
        )
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    order = Order(request=request, access=access, wish=asked, verb="backup.restore_volume", body=body, name=body.name)
    return await mutate(order, work)


@router.post("/v1/projects/{project}/backups/{name}:replace", status_code=202, response_model=OperationAnswer)
async def replace_vm(request: Request, access: ProjectOperator, name: NamePath, body: ReplaceBody, asked: Asked) -> Response:
    """Take a stopped vm back to what a backup of it holds; what it has on its disks now is lost."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, body.vm, project=owner)
        operation = backup_restore.replace(session, name, vm, project=owner, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    order = Order(request=request, access=access, wish=asked, verb="backup.replace", body=body, name=body.vm)
    return await mutate(order, work)


@router.delete("/v1/projects/{project}/backups/{name}", status_code=202, response_model=DeletedAnswer)
async def delete_backup(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Take a backup off the list; what only it needs goes with the next prune."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = backups.delete(session, name, project=owner, actor=actor, now=now)
        shown = render(operation, project_name="") if operation is not None else None
        return accepted(DeletedAnswer(operation=shown))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup.delete"), work)
