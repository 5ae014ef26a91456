"""`trimtab vm console` and `trimtab vm ssh`: ways into a guest."""

import ipaddress
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from trimtab_controller.cli import completion, options
from trimtab_controller.cli.console_line import ConsoleLine, open_line
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.session import Session

_name = click.argument("name", shell_complete=completion.names_of("vms"))


def _vm_path(session: Session, name: str) -> str:
    return join("projects", session.project, "vms", name)


@click.command()
@_name
@click.option("--log", "is_log", is_flag=True, help="Print the serial log instead.")
@click.option("--follow", "-f", is_flag=True, help="The log, going on as it grows.")
@click.option("--raw", is_flag=True, help="The log to a terminal as the guest wrote it, its escape sequences included.")
@click.option("--vnc", "is_vnc", is_flag=True, help="Offer the screen to a VNC viewer of this machine until interrupted.")
@click.option("--port", type=click.IntRange(0, 65535), help="Offer it at this loopback port; else at a socket of yours alone.")
@click.option("--once", is_flag=True, help="Offer it to one viewer, and end with it.")
@click.option(
    "--screenshot", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE", help="A PNG of the screen."
)
@options.where
@click.pass_obj
def console(
    session: Session,
    name: str,
    is_log: bool,
    follow: bool,
    raw: bool,
    is_vnc: bool,
    port: int | None,
    once: bool,
    screenshot: Path | None,
) -> None:
    """Sit at a guest's serial console; Ctrl-] leaves it. The log goes on meanwhile."""
    wants_log = is_log or follow
    if [wants_log, is_vnc, screenshot is not None].count(True) > 1:
        raise usage("give one of --log, --vnc and --screenshot", hint=f"trimtab vm console {name} --vnc")
    if (port is not None or once) and not is_vnc:
        raise usage("--port and --once go with --vnc", hint=f"trimtab vm console {name} --vnc --port 5901")
    path = _vm_path(session, name)
    if wants_log:
        from trimtab_controller.cli.nouns.vm_console import print_log

        print_log(session, path + "/console", follow=follow, raw=raw)
    elif screenshot is not None:
        _photograph(open_line(session, path, "vnc"), screenshot)
    elif is_vnc:
        _offer_screen(session, path, port=port, is_once=once)
    else:
        from trimtab_controller.cli.terminal_line import talk

        talk(open_line(session, path, "serial"), greeting=f"At the serial console of {name}; Ctrl-] leaves it.")


def _photograph(line: ConsoleLine, file: Path) -> None:
    from trimtab_controller.cli.rfb import photograph

    try:
        picture = photograph(line.pieces(), line.write)
    finally:
        line.close()
    file.write_bytes(picture.png())
    click.echo(f"{file}: {picture.width} by {picture.height} pixels")


def _offer_screen(session: Session, path: str, *, port: int | None, is_once: bool) -> None:
    from trimtab_controller.cli.vnc_socket import listening, serve

    # A first session, so that what would be refused is refused before a viewer is started.
    open_line(session, path, "vnc").close()
    try:
        with listening(port) as (server, place):
            click.echo(f"The screen is at {place}; with TigerVNC: vncviewer {place.replace(':', '::')}. Ctrl-C ends it.")

            def seat() -> ConsoleLine:
                # A client of its own: viewers come in threads.
                client_session = Session(context_name=session.context_name, project_name=session.project_name)
                try:
                    return open_line(client_session, path, "vnc")
                finally:
                    client_session.close()

            serve(server, seat, is_once=is_once)
    except KeyboardInterrupt:
        click.echo("", err=True)
    except OSError as error:
        raise usage(f"--port: cannot listen there: {error.strerror}; leave it out for a socket of yours alone") from error


@click.command(context_settings={"ignore_unknown_options": True})
@_name
@click.option("--user", "-l", metavar="USER", help="As this user of the guest; else ssh's own choice.")
@click.option("--port", type=click.IntRange(1, 65535), help="The guest's port; else 22.")
@click.option("--print", "is_printed", is_flag=True, help="Print the ssh command instead of running it.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@options.where
@click.pass_obj
def ssh(session: Session, name: str, user: str | None, port: int | None, is_printed: bool, command: Sequence[str]) -> None:
    """Log in to a guest by ssh, or run a command there: trimtab vm ssh web1 -- uptime

    The guest's host key is remembered for the vm, whatever its address becomes: another one is refused by ssh.
    """
    vm = session.client.get(_vm_path(session, name))
    address, source = address_of(vm)
    known_hosts = _known_hosts()
    words = ["ssh", "-o", f"HostKeyAlias={vm['id']}", "-o", f"UserKnownHostsFile={known_hosts}"]
    # A vm's id is never reused, so that the first key seen under it may be kept, and none may follow it.
    words += ["-o", "StrictHostKeyChecking=accept-new"]
    words += ["-l", user] if user else []
    words += ["-p", str(port)] if port else []
    words += ["--", address, *command]
    if is_printed:
        click.echo(shlex.join(words))
        return
    click.echo(f"{name} is at {address}, {source}", err=True)
    try:
        os.execvp("ssh", words)  # noqa: S606 - an argument list, never a shell
    except FileNotFoundError as error:
        raise CommandFailed("ssh is not installed on this machine", code="ssh-missing", kind="unavailable") from error


def address_of(vm: Mapping[str, Any]) -> tuple[str, str]:
    """Return an address of the guest and how it is known: as observed on its host, else as declared. CommandFailed where neither is."""
    name = vm["name"]
    declared = [_plain(address) for nic in vm["nics"] for address in nic["addresses"]]
    observed = [_plain(address) for address in vm["observed"]["addresses"]]
    usable = [address for address in observed if _is_reachable(address)]
    for address in usable:
        if address in declared:
            return address, "declared and seen by its host"
    if usable:
        return usable[0], "seen by its host (guest agent or DHCP lease)"
    if declared:
        return declared[0], "declared; its host has not seen it in the guest"
    if vm["observed"]["state"] != "running":
        raise CommandFailed(
            f"vm {name} is {vm['observed']['state']}, so it has no address",
            code="vm-not-running",
            kind="conflict",
            hint=f"trimtab vm start {name}",
        )
    raise CommandFailed(
        f"no address of vm {name} is known: none was declared, and its host sees no lease and no guest agent",
        code="address-unknown",
        kind="not_found",
        hint=f"trimtab vm console {name}",
    )


def _plain(address: str) -> str:
    return address.partition("/")[0]


def _is_reachable(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (found.is_loopback or found.is_link_local)


def _known_hosts() -> Path:
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
    directory = base / "trimtab"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / "known_hosts"
