"""`trimtab fence`: the power devices with which silent hosts are made certain to be off."""

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import CommandFailed, ExitCode, usage
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DurationType, PairType

_POLL_S = 0.5
_SECRET_MAX_BYTES = 4096
_TIMEOUT = DurationType(maximum="10m", example="1m")


def _readiness(item: Document, _now: datetime) -> str:
    if not item.get("tested_at"):
        return "not tested yet"
    return "ready" if item.get("is_ready") else "NOT READY"


FENCE = Resource(
    noun="fence path",
    collection="fence-paths",
    is_fleet=True,
    columns=(
        Column("host", "host"),
        Column("order", "order"),
        Column("name", "name"),
        Column("agent", "agent"),
        Column("address", "options.ip"),
        Column("readiness", "is_ready", _readiness),
        Column("power", "power"),
        Column("tested", "tested_at", lambda item, now: humanise.since(item.get("tested_at"), now)),
        Column("message", "message"),
    ),
)

_host = click.argument("host", shell_complete=completion.names_of("hosts"))


def place(host: str) -> str:
    return join("hosts", host, "fence-paths")


@click.group()
def fence() -> None:
    """Power devices: how a silent host is made certain to be off."""


@fence.command("list")
@options.reads
@click.pass_obj
def list_paths(session: Session) -> None:
    """List the power devices of all hosts with their last tests."""
    found: Document = session.client.get(join("fence-paths"))
    render.show_list(session, found.get("items") or [], FENCE.columns, empty="no host has a power device: `trimtab fence config`")


@fence.command("get")
@_host
@options.reads
@click.pass_obj
def get_paths(session: Session, host: str) -> None:
    """Show a host's power devices, in the order in which they are tried."""
    found: Document = session.client.get(place(host))
    empty = f"host {host} has no power device: `trimtab fence config {host} --agent ...`"
    render.show_list(session, found.get("items") or [], FENCE.columns, empty=empty)


@fence.command("config")
@_host
@click.option("--agent", required=True, metavar="fence_NAME", help="One of Debian's fence-agents, for example fence_redfish.")
@click.option("--name", metavar="NAME", help="Of this device among the host's; else the agent's, for example redfish.")
@click.option("--address", metavar="ADDRESS", help="Of the device (option `ip`).")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the device (option `ipport`).")
@click.option("--user", metavar="NAME", help="Whom to log in as (option `username`).")
@click.option("--plug", metavar="PLUG", help="Which outlet or machine of the device is this host.")
@click.option(
    "--secret-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Holds the password: one line."
)
@click.option("--option", "more", type=PairType("ssl_insecure=1"), multiple=True, help="Any other option of the agent; repeats.")
@click.option("--order", type=click.IntRange(1, 8), help="Which one is tried first; else a new device comes last.")
@options.changes
@click.pass_obj
def config(
    session: Session,
    host: str,
    agent: str,
    name: str | None,
    address: str | None,
    port: int | None,
    user: str | None,
    plug: str | None,
    secret_file: Path | None,
    more: Sequence[tuple[str, str]],
    order: int | None,
) -> None:
    """Give a host a power device, or change the one of that name. Several are tried in their order.

    trimtab fence config node2 --agent fence_redfish --address 192.0.2.31 --user root --secret-file bmc.pass
    """
    named = name or agent.removeprefix("fence_").replace("_", "-")
    given = {"ip": address, "ipport": str(port) if port else None, "username": user, "plug": plug}
    made: dict[str, Any] = {
        "name": named,
        "agent": agent,
        "options": {key: value for key, value in given.items() if value} | dict(more),
    }
    if secret_file is not None:
        made["secret"] = _secret(secret_file)
    present = _present(session, host)
    where = next((index for index, one in enumerate(present) if one["name"] == named), len(present))
    paths = [one for one in present if one["name"] != named]
    paths.insert(order - 1 if order else where, made)
    answer = resources.change(session, "PUT", place(host), {"paths": paths})
    resources.show_changed(
        session, FENCE, answer, f"host {host}: {named} is configured; `trimtab fence test {host}` tells whether it works"
    )


@fence.command("remove")
@_host
@click.argument("name")
@options.destroys
@options.changes
@click.pass_obj
def remove(session: Session, host: str, name: str) -> None:
    """Take a power device from a host."""
    present = _present(session, host)
    paths = [one for one in present if one["name"] != name]
    if len(paths) == len(present):
        raise usage(f"host {host} has no power device {name}", hint=f"trimtab fence get {host}")
    session.confirm(f"Take power device {name} from host {host}?")
    answer = resources.change(session, "PUT", place(host), {"paths": paths})
    resources.show_changed(session, FENCE, answer, f"host {host}: {name} is removed")


def _present(session: Session, host: str) -> list[dict[str, Any]]:
    items = session.client.get(place(host)).get("items") or []
    return [{key: one[key] for key in ("name", "agent", "options")} for one in items]


def _secret(path: Path) -> str:
    content = path.read_bytes()[: _SECRET_MAX_BYTES + 1]
    text = content.decode("utf-8", "replace").rstrip("\r\n")
    if not text or "\n" in text or len(content) > _SECRET_MAX_BYTES:
        raise usage(f"--secret-file {path}: one line with the password is expected")
    return text


@fence.command("test")
@click.argument("host", required=False, shell_complete=completion.names_of("hosts"))
@click.option("--all", "is_all", is_flag=True, help="The devices of every host.")
@click.option("--timeout", "timeout_s", type=_TIMEOUT, default="2m", help="Stop waiting for answers then; else 2m.")
@options.changes
@click.pass_obj
def test(session: Session, host: str | None, is_all: bool, timeout_s: int) -> None:
    """Ask power devices for their status: never a power action. Exit code 3 where one could not be relied on."""
    if bool(host) == is_all:
        raise usage("name a host, or give --all", hint="trimtab fence test --all")
    action = join("fence-paths") + ":test" if is_all else join("hosts", str(host)) + ":test-fence"
    answer = resources.change(session, "POST", action)
    if session.is_dry_run:
        resources.show_dry_run(session, answer, "the test")
        return
    listing = join("fence-paths") if is_all else place(str(host))
    deadline = time.monotonic() + timeout_s
    items: list[Document] = list((answer or {}).get("items") or [])
    while any(one.get("is_test_due") for one in items) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        items = list(session.client.get(listing).get("items") or [])
    render.show_list(session, items, FENCE.columns, empty="no host has a power device: `trimtab fence config`")
    _judge(items)


def _judge(items: Sequence[Document]) -> None:
    late = [one for one in items if one.get("is_test_due")]
    if late:
        raise CommandFailed(
            f"{len(late)} power devices were not asked in time: does an engine lead?",
            code="fence-not-tested",
            hint="trimtab fence list",
            exit_with=ExitCode.TIMEOUT,
        )
    bad = [one for one in items if not one.get("is_ready")]
    if bad:
        told = "; ".join(f"{one['host']} {one['name']}: {one.get('message') or one.get('power')}" for one in bad[:4])
        raise CommandFailed(
            f"{len(bad)} of {len(items)} power devices cannot be relied on: {told}",
            code="fence-not-ready",
            hint="trimtab fence list",
            exit_with=ExitCode.CHECK_FAILED,
        )
