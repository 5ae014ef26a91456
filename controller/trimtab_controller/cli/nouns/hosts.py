"""`trimtab host`: machines with an agent, and the tokens they join with."""

from collections.abc import Sequence
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns import failover, plans
from trimtab_controller.cli.nouns.host_check import check
from trimtab_controller.cli.nouns.host_views import COLUMNS, describe
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import PairType

HOST = Resource(noun="host", collection="hosts", columns=COLUMNS, is_fleet=True, describe=describe)
HOST_TOKEN = Resource(
    noun="token",
    collection="host-tokens",
    is_fleet=True,
    columns=(
        Column("id", "id"),
        Column("name", "name"),
        Column("rejoin", "is_rejoin"),
        Column("expires", "expires_at", lambda item, now: humanise.since(item.get("expires_at"), now)),
        Column("created_by", "created_by"),
    ),
)

_name = click.argument("name", shell_complete=completion.names_of("hosts"))


@click.group()
def host() -> None:
    """Hosts of the fleet."""


@host.command("list")
@options.lists
@click.pass_obj
def list_hosts(session: Session) -> None:
    """List hosts. Filter by name, connectivity, host_class, is_cordoned."""
    resources.list_all(session, HOST)


@host.command("get")
@_name
@options.reads
@click.pass_obj
def get_host(session: Session, name: str) -> None:
    """Show a host: capacity, connectivity with its age, certificates, pools, what it can do."""
    resources.get_one(session, HOST, name)


@host.command()
@_name
@options.changes
@click.pass_obj
def cordon(session: Session, name: str) -> None:
    """Place nothing new on a host; what runs there stays."""
    answer = resources.change(session, "POST", HOST.place(session, name, verb="cordon"))
    resources.show_changed(session, HOST, answer, f"host {name} is cordoned: nothing new is placed there")


@host.command()
@_name
@options.changes
@click.pass_obj
def uncordon(session: Session, name: str) -> None:
    """Let a host take placements again."""
    answer = resources.change(session, "POST", HOST.place(session, name, verb="uncordon"))
    resources.show_changed(session, HOST, answer, f"host {name} takes placements again")


@host.command()
@_name
@click.argument("mark", metavar="KEY[=VALUE][:avoid]")
@options.changes
@click.pass_obj
def taint(session: Session, name: str, mark: str) -> None:
    """Keep vms off a host that do not tolerate this mark; with `:avoid` only where others are as good."""
    pair, _, effect = mark.partition(":")
    key, _, value = pair.partition("=")
    body = {"taints": {key: {"value": value, "effect": effect or "refuse"}}}
    answer = resources.change(session, "PATCH", HOST.place(session, name), body)
    resources.show_changed(session, HOST, answer, f"host {name} is tainted {mark}; what runs there stays")


@host.command()
@_name
@click.argument("key")
@options.changes
@click.pass_obj
def untaint(session: Session, name: str, key: str) -> None:
    """Take a mark off a host."""
    answer = resources.change(session, "PATCH", HOST.place(session, name), {"taints": {key: None}})
    resources.show_changed(session, HOST, answer, f"host {name} has no taint {key} any more")


@host.command()
@_name
@click.option("--label", "labels", type=PairType("rack=r2"), multiple=True, help="Set a label; repeats.")
@click.option("--unset-label", "unset", multiple=True, metavar="KEY", help="Remove a label; repeats.")
@click.option(
    "--resource", "counted", type=PairType("licence=4"), multiple=True, help="It has so much of this; 0 takes it away; repeats."
)
@click.option("--rename", metavar="NAME", help="A new name; the id stays.")
@click.option("--host-class", metavar="NAME", shell_complete=completion.names_of("host-classes"), help="A class of hosts.")
@click.option("--dedicated-cpus", metavar="LIST", help="Cpus kept for vms with --dedicated, for example 4-15; `none` frees them.")
@click.option("--exclusive", metavar="PROJECT", shell_complete=completion.names_of("projects"),
              help="Place only this project's vms there; `none` opens it to all. What runs there stays.")  # fmt: skip
