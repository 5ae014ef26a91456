"""Networks: the operator's bridges are looked at, ours are defined."""

import ipaddress
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.unit.agent.kvm.factories import bridge_network, nat_network
from trimtab_agent.hypervisor.kvm import vlans
from trimtab_agent.hypervisor.kvm.host_links import look_again, read_bridges
from trimtab_agent.hypervisor.kvm.networks import bridge_of, check_bridge, network_xml, own_bridge
from trimtab_agent.hypervisor.kvm.uplinks import Uplinks
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.messages import NetworkKind
from trimtab_protos.network_messages import Bridge


@pytest.fixture
def sys_net(tmp_path: Path) -> Path:
    """A /sys/class/net with bridge br0 over eth0 (carrier) and a guest's port, own bridge tt-1 without ports, and eth1 down."""
    for link, mtu, carrier in (
        ("br0", 1500, "1"),
        ("eth0", 1500, "1"),
        ("vnet3", 1500, "1"),
        ("tn-0123456789", 1500, "1"),
        ("eth1", 9000, "0"),
        ("tt-1", 1400, "0"),
    ):
        (tmp_path / link).mkdir()
        (tmp_path / link / "mtu").write_text(f"{mtu}\n")
        (tmp_path / link / "carrier").write_text(f"{carrier}\n")
    for bridge, ports in (("br0", ("eth0", "vnet3", "tn-0123456789")), ("tt-1", ())):
        (tmp_path / bridge / "bridge").mkdir()
        (tmp_path / bridge / "brif").mkdir()
        for port in ports:
            (tmp_path / bridge / "brif" / port).mkdir()
    return tmp_path


