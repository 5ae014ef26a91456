"""Networks of hosts with Open vSwitch through the whole control plane: overlays, the way out by a router, what OVN lets in; VLANs.

One lab for the file; its controller drives OVN's northbound database. The tests run in order, as one story.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.lab.fleet_kit import Fleet, answers_ping, fleet_settings, wait_until
from tests.lab.guest_view import guest_says
from trimtab_lab import ovn
from trimtab_lab.controlplane import ControlPlane
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

LISTENER = 7
"""The port on which the lab's guest answers by itself."""
WEB, DB = "10.40.0.2", "10.40.0.3"
WEB_20 = "10.41.20.2"
SUBNET6 = "fd00:40::/64"


@dataclass
class Story:
    fleet: Fleet
    ids: dict[str, str]

    @property
    def outside(self) -> str:
        """The floating address."""
        return f"{self.fleet.lab.spec.guest_prefix}.101"

    def home(self, name: str) -> str:
        (host,) = [host for host in ("node1", "node2") if f"trimtab-{self.ids[name]}" in self.fleet.domains_of(host)]
        return host

    def on(self, name: str, script: str) -> str:
        return guest_says(self.fleet.lab, self.home(name), self.ids[name], script)

    def address6(self, name: str) -> str:
        """Return the IPv6 address that a guest was given; it makes it itself, of its MAC."""
        (nic,) = self.fleet.vm(name)["nics"]
        (address,) = [one for one in nic["addresses"] if ":" in one]
        return str(address.partition("/")[0])

    def reaches_from_outside(self) -> bool:
        """Tell whether the guest's listener answers ctl, which is a stranger on the outer network."""
        asked = self.fleet.lab.run("ctl", ["busybox", "nc", "-w", "2", self.outside, str(LISTENER)], check=False)
        return "tick" in asked.stdout

    def held(self) -> list[str]:
        """Return what OVN's northbound database holds, by the keys that the controller gave it."""
        database = f"--db={ovn.northbound(self.fleet.lab.spec)}"
        words = ["--bare", "--columns=external_ids", "list"]
        tables = ("Logical_Switch_Port", "NAT", "ACL", "Gateway_Chassis")
        said = [self.fleet.lab.run("ctl", ["ovn-nbctl", database, *words, table]).stdout for table in tables]
        return sorted(" ".join(said).split())

    def gateway(self) -> str:
        """Return the host that carries the router's outer side, as OVN says."""
        words = ["--bare", "--columns=chassis", "find", "Port_Binding", "type=chassisredirect"]
        database = f"--db={ovn.southbound(self.fleet.lab.spec)}"
        chassis = self.fleet.lab.run("ctl", ["ovn-sbctl", database, *words]).stdout.strip()
        if not chassis:
            return ""
        return self.fleet.lab.run("ctl", ["ovn-sbctl", database, "get", "Chassis", chassis, "name"], check=False).stdout.strip(
            ' "\n'
        )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    lab = Lab.named(f"ovn-{os.getpid()}", state_directory=tmp_path_factory.mktemp("ovn"))
    try:
        lab.up(hosts=2)
        plane = ControlPlane(lab, settings={**fleet_settings(lab), **lab.overlay_settings()})
        plane.start()
        plane.join_hosts()
        fleet = Fleet(lab, plane)
        wait_until(lambda: fleet.ok("host", "list", "-o", "json").out.count('"up"') >= 2, "two hosts to be up")
        fleet.ok("pool", "create", "shared", "--path", "/srv/trimtab-shared", "--shared", "--default")
        fleet.ok("image", "import", "micro", str(build_guest_image().qcow2), "--pool", "shared", "--wait")
        prefix = lab.spec.guest_prefix
        fleet.ok("network", "create", "t1", "--overlay", "--subnet", "10.40.0.0/24", "--subnet6", SUBNET6, "--dhcp")
        fleet.ok(
            "network", "create", "lan", "--bridge", "br0", "--outer", "--subnet", lab.spec.guest_subnet,
            "--gateway", lab.spec.ctl_guest_address, "--range", f"{prefix}.100-{prefix}.109",
        )  # fmt: skip
        fleet.ok("router", "create", "edge", "--network", "t1", "--outer", "lan")
        fleet.ok("secgroup", "create", "pings", "--allow", "icmp")
        operations = [
            fleet.begin("vm", "create", name, "--image", "micro", "--memory", "96MiB", "--network", "t1", "--to", host, *more)
            for name, host, more in (("web", "node2", ("--secgroup", "pings")), ("db", "node1", ()))
        ]
        for operation in operations:
            assert fleet.end_of(operation)["state"] == "done"
        made = Story(fleet, {name: fleet.vm(name)["id"] for name in ("web", "db")})
        wait_until(lambda: made.on("web", "echo up") == "up" and made.on("db", "echo up") == "up", "both guests' agents")
        yield made
    finally:
        lab.down()


