"""The XML of a pull backup: what libvirt serves, since when, and the checkpoint that it makes in the same transaction. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from trimtab_agent.hypervisor.kvm.xml_tree import parse


@dataclass(frozen=True, slots=True)
class PulledDisk:
    name: str
    scratch: str
    """Where QEMU keeps what the guest overwrites while the old content is being read."""
    base_checkpoint: str = ""
    followed_as: str = ""
    """The alias of a disk that QEMU alone follows, since it keeps no bitmaps; "" where checkpoints are libvirt's."""


def backup_xml(disks: Sequence[PulledDisk], *, socket: str, others: Sequence[str] = ()) -> str:
    """Return the definition of the job; `others` are disks of the domain that are left out."""
    root = Element("domainbackup", mode="pull")
    SubElement(root, "server", transport="unix", socket=socket)
    table = SubElement(root, "disks")
    for disk in disks:
        element = SubElement(table, "disk", name=disk.name, backup="yes", type="file", exportname=disk.name)
        element.set("backupmode", "incremental" if disk.base_checkpoint else "full")
        if disk.base_checkpoint:
            element.set("incremental", disk.base_checkpoint)
            element.set("exportbitmap", bitmap_name(disk.name))
        SubElement(element, "driver", type="qcow2")
        SubElement(element, "scratch", file=disk.scratch)
    for name in others:
        SubElement(table, "disk", name=name, backup="no")
    return ElementTree.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, disks: Sequence[str], *, others: Sequence[str] = (), created_s: int | None = None) -> str:
    """Return the definition of a checkpoint; `created_s`, a Unix time, of one that libvirt shall know again."""
    root = Element("domaincheckpoint")
    SubElement(root, "name").text = name
    if created_s is not None:
        SubElement(root, "creationTime").text = str(created_s)
    table = SubElement(root, "disks")
    for disk in disks:
        SubElement(table, "disk", name=disk, checkpoint="bitmap", bitmap=name)
    for disk in others:
        SubElement(table, "disk", name=disk, checkpoint="no")
    return ElementTree.tostring(root, encoding="unicode")


def bitmap_name(disk: str) -> str:
    return f"backup-{disk}"


def nvram_file(domain_xml: str) -> str:
    """Return the file with the domain's UEFI variables, "" where it boots without."""
    return (parse(domain_xml).findtext("os/nvram") or "").strip()


def all_targets(domain_xml: str) -> Sequence[str]:
    targets = [target.get("dev", "") for target in parse(domain_xml).findall("devices/disk/target")]
    return [target for target in targets if target]


def socket_of_job(job_xml: str) -> str:
    """Return the socket that a running job serves, "" for a job that is not a pull over a unix socket."""
    server = parse(job_xml).find("server")
    return server.get("socket", "") if server is not None else ""