def test_a_bridge_that_fits_passes(sys_net: Path) -> None:
    before = sorted(path.name for path in sys_net.rglob("*"))
    check_bridge(bridge_network(mtu=1500), sys_net)
    assert sorted(path.name for path in sys_net.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"bridge": "br9"}, "bridge-missing"),
        ({"bridge": "eth0"}, "bridge-missing"),
        ({"mtu": 9000}, "bridge-mtu-too-small"),
    ],
)
def test_a_bridge_that_does_not_fit_is_a_conflict(sys_net: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(Conflict) as refused:
        check_bridge(bridge_network(**changes), sys_net)
    assert refused.value.code == code


def test_a_vlan_is_a_device_on_the_operators_bridge_and_a_bridge_of_ours_over_it() -> None:
    own = own_bridge("net-1")
    made = vlans.making(own, base="br0", vlan=20, mtu=9000)
    device = vlans.device_of(own)
    assert [" ".join(command) for command in made] == [
        f"link add link br0 name {device} mtu 9000 type vlan id 20",
        f"link add name {own} mtu 9000 type bridge stp_state 0 forward_delay 0",
        f"link set dev {device} master {own} up",
        f"link set dev {own} up",
    ]
    assert len(device) <= 15
    assert bridge_of(bridge_network(vlan=20), "nic-1") == own_bridge(bridge_network().network_id), "guests are on ours"
    assert bridge_of(bridge_network(), "nic-1") == "br0"
    for wrong in ({"base": "br0; reboot"}, {"vlan": 0}, {"vlan": 4095}):
        with pytest.raises(InvalidRequest):
            vlans.making(own, **{"base": "br0", "vlan": 20, "mtu": 1500, **wrong})  # type: ignore[arg-type]


def test_a_host_that_cannot_make_a_vlan_says_so_and_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(Conflict) as refused:
        vlans.ensure("lan", "tt-absent", base="no-such-bridge"[:15], vlan=20, mtu=1500, sys_net=tmp_path)
    assert refused.value.code == "vlan-not-supported"
    assert "--bridge-on" in refused.value.message
    assert not Path("/sys/class/net/tv-absent").exists()


@pytest.mark.parametrize("bridge", ["", "../lo", "a/b", "x" * 16, "br 0"])
def test_no_bridge_name_leaves_its_directory(sys_net: Path, bridge: str) -> None:
    with pytest.raises(InvalidRequest):
        check_bridge(bridge_network(bridge=bridge), sys_net)


def test_inventory_shows_bridges_without_guests_ports(sys_net: Path) -> None:
    assert read_bridges(sys_net) == (
        Bridge(name="br0", mtu=1500, has_carrier=True, ports=("eth0",), is_ours=False),
        Bridge(name="tt-1", mtu=1400, has_carrier=True, ports=(), is_ours=True),
    )
    (sys_net / "eth0" / "carrier").write_text("0\n")
    assert not read_bridges(sys_net)[0].has_carrier


def test_carriers_are_looked_at_again_without_a_whole_inventory(sys_net: Path) -> None:
    switch = Bridge(name="ovs0", mtu=9000, ports=("eth0",), is_open_vswitch=True)
    known = (*read_bridges(sys_net), switch)
    assert look_again(known, sys_net) == known
    (sys_net / "eth0" / "carrier").write_text("0\n")
    assert [(one.name, one.has_carrier) for one in look_again(known, sys_net)] == [
        ("br0", False),
        ("tt-1", True),
        ("ovs0", False),
    ]
    (sys_net / "br0" / "brif" / "eth1").mkdir()
    (sys_net / "eth1" / "carrier").write_text("1\n")
    assert look_again(known, sys_net)[0].has_carrier, "another of its own ports has carrier"
    (sys_net / "br0" / "brif" / "eth0").rmdir()
    (sys_net / "br0" / "brif" / "eth1").rmdir()
    assert look_again(known, sys_net)[0].has_carrier, "one without ports reaches what is inside"
    gone = (Bridge(name="br9", ports=("eth9",)),)
    assert look_again(gone, sys_net) == gone, "the next inventory tells"


def take_away(sys_net: Path, device: str, bridge: str) -> None:
    """As the kernel does when a card dies: the device is gone, and out of its bridge with it."""
    (sys_net / bridge / "brif" / device).rmdir()
    shutil.rmtree(sys_net / device)


def test_a_card_that_vanished_is_a_lost_carrier_at_the_next_heartbeat_and_one_that_was_taken_out_is_not(sys_net: Path) -> None:
    known = read_bridges(sys_net)
    (sys_net / "br0" / "brif" / "eth0").rmdir()
    assert look_again(known, sys_net)[0].has_carrier, "its device is there: somebody took it out"
    (sys_net / "br0" / "brif" / "eth0").mkdir()
    take_away(sys_net, "eth0", "br0")
    lost = look_again(known, sys_net)
    assert (lost[0].has_carrier, lost[0].ports) == (False, ("eth0",))
    assert look_again(lost, sys_net) == lost, "and the heartbeat after that"
    (sys_net / "eth1" / "carrier").write_text("1\n")
    (sys_net / "br0" / "brif" / "eth1").mkdir()
    assert (look_again(lost, sys_net)[0].has_carrier, look_again(lost, sys_net)[0].ports) == (True, ("eth1",))


def test_a_card_that_vanished_stays_lost_over_a_boot_and_until_the_bridge_has_another(sys_net: Path, tmp_path: Path) -> None:
    path = tmp_path / "uplinks.json"
    assert Uplinks(path, sys_net).judge(read_bridges(sys_net)) == read_bridges(sys_net)
    take_away(sys_net, "eth0", "br0")
    after_boot = Uplinks(path, sys_net)
    for _time in range(2):
        assert [(one.name, one.has_carrier, one.ports) for one in after_boot.judge(read_bridges(sys_net))] == [
            ("br0", False, ("eth0",)),
            ("tt-1", True, ()),
        ]
    (sys_net / "br0" / "brif" / "eth1").mkdir()
    (sys_net / "eth1" / "carrier").write_text("1\n")
    assert after_boot.judge(read_bridges(sys_net)) == read_bridges(sys_net)
    (sys_net / "br0" / "brif" / "eth1").rmdir()
    assert after_boot.judge(read_bridges(sys_net))[0].has_carrier, "its device is there: somebody took it out"


@pytest.mark.parametrize("written", ["", "[]", "{", '{"br0": 3}'])
def test_a_file_of_links_that_cannot_be_read_is_no_reason_to_have_no_inventory(
    sys_net: Path, tmp_path: Path, written: str
) -> None:
    path = tmp_path / "uplinks.json"
    path.write_text(written)
    assert Uplinks(path, sys_net).judge(read_bridges(sys_net)) == read_bridges(sys_net)


def test_nat_network_gives_addresses_of_its_subnet_only() -> None:
    root = ElementTree.fromstring(network_xml(nat_network(subnet="10.20.0.0/24", mtu=1400)))
    forward, address, leases, mtu = root.find("forward"), root.find("ip"), root.find("ip/dhcp/range"), root.find("mtu")
    assert forward is not None
    assert address is not None
    assert leases is not None
    assert mtu is not None
    assert (forward.get("mode"), mtu.get("size"), address.get("address")) == ("nat", "1400", "10.20.0.1")
    subnet = ipaddress.ip_network("10.20.0.0/24")
    first, last = ipaddress.ip_address(leases.get("start", "")), ipaddress.ip_address(leases.get("end", ""))
    assert first in subnet
    assert last in subnet
    assert address.get("address") != leases.get("start")
    assert last != subnet.broadcast_address


def test_isolated_network_has_neither_forward_nor_host_address() -> None:
    root = ElementTree.fromstring(network_xml(nat_network(kind=NetworkKind.ISOLATED, has_dhcp=False, subnet="")))
    assert root.find("forward") is None
    assert root.find("ip") is None


@pytest.mark.parametrize("subnet", ["", "10.20.0.5/24", "10.20.0.0/30", "fd00::/64", "x", "10.20.0.0/24<"])
def test_impossible_subnets_are_refused(subnet: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        network_xml(nat_network(subnet=subnet))
    assert refused.value.code == "network-subnet"


def test_own_bridges_fit_the_kernels_names() -> None:
    names = {own_bridge(f"net-{number}") for number in range(1000)}
    assert len(names) == 1000
    assert all(len(name) <= 15 and name.startswith("tt-") for name in names)
