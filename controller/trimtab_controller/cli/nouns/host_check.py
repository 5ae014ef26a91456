"""`trimtab host check`: what is wrong on the ways between hosts, each with its cure."""

from collections.abc import Sequence
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import CommandFailed, ExitCode, usage
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Document
from trimtab_controller.cli.session import Session

_SHOWN_MAX = 100


@click.command()
@click.argument("name", required=False, shell_complete=completion.names_of("hosts"))
@click.option("--all", "is_all", is_flag=True, help="Every pair; of more than 17 hosts each one's 16 neighbours.")
@options.runs
@click.pass_obj
def check(session: Session, name: str | None, is_all: bool) -> None:
    """Have hosts look at each other: ports, TLS, MTU, rate, clocks. Exit code 3 where something is wrong.

    trimtab host check --all
    """
    if bool(name) == is_all:
        raise usage("give a host or --all, for example trimtab host check --all")
    answer = resources.change(session, "POST", join("hosts") + ":check", {"host": name} if name else {})
    if session.is_dry_run or not session.is_waiting:
        resources.follow(session, answer, sentence=lambda _operation: "")
        return
    from trimtab_controller.cli import waiting

    result: Document = waiting.until_done(session, answer["operation"]).get("result") or {}
    if session.is_machine_output:
        render.show_one(session, result, ())
    else:
        for line in _said(result):
            render.write_line(line)
    problems: Sequence[Any] = result.get("problems") or []
    if problems:
        raise CommandFailed(
            f"{len(problems)} things are wrong between hosts", code="hosts-do-not-reach", exit_with=ExitCode.CHECK_FAILED
        )


def _said(result: Document) -> list[str]:
    problems, pairs = result.get("problems") or [], result.get("pairs") or []
    lines = []
    for one in problems[:_SHOWN_MAX]:
        way = f"{one['seen_by']} → {one['peer']}" if one.get("seen_by") else str(one["peer"])
        lines += [f"{way}: {one['message']}", f"    cure: {one['cure']}"]
    if len(problems) > _SHOWN_MAX:
        lines.append(f"and {len(problems) - _SHOWN_MAX} more; -o json has them all")
    fine = [pair for pair in pairs if pair.get("is_fine")]
    slowest = min((int(pair.get("rate_bytes_s") or 0) for pair in fine), default=0)
    lines.append(f"{len(fine)} of {len(pairs)} ways between {result.get('hosts', 0)} hosts are fine")
    if slowest:
        lines.append(f"the slowest of them carries {humanise.size(slowest)}/s")
    return [humanise.plain(line) for line in lines]
