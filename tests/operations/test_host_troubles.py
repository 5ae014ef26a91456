"""A host that lives and lacks its guests' network or storage: it is shown and told, nothing new goes there, and it is never called dead."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.operations.failover_kit import Story, story_of
from tests.operations.kit import FleetStory
from trimtab_controller import metrics
from trimtab_controller.core.doctor import examine
from trimtab_controller.core.host_troubles import TroubleKind
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Vm
from trimtab_controller.loops.failover import LEADERS_WINDOW_S
from trimtab_controller.loops.host_troubles import STEADY_S
from trimtab_controller.store import doctor_rows, events, hosts, schema

LED = int(LEADERS_WINDOW_S) + 4
WELL = int(STEADY_S) + 3


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> Iterator[Story]:
    yield from story_of(new_story(host_count=3))


def told(story: Story, kind: str) -> list[str]:
    found = story.fleet.db.read(lambda session: events.page_after(session, 0, limit=1000))
    return [one.message for one in found if one.kind == kind]


def name_of(story: Story, host_id: str) -> str:
    return story.fleet.db.read(lambda session: hosts.get(session, host_id)).name


def counted(kind: TroubleKind) -> float:
    return metrics.HOSTS_DEGRADED.labels(kind.value)._value.get()


def diagnosed(story: Story) -> list[tuple[str, str, str]]:
    """Return (severity, kind, subject) of what the doctor says of hosts."""
    now = story.fleet.clock.now()
    found = examine(story.fleet.db.read(lambda session: doctor_rows.read(session, now)))
    kinds = {kind.value for kind in TroubleKind}
    return [(one.severity.value, one.kind, one.subject) for one in found if one.kind in kinds]


def assert_untouched(story: Story, vm: Vm) -> None:
    """The guest runs where it ran, nobody was suspected, nothing was fenced."""
    assert story.fleet.running_on(vm.id) == {vm.host_id}
    assert story.fleet.vm(vm.id).epoch == vm.epoch
    assert not story.device.asked
    assert not [kind for kind in story.kinds() if kind.startswith("failover.")]
    standing = story.fleet.db.read(lambda session: hosts.get(session, vm.host_id)).connectivity
    assert standing is HostConnectivity.UP
    assert [one.kind for one in story.operations(vm.id)] == ["vm.create"]


def test_a_lost_uplink_is_shown_and_told_once_and_ends_nobody(story: Story) -> None:
    vm = story.kept_vm()
    story.arm(vm.host_id)
    story.heartbeats(LED)
    assert story.troubles() == {}
    story.pull_uplink(vm.host_id)
    story.heartbeats(60)
    assert story.troubles() == {vm.host_id: ["network-degraded: bridge br0 has lost its carrier"]}
    assert any("network-degraded" in text for text in story.loop.state.hosts[vm.host_id].degraded)
    (message,) = told(story, "alarm.network-degraded")
    assert message.startswith(f"{name_of(story, vm.host_id)} is network-degraded: bridge br0 has lost its carrier")
    assert counted(TroubleKind.NETWORK) == 1
    assert diagnosed(story) == [("warning", "network-degraded", f"host {name_of(story, vm.host_id)}")]
    assert_untouched(story, vm)
    story.pull_uplink(vm.host_id, is_out=False)
    story.heartbeats(WELL)
    assert story.troubles() == {}
    assert not story.loop.state.hosts[vm.host_id].degraded
    assert len(told(story, "host.network_restored")) == 1
    assert (counted(TroubleKind.NETWORK), diagnosed(story)) == (0, [])
    assert_untouched(story, vm)


def test_since_when_is_kept_however_often_the_host_says_it_anew(story: Story) -> None:
    (host_id, *_others) = story.fleet.host_ids
    story.report()
    story.fleet.clock.advance(30)
    lost_at = story.fleet.clock.now()
    story.pull_uplink(host_id)
    story.report()
    story.fleet.clock.advance(600)
    story.fleet.hypervisor(host_id).boot_id = "another-inventory"
    story.fleet.agents.agent(host_id).observer.refresh_inventory()
    story.report()
    finding = examine(story.fleet.db.read(lambda session: doctor_rows.read(session, story.fleet.clock.now())))
    assert [one.since for one in finding if one.kind == "network-degraded"] == [lost_at]


def test_no_vm_is_placed_where_its_network_goes_nowhere_until_it_does_again(story: Story) -> None:
    first, second, third = story.fleet.host_ids
    story.pull_uplink(first)
    story.pull_uplink(second)
    story.report()
    for number in range(3):
        assert story.fleet.running_vm(f"web{number}").host_id == third
    to_first = story.fleet.accept_create("here", to_host_id=first)[1]
    story.fleet.settle()
    error = story.fleet.operation(to_first.id).error
    assert error is not None
    assert "network default goes nowhere from it: its bridge br0 has lost its carrier" in str(error)
    unconnected, operation = story.fleet.accept_create("alone", networks=(), to_host_id=first)
    story.fleet.settle()
    assert story.fleet.operation(operation.id).error is None, "a vm without that network goes there"
    assert story.fleet.vm(unconnected.id).host_id == first
    story.pull_uplink(first, is_out=False)
    story.report()
    vm, _operation = story.fleet.accept_create("again", to_host_id=first)
    story.fleet.settle()
    assert story.fleet.vm(vm.id).host_id == first


def test_a_bridge_that_no_network_uses_does_not_count(story: Story) -> None:
    (host_id, *_others) = story.fleet.host_ids
    host = story.fleet.hypervisor(host_id).host
    name = host.bridges[0].name
    story.report()
    story.fleet.db.write(lambda session: _use_another_bridge(session, host_id))
    story.pull_uplink(host_id, name)
    story.heartbeats(LED)
    assert story.troubles() == {}
    assert not told(story, "alarm.network-degraded")


def _use_another_bridge(session: Any, host_id: str) -> None:
    table = schema.network_host
    session.execute(table.update().where(table.c.host_id == host_id).values(bridge="br7"))


def test_a_new_leader_knows_it_and_tells_neither_twice_nor_never_of_its_end(story: Story) -> None:
    vm = story.kept_vm()
    story.heartbeats(LED)
    story.pull_uplink(vm.host_id)
    story.heartbeats(10)
    story.new_leader()
    story.heartbeats(LED)
    assert any("network-degraded" in text for text in story.loop.state.hosts[vm.host_id].degraded)
    assert len(told(story, "alarm.network-degraded")) == 1
    story.pull_uplink(vm.host_id, is_out=False)
    story.report()
    story.new_leader()
    story.heartbeats(LED + WELL)
    assert len(told(story, "host.network_restored")) == 1
    story.new_leader()
    story.heartbeats(LED + WELL)
    assert len(told(story, "host.network_restored")) == 1
    assert_untouched(story, vm)


def test_a_link_that_flaps_is_told_of_once(story: Story) -> None:
    vm = story.kept_vm()
    story.heartbeats(LED)
    for _time in range(6):
        story.pull_uplink(vm.host_id)
        story.report()
        story.rounds(3)
        story.pull_uplink(vm.host_id, is_out=False)
        story.report()
        story.rounds(3)
    story.heartbeats(WELL)
    assert (len(told(story, "alarm.network-degraded")), len(told(story, "host.network_restored"))) == (1, 1)


def test_a_pool_that_one_host_alone_does_not_reach_is_its_lost_storage(story: Story) -> None:
    vm = story.kept_vm()
    story.heartbeats(LED)
    story.cut_storage(vm.host_id)
    story.heartbeats(30)
    assert story.troubles() == {vm.host_id: ["storage-lost: pool shared does not answer"]}
    assert not story.loop.state.hosts[vm.host_id].has_storage
    (message,) = told(story, "alarm.storage-lost")
    assert "storage lost: pool shared does not answer" in message
    assert counted(TroubleKind.STORAGE) == 1
    assert diagnosed(story) == [("critical", "storage-lost", f"host {name_of(story, vm.host_id)}")]
    assert_untouched(story, vm)
    story.cut_storage()
    story.heartbeats(WELL + 10)
    assert story.troubles() == {}
    assert story.loop.state.hosts[vm.host_id].has_storage
    (message,) = told(story, "host.storage_restored")
    assert message.endswith("pool shared answers again")
    assert_untouched(story, vm)


def test_a_pool_that_nobody_reaches_is_no_hosts_trouble(story: Story) -> None:
    vm = story.kept_vm()
    story.heartbeats(LED)
    story.cut_storage(*story.fleet.host_ids)
    story.heartbeats(30)
    assert story.troubles() == {}
    assert story.loop.state.hosts[vm.host_id].has_storage
    assert not told(story, "alarm.storage-lost")
    assert_untouched(story, vm)


def test_a_pool_without_kept_vms_of_that_host_is_not_its_lost_storage(story: Story) -> None:
    vm = story.fleet.running_vm("plain")
    story.heartbeats(LED)
    story.cut_storage(vm.host_id)
    story.heartbeats(20)
    assert story.troubles() == {}


def test_what_others_said_long_ago_does_not_speak_for_a_pool(story: Story) -> None:
    vm = story.kept_vm()
    story.heartbeats(LED)
    story.cut_storage(vm.host_id)
    story.heartbeats(12)
    assert story.troubles()
    story.fleet.clock.advance(120)
    story.rounds(3)
    assert story.troubles() == {}
