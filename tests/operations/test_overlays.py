"""Overlay networks through every layer but OVN's: which hosts carry one, and what its database is told of a vm's life."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.operations.kit import FleetStory
from tests.operations.test_firewalls import group, put
from trimtab_controller.core.doctor import examine
from trimtab_controller.core.doctor.model import Finding
from trimtab_controller.core.model import Role, Vm
from trimtab_controller.core.overlay import Changes, Row, Table, differ
from trimtab_controller.core.overlay_groups import MOVED_GRACE_S
from trimtab_controller.loops.overlays import OverlayLoop
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.services import floating, networks, routers
from trimtab_controller.services.networks import NetworkSpec, OuterSpec
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.store import claims, doctor_rows, overlays, reach, schema, vms
from trimtab_controller.store.database import Session
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


def test_a_host_that_was_cured_is_asked_again_when_its_agent_starts(story: FleetStory, loop: OverlayLoop) -> None:
    cured = story.hypervisor(story.host_ids[0])
    cured.host = replace(cured.host, overlay_chassis="chassis-node1")
    upkeep = Upkeep(db=story.db, clock=story.clock, nudger=story.nudger)

    def states() -> list[str]:
        upkeep.prepare_hosts(story.term)
        story.settle()
        view = story.db.read(lambda session: networks.get(session, "app", project=story.project))
        return [view.hosts[name].state for name in ("node1", "node2")]

    assert states() == ["failed", "failed"]
    for host_id in story.host_ids[:2]:
        story.db.write(lambda session, host_id=host_id: reach.ask_again(session, host_id))  # type: ignore[misc]
    assert states() == ["ready", "failed"]


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


# --- the way out ---------------------------------------------------------------------------------------------------------------


def _equip(story: FleetStory) -> None:
    """Make the way out, and router edge between it and the overlay network."""
    outer = OuterSpec(gateway="192.0.2.1", first="192.0.2.100", last="192.0.2.109")
    spec = NetworkSpec(name="lan", kind="bridge", bridge="br0", bridges={}, subnet="192.0.2.0/24", outer=outer)
    boss = replace(story.actor, roles={"": Role.ADMIN})
    story.db.write(
        lambda session: networks.create(session, spec, project=story.project, actor=boss, now=story.clock.now(), has_overlay=True)
    )
    story.settle()
    story.db.write(
        lambda session: routers.create(
            session,
            name="edge",
            networks=["app"],
            outer=routers.OuterWish(network="lan"),
            project=story.project,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def _lead(story: FleetStory, vm: Vm) -> None:
    made: dict[str, Any] = {"project": story.project, "actor": story.actor, "now": story.clock.now()}
    view = story.db.write(lambda session: floating.create(session, network="lan", address="", **made))
    story.db.write(lambda session: floating.attach(session, view.floating.id, vm=vm.name, nic="", expected_version=None, **made))


def _of(ovn: Database, table: Table) -> list[Row]:
    return [row for row in ovn.rows if row.table is table]


def test_a_router_is_carried_by_hosts_that_reach_its_outer_network_and_ovn(
    story: FleetStory, loop: OverlayLoop, ovn: Database
) -> None:
    _equip(story)
    view = story.db.read(lambda session: networks.get(session, "lan", project=story.project))
    assert {name: one.state for name, one in view.hosts.items()} == {
        "node1": "failed", "node2": "failed", "node3": "failed", "node4": "ready", "node5": "ready"
    }  # fmt: skip
    loop.run(story.term)
    assert sorted(str(row.columns["chassis_name"]) for row in _of(ovn, Table.GATEWAY)) == ["chassis-node4", "chassis-node5"]
    shown = story.db.read(lambda session: routers.get(session, "edge", project=story.project))
    assert sorted(shown.gateways) == ["node4", "node5"]
    first = shown.gateways[0]
    story.db.write(lambda session: reach.set_cordon(session, story.host_ids[3 if first == "node4" else 4], is_cordoned=True))
    loop.run(story.term)
    (best,) = [row for row in _of(ovn, Table.GATEWAY) if row.columns["priority"] == "2"]
    assert best.columns["chassis_name"] != f"chassis-{first}", "a cordoned host carries it last"

    def told() -> list[str]:
        return [one.kind for one in story.db.read(lambda session: _findings(session, story)) if one.kind.startswith("router")]

    assert told() == []
    for host_id, kind in ((story.host_ids[3], "router-gateway-single"), (story.host_ids[4], "router-without-gateway")):
        lost = schema.host.update().where(schema.host.c.id == host_id).values(connectivity="lost")
        story.db.write(lambda session, lost=lost: session.execute(lost))  # type: ignore[misc]
        assert told() == [kind]


def test_a_floating_address_stays_the_guests_wherever_it_goes_and_leads_nowhere_while_it_is_deleted(
    story: FleetStory, loop: OverlayLoop, ovn: Database
) -> None:
    _equip(story)
    vm = story.running_vm(networks=(NicWish(network="app"),))
    _lead(story, vm)

    def led() -> list[tuple[object, object]]:
        loop.run(story.term)
        found = [row.columns for row in _of(ovn, Table.NAT) if row.columns["type"] == "dnat_and_snat"]
        return [(one["external_ip"], one["logical_ip"]) for one in found]

    assert led() == [("192.0.2.101", "10.30.0.2")]
    story.accept_power(vm, "migrate")
    story.settle()
    assert led() == [("192.0.2.101", "10.30.0.2")]
    story.db.write(lambda session: vms.update(session, vm.id, deleted_at=story.clock.now()))
    assert led() == []
    story.db.write(lambda session: vms.update(session, vm.id, deleted_at=None))
    assert led() == [("192.0.2.101", "10.30.0.2")]
    ovn.rows = ()
    assert led() == [("192.0.2.101", "10.30.0.2")], "a database that lost everything is told everything"


# --- security groups -------------------------------------------------------------------------------------------------------------


def test_groups_are_ovns_and_their_change_ends_when_it_was_told(story: FleetStory, loop: OverlayLoop, ovn: Database) -> None:
    vm = story.running_vm(networks=(NicWish(network="app"),))
    group(story, "web", "tcp/443")
    operation = put(story, vm, "web")
    story.settle(until=lambda: story.operation(operation.id).waiting_for == "OVN to be told")
    loop.run(story.term)
    story.settle()
    assert story.operation(operation.id).result == {"vms": 1, "unreached": []}
    assert [str(row.columns["action"]) for row in _of(ovn, Table.RULE)].count("drop") == 1
    (made,) = _of(ovn, Table.GROUP)
    assert made.references["ports"] == tuple(row.key for row in ovn.cards())
    assert story.hypervisor(vm.host_id).networks[_network_id(story)].keeps_groups, "so that they are not kept twice"


def test_a_change_of_a_group_does_not_wait_for_a_database_that_is_down(
    story: FleetStory, loop: OverlayLoop, ovn: Database
) -> None:
    vm = story.running_vm(networks=(NicWish(network="app"),))
    ovn.is_down = True
    loop.run(story.term)
    group(story, "web", "tcp/443")
    operation = put(story, vm, "web")
    story.settle()
    assert story.operation(operation.id).result == {"vms": 1, "unreached": [], "is_overlay_told": False}
    found = {one.kind: one for one in story.db.read(lambda session: _findings(session, story))}
    assert "it does not answer" in found["overlay-not-written"].message
    ovn.is_down = False
    loop.run(story.term)
    assert _of(ovn, Table.GROUP), "it is told later"
    assert "overlay-not-written" not in {one.kind for one in story.db.read(lambda session: _findings(session, story))}


def test_what_a_closed_guest_has_open_passes_while_it_moves_and_for_a_while_after(
    story: FleetStory, loop: OverlayLoop, ovn: Database
) -> None:
    vm = story.running_vm(networks=(NicWish(network="app"),))
    group(story, "web", "tcp/443")
    put(story, vm, "web")
    story.settle(until=lambda: bool(story.db.read(overlays.state).asked))
    loop.run(story.term)
    story.settle()

    def is_moved() -> bool:
        loop.run(story.term)
        return "moved" in {row.key for row in _of(ovn, Table.GROUP)}

    assert not is_moved()
    story.accept_power(vm, "migrate")
    story.settle(until=lambda: story.db.read(lambda session: claims.migration_of(session, vm.id)) is not None)
    assert is_moved(), "before it arrives"
    story.settle()
    assert is_moved()
    story.clock.advance(MOVED_GRACE_S + 1)
    assert not is_moved()


def _findings(session: Session, story: FleetStory) -> tuple[Finding, ...]:
    return examine(doctor_rows.read(session, story.clock.now()))


def _network_id(story: FleetStory) -> str:
    return story.db.read(lambda session: networks.get(session, "app", project=story.project)).network.id


def _mac(story: FleetStory, vm_id: str) -> str:
    (home,) = story.running_on(vm_id)
    return story.hypervisor(home).domains[vm_id].spec.nics[0].mac
