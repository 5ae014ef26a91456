"""`trimtab placement`: what a policy would have made of a history, of a file on this machine or of the fleet's own."""

from dataclasses import asdict
from pathlib import Path

import click

from trimtab_controller.cli import options, render
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import HostSize, HostSizeType, MomentType

_COLUMNS = tuple(
    Column(name, name)
    for name in (
        "trace",
        "policy",
        "hosts",
        "placements",
        "refused",
        "peak_hosts",
        "time_avg_hosts",
        "time_avg_bound",
        "time_avg_ratio",
        "peak_ratio",
        "cpu_s",
        "placements_per_cpu_s",
        "decision_us_p50",
        "decision_us_p99",
    )
)

_JOURNAL_COLUMNS = tuple(
    Column(name, name)
    for name in (
        "policy",
        "since",
        "decisions",
        "placements",
        "refused",
        "refused_then",
        "same_host",
        "peak_hosts",
        "peak_hosts_then",
        "time_avg_hosts",
        "time_avg_hosts_then",
        "cpu_s",
        "decision_us_p50",
    )
)


@click.group()
def placement() -> None:
    """Placement: the scheduler on histories."""


@placement.command("replay")
@click.option(
    "--trace", "trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="CSV of t_s,op,vm,cpu_millis,memory_mib,batch, sorted by time; gzipped where the name ends in .gz.",
)  # fmt: skip
@click.option("--host", "size", type=HostSizeType(), help="With --trace: the size of each host, for example 64c/256GiB.")
@click.option(
    "--hosts", "count", type=click.IntRange(1, 1_000_000), metavar="N",
    help="With --trace: how many hosts there are; left out, as many as it can need.",
)  # fmt: skip
@click.option(
    "--policy",
    default="best-fit",
    metavar="NAME",
    show_default=True,
    help="pack, spread, balanced, fragmentation-aware or lifetime-aware.",
)
@click.option("--journal", is_flag=True, help="The fleet's own decisions, on its own hosts, by the controller.")
@click.option("--since", type=MomentType(), metavar="WHEN", help="With --journal: for example 7d, or 2026-11-20T02:00Z.")
@options.reads
@click.pass_obj
def replay(
    session: Session,
    trace: Path | None,
    size: HostSize | None,
    count: int | None,
    policy: str,
    journal: bool,
    since: str | None,
) -> None:
    """Replay creations and deletions through the scheduler and count the hosts in use over time.

    trimtab placement replay --trace TRACE.csv --host 64c/256GiB

    trimtab placement replay --journal --since 7d --policy spread
    """
    if (trace is None) != journal:
        raise usage("give one of --trace FILE and --journal, for example --journal --since 7d --policy spread")
    if trace is None:
        _replay_journal(session, since, policy)
    elif size is None:
        raise usage("--trace needs --host, the size of each host, for example --host 64c/256GiB")
    else:
        _replay_trace(session, trace, size, count, policy)


def _replay_journal(session: Session, since: str | None, policy: str) -> None:
    if since is None:
        raise usage("--journal needs --since, for example --since 7d")
    report = session.client.get(join("placement-replay"), {"since": since, "policy": policy})
    render.show_one(session, report, _JOURNAL_COLUMNS)


def _replay_trace(session: Session, trace: Path, size: HostSize, count: int | None, policy: str) -> None:
    try:
        # Here and not above: the scheduler brings numpy with it, and no other command needs that.
        from trimtab_controller.replay_trace import ReplayRefused
        from trimtab_controller.replay_trace import replay as replay_trace
    except ImportError as error:
        raise CommandFailed(
            f"a replay runs the scheduler on this machine, which needs {error.name}; install trimtab[controller]",
            code="scheduler-missing",
        ) from error
    try:
        report = replay_trace(trace, **asdict(size), hosts=count, policy=policy)
    except ReplayRefused as error:
        raise usage(str(error), code=error.code) from error
    render.show_one(session, report, _COLUMNS)
