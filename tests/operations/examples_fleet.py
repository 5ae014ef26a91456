"""One valid operation of every kind that works on networks, hosts and plans. See `examples.py`."""

from tests.operations.example import Example, name_of
from tests.operations.kit import FleetStory
from trimtab_controller.core.model import Operation
from trimtab_controller.core.planning import PlanKind
from trimtab_controller.services import host_reboots, hosts_admin
from trimtab_controller.services import networks as network_service
from trimtab_controller.services import plans as plan_service
from trimtab_controller.services import secgroups as secgroup_service
from trimtab_controller.store import (
    hosts,
    networks,
    plans,
    reach,
    schema,
    secgroups,
)
from trimtab_controller.store.database import Session


def _create_network(story: FleetStory) -> Operation:
    spec = network_service.NetworkSpec(name=name_of("net"), kind="bridge", bridge="br0", bridges={})
    _view, operation = story.db.write(
        lambda session: network_service.create(session, spec, project=None, actor=story.actor, now=story.clock.now())
    )
    return operation


def _network_is_usable(story: FleetStory, operation: Operation) -> None:
    found = story.db.read(lambda session: networks.hosts_of(session, [operation.subject_id]))[operation.subject_id]
    assert {one.state for one in found} == {"ready"}


def _network_is_gone(story: FleetStory, operation: Operation) -> None:
    assert story.db.read(lambda session: networks.find(session, "", operation.subject_name)) is None, "the name is free"


def _delete_network(story: FleetStory) -> Operation:
    network = story.add_network(name_of("net"))
    return story.db.write(
        lambda session: network_service.delete(
            session,
            network.id,
            project=None,
            expected_version=None,
            actor=story.actor,
            now=story.clock.now(),
        )
    )


def _prepare(story: FleetStory) -> Operation:
    name = name_of("node-")
    host_id = story.add_host(name)
    return story.accept("host.prepare", host_id, {"host_id": host_id}, name=name)


def _prepared(story: FleetStory, operation: Operation) -> None:
    def read(session: Session) -> set[str]:
        states: set[str] = set()
        for table in (schema.pool_host, schema.network_host):
            query = table.select().with_only_columns(table.c.state).where(table.c.host_id == operation.subject_id)
            states |= set(session.scalars(query))
        return states

    assert story.db.read(read) == {"ready"}


def _remove_host(story: FleetStory) -> Operation:
    name = name_of("node-")
    host_id = story.add_host(name)
    return story.accept("host.remove", host_id, {"host_id": host_id, "keep_guests": False}, name=name)


def _remove_host_with_guest(story: FleetStory) -> Operation:
    prepared = _prepare(story)
    story.settle()
    host_id = prepared.subject_id
    story.running_vm(name_of("web"), pool=story.local, to_host_id=host_id)
    return story.accept("host.remove", host_id, {"host_id": host_id, "keep_guests": True}, name=prepared.subject_name)


def _host_is_gone(story: FleetStory, operation: Operation) -> None:
    assert not _host_is_live(story, operation.subject_id)
    assert story.running_on_host(operation.subject_id) == story.hypervisor(operation.subject_id).domains.keys(), "guests run on"


def _host_stays(story: FleetStory, operation: Operation) -> None:
    assert _host_is_live(story, operation.subject_id)
    table = schema.host
    query = table.select().with_only_columns(table.c.is_cordoned).where(table.c.id == operation.subject_id)
    assert story.db.read(lambda session: session.execute(query).scalar_one()) is False


def _host_is_live(story: FleetStory, host_id: str) -> bool:
    table = schema.host
    query = table.select().with_only_columns(table.c.deleted_at).where(table.c.id == host_id)
    return story.db.read(lambda session: session.execute(query).scalar_one()) is None


def _drain(story: FleetStory) -> Operation:
    """A drain of the one host that has a vm; hosts that earlier plans shut are opened first, and what they moved is deleted."""
    story.db.write(lambda session: [reach.set_cordon(session, one, is_cordoned=False) for one in story.host_ids])
    for vm_id in sorted(story.fleet_vms()):
        story.accept_power(story.vm(vm_id), "delete")
        story.settle()
    vm = story.running_vm(name_of("web"))
    wish = plan_service.PlanWish(kind=PlanKind.DRAIN, hosts=(vm.host_id,))

    def work(session: Session) -> Operation:
        view = plan_service.create(session, wish, actor=story.actor, now=story.clock.now())
        return plan_service.apply(session, view.row.id, actor=story.actor, now=story.clock.now())

    return story.db.write(work)


