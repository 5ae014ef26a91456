"""Security groups through every layer but the kernel: whom a change reaches, and who is told later."""

from tests.operations.backup_kit import accept_restore, made_backup, ready_repo
from tests.operations.kit import FleetStory
from trimtab_agent.hypervisor.simulated import SimulatedHypervisor
from trimtab_controller.core.model import Operation, Vm
from trimtab_controller.loops.upkeep import Upkeep
from trimtab_controller.services import secgroups as service
from trimtab_controller.services import vm_devices
from trimtab_controller.services.vm_power import Caller
from trimtab_controller.store import schema, secgroups
from trimtab_controller.store.database import Session
from trimtab_protos.network_messages import FirewallSpec, PeerFinding


def group(story: FleetStory, name: str, *rules: str) -> None:
    def work(session: Session) -> None:
        service.create(session, name=name, rules=rules, project=story.project, actor=story.actor, now=story.clock.now())

    story.db.write(work)


def put(story: FleetStory, vm: Vm, *names: str) -> Operation:
    caller = Caller(actor=story.actor, expected_version=None, now=story.clock.now())
    return story.db.write(
        lambda session: vm_devices.set_secgroups(session, story.vm(vm.id), caller, names=names, project=story.project)
    )


def change(story: FleetStory, name: str, *rules: str) -> Operation:
    def work(session: Session) -> Operation:
        made = {"project": story.project, "actor": story.actor, "now": story.clock.now()}
        return service.change(session, name, rules, expected_version=None, **made)[1]  # type: ignore[arg-type]

    return story.db.write(work)


def in_force(host: SimulatedHypervisor, vm: Vm) -> tuple[bool, list[str]]:
    found = host.firewalls[vm.id]
    return found.is_closed, [f"{rule.protocol}/{rule.first_port}" for rule in found.rules]


def test_a_vm_of_two_groups_takes_what_either_allows_and_of_none_everything(story: FleetStory) -> None:
    vm = story.running_vm()
    host = story.hypervisor(vm.host_id)
    group(story, "web", "tcp/443")
    group(story, "ssh", "tcp/22")
    put(story, vm, "web", "ssh")
    story.settle()
    assert in_force(host, vm) == (True, ["tcp/22", "tcp/443"])
    put(story, vm)
    story.settle()
    assert in_force(host, vm) == (False, [])


def test_a_start_elsewhere_brings_the_groups_along(story: FleetStory) -> None:
    vm = story.running_vm()
    group(story, "web", "tcp/443")
    put(story, vm, "web")
    story.settle()
    other = next(host_id for host_id in story.host_ids if host_id != vm.host_id)
    story.accept("vm.migrate", vm.id, {"vm_id": vm.id, "to_host_id": other}, name=vm.name, project_id=vm.project_id)
    story.settle()
    assert story.vm(vm.id).host_id == other
    assert in_force(story.hypervisor(other), vm) == (True, ["tcp/443"])
    assert vm.id not in story.hypervisor(vm.host_id).firewalls


def test_a_host_that_does_not_answer_is_told_when_it_is_back(story: FleetStory) -> None:
    vm = story.running_vm()
    host = story.hypervisor(vm.host_id)
    group(story, "web", "tcp/443")
    put(story, vm, "web")
    story.settle()
    story.wire.cut_hosts.add(vm.host_id)
    missed = change(story, "web", "tcp/80")
    story.settle()
    ended = story.operation(missed.id)
    assert ended.result == {"vms": 1, "unreached": [vm.host_id]}
    assert in_force(host, vm) == (True, ["tcp/443"])
    story.wire.cut_hosts.clear()
    upkeep = Upkeep(db=story.db, clock=story.clock, nudger=story.nudger)
    upkeep.apply_firewalls(story.term)
    story.settle()
    assert in_force(host, vm) == (True, ["tcp/80"])
    before = len(story.db.read(lambda session: session.execute(schema.operation.select()).all()))
    upkeep.apply_firewalls(story.term)
    assert len(story.db.read(lambda session: session.execute(schema.operation.select()).all())) == before, "once is enough"


def test_a_restored_vm_is_as_closed_as_it_was(story: FleetStory) -> None:
    ready_repo(story)
    vm = story.running_vm("db")
    group(story, "web", "tcp/443")
    put(story, vm, "web")
    story.settle()
    restored = accept_restore(story, made_backup(story, vm), "db2")
    story.settle()
    again = story.vm(restored.subject_id)
    assert in_force(story.hypervisor(again.host_id), again) == (True, ["tcp/443"])


def test_a_purged_vm_frees_its_groups(story: FleetStory) -> None:
    vm = story.running_vm()
    group(story, "web", "tcp/443")
    put(story, vm, "web")
    story.settle()

    def forget(session: Session) -> tuple[FirewallSpec | None, int]:
        secgroups.forget(session, vm.id)
        found = service.get(session, "web", project=story.project)
        return secgroups.firewall_of(session, vm.id), len(found.vms)

    assert story.db.write(forget) == (None, 0)


def test_a_check_names_each_mismatch_with_its_cure_and_the_host_that_is_down(story: FleetStory) -> None:
    first, second, third = story.host_ids
    bad = PeerFinding(host_id=second, mtu=9000, mtu_passed=1500, rate_bytes_s=1 << 30, has_clock=True)
    story.fleet.peer_findings[(first, second)] = bad
    table = schema.host
    story.db.write(lambda session: session.execute(table.update().where(table.c.id == third).values(connectivity="lost")))
    operation = story.accept("host.check", "fleet", {"host_id": ""}, name="all hosts")
    story.settle()
    result = story.operation(operation.id).result
    assert result is not None
    assert {(one["peer"], one["kind"]) for one in result["problems"]} == {("node3", "down"), ("node2", "mtu")}
    assert all(one["cure"] for one in result["problems"])
    assert sorted((pair["seen_by"], pair["is_fine"]) for pair in result["pairs"]) == [("node1", False), ("node2", True)]