@options.changes
@click.pass_obj
def update(
    session: Session,
    name: str,
    labels: Sequence[tuple[str, str]],
    unset: Sequence[str],
    counted: Sequence[tuple[str, str]],
    rename: str | None,
    host_class: str | None,
    exclusive: str | None,
    dedicated_cpus: str | None,
) -> None:
    """Change a host's labels, name or class, or say what it has of what operators count."""
    body: dict[str, Any] = {key: value for key, value in (("name", rename), ("host_class", host_class)) if value is not None}
    if exclusive is not None:
        body["exclusive_project"] = "" if exclusive == "none" else exclusive
    if dedicated_cpus is not None:
        body["dedicated_cpus"] = "" if dedicated_cpus == "none" else dedicated_cpus
    if counted:
        body["resources"] = {resource: _count(resource, text) for resource, text in counted}
    if labels or unset or not body:
        body["labels"] = resources.label_changes(labels, unset)
    answer = resources.change(session, "PATCH", HOST.place(session, name), body)
    resources.show_changed(session, HOST, answer, f"host {name}: {', '.join(sorted(body))} changed")


def _count(resource: str, text: str) -> int:
    if not text.isdigit():
        raise usage(f"--resource {resource}={text}: give a whole number, for example {resource}=4")
    return int(text)


@host.command()
@_name
@click.option("--force", is_flag=True, help="Stop its vms and start them again afterwards, instead of moving them away first.")
@options.destroys
@options.runs
@click.pass_obj
def reboot(session: Session, name: str, force: bool) -> None:
    """Empty a host, restart it, and let it take vms again once it is back under a new boot id."""
    session.confirm(f"Restart host {name}?" + (" Its vms are stopped meanwhile." if force else " Its vms are moved away first."))
    resources.run(
        session,
        "POST",
        join("hosts", name) + ":reboot",
        query={"force": True} if force else None,
        sentence=lambda _: f"host {name} was restarted",
    )


@host.command()
@_name
@click.option("--keep-guests", is_flag=True, help="Leave running guests as plain libvirt domains.")
@click.option("--force", is_flag=True, help="Also where it does not answer; `trimtab-agent leave` there undoes its join.")
@options.destroys
@options.runs
@click.pass_obj
def remove(session: Session, name: str, keep_guests: bool, force: bool) -> None:
    """Take a host out of the fleet and undo what the join changed on it."""
    kept = " Its guests stay as plain libvirt domains." if keep_guests else ""
    session.confirm(f"Remove host {name} from the fleet?{kept}")
    resources.run(
        session,
        "DELETE",
        HOST.place(session, name),
        query={key: True for key, is_given in (("keep_guests", keep_guests), ("force", force)) if is_given} or None,
        sentence=lambda _: f"host {name} is no longer in the fleet",
    )


plans.add_to(host, _name)
failover.add_to(host, _name)
host.add_command(check)


@host.group()
def token() -> None:
    """One-use tokens with which machines join."""


@token.command("create")
@click.argument("name")
@click.option("--rejoin", is_flag=True, help="Re-admit a host of that name, which keeps its id and vms.")
@options.changes
@click.pass_obj
def create_token(session: Session, name: str, rejoin: bool) -> None:
    """Print the one line to paste into a root shell of the new host."""
    body: dict[str, Any] = {"name": name}
    if rejoin:
        body["rejoin"] = True
    answer = resources.change(session, "POST", HOST_TOKEN.place(session), body)
    if session.is_dry_run:
        resources.show_dry_run(session, answer, f"host token for {name}")
    elif session.is_machine_output or session.columns:
        render.show_one(session, answer, HOST_TOKEN.columns)
    else:
        remaining = humanise.since(answer.get("expires_at"), render.now())
        render.say(f"paste this as root on {name}; it works once and expires {remaining}")
        render.write_line(str(answer.get("command") or answer.get("token") or ""))


@token.command("list")
@options.lists
@click.pass_obj
def list_tokens(session: Session) -> None:
    """List tokens that can still be used."""
    resources.list_all(session, HOST_TOKEN)


@token.command("revoke")
@click.argument("token_id", metavar="TOKEN-ID")
@options.destroys
@options.changes
@click.pass_obj
def revoke_token(session: Session, token_id: str) -> None:
    """End a token that was not used yet."""
    session.confirm(f"Revoke host token {token_id}?")
    answer = resources.change(session, "DELETE", join("host-tokens", token_id))
    resources.show_changed(session, HOST_TOKEN, answer, f"host token {token_id} revoked")
