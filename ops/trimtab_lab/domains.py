"""Plain libvirt definitions of the lab's guest, for tests of the lab itself and for unmanaged guests on a host.

Not how Trimtab defines a vm: that is the agent's domain builder.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from trimtab_lab.commands import run
from trimtab_lab.specs import GUEST_BRIDGE


@dataclass(frozen=True, slots=True)
class GuestSpec:
    name: str
    disk: str
    """Path of its qcow2 disk inside the host."""
    memory_mib: int = 96
    hardware_address: str | None = None
    """MAC of its one card on the guest bridge; `None` for a guest without network."""
    seed: str | None = None
    """Path of a NoCloud image inside the host."""


def domain_xml(guest: GuestSpec) -> str:
    card = ""
    if guest.hardware_address:
        card = (
            f"<interface type='bridge'><source bridge='{GUEST_BRIDGE}'/><mac address='{guest.hardware_address}'/>"
            "<model type='virtio'/></interface>"
        )
    seed = ""
    if guest.seed:
        seed = (
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
            f"<source file='{escape(guest.seed)}'/><target dev='vdz' bus='virtio'/><readonly/></disk>"
        )
    ports = "<controller type='pci' model='pcie-root-port'/>" * 8
    return f"""<domain type='qemu'>
  <name>{guest.name}</name><memory unit='MiB'>{guest.memory_mib}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <features><acpi/><apic/><tcg><tb-cache unit='MiB'>16</tb-cache></tcg></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='{escape(guest.disk)}'/><target dev='vda' bus='virtio'/></disk>{seed}
    <controller type='pci' model='pcie-root'/>{ports}{card}
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <serial type='file'><source path='/var/log/libvirt/qemu/{guest.name}.serial' append='on'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='virtio'><stats period='2'/></memballoon>
  </devices>
</domain>"""


def write_seed(path: Path, *, hostname: str, hardware_address: str, address: str, user_text: str = "") -> None:
    """A NoCloud image for one guest with one card and a fixed address, as in `10.77.1.11/24`."""
    import io

    import pycdlib

    network = {
        "version": 2,
        "ethernets": {"nic0": {"match": {"macaddress": hardware_address}, "set-name": "eth0", "addresses": [address]}},
    }
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (name, text) in enumerate(
        (
            ("meta-data", f"instance-id: i-{hostname}\nlocal-hostname: {hostname}\n"),
            ("user-data", f"#cloud-config\n{user_text}\n"),
            ("network-config", json.dumps(network)),
        )
    ):
        content = text.encode()
        image.add_fp(io.BytesIO(content), len(content), f"/F{number}.;1", rr_name=name, joliet_path=f"/{name}")
    image.write(str(path))
    image.close()


def clone_disk(image: Path, disk: Path, *, copy: bool = False) -> None:
    """A disk of the guest's own: a linked clone of `image` (which every host must see), or a full copy."""
    if copy:
        run(["qemu-img", "convert", "-O", "qcow2", str(image), str(disk)], timeout_s=120)
    else:
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(disk)])
