"""Overlay networks through every layer but OVN's: which hosts carry one, and what its database is told of a vm's life."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.operations.kit import FleetStory
from trimtab_controller.core.overlay import Changes, Row, Table, differ
from trimtab_controller.loops.overlays import OverlayLoop
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.services import networks
from trimtab_controller.services.networks import NetworkSpec
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.store import claims
from trimtab_protos.errors import Unavailable


@dataclass
class Database:
    """What stands in OVN's database, while it answers."""

    rows: Sequence[Row] = field(default_factory=tuple)
    writes: int = 0
    is_down: bool = False

    def apply(self, rows: Sequence[Row]) -> Changes:
        if self.is_down:
            raise Unavailable("ovn-northbound-unusable", "it does not answer")
        changes = differ(rows, self.rows)
        self.rows, self.writes = rows, self.writes + bool(changes)
        return changes

    def chassis(self) -> list[str]:
        """Return where each card is served."""
        return [str(dict(row.columns["options"]).get("requested-chassis", "")) for row in self.cards()]  # type: ignore[arg-type]

    def cards(self) -> list[Row]:
        return [row for row in self.rows if row.table is Table.PORT and not row.key.startswith("own-")]


@pytest.fixture
def ovn() -> Database:
    return Database()


@pytest.fixture
def loop(story: FleetStory, ovn: Database) -> OverlayLoop:
    for name in ("node4", "node5"):
        story.host_ids.append(story.add_host(name, overlay_chassis=f"chassis-{name}"))
    Upkeep(db=story.db, clock=story.clock, nudger=story.nudger).prepare_hosts(story.term)
    spec = NetworkSpec(name="app", kind="overlay", bridges={}, mtu=1442, subnet="10.30.0.0/24", has_dhcp=True)
    story.db.write(
        lambda session: networks.create(
            session, spec, project=story.project, actor=story.actor, now=story.clock.now(), has_overlay=True
        )
    )
    story.settle()
    return OverlayLoop(db=story.db, northbound=ovn, clock=story.clock)


def test_a_vm_is_placed_where_ovn_runs_and_its_card_is_served_there_alone(
    story: FleetStory, loop: OverlayLoop, ovn: Database
) -> None:
    view = story.db.read(lambda session: networks.get(session, "app", project=story.project))
    assert {name: one.state for name, one in view.hosts.items()} == {
        "node1": "failed", "node2": "failed", "node3": "failed", "node4": "ready", "node5": "ready"
    }  # fmt: skip
    assert "ovn-remote" in view.hosts["node1"].problem
    vm = story.running_vm(networks=(NicWish(network="app"),))
    loop.run(story.term)
    at = {story.host_ids[3]: "chassis-node4", story.host_ids[4]: "chassis-node5"}
    assert ovn.chassis() == [at[vm.host_id]]
    assert len(story.hypervisor(vm.host_id).domains[vm.id].spec.nics) == 1
    loop.run(story.term)
    assert ovn.writes == 1, "nothing is written where nothing changed"


def test_both_hosts_of_a_live_migration_serve_its_cards_until_one_of_them_has_it(
    story: FleetStory, loop: OverlayLoop, ovn: Database
) -> None:
    vm = story.running_vm(networks=(NicWish(network="app"),))
    loop.run(story.term)
    (home,) = ovn.chassis()
    story.accept_power(vm, "migrate")
    story.settle(until=lambda: story.db.read(lambda session: claims.migration_of(session, vm.id)) is not None)
    loop.run(story.term)
    (both,) = ovn.chassis()
    assert both.split(",")[0] == home, "the source first, which has the guest"
    assert sorted(both.split(",")) == ["chassis-node4", "chassis-node5"]
    story.settle()
    loop.run(story.term)
    assert ovn.chassis() == [both.split(",")[1]]
    assert [row.columns["addresses"] for row in ovn.cards()] == [(f"{_mac(story, vm.id)} 10.30.0.2",)], "its address goes along"


def test_a_database_that_does_not_answer_holds_nothing_up_and_is_told_all_later(
    story: FleetStory, loop: OverlayLoop, ovn: Database
) -> None:
    ovn.is_down = True
    vm = story.running_vm(networks=(NicWish(network="app"),))
    loop.run(story.term)
    assert ovn.rows == ()
    ovn.is_down = False
    loop.run(story.term)
    assert len(ovn.cards()) == 1
    assert story.running_on(vm.id)


def test_a_network_that_goes_takes_its_rows_along(story: FleetStory, loop: OverlayLoop, ovn: Database) -> None:
    loop.run(story.term)
    assert {row.table for row in ovn.rows} == {Table.SWITCH, Table.PORT, Table.DHCP}
    story.db.write(
        lambda session: networks.delete(
            session, "app", project=story.project, expected_version=None, actor=story.actor, now=story.clock.now()
        )
    )
    story.settle()
    loop.run(story.term)
    assert ovn.rows == ()


def _mac(story: FleetStory, vm_id: str) -> str:
    (home,) = story.running_on(vm_id)
    return story.hypervisor(home).domains[vm_id].spec.nics[0].mac