def test_guests_on_two_hosts_have_addresses_and_names_and_meet(story: Story) -> None:
    assert (story.home("web"), story.home("db")) == ("node2", "node1")
    wait_until(lambda: WEB in story.on("web", "ip -4 addr show eth0"), "the address that OVN's DHCP gives")
    wait_until(lambda: DB in story.on("db", "ip -4 addr show eth0"), "the other's")
    wait_until(lambda: "bytes from" in story.on("db", f"ping -c 1 -W 2 {WEB}"), "the tunnel to carry")
    assert WEB in story.on("db", "nslookup web 10.40.0.1 2>&1"), "by its name too"
    router = story.fleet.ok("router", "get", "edge", "-o", "json").json()
    assert sorted(router["gateways"]) == ["node1", "node2"]


def test_guests_make_their_ipv6_addresses_and_send_with_no_other(story: Story) -> None:
    web, db = story.address6("web"), story.address6("db")
    wait_until(
        lambda: web in story.on("web", "ip -6 addr show dev eth0 scope global"), "the address that it makes of what it is told"
    )
    wait_until(lambda: db in story.on("db", "ip -6 addr show dev eth0 scope global"), "the other's")
    wait_until(lambda: "bytes from" in story.on("db", f"ping6 -c 1 -W 2 {web}"), "the tunnel to carry IPv6")
    assert web in story.on("db", "nslookup web 10.40.0.1 2>&1"), "by its name too"
    story.on("web", "ip -6 addr add fd00:40::99/64 dev eth0 nodad")
    assert "bytes from" in story.on("web", f"ping6 -c 2 -W 2 -I {web} {db}")
    assert "bytes from" not in story.on("web", f"ping6 -c 2 -W 2 -I fd00:40::99 {db}"), "an address that is not its own"
    story.on("web", "ip -6 addr del fd00:40::99/64 dev eth0")
    story.fleet.ok("secgroup", "update", "pings", "--allow", f"icmp@{SUBNET6}", "--wait")
    wait_until(lambda: "bytes from" not in story.on("db", f"ping -c 1 -W 2 {WEB}"), "its group to let IPv6 in only")
    assert "bytes from" in story.on("db", f"ping6 -c 2 -W 2 {web}")
    story.fleet.ok("secgroup", "update", "pings", "--allow", "icmp", "--wait")


def plug(story: Story, name: str, network: str, address: str = "") -> str:
    """Give the running guest a card on the network and return its link there; `address` is set in the guest as cloud-init would."""
    told = f",ip={address}/24" if address else ""
    story.fleet.ok("vm", "attach", name, "--network", f"{network}{told}", "--wait")
    (nic,) = [one for one in story.fleet.vm(name)["nics"] if one["network"] == network]
    find = f"grep -lx {nic['mac']} /sys/class/net/*/address | cut -d/ -f5"
    link = wait_until(lambda: story.on(name, find), f"{name} to see its card on {network}")
    story.on(name, f"ip link set {link} up" + (f"; ip addr add {address}/24 dev {link}" if address else ""))
    return link


