"""The command `trimtab-lab`: brings labs up and down and does faults to their hosts."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab_lab.errors import LabError
from trimtab_lab.hosts import HostStatus, Lab

if TYPE_CHECKING:
    from trimtab_lab.simulated import SimulatedLab


class _LabCommands(click.Group):
    """Shows what the lab could not do as one line and exit code 1, never as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LabError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_LabCommands)
def main() -> None:
    """Real libvirt hosts in namespaces on this machine, for trying Trimtab and for its tests."""


def lab_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that say which lab is meant; every command takes them."""

    def with_lab(name: str, state_dir: Path | None, **arguments: Any) -> None:
        command(Lab.named(name, state_directory=state_dir), **arguments)

    with_lab.__name__, with_lab.__doc__ = command.__name__, command.__doc__
    with_lab.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    with_name = click.option("--name", default="default", show_default=True, envvar="TRIMTAB_LAB_NAME", help="Which lab.")
    with_directory = click.option(
        "--state-dir",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="TRIMTAB_LAB_DIR",
        help="Where it keeps everything.  [default: /var/lib/trimtab-lab/NAME]",
    )
    return with_name(with_directory(with_lab))


host_argument = click.argument("host")


@main.command()
@click.option("--hosts", default=3, show_default=True, help="How many hosts the lab has.")
@click.option("--simulated", default=0, metavar="N", help="Instead: N simulated hosts, without libvirt.")
@click.option("--controller/--no-controller", default=True, help="Start the control plane and join the hosts.")
@click.option("--ovn", "has_ovn", is_flag=True, help="With Open vSwitch on each host (bridge br0) and OVN: overlay networks.")
@lab_options
def up(lab: Lab, hosts: int, simulated: int, controller: bool, has_ovn: bool) -> None:
    """Bring the lab up; run again, it boots hosts that crashed."""
    if simulated:
        from trimtab_lab.simulated import start_simulated_hosts

        fleet = start_simulated_hosts(lab, count=simulated)
        click.echo(fleet.shell_environment())
        _print_status(lab)
        return
    lab.up(hosts=hosts)
    settings = lab.overlay_settings() if has_ovn else {}
    if controller:
        from trimtab_lab.controlplane import ControlPlane

        plane = ControlPlane(lab, settings=settings)
        plane.start()
        plane.join_hosts()
        click.echo(plane.shell_environment())
    _print_status(lab)


@main.command()
@lab_options
def status(lab: Lab) -> None:
    """Show the hosts and what runs on them."""
    _print_status(lab)


@main.command()
@host_argument
@lab_options
def crash(lab: Lab, host: str) -> None:
    """Cut a host's power."""
    lab.crash(host)


@main.command()
@host_argument
@lab_options
def boot(lab: Lab, host: str) -> None:
    """Switch a host on."""
    lab.boot(host)


network_option = click.option("--network", type=click.Choice(["control", "guest", "all"]), default="control", show_default=True)


@main.command()
@host_argument
@network_option
@lab_options
def cut(lab: Lab, host: str, network: str) -> None:
    """Take the network cable out of a host, or of `ctl`."""
    lab.cut(host, network=network)


@main.command()
@host_argument
@lab_options
def heal(lab: Lab, host: str) -> None:
    """Put the cables of a host, or of `ctl`, back in."""
    lab.heal(host)


@main.command()
@host_argument
@click.option("--all", "everything", is_flag=True, help="Everything of the host, guests too; not only the agent.")
@lab_options
def freeze(lab: Lab, host: str, everything: bool) -> None:
    """Stop the agent of a host without ending it."""
    lab.freeze(host, everything=everything)


@main.command()
@host_argument
@lab_options
def thaw(lab: Lab, host: str) -> None:
    """Let a frozen host go on."""
    lab.thaw(host)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@host_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@lab_options
def sh(lab: Lab, host: str, command: tuple[str, ...]) -> None:
    """Run a command (or a shell) inside a host, or in the network of `ctl`. Options go before HOST."""
    argv = lab.command(host, command or ("bash", "-l"))
    sys.stdout.flush()
    os.execvpe(argv[0], argv, lab.environment(host))


@main.command()
@click.option("--keep-state", is_flag=True, help="Keep disks, logs and joins for the next `up`.")
@lab_options
def down(lab: Lab, keep_state: bool) -> None:
    """End the lab and remove all that it made."""
    simulated = _simulated(lab)
    if simulated is not None:
        simulated.stop() if keep_state else simulated.remove()
        return
    if keep_state and lab.is_recorded:
        from trimtab_lab.controlplane import ControlPlane

        ControlPlane(lab).stop()
    lab.down(keep_state=keep_state)


@main.command()
@lab_options
def demo(lab: Lab) -> None:
    """Bring up three hosts and a control plane and show the main job."""
    from trimtab_lab.demo import run_demo

    run_demo(lab)


@main.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Also copy the qcow2 there.")
def image(output: Path | None) -> None:
    """Build the small guest image (once; cached) and print where it is."""
    import shutil

    from trimtab_lab.guest import build_guest_image

    built = build_guest_image()
    if output is not None:
        shutil.copy(built.qcow2, output)
    click.echo(output or built.qcow2)


def _simulated(lab: Lab) -> "SimulatedLab | None":
    """Return the fleet of simulated hosts that has this lab's name; None where there is none."""
    from trimtab_lab.simulated import SimulatedLab

    fleet = SimulatedLab(lab.spec.state_directory)
    return fleet if fleet.is_recorded else None


def _print_status(lab: Lab) -> None:
    simulated = _simulated(lab)
    if simulated is not None:
        health = "up" if simulated.is_healthy() else "down"
        click.echo(f"lab {lab.spec.name}: {simulated.spec.count} simulated hosts, {health}, state in {simulated.directory}")
        return
    if not lab.is_recorded:
        click.echo(f"lab {lab.spec.name}: down")
        return
    click.echo(
        f"lab {lab.spec.name} on {lab.spec.subnet}, guests on {lab.spec.guest_subnet}, state in {lab.spec.state_directory}"
    )
    for host in lab.status():
        click.echo(f"{host.name:8} {host.address:14} {_condition(host):22} {_services(host)}")


def _condition(host: HostStatus) -> str:
    words = [host.state]
    words += ["frozen"] if host.is_frozen else []
    words += [f"cut({','.join(host.cut_networks)})"] if host.cut_networks else []
    return " ".join(words)


def _services(host: HostStatus) -> str:
    return " ".join(f"{each.name}={each.state}" for each in host.services if each.state != "stopped")
