"""Reads a domain of a libvirt host that is in no fleet, over that host's own ways in: `virsh` on this machine, by ssh or TLS.

The domain must be off, and nothing of it is changed: its definition is read, its disks are copied. A domain of a host that has joined
is adopted instead (`trimtab vm adopt`), which copies nothing.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element

from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.imports.plan import CARDS_MAX, DISKS_MAX, ImportedCard, ImportedDisk, ImportPlan
from trimtab_controller.cli.imports.xml_safe import XML_MAX_BYTES, parse

# No `?`: parameters of a URI can name programs to run.
_PLACE = re.compile(
    r"(?P<uri>qemu(\+ssh|\+tls|\+unix)?://[A-Za-z0-9.@:_\[\]-]*/(system|session))/(?P<domain>[A-Za-z0-9][A-Za-z0-9._+-]{0,127})"
)
_ASK_TIMEOUT_S = 60.0
_COPY_TIMEOUT_S = 24 * 3600.0
_MIB_OF = {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024, "bytes": 1 / (1 << 20), "b": 1 / (1 << 20), "k": 1 / 1024, "M": 1, "G": 1024}
_EXPRESSED = frozenset({
    "name", "uuid", "metadata", "memory", "currentMemory", "maxMemory", "vcpu", "vcpus", "os", "features", "cpu", "clock", "on_poweroff",
    "on_reboot", "on_crash", "devices", "pm", "resource", "seclabel", "genid", "title", "description",
})  # fmt: skip
_EXPRESSED_DEVICES = frozenset({
    "emulator", "disk", "interface", "controller", "serial", "console", "memballoon", "rng", "video", "audio", "input", "graphics",
    "channel",
})  # fmt: skip


def read(place: str) -> ImportPlan:
    """Return what the domain at `URI/DOMAIN` is. CommandFailed where it runs, or a disk of it is no file that can be copied."""
    matched = _PLACE.fullmatch(place)
    if matched is None:
        raise usage(f"--from-libvirt {place[:120]}: give URI/DOMAIN, for example qemu+ssh://root@old1/system/legacy-db")
    uri, domain = matched["uri"], matched["domain"]
    state = _virsh(uri, "domstate", domain).strip()
    if state != "shut off":
        raise CommandFailed(
            f"domain {domain} is {state}; it is copied when it is off",
            code="domain-runs",
            kind="conflict",
            hint=f"virsh -c {uri} shutdown {domain}",
        )
    root = parse(_virsh(uri, "dumpxml", "--inactive", domain).encode(), f"the definition of domain {domain}")
    disks = [disk for disk in root.findall("devices/disk") if disk.get("device", "disk") == "disk"]
    cards = root.findall("devices/interface")
    if len(disks) > DISKS_MAX or len(cards) > CARDS_MAX:
        raise usage(f"domain {domain} has {len(disks)} disks and {len(cards)} cards; {DISKS_MAX} of each at most")
    ordered = sorted(disks, key=_boot_order)
    return ImportPlan(
        name=domain,
        vcpus=_vcpus(root),
        memory_mib=_memory_mib(root),
        firmware="uefi" if root.find("os/loader") is not None or _firmware(root) == "efi" else "bios",
        disks=tuple(_disk(uri, domain, disk) for disk in ordered),
        cards=tuple(_card(card) for card in cards),
        unexpressed=tuple(_unexpressed(root)),
    )


def _virsh(uri: str, *arguments: str, timeout_s: float = _ASK_TIMEOUT_S) -> str:
    program = shutil.which("virsh")
    if program is None:
        raise usage("--from-libvirt: needs virsh on this machine; install libvirt-clients", code="virsh-missing")
    try:
        done = subprocess.run(
            [program, "-c", uri, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{uri} did not answer in time", code="libvirt-silent", kind="deadline_exceeded") from error
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("error: ").splitlines()
        raise CommandFailed(
            f"virsh {arguments[0]} at {uri}: {said[0][:300] if said else 'it failed and said nothing'}",
            code="libvirt-refused",
            kind="unavailable",
        )
    if len(done.stdout) > 2 * XML_MAX_BYTES:
        raise usage(f"{uri} answered more than {2 * XML_MAX_BYTES >> 20} MiB", code="import-refused")
    return done.stdout


def _disk(uri: str, domain: str, disk: Element) -> ImportedDisk:
    source, driver, target = disk.find("source"), disk.find("driver"), disk.find("target")
    label = target.get("dev", "") if target is not None else ""
    path = (source.get("file") or source.get("dev") or "") if source is not None else ""
    disk_format = driver.get("type", "raw") if driver is not None else "raw"
    if not path.startswith("/"):
        raise usage(f"disk {label} of domain {domain} is on {disk.get('type', 'nothing')}; files and block devices can be copied")
    if disk_format not in ("raw", "qcow2"):
        raise usage(f"disk {label} of domain {domain} is {disk_format[:20]}; raw and qcow2 can be imported")
    if disk.find("encryption") is not None or disk.find("source/encryption") is not None:
        raise usage(f"disk {label} of domain {domain} is encrypted; decrypt it first")

    def unpack(directory: Path, on_progress: Callable[[int, int], None]) -> tuple[Path, str]:
        copied = directory / f"disk.{disk_format}"
        on_progress(0, 0)
        # By its path: libvirt finds the pool that it lies in, and reads it as that host's root.
        _virsh(uri, "vol-download", "--sparse", path, str(copied), timeout_s=_COPY_TIMEOUT_S)
        return copied, disk_format

    return ImportedDisk(label=label, size_bytes=0, unpack=unpack)


def _boot_order(disk: Element) -> tuple[int, str]:
    boot, target = disk.find("boot"), disk.find("target")
    order = int(boot.get("order", "99")) if boot is not None and boot.get("order", "99").isdigit() else 99
    return order, target.get("dev", "") if target is not None else ""


def _card(card: Element) -> ImportedCard:
    source, mac, model = card.find("source"), card.find("mac"), card.find("model")
    place = (source.get("bridge") or source.get("network") or "") if source is not None else ""
    return ImportedCard(
        source=place,
        mac=mac.get("address", "").lower() if mac is not None else "",
        model=model.get("type", "") if model is not None else "",
    )


def _vcpus(root: Element) -> int:
    vcpu = root.find("vcpu")
    text = (vcpu.get("current") or vcpu.text or "1").strip() if vcpu is not None else "1"
    return int(text) if text.isdigit() else 1


def _memory_mib(root: Element) -> int:
    memory = root.find("memory")
    if memory is None or not (memory.text or "").strip().isdigit():
        return 0
    return int(int((memory.text or "0").strip()) * _MIB_OF.get(memory.get("unit", "KiB"), 1 / 1024))


def _firmware(root: Element) -> str:
    system = root.find("os")
    return system.get("firmware", "") if system is not None else ""


def _unexpressed(root: Element) -> list[str]:
    found = [each.tag for each in root if "}" not in each.tag and each.tag not in _EXPRESSED]
    for device in root.findall("devices/*"):
        if device.tag == "disk" and device.get("device", "disk") != "disk":
            found.append(f"a {device.get('device')} drive; `trimtab vm cdrom` puts an imported ISO in")
        elif device.tag not in _EXPRESSED_DEVICES:
            kind = device.get("type") or device.get("model") or ""
            found.append(f"devices/{device.tag}{f' ({kind})' if kind else ''}")
    if root.find("os/nvram") is not None:
        found.append("its UEFI variables: its firmware looks for a system to boot anew")
    return found
