"""A running guest is given and loses vcpus, memory, disks and cards; what it sees itself is asked, not what libvirt says."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.contract.kvm_fixture import KvmHost
from tests.lab.guest_view import available_mib, disk_mib, guest_says, has_card, memory_mib, online_cpus
from tests.lab.kvm_guests import MIB, Migration, cleaned, spec_of, start, two_hosts, until, wait_for_tick
from trimtab_agent.hypervisor.base import Applied, Stamp
from trimtab_lab.hosts import Lab
from trimtab_protos.device_messages import GuestResources
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import (
    ChangedPart,
    DiskFormat,
    DiskSpec,
    DomainSpec,
    MigrationResult,
    MigrationSide,
    NicSpec,
    PowerAction,
    VolumeSpec,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, KvmHost, KvmHost]]:
    with two_hosts(tmp_path_factory.mktemp("plug"), is_second_short=True) as made:
        yield made


@pytest.fixture(scope="module")
def lab(hosts: tuple[Lab, KvmHost, KvmHost]) -> Lab:
    return hosts[0]


@pytest.fixture(scope="module")
def node1(hosts: tuple[Lab, KvmHost, KvmHost]) -> KvmHost:
    return hosts[1]


@pytest.fixture(scope="module")
def node2(hosts: tuple[Lab, KvmHost, KvmHost]) -> KvmHost:
    return hosts[2]


def apply(host: KvmHost, spec: DomainSpec, *, turn: int = 3, epoch: int = 1) -> Applied:
    return host.hypervisor.apply_domain(spec, Stamp(epoch=epoch, turn=turn))


def apply_until_done(host: KvmHost, spec: DomainSpec, *, epoch: int = 1) -> Applied:
    return until(lambda: found if not (found := apply(host, spec, epoch=epoch)).left else None, what="the guest to follow")


def test_a_guest_is_given_vcpus_and_memory_moves_with_them_and_gives_memory_back(
    lab: Lab, node1: KvmHost, node2: KvmHost
) -> None:
    spec = spec_of(node1, "grow", node1.shared_pool, vcpus=1, vcpus_max=3, memory_mib=96, memory_max_mib=224)
    with cleaned(spec, node1, node2):
        start(node1, spec)
        wait_for_tick(node1, spec.vm_id, 1)
        until(lambda: online_cpus(lab, "node1", spec.vm_id) == 1, what="the guest agent")
        before_mib = memory_mib(lab, "node1", spec.vm_id)
        bigger = replace(spec, vcpus=3, memory_mib=160)
        applied = apply_until_done(node1, bigger)
        assert (applied.domain.vcpus, applied.domain.memory_mib) == (3, 160)
        assert online_cpus(lab, "node1", spec.vm_id) == 3
        assert memory_mib(lab, "node1", spec.vm_id) - before_mib == 64
        tick = wait_for_tick(node1, spec.vm_id, 2)

        outcome = Migration(node1, node2, bigger).ended()
        assert isinstance(outcome, MigrationResult), outcome
        node2.hypervisor.settle_migration(spec.vm_id, MigrationSide.KEEP, bigger, (), Stamp(epoch=2, turn=4))
        node1.hypervisor.settle_migration(spec.vm_id, MigrationSide.REMOVE, bigger, (), Stamp(epoch=2, turn=4))
        wait_for_tick(node2, spec.vm_id, tick + 1)
        assert online_cpus(lab, "node2", spec.vm_id) == 3
        assert memory_mib(lab, "node2", spec.vm_id) - before_mib == 64

        smaller = replace(bigger, memory_mib=128)
        assert apply_until_done(node2, smaller, epoch=2).domain.memory_mib == 128
        assert memory_mib(lab, "node2", spec.vm_id) - before_mib == 32
        # Below what it booted with only a stop helps, and the answer says so.
        left = apply(node2, replace(smaller, memory_mib=64), epoch=2).left
        assert [(each.part, each.needs_stop) for each in left] == [(ChangedPart.MEMORY, True)]


def test_a_guest_that_is_asked_for_a_vcpu_has_as_many_as_its_host_says_and_lives(lab: Lab, node1: KvmHost) -> None:
    """Whether it gives one is the guest's own affair; what is said of that is what it sees itself, or that only a stop makes it so."""
    seen: list[tuple[int, int]] = []
    spec = spec_of(node1, "shrnk", node1.local_pool, vcpus=2, vcpus_max=3, memory_mib=96, memory_max_mib=224)
    smaller = replace(spec, vcpus=1)

    def agreed() -> int | None:
        """Return the vcpus that guest and host agree on: a guest may let go of one just after it was given up on."""
        seen.append((online_cpus(lab, "node1", spec.vm_id), node1.hypervisor.observe_domain(spec.vm_id).vcpus))
        return seen[-1][1] if seen[-1][0] == seen[-1][1] else None

    def counted() -> int | None:
        """Return the vcpus that libvirt counts, once it is said that nothing but a stop changes them."""
        needs_stop = any(each.needs_stop for each in apply(node1, smaller).left)
        return node1.hypervisor.observe_domain(spec.vm_id).vcpus if needs_stop else None

    with cleaned(spec, node1):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 1)
        until(lambda: online_cpus(lab, "node1", spec.vm_id) == 2, what="two vcpus")
        kept = [each.part for each in apply(node1, smaller).left] == [ChangedPart.VCPUS]
        has = until(lambda: agreed() or counted(), what="guest and host to see as many vcpus, or to say why not")
        sees = online_cpus(lab, "node1", spec.vm_id)
        assert (sees, has) in ({(1, 1), (2, 2), (1, 2)} if kept else {(1, 1)}), seen
        before_mib = memory_mib(lab, "node1", spec.vm_id)
        # The order that killed a QEMU: memory after a vcpu that the guest did not give.
        more = replace(spec, vcpus=has, memory_mib=160)
        assert apply_until_done(node1, more).domain.memory_mib == 160
        assert memory_mib(lab, "node1", spec.vm_id) - before_mib == 64
        if sees != has:  # a vcpu more, where libvirt lost count, killed one too
            left = apply(node1, replace(more, vcpus=3)).left
            assert [(each.part, each.needs_stop) for each in left] == [(ChangedPart.VCPUS, True)]
        wait_for_tick(node1, spec.vm_id, tick + 2)