def _drained(story: FleetStory, operation: Operation) -> None:
    view = story.db.read(lambda session: plan_service.get(session, operation.subject_id))
    assert view.row.state == "applied"
    assert [one.state for one in view.steps] == ["done"] * len(view.plan.steps)
    for host_id in view.plan.scope:
        assert story.running_on_host(host_id) == frozenset()
    for step in view.plan.moves:
        assert story.running_on(step.vm_id) == {story.vm(step.vm_id).host_id}


def _called_off(story: FleetStory, operation: Operation) -> None:
    view = story.db.read(lambda session: plan_service.get(session, operation.subject_id))
    assert view.row.state in {"open", "cancelled"}
    assert not any(one.state in {"pending", "running", "stopping"} for one in view.steps)
    assert not any(host.is_cordoned for host in story.db.read(hosts.live)), "what it shut is open again"
    for step in view.plan.moves:
        assert story.running_on(step.vm_id) == {story.vm(step.vm_id).host_id}


def _reboot(story: FleetStory) -> Operation:
    host_id = story.add_host(name_of("node-"))
    return story.db.write(
        lambda session: host_reboots.reboot(
            session, hosts.get(session, host_id), force=False, actor=story.actor, now=story.clock.now()
        )
    )


def _is_back(story: FleetStory, operation: Operation) -> None:
    assert story.rebooted.count(operation.subject_id) == 1, "an order that comes twice restarts once"
    host = story.db.read(lambda session: hosts.get(session, operation.subject_id))
    assert host.boot_id == story.hypervisor(host.id).boot_id
    assert not host.is_cordoned
    assert not story.db.read(lambda session: plans.maintenance_of(session, [host.id]))


def _is_open_again(story: FleetStory, operation: Operation) -> None:
    assert not story.db.read(lambda session: hosts.get(session, operation.subject_id)).is_cordoned
    assert not story.db.read(lambda session: plans.maintenance_of(session, [operation.subject_id]))


def _apply_firewall(story: FleetStory) -> Operation:
    """A running vm's group is changed: its host is told of the new rules."""
    name = name_of("web")
    vm = story.running_vm(name)

    def work(session: Session) -> Operation:
        made = {"project": story.project, "actor": story.actor, "now": story.clock.now()}
        secgroup_service.create(session, name=f"sg-{name}", rules=["tcp/22"], **made)
        secgroup_service.put_into(session, vm.id, [f"sg-{name}"], project=story.project, field="secgroups")
        _view, operation = secgroup_service.change(session, f"sg-{name}", ["tcp/443"], expected_version=None, **made)
        return operation

    return story.db.write(work)


def _firewall_is_applied(story: FleetStory, operation: Operation) -> None:
    def read(session: Session) -> list[str]:
        return list(secgroups.members(session, [operation.subject_id])[operation.subject_id])

    (vm_id,) = story.db.read(read)
    firewall = story.hypervisor(story.vm(vm_id).host_id).firewalls[vm_id]
    assert [(rule.protocol, rule.first_port) for rule in firewall.rules] == [("tcp", 443)]
    assert firewall.is_closed
    assert vm_id not in {one.vm_id for one in story.db.read(lambda session: secgroups.behind(session, limit=100))}


def _check_hosts(story: FleetStory) -> Operation:
    return story.db.write(lambda session: hosts_admin.check(session, "", actor=story.actor, now=story.clock.now()))


def _hosts_are_checked(story: FleetStory, operation: Operation) -> None:
    result = story.operation(operation.id).result
    assert result is not None
    assert result["hosts"] >= 3
    assert len(result["pairs"]) == result["hosts"] * min(result["hosts"] - 1, 16), "each way, from both ends"


EXAMPLES: dict[str, Example] = {
    "host.reboot": Example(kind="host.reboot", arrange=_reboot, done=_is_back, undone=_is_open_again),
    "firewall.apply": Example(kind="firewall.apply", arrange=_apply_firewall, done=_firewall_is_applied),
    "host.check": Example(kind="host.check", arrange=_check_hosts, done=_hosts_are_checked),
    "plan.apply": Example(kind="plan.apply", arrange=_drain, done=_drained, undone=_called_off),
    "network.create": Example(kind="network.create", arrange=_create_network, done=_network_is_usable, undone=_network_is_gone),
    "network.delete": Example(kind="network.delete", arrange=_delete_network, done=_network_is_gone),
    "host.prepare": Example(kind="host.prepare", arrange=_prepare, done=_prepared),
    "host.remove": Example(kind="host.remove", arrange=_remove_host, done=_host_is_gone, undone=_host_stays),
    "host.remove with a guest": Example(
        kind="host.remove", arrange=_remove_host_with_guest, done=_host_is_gone, undone=_host_stays
    ),
}
