"""libvirt's states and reasons in our words. The table is the whole of it."""

import libvirt

from trimtab_protos.messages import DomainState, StateReason

_STOPPED_REASONS = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: StateReason.GUEST_SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: StateReason.DESTROYED,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: StateReason.CRASHED,
    libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: StateReason.MIGRATED,
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: StateReason.FAILED,
    # libvirt stopped it because it could not find its QEMU again after its own restart.
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: StateReason.FAILED,
}
_PAUSED_REASONS = {
    libvirt.VIR_DOMAIN_PAUSED_USER: StateReason.USER_PAUSED,
    libvirt.VIR_DOMAIN_PAUSED_IOERROR: StateReason.IO_ERROR,
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED: StateReason.POSTCOPY_FAILED,
    libvirt.VIR_DOMAIN_PAUSED_CRASHED: StateReason.CRASHED,
}


def translate(state: int, reason: int, *, was_started_in_other_boot: bool, is_incoming: bool) -> tuple[DomainState, StateReason]:
    """Return our state and reason.

    `was_started_in_other_boot`: its metadata says that it ran when the host went down; libvirt itself forgets that.
    `is_incoming`: libvirt runs the receiving half of a migration for it.
    """
    if is_incoming:
        return DomainState.INCOMING, StateReason.NONE
    match state:
        case libvirt.VIR_DOMAIN_RUNNING | libvirt.VIR_DOMAIN_BLOCKED:
            if reason == libvirt.VIR_DOMAIN_RUNNING_POSTCOPY_FAILED:
                return DomainState.RUNNING, StateReason.POSTCOPY_FAILED
            return DomainState.RUNNING, StateReason.NONE
        case libvirt.VIR_DOMAIN_PAUSED | libvirt.VIR_DOMAIN_PMSUSPENDED:
            return DomainState.PAUSED, _PAUSED_REASONS.get(reason, StateReason.NONE)
        case libvirt.VIR_DOMAIN_SHUTDOWN:
            return DomainState.STOPPING, StateReason.NONE
        case libvirt.VIR_DOMAIN_SHUTOFF if reason == libvirt.VIR_DOMAIN_SHUTOFF_CRASHED:
            return DomainState.CRASHED, StateReason.CRASHED
        case libvirt.VIR_DOMAIN_SHUTOFF if reason == libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN and was_started_in_other_boot:
            return DomainState.STOPPED, StateReason.HOST_BOOTED
        case libvirt.VIR_DOMAIN_SHUTOFF:
            return DomainState.STOPPED, _STOPPED_REASONS.get(reason, StateReason.NONE)
        case libvirt.VIR_DOMAIN_CRASHED:
            return DomainState.CRASHED, StateReason.CRASHED
        case _:
            return DomainState.PAUSED, StateReason.NONE
