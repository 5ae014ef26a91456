"""Security groups on overlay networks as OVN's northbound database shall hold them."""

from dataclasses import replace

import pytest

from tests.unit.core.test_overlay import WEB, keys, row
from trimtab_controller.core.firewall import Rule, parse_rule
from trimtab_controller.core.overlay import Table
from trimtab_controller.core.overlay_groups import OverlayGroup, group_rows

CARD = replace(WEB, vm_id="vm-1")
GROUP = OverlayGroup(group_id="sg-1", rules=(Rule("tcp", 443, 443),), vm_ids=("vm-1",))


def said(group: OverlayGroup) -> list[tuple[str, str, str]]:
    """Return (priority, action, match without the port) of each rule, the first to be asked first."""
    found = [each.columns for each in group_rows([group], [CARD]) if each.table is Table.RULE]
    texts = [(str(one["priority"]), str(one["action"]), str(one["match"]).partition(" && ")[2]) for one in found]
    return sorted(texts, reverse=True)


def test_what_no_rule_names_is_dropped_beneath_all_rules() -> None:
    assert said(GROUP) == [("1001", "allow-related", "tcp && tcp.dst == 443"), ("1000", "drop", "ip")]
    assert said(replace(GROUP, rules=())) == [("1000", "drop", "ip")]
    rows = group_rows([GROUP], [CARD])
    assert row(rows, Table.GROUP, "sg-1").columns == {"name": "tt_sg_1"}
    assert row(rows, Table.GROUP, "sg-1").references["ports"] == ("nic-1",)
    assert len(row(rows, Table.GROUP, "sg-1").references["acls"]) == 2
    assert all(str(each.columns["match"]).startswith("outport == @tt_sg_1 && ") for each in rows if each.table is Table.RULE)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tcp", "tcp"),
        ("udp/1000-2000@10.0.0.0/8", "ip4.src == 10.0.0.0/8 && udp && 1000 <= udp.dst <= 2000"),
        ("icmp", "(icmp4 || icmp6)"),
        ("icmp@10.0.0.0/8", "ip4.src == 10.0.0.0/8 && icmp4"),
        ("icmp@2001:db8::/32", "ip6.src == 2001:db8::/32 && icmp6"),
        ("any", "ip"),
        ("any@10.0.0.0/8", "ip4.src == 10.0.0.0/8 && ip"),
    ],
)
def test_a_rule_is_said_in_ovns_words(text: str, match: str) -> None:
    rule = parse_rule(text)
    assert isinstance(rule, Rule)
    assert said(replace(GROUP, rules=(rule,)))[0] == ("1001", "allow-related", match)


def test_every_card_of_a_member_is_in_its_groups_and_one_without_members_here_is_left_out() -> None:
    second = replace(CARD, nic_id="nic-2", network_id="net-b")
    rows = group_rows([GROUP, replace(GROUP, group_id="sg-2", vm_ids=("vm-9",))], [CARD, second])
    assert row(rows, Table.GROUP, "sg-1").references["ports"] == ("nic-1", "nic-2")
    assert "sg-2" not in keys(rows)
    assert group_rows([], [CARD], moving=["vm-1"]) == (), "a vm in no group is open as it is"


def test_what_is_under_way_passes_while_a_vm_moves_and_nothing_that_begins() -> None:
    rows = group_rows([GROUP], [CARD, replace(CARD, nic_id="nic-2", vm_id="vm-2")], moving=["vm-1", "vm-2"])
    assert row(rows, Table.GROUP, "moved").references["ports"] == ("nic-1",)
    (acl,) = [each for each in rows if each.table is Table.RULE and "moved" in str(each.columns["match"])]
    assert acl.columns["match"] == "outport == @tt_moved && tcp && tcp.flags == 0/2", "no segment with SYN"
    assert "moved" not in keys(group_rows([GROUP], [CARD], moving=["vm-7"]))
