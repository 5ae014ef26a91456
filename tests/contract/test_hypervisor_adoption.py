"""What both hypervisors promise about domains that become ours while they run, and plain again."""

from dataclasses import replace

from tests.contract.hosts import Hosts, Vm, power, refusal, until
from trimtab_agent.hypervisor.base import Stamp
from trimtab_protos.adoption_messages import AdoptedDisk
from trimtab_protos.errors import NotFound
from trimtab_protos.messages import DomainState, PowerAction


def plain_names(hosts: Hosts) -> set[str]:
    return {seen.name for seen in hosts.first.hypervisor.list_domains() if not seen.vm_id}


def test_a_running_domain_is_released_described_and_adopted_as_it_is(hosts: Hosts, vm: Vm) -> None:
    host = hosts.first.hypervisor
    before = power(hosts.first, vm, PowerAction.START)
    until(lambda: host.observe_domain(vm.id).state is DomainState.RUNNING, what="a start", deadline_s=hosts.first.patience_s)

    for _repeat in range(2):
        plain = host.release_domain(vm.spec, has_autostart=False)
        assert (plain.vm_id, plain.uuid, plain.state) == ("", vm.spec.uuid, DomainState.RUNNING)
    assert plain.name in plain_names(hosts)

    described = host.describe_domain(vm.spec.uuid, "").live
    assert (described.name, described.vm_id, described.vcpus, described.memory_mib) == (plain.name, "", 1, 96)
    assert described.obstacles == ()
    assert [nic.mac for nic in described.nics] == [vm.spec.nics[0].mac]
    (disk,) = [disk for disk in described.disks if disk.path.endswith(f"{vm.volume.volume_id}.qcow2")]

    adopted = [AdoptedDisk(target=disk.target, path=disk.path, volume_id=vm.volume.volume_id)]
    for turn in (5, 6):
        seen = host.adopt_domain(vm.spec.uuid, vm.spec, adopted, Stamp(epoch=3, turn=turn))
        assert (seen.vm_id, seen.state, seen.epoch, seen.turn) == (vm.id, DomainState.RUNNING, 3, turn)
    assert seen.cpu_time_ns >= before.cpu_time_ns
    assert plain.name not in plain_names(hosts)
    assert host.describe_domain("", vm.id).live.vm_id == vm.id

    # Defined while it runs it keeps what it has; once it is stopped it is ours in all.
    assert host.define_domain(vm.spec, Stamp(epoch=3, turn=7)).state is DomainState.RUNNING
    power(hosts.first, vm, PowerAction.FORCE_OFF, epoch=3, turn=8)
    assert host.define_domain(vm.spec, Stamp(epoch=3, turn=9)).name == f"trimtab-{vm.id}"
    assert power(hosts.first, vm, PowerAction.START, epoch=3, turn=10).state is DomainState.RUNNING


def test_what_is_not_there_is_neither_described_nor_adopted(hosts: Hosts, vm: Vm) -> None:
    host = hosts.first.hypervisor
    assert refusal(lambda: host.describe_domain("no-such-domain", ""))[0] is NotFound
    absent = replace(vm.spec, vm_id="vm-nobody", uuid="00000000-0000-4000-8000-000000000001")
    assert refusal(lambda: host.adopt_domain(absent.uuid, absent, [], Stamp(epoch=1, turn=1)))[0] is NotFound
    assert host.release_domain(absent, has_autostart=False).state is DomainState.ABSENT
