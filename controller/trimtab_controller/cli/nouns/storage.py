"""`trimtab pool` and `trimtab volume`."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.nouns import pool_create, pool_drain
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DISK_SIZE


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


def _size(item: Document, _now: datetime) -> str:
    return humanise.size(item.get("size_bytes"))


def _allocated(item: Document, _now: datetime) -> str:
    return humanise.size(item.get("allocated_bytes"))


def _describe_pool(item: Document) -> None:
    moment = render.now()
    render.pairs(
        [
            ("name", str(item.get("name", ""))),
            ("id", str(item.get("id", ""))),
            ("kind", str(item.get("kind", ""))),
            ("path", str(item.get("path", ""))),
            *([("mounted from", str(item.get("source")))] if item.get("source") else []),
            ("shared", render.as_text(item.get("is_shared"))),
            ("default", render.as_text(item.get("is_default"))),
            ("sharing proved", humanise.since(item.get("sharing_proven_at"), moment)),
            ("created", _created(item, moment)),
        ]
    )
    render.heading("space")
    render.pairs([("all" if not item.get("is_shared") else "shared", _space(item.get("space") or {}, moment))], indent="  ")
    render.pairs(
        [
            ("claimed", f"{humanise.size(render.at(item, 'space.claimed_bytes'))} by volumes at their full size"),
            ("reserve", f"{(item.get('reserve_permille') or 0) / 10:g} % is left free by placement"),
        ],
        indent="  ",
    )
    hosts = item.get("hosts") or []
    if hosts:
        render.heading("hosts")
        rows = [
            [
                str(one.get("host", "")),
                str(one.get("state") or "unknown"),
                _space(one.get("space") or {}, moment),
                str(one.get("problem") or ""),
            ]
            for one in hosts
        ]
        render.table(["HOST", "STATE", "SPACE", "PROBLEM"], [[humanise.plain(cell) for cell in row] for row in rows])
    vms = item.get("vms") or []
    if vms:
        render.heading("vms")
        cells = [[str(one.get(key) or "") for key in ("name", "project", "host", "state", "way_back")] for one in vms]
        render.table(["VM", "PROJECT", "HOST", "STATE", "WAY BACK"], [[humanise.plain(cell) for cell in row] for row in cells])


def _space(one: Mapping[str, Any], moment: datetime) -> str:
    """Return used space as a bar with its age; `unknown` where it was never observed."""
    capacity, available = one.get("capacity_bytes") or 0, one.get("available_bytes") or 0
    if not one.get("observed_at"):
        return "unknown"
    bar = humanise.bar(capacity - available, capacity)
    seen = humanise.since(one.get("observed_at"), moment)
    return f"{bar}  {humanise.size(available)} of {humanise.size(capacity)} free, observed {seen}"


POOL = Resource(
    noun="pool",
    collection="pools",
    is_fleet=True,
    columns=(
        Column("name", "name"),
        Column("kind", "kind"),
        Column("shared", "is_shared"),
        Column("path", "path"),
        Column("capacity", "space.capacity_bytes", lambda item, _now: humanise.size(render.at(item, "space.capacity_bytes"))),
        Column("available", "space.available_bytes", lambda item, _now: humanise.size(render.at(item, "space.available_bytes"))),
        Column("default", "is_default", is_wide=True),
        Column(
            "claimed",
            "space.claimed_bytes",
            lambda item, _now: humanise.size(render.at(item, "space.claimed_bytes")),
            is_wide=True,
        ),
        Column("source", "source", is_wide=True),
        Column("id", "id", is_wide=True),
        Column("created", "created_at", _created, is_wide=True),
    ),
    describe=_describe_pool,
)

VOLUME = Resource(
    noun="volume",
    collection="volumes",
    columns=(
        Column("name", "name"),
        Column("size", "size_bytes", _size),
        Column("used", "allocated_bytes", _allocated),
        Column("pool", "pool"),
        Column("host", "host"),
        Column("vm", "vm"),
        Column("state", "state"),
        Column("format", "format", is_wide=True),
        Column("image", "image", is_wide=True),
        Column("encrypted", "is_encrypted", is_wide=True),
        Column("id", "id", is_wide=True),
        Column("created", "created_at", _created, is_wide=True),
    ),
)

_pool_name = click.argument("name", shell_complete=completion.names_of("pools"))
_volume_name = click.argument("name", shell_complete=completion.names_of("volumes"))


@click.group()
def pool() -> None:
    """Storage pools."""


@pool.command("list")
@options.lists
@click.pass_obj
def list_pools(session: Session) -> None:
    """List pools. Filter by name, kind, is_shared."""
    resources.list_all(session, POOL)


@pool.command("get")
@_pool_name
@options.reads
@click.pass_obj
def get_pool(session: Session, name: str) -> None:
    """Show a pool with its state and space on each host."""
    resources.get_one(session, POOL, name)


pool_create.add_to(pool, POOL)


@pool.command("delete")
@_pool_name
@options.destroys
@options.runs
@click.pass_obj
def delete_pool(session: Session, name: str) -> None:
    """Forget an empty pool; the directory stays."""
    session.confirm(f"Delete pool {name}?")
    resources.run(session, "DELETE", POOL.place(session, name), sentence=lambda _: f"pool {name} deleted")


pool_drain.add_to(pool, _pool_name)


@click.group()
def volume() -> None:
    """Volumes: disks apart from vms."""


@volume.command("list")
@options.lists
@click.pass_obj
def list_volumes(session: Session) -> None:
    """List volumes. Filter by name, vm, pool, image."""
    resources.list_all(session, VOLUME)


@volume.command("get")
@_volume_name
@options.reads
@click.pass_obj
def get_volume(session: Session, name: str) -> None:
    """Show a volume."""
    resources.get_one(session, VOLUME, name)


@volume.command("create")
@click.argument("name")
@click.option("--size", type=DISK_SIZE, metavar="SIZE", help="For example 20GiB; may be left out with --image.")
@click.option(
    "--pool",
    "pool_name",
    metavar="NAME",
    shell_complete=completion.names_of("pools"),
    help="Where it lives; else the default pool.",
)
@click.option("--format", "volume_format", type=click.Choice(["qcow2", "raw"]), help="qcow2 unless told otherwise.")
@click.option("--image", metavar="NAME", shell_complete=completion.names_of("images"), help="A clone of this image.")
@click.option("--lun", type=click.IntRange(0, 255), help="Of an iSCSI pool: which LUN it is; what is on it stays.")
@click.option("--encrypted", is_flag=True, help="Its bytes lie encrypted; of an image it is a copy then, not a linked clone.")
@options.runs
@click.pass_obj
def create_volume(
    session: Session,
    name: str,
    size: int | None,
    pool_name: str | None,
    volume_format: str | None,
    image: str | None,
    encrypted: bool,
    lun: int | None,
) -> None:
    """Create a volume, empty or a clone of an image."""
    if size is None and image is None:
        raise click.UsageError("give --size, for example --size 20GiB, or --image")
    optional = {"size_bytes": size, "pool": pool_name, "format": volume_format, "image": image, "lun": lun}
    body: dict[str, Any] = {"name": name, **{key: value for key, value in optional.items() if value is not None}}
    body |= {"is_encrypted": True} if encrypted else {}
    resources.run(
        session,
        "POST",
        VOLUME.place(session),
        body,
        reread=lambda: resources.read(session, VOLUME, name),
        sentence=lambda item: f"volume {name} is ready, {humanise.size(item.get('size_bytes'))} in pool {item.get('pool', '')}",
        resource=VOLUME,
    )


@volume.command("resize")
@_volume_name
@click.argument("size", type=DISK_SIZE)
@options.runs
@click.pass_obj
def resize_volume(session: Session, name: str, size: int) -> None:
    """Grow a volume, under a running guest too; it never shrinks.

    trimtab volume resize web1-root 40GiB
    """
    resources.run(
        session,
        "POST",
        VOLUME.place(session, name, verb="resize"),
        {"size_bytes": size},
        reread=lambda: resources.read(session, VOLUME, name),
        sentence=lambda item: f"volume {name} has {humanise.size(item.get('size_bytes'))}; grow its file system in the guest",
        resource=VOLUME,
    )


@volume.command("move")
@_volume_name
@click.option(
    "--to", "to_pool", required=True, metavar="POOL", shell_complete=completion.names_of("pools"), help="Where it shall be."
)
@click.option("--bandwidth", type=click.IntRange(0, 1_000_000), default=0, metavar="MIB/S", help="How fast at most; 0: no limit.")
@options.runs
@click.pass_obj
def move_volume(session: Session, name: str, to_pool: str, bandwidth: int) -> None:
    """Bring a volume to another pool while its vm runs on; a linked clone becomes independent.

    trimtab volume move web1-root --to fast
    """
    body = {"to_pool": to_pool} | ({"bandwidth_mib_s": bandwidth} if bandwidth else {})
    resources.run(
        session,
        "POST",
        VOLUME.place(session, name, verb="move"),
        body,
        reread=lambda: resources.read(session, VOLUME, name),
        sentence=lambda item: f"volume {name} is in pool {item.get('pool', '')}",
        resource=VOLUME,
    )


@volume.command("limit")
@_volume_name
@click.option("--iops", type=click.IntRange(0, 10_000_000), help="Reads and writes a second; 0: as many as the pool gives.")
@click.option("--bandwidth", type=click.IntRange(0, 1_000_000), metavar="MIB/S", help="Read and written a second; 0: no limit.")
@options.runs
@click.pass_obj
def limit_volume(session: Session, name: str, iops: int | None, bandwidth: int | None) -> None:
    """Limit how fast a guest may use a volume, at once where it runs.

    trimtab volume limit web1-root --iops 500 --bandwidth 100
    """
    if iops is None and bandwidth is None:
        raise click.UsageError("give --iops or --bandwidth, for example --iops 500")
    wish = {"iops": iops, "bandwidth_mib_s": bandwidth}
    resources.run(
        session,
        "POST",
        VOLUME.place(session, name, verb="limit"),
        {key: value for key, value in wish.items() if value is not None},
        reread=lambda: resources.read(session, VOLUME, name),
        sentence=_limited,
        resource=VOLUME,
    )


def _limited(item: Mapping[str, Any]) -> str:
    iops, bandwidth = item.get("iops_limit"), item.get("bandwidth_limit_mib_s")
    speed = ", ".join([f"{iops} IOPS"] * bool(iops) + [f"{bandwidth} MiB/s"] * bool(bandwidth)) or "as fast as its pool"
    return f"volume {item.get('name', '')}: {speed}"


@volume.command("delete")
@_volume_name
@options.destroys
@options.runs
@click.pass_obj
def delete_volume(session: Session, name: str) -> None:
    """Delete a volume that no vm has; `undelete` brings it back for 24 h."""
    session.confirm(f"Delete volume {name} of project {session.project}?")
    sentence = f"volume {name} deleted; for 24 h: trimtab volume undelete {name}"
    resources.run(session, "DELETE", VOLUME.place(session, name), sentence=lambda _: sentence)


@volume.command("undelete")
@click.argument("name")
@options.runs
@click.pass_obj
def undelete_volume(session: Session, name: str) -> None:
    """Bring a deleted volume back.

    trimtab volume undelete data1
    """
    resources.run(session, "POST", VOLUME.place(session, name, verb="undelete"), sentence=lambda _: f"volume {name} is back")


@volume.command("purge")
@click.argument("name")
@options.destroys
@options.runs
@click.pass_obj
def purge_volume(session: Session, name: str) -> None:
    """Remove a deleted volume for good, before its 24 h are over.

    trimtab volume purge data1
    """
    session.confirm(f"Remove deleted volume {name} of project {session.project} for good?")
    resources.run(session, "POST", VOLUME.place(session, name, verb="purge"), sentence=lambda _: f"volume {name} is gone")
