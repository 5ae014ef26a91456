"""`trimtab-controller`: founds a fleet, runs its control plane, and looks after both."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from trimtab_protos.errors import ErrorKind, TrimtabError

F = TypeVar("F", bound=Callable[..., Any])

EXIT_BY_KIND = {
    ErrorKind.INVALID_REQUEST: 2,
    ErrorKind.NOT_FOUND: 4,
    ErrorKind.CONFLICT: 5,
    ErrorKind.ALREADY_EXISTS: 5,
    ErrorKind.DEADLINE_EXCEEDED: 6,
    ErrorKind.PERMISSION_DENIED: 9,
    ErrorKind.UNAVAILABLE: 10,
}
EXIT_CHECK_FAILED = 3

_OPTIONS = (
    click.option("--data-dir", type=click.Path(path_type=Path), help="Default: $TRIMTAB_DATA_DIR, else /var/lib/trimtab."),
    click.option("--advertise", help="Addresses under which hosts and users reach this node, with commas between."),
    click.option("--database-url", help="Default: SQLite in the data directory. postgresql+psycopg://USER@HOST/NAME"),
    click.option("--redis-url", help="Default: a private redis-server."),
    click.option("--bind-address", help="Default: 0.0.0.0"),
    click.option("--api-port", type=int, help="Default: 8443"),
    click.option("--gateway-port", type=int, help="Default: 8444"),
    click.option("--join-port", type=int, help="Default: 8445"),
    click.option("--metrics-port", type=int, help="Of the api; the others take the next three. Default: 9108"),
)


def takes_settings(command: F) -> F:
    """Give a command the options that set settings, as one argument `given` without those that were not given."""

    @wraps(command)
    def wrapper(**arguments: Any) -> Any:
        names = {option.name for option in click.get_current_context().command.params} & _OPTION_NAMES
        given = {name: value for name in names if (value := arguments.pop(name)) is not None}
        return command(given=given, **arguments)

    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


_OPTION_NAMES = {
    "data_dir",
    "advertise",
    "database_url",
    "redis_url",
    "bind_address",
    "api_port",
    "gateway_port",
    "join_port",
    "metrics_port",
}


@click.group()
@click.version_option(package_name="trimtab")
def cli() -> None:
    """The control plane of a Trimtab fleet."""


@cli.command()
@takes_settings
def init(given: dict[str, Any]) -> None:
    """Found a fleet: CA, database, first administrator. Refuses a data directory that is in use."""
    from trimtab_controller import config, installation
    from trimtab_controller.clock import SystemClock

    settings = config.load(**given)
    # Paths, and lists given as text, are written as they are understood.
    written = {name: value for name, value in given.items() if name not in {"data_dir", "advertise"}}
    founded = installation.found(settings, SystemClock(), written)
    click.echo(f"""The fleet is founded in {settings.data_dir}.
CA fingerprint: {founded.ca_fingerprint}

Start the control plane:
    trimtab-controller all --data-dir {settings.data_dir}

Then, in another shell:
    export TRIMTAB_URL={settings.api_urls[0]}
    export TRIMTAB_CA={settings.ca_bundle_path}
    export TRIMTAB_TOKEN_FILE={settings.admin_token_path}
    trimtab host token create NODE1        # prints the line to run on the first host
""")


@cli.command(name="all")
@takes_settings
def run_all(given: dict[str, Any]) -> None:
    """Run everything of one node: api, engine, gateway, worker, and a private Redis."""
    from trimtab_controller import config, installation, log, supervisor
    from trimtab_controller.clock import SystemClock
    from trimtab_controller.store import migrate

    settings = config.load(**given)
    log.configure("supervisor", log_format=settings.log_format, level=settings.log_level)
    installation.require_founded(settings)
    migrate.upgrade(settings.effective_database_url)
    installation.ensure_certificate(settings, SystemClock())
    overrides = {f"TRIMTAB_{name.upper()}": str(value) for name, value in given.items() if name != "data_dir"}
    supervisor.supervise(settings, overrides)


def _add_process(name: str, summary: str) -> None:
    @cli.command(name=name, help=summary)
    @takes_settings
    def run(given: dict[str, Any]) -> None:
        from trimtab_controller import config, processes

        processes.run(name, config.load(**given))


_add_process("api", "Run the REST API alone.")
_add_process("engine", "Run the engine alone; one of all engines leads.")
_add_process("gateway", "Run the gateway alone: hosts' sessions, leases and joins.")
_add_process("worker", "Run a worker alone; it drives operations.")


@cli.command()
@takes_settings
def migrate(given: dict[str, Any]) -> None:
    """Bring the database to this release's schema; `all` does so by itself."""
    from trimtab_controller import config
    from trimtab_controller.store import migrate as migrations

    settings = config.load(**given)
    migrations.upgrade(settings.effective_database_url)
    click.echo(f"The database is at revision {migrations.current(settings.effective_database_url)}.")


