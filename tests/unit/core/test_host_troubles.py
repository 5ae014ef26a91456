"""What counts as a trouble of a host that lives."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from trimtab_controller.core.host_troubles import FRESH, LostCarrier, PoolView, TroubleKind, without_network, without_storage

NOW = datetime(2026, 11, 26, 14, 2, tzinfo=UTC)
HUNG = PoolView(pool_id="p1", pool="shared", host_id="h1", is_ready=False, is_hung=True, problem="silent", observed_at=NOW)
FINE = replace(HUNG, host_id="h2", is_ready=True, is_hung=False, problem="")
USED = frozenset({("p1", "h1"), ("p1", "h2")})


def test_only_bridges_that_networks_use_count() -> None:
    lost = (LostCarrier(bridge="br1", since=NOW), LostCarrier(bridge="br0"))
    (found,) = without_network(lost, {"br1": ("lan",), "br2": ("other",)})
    assert (found.kind, found.what, found.since) == (TroubleKind.NETWORK, "br1", NOW)
    assert found.message == "bridge br1 has lost its carrier"


def test_a_pool_is_lost_where_it_hangs_and_another_host_has_it() -> None:
    found = without_storage([FINE, HUNG], USED, now=NOW)
    assert {host: [one.message for one in troubles] for host, troubles in found.items()} == {
        "h1": ["pool shared does not answer"]
    }


def test_a_pool_that_fails_otherwise_says_how() -> None:
    found = without_storage([FINE, replace(HUNG, is_hung=False, problem="Input/output error")], USED, now=NOW)
    assert [one.message for one in found["h1"]] == ["pool shared cannot be used: Input/output error"]


@pytest.mark.parametrize(
    ("why", "views", "used"),
    [
        ("it is down for all", [HUNG, replace(HUNG, host_id="h2")], USED),
        ("nobody else has it", [HUNG], USED),
        ("another pool is fine elsewhere", [HUNG, replace(FINE, pool_id="p2")], USED),
        ("no kept vm of the host uses it", [HUNG, FINE], {("p1", "h2"), ("p2", "h1")}),
        ("the others said so long ago", [HUNG, replace(FINE, observed_at=NOW - FRESH - timedelta(seconds=1))], USED),
        ("it said so long ago itself", [replace(HUNG, observed_at=NOW - FRESH - timedelta(seconds=1)), FINE], USED),
        ("nobody has looked yet", [replace(HUNG, observed_at=None), FINE], USED),
    ],
)
def test_a_pool_is_no_hosts_trouble(why: str, views: list[PoolView], used: frozenset[tuple[str, str]]) -> None:
    assert without_storage(views, used, now=NOW) == {}, why
