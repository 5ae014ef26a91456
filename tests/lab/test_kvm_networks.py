"""Packets of real guests on two real hosts: who may send what, what may reach whom, and that a live migration changes neither.

One lab and two guests for the file; everything is asked inside the guests. The tests run in order, as one story.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from tests.contract.kvm_fixture import KvmHost
from tests.lab.guest_view import guest_says
from tests.lab.kvm_guests import Migration, spec_of, start, two_hosts, until, wait_for_tick
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.packet_rules import tap_name
from trimtab_lab.hosts import Lab
from trimtab_protos.messages import DomainSpec, MigrationResult, MigrationSide, NetworkKind, NetworkSpec, NicSpec, SeedSpec
from trimtab_protos.network_messages import FirewallRule, FirewallSpec

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

INNER = NetworkSpec(
    network_id="net-inner", kind=NetworkKind.ISOLATED, name="inner", mtu=1400, subnet="10.199.9.0/24", has_dhcp=True
)
KEPT = "10.199.9.77"
MTU = 1400
LISTENER = 7
"""The port on which the lab's guest answers by itself."""


@dataclass
class Story:
    lab: Lab
    node1: KvmHost
    node2: KvmHost
    peer: DomainSpec
    """On node1, and in no security group."""
    web: DomainSpec
    """Begins on node2."""
    web_host: KvmHost

    def address(self, spec: DomainSpec) -> str:
        return spec.nics[0].addresses[0].partition("/")[0]

    def on_peer(self, script: str) -> str:
        return guest_says(self.lab, "node1", self.peer.vm_id, script)

    def on_web(self, script: str) -> str:
        return guest_says(self.lab, self.web_host.name, self.web.vm_id, script)

    def peer_reaches(self, port: int = LISTENER) -> bool:
        """Tell whether a connection of the peer's to the other guest is answered."""
        return "tick" in self.on_peer(f"nc -w 3 {self.address(self.web)} {port} </dev/null")

    def peer_pings(self, *options: str) -> bool:
        return "bytes from" in self.on_peer(f"ping -c 2 -W 2 {' '.join(options)} {self.address(self.web)} 2>&1")


