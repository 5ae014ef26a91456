"""`trimtab placement`: what a policy would have made of a history. Runs on this machine, without a controller."""

from dataclasses import asdict
from pathlib import Path

import click

from trimtab_controller.cli import options, render
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.render import Column
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import HostSize, HostSizeType

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


@click.group()
def placement() -> None:
    """Placement: the scheduler on histories."""


@placement.command("replay")
@click.option(
    "--trace", "trace", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="CSV of t_s,op,vm,cpu_millis,memory_mib,batch, sorted by time; gzipped where the name ends in .gz.",
)  # fmt: skip
@click.option("--host", "size", required=True, type=HostSizeType(), help="The size of each host, for example 64c/256GiB.")
@click.option(
    "--hosts", "count", type=click.IntRange(1, 1_000_000), metavar="N",
    help="How many hosts there are; left out, as many as the trace can need.",
)  # fmt: skip
@click.option(
    "--policy", default="best-fit", metavar="NAME", show_default=True, help="pack, spread, balanced or fragmentation-aware."
)
@options.shown
@click.pass_obj
def replay(session: Session, trace: Path, size: HostSize, count: int | None, policy: str) -> None:
    """Replay a trace of creations and deletions through the scheduler and count the hosts in use over time."""
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
