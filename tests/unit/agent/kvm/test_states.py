"""What libvirt's states and reasons mean to the controller."""

import libvirt
import pytest

from trimtab_agent.hypervisor.kvm.states import translate
from trimtab_protos.messages import DomainState, StateReason


@pytest.mark.parametrize(
    ("state", "reason", "seen"),
    [
        (libvirt.VIR_DOMAIN_RUNNING, 1, (DomainState.RUNNING, StateReason.NONE)),
        (
            libvirt.VIR_DOMAIN_RUNNING,
            libvirt.VIR_DOMAIN_RUNNING_POSTCOPY_FAILED,
            (DomainState.RUNNING, StateReason.POSTCOPY_FAILED),
        ),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER, (DomainState.PAUSED, StateReason.USER_PAUSED)),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR, (DomainState.PAUSED, StateReason.IO_ERROR)),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED, (DomainState.PAUSED, StateReason.POSTCOPY_FAILED)),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, (DomainState.PAUSED, StateReason.NONE)),
        (libvirt.VIR_DOMAIN_SHUTDOWN, 0, (DomainState.STOPPING, StateReason.NONE)),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, (DomainState.STOPPED, StateReason.GUEST_SHUTDOWN)),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED, (DomainState.STOPPED, StateReason.DESTROYED)),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, (DomainState.CRASHED, StateReason.CRASHED)),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED, (DomainState.STOPPED, StateReason.MIGRATED)),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_FAILED, (DomainState.STOPPED, StateReason.FAILED)),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN, (DomainState.STOPPED, StateReason.NONE)),
        (libvirt.VIR_DOMAIN_CRASHED, 1, (DomainState.CRASHED, StateReason.CRASHED)),
    ],
)
def test_each_state_is_told_with_its_reason(state: int, reason: int, seen: tuple[DomainState, StateReason]) -> None:
    assert translate(state, reason, was_started_in_other_boot=False, is_incoming=False) == seen


def test_a_domain_that_ran_when_the_host_went_down_says_so() -> None:
    seen = translate(libvirt.VIR_DOMAIN_SHUTOFF, 0, was_started_in_other_boot=True, is_incoming=False)
    assert seen == (DomainState.STOPPED, StateReason.HOST_BOOTED)
    destroyed = libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED
    stopped = translate(libvirt.VIR_DOMAIN_SHUTOFF, destroyed, was_started_in_other_boot=True, is_incoming=False)
    assert stopped == (DomainState.STOPPED, StateReason.DESTROYED)


def test_the_receiving_half_of_a_migration_is_no_paused_guest() -> None:
    seen = translate(
        libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, was_started_in_other_boot=False, is_incoming=True
    )
    assert seen == (DomainState.INCOMING, StateReason.NONE)
