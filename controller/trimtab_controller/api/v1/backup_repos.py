"""Repositories of backups: of the fleet. A new one's key is shown once, and it is made when the key comes back."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller import repository_keys
from trimtab_controller.api.fields import Body, Bool, Name, Ref, RefOrNone
from trimtab_controller.api.mutate import NO_CONTENT, Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.backups import BackupRepoAnswer, BackupRepoResource, render_repo
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.security import requires
from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import backup_keys, backup_repos
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["backups"])
FleetViewer = Annotated[Access, requires(Role.VIEWER, Scope.FLEET)]
FleetAdmin = Annotated[Access, requires(Role.ADMIN, Scope.FLEET)]

RepoUrl = Annotated[str, Field(pattern=r"^(file:///|s3://)[A-Za-z0-9._/-]+$", max_length=400, examples=["file:///srv/backup"])]
Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/+=@-]*$", max_length=200, examples=["https://s3.example.org"])]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9 \n-]*$", max_length=120, examples=["ttk1-abcdefgh-ijklmnop"])]
FleetIdOrNone = Annotated[str, Field(pattern=r"^[a-z0-9-]*$", max_length=40, examples=["fleet-0123456789abcdef0123"])]


class BackupRepoBody(Body):
    """A new repository, or with `key` one that is there: its `fleet_id` is given where another fleet, which is gone, made it."""

    name: Name
    url: RepoUrl
    # The folder is on this host only.
    host: RefOrNone = ""
    # It keeps vms of this project only.
    project: RefOrNone = ""
    endpoint: Plain = ""
    region: Plain = ""
    access_key_id: Plain = ""
    secret_access_key: Plain = ""
    allow_http: Bool = False
    key: Key = ""
    fleet_id: FleetIdOrNone = ""


class ConfirmBody(Body):
    key: Key


class ReplicateBody(Body):
    to: Ref
    # 0: as fast as it goes.
    bandwidth_mib_s: Annotated[int, Field(strict=True, ge=0, le=1_000_000, examples=[100])] = 0


class PruneBody(Body):
    # Only count what would go.
    dry_run: Bool = False


@router.get("/v1/backup-repos", response_model=ListOf[BackupRepoResource])
async def list_backup_repos(runtime: InRuntime, _access: FleetViewer, query: Listing) -> Response:
    """List repositories with what is in them; filter by name, state."""
    found, after = await runtime.context.db.read(lambda session: backup_repos.page(session, query.page))
    return json_response(dump_list(BackupRepoResource, [render_repo(one) for one in found], query.next_token(after)))


@router.post("/v1/backup-repos", status_code=201, response_model=BackupRepoAnswer)
async def create_backup_repo(
    request: Request, runtime: InRuntime, access: FleetAdmin, body: BackupRepoBody, asked: Asked
) -> Response:
    """Show the key of a new repository, which is made once `:confirm` was called with it; or open one that is there."""
    box = runtime.context.secrets
    repo_id = mint("repo")
    key = repository_keys.parse_key(body.key) if body.key else repository_keys.new_key()
    spec = backup_repos.RepoSpec(
        repo_id=repo_id,
        name=body.name,
        url=body.url,
        host=body.host,
        project=body.project,
        endpoint=body.endpoint,
        region=body.region,
        access_key_id=body.access_key_id,
        allow_http=body.allow_http,
        wrapped_key=box.seal(key, place=repo_id),
        wrapped_secret=box.seal(body.secret_access_key, place=repo_id),
        key_id=repository_keys.key_id(key),
        fleet_id=body.fleet_id or box.fleet_id,
        is_adopted=bool(body.key),
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = backup_repos.create(session, spec, actor=actor, now=now)
        shown = render(operation, project_name="") if operation is not None else None
        told = BackupRepoAnswer(repo=render_repo(view), key="" if body.key else key, operation=shown)
        # A repeat is told all but the key: who did not get it deletes the row and begins again.
        stored = BackupRepoAnswer(repo=told.repo, key="", operation=shown)
        return Answer(
            status=201,
            body=dump(told),
            stored_body=dump(stored),
            has_operation=operation is not None,
            etag=etag_of(view.repo.version),
        )

    order = Order(request=request, access=access, wish=asked, verb="backup_repo.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/backup-repos/{name}", response_model=BackupRepoResource)
async def get_backup_repo(runtime: InRuntime, _access: FleetViewer, name: NamePath) -> Response:
    view = await runtime.context.db.read(lambda session: backup_repos.get(session, name))
    return json_response(dump(render_repo(view)), etag=etag_of(view.repo.version))


@router.post("/v1/backup-repos/{name}:confirm", status_code=202, response_model=BackupRepoAnswer)
async def confirm_backup_repo(request: Request, access: FleetAdmin, name: NamePath, body: ConfirmBody, asked: Asked) -> Response:
    """Give back the key that was shown: whoever has it has saved it, so the repository is made."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        given = repository_keys.key_id(repository_keys.parse_key(body.key))
        view, operation = backup_repos.confirm(session, name, key_id=given, actor=actor, now=now)
        shown = render(operation, project_name="")
        return accepted(BackupRepoAnswer(repo=render_repo(view), key="", operation=shown))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_repo.confirm", body=body), work)


