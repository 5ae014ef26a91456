"""`trimtab backup instant`: several vms as they were at one moment."""

from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import PairType


def _describe(item: Document) -> None:
    render.pairs(
        [
            ("id", str(item.get("id", ""))),
            ("name", str(item.get("name", ""))),
            ("state", str(item.get("state", ""))),
            ("problem", str(item.get("problem") or "")),
            ("repository", str(item.get("repo", ""))),
            ("taken", humanise.since(item.get("taken_at"), render.now())),
            ("guests stood still", f"{item.get('pause_ms')} ms at most"),
            ("skew by the hosts' clocks", f"{item.get('skew_ms')} ms"),
        ]
    )
    render.heading("members")
    render.table(["VM", "BACKUP"], [[str(one.get("vm", "")), str(one.get("backup", ""))] for one in item.get("members") or []])


INSTANT = Resource(
    noun="backup instant",
    collection="backup-instants",
    columns=(
        Column("id", "id"),
        Column("name", "name"),
        Column("state", "state"),
        Column("taken", "taken_at", lambda item, now: humanise.since(item.get("taken_at"), now)),
        Column("vms", "members", lambda item, _now: ", ".join(str(one["vm"]) for one in item.get("members") or [])),
        Column("pause ms", "pause_ms"),
        Column("problem", "problem", is_wide=True),
        Column("repo", "repo", is_wide=True),
    ),
    describe=_describe,
)
_name = click.argument("name", shell_complete=completion.names_of("backup-instants"))


@click.group()
def instant() -> None:
    """Backups of several vms at one instant."""


@instant.command("list")
@options.lists
@click.pass_obj
def list_instants(session: Session) -> None:
    """List instants, newest first. Filter by name, state."""
    resources.list_all(session, INSTANT)


@instant.command("get")
@_name
@options.reads
@click.pass_obj
def get_instant(session: Session, name: str) -> None:
    """Show an instant, the newest of its name, with its members' backups."""
    resources.get_one(session, INSTANT, name)


@instant.command("create")
@click.argument("name")
@click.option("--vm", "vms", multiple=True, shell_complete=completion.names_of("vms"), help="A member; repeats.")
@click.option("--policy", metavar="NAME", shell_complete=completion.names_of("backup-policies"), help="All vms of this policy.")
@click.option(
    "--repo", metavar="NAME", shell_complete=completion.names_of("backup-repos"), help="Else the policy's, or the only one."
)
@click.option("--needs-filesystem", is_flag=True, help="Fail where a guest's file systems were not frozen.")
@click.option("--needs-application", is_flag=True, help="Fail where the hook in a guest did not hold its applications.")
@click.option(
    "--bandwidth", "bandwidth_mib_s", type=click.IntRange(0, 1_000_000), metavar="MIB/S", help="Each reads a second at most."
)
@options.runs
@click.pass_obj
def create_instant(session: Session, /, name: str, vms: tuple[str, ...], **given: Any) -> None:
    """Back vms up as they are at one moment: every guest stands still until all do, for 10 s at most.

    \b
    trimtab backup instant create before-release --vm db --vm web
    """
    body = {"name": name, **{key: value for key, value in given.items() if value}, **({"vms": list(vms)} if vms else {})}
    answer = resources.change(session, "POST", INSTANT.place(session), body)
    made = str(((answer or {}).get("instant") or {}).get("id", ""))
    resources.follow(session, answer, reread=lambda: resources.read(session, INSTANT, made), sentence=_made, resource=INSTANT)


def _made(item: Any) -> str:
    why = f": {item['problem']}" if item.get("problem") else f"; guests stood still for {item.get('pause_ms')} ms at most"
    return f"instant {item.get('name')} ({item.get('id')}) of {len(item.get('members') or [])} vms is {item.get('state')}{why}"


@instant.command("restore")
@_name
@click.option("--name-pattern", default="{vm}", show_default=True, help="{vm} stands for each member's name.")
@click.option("--to", "to_host", metavar="HOST", shell_complete=completion.names_of("hosts"), help="All on this host.")
@click.option("--pool", "pools", type=PairType("local=fast"), multiple=True, help="Its pool there = a pool here; repeats.")
@click.option("--network", "networks", type=PairType("lan=lan2"), multiple=True, help="Its network there = one here; repeats.")
@click.option("--no-start", is_flag=True, help="Leave them stopped.")
@click.option("--allow-broken", is_flag=True, help="Also where they have no moment in common.")
@options.changes
@click.pass_obj
def restore_instant(session: Session, /, name: str, name_pattern: str, pools: Any, networks: Any, **given: Any) -> None:
    """Bring every member back as a new vm, all as they were at the instant."""
    body: dict[str, Any] = {"name_pattern": name_pattern, "pools": dict(pools), "networks": dict(networks)}
    body |= {"start": not given["no_start"], "allow_broken": given["allow_broken"], "to_host": given["to_host"] or ""}
    answer = resources.change(session, "POST", INSTANT.place(session, name, verb="restore"), body)
    ids = [str(one.get("id", "")) for one in (answer or {}).get("operations") or []]
    resources.show_changed(session, INSTANT, answer, f"the vms of instant {name} are coming back: {', '.join(ids)}")
