"""`trimtab vm-group`."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click

from trimtab_controller.cli import completion, humanise, options, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session


def _members(item: Document, _now: datetime) -> str:
    """Return `web1:node1,web2:node2`; one that is nowhere stands without a host."""
    return ",".join(f"{name}:{host}" if host else name for name, host in (item.get("members") or {}).items())


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


F = TypeVar("F", bound=Callable[..., Any])

VM_GROUP = Resource(
    noun="vm-group",
    collection="vm-groups",
    columns=(
        Column("name", "name"),
        Column("rules", "rules", lambda item, _now: "; ".join(str(rule.get("summary")) for rule in item.get("rules") or [])),
        Column("members", "members", _members),
        Column("id", "id", is_wide=True),
        Column("created", "created_at", _created, is_wide=True),
    ),
)

_name = click.argument("name", shell_complete=completion.names_of("vm-groups"))


def _rules(function: F) -> F:
    for decorator in (
        click.option("--prefer-together", multiple=True, metavar="DOMAIN", help="As --together, where it can be had; repeats."),
        click.option("--prefer-apart", multiple=True, metavar="DOMAIN[=LIMIT]", help="As --apart, where it can be had; repeats."),
        click.option("--together", multiple=True, metavar="DOMAIN", help="All members in one; repeats."),
        click.option(
            "--apart", multiple=True, metavar="DOMAIN[=LIMIT]",
            help="At most LIMIT members (1) in each: host, or a label of hosts such as rack; repeats.",
        ),
    ):  # fmt: skip
        function = decorator(function)
    return function


@click.group("vm-group")
def vm_group() -> None:
    """Groups of vms that are kept together, or apart, in failure domains."""


@vm_group.command("list")
@options.lists
@click.pass_obj
def list_vm_groups(session: Session) -> None:
    """List the project's vm groups. Filter by name."""
    resources.list_all(session, VM_GROUP)


@vm_group.command("get")
@_name
@options.reads
@click.pass_obj
def get_vm_group(session: Session, name: str) -> None:
    """Show a vm group, its members and where they are."""
    resources.get_one(session, VM_GROUP, name)


@vm_group.command("create")
@click.argument("name")
@_rules
@options.changes
@click.pass_obj
def create(
    session: Session,
    name: str,
    apart: Sequence[str],
    together: Sequence[str],
    prefer_apart: Sequence[str],
    prefer_together: Sequence[str],
) -> None:
    """Create a vm group; vms join it by `trimtab vm create --group`.

    trimtab vm-group create db --apart host --prefer-apart rack
    """
    rules = _given(apart, together, prefer_apart, prefer_together)
    answer = resources.change(session, "POST", VM_GROUP.place(session), {"name": name, "rules": rules})
    resources.show_changed(session, VM_GROUP, answer, f"vm group {name} created")


@vm_group.command("update")
@_name
@_rules
@options.changes
@click.pass_obj
def update(
    session: Session,
    name: str,
    apart: Sequence[str],
    together: Sequence[str],
    prefer_apart: Sequence[str],
    prefer_together: Sequence[str],
) -> None:
    """Give a vm group these rules instead; members stay where they are until they are placed again."""
    rules = _given(apart, together, prefer_apart, prefer_together)
    answer = resources.change(session, "PATCH", VM_GROUP.place(session, name), {"rules": rules})
    resources.show_changed(session, VM_GROUP, answer, f"vm group {name}: rules changed")


@vm_group.command("delete")
@_name
@options.destroys
@options.changes
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Delete a vm group without members."""
    session.confirm(f"Delete vm group {name}?")
    answer = resources.change(session, "DELETE", VM_GROUP.place(session, name))
    resources.show_changed(session, VM_GROUP, answer, f"vm group {name} deleted")


def _rule(text: str, relation: str, *, is_must: bool) -> dict[str, Any]:
    domain, separator, limit = text.partition("=")
    rule: dict[str, Any] = {"relation": relation, "domain": domain, "must": is_must}
    if not separator:
        return rule
    if relation == "affinity":
        raise usage(f"{text}: a limit is for vms that are apart; give the domain alone, for example {domain}")
    if not limit.isdigit() or not int(limit):
        raise usage(f"{text}: give a whole number from 1 on, for example {domain}=2")
    return rule | {"limit": int(limit)}


def _given(
    apart: Sequence[str], together: Sequence[str], prefer_apart: Sequence[str], prefer_together: Sequence[str]
) -> list[dict[str, Any]]:
    rules = [_rule(text, "anti-affinity", is_must=True) for text in apart]
    rules += [_rule(text, "affinity", is_must=True) for text in together]
    rules += [_rule(text, "anti-affinity", is_must=False) for text in prefer_apart]
    rules += [_rule(text, "affinity", is_must=False) for text in prefer_together]
    if not rules:
        raise usage("give a rule: --apart, --together, --prefer-apart or --prefer-together, for example --apart host")
    return rules
