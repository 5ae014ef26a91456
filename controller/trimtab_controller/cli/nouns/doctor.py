"""`trimtab doctor`: everything that will hurt on one screen, worst first, each with the command that cures it."""

from collections import Counter
from collections.abc import Sequence

import click

from trimtab_controller.cli import humanise, options, render
from trimtab_controller.cli.errors import CommandFailed, ExitCode
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Document
from trimtab_controller.cli.session import Session

# One screen; `-o wide` shows what a controller tells, `-o json` as well.
SHOWN_MAX = 20


@click.command()
@options.reads
@click.pass_obj
def doctor(session: Session) -> None:
    """Examine the fleet: every risk ranked, each with the command that cures it. Exit code 3 where one is severe.

    trimtab doctor
    trimtab doctor -o json
    """
    found: Document = session.client.get(join("doctor"))
    if session.is_machine_output:
        render.show_one(session, found, ())
    else:
        _tell(found, len(found["items"]) if session.output == "wide" else SHOWN_MAX)
    severe = [one for one in found["items"] if one["severity"] == "severe"]
    if severe:
        first = severe[0]
        count = sum(one["count"] for one in found["counts"] if one["severity"] == "severe")
        raise CommandFailed(
            f"{count} severe: first {first['subject']}: {humanise.plain(first['what'])}",
            code="fleet-not-well",
            hint=str(first["cure"]),
            exit_with=ExitCode.CHECK_FAILED,
        )


def _tell(found: Document, shown_max: int) -> None:
    items: Sequence[Document] = found["items"]
    moment = render.now()
    for one in items[:shown_max]:
        since = f" ({humanise.since(one['since'], moment)})" if one.get("since") else ""
        severity = str(one["severity"])
        render.write_line(
            f"{render.coloured(severity.upper().ljust(7), severity)}  {humanise.plain(one['subject'])}: "
            f"{humanise.plain(one['what'])}{since}"
        )
        render.write_line(f"         {humanise.plain(one['cure'])}")
    rest = int(found["total"]) - min(len(items), shown_max)
    if rest > 0:
        render.write_line(f"and {rest} more: `trimtab doctor -o {'json' if shown_max == len(items) else 'wide'}`")
    counts: Counter[str] = Counter()
    for one in found["counts"]:
        counts[one["severity"]] += one["count"]
    told = ", ".join(f"{counts[severity]} {severity}" for severity in ("severe", "warning", "notice") if counts[severity])
    render.write_line(told or "nothing found: the fleet is well")
