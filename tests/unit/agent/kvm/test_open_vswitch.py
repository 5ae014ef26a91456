"""Bridges of Open vSwitch: what they are, which VLANs they carry, and what is made on them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent.kvm.factories import bridge_network
from trimtab_agent.hypervisor.kvm import open_vswitch
from trimtab_agent.hypervisor.kvm.host_links import read_bridges
from trimtab_agent.hypervisor.kvm.networks import bridge_of, check_bridge, own_bridge
from trimtab_agent.hypervisor.kvm.open_vswitch import Port, Switch, parse_switches
from trimtab_agent.hypervisor.kvm.overlays import with_mappings
from trimtab_protos.errors import Conflict, InvalidRequest
from trimtab_protos.messages import NetworkKind
from trimtab_protos.network_messages import Bridge


def table(headings: list[str], *rows: list[Any]) -> str:
    return json.dumps({"headings": headings, "data": list(rows)})


def uuid(name: str) -> list[str]:
    return ["uuid", name]


def some(*values: Any) -> list[Any]:
    return ["set", list(values)]


def test_a_way_out_is_added_to_ovns_mappings_and_those_of_others_stay() -> None:
    assert with_mappings("", {"net-1": "br0"}) == "net-1:br0"
    assert with_mappings("physnet:br1,net-1:br9", {"net-1": "br0"}) == "physnet:br1,net-1:br0"
    assert with_mappings("physnet:br1,net-1:br0", {"net-1": ""}) == "physnet:br1"
    assert with_mappings("physnet:br1", {"net-1": ""}) == "physnet:br1"


TOLD = "\n".join(
    (
        table(
            ["name", "ports", "datapath_type"],
            ["br0", some(uuid("p-br0"), uuid("p-eth1"), uuid("p-bond"), uuid("p-tw"), uuid("p-vnet"), uuid("p-patch")), "netdev"],
            ["alone", uuid("p-alone"), ""],
        ),
        table(
            ["_uuid", "name", "tag", "trunks", "interfaces"],
            [uuid("p-br0"), "br0", some(), some(), uuid("i-br0")],
            [uuid("p-alone"), "alone", some(), some(), uuid("i-alone")],
            [uuid("p-eth1"), "eth1", some(), some(20, 30), uuid("i-eth1")],
            [uuid("p-bond"), "bond0", 7, some(), some(uuid("i-eth2"), uuid("i-eth3"))],
            [uuid("p-tw"), "tw-0123456789", 20, some(), uuid("i-tw")],
            [uuid("p-vnet"), "vnet3", some(), some(), uuid("i-vnet")],
            [uuid("p-patch"), "to-int", some(), some(), uuid("i-patch")],
        ),
        table(
            ["_uuid", "name", "type"],
            [uuid("i-br0"), "br0", "internal"],
            [uuid("i-alone"), "alone", "internal"],
            [uuid("i-eth1"), "eth1", ""],
            [uuid("i-eth2"), "eth2", ""],
            [uuid("i-eth3"), "eth3", "system"],
            [uuid("i-tw"), "tw-0123456789", ""],
            [uuid("i-vnet"), "vnet3", ""],
            [uuid("i-patch"), "to-int", "patch"],
        ),
    )
)


@pytest.fixture
def switch() -> Switch:
    return next(each for each in parse_switches(TOLD) if each.name == "br0")


@pytest.fixture
def sys_net(tmp_path: Path) -> Path:
    for link, mtu in (("br0", 1500), ("eth1", 9000), ("eth2", 9000), ("eth3", 9000), ("alone", 1400)):
        (tmp_path / link).mkdir()
        (tmp_path / link / "mtu").write_text(f"{mtu}\n")
        (tmp_path / link / "carrier").write_text("1\n")
    return tmp_path


def test_a_bridge_is_told_by_its_links_and_not_by_guests_ports(switch: Switch, sys_net: Path) -> None:
    assert switch.is_user_space
    assert switch.links == ("eth1", "eth2", "eth3")
    assert read_bridges(sys_net, parse_switches(TOLD)) == (
        Bridge(name="alone", mtu=1400, has_carrier=True, ports=(), is_open_vswitch=True),
        # Of its links: Open vSwitch lowers the bridge's own device to the smallest of all ports, guests' among them.
        Bridge(name="br0", mtu=9000, has_carrier=True, ports=("eth1", "eth2", "eth3"), is_open_vswitch=True),
    )


@pytest.mark.parametrize(("vlan", "carries"), [(20, True), (30, True), (7, True), (40, False)])
def test_a_vlan_that_no_link_carries_is_refused_with_its_cure(switch: Switch, sys_net: Path, vlan: int, carries: bool) -> None:
    network = bridge_network(vlan=vlan, mtu=9000)
    if carries:
        check_bridge(network, sys_net, switch=switch)
        return
    with pytest.raises(Conflict) as refused:
        check_bridge(network, sys_net, switch=switch)
    assert refused.value.code == "vlan-unreachable"
    assert "`ovs-vsctl add port bond0 trunks 40`" not in refused.value.message, "an access port is no trunk to add to"
    assert "`ovs-vsctl add port eth1 trunks 40`" in refused.value.message


def test_a_bridge_without_links_reaches_what_is_inside_and_a_trunk_without_a_list_carries_all(sys_net: Path) -> None:
    alone = next(each for each in parse_switches(TOLD) if each.name == "alone")
    check_bridge(bridge_network(bridge="alone", vlan=99, mtu=1400), sys_net, switch=alone)
    trunk = Switch(name="br0", is_user_space=False, ports=(Port(name="eth1", interfaces=("eth1",)),))
    check_bridge(bridge_network(vlan=99), sys_net, switch=trunk)


@pytest.mark.parametrize(
    ("changes", "code"), [({"vlan": 0}, "bridge-needs-vlan"), ({"vlan": 20, "mtu": 9100}, "bridge-mtu-too-small")]
)
def test_what_a_bridge_of_open_vswitch_cannot_be_is_refused(
    switch: Switch, sys_net: Path, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(Conflict) as refused:
        check_bridge(bridge_network(**changes), sys_net, switch=switch)
    assert refused.value.code == code


def test_a_network_is_one_access_port_and_a_bridge_of_ours(switch: Switch) -> None:
    own = own_bridge("net-1")
    made = open_vswitch.making(own, switch, open_vswitch.access(own, 20), mtu=1500, link_mtu=9000)
    device, port = open_vswitch.device_of(own), open_vswitch.access_port_of(own)
    assert [" ".join(command) for command in made] == [
        f"ip link add name {own} mtu 1500 type bridge stp_state 0 forward_delay 0",
        f"ip link add name {device} mtu 9000 type veth peer name {port} mtu 9000",
        f"ethtool -K {device} tx off",
        f"ip link set dev {device} master {own} up",
        f"ip link set dev {own} up",
        f"ip link set dev {port} up",
        f"ovs-vsctl --timeout=5 --may-exist add-port br0 {port} -- set Port {port} tag=20",
    ]
    assert max(len(name) for name in (own, device, port)) <= 15
    in_kernel = Switch(name="br0", is_user_space=False)
    others = open_vswitch.making(own, in_kernel, open_vswitch.access(own, 20), mtu=1500, link_mtu=1500)
    assert not any(command[0] == "ethtool" for command in others), "a kernel's datapath takes checksums as they are"
    with pytest.raises(InvalidRequest):
        open_vswitch.access(own, 4095)


def test_a_card_on_an_overlay_is_on_a_bridge_of_its_own() -> None:
    overlay = bridge_network(kind=NetworkKind.OVERLAY, bridge="")
    assert bridge_of(overlay, "nic-1") == own_bridge("nic-1")
    assert bridge_of(overlay, "nic-2") != bridge_of(overlay, "nic-1")
    with pytest.raises(InvalidRequest):
        bridge_of(overlay, "nic-1; reboot")
