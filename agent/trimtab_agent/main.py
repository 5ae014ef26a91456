"""The command line of the agent: run it, and take a host in and out of a fleet."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from trimtab_agent import config
from trimtab_agent.version import agent_version
from trimtab_protos.errors import ErrorKind, TrimtabError

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES = {
    ErrorKind.INVALID_REQUEST: 2,
    ErrorKind.NOT_FOUND: 4,
    ErrorKind.CONFLICT: 5,
    ErrorKind.ALREADY_EXISTS: 5,
    ErrorKind.DEADLINE_EXCEEDED: 6,
    ErrorKind.PERMISSION_DENIED: 9,
    ErrorKind.UNAVAILABLE: 10,
}
"""As the CLI `trimtab`; every other kind is 1."""
CHECK_FAILED = 3


class Commands(click.Group):
    """Shows errors of ours as one line and as an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            click.echo(f"trimtab-agent: {error.message} [{error.code}]", err=True)
            ctx.exit(EXIT_CODES.get(error.kind, 1))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """The part of Trimtab that runs on every host."""


@main.command()
def version() -> None:
    """Print the release."""
    click.echo(agent_version())


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), default=config.DEFAULT_PATH, show_default=True)
@click.option("--hypervisor", type=click.Choice(["kvm", "simulated"]), help="Simulated: guests in memory, for trying things out.")
@click.option("--log-format", type=click.Choice(["auto", "json", "console"]))
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def run(path: Path, hypervisor: str | None, log_format: str | None, log_level: str | None) -> None:
    """Run the agent in the foreground, as its unit does."""
    from trimtab_agent import daemon, log

    settings = config.load(path, hypervisor=hypervisor, log_format=log_format, log_level=log_level)
    log.configure("agent", log_format=settings.log_format, level=settings.log_level)
    daemon.run(settings)


def join_options(command: F) -> F:
    options = (
        click.argument("url"),
        click.option("--token", required=True, help="One-use token, from `trimtab host token create`."),
        click.option("--ca-fingerprint", required=True, help="sha256:… of the fleet's CA, from the same line."),
        click.option("--name", default="", help="Name of the host; must be the one the token is for."),
        click.option("--address", default="", help="Address at which the controller reaches this host."),
        click.option("--migration-address", default="", help="Address at which guests arrive; the same where not given."),
        click.option("--agent-port", type=click.IntRange(1, 65535), default=config.AGENT_PORT, show_default=True),
        click.option("--metrics-port", type=click.IntRange(1, 65535), default=config.METRICS_PORT, show_default=True),
        click.option(
            "--lease-fencing/--no-lease-fencing",
            default=None,
            help="End vms of --ha restart here when this host loses its lease, so that they start elsewhere without a power device. "
            "Where neither is given: while the host renews its lease on shared storage too, so that a controller that is away ends "
            "nobody.",
        ),
        click.option(
            "--beacon/--no-beacon",
            default=True,
            show_default=True,
            help="Renew the lease on shared storage too, where there is some.",
        ),
        click.option("--root", type=click.Path(path_type=Path), default=Path("/"), hidden=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@join_options
def check(**given: Any) -> None:
    """Show every change that `join` would make to this host, and every reason against it. Changes nothing."""
    from trimtab_agent.join import Joiner, JoinOptions, lines_of
    from trimtab_agent.systemd import RealSystemctl

    report = Joiner(JoinOptions(**given), systemctl=RealSystemctl()).check()
    click.echo("\n".join(lines_of(report)))
    if report.refusals:
        sys.exit(CHECK_FAILED)


@main.command()
@join_options
def join(**given: Any) -> None:
    """Make this machine a host of the fleet at URL."""
    from trimtab_agent.join import Joiner, JoinOptions
    from trimtab_agent.systemd import RealSystemctl

    host_id = Joiner(JoinOptions(**given), systemctl=RealSystemctl(), tell=click.echo).join()
    click.echo(f"this host is {host_id}; see it with `trimtab host list`")


@main.command()
@click.option("--keep-certificates", is_flag=True, help="Keep the identity, to join the same fleet again as the same host.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), hidden=True)
def leave(keep_certificates: bool, yes: bool, root: Path) -> None:
    """Undo the join without the controller. Guests go on as plain libvirt domains."""
    from trimtab_agent.hypervisor.kvm.release import release
    from trimtab_agent.leave import leave as undo_join
    from trimtab_agent.leave import stop_units
    from trimtab_agent.systemd import RealSystemctl

    if not yes:
        click.confirm("Take this host out of its fleet? Its guests go on, but nobody watches them any more", abort=True)
    systemctl = RealSystemctl()
    stop_units(systemctl)
    for line in undo_join(
        systemctl, root=root, keep_certificates=keep_certificates, release=release if root == Path("/") else tuple
    ):
        click.echo(line)


if __name__ == "__main__":
    main()
