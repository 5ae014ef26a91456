"""`trimtab vm import`: a machine of another system becomes a vm, by copying its disks; what it came from is never touched.

Each disk is uploaded as an image, and the vm's volumes lie over these. What was made is taken away again, last first, where a later part
fails or the import is interrupted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, render, resources
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.imports import files
from trimtab_controller.cli.imports.plan import ImportedCard, ImportedDisk, ImportPlan
from trimtab_controller.cli.nouns.images import IMAGE, send_file
from trimtab_controller.cli.nouns.vm_views import COLUMNS, describe, outcome
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import MEMORY, PairType
from trimtab_controller.cli.waiting import ProgressLine

_VM = Resource(noun="vm", collection="vms", columns=COLUMNS, describe=describe)
_VOLUME = Resource(noun="volume", collection="volumes", columns=())
_file = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
_ROOM_SPARE = 64 << 20


@dataclass(slots=True)
class _Made:
    """What the import made, in order."""

    places: list[tuple[str, str]] = field(default_factory=list)
    """(sentence, place) each."""


@click.command("import")
@click.argument("name")
@click.argument("source", required=False, type=_file, metavar="[FILE]")
@click.option("--from-libvirt", "place", metavar="URI/DOMAIN", help="A domain that is off, of a host in no fleet.")
@click.option("--disk", "disks", type=PairType("scsi0=disk.qcow2"), multiple=True, help="Of a Proxmox configuration; repeats.")
@click.option("--format", "disk_format", type=click.Choice(files.FORMATS), help="Of disks, where their names do not say it.")
@click.option("--network", "networks", multiple=True, metavar="THERE=HERE", help="What a network there is here; repeats.")
@click.option("--no-networks", is_flag=True, help="Leave its cards out.")
@click.option("--vcpus", type=click.IntRange(1, 1024), help="Else as it says.")
@click.option("--memory", type=MEMORY, metavar="SIZE", help="Else as it says.")
@click.option("--os", "guest_os", metavar="NAME", help="Else as it says: linux, windows, generic, or a name of osinfo's.")
@click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="Else as it says.")
@click.option("--pool", metavar="NAME", shell_complete=completion.names_of("pools"), help="Where its disks live.")
@click.option("--no-start", is_flag=True, help="Leave it off.")
@options.runs
@click.pass_obj
def import_vm(
    session: Session,
    name: str,
    source: Path | None,
    place: str | None,
    disks: Sequence[tuple[str, str]],
    disk_format: str | None,
    networks: Sequence[str],
    no_networks: bool,
    vcpus: int | None,
    memory: int | None,
    guest_os: str | None,
    firmware: str | None,
    pool: str | None,
    no_start: bool,
) -> None:
    """Make a vm of an OVA, a Proxmox configuration, a disk, or a domain of another libvirt host.

    trimtab vm import web1 ./web1.ova --network "VM Network=lan" --dry-run

    trimtab vm import db1 ./100.conf --disk scsi0=./vm-100-disk-0.qcow2 --network vmbr0=lan

    trimtab vm import old1 ./old1.raw --memory 2GiB

    trimtab vm import db2 --from-libvirt qemu+ssh://root@old1/system/legacy-db --network br0=lan
    """
    plan = _read(source, place, dict(disks), disk_format=disk_format or "")
    body = _body(name, plan, vcpus=vcpus, memory=memory, guest_os=guest_os, firmware=firmware)
    body["networks"] = [] if no_networks else _cards(plan.cards, dict(_network(text) for text in networks))
    if session.is_dry_run:
        _show(session, name, plan, body, has_cards=not no_networks)
        return
    if not session.is_waiting:
        raise usage("an import uploads disks and makes several things in turn; it has to be waited for, leave --no-wait out")
    made = _Made()
    try:
        _make(session, name, plan, {**body, **({"pool": pool} if pool else {})}, made, wants_start=not no_start)
    except (CommandFailed, KeyboardInterrupt):
        session.client.close()
        _undo(session, made)
        raise
    imported = resources.read(session, _VM, name)
    resources.show_changed(session, _VM, imported, outcome(imported))


def _read(source: Path | None, place: str | None, disks: Mapping[str, str], *, disk_format: str) -> ImportPlan:
    if bool(source) == bool(place):
        raise usage("give either a file or --from-libvirt URI/DOMAIN, for example ./web1.ova")
    if place:
        from trimtab_controller.cli.imports import libvirt_domain

        return libvirt_domain.read(place)
    assert source is not None
    suffix = source.suffix.lower()
    if suffix in {".vma", ".zst", ".lzo", ".gz"}:
        raise usage(
            f"FILE: {source.name} is a backup or packed; unpack it, restore a backup of Proxmox's there, and give the disk itself",
            code="format-unknown",
        )
    if suffix == ".conf":
        from trimtab_controller.cli.imports import proxmox

        return proxmox.read(source, {key: Path(path) for key, path in disks.items()}, disk_format=disk_format)
    if disks:
        raise usage("--disk goes with a Proxmox configuration, for example 100.conf")
    if suffix == ".ova":
        from trimtab_controller.cli.imports import ova

        return ova.read(source)
    return ImportPlan(name=source.stem, disks=(files.disk_of(source, label=source.name, disk_format=disk_format),))


def _body(
    name: str, plan: ImportPlan, *, vcpus: int | None, memory: int | None, guest_os: str | None, firmware: str | None
) -> dict[str, Any]:
    memory_mib = memory or plan.memory_mib
    if not memory_mib:
        raise usage("--memory: a disk does not say how much memory its machine had; give it, for example --memory 2GiB")
    if not plan.disks:
        raise usage("FILE: it has no disk to boot from", code="import-refused")
    wished = {"os": guest_os or plan.guest_os, "firmware": firmware or plan.firmware}
    given = {key: value for key, value in wished.items() if value}
    return {"name": name, "vcpus": vcpus or plan.vcpus or 1, "memory_mib": memory_mib, **given}


def _network(text: str) -> tuple[str, str]:
    """Return the two names; what it is called there may have any characters."""
    there, separator, here = text.rpartition("=")
    if not separator or not here:
        raise usage(f"--network {text[:80]}: give THERE=HERE, for example 'VM Network=lan'")
    return there, here


def _cards(cards: Sequence[ImportedCard], networks: Mapping[str, str]) -> list[dict[str, str]]:
    unknown = sorted({card.source for card in cards} - set(networks))
    if unknown:
        raise usage(
            f"--network: it has a card on {unknown[0] or '(nothing)'!r}; say what that is here, --network '{unknown[0]}=NETWORK', "
            "or leave its cards out by --no-networks",
            code="network-unknown",
        )
    return [{"network": networks[card.source], **({"mac": card.mac} if card.mac else {})} for card in cards]


def _show(session: Session, name: str, plan: ImportPlan, body: Mapping[str, Any], *, has_cards: bool) -> None:
    document = {
        "vm": dict(body),
        "disks": [{"from": disk.label, "size_bytes": disk.size_bytes} for disk in plan.disks],
        "unexpressed": list(plan.unexpressed),
        "dropped_cards": 0 if has_cards else len(plan.cards),
    }
    if session.is_machine_output:
        (render.write_json if session.output == "json" else render.write_yaml)(document)
        return
    render.write_line(f"{plan.name or name} becomes vm {name}: {body['vcpus']} vcpus, {humanise.mib(body['memory_mib'])}")
    for disk in plan.disks:
        render.write_line(f"  disk {disk.label}: {humanise.size(disk.size_bytes) if disk.size_bytes else 'as large as it is'}")
    for card in body["networks"]:
        render.write_line(f"  card on network {card['network']} {card.get('mac', 'with a new MAC')}")
    for line in plan.unexpressed:
        render.write_line(f"  gone after the import: {line}")
    if not has_cards and plan.cards:
        render.write_line(f"  gone after the import: {len(plan.cards)} network cards")
    render.write_line("nothing was changed; without --dry-run it is imported")


def _make(session: Session, name: str, plan: ImportPlan, body: Mapping[str, Any], made: _Made, *, wants_start: bool) -> None:
    images = [_bring(session, name, index, disk, body.get("pool"), made) for index, disk in enumerate(plan.disks)]
    extra = []
    for index, image in enumerate(images[1:], 1):
        volume = f"{name}-disk{index}"
        _run(
            session,
            _VOLUME.place(session),
            {"name": volume, "image": image, **_pool(body)},
            made,
            _VOLUME.place(session, volume),
            f"volume {volume}",
        )
        extra.append(volume)
    vm = {**body, "image": images[0], "start": wants_start and not extra}
    _run(session, _VM.place(session), vm, made, _VM.place(session, name), f"vm {name}")
    for volume in extra:
        _run(session, _VM.place(session, name, verb="attach"), {"volume": volume})
    if extra and wants_start:
        _run(session, _VM.place(session, name, verb="start"), {})


def _pool(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"pool": body["pool"]} if body.get("pool") else {}


def _bring(session: Session, name: str, index: int, disk: ImportedDisk, pool: str | None, made: _Made) -> str:
    """Unpack a disk, send it, and return the name of the image that it is then."""
    image = f"{name}-disk{index}"
    import tempfile

    with tempfile.TemporaryDirectory(prefix="trimtab-import-") as scratch:
        directory = Path(scratch)
        if disk.size_bytes and not files.room_for(directory, _ROOM_SPARE):
            raise usage(f"there is no room in {directory.parent} to unpack disks; set TMPDIR to where there is", code="no-room")
        line = ProgressLine(session)
        try:
            file, disk_format = disk.unpack(directory, _meter(line, disk.label))
        except OSError as error:
            raise usage(f"disk {disk.label}: cannot be unpacked: {error.strerror or error}", code="unpack-failed") from error
        finally:
            line.clear()
        upload = send_file(session, image, file)
    body = {
        "name": image,
        "kind": "disk",
        "format": disk_format,
        "source": {"upload_id": upload},
        **({"pool": pool} if pool else {}),
    }
    _run(session, IMAGE.place(session), body, made, IMAGE.place(session, image), f"image {image}")
    return image


def _meter(line: ProgressLine, label: str) -> Callable[[int, int], None]:
    def at(done_bytes: int, total_bytes: int) -> None:
        share = f"  {humanise.bar(done_bytes, total_bytes)}" if total_bytes else ""
        line.update(f"unpacking {label}{share}", "unpacking")

    return at


def _run(
    session: Session, path: str, body: Mapping[str, Any], made: _Made | None = None, place: str = "", what: str = ""
) -> None:
    from trimtab_controller.cli import waiting

    # Each under a key of its own: a request id of the command line would make them one.
    answer = session.client.send("POST", path, body) or {}
    if made is not None:
        made.places.append((what, place))
    operation = answer.get("operation")
    try:
        if operation:
            waiting.until_done(session, operation)
    except KeyboardInterrupt:
        assert operation is not None, "only a wait is interrupted here"
        session.client.close()  # its connection waits for an answer that nobody reads
        session.client.send("POST", f"/v1/operations/{operation['id']}:cancel", {})
        waiting.until_ended(session, operation)
        raise


def _undo(session: Session, made: _Made) -> None:
    """Take away what was made, last first; what cannot go yet is named."""
    from trimtab_controller.cli import waiting

    for what, place in reversed(made.places):
        try:
            answer = session.client.send("DELETE", place) or {}
            if answer.get("operation"):
                waiting.until_done(session, answer["operation"])
        except CommandFailed as error:
            if error.kind != "not_found":
                render.say(f"{what} stays: {error.message}")
