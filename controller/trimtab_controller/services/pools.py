"""Pools: where volumes and images lie."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.core.model import Actor, Operation, Pool, PoolSpace
from trimtab_controller.core.way_back import USABLE, way_back
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import volume_keys
from trimtab_controller.store import describe, keyset, lookup, pools, schema
from trimtab_controller.store import volume_keys as secrets_store
from trimtab_protos.codec import as_json
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import PoolKind
from trimtab_protos.pool_messages import IscsiSource, LvmSource, NfsSource, RbdSource

# Where agents mount exports; they mount nowhere else.
MOUNTS = "/srv/trimtab-mounts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    name: str
    kind: str
    path: str
    is_shared: bool
    is_default: bool
    # What placement leaves free, in thousandths of the capacity.
    reserve_permille: int = 50
    # Of kind nfs: from where and how it is mounted; `path` is then the export's.
    nfs: NfsSource | None = None
    # Of the kinds without files: what lies behind it; `path` is then ''.
    behind: IscsiSource | LvmSource | RbdSource | None = None
    # Of what lies behind it: password or key, sealed by `create`.
    secret: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmView:
    """A vm with disks in a pool, and what becomes of it where the pool is not usable."""

    name: str
    project: str
    host: str
    state: str
    way_back: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    pool: Pool
    is_default: bool
    # By host name; '' for the space of a shared pool.
    hosts: dict[str, pools.PoolOnHost]
    spaces: dict[str, PoolSpace]
    # Of one pool that was asked for by name.
    vms: tuple[VmView, ...] = ()


def create(
    session: Session, spec: PoolSpec, *, actor: Actor, now: datetime, box: volume_keys.Sealer = volume_keys.NO_BOX
) -> tuple[PoolView, Operation]:
    """Insert the pool and accept its making on each host. AlreadyExists where name or path is taken. `box` seals its secret."""
    pool_id = mint("pool")
    path, settings = _place(session, spec, pool_id)
    if spec.is_default and pools.default_ids(session):
        raise Conflict("pool-default-taken", "is_default: another pool is the default already; delete it first")
    pool = pools.insert(
        session,
        pool_id=pool_id,
        name=spec.name,
        kind=spec.kind,
        path=path,
        is_shared=spec.is_shared or spec.nfs is not None or isinstance(spec.behind, (IscsiSource, RbdSource)),
        is_default=spec.is_default,
        reserve_permille=spec.reserve_permille,
        settings=settings,
        now=now,
    )
    if spec.secret:
        secrets_store.insert_pool_secret(session, pool.id, box.seal(spec.secret, place=pool.id), now=now)
    operation = accept(
        session,
        "pool.create",
        subject_id=pool.id,
        subject_name=pool.name,
        project_id="",
        params={"pool_id": pool.id},
        actor=actor,
        now=now,
    )
    return views(session, (pool,))[0], operation


def _place(session: Session, spec: PoolSpec, pool_id: str) -> tuple[str, dict[str, Any]]:
    """Return the pool's path on hosts and its settings. AlreadyExists where another pool has that storage."""
    if spec.behind is not None:
        return _behind(session, spec, spec.behind, pool_id)
    if spec.nfs is None:
        taken = pools.at_path(session, spec.path)
        if taken is not None:
            what = (
                f"is pool {taken.name} already" if taken.path == spec.path else f"and pool {taken.name} at {taken.path} overlap"
            )
            raise AlreadyExists("pool-path-taken", f"path: {spec.path} {what}; {_look(taken)}", field="path")
        return spec.path, {}
    mounted = pools.of_source(session, spec.nfs.server, spec.nfs.export)
    if mounted is not None:
        raise AlreadyExists(
            "pool-path-taken",
            f"path: {spec.nfs.server}:{spec.nfs.export} is pool {mounted.name} already; {_look(mounted)}",
            field="path",
        )
    return f"{MOUNTS}/{pool_id}", as_json(spec.nfs)


def _look(pool: Pool) -> str:
    return f"`trimtab pool get {pool.name}` shows where it is ready"


def _behind(
    session: Session, spec: PoolSpec, behind: IscsiSource | LvmSource | RbdSource, pool_id: str
) -> tuple[str, dict[str, Any]]:
    """Return a path that is none and what lies behind the pool. InvalidRequest: it is the default; AlreadyExists: another's."""
    if spec.is_default:
        raise InvalidRequest(
            "default-needs-files", "is_default: a pool of this kind holds no images; leave is_default out", field="is_default"
        )
    settings = as_json(behind)
    what = {key: value for key, value in settings.items() if key not in {"chap_user", "user", "monitors"}}
    for other in pools.live(session):
        if other.kind.value == spec.kind and what.items() <= dict(other.settings).items():
            taken = f"source: {source_name(spec.kind, settings)} is pool {other.name} already; {_look(other)}"
            raise AlreadyExists("pool-path-taken", taken)
    return f"/{spec.kind}/{pool_id}", settings


