"""`trimtab drill`: what the loss of a host would do, and what it does."""

import shlex
import subprocess
import sys
import time
from datetime import datetime
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import CommandFailed, ExitCode, usage
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Document
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DurationType

_POLL_S = 1.0
_CRASH_TIMEOUT_S = 60.0


@click.group()
def drill() -> None:
    """Rehearse losses."""


@drill.command("host-loss")
@click.argument("host", shell_complete=completion.names_of("hosts"))
@click.option("--mode", type=click.Choice(["simulate", "real"]), default="simulate", help="simulate (default) changes nothing.")
@click.option("--confirm-host", metavar="NAME", help="real: the host's name once more, where nobody can be asked to type it.")
@click.option("--force", is_flag=True, help="real: also where vms would not run again.")
@click.option(
    "--crash-command", metavar="COMMAND", help="real: run here instead of its power device; {host} stands for its name."
)
@click.option("--boot-time", "boot_s", type=DurationType(maximum="10m", example="20s"), help="simulate: of one guest; else 5s.")
@click.option("--timeout", "timeout_s", type=DurationType(maximum="1h", example="5m"), default="5m", help="real: else 5m.")
@options.reads
@options.destroys
@click.pass_obj
def host_loss(
    session: Session,
    host: str,
    mode: str,
    confirm_host: str | None,
    force: bool,
    crash_command: str | None,
    boot_s: int | None,
    timeout_s: int,
) -> None:
    """Tell when each vm of a host would run again after its loss, and which would not come back. Exit code 3 where one would not.

    With --mode real the host is really lost: its power device takes its power, and what follows is timed. Refused where a vm of it
    would not run again, unless --force. It stays off: switch it on again, and it returns by itself.
    """
    query: dict[str, str | int | bool | None] | None = {"boot_s": boot_s} if boot_s else None
    foreseen: Document = session.client.get(join("hosts", host, "loss-drill"), query)
    if mode == "simulate":
        render.show_one(session, foreseen, (), _describe)
        _judge(foreseen)
        return
    if not session.is_machine_output:
        _describe(foreseen)
    name = str(foreseen.get("host"))
    _confirm(name, confirm_host, vms=len(foreseen.get("outcomes") or []))
    known = {one["id"] for one in session.client.pages(join("failovers"), {"filter": f"host={name}"}, limit=50)}
    if crash_command:
        _crash(name, crash_command)
    else:
        resources.change(session, "POST", join("hosts", name) + ":cut-power", {"confirm": name, "force": force})
    _score(session, name, foreseen, known=known, timeout_s=timeout_s)


def _confirm(host: str, typed: str | None, *, vms: int) -> None:
    """Have the host's name typed once more: a yes is given too easily."""
    if typed is None and sys.stdin.isatty() and sys.stderr.isatty():
        typed = click.prompt(f"Host {host} really loses its power, with {vms} running vms. Type its name", err=True)
    if typed is None:
        raise usage(f"Nobody can be asked here: add --confirm-host {host}", code="confirmation-missing")
    if typed != host:
        raise usage(f"{typed} is not {host}: nothing was cut", code="confirmation-differs")


def _describe(found: Document) -> None:
    if found.get("frozen"):
        render.write_line(f"failover would stand still: {humanise.plain(found['frozen'])}")
    fenced = "never" if found.get("fenced_s") is None else f"after {found['fenced_s']:.0f} s by {found['proof']}"
    render.pairs([("host", str(found.get("host"))), ("proven off", fenced), ("score", f"{found.get('score')} of 100")])
    rows = [
        [
            str(one["vm"]),
            "does not come back" if one.get("seconds") is None else f"{one['seconds']:.0f}s",
            humanise.plain(one.get("why") or ""),
        ]
        for one in found.get("outcomes") or []
    ]
    if rows:
        render.table(["VM", "RUNS AGAIN", "WHY"], rows)


def _judge(found: Document) -> None:
    lost = [one["vm"] for one in found.get("outcomes") or [] if one.get("seconds") is None and not _is_loose(one)]
    if lost:
        raise CommandFailed(
            f"{len(lost)} vms would not come back: {', '.join(lost[:8])}",
            code="drill-failed",
            hint=f"trimtab host get {found.get('host')}",
            exit_with=ExitCode.CHECK_FAILED,
        )


def _is_loose(outcome: Any) -> bool:
    return str(outcome.get("why") or "").startswith("it is not kept")


def _crash(host: str, crash_command: str) -> None:
    command = [part.replace("{host}", host) for part in shlex.split(crash_command)]
    ended = subprocess.run(command, check=False, timeout=_CRASH_TIMEOUT_S)
    if ended.returncode:
        raise CommandFailed(f"{command[0]} ended with {ended.returncode}: the host was not lost", code="drill-not-begun")


def _score(session: Session, host: str, foreseen: Document, *, known: set[str], timeout_s: int) -> None:
    """Wait until each vm of the loss has an end, and show what was foreseen beside what was measured, from the cut on."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        time.sleep(_POLL_S)
        newest = next(iter(session.client.pages(join("failovers"), {"filter": f"host={host}"}, limit=1)), None)
        if newest is None or newest["id"] in known:
            continue
        found = session.client.get(join("failovers", str(newest["id"])))
        states = [one["state"] for one in found.get("outcomes") or []]
        if found.get("state") != "lost" and states and not {"waiting", "starting"} & set(states):
            _show_score(session, found, foreseen, took_s=time.monotonic() - began)
            return
    raise CommandFailed(
        f"host {host} was to be lost, and its vms do not run again yet",
        code="drill-timeout",
        hint=f"trimtab failover status; trimtab event list --subject {host}",
        exit_with=ExitCode.TIMEOUT,
    )


def _show_score(session: Session, found: Document, foreseen: Document, *, took_s: float) -> None:
    from trimtab_controller.cli.nouns.failover import describe

    measured = {str(one["vm"]): one for one in found.get("outcomes") or []}
    expected = {str(one["vm"]): one.get("seconds") for one in foreseen.get("outcomes") or []}
    cut_at = _cut_at(session, str(found.get("host")), found)
    rows = []
    for vm, one in sorted(measured.items()):
        seconds = _seconds(cut_at, humanise.instant(one.get("ended_at"))) if one["state"] == "running" else None
        foretold = expected.get(vm)
        rows.append([vm, _shown(foretold), _shown(seconds), humanise.plain(one.get("why") or "")])
    render.show_one(session, {**dict(found), "drill_seconds": round(took_s, 1)}, (), describe)
    failed = [vm for vm, one in measured.items() if one["state"] != "running"]
    if not session.is_machine_output:
        render.table(["VM", "FORESEEN", "MEASURED", "WHY"], rows)
    render.say(f"{len(measured) - len(failed)} of {len(measured)} vms run again, {took_s:.1f} s after the cut was asked for")
    if failed:
        raise CommandFailed(f"{', '.join(failed)} did not come back", code="drill-failed", exit_with=ExitCode.CHECK_FAILED)


def _cut_at(session: Session, host: str, found: Document) -> datetime | None:
    """Return when the power was off, by the event that says so; else when the loss was noticed."""
    listed = session.client.get(join("events"), {"subject": host, "kind": "drill.power_cut", "page_size": 1})
    event = next(iter(listed.get("items") or []), None)
    return humanise.instant(event["at"] if event else found.get("created_at"))


def _seconds(since: datetime | None, until: datetime | None) -> float | None:
    return (until - since).total_seconds() if since and until else None


def _shown(seconds: float | None) -> str:
    return "not" if seconds is None else f"{seconds:.1f}s"