def test_guests_of_one_vlan_meet_across_hosts_and_those_of_another_do_not(story: Story) -> None:
    for number in (20, 30):
        story.fleet.ok("network", "create", f"v{number}", "--bridge", "br0", "--vlan", str(number), "--wait")
        plug(story, "web", f"v{number}", f"10.41.{number}.2")
        link = plug(story, "db", f"v{number}", f"10.41.{number}.3")
        wait_until(
            lambda number=number: "bytes from" in story.on("db", f"ping -c 1 -W 2 10.41.{number}.2"), f"VLAN {number} to carry"
        )
    (card,) = [nic for nic in story.fleet.vm("web")["nics"] if nic["network"] == "v20"]
    story.on("db", f"ip neigh replace {WEB_20} lladdr {card['mac']} dev {link}")
    assert "bytes from" not in story.on("db", f"ping -c 2 -W 2 -I {link} {WEB_20}"), "not even to a MAC that it knows"
    for nic in story.fleet.vm("web")["nics"]:
        if nic["network"] != "t1":
            story.fleet.ok("vm", "detach", "web", "--nic", nic["mac"], "--wait")


@pytest.mark.soak
def test_an_isolated_network_gives_addresses_on_each_host_and_leads_nowhere(story: Story) -> None:
    story.fleet.ok("network", "create", "inside", "--isolated", "--subnet", "10.42.0.0/24", "--dhcp", "--wait")
    addresses = {}
    for name in ("db", "web"):
        link = plug(story, name, "inside")
        (nic,) = [one for one in story.fleet.vm(name)["nics"] if one["network"] == "inside"]
        addresses[name] = nic["addresses"][0]
        ask = f"udhcpc -n -q -i {link} -s /etc/udhcpc.script >/dev/null 2>&1; ip -4 addr show {link}"
        wait_until(lambda name=name, ask=ask: addresses[name] in story.on(name, ask), f"{name} to be given {addresses[name]}")
        assert story.on(name, f"ip route | grep '^default.*{link}'") == "", "nobody told it of a way out"
        known = story.on(name, f"nslookup {name} 10.42.0.1 2>&1")
        assert addresses[name].partition("/")[0] in known, f"its host knows its name: {known}"
        wait_until(lambda name=name, link=link: "bytes from" in story.on(name, f"ping -c 1 -W 2 -I {link} 10.42.0.1"), "its host")
    for outside in (addresses["db"].partition("/")[0], story.fleet.lab.spec.ctl_guest_address):
        story.on("web", f"ip route replace {outside} via 10.42.0.1 dev {link}")
        assert "bytes from" not in story.on("web", f"ping -c 2 -W 2 -I {link} {outside}"), (
            "a guest that takes its host for a router"
        )
        story.on("web", f"ip route del {outside} dev {link}")
    story.fleet.ok("vm", "detach", "web", "--nic", nic["mac"], "--wait")


def test_a_floating_address_reaches_a_guest_from_outside(story: Story) -> None:
    taken = story.fleet.ok("floating", "create", "--network", "lan", "-o", "json").json()
    assert taken["name"] == story.outside, "the router has the first address of the range"
    story.fleet.ok("floating", "attach", taken["name"], "--vm", "web")
    wait_until(lambda: answers_ping(story.fleet, story.outside), "the guest to answer at its floating address")
    assert "bytes from" in story.on("db", f"ping -c 2 -W 2 {story.fleet.lab.spec.ctl_guest_address}"), (
        "the other way by the router"
    )


def test_a_port_is_refused_by_a_security_group_until_it_is_allowed(story: Story) -> None:
    assert not story.reaches_from_outside()
    assert "tick" not in story.on("db", f"nc -w 2 {WEB} {LISTENER} </dev/null")
    story.fleet.ok("secgroup", "update", "pings", "--allow", "icmp", "--allow", f"tcp/{LISTENER}", "--wait")
    wait_until(story.reaches_from_outside, "the port to be open")
    assert "tick" in story.on("db", f"nc -w 3 {WEB} {LISTENER} </dev/null")


