"""Backups of a real guest that runs on: every one restores to the bytes that the disk had at its instant."""

from pathlib import Path

import libvirt
import pytest

from tests.contract.kvm_fixture import KvmHost
from tests.lab.kvm_backups import Told, run, told_by
from tests.lab.kvm_guests import (
    cleaned,
    last_tick,
    spec_of,
    start,
    two_hosts,
    until,
    wait_for_state,
    wait_for_tick,
)
from trimtab_agent.hypervisor.base import Stamp
from trimtab_protos.messages import DomainState, PowerAction, StateReason

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_increments_of_a_running_guest_restore_byte_identical_also_after_its_qemu_was_killed(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (lab, node1, node2):
        spec = spec_of(node1, "safe", node1.local_pool)
        repository = tmp_path / "repository"
        repository.mkdir()

        def back_up(backup_id: str) -> Told:
            return run(lab, node1, "backup", str(repository), spec.vm_id, backup_id)

        def restored(host: KvmHost, backup_id: str) -> object:
            told = run(lab, host, "restore", str(repository), spec.vm_id, backup_id, str(tmp_path / f"{backup_id}.qcow2"))
            assert told["has_definition"]
            return told["sha256"]

        with cleaned(spec, node1):
            start(node1, spec)
            wait_for_tick(node1, spec.vm_id, 2)
            until(lambda: node1.hypervisor.observe_domain(spec.vm_id).has_guest_agent, what="the guest agent")

            full = back_up("bk-1")
            assert full["full_reason"] == "first backup", full
            assert full["consistency"] == "filesystem", full["notes"]
            wait_for_tick(node1, spec.vm_id, last_tick(node1, spec.vm_id) + 2)
            increment = back_up("bk-2")
            assert (increment["full_reason"], increment["base_id"]) == ("", "bk-1"), increment
            assert int(str(increment["read_bytes"])) < int(str(full["read_bytes"]))

            # One of a group whose file systems cannot be frozen stands still for the instant, and goes on, whoever dies.
            held = run(lab, node1, "hold", "-", spec.vm_id, "bk-held")
            assert held == {
                "held": str(libvirt.VIR_DOMAIN_PAUSED),
                "after": str(libvirt.VIR_DOMAIN_RUNNING),
                "consistency": "crash",
            }
            assert told_by(lab, node1, "die", "-", spec.vm_id, "bk-died").returncode == 9
            assert node1.hypervisor.observe_domain(spec.vm_id).state is DomainState.PAUSED
            assert run(lab, node1, "hold", "-", spec.vm_id, "bk-next")["after"] == str(libvirt.VIR_DOMAIN_RUNNING)
            wait_for_tick(node1, spec.vm_id, last_tick(node1, spec.vm_id) + 1)

            node1.hypervisor.change_power(spec.vm_id, PowerAction.PAUSE, Stamp(epoch=1, turn=3))
            node1.hypervisor.change_power(spec.vm_id, PowerAction.RESUME, Stamp(epoch=1, turn=3))
            lab.run("node1", ["sh", "-c", f"kill -9 $(cat /run/libvirt/qemu/trimtab-{spec.vm_id}.pid)"])
            wait_for_state(node1, spec.vm_id, DomainState.CRASHED, StateReason.CRASHED)
            off = back_up("bk-off")
            assert "its checkpoint cannot be read" in str(off["full_reason"]), off
            node1.hypervisor.change_power(spec.vm_id, PowerAction.START, Stamp(epoch=1, turn=4))
            wait_for_tick(node1, spec.vm_id, 1)
            after = back_up("bk-3")
            assert (after["full_reason"], after["base_id"]) == ("", "bk-off"), "the disk was marked while it was off"
            again = back_up("bk-4")
            assert (again["full_reason"], again["base_id"]) == ("", "bk-3"), again

            for backup_id, told in (("bk-1", full), ("bk-2", increment), ("bk-off", off), ("bk-3", after), ("bk-4", again)):
                assert restored(node2, backup_id) == told["sha256"], backup_id
            listed = lab.run("node1", ["virsh", "checkpoint-list", "--name", f"trimtab-{spec.vm_id}"]).stdout.split()
            assert listed == ["tt-bk-4"]
            left = lab.run(
                "node1", ["find", "/srv/trimtab-local", "/var/lib/libvirt/qemu", "-name", "*scratch*", "-o", "-name", "*.sock"]
            )
            assert "scratch" not in left.stdout
            assert "backup.sock" not in left.stdout
