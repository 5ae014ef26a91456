"""What our seeds say to the cloud-init of Debian: it reads the images that agents make, and does what they say. Needs root, no lab."""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab.cloud_init_disk import RENDERERS, Disk, base_disk, new_disk
from trimtab_agent.hypervisor.kvm import seed as seed_image
from trimtab_controller.services import seeds
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import SeedSpec

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]

KEY, HERS = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGl6", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGl7 ada"
USER_DATA = f"""#cloud-config
users:
- default
- name: ada
  ssh_authorized_keys: ["{HERS}"]
write_files:
- path: /etc/greeting
  content: good morning
runcmd:
- [sh, -c, hostname >/ran]
"""
LAN = seeds.SeedNic(
    nic_index=0,
    mac="52:54:00:0a:0b:01",
    addresses=("192.0.2.5/24",),
    gateway="192.0.2.1",
    dns=("192.0.2.53", "2001:db8::53"),
)
OTHER = seeds.SeedNic(nic_index=1, mac="52:54:00:0a:0b:02", addresses=("198.51.100.5/24",), gateway="198.51.100.1")
SIX = seeds.SeedNic(nic_index=2, mac="52:54:00:0a:0b:03", addresses=("2001:db8::5/64",), gateway="2001:db8::1")
CARDS = (LAN, OTHER, SIX)
MACS = [one.mac for one in CARDS]
WRONG_NETWORK = f"""version: 2
ethernets:
  nic0:
    match: {{macaddress: "{LAN.mac}"}}
    addresses: [192.0.2.300/24]
"""
IMAGES_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory, which an overlay over this machine's root may have its upper layer in."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="trimtab-cloud-init-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return base_disk(folder)


def image(documents: dict[str, str]) -> bytes:
    return seed_image.build(SeedSpec(**documents))


def told(user_data: str = USER_DATA, network_config: str = "") -> dict[str, str]:
    wish = seeds.SeedWish(hostname="by-seed", user_data=user_data, ssh_keys=(KEY,), network_config=network_config)
    return seeds.documents(wish, vm_id="vm-1", vm_name="web1", nics=CARDS)


def result(disk: Disk) -> dict[str, Any]:
    """Return cloud-init's own account: where it read, and what went wrong."""
    return dict(json.loads(disk.read("/seen/result.json"))["v1"])


def host_keys(disk: Disk) -> set[str]:
    return {disk.read(f"/etc/ssh/ssh_host_{kind}_key.pub").split()[1] for kind in ("ed25519", "rsa", "ecdsa")}


# --- the network -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_card_has_its_address_and_the_first_of_each_family_leads_out(base: Path, folder: Path, renderer: str) -> None:
    disk = new_disk(folder / renderer, base, renderer)
    disk.start(image(told()), MACS)
    assert result(disk)["errors"] == []
    {"eni": is_ifupdowns, "netplan": is_netplans, "networkd": is_networkds}[renderer](disk)


def is_ifupdowns(disk: Disk) -> None:
    """Its interfaces came up, by ifupdown itself, as the file says."""
    shown = {one["address"]: one for one in json.loads(disk.read("/seen/addresses")) if one["ifname"].startswith("eth")}
    found = {mac: [f"{a['local']}/{a['prefixlen']}" for a in shown[mac]["addr_info"] if a["scope"] == "global"] for mac in MACS}
    assert found == {one.mac: list(one.addresses) for one in CARDS}
    routes = [one for name in ("routes", "routes6") for one in json.loads(disk.read(f"/seen/{name}")) if "gateway" in one]
    assert sorted((one["dst"], one["gateway"], one["dev"]) for one in routes) == [
        ("8000::/1", "2001:db8::1", "eth2"),
        ("::/1", "2001:db8::1", "eth2"),
        ("default", "192.0.2.1", "eth0"),
    ]
    _, _, stanza = disk.read("/etc/network/interfaces.d/50-cloud-init").partition("iface eth0 inet static\n")
    assert "    dns-nameservers 192.0.2.53 2001:db8::53\n" in stanza.partition("\n\n")[0]


def is_netplans(disk: Disk) -> None:
    """It has made netplan write for systemd-networkd."""
    assert_networks([disk.read(f"/seen/network/10-netplan-nic{number}.network") for number in range(3)])


def is_networkds(disk: Disk) -> None:
    assert_networks([disk.read(f"/etc/systemd/network/10-cloud-init-eth{number}.network") for number in range(3)])


