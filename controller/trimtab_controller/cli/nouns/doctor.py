"""`trimtab doctor`: one screen of everything that will hurt."""

import click

from trimtab_controller.cli import humanise, options, render
from trimtab_controller.cli.errors import CommandFailed, ExitCode
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.session import Session

_FINDINGS = (
    Column("severity", "severity"),
    Column("subject", "subject"),
    Column("finding", "message"),
    Column("cure", "cure"),
    Column("since", "since", lambda item, now: humanise.since(item.get("since"), now) if item.get("since") else "", is_wide=True),
    Column("kind", "kind", is_wide=True),
)


@click.command()
@options.reads
@click.pass_obj
def doctor(session: Session) -> None:
    """Show every risk of the fleet, the worst first, each with its cure. Exit code 3 where one is critical or a warning."""
    found: Document = session.client.get(join("doctor"))
    findings = found.get("findings") or []
    if session.is_machine_output:
        render.show_one(session, found, ())
    elif session.output == "name":
        for one in findings:
            render.write_line(str(one.get("subject")))
    else:
        render.show_list(session, findings, _FINDINGS, empty="nothing hurts")
    if not found.get("is_healthy"):
        urgent = [one for one in findings if one.get("severity") != "notice"]
        critical = sum(1 for one in urgent if one.get("severity") == "critical")
        raise CommandFailed(
            f"{critical} critical findings, {len(urgent) - critical} warnings",
            code="not-healthy",
            hint=str(urgent[0].get("cure") or ""),
            exit_with=ExitCode.CHECK_FAILED,
        )
