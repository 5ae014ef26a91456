"""What every hypervisor promises about changing a domain that may run. See `hosts.py` for the hosts.

What only a guest's own cooperation brings about (memory, vcpus) is asked of real guests in `tests/lab/test_kvm_hotplug.py`.
"""

from dataclasses import replace

import pytest

from tests.contract.hosts import (
    MIB,
    Hosts,
    Vm,
    power,
    refusal,
    until,
)
from trimtab_agent.hypervisor.base import Applied, Stamp
from trimtab_protos.device_messages import CdromSpec
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import (
    DiskFormat,
    DiskSpec,
    DomainSpec,
    DomainState,
    ImageSpec,
    NicSpec,
    PowerAction,
    UploadSource,
    VolumeSpec,
)

pytestmark = [pytest.mark.timeout(900)]
GUEST_ANSWERS_S = 200.0
"""A guest that was just started lets go of a device only once it has booted."""


def apply(hosts: Hosts, spec: DomainSpec, *, turn: int = 5) -> Applied:
    return hosts.first.hypervisor.apply_domain(spec, Stamp(epoch=1, turn=turn))


def data_volume(vm: Vm, *, size_bytes: int = 16 * MIB) -> VolumeSpec:
    return VolumeSpec(volume_id=f"vol-{vm.id}-data", pool_id=vm.pool.pool_id, format=DiskFormat.QCOW2, size_bytes=size_bytes)


def with_data(vm: Vm) -> DomainSpec:
    volume = data_volume(vm)
    disk = DiskSpec(volume_id=volume.volume_id, pool_id=volume.pool_id, format=volume.format, index=1)
    return replace(vm.spec, disks=(*vm.spec.disks, disk))


def test_a_stopped_domain_takes_any_change_at_once(hosts: Hosts, vm: Vm) -> None:
    bigger = replace(vm.spec, vcpus=2, vcpus_max=4, memory_mib=128, memory_max_mib=256)
    applied = apply(hosts, bigger)
    assert applied.left == ()
    assert (applied.domain.state, applied.domain.vcpus, applied.domain.memory_mib) == (DomainState.STOPPED, 2, 128)
    assert (applied.domain.epoch, applied.domain.turn) == (1, 5)
    assert power(hosts.first, vm, PowerAction.START, turn=6).memory_mib == 128


def test_a_domain_that_is_not_there_is_defined(hosts: Hosts, vm: Vm) -> None:
    hosts.first.hypervisor.undefine_domain(vm.id, (), kill_if_running=False, keep_state_files=True)
    assert apply(hosts, vm.spec).domain.state is DomainState.STOPPED


def test_a_disk_and_a_card_come_to_a_running_domain_once_and_go_when_the_guest_lets_them(hosts: Hosts, vm: Vm) -> None:
    verbs, volume = hosts.first.hypervisor, data_volume(vm)
    power(hosts.first, vm, PowerAction.START)
    assert refusal(lambda: apply(hosts, with_data(vm))) == (NotFound, "volume-not-found")
    verbs.ensure_volume(volume, vm.pool)
    card = NicSpec(nic_id=f"nic-{vm.id}-2", network_id=hosts.first.network.network_id, mac="52:54:00:00:03:01", index=1)
    both = replace(with_data(vm), nics=(*vm.spec.nics, card))
    for _twice in range(2):
        applied = apply(hosts, both)
        assert (applied.left, applied.domain.state) == ((), DomainState.RUNNING)
        assert applied.domain.macs == (vm.spec.nics[0].mac, card.mac)
    assert refusal(lambda: verbs.delete_volume(volume.volume_id, vm.pool)) == (Conflict, "volume-in-use")
    until(lambda: apply(hosts, vm.spec).left == (), what="the guest to let go", deadline_s=GUEST_ANSWERS_S)
    verbs.delete_volume(volume.volume_id, vm.pool)
    assert verbs.observe_domain(vm.id).macs == (vm.spec.nics[0].mac,)