def spec_with(host: KvmHost, lab: Lab, name: str, index: int) -> DomainSpec:
    network = replace(host.network, mtu=MTU)
    made = spec_of(host, name, host.shared_pool)
    address = f"{lab.spec.guest_prefix}.{index}/24"
    lan = replace(made.nics[0], addresses=(address,))
    inner = NicSpec(
        nic_id=f"nic-{name}-in", network_id="net-inner", mac=f"52:54:00:00:02:{index:02x}", index=1, addresses=(f"{KEPT}/24",)
    )
    both = name == "peer"
    lines = ["version: 2", "ethernets:", f"  nic0: {{match: {{macaddress: '{lan.mac}'}}, addresses: ['{address}'], mtu: {MTU}}}"]
    lines += [f"  nic1: {{match: {{macaddress: '{inner.mac}'}}, dhcp4: true}}"] if both else []
    return replace(
        made,
        nics=(lan, inner) if both else (lan,),
        networks=(network, INNER) if both else (network,),
        seed=SeedSpec(meta_yaml=f"instance-id: i-{name}\nlocal-hostname: {name}\n", network_yaml="\n".join(lines) + "\n"),
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with two_hosts(tmp_path_factory.mktemp("kvm-networks")) as (lab, node1, node2):
        peer, web = spec_with(node1, lab, "peer", 31), spec_with(node2, lab, "web", 32)
        start(node1, peer)
        start(node2, web)
        made = Story(lab, node1, node2, peer, web, node2)
        wait_for_tick(node1, peer.vm_id, 1)
        wait_for_tick(node2, web.vm_id, 1)
        until(lambda: made.on_peer("echo up") == "up" and made.on_web("echo up") == "up", what="both guests' agents")
        yield made


def test_guests_meet_across_hosts_with_the_mtu_of_their_network(story: Story) -> None:
    assert story.peer_pings("-s", str(MTU - 28)), "the largest packet arrives"
    assert story.peer_reaches()
    assert story.on_peer("cat /sys/class/net/eth0/mtu") == str(MTU)


def test_an_isolated_network_gives_a_card_the_address_that_is_kept_for_it(story: Story) -> None:
    until(lambda: KEPT in story.on_peer("ip -4 addr show eth1"), what="the kept address")
    definition = story.lab.run("node1", ["virsh", "net-dumpxml", "trimtab-net-inner"]).stdout
    assert "<forward" not in definition, "no way out"
    assert story.on_peer("ip route | grep '^default.*eth1'") == ""


def test_a_guest_that_sends_as_another_is_not_heard_unless_it_may(story: Story) -> None:
    stolen = f"{story.lab.spec.guest_prefix}.99"
    story.on_peer(f"ip addr add {stolen}/24 dev eth0")
    assert not story.peer_pings("-I", stolen), "another address"
    assert stolen not in story.on_web("ip neigh; cat /proc/net/arp"), "not even its ARP"
    story.on_peer("ip link set eth0 address 52:54:00:ff:00:01")
    assert not story.peer_pings(), "another MAC"
    assert "52:54:00:ff:00:01" not in story.on_web("cat /proc/net/arp")
    story.on_peer(f"ip link set eth0 address {story.peer.nics[0].mac}")
    assert story.peer_pings(), "as itself it is heard"
    router = replace(story.peer, nics=(replace(story.peer.nics[0], allows_spoofing=True), story.peer.nics[1]))
    story.node1.hypervisor.apply_domain(router, Stamp(epoch=1, turn=3))
    assert story.peer_pings("-I", stolen), "where an administrator lets it be a router"
    story.node1.hypervisor.apply_domain(story.peer, Stamp(epoch=1, turn=4))
    assert not story.peer_pings("-I", stolen)
    story.on_peer(f"ip addr del {stolen}/24 dev eth0")


def allow(*ports: int) -> tuple[FirewallRule, ...]:
    return tuple(FirewallRule(protocol="tcp", first_port=port, last_port=port) for port in ports)


def test_a_closed_guest_is_reached_as_its_groups_say_and_answered_in_any_case(story: Story) -> None:
    hypervisor, vm_id = story.node2.hypervisor, story.web.vm_id
    assert hypervisor.set_firewall(vm_id, FirewallSpec(generation=1, is_closed=True, rules=allow(22))) == 1
    assert not story.peer_reaches()
    assert not story.peer_pings()
    assert "tick" in story.on_web(f"nc -w 3 {story.address(story.peer)} {LISTENER} </dev/null"), "what it opens is answered"
    assert "bytes from" in story.on_web(f"ping -c 1 -W 3 {story.address(story.peer)}")
    assert hypervisor.set_firewall(vm_id, FirewallSpec(generation=2, is_closed=True, rules=allow(LISTENER))) == 2
    assert story.peer_reaches(), "a changed group is in force at once"
    assert hypervisor.set_firewall(vm_id, FirewallSpec(generation=1, is_closed=True)) == 2, "what comes late changes nothing"
    assert story.peer_reaches()


def test_rules_that_somebody_flushed_are_put_back(story: Story) -> None:
    story.lab.run("node2", ["nft", "flush", "ruleset"])
    until(lambda: not story.peer_pings(), what="ping to be refused again", deadline_s=30)
    assert story.peer_reaches()


def test_a_migration_keeps_the_rules_and_the_connections(story: Story) -> None:
    aside = "setsid sh -c '%s' </dev/null >/dev/null 2>&1 &"
    story.on_peer(aside % "nc -ll -p 9000 -e cat")
    talk = f"(while :; do echo again; sleep 1; done) | nc {story.address(story.peer)} 9000 >/run/echo"
    story.on_web(aside % talk)
    until(lambda: int(story.on_web("wc -c </run/echo") or 0) > 0, what="the connection to be answered")
    firewall = FirewallSpec(generation=2, is_closed=True, rules=allow(LISTENER))
    target = replace(story.web, firewall=firewall)
    assert isinstance(Migration(story.node2, story.node1, target).ended(), MigrationResult)
    for host, side in ((story.node1, MigrationSide.KEEP), (story.node2, MigrationSide.REMOVE)):
        host.hypervisor.settle_migration(target.vm_id, side, target, (), Stamp(epoch=2, turn=9))
    story.web_host = story.node1
    assert story.peer_reaches(), "what its group allows"
    assert not story.peer_pings(), "and nothing else"
    before = int(story.on_web("wc -c </run/echo"))
    until(lambda: int(story.on_web("wc -c </run/echo")) > before, what="its open connection to go on")
    left = story.lab.run("node2", ["nft", "list", "table", "bridge", "trimtab"]).stdout
    assert tap_name(story.web.nics[0].nic_id) not in left, "the source forgot it"


def test_a_vm_that_goes_leaves_no_rule(story: Story) -> None:
    for spec in (story.web, story.peer):
        story.node1.hypervisor.undefine_domain(spec.vm_id, spec.pools, kill_if_running=True, keep_state_files=False)
    left = story.lab.run("node1", ["nft", "list", "table", "bridge", "trimtab"]).stdout
    assert "tn-" not in left
    forget = (
        "from pathlib import Path; from trimtab_agent.hypervisor.kvm.firewall import forget_all; print(forget_all(Path('/x')))"
    )
    for answer in ("True", "False"):
        assert story.lab.run("node1", [sys.executable, "-c", forget]).stdout.strip() == answer, "nor a host that leaves the fleet"