def assert_networks(files: list[str]) -> None:
    found = []
    for text in files:
        pairs = [line.partition("=") for line in text.splitlines() if "=" in line]
        wanted = ("MACAddress", "PermanentMACAddress", "Address", "DNS", "Destination", "Gateway")
        found.append([value for name in wanted for key, _, values in pairs if key == name for value in values.split()])
    assert found == [
        [LAN.mac, "192.0.2.5/24", "192.0.2.53", "2001:db8::53", "0.0.0.0/0", "192.0.2.1"],
        [OTHER.mac, "198.51.100.5/24"],
        [SIX.mac, "2001:db8::5/64", "::/1", "8000::/1", "2001:db8::1", "2001:db8::1"],
    ]


# --- who it is -------------------------------------------------------------------------------------------------------------


def test_a_guest_is_who_its_seed_says_and_its_clone_is_another(base: Path, folder: Path) -> None:
    disk = new_disk(folder / "identity", base, "eni")
    disk.start(image(told()), MACS)
    assert result(disk)["datasource"].startswith("DataSourceNoCloud [seed=/dev/loop")
    assert result(disk)["errors"] == []
    assert disk.read("/var/lib/cloud/data/instance-id") == "vm-1\n"
    assert (disk.read("/seen/hostname"), disk.read("/etc/hostname")) == ("by-seed\n", "by-seed\n")
    assert disk.read("/home/ada/.ssh/authorized_keys").splitlines()[-1] == HERS
    assert disk.read("/home/debian/.ssh/authorized_keys").splitlines()[-1] == KEY
    assert (disk.read("/etc/greeting"), disk.read("/ran")) == ("good morning", "by-seed\n")
    assert disk.read("/seen/schema") == "Valid cloud-config: /var/lib/cloud/instance/user-data.txt\n"
    assert disk.read("/seen/machine-id") == f"{IMAGES_ID}\n", "only a clone draws another"
    keys = host_keys(disk)

    nics = [replace(LAN, mac="52:54:00:0a:0b:11", addresses=("192.0.2.6/24",))]
    clone = seeds.for_clone(told(), vm_id="vm-2", vm_name="web2", nics=nics)
    disk.start(image(clone), [nics[0].mac])
    assert result(disk)["errors"] == []
    assert disk.read("/var/lib/cloud/data/instance-id") == "vm-2\n"
    assert {one.name for one in (disk.upper / "var/lib/cloud/instances").iterdir()} == {"vm-1", "vm-2"}
    assert (disk.read("/seen/hostname"), disk.read("/etc/hostname"), disk.read("/ran")) == ("web2\n", "web2\n", "web2\n")
    assert not keys & host_keys(disk), "its host keys are its own"
    drawn = disk.read("/seen/machine-id")
    assert re.fullmatch("[0-9a-f]{32}\n", drawn)
    assert drawn != f"{IMAGES_ID}\n"
    assert disk.read("/seen/schema") == "Valid cloud-config: /var/lib/cloud/instance/user-data.txt\n"
    interfaces = disk.read("/etc/network/interfaces.d/50-cloud-init")
    assert "address 192.0.2.6/24" in interfaces
    assert "192.0.2.5/24" not in interfaces
    (way,) = [one for one in json.loads(disk.read("/seen/routes")) if "gateway" in one]
    assert (way["dst"], way["gateway"]) == ("default", "192.0.2.1")

    disk.start(image(clone), [nics[0].mac])
    assert (disk.read("/seen/machine-id"), result(disk)["errors"]) == (drawn, []), "it stays who it is when it starts again"


def test_what_the_user_says_of_the_network_is_passed_on_and_the_guest_says_why_it_refuses_it(base: Path, folder: Path) -> None:
    for wrong, said in (("version: [", "no YAML"), ("ethernets: {}", "`version: 1` or `version: 2`")):
        with pytest.raises(InvalidRequest, match=said):
            told(network_config=wrong)
    disk = new_disk(folder / "refused", base, "eni")
    disk.start(image(told(network_config=WRONG_NETWORK)), MACS)
    (problem,) = result(disk)["errors"]
    assert "Address 192.0.2.300/24 is not a valid ip" in problem
    assert disk.read("/etc/network/interfaces.d/50-cloud-init") == ""
    assert disk.read("/home/ada/.ssh/authorized_keys").splitlines()[-1] == HERS, "the rest of the seed holds"
