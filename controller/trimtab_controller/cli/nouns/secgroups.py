"""`trimtab secgroup`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns.vm_views import COLUMNS, describe
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


SECGROUP = Resource(
    noun="secgroup",
    collection="secgroups",
    columns=(
        Column("name", "name"),
        Column("rules", "rules", lambda item, _now: " ".join(item.get("rules") or []) or "(nothing may enter)"),
        Column("vms", "vms", lambda item, _now: ",".join(item.get("vms") or [])),
        Column("id", "id", is_wide=True),
        Column("created", "created_at", _created, is_wide=True),
    ),
)

_VM = Resource(noun="vm", collection="vms", columns=COLUMNS, describe=describe)

_name = click.argument("name", shell_complete=completion.names_of("secgroups"))
_allow = click.option(
    "--allow", "rules", multiple=True, metavar="RULE",
    help="What may enter: tcp/443, udp/1000-2000, tcp/22@10.0.0.0/8, icmp, any; repeats.",
)  # fmt: skip
_closed = click.option("--closed", is_flag=True, help="Nothing may enter.")


@click.group()
def secgroup() -> None:
    """What may reach vms: a vm in a group takes what its groups allow, and answers to what it asked itself."""


@secgroup.command("list")
@options.lists
@click.pass_obj
def list_secgroups(session: Session) -> None:
    """List the project's security groups. Filter by name."""
    resources.list_all(session, SECGROUP)


@secgroup.command("get")
@_name
@options.reads
@click.pass_obj
def get_secgroup(session: Session, name: str) -> None:
    """Show a security group and the vms that are in it."""
    resources.get_one(session, SECGROUP, name)


@secgroup.command("create")
@click.argument("name")
@_allow
@_closed
@options.changes
@click.pass_obj
def create(session: Session, name: str, rules: Sequence[str], closed: bool) -> None:
    """Create a security group; `trimtab vm update VM --secgroup NAME` puts a vm into it.

    trimtab secgroup create web --allow tcp/443 --allow tcp/22@10.0.0.0/8
    """
    answer = resources.change(session, "POST", SECGROUP.place(session), {"name": name, "rules": _given(rules, closed)})
    resources.show_changed(session, SECGROUP, answer, f"security group {name} created")


@secgroup.command("update")
@_name
@_allow
@_closed
@options.runs
@click.pass_obj
def update(session: Session, name: str, rules: Sequence[str], closed: bool) -> None:
    """Give a security group these rules instead; running vms of it follow at once."""
    resources.run(
        session,
        "PATCH",
        SECGROUP.place(session, name),
        {"rules": _given(rules, closed)},
        reread=lambda: resources.read(session, SECGROUP, name),
        sentence=lambda item: f"security group {name}: rules in force on {len(item.get('vms') or [])} vms",
        resource=SECGROUP,
    )


@secgroup.command("delete")
@_name
@options.destroys
@options.changes
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Delete a security group that no vm is in."""
    session.confirm(f"Delete security group {name}?")
    answer = resources.change(session, "DELETE", SECGROUP.place(session, name))
    resources.show_changed(session, SECGROUP, answer, f"security group {name} deleted")


def set_for_vm(session: Session, name: str, groups: Sequence[str]) -> None:
    """Put a vm into these groups and no others, and wait until its host follows."""
    said = f"is in security groups {', '.join(groups)}" if groups else "is in no security group: anything may reach it"
    resources.run(
        session,
        "POST",
        _VM.place(session, name, verb="secgroups"),
        {"secgroups": list(groups)},
        reread=lambda: resources.read(session, _VM, name),
        sentence=lambda _item: f"vm {name} {said}",
        resource=_VM,
    )


def _given(rules: Sequence[str], closed: bool) -> list[Any]:
    if bool(rules) == closed:
        raise usage("give --allow RULE, or --closed where nothing may enter, for example --allow tcp/443")
    return list(rules)
