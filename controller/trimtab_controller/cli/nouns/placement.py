"""`trimtab placement`: what a policy would have made of a history. Runs on this machine, without a controller."""

from dataclasses import asdict
from pathlib import Path

import click

from trimtab_controller import replay_trace
from trimtab_controller.cli import options, render
from trimtab_controller.cli.errors import usage
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
@click.option("--policy", default="best-fit", type=click.Choice(("pack", *replay_trace.POLICY_NAMES)), show_default=True)
@options.shown
@click.pass_obj
def replay(session: Session, trace: Path, size: HostSize, count: int | None, policy: str) -> None:
    """Replay a trace of creations and deletions through the scheduler and count the hosts in use over time."""
    try:
        report = replay_trace.replay(trace, **asdict(size), hosts=count, policy=policy)
    except replay_trace.TraceInvalid as error:
        raise usage(str(error), code="trace-invalid") from error
    render.show_one(session, report, _COLUMNS)
