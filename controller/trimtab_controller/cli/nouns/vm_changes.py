"""`trimtab vm resize`, `attach`, `detach`: what changes a vm besides its power."""

from typing import Any

import click

from trimtab_controller.cli import completion, options, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns.vm_views import COLUMNS, describe, resources_line, shape, start_group, waiting
from trimtab_controller.cli.render import Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import MEMORY, NicType, NicWish

_VM = Resource(noun="vm", collection="vms", columns=COLUMNS, describe=describe)
_name = click.argument("name", shell_complete=completion.names_of("vms"))


@click.command()
@_name
@click.option("--vcpus", type=click.IntRange(1, 1024), help="Virtual CPUs.")
@click.option("--memory", type=MEMORY, metavar="SIZE", help="For example 2GiB.")
@click.option("--live", "is_live", is_flag=True, help="All of it in the running guest, or not at all.")
@click.option("--at", "at", type=click.Choice(["next-stop"]), help="Not now: when the vm is next stopped.")
@options.runs
@click.pass_obj
def resize(session: Session, name: str, vcpus: int | None, memory: int | None, is_live: bool, at: str | None) -> None:
    """Give a vm other vcpus and memory.

    A running guest is asked and observed; what it does not take or give back waits for its next stop.

    trimtab vm resize web1 --vcpus 4 --memory 2GiB
    """
    if vcpus is None and memory is None:
        raise usage("give --vcpus or --memory, for example --memory 2GiB")
    if is_live and at:
        raise usage("give either --live or --at next-stop")
    wish = {"vcpus": vcpus, "memory_mib": memory, "when": "live" if is_live else at}
    body: dict[str, Any] = {key: value for key, value in wish.items() if value is not None}
    place = _VM.place(session, name)
    resources.run(
        session,
        "POST",
        _VM.place(session, name, verb="resize"),
        body,
        reread=lambda: dict(session.client.get(place)),
        sentence=_resized,
        resource=_VM,
    )


@click.command()
@_name
@click.option("--volume", metavar="NAME", shell_complete=completion.names_of("volumes"), help="A volume that no vm has.")
@click.option("--network", "nic", type=NicType(), shell_complete=completion.names_of("networks"), help="A card on this network.")
@options.runs
@click.pass_obj
def attach(session: Session, name: str, volume: str | None, nic: NicWish | None) -> None:
    """Give a vm a volume, a network card or both, at once where it runs. Both come, or neither.

    trimtab vm attach web1 --volume data1

    trimtab vm attach web1 --volume data1 --network lan,ip=10.0.0.5
    """
    body: dict[str, Any] = {}
    said = []
    if volume:
        body["volume"] = volume
        said.append(f"volume {volume}")
    if nic is not None:
        body["network"] = nic.as_json()
        said.append(f"a card on network {nic.network}")
    if not body:
        raise usage("give --volume, --network or both, for example --volume data1")
    _change(session, name, "attach", body, f"vm {name} has {' and '.join(said)}")


@click.command()
@_name
@click.option("--volume", metavar="NAME", shell_complete=completion.names_of("volumes"), help="A volume; it stays.")
@click.option("--nic", metavar="ID", help="A network card, by its id or MAC.")
@options.runs
@click.pass_obj
def detach(session: Session, name: str, volume: str | None, nic: str | None) -> None:
    """Take a volume or a network card from a vm.

    A running guest is asked to let go of it; one that does not keeps it, and says so.

    trimtab vm detach web1 --volume data1
    """
    if bool(volume) == bool(nic):
        raise usage("give either --volume or --nic, for example --volume data1", hint=f"trimtab vm get {name}")
    body: dict[str, Any] = {"volume": volume} if volume else {"nic": nic}
    _change(session, name, "detach", body, f"vm {name} has {f'volume {volume}' if volume else f'nic {nic}'} no more")


@click.command()
@_name
@click.option("--iso", metavar="NAME", shell_complete=completion.names_of("images"), help="An image of kind iso.")
@click.option("--eject", is_flag=True, help="Leave the drive empty.")
@options.runs
@click.pass_obj
def cdrom(session: Session, name: str, iso: str | None, eject: bool) -> None:
    """Put another ISO image into a vm's drive, or eject it.

    trimtab vm cdrom win1 --iso virtio-win
    """
    if bool(iso) == eject:
        raise usage("give either --iso or --eject, for example --eject", hint="trimtab image list")
    _change(session, name, "cdrom", {"iso": iso or ""}, f"vm {name} has {iso or 'nothing'} in its drive")


def _change(session: Session, name: str, verb: str, body: dict[str, Any], sentence: str) -> None:
    place = _VM.place(session, name)
    resources.run(
        session,
        "POST",
        _VM.place(session, name, verb=verb),
        body,
        reread=lambda: dict(session.client.get(place)),
        sentence=lambda _item: sentence,
        resource=_VM,
    )


def _resized(item: Document) -> str:
    """Return what it has now and what waits."""
    form: Document = item.get("shape") or {}
    later = f"; at its next stop: {waiting(form)}" if waiting(form) else ""
    return f"vm {item.get('name', '')} has {shape(form)}{later}"


def set_resources(session: Session, name: str, *, balloon_min: int | None, cpu_class: str | None) -> None:
    """Give a vm another floor of its balloon and class of cpu time, and wait until its host follows."""
    wished = {"balloon_min_mib": balloon_min, "cpu_class": "" if cpu_class == "none" else cpu_class}
    resources.run(
        session,
        "POST",
        _VM.place(session, name, verb="resources"),
        {key: value for key, value in wished.items() if value is not None},
        reread=lambda: resources.read(session, _VM, name),
        sentence=lambda item: f"vm {name} has {resources_line(item.get('shape') or {}) or 'no class of cpu time and no balloon'}",
        resource=_VM,
    )


def set_ha(session: Session, name: str, wished: dict[str, Any]) -> None:
    """Say whether a vm restarts elsewhere, how early and after whom, and wait until its host knows."""
    resources.run(
        session,
        "POST",
        _VM.place(session, name, verb="ha"),
        wished,
        reread=lambda: resources.read(session, _VM, name),
        sentence=_survival,
        resource=_VM,
    )


def _survival(item: Document) -> str:
    name, group = item.get("name"), start_group(item)
    if item.get("ha") != "restart":
        return f"vm {name} stays down when its host dies" + (f" (start group {group})" if group else "")
    delay = f", {item['start_delay_s']} s after" if item.get("start_delay_s") else ""
    place = f"; start group {group}" if group else ""
    return f"vm {name} restarts elsewhere when its host dies{delay}; priority {item.get('priority')}{place}"
