"""volume.restore: one disk of a backup becomes a volume that belongs to no vm yet.

| step    | do                                                          | undo                              |
|---------|-------------------------------------------------------------|-----------------------------------|
| own     | (row and quota were taken at acceptance)                      | free name, quota and space        |
| place   | choose a host, claim the space, say where the bytes will be   | give the space back               |
| fill    | the agent's job: fill it, read it back, compare               | cancel the job, delete it         |
| finish  | record that it is there                                       | - last                            |
"""

from dataclasses import dataclass
from functools import partial

from trimtab_controller.agents.client import Job
from trimtab_controller.core.model import Backup, Pool, Volume
from trimtab_controller.operations import backup_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Stopped, Transaction, Wait, effect, transaction
from trimtab_controller.store import backup_repos, backups, describe, reach, volume_claims
from trimtab_protos.errors import Conflict, NoCapacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    volume_id: str
    backup_id: str
    disk: str


def _own(_context: Transaction[Params]) -> None:
    """The row was inserted when the request was accepted, so that the name was taken at once."""


def _disown(context: Transaction[Params]) -> None:
    volume_claims.release(context.session, describe.get_volume(context.session, context.params.volume_id), now=context.now)


def _place(context: Transaction[Params]) -> Json:
    session, params = context.session, context.params
    volume = describe.get_volume(session, params.volume_id)
    pool = describe.get_pool(session, volume.pool_id)
    repo = backup_repos.get(session, backups.get(session, params.backup_id).repo_id)
    if pool.is_shared and pool.sharing_proven_at is None:
        raise Conflict("pool-not-proven", f"pool {pool.name} is not proven to be shared; see `trimtab pool get {pool.name}`")
    reaching = reach.ready_hosts(session, pool.id) if pool.is_shared else reach.hosts_by_space(session, pool.id)
    for host in reaching:
        if repo.host_id in {"", host.id} and volume_claims.take_place(session, volume, pool, host.id):
            return {"host_id": host.id}
    raise NoCapacity(
        "pool-full",
        f"no host that is up reaches pool {pool.name} and the repository with {volume.size_bytes} bytes left beside its reserve",
    )


def _unplace(context: Transaction[Params]) -> None:
    volume_claims.leave_place(context.session, context.params.volume_id)


def _parts(context: Effect[Params]) -> tuple[str, Volume, Pool]:
    volume: Volume = context.read(partial(describe.get_volume, volume_id=context.params.volume_id))
    pool: Pool = context.read(partial(describe.get_pool, pool_id=volume.pool_id))
    return str(context.results["place"]["host_id"]), volume, pool


def _fill(context: Effect[Params]) -> Json | Wait:
    host_id, volume, pool = _parts(context)
    backup: Backup = context.read(partial(backups.get, backup_id=context.params.backup_id))
    backup_steps.open_on(context, host_id, backup.repo_id)
    job = context.agents.start_restore(
        host_id,
        backup_steps.job_key(context),
        repo_id=backup.repo_id,
        vm_id=backup.vm_id,
        backup_id=backup.id,
        disk=context.params.disk,
        volume=describe.volume_spec(volume, {}),
        pool=describe.pool_spec(pool),
    )
    return backup_steps.follow(job, f"disk {context.params.disk}", _filled)


def _filled(job: Job) -> Json:
    return {"written_bytes": job.restore.written_bytes if job.restore is not None else 0}


def _cancel_fill(context: Effect[Params]) -> Json | Wait | Stopped:
    host_id, _volume, _pool = _parts(context)
    return backup_steps.cancel(context, host_id, backup_steps.job_key(context), _filled)


def _unfill(context: Effect[Params]) -> Wait | None:
    if "place" not in context.results:
        return None
    host_id, volume, pool = _parts(context)
    ended = backup_steps.end_job(context, host_id, backup_steps.job_key(context))
    if isinstance(ended, Wait):
        return ended
    key = context.key(subject_id=volume.id)
    context.agents.delete_volume(host_id, key, volume.id, volume.format, describe.pool_spec(pool))
    return None


def _finish(context: Transaction[Params]) -> None:
    volume_claims.mark_present(context.session, [context.params.volume_id])


SAGA = Saga(
    name="volume.restore",
    version=1,
    params=Params,
    result=lambda results: {"host_id": results["place"]["host_id"], "written_bytes": results["fill"]["written_bytes"]},
    steps=(
        transaction("own", _own, _disown),
        transaction("place", _place, _unplace),
        effect("fill", _fill, _unfill, cancel=_cancel_fill),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
