"""Rules of security groups: read as they are written, refused with what is wrong, the same whatever the order of the groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_controller.core.addresses import first_free, gateway_of, overlapping
from trimtab_controller.core.firewall import Rule, parse_rule, union

ports = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(sorted)
sources = st.sampled_from(["", "10.0.0.0/8", "192.0.2.7/32", "fd00::/8", "::/0"])
rules = st.one_of(
    st.builds(lambda kind, span, source: Rule(kind, *span, source), st.sampled_from(["tcp", "udp"]), ports, sources),
    st.builds(lambda kind, source: Rule(kind, 0, 0, source), st.sampled_from(["tcp", "udp", "icmp", "any"]), sources),
)


@given(rules)
def test_a_rule_is_read_as_it_is_written(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule


@given(st.text(max_size=30))
def test_any_text_is_a_rule_or_is_told_why_not(text: str) -> None:
    found = parse_rule(text)
    assert isinstance(found, Rule) or found


@given(st.lists(st.lists(rules, max_size=4), max_size=4))
def test_groups_let_through_the_same_in_any_order(groups: list[list[Rule]]) -> None:
    assert union(groups) == union(list(reversed(groups)))
    assert set(union(groups)) == {rule for group in groups for rule in group}


def test_an_address_is_the_lowest_that_nobody_has() -> None:
    assert first_free("10.0.0.0/29", {"10.0.0.2", "10.0.0.4"}) == "10.0.0.3"
    assert first_free("10.0.0.0/29", {f"10.0.0.{i}" for i in range(2, 7)}) is None, "the last one is the broadcast's"
    assert first_free("10.0.0.0/8", {"10.0.0.2"}) == "10.0.0.3", "a large subnet costs no more"
    assert first_free("10.0.0.0/31", set()) is None
    assert first_free("fd00::/64", set()) is None, "an IPv6 guest makes its own"


@pytest.mark.parametrize(("kind", "gateway"), [("nat", "10.0.0.1"), ("isolated", "10.0.0.1"), ("bridge", "")])
def test_hosts_have_an_address_where_the_network_is_theirs(kind: str, gateway: str) -> None:
    assert gateway_of(kind, "10.0.0.0/24") == gateway
    assert gateway_of(kind, "") == ""


def test_subnets_that_share_an_address_overlap() -> None:
    others = [("a", "10.0.0.0/24"), ("b", "fd00::/64")]
    assert overlapping("10.0.0.128/25", others) == "a"
    assert overlapping("10.0.0.0/8", others) == "a"
    assert overlapping("fd00::/8", others) == "b"
    assert overlapping("10.0.1.0/24", others) is None
