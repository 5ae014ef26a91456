"""What the drift loop says and does about vms that are not as wished."""

from datetime import UTC, datetime
from typing import Any

import pytest

from trimtab_controller.core.drift import Cure, judge
from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Vm
from trimtab_protos.messages import Firmware

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def a_vm(**changes: Any) -> Vm:
    fields: dict[str, Any] = {
        "id": "vm-1", "uuid": "u", "project_id": "p", "name": "web1", "labels": {}, "origin": "created", "arch": "x86_64",
        "machine": "", "cpu_model": "", "cpu_features": (), "vcpus": 1, "vcpus_max": 1, "memory_mib": 96, "memory_max_mib": 96,
        "firmware": Firmware.BIOS, "has_secure_boot": False, "image_id": None, "seed": {}, "host_selector": {}, "host_class": "",
        "ha": "none", "priority": 0, "desired_power": DesiredPower.RUNNING, "host_id": "h", "epoch": 1,
        "observed_state": ObservedState.RUNNING, "observed_reason": "", "observed_host_id": "h", "observed_at": NOW,
        "observed_addresses": (), "problem": "", "version": 1, "created_at": NOW, "deleted_at": None, "purge_after": None,
    }  # fmt: skip
    return Vm(**(fields | changes))


def test_a_vm_as_wished_and_one_that_is_unknown_are_left_alone() -> None:
    assert judge(a_vm(), host_name="node1", has_space=True) is None
    assert judge(a_vm(observed_state=ObservedState.UNKNOWN), host_name="node1", has_space=True) is None
    gone = a_vm(desired_power=DesiredPower.DELETED, observed_state=ObservedState.ABSENT)
    assert judge(gone, host_name="node1", has_space=True) is None
    stopped = a_vm(desired_power=DesiredPower.STOPPED, observed_state=ObservedState.STOPPED)
    assert judge(stopped, host_name="node1", has_space=True) is None


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("destroyed", "destroyed on node1 from outside"),
        ("guest_shutdown", "shut itself down"),
        ("crashed", "crashed on node1"),
        ("host_booted", "restarted"),
        ("", "vanished from node1"),
    ],
)
def test_a_guest_that_is_gone_is_told_apart_by_reason_and_never_restarted(reason: str, says: str) -> None:
    finding = judge(a_vm(observed_state=ObservedState.STOPPED, observed_reason=reason), host_name="node1", has_space=True)
    assert finding is not None
    assert says in finding.problem
    assert "trimtab vm start web1" in finding.problem
    assert finding.cure is Cure.NONE


def test_a_guest_paused_by_an_io_error_while_it_runs_on_its_backup_is_told_so_unless_its_pool_is_full() -> None:
    paused = a_vm(observed_state=ObservedState.PAUSED, observed_reason="io_error")
    waits = judge(paused, host_name="node1", has_space=True, is_filling=True)
    full = judge(paused, host_name="node1", has_space=False, is_filling=True)
    assert waits is not None
    assert full is not None
    assert ("nothing serves the backup" in waits.problem, waits.cure) == (True, Cure.RESUME)
    assert ("its pool is full" in full.problem, full.cure) == (True, Cure.NONE)


def test_a_guest_paused_by_an_io_error_is_resumed_only_when_its_pool_has_room() -> None:
    paused = a_vm(observed_state=ObservedState.PAUSED, observed_reason="io_error")
    full = judge(paused, host_name="node1", has_space=False)
    roomy = judge(paused, host_name="node1", has_space=True)
    assert full is not None
    assert full.cure is Cure.NONE
    assert roomy is not None
    assert roomy.cure is Cure.RESUME


def test_a_guest_paused_by_hand_and_one_that_runs_against_the_wish_are_shown() -> None:
    paused = judge(a_vm(observed_state=ObservedState.PAUSED), host_name="node1", has_space=True)
    assert paused is not None
    assert "trimtab vm resume web1" in paused.problem
    running = judge(a_vm(desired_power=DesiredPower.STOPPED), host_name="node1", has_space=True)
    assert running is not None
    assert "should be stopped" in running.problem


def test_a_guest_on_its_way_down_is_not_yet_drift() -> None:
    assert judge(a_vm(observed_state=ObservedState.STOPPING), host_name="node1", has_space=True) is None