def test_a_running_guest_is_as_fast_as_its_volume_may_be(lab: Lab, node1: KvmHost) -> None:
    spec = spec_of(node1, "limit", node1.local_pool)
    with cleaned(spec, node1):
        start(node1, spec)
        wait_for_tick(node1, spec.vm_id, 1)
        now = "cut -d' ' -f1 /proc/uptime"
        disk = f"/dev/$(basename $(dirname $(grep -lx {spec.disks[0].volume_id} /sys/block/*/serial)))"
        read = f"sync; echo 3 >/proc/sys/vm/drop_caches; {now}; dd if={disk} of=/dev/null bs=64k count=64 2>/dev/null && {now}"

        def takes_s() -> float:
            """Time 4 MiB by the guest's own clock; its cache is dropped first."""
            began, ended = guest_says(lab, "node1", spec.vm_id, read).split()
            return float(ended) - float(began)

        until(lambda: online_cpus(lab, "node1", spec.vm_id) == 1, what="the guest agent")
        limited = replace(spec, disks=(replace(spec.disks[0], bandwidth_limit_bytes_s=MIB // 2),))
        assert apply(node1, limited).left == ()
        assert takes_s() > 5, "4 MiB at half a MiB a second"
        assert apply(node1, spec).left == ()
        assert takes_s() < 5


def test_a_balloon_takes_what_the_guest_does_not_use_and_gives_all_back_when_it_is_short(lab: Lab, node2: KvmHost) -> None:
    """On a host that never has enough: down to the floor in steps, and up at once. Its share of the cpus is the kernel's to tell."""
    spec = spec_of(node2, "air", node2.local_pool, memory_mib=192, memory_max_mib=192)
    domain = f"trimtab-{spec.vm_id}"
    with cleaned(spec, node2):
        start(node2, spec)
        until(lambda: online_cpus(lab, "node2", spec.vm_id) == 1, what="the guest agent")
        free_mib = available_mib(lab, "node2", spec.vm_id)
        squeezed = replace(spec, resources=GuestResources(balloon_min_mib=160, cpu_weight=25, cpu_limit_percent=50))
        assert apply(node2, squeezed).left == ()
        told = dict(
            line.split(":") for line in lab.run("node2", ["virsh", "schedinfo", domain]).stdout.split("\n") if ":" in line
        )
        told = {name.strip(): value.strip() for name, value in told.items()}
        assert (told["cpu_shares"], told["vcpu_period"], told["vcpu_quota"]) in {
            ("256", "100000", "50000"),
            ("25", "100000", "50000"),
        }
        assert quota_of_vcpu(lab, "node2", domain) == 50_000, "the kernel holds its vcpu to half a cpu"

        (balloon,) = until(lambda: seen if (seen := node2.hypervisor.balloon_statistics()) else (), what="its balloon")  # type: ignore[attr-defined]
        assert (balloon.floor_mib, balloon.ceiling_mib) == (160, 192)
        until(lambda: given_mib(lab, "node2", domain) == 160, what="the balloon at its floor")
        assert free_mib - available_mib(lab, "node2", spec.vm_id) >= 24, "the guest itself has less"
        # QEMU tells libvirt of a change within a second.
        until(lambda: node2.hypervisor.observe_domain(spec.vm_id).balloon_mib == 160, what="its host to say so")

        left_mib = available_mib(lab, "node2", spec.vm_id)
        fill = f"mkdir -p /fill; mount -t tmpfs -o size=90% none /fill; dd if=/dev/zero of=/fill/a bs=1M count={left_mib - 10}"
        guest_says(lab, "node2", spec.vm_id, fill)
        until(lambda: given_mib(lab, "node2", domain) == 192, what="all of it back")
        assert node2.hypervisor.balloon_changes()["guest-short"] >= 1  # type: ignore[attr-defined]
        assert apply(node2, spec).left == ()
        assert quota_of_vcpu(lab, "node2", domain) <= 0, "no bound any more"
        wait_for_tick(node2, spec.vm_id, 1)


def test_a_guest_that_takes_memory_faster_than_its_host_looks_has_it_before_its_kernel_kills(lab: Lab, node2: KvmHost) -> None:
    """More at one stroke than its balloon leaves it, and less than its memory; its floor was told while it ran."""
    spec = spec_of(node2, "gulp", node2.local_pool, memory_mib=224, memory_max_mib=224)
    domain = f"trimtab-{spec.vm_id}"
    with cleaned(spec, node2):
        start(node2, spec)
        until(lambda: online_cpus(lab, "node2", spec.vm_id) == 1, what="the guest agent")
        assert apply(node2, replace(spec, resources=GuestResources(balloon_min_mib=128))).left == ()
        # Not all the way, where the guest uses more than that: it keeps a margin. One that was silent gives nothing for two minutes.
        until(lambda: given_mib(lab, "node2", domain) <= 145, what="the balloon near its floor", deadline_s=300)
        take_mib = available_mib(lab, "node2", spec.vm_id) + 25
        took = f"dd if=/dev/zero of=/dev/null bs={take_mib}M count=1 2>/dev/null; echo $?; grep oom_kill /proc/vmstat"
        assert guest_says(lab, "node2", spec.vm_id, took).split() == ["0", "oom_kill", "0"]
        taken_back = guest_says(lab, "node2", spec.vm_id, "sed -n 's/^balloon_deflate //p' /proc/vmstat")
        assert int(taken_back) > 0, "it was short, and helped itself"


def given_mib(lab: Lab, host: str, domain: str) -> int:
    """Return what QEMU says that the balloon leaves the guest."""
    told = dict(line.split() for line in lab.run(host, ["virsh", "dommemstat", domain]).stdout.splitlines() if line)
    return int(told["actual"]) // 1024


def quota_of_vcpu(lab: Lab, host: str, domain: str) -> int:
    """Return the microseconds of cpu that the kernel gives the first vcpu in each period; -1 where it is bound by none."""
    find = "find /sys/fs/cgroup -path '*vcpu0*' \\( -name cpu.cfs_quota_us -o -name cpu.max \\) -path '*machine*' | head -1"
    text = lab.run(host, ["sh", "-c", f"cat $({find})"]).stdout.split()[0]
    return -1 if text == "max" else int(text)


def test_disks_and_cards_come_go_and_grow_under_a_running_guest(lab: Lab, node1: KvmHost) -> None:
    spec = spec_of(node1, "plugs", node1.local_pool)
    data = VolumeSpec(volume_id="vol-plugsdata", pool_id=spec.pools[0].pool_id, format=DiskFormat.QCOW2, size_bytes=16 * MIB)
    verbs = node1.hypervisor
    with cleaned(spec, node1):
        start(node1, spec)
        tick = wait_for_tick(node1, spec.vm_id, 1)
        verbs.ensure_volume(data, spec.pools[0])
        disk = DiskSpec(volume_id=data.volume_id, pool_id=data.pool_id, format=data.format, index=1)
        card = NicSpec(nic_id="nic-plugs2", network_id=node1.network.network_id, mac="52:54:00:00:07:01", index=1)
        with_both = replace(spec, disks=(*spec.disks, disk), nics=(*spec.nics, card))
        assert apply(node1, with_both).left == ()
        assert apply(node1, with_both).left == (), "twice is fine"
        until(lambda: disk_mib(lab, "node1", spec.vm_id, data.volume_id) == 16, what="the disk in the guest")
        until(lambda: has_card(lab, "node1", spec.vm_id, card.mac), what="the card in the guest")

        grown = replace(data, size_bytes=24 * MIB)
        assert verbs.resize_volume(grown, spec.pools[0], spec.vm_id).size_bytes == 24 * MIB
        until(lambda: disk_mib(lab, "node1", spec.vm_id, data.volume_id) == 24, what="the grown disk in the guest")
        with pytest.raises(InvalidRequest, match="not shrink"):
            verbs.resize_volume(data, spec.pools[0], spec.vm_id)

        apply_until_done(node1, spec)
        assert disk_mib(lab, "node1", spec.vm_id, data.volume_id) == 0
        assert not has_card(lab, "node1", spec.vm_id, card.mac)
        verbs.delete_volume(data.volume_id, spec.pools[0])
        wait_for_tick(node1, spec.vm_id, tick + 1)
        # What was plugged away stays away after the next start.
        verbs.change_power(spec.vm_id, PowerAction.FORCE_OFF, Stamp(epoch=1, turn=8))
        verbs.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=9))
