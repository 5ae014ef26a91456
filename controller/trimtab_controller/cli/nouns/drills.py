"""`trimtab drill`: what the loss of a host would do, and what it does."""

import shlex
import subprocess
import time
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render
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
@click.option("--crash-command", metavar="COMMAND", help="real: run here, it takes the host's power; {host} stands for its name.")
@click.option("--boot-time", "boot_s", type=DurationType(maximum="10m", example="20s"), help="simulate: of one guest; else 5s.")
@click.option("--timeout", "timeout_s", type=DurationType(maximum="1h", example="5m"), default="5m", help="real: else 5m.")
@options.reads
@options.destroys
@click.pass_obj
def host_loss(session: Session, host: str, mode: str, crash_command: str | None, boot_s: int | None, timeout_s: int) -> None:
    """Tell when each vm of a host would run again after its loss, and which would not come back. Exit code 3 where one would not.

    With --mode real the host is really lost: its power is taken by your command, and what follows is timed.
    """
    query: dict[str, str | int | bool | None] | None = {"boot_s": boot_s} if boot_s else None
    foreseen: Document = session.client.get(join("hosts", host, "loss-drill"), query)
    if mode == "simulate":
        render.show_one(session, foreseen, (), _describe)
        _judge(foreseen)
        return
    if not crash_command:
        raise usage('--mode real needs --crash-command, for example "trimtab-lab crash --name demo {host}"')
    _describe(foreseen)
    session.confirm(f"Really take the power of host {host}, with {len(foreseen.get('outcomes') or [])} running vms?")
    _lose(session, host, crash_command, timeout_s)


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


def _lose(session: Session, host: str, crash_command: str, timeout_s: int) -> None:
    known = {one["id"] for one in session.client.pages(join("failovers"), {"filter": f"host={host}"}, limit=50)}
    command = [part.replace("{host}", host) for part in shlex.split(crash_command)]
    began = time.monotonic()
    ended = subprocess.run(command, check=False, timeout=_CRASH_TIMEOUT_S)
    if ended.returncode:
        raise CommandFailed(f"{command[0]} ended with {ended.returncode}: the host was not lost", code="drill-not-begun")
    while time.monotonic() - began < timeout_s:
        time.sleep(_POLL_S)
        newest = next(iter(session.client.pages(join("failovers"), {"filter": f"host={host}"}, limit=1)), None)
        if newest is None or newest["id"] in known:
            continue
        found = session.client.get(join("failovers", str(newest["id"])))
        states = [one["state"] for one in found.get("outcomes") or []]
        if found.get("state") != "lost" and states and not {"waiting", "starting"} & set(states):
            from trimtab_controller.cli.nouns.failover import describe

            render.show_one(session, found, (), describe)
            failed = [one["vm"] for one in found["outcomes"] if one["state"] != "running"]
            render.say(
                f"{len(states) - len(failed)} of {len(states)} vms run again, {time.monotonic() - began:.1f} s after the cut"
            )
            if failed:
                raise CommandFailed(
                    f"{', '.join(failed)} did not come back", code="drill-failed", exit_with=ExitCode.CHECK_FAILED
                )
            return
    raise CommandFailed(
        f"host {host} was lost, and its vms do not run again yet",
        code="drill-timeout",
        hint="trimtab failover status",
        exit_with=ExitCode.TIMEOUT,
    )