def test_a_migration_keeps_both_addresses_the_group_and_connections(story: Story) -> None:
    talk = "setsid sh -c '%s' </dev/null >/dev/null 2>&1 &"
    # On the one the guest only listens: OVN where it arrives has not seen it begin, and the guest says nothing of it.
    story.on("db", "printf '#!/bin/sh\\nwhile :; do echo again; sleep 1; done\\n' >/bin/news; chmod +x /bin/news")
    story.on("db", talk % "nc -ll -p 9000 -e /bin/news")
    story.on("web", talk % f"sleep 9999 | nc {DB} 9000 >/run/news")
    wait_until(lambda: int(story.on("web", "wc -c </run/news") or 0) > 0, "the connection to be answered")
    story.fleet.ok("vm", "migrate", "web", "--to", "node1", "--wait")
    assert story.home("web") == "node1"
    before = int(story.on("web", "wc -c </run/news"))
    wait_until(lambda: int(story.on("web", "wc -c </run/news")) > before, "its open connection to go on", patience_s=60)
    wait_until(lambda: "bytes from" in story.on("db", f"ping -c 1 -W 2 {WEB}"), "it to be reached where it is now")
    wait_until(lambda: "bytes from" in story.on("db", f"ping6 -c 1 -W 2 {story.address6('web')}"), "by IPv6 too")
    wait_until(lambda: answers_ping(story.fleet, story.outside), "its floating address to have come along")
    wait_until(story.reaches_from_outside, "what its group allows")
    story.fleet.ok("secgroup", "update", "pings", "--allow", "icmp", "--wait")
    wait_until(lambda: not story.reaches_from_outside(), "and nothing else")


def test_a_lost_northbound_database_is_made_anew(story: Story) -> None:
    before = story.held()
    assert before
    ovn.lose_northbound(story.fleet.lab.spec)
    story.fleet.lab.overlay(["node1", "node2"])
    wait_until(lambda: story.held() == before, "everything to be there again")
    wait_until(lambda: answers_ping(story.fleet, story.outside), "the floating address to lead to the guest again")


def test_another_host_carries_the_way_out_when_its_gateway_dies(story: Story) -> None:
    lab = story.fleet.lab
    assert story.home("web") == "node1"
    story.fleet.ok("host", "cordon", "node1")
    wait_until(lambda: story.gateway() == "node2", "the way out to leave a host that is cordoned")
    wait_until(lambda: answers_ping(story.fleet, story.outside), "the guest to answer by it")
    lab.crash("node2")
    # Of two, OVN lets the other carry nothing by itself: it might be the one that is cut off. Nothing fences hosts here, so a person says it.
    wait_until(lambda: story.fleet.host("node2")["connectivity"] == "lost", "it to be lost")
    story.fleet.ok("host", "confirm-off", "node2", "--reason", "its power was cut", "--yes")
    wait_until(lambda: story.gateway() == "node1", "the other one to carry it")
    wait_until(lambda: answers_ping(story.fleet, story.outside), "the guest to answer by that")


def test_a_deleted_vm_is_not_reached_until_it_is_back(story: Story) -> None:
    story.fleet.ok("vm", "delete", "web", "--yes", "--wait")
    wait_until(lambda: not answers_ping(story.fleet, story.outside), "nobody to answer")
    assert story.fleet.ok("floating", "get", story.outside, "-o", "json").json()["is_vm_deleted"]
    refused = story.fleet.trimtab("router", "detach", "edge", "--network", "t1")
    assert refused.code == 5
    assert story.outside in refused.err
    story.fleet.ok("floating", "detach", story.outside)
    story.fleet.ok("floating", "delete", story.outside, "--yes")