@cli.command()
@takes_settings
def check(given: dict[str, Any]) -> None:
    """Look at settings, certificates, database, Redis, clock, disk and ports. Exit status 3 where one fails."""
    from trimtab_controller import check as checks
    from trimtab_controller import config
    from trimtab_controller.clock import SystemClock

    has_failed = False
    for finding in checks.findings(config.load(**given), SystemClock()):
        has_failed |= finding.verdict is checks.Verdict.FAIL
        click.echo(f"{finding.verdict.value:<5} {finding.part:<15} {finding.message}")
    if has_failed:
        sys.exit(EXIT_CHECK_FAILED)


@cli.command()
@takes_settings
@click.option("--apply", "is_applied", is_flag=True, help="Write what is shown; without it nothing is changed.")
def recover(given: dict[str, Any], is_applied: bool) -> None:
    """After a database of yesterday was restored: ask every host what it holds, and show how the database differs.

    With --apply epochs and turns are raised above all that were seen, vms are taken over where they run, operations of the past are
    closed, and failover is paused. Nothing is started, ended or deleted; what a silent host holds stays unknown. Run it before the
    control plane is started again: one that was started notices the first host that knows more, and is read-only until this was done.
    Exit status 3 where hosts are silent or an operator has to choose.
    """
    from trimtab_controller import config, installation
    from trimtab_controller.clock import SystemClock

    settings = config.load(**given)
    installation.require_founded(settings)
    found = installation.recover(settings, SystemClock(), is_applied=is_applied)
    for finding in found.findings:
        click.echo(f"{finding.difference.value:<10} {finding.message}")
    for name, why in sorted(found.silent.items()):
        click.echo(f"{'silent':<10} host {name}: {why}")
    click.echo(f"{len(found.findings)} differences; {len(found.answered)} hosts answered, {len(found.silent)} did not.")
    if is_applied:
        click.echo("The database is brought up to this; failover is paused: `trimtab failover resume` when you have looked.")
        if found.was_behind:
            click.echo(
                "The controllers were read-only, since the database was behind the fleet; started again they are not any more."
            )
    elif found.findings:
        click.echo("Nothing was changed. Again with --apply to bring the database up to this.")
    if found.silent or any(one.difference.value in {"twice", "gone", "stranger"} for one in found.findings):
        sys.exit(EXIT_CHECK_FAILED)


@cli.group()
def token() -> None:
    """The first administrator's token."""


@token.command(name="reset")
@takes_settings
def token_reset(given: dict[str, Any]) -> None:
    """Give the user `admin` a fresh token and end the older ones; needs the data directory, no other right."""
    from trimtab_controller import config, installation
    from trimtab_controller.clock import SystemClock

    settings = config.load(**given)
    installation.require_founded(settings)
    click.echo(f"A fresh token of user admin is in {installation.reset_token(settings, SystemClock())}; older ones have ended.")


@cli.group()
def ca() -> None:
    """The fleet's certificate authority."""


@ca.group(name="rotate")
def ca_rotate() -> None:
    """Replace the CA without a moment in which two members do not trust each other: begin, then finish until it says ended."""


@ca_rotate.command(name="begin")
@takes_settings
def ca_rotate_begin(given: dict[str, Any]) -> None:
    """Let everybody trust a new CA besides the present one."""
    from trimtab_controller import config, installation
    from trimtab_controller.clock import SystemClock

    settings = config.load(**given)
    installation.require_founded(settings)
    fingerprint = installation.begin_rotation(settings, SystemClock())
    click.echo(f"A new CA is trusted besides the present one: {fingerprint}.")
    click.echo("Connected hosts renew within a minute; then: trimtab-controller ca rotate finish")


@ca_rotate.command(name="finish")
@takes_settings
def ca_rotate_finish(given: dict[str, Any]) -> None:
    """Go on to the next stage; refuses while a host would be left behind, and names it."""
    from trimtab_controller import config, installation
    from trimtab_controller.clock import SystemClock

    settings = config.load(**given)
    installation.require_founded(settings)
    stage = installation.advance_rotation(settings, SystemClock())
    if stage == "switched":
        click.echo("The new CA signs now; both are trusted. Hosts renew within a minute; then run this again.")
    else:
        click.echo("The rotation has ended: only the new CA is trusted.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command (None: of this process); a typed error becomes one line and a stable exit status."""
    os.umask(0o077)
    try:
        cli(args=arguments)
    except TrimtabError as error:
        click.echo(f"error: {error.message} [{error.code}]", err=True)
        sys.exit(EXIT_BY_KIND.get(error.kind, 1))


if __name__ == "__main__":
    main()