def test_a_volume_that_another_guest_has_open_is_not_plugged_in(hosts: Hosts, vm: Vm) -> None:
    verbs, volume = hosts.first.hypervisor, data_volume(vm)
    verbs.ensure_volume(volume, vm.pool)
    power(hosts.first, vm, PowerAction.START)
    apply(hosts, with_data(vm))
    number = vm.spec.uuid[:-12] + "ffff" + vm.spec.uuid[-8:]
    other = replace(with_data(vm), vm_id=f"{vm.id}-b", uuid=number, disks=(replace(with_data(vm).disks[1], index=0),), nics=())
    hosts.second.hypervisor.define_domain(other, Stamp(epoch=1, turn=1))
    start = lambda: hosts.second.hypervisor.change_power(other.vm_id, PowerAction.START, Stamp(epoch=1, turn=2))  # noqa: E731
    assert refusal(start) == (Conflict, "image-locked")
    hosts.second.hypervisor.undefine_domain(other.vm_id, (), kill_if_running=True, keep_state_files=True)
    power(hosts.first, vm, PowerAction.FORCE_OFF, turn=7)
    apply(hosts, vm.spec, turn=8)
    verbs.delete_volume(volume.volume_id, vm.pool)


@pytest.mark.parametrize("is_running", [False, True])
def test_a_volume_grows_and_never_shrinks(hosts: Hosts, vm: Vm, is_running: bool) -> None:
    verbs, grown = hosts.first.hypervisor, replace(vm.volume, size_bytes=96 * MIB)
    if is_running:
        power(hosts.first, vm, PowerAction.START)
    for _twice in range(2):
        assert verbs.resize_volume(grown, vm.pool, vm.id).size_bytes == 96 * MIB
    assert verbs.observe_volume(vm.volume.volume_id, vm.pool).size_bytes == 96 * MIB
    assert refusal(lambda: verbs.resize_volume(vm.volume, vm.pool, vm.id)) == (InvalidRequest, "volume-shrink")
    absent = replace(vm.volume, volume_id="vol-none")
    assert refusal(lambda: verbs.resize_volume(absent, vm.pool, "")) == (NotFound, "volume-not-found")
    if is_running:
        # Somebody else's guest has it open: not from the other host.
        assert refusal(lambda: hosts.second.hypervisor.resize_volume(replace(grown, size_bytes=128 * MIB), vm.pool, "")) == (
            Conflict,
            "image-locked",
        )


def test_the_medium_in_the_drive_changes_and_goes_while_the_guest_runs(hosts: Hosts, vm: Vm) -> None:
    iso = ImageSpec(image_id=f"img-{vm.id}-iso", pool_id=vm.pool.pool_id, format=DiskFormat.ISO, max_bytes=1 << 30)
    path = hosts.image.parent / "contract.iso"
    path.write_bytes(bytes(16 * 2048) + b"\x01CD001\x01".ljust(2048, b"\0") + b"\xffCD001\x01".ljust(2048, b"\0") * 8)
    from tests.contract.hosts import Control

    source = UploadSource(upload_id=str(path), size_bytes=path.stat().st_size)
    hosts.first.hypervisor.import_image(iso, vm.pool, source, Control())
    empty = replace(vm.spec, cdrom=CdromSpec(boot_order=2))
    full = replace(vm.spec, cdrom=CdromSpec(image_id=iso.image_id, pool_id=vm.pool.pool_id, boot_order=2))
    apply(hosts, empty)
    power(hosts.first, vm, PowerAction.START, turn=6)
    for spec in (full, full, empty):
        assert apply(hosts, spec, turn=7).left == ()
    power(hosts.first, vm, PowerAction.FORCE_OFF, turn=8)
    apply(hosts, vm.spec, turn=9)
    hosts.first.hypervisor.delete_image(iso.image_id, vm.pool)