@router.post("/v1/backup-repos/{name}:rotate-key", status_code=201, response_model=BackupRepoAnswer)
async def rotate_backup_repo_key(
    request: Request, runtime: InRuntime, access: FleetAdmin, name: NamePath, asked: Asked
) -> Response:
    """Show another key; the repository is locked with it once `:confirm-key` was called with it."""
    box = runtime.context.secrets
    key = repository_keys.new_key()

    def work(session: Session, _actor: Actor, _now: datetime) -> Answer:
        key_id = repository_keys.key_id(key)
        view = backup_keys.show_next(session, name, key_id=key_id, seal=lambda repo_id: box.seal(key, place=repo_id))
        shown = render_repo(view)
        # As with a new repository: a repeat is told all but the key.
        stored = dump(BackupRepoAnswer(repo=shown, key="", operation=None))
        told = dump(BackupRepoAnswer(repo=shown, key=key, operation=None))
        return Answer(status=201, body=told, stored_body=stored, etag=etag_of(view.repo.version))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_repo.rotate_key"), work)


@router.post("/v1/backup-repos/{name}:confirm-key", status_code=202, response_model=BackupRepoAnswer)
async def confirm_backup_repo_key(
    request: Request, access: FleetAdmin, name: NamePath, body: ConfirmBody, asked: Asked
) -> Response:
    """Give back the key that `:rotate-key` showed: the repository is locked with it, and the old one opens it no longer."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        given = repository_keys.key_id(repository_keys.parse_key(body.key))
        view, operation = backup_keys.confirm_next(session, name, key_id=given, actor=actor, now=now)
        return accepted(BackupRepoAnswer(repo=render_repo(view), key="", operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_repo.confirm_key", body=body), work)


@router.post("/v1/backup-repos/{name}:rebuild", status_code=202, response_model=OperationAnswer)
async def rebuild_backup_repo(request: Request, access: FleetAdmin, name: NamePath, asked: Asked) -> Response:
    """Make the rows of its backups anew from the repository and its key alone."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = backup_repos.rebuild(session, name, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_repo.rebuild"), work)


@router.post("/v1/backup-repos/{name}:replicate", status_code=202, response_model=OperationAnswer)
async def replicate_backup_repo(
    request: Request, access: FleetAdmin, name: NamePath, asked: Asked, body: ReplicateBody
) -> Response:
    """Copy what another repository does not list yet into it."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = backup_repos.replicate(session, name, body.to, bandwidth_mib_s=body.bandwidth_mib_s, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_repo.replicate", body=body), work)


@router.post("/v1/backup-repos/{name}:prune", status_code=202, response_model=OperationAnswer)
async def prune_backup_repo(request: Request, access: FleetAdmin, name: NamePath, asked: Asked, body: PruneBody) -> Response:
    """Remove what no listed backup needs, in two phases."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = backup_repos.prune(session, name, is_dry_run=body.dry_run, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name="")))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_repo.prune", body=body), work)


@router.delete("/v1/backup-repos/{name}", status_code=204)
async def delete_backup_repo(request: Request, access: FleetAdmin, name: NamePath, asked: Asked) -> Response:
    """Forget a repository that no policy uses; it stays where it lies, for who has its key."""

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        backup_repos.delete(session, name, expected_version=asked.if_match, now=now)
        return NO_CONTENT

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup_repo.delete"), work)
