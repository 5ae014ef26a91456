"""Networks of real guests on two real hosts whose switch is Open vSwitch: VLANs, an overlay by OVN, packet rules, a live migration.

One lab and two guests for the file; everything is asked inside the guests. The tests run in order, as one story.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from tests.contract.kvm_fixture import KvmHost
from tests.lab.guest_view import guest_says
from tests.lab.kvm_guests import Migration, spec_of, start, two_hosts, until, wait_for_tick
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.networks import own_bridge
from trimtab_controller.core.overlay import DEFAULT_MTU, OverlayCard, OverlayNetwork, desired
from trimtab_controller.northbound import OvnNorthbound
from trimtab_lab.hosts import Lab
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainSpec, MigrationResult, MigrationSide, NetworkKind, NetworkSpec, NicSpec, SeedSpec
from trimtab_protos.network_messages import FirewallRule, FirewallSpec

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

MTU = 9000
LISTENER = 7
"""The port on which the lab's guest answers by itself."""


def vlan(number: int) -> NetworkSpec:
    return NetworkSpec(
        network_id=f"net-v{number}", kind=NetworkKind.BRIDGE, name=f"lan{number}", bridge="br0", vlan=number, mtu=MTU
    )


@dataclass
class Story:
    lab: Lab
    node1: KvmHost
    node2: KvmHost
    peer: DomainSpec
    """On node1: VLANs 20 and 30."""
    web: DomainSpec
    """Begins on node2: VLANs 20 and 40."""
    web_host: KvmHost
    northbound: OvnNorthbound
    """What the controller's loop writes to."""

    def tell_ovn(self, *, web: str = "node2", peer_spoofs: bool = False) -> None:
        """Write what the loop writes; `web`: where that vm is."""
        cards = (
            card_of(self.peer, chassis="node1", allows_spoofing=peer_spoofs),
            card_of(self.web, chassis=web, allows_spoofing=False),
        )
        self.northbound.apply(desired([APP], cards))

    def on_peer(self, script: str) -> str:
        return guest_says(self.lab, "node1", self.peer.vm_id, script)

    def on_web(self, script: str) -> str:
        return guest_says(self.lab, self.web_host.name, self.web.vm_id, script)

    def peer_reaches(self, address: str) -> bool:
        return "tick" in self.on_peer(f"nc -w 3 {address} {LISTENER} </dev/null")

    def send_much_to_web(self, address: str) -> None:
        """See 2 MiB arrive whole, in segments that the guest leaves to whoever sends them to cut."""
        count = "printf '#!/bin/sh\\nwc -c >/run/bulk\\n' >/bin/bulk; chmod +x /bin/bulk; rm -f /run/bulk"
        self.on_web(f"{count}; setsid sh -c 'nc -l -p 9001 -e /bin/bulk' </dev/null >/dev/null 2>&1 &")
        until(lambda: ":9001" in self.on_web("netstat -ltn"), what="the listener")
        self.on_peer(f"dd if=/dev/zero bs=64k count=32 2>/dev/null | nc -w 10 {address} 9001")
        until(lambda: self.on_web("cat /run/bulk") == str(2 << 20), what=f"2 MiB at {address}", deadline_s=20)

    def peer_hears_nothing_of(self, address: str, *options: str) -> bool:
        return "bytes from" not in self.on_peer(f"ping -c 2 -W 1 {' '.join(options)} {address} 2>&1")

    def peer_pings(self, address: str, *options: str) -> bool:
        return "bytes from" in self.on_peer(f"ping -c 2 -W 2 {' '.join(options)} {address} 2>&1")


APP = OverlayNetwork(network_id="net-app", subnet="10.30.0.0/24", mtu=DEFAULT_MTU, has_dhcp=True)
APP_SPEC = NetworkSpec(
    network_id=APP.network_id, kind=NetworkKind.OVERLAY, name="app", mtu=APP.mtu, subnet=APP.subnet, has_dhcp=True
)
PEER_APP, WEB_APP = "10.30.0.5", "10.30.0.6"
PEER_20, WEB_20 = "10.198.20.1", "10.198.20.2"
PEER_30, WEB_40 = "10.198.34.1", "10.198.34.2"


def card_of(spec: DomainSpec, *, chassis: str, allows_spoofing: bool) -> OverlayCard:
    nic = spec.nics[2]
    return OverlayCard(
        nic_id=nic.nic_id,
        network_id=nic.network_id,
        mac=nic.mac,
        addresses=nic.addresses,
        vm_name=spec.name,
        chassis=chassis,
        allows_spoofing=allows_spoofing,
    )


