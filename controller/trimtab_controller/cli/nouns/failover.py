"""`trimtab failover`: losses of hosts and their timelines, why it stands still, pause, resume, release; `host confirm-off`."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.nouns.survival import failover
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session

__all__ = ["failover"]


def _vms(item: Document, _now: datetime) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted((item.get("vms") or {}).items()))


def _took(item: Document, _now: datetime) -> str:
    lost, fenced = humanise.instant(item.get("created_at")), humanise.instant(item.get("fenced_at"))
    return f"{(fenced - lost).total_seconds():.1f}s" if lost and fenced else ""


def describe(item: Document) -> None:
    """Print a loss: what proved the host off, then everything in the order in which it took place."""
    moment = render.now()
    render.pairs(
        [
            ("id", str(item.get("id", ""))),
            ("host", str(item.get("host", ""))),
            ("state", str(item.get("state", "")) + (f" ({item['proof']})" if item.get("proof") else "")),
            ("lost", f"{item.get('created_at', '')} ({humanise.since(item.get('created_at'), moment)})"),
            ("vms", _vms(item, moment) or "none"),
        ]
    )
    lines: Sequence[Mapping[str, Any]] = item.get("timeline") or []
    if lines:
        render.heading("timeline")
        start = humanise.instant(lines[0]["at"])
        rows = [
            [_offset(one["at"], start), str(one["at"]), humanise.plain(one["what"]), str(one.get("proof") or "")] for one in lines
        ]
        render.table(["SECONDS", "AT", "WHAT", "PROOF"], rows)
    outcomes: Sequence[Mapping[str, Any]] = item.get("outcomes") or []
    if outcomes:
        render.heading("vms")
        rows = [
            [
                str(one["vm"]),
                str(one["state"]),
                str(one.get("host") or ""),
                "" if one.get("seconds") is None else f"{one['seconds']}s",
                str(one.get("operation") or ""),
                humanise.plain(one.get("why") or ""),
            ]
            for one in outcomes
        ]
        render.table(["VM", "STATE", "HOST", "TOOK", "OPERATION", "WHY"], rows)


def _offset(at: object, start: datetime | None) -> str:
    instant = humanise.instant(at)
    return f"{(instant - start).total_seconds():+.1f}" if instant and start else ""


FAILOVER = Resource(
    noun="failover",
    collection="failovers",
    is_fleet=True,
    describe=describe,
    columns=(
        Column("id", "id"),
        Column("host", "host"),
        Column("state", "state"),
        Column("proof", "proof"),
        Column("lost", "created_at", lambda item, now: humanise.since(item.get("created_at"), now)),
        Column("fenced_after", "fenced_at", _took),
        Column("vms", "vms", _vms),
    ),
)


@failover.command("list")
@options.reads
@options.filtered
@options.limited
@click.pass_obj
def list_failovers(session: Session) -> None:
    """List losses of hosts, the newest first. Filter by host, state."""
    resources.list_all(session, FAILOVER, newest=True)


@failover.command("get")
@click.argument("failover_id", metavar="FAILOVER")
@options.reads
@click.pass_obj
def get_failover(session: Session, failover_id: str) -> None:
    """Show a loss: suspicion, evidence, proof, and each vm's restart, with times. A host's name stands for its latest one."""
    if not failover_id.startswith("fo-"):
        newest = list(session.client.pages(FAILOVER.place(session), {"filter": f"host={failover_id}"}, limit=1))
        if newest:
            failover_id = str(newest[0]["id"])
    resources.get_one(session, FAILOVER, failover_id)


@failover.command("status")
@options.reads
@click.pass_obj
def status(session: Session) -> None:
    """Tell whether failover works, why not, and what it works on."""
    found: Document = session.client.get(join("failover"))
    render.show_one(session, found, (), _describe_status)


def _describe_status(found: Document) -> None:
    moment = render.now()
    if found.get("database_behind"):
        since = humanise.since(found.get("database_behind_since"), moment)
        render.write_line(f"READ-ONLY ({since}): {humanise.plain(found['database_behind'])}")
    if found.get("is_paused"):
        render.write_line("PAUSED by an operator: nothing is fenced or restarted; `trimtab failover resume` ends that")
    if found.get("frozen"):
        render.write_line(f"FROZEN: {humanise.plain(found['frozen'])}")
    if found.get("is_active"):
        render.write_line("failover is active")
    for one in found.get("silent") or []:
        render.write_line(f"host {one['host']} is {one['connectivity']} ({humanise.since(one.get('since'), moment)})")
    for title, key in (("released", "released"), ("confirmed off", "confirmed_off")):
        for one in found.get(key) or []:
            render.write_line(f"host {one['host']} is {title} by {one['by']}: {humanise.plain(one['reason'])}")
    for one in found.get("waiting") or []:
        render.write_line(f"vm {one['vm']} waits: {humanise.plain(one['why'])}")
    if found.get("failovers"):
        render.table(
            ["ID", "HOST", "STATE", "PROOF", "VMS"],
            [
                [str(one["id"]), str(one["host"]), str(one["state"]), str(one["proof"]), _vms(one, moment)]
                for one in found["failovers"]
            ],
        )


@failover.command("pause")
@options.changes
@click.pass_obj
def pause(session: Session) -> None:
    """Fence nothing and restart nothing elsewhere until `failover resume`."""
    answer = resources.change(session, "POST", join("failover") + ":pause")
    resources.show_changed(session, FAILOVER, answer, "failover is paused")


@failover.command("resume")
@options.changes
@click.pass_obj
def resume(session: Session) -> None:
    """Work again; every host gets a full window first."""
    answer = resources.change(session, "POST", join("failover") + ":resume")
    resources.show_changed(session, FAILOVER, answer, "failover works again")


_REASON = click.option("--reason", required=True, metavar="TEXT", help="Goes into the audit trail and the timeline.")


@failover.command("release")
@click.argument("name", metavar="HOST", shell_complete=completion.names_of("hosts"))
@_REASON
@options.destroys
@options.changes
@click.pass_obj
def release(session: Session, name: str, reason: str) -> None:
    """Let one lost host be fenced and recovered although failover is frozen."""
    session.confirm(f"Fence host {name} and restart its vms elsewhere although failover is frozen?")
    answer = resources.change(session, "POST", join("hosts", name) + ":release", {"reason": reason})
    resources.show_changed(session, FAILOVER, answer, f"host {name} is released: it is fenced and its vms restart elsewhere")


@failover.command("trust-database")
@_REASON
@options.destroys
@options.changes
@click.pass_obj
def trust_database(session: Session, reason: str) -> None:
    """Say that the database is not older than the fleet, although a host proves it. If you are wrong, vms run twice.

    For evidence that is an error: a host's journal that was damaged, or a PostgreSQL standby that lost its last second and was looked
    at. After a restore run `trimtab-controller recover` instead.
    """
    session.confirm("Is this database surely not a copy of earlier? If it is, vms that moved since are started a second time.")
    answer = resources.change(session, "POST", join("failover") + ":trust-database", {"reason": reason})
    resources.show_changed(
        session, FAILOVER, answer, "the database is trusted; the word of the hosts that spoke against it is not"
    )


# --- what hosts add ------------------------------------------------------------------------------------------------------------


def add_to(host: click.Group, name_argument: Callable[[Any], Any]) -> None:
    """Put `confirm-off` under `trimtab host`."""

    @host.command("confirm-off")
    @name_argument
    @_REASON
    @options.destroys
    @options.changes
    @click.pass_obj
    def confirm_off(session: Session, name: str, reason: str) -> None:
        """Say that a silent host has no power: its vms restart elsewhere. Two copies of a vm destroy its disk if you are wrong."""
        session.confirm(f"Is host {name} surely off, and will it stay so until its vms run elsewhere?")
        answer = resources.change(session, "POST", join("hosts", name) + ":confirm-off", {"reason": reason})
        resources.show_changed(
            session, FAILOVER, answer, f"host {name} is taken as off: `trimtab failover get {name}` shows what follows"
        )