def source_name(kind: str, settings: Mapping[str, Any]) -> str:
    """Return what lies behind a pool, for people; '' for a directory of the hosts."""
    match kind:
        case PoolKind.NFS:
            return f"{settings['server']}:{settings['export']}"
        case PoolKind.ISCSI:
            return f"{settings['portal']} {settings['target']}"
        case PoolKind.LVM_THIN:
            return f"{settings['volume_group']}/{settings['thin_pool']}"
        case PoolKind.RBD:
            return f"{','.join(settings['monitors'])} {settings['pool']}"
    return ""


def delete(session: Session, name_or_id: str, *, expected_version: int | None, actor: Actor, now: datetime) -> Operation:
    """Accept the removal of an empty pool. Conflict names what still lies in it."""
    pool = find(session, name_or_id)
    contents = pools.dependants(session, pool.id)
    if contents:
        raise Conflict("pool-not-empty", f"pool {pool.name} still has {pools.tell(contents)}", pool=pool.name)
    pools.check_version(session, pool.id, expected_version)
    return accept(
        session,
        "pool.delete",
        subject_id=pool.id,
        subject_name=pool.name,
        project_id="",
        params={"pool_id": pool.id},
        actor=actor,
        now=now,
    )


def find(session: Session, name_or_id: str) -> Pool:
    pool = pools.find(session, name_or_id)
    if pool is None:
        raise NotFound("pool-not-found", f"there is no pool {name_or_id}", pool=name_or_id)
    return pool


def get(session: Session, name_or_id: str) -> PoolView:
    view = views(session, (find(session, name_or_id),))[0]
    return replace(view, vms=_vms(session, view))


def _vms(session: Session, view: PoolView) -> tuple[VmView, ...]:
    states = {one.host_id: one.state for one in view.hosts.values()}
    found = pools.vms_in(session, view.pool.id)
    names = lookup.names(session, schema.host, {one.host_id for one in found})
    usable = {host_id for host_id, state in states.items() if state == USABLE}
    return tuple(
        VmView(
            name=one.name,
            project=one.project,
            host=names.get(one.host_id, ""),
            state=one.observed_state,
            way_back=way_back(
                one.name,
                state=one.observed_state,
                reason=one.observed_reason,
                pool_state=states.get(one.host_id, ""),
                is_wished_paused=one.desired_power == DesiredPower.PAUSED.value,
                is_usable_elsewhere=view.pool.is_shared and bool(usable - {one.host_id}),
            ),
        )
        for one in found
    )


def page(session: Session, page: keyset.Page) -> tuple[tuple[PoolView, ...], tuple[str, str] | None]:
    found, next_after = pools.page(session, page)
    return views(session, found), next_after


def choose(session: Session, name_or_id: str, *, for_files: bool = True) -> Pool:
    """Return the named pool, else the default: the flagged one, or the only one. InvalidRequest where that is not one pool, or
    (`for_files`: images, disks made from them, what a vm boots from) not one of files."""
    if name_or_id:
        pool = find(session, name_or_id)
        if for_files and pool.kind in describe.BLOCK_KINDS:
            raise InvalidRequest(
                "pool-without-files",
                f"pool: {pool.name} is of kind {pool.kind.value} and holds no files: no images, no disks made from them; make a volume "
                f"with `trimtab volume create NAME --pool {pool.name}` and attach it",
                field="pool",
            )
        return pool
    candidates = pools.defaults(session)
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InvalidRequest(
            "pool-missing", "pool: there is no pool yet; an administrator makes one with `trimtab pool create`", field="pool"
        )
    names = ", ".join(pool.name for pool in candidates[:10])
    raise InvalidRequest("pool-ambiguous", f"pool: name one of {names}; none of them is the default", field="pool")


def views(session: Session, found: tuple[Pool, ...]) -> tuple[PoolView, ...]:
    ids = [pool.id for pool in found]
    on_hosts, spaces, defaults = pools.hosts_of(session, ids), pools.spaces_of(session, ids), pools.default_ids(session)
    host_ids = {one.host_id for states in on_hosts.values() for one in states}
    host_ids |= {one.host_id for places in spaces.values() for one in places}
    names = lookup.names(session, schema.host, host_ids)
    return tuple(
        PoolView(
            pool=pool,
            is_default=pool.id in defaults,
            hosts={names.get(one.host_id, one.host_id): one for one in on_hosts[pool.id]},
            spaces={names.get(one.host_id, one.host_id): one for one in spaces[pool.id]},
        )
        for pool in found
    )
