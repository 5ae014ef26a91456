"""What nftables is told: nothing that a field's text could smuggle in, and in a kernel's own words where there is one to ask."""

import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from trimtab_agent.hypervisor.kvm import packet_rules
from trimtab_agent.hypervisor.kvm.packet_rules import GuestPackets, tap_name
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import NicSpec
from trimtab_protos.network_messages import FirewallRule, FirewallSpec

MAC = "52:54:00:00:00:01"
NIC = NicSpec(nic_id="nic-1", network_id="net-1", mac=MAC, index=0, addresses=("10.0.0.2/24", "fd00::2/64"))


def packets(*rules: FirewallRule, nic: NicSpec = NIC, is_closed: bool = True) -> GuestPackets:
    return GuestPackets(vm_id="vm-1", nics=(nic,), firewall=FirewallSpec(generation=1, is_closed=is_closed, rules=rules))


def chain(made: list[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    rules = [command["add"]["rule"] for command in made if "rule" in command.get("add", {})]
    return [rule["expr"] for rule in rules if rule["chain"] == f"{name}-{tap_name('nic-1')}"]


def test_a_port_has_one_name_everywhere_that_fits_the_kernel() -> None:
    assert tap_name("nic-1") == tap_name("nic-1") != tap_name("nic-2")
    assert len(tap_name("nic-01jd3x0v5zt0m3y0a1b2c3d4e5")) <= 15


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": "tcp; accept"},
        {"protocol": "tcp", "first_port": 70000, "last_port": 70000},
        {"protocol": "tcp", "first_port": 20, "last_port": 10},
        {"protocol": "tcp", "source": "10.0.0.0/8; accept"},
        {"protocol": "tcp", "source": "10.0.0.1/8"},
    ],
)
def test_a_rule_that_cannot_be_expressed_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        packet_rules.install(packets(FirewallRule(**wrong)), there=())


def test_a_mac_and_an_address_that_are_none_are_refused() -> None:
    for nic in (NicSpec(nic_id="nic-1", network_id="n", mac="x", index=0), NicSpec(
        nic_id="nic-1", network_id="n", mac=MAC, index=0, addresses=("10.0.0.2; drop",))):  # fmt: skip
        with pytest.raises(InvalidRequest):
            packet_rules.install(packets(nic=nic), there=())


def test_the_last_rule_of_a_closed_guest_drops_and_an_open_one_has_none_that_does() -> None:
    closed = chain(packet_rules.install(packets(), there=()), "to")
    assert {"drop": None} in closed[-1]
    opened = chain(packet_rules.install(packets(is_closed=False), there=()), "to")
    assert opened[-1] == [{"accept": None}]
    assert [rule for rule in opened if {"drop": None} in rule] == opened[:-1] == closed[:1], "but tags of others' VLANs"


def test_a_card_whose_network_keeps_groups_is_open_here_and_still_sends_as_itself_only() -> None:
    closed, opened = packets(), packets(is_closed=False)
    elsewhere = packet_rules.install(replace(closed, elsewhere=("nic-1",)), there=())
    for name in ("to", "from"):
        assert chain(elsewhere, name) == chain(packet_rules.install(opened, there=()), name)
    assert chain(elsewhere, "to") != chain(packet_rules.install(closed, there=()), "to")
    assert [rule for rule in chain(elsewhere, "from") if {"drop": None} in rule], "another's address is dropped"


def test_a_router_sends_what_it_likes() -> None:
    router = NicSpec(nic_id="nic-1", network_id="n", mac=MAC, index=0, allows_spoofing=True)
    sent = chain(packet_rules.install(packets(nic=router, is_closed=False), there=()), "from")
    assert sent == [[{"accept": None}]]


def test_cards_of_one_vm_on_one_network_may_answer_for_each_other_and_on_another_not() -> None:
    second = NicSpec(nic_id="nic-2", network_id="net-1", mac="52:54:00:00:00:02", index=1, addresses=("10.0.0.3/24",))
    elsewhere = NicSpec(nic_id="nic-3", network_id="net-2", mac="52:54:00:00:00:03", index=2, addresses=("10.9.0.3/24",))
    made = packet_rules.install(GuestPackets(vm_id="vm-1", nics=(NIC, second, elsewhere)), there=())
    said = json.dumps(chain(made, "from"))
    assert "10.0.0.2" in said
    assert "10.0.0.3" in said
    assert "10.9.0.3" not in said


def test_a_set_that_is_there_is_not_made_again() -> None:
    made = packet_rules.install(packets(), there=())
    names = {command["add"]["set"]["name"] for command in made if "set" in command.get("add", {})}
    again = packet_rules.install(packets(), there=names)
    assert len(names) == 2
    assert not [command for command in again if "set" in command.get("add", {})]


def test_the_kernel_takes_what_it_is_told() -> None:
    """`nft --check` asks the kernel and changes nothing."""
    rules = [
        FirewallRule(protocol="tcp", first_port=443, last_port=443),
        FirewallRule(protocol="udp", first_port=1000, last_port=2000, source="10.0.0.0/8"),
        FirewallRule(protocol="icmp", source="fd00::/8"),
        FirewallRule(protocol="any", source="192.0.2.0/24"),
    ]
    told = [*packet_rules.table(), *packet_rules.install(packets(*rules), there=(), grace_s=60)]
    checked = subprocess.run(
        ["unshare", "--net", "nft", "--check", "-j", "-f", "-"],
        input=json.dumps({"nftables": told}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