def spec_with(host: KvmHost, name: str, cards: dict[int, str], app: str) -> DomainSpec:
    """Return a guest with a card on each VLAN, and a third one on the overlay that asks for its address."""
    made = spec_of(host, name, host.shared_pool)
    index = sum(name.encode()) % 100
    nics = tuple(
        NicSpec(
            nic_id=f"nic-{name}-{number}",
            network_id=f"net-v{number}",
            mac=f"52:54:00:00:{number:02x}:{index:02x}",
            index=at,
            addresses=(f"{address}/24",),
        )
        for at, (number, address) in enumerate(cards.items())
    )
    mac = f"52:54:00:00:ff:{index:02x}"
    overlay = NicSpec(nic_id=f"nic-{name}-app", network_id=APP.network_id, mac=mac, index=2, addresses=(f"{app}/24",))
    lines = ["version: 2", "ethernets:", f"  nic2: {{match: {{macaddress: '{mac}'}}, dhcp4: true, mtu: {APP.mtu}}}"]
    lines += [
        f"  nic{nic.index}: {{match: {{macaddress: '{nic.mac}'}}, addresses: ['{nic.addresses[0]}'], mtu: {MTU}}}" for nic in nics
    ]
    return replace(
        made,
        nics=(*nics, overlay),
        networks=(*(vlan(number) for number in cards), APP_SPEC),
        seed=SeedSpec(meta_yaml=f"instance-id: i-{name}\nlocal-hostname: {name}\n", network_yaml="\n".join(lines) + "\n"),
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with two_hosts(tmp_path_factory.mktemp("kvm-ovs")) as (lab, node1, node2):
        for host in (node1, node2):
            lab.open_vswitch(host.name, mtu=MTU)
        northbound = OvnNorthbound(lab.overlay(["node1", "node2"]), fleet="fleet-lab")
        peer = spec_with(node1, "peer", {20: PEER_20, 30: PEER_30}, PEER_APP)
        web = spec_with(node2, "web", {20: WEB_20, 40: WEB_40}, WEB_APP)
        made = Story(lab, node1, node2, peer, web, node2, northbound)
        made.tell_ovn()
        start(node1, peer)
        start(node2, web)
        wait_for_tick(node1, peer.vm_id, 1)
        wait_for_tick(node2, web.vm_id, 1)
        until(lambda: made.on_peer("echo up") == "up" and made.on_web("echo up") == "up", what="both guests' agents")
        yield made
        northbound.close()


def test_the_inventory_names_the_switch_and_guests_of_one_vlan_meet_with_its_mtu(story: Story) -> None:
    (bridge,) = [each for each in story.node1.hypervisor.inventory().bridges if each.name == "br0"]
    assert (bridge.is_open_vswitch, bridge.mtu, bridge.ports) == (True, MTU, ("ovs0",))
    assert story.peer_pings(WEB_20, "-s", str(MTU - 28)), "the largest packet arrives"
    assert story.peer_reaches(WEB_20), "and TCP, whose checksums no hardware adds"
    story.send_much_to_web(WEB_20)


def test_frames_of_one_tag_do_not_reach_another(story: Story) -> None:
    story.on_peer(f"ip neigh replace {WEB_40} lladdr {story.web.nics[1].mac} dev eth1")
    assert story.peer_hears_nothing_of(WEB_40), "not even to a MAC that it knows"
    tags = story.lab.run("node1", ["ovs-vsctl", "--columns=name,tag", "--format=csv", "list", "Port"]).stdout
    assert ",20" in tags
    assert ",30" in tags


def test_a_vlan_that_the_host_does_not_reach_is_refused_and_nothing_is_made(story: Story) -> None:
    story.lab.run("node1", ["ovs-vsctl", "set", "Port", "ovs0", "trunks=0,20,30,40"])
    with pytest.raises(Conflict) as refused:
        story.node1.hypervisor.ensure_network(vlan(50))
    assert refused.value.code == "vlan-unreachable"
    assert "ovs-vsctl add port ovs0 trunks 50" in refused.value.message
    assert own_bridge("net-v50") not in story.lab.run("node1", ["ip", "link"]).stdout
    with pytest.raises(Conflict, match="MTU 9100"):
        story.node1.hypervisor.ensure_network(replace(vlan(20), network_id="net-big", mtu=9100))
    story.lab.run("node1", ["ovs-vsctl", "add", "Port", "ovs0", "trunks", "50"])
    story.node1.hypervisor.ensure_network(vlan(50))
    story.node1.hypervisor.remove_network("net-v50")
    left = story.lab.run("node1", ["sh", "-c", "ip link; ovs-vsctl list-ports br0"]).stdout
    assert own_bridge("net-v50").removeprefix("tt-") not in left, "and what was made goes with the network"


def test_guests_meet_over_the_overlay_with_address_and_name_by_ovn(story: Story) -> None:
    assert story.node1.hypervisor.inventory().overlay_chassis == "node1"
    until(lambda: PEER_APP in story.on_peer("ip -4 addr show eth2"), what="the address that OVN's DHCP gives")
    until(lambda: WEB_APP in story.on_web("ip -4 addr show eth2"), what="the other's")
    # The first packets are lost while either switch asks for the other's MAC.
    until(lambda: story.peer_pings(WEB_APP), what="the tunnel to carry")
    assert story.peer_pings(WEB_APP, "-s", str(APP.mtu - 28)), "across hosts, with the largest packet"
    assert story.peer_reaches(WEB_APP)
    story.send_much_to_web(WEB_APP)
    assert WEB_APP in story.on_peer("nslookup web 10.30.0.1 2>&1"), "by its name too"
    assert "geneve" in story.lab.run("node1", ["ovs-vsctl", "--columns=type", "list", "Interface"]).stdout
    with pytest.raises(Conflict, match="MTU 9000"):
        story.node1.hypervisor.ensure_network(replace(APP_SPEC, mtu=9000))


def test_a_packet_as_another_is_dropped_at_the_card_and_by_ovn_alike(story: Story) -> None:
    stolen = "10.30.0.99"
    story.on_peer(f"ip addr add {stolen}/24 dev eth2")
    assert story.peer_hears_nothing_of(WEB_APP, "-I", stolen), "at its card"
    router = replace(story.peer, nics=(*story.peer.nics[:2], replace(story.peer.nics[2], allows_spoofing=True)))
    story.node1.hypervisor.apply_domain(router, Stamp(epoch=1, turn=3))
    assert story.peer_hears_nothing_of(WEB_APP, "-I", stolen), "and by OVN"
    assert stolen not in story.on_web("cat /proc/net/arp")
    story.tell_ovn(peer_spoofs=True)
    until(lambda: story.peer_pings(WEB_APP, "-I", stolen), what="one that may send as others to be heard")
    story.tell_ovn()
    story.node1.hypervisor.apply_domain(story.peer, Stamp(epoch=1, turn=4))
    story.on_peer(f"ip addr del {stolen}/24 dev eth2")
    assert story.peer_pings(WEB_APP)


def test_a_spoofed_packet_is_dropped_and_a_port_is_refused_by_a_group(story: Story) -> None:
    story.on_peer("ip addr add 10.198.20.99/24 dev eth0")
    assert story.peer_hears_nothing_of(WEB_20, "-I", "10.198.20.99")
    assert "10.198.20.99" not in story.on_web("ip neigh; cat /proc/net/arp")
    story.on_peer("ip addr del 10.198.20.99/24 dev eth0")
    firewall = FirewallSpec(generation=1, is_closed=True, rules=(FirewallRule(protocol="tcp", first_port=22, last_port=22),))
    story.node2.hypervisor.set_firewall(story.web.vm_id, firewall)
    assert not story.peer_reaches(WEB_20)
    assert not story.peer_reaches(WEB_APP)
    story.node2.hypervisor.set_firewall(
        story.web.vm_id,
        replace(firewall, generation=2, rules=(FirewallRule(protocol="tcp", first_port=LISTENER, last_port=LISTENER),)),
    )
    assert story.peer_reaches(WEB_20)
    assert story.peer_reaches(WEB_APP)
    assert story.peer_hears_nothing_of(WEB_20)
    assert story.peer_hears_nothing_of(WEB_APP)


def test_a_migration_keeps_addresses_tag_groups_and_connections(story: Story) -> None:
    talk = "setsid sh -c '%s' </dev/null >/dev/null 2>&1 &"
    story.on_peer(talk % "nc -ll -p 9000 -e cat")
    story.on_web(talk % f"(while :; do echo again; sleep 1; done) | nc {PEER_APP} 9000 >/run/echo")
    until(lambda: int(story.on_web("wc -c </run/echo") or 0) > 0, what="the connection over the overlay to be answered")
    story.tell_ovn(web="node2,node1")
    rules = (FirewallRule(protocol="tcp", first_port=LISTENER, last_port=LISTENER),)
    target = replace(story.web, firewall=FirewallSpec(generation=2, is_closed=True, rules=rules))
    assert isinstance(Migration(story.node2, story.node1, target).ended(), MigrationResult)
    for host, side in ((story.node1, MigrationSide.KEEP), (story.node2, MigrationSide.REMOVE)):
        host.hypervisor.settle_migration(target.vm_id, side, target, (), Stamp(epoch=2, turn=9))
    story.web_host = story.node1
    story.tell_ovn(web="node1")
    assert WEB_APP in story.on_web("ip -4 addr show eth2")
    until(lambda: story.peer_reaches(WEB_APP), what="the guest to be served where it is now")
    assert story.peer_hears_nothing_of(WEB_APP), "by its groups"
    before = int(story.on_web("wc -c </run/echo"))
    until(lambda: int(story.on_web("wc -c </run/echo")) > before, what="its open connection to go on")
    assert WEB_20 in story.on_web("ip -4 addr show eth0")
    assert story.peer_reaches(WEB_20), "what its group allows"
    assert story.peer_hears_nothing_of(WEB_20), "and nothing else"
    assert story.peer_hears_nothing_of(WEB_40), "on its tag only, on the same host too"
    left = story.lab.run("node2", ["ovs-vsctl", "list-ports", "br-int"]).stdout
    assert "tw-" not in left, "the source has no port of it any more"
