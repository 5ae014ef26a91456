"""`trimtab project`: tenants and their quotas."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DISK_QUOTA, MEMORY_AMOUNT, ValueType

F = TypeVar("F", bound=Callable[..., Any])
_UNLIMITED = "unlimited"


class _OrUnlimited(ValueType):
    """A quota, or `unlimited`, which is None in the API; -1 stands for it between here and there."""

    def __init__(self, inner: ValueType) -> None:
        self.name = inner.name
        self._inner = inner

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return -1 if value == _UNLIMITED else self._inner.convert(value, param, ctx)


def _used(key: str, show: Callable[[float], str]) -> Callable[[Document, datetime], str]:
    def text(item: Document, _now: datetime) -> str:
        used, quota = render.at(item, f"quotas.{key}.used"), render.at(item, f"quotas.{key}.quota")
        return f"{show(used or 0)} of {show(quota) if quota is not None else _UNLIMITED}"

    return text


PROJECT = Resource(
    noun="project",
    collection="projects",
    is_fleet=True,
    columns=(
        Column("name", "name"),
        Column("vms", "quotas.vms.used", _used("vms", lambda count: f"{count:.0f}")),
        Column("vcpus", "quotas.vcpus.used", _used("vcpus", lambda count: f"{count:.0f}")),
        Column("memory", "quotas.memory_mib.used", _used("memory_mib", humanise.mib)),
        Column("disk", "quotas.disk_bytes.used", _used("disk_bytes", humanise.size)),
        Column("snapshots", "quotas.snapshots.used", _used("snapshots", lambda count: f"{count:.0f}"), is_wide=True),
        Column("floating", "quotas.floating.used", _used("floating", lambda count: f"{count:.0f}"), is_wide=True),
        Column("id", "id", is_wide=True),
        Column("created", "created_at", lambda item, now: humanise.since(item.get("created_at"), now), is_wide=True),
    ),
)

_name = click.argument("name", shell_complete=completion.names_of("projects"))


def _quotas(function: F) -> F:
    for decorator in (
        click.option("--floating", type=_OrUnlimited(click.IntRange(min=0)), metavar="COUNT", help="Addresses, or `unlimited`."),
        click.option("--snapshots", type=_OrUnlimited(click.IntRange(min=0)), metavar="COUNT", help="Or `unlimited`."),
        click.option("--disk", type=_OrUnlimited(DISK_QUOTA), metavar="SIZE", help="For example 2TiB, or `unlimited`."),
        click.option("--memory", type=_OrUnlimited(MEMORY_AMOUNT), metavar="SIZE", help="For example 512GiB, or `unlimited`."),
        click.option("--vcpus", type=_OrUnlimited(click.IntRange(min=0)), metavar="COUNT", help="Or `unlimited`."),
        click.option("--vms", type=_OrUnlimited(click.IntRange(min=0)), metavar="COUNT", help="Or `unlimited`."),
    ):
        function = decorator(function)
    return function


def _quota_body(given: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return the quotas that were given, by their names in the API."""
    names = {"memory": "memory_mib", "disk": "disk_bytes"}
    return {names.get(key, key): None if value == -1 else value for key, value in given.items() if value is not None}


@click.group()
def project() -> None:
    """Projects: tenants with quotas."""


@project.command("list")
@options.lists
@click.pass_obj
def list_projects(session: Session) -> None:
    """List the projects you have a role in, with quotas and use."""
    resources.list_all(session, PROJECT)


@project.command("get")
@_name
@options.reads
@click.pass_obj
def get_project(session: Session, name: str) -> None:
    """Show a project."""
    resources.get_one(session, PROJECT, name)


@project.command("create")
@click.argument("name")
@_quotas
@options.changes
@click.pass_obj
def create(session: Session, /, name: str, **given: int | None) -> None:
    """Create a project; what has no quota is unlimited."""
    body: dict[str, Any] = {"name": name}
    quotas = _quota_body(given)
    if quotas:
        body["quotas"] = quotas
    answer = resources.change(session, "POST", PROJECT.place(session), body)
    resources.show_changed(session, PROJECT, answer, f"project {name} created")


@project.command("update")
@_name
@_quotas
@options.changes
@click.pass_obj
def update(session: Session, /, name: str, **given: int | None) -> None:
    """Change quotas; one below what is used only stops growth."""
    quotas = _quota_body(given)
    if not quotas:
        raise usage("nothing to change: give --vms, --vcpus, --memory or --disk")
    answer = resources.change(session, "PATCH", PROJECT.place(session, name), {"quotas": quotas})
    resources.show_changed(session, PROJECT, answer, f"project {name}: quotas changed")


@project.command("delete")
@_name
@options.destroys
@options.changes
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Delete an empty project."""
    session.confirm(f"Delete project {name}?")
    answer = resources.change(session, "DELETE", PROJECT.place(session, name))
    resources.show_changed(session, PROJECT, answer, f"project {name} deleted")
