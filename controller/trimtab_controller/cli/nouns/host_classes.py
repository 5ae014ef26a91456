"""`trimtab host-class`: sets of hosts with one CPU baseline and one placement policy."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from trimtab_controller.cli import completion, humanise, options, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.render import Column
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import MEMORY_AMOUNT

F = TypeVar("F", bound=Callable[..., Any])

HOST_CLASS = Resource(
    noun="host-class",
    collection="host-classes",
    is_fleet=True,
    columns=(
        Column("name", "name"),
        Column("cpu_model", "cpu_model"),
        Column("machine", "machine"),
        Column("vcpu_ratio", "vcpu_ratio_permille", lambda item, _now: _ratio(item.get("vcpu_ratio_permille"))),
        Column("memory_ratio", "memory_ratio_permille", lambda item, _now: _ratio(item.get("memory_ratio_permille"))),
        Column("reserve", "memory_reserve_mib", lambda item, _now: humanise.mib(item.get("memory_reserve_mib"))),
        Column("policy", "policy"),
        Column("admission", "admission", is_wide=True),
        Column("cpu_classes", "cpu_classes", lambda item, _now: _classes_text(item.get("cpu_classes")), is_wide=True),
        Column("id", "id", is_wide=True),
    ),
)

_CLASSES = "trimtab.cpu-classes"
_CLASS = re.compile(r"(?P<name>low|normal|high)=(?P<weight>[0-9]{1,4})(:(?P<limit>[0-9]{1,3})%)?")
_name = click.argument("name", shell_complete=completion.names_of("host-classes"))


def _ratio(permille: Any) -> str:
    return "" if permille is None else f"{permille / 1000:g}"


def _classes_text(classes: Any) -> str:
    parts = []
    for name, one in sorted((classes or {}).items()):
        limit = f":{one['limit_percent']}%" if one.get("limit_percent") else ""
        parts.append(f"{name}={one['weight']}{limit}")
    return ",".join(parts)


def _keep_classes(ctx: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> None:
    """Keep the classes for `_body`, so that they are no parameter of every command."""
    ctx.meta[_CLASSES] = dict(_class(text) for text in given) or None


def _class(text: str) -> tuple[str, dict[str, int]]:
    matched = _CLASS.fullmatch(text)
    if matched is None:
        raise usage(f"--cpu-class {text}: give NAME=WEIGHT[:LIMIT%], for example low=25:50%")
    return matched["name"], {"weight": int(matched["weight"]), "limit_percent": int(matched["limit"] or 0)}


def _settings(function: F) -> F:
    for decorator in (
        click.option(
            "--admission",
            type=click.Choice(["any", "one-host-loss"]),
            help="one-host-loss: accept only what could be restarted after the loss of one host.",
        ),
        click.option(
            "--cpu-class",
            "cpu_classes",
            multiple=True,
            metavar="NAME=WEIGHT[:LIMIT%]",
            expose_value=False,
            callback=_keep_classes,
            help="What low, normal or high means on its hosts: low=25:50% is a quarter of a share and half a cpu; repeats, all anew.",
        ),
        click.option("--policy", metavar="NAME", help="The placement policy, for example best-fit."),
        click.option("--memory-reserve", type=MEMORY_AMOUNT, metavar="SIZE", help="Kept for the host itself, for example 2GiB."),
        click.option(
            "--memory-ratio", type=click.FloatRange(0.1, 10), help="Memory promised per memory there is, for example 1.0."
        ),
        click.option("--vcpu-ratio", type=click.FloatRange(0.1, 64), help="vCPUs promised per CPU, for example 4."),
        click.option("--machine", metavar="TYPE", help="A concrete machine type, for example pc-q35-7.2."),
        click.option("--cpu-model", metavar="MODEL", help="A named CPU model that all its hosts have."),
    ):
        function = decorator(function)
    return function


def _body(
    *,
    cpu_model: str | None,
    machine: str | None,
    vcpu_ratio: float | None,
    memory_ratio: float | None,
    memory_reserve: int | None,
    policy: str | None,
    admission: str | None,
) -> dict[str, Any]:
    given = {
        "cpu_model": cpu_model,
        "machine": machine,
        "vcpu_ratio_permille": None if vcpu_ratio is None else round(vcpu_ratio * 1000),
        "memory_ratio_permille": None if memory_ratio is None else round(memory_ratio * 1000),
        "memory_reserve_mib": memory_reserve,
        "policy": policy,
        "admission": admission,
        "cpu_classes": click.get_current_context().meta.get(_CLASSES),
    }
    return {key: value for key, value in given.items() if value is not None}


@click.group("host-class")
def host_class() -> None:
    """Classes of hosts: one CPU baseline, one placement policy."""


@host_class.command("list")
@options.lists
@click.pass_obj
def list_classes(session: Session) -> None:
    """List host classes. Filter by name, policy."""
    resources.list_all(session, HOST_CLASS)


@host_class.command("get")
@_name
@options.reads
@click.pass_obj
def get_class(session: Session, name: str) -> None:
    """Show a host class."""
    resources.get_one(session, HOST_CLASS, name)


@host_class.command("create")
@click.argument("name")
@_settings
@options.changes
@click.pass_obj
def create(
    session: Session,
    name: str,
    cpu_model: str | None,
    machine: str | None,
    vcpu_ratio: float | None,
    memory_ratio: float | None,
    memory_reserve: int | None,
    policy: str | None,
    admission: str | None,
) -> None:
    """Create a host class."""
    body = _body(
        cpu_model=cpu_model,
        machine=machine,
        vcpu_ratio=vcpu_ratio,
        memory_ratio=memory_ratio,
        memory_reserve=memory_reserve,
        policy=policy,
        admission=admission,
    )
    answer = resources.change(session, "POST", HOST_CLASS.place(session), {"name": name, **body})
    resources.show_changed(session, HOST_CLASS, answer, f"host class {name} created")


@host_class.command("update")
@_name
@_settings
@options.changes
@click.pass_obj
def update(
    session: Session,
    name: str,
    cpu_model: str | None,
    machine: str | None,
    vcpu_ratio: float | None,
    memory_ratio: float | None,
    memory_reserve: int | None,
    policy: str | None,
    admission: str | None,
) -> None:
    """Change a host class; vms that run keep what they were started with."""
    body = _body(
        cpu_model=cpu_model,
        machine=machine,
        vcpu_ratio=vcpu_ratio,
        memory_ratio=memory_ratio,
        memory_reserve=memory_reserve,
        policy=policy,
        admission=admission,
    )
    if not body:
        raise usage("nothing to change: give for example --vcpu-ratio 4")
    answer = resources.change(session, "PATCH", HOST_CLASS.place(session, name), body)
    resources.show_changed(session, HOST_CLASS, answer, f"host class {name}: {', '.join(sorted(body))} changed")


@host_class.command("delete")
@_name
@options.destroys
@options.changes
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Delete a host class that no host is in."""
    session.confirm(f"Delete host class {name}?")
    answer = resources.change(session, "DELETE", HOST_CLASS.place(session, name))
    resources.show_changed(session, HOST_CLASS, answer, f"host class {name} deleted")
