"""Decisions about live migration: what stands against it, and where the guest is afterwards. Pure."""

from enum import StrEnum

from trimtab_controller.core import cpu_features, qemu_series
from trimtab_protos.messages import DomainObservation, DomainSpec, DomainState, Firmware, Inventory, NetworkKind, StateReason

# Holding the guest's memory and able to run it.
_HAS_GUEST = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING})
# What an agent knows that can copy a disk whole while it moves the guest.
FLAT = "migrate-flat"
_HAS_NOTHING = frozenset({DomainState.ABSENT, DomainState.STOPPED, DomainState.CRASHED})


class Outcome(StrEnum):
    ON_SOURCE = "on_source"
    ON_TARGET = "on_target"
    NOWHERE = "nowhere"
    # A post-copy failed for good: parts of its memory are on either side, and neither can ever run it again.
    TORN = "torn"
    # In flight, or one side holds it in a way that may still change: look again.
    UNSETTLED = "unsettled"


def outcome(*, source: DomainObservation, target: DomainObservation) -> Outcome:
    """Return where the guest is, from what both hosts say now.

    A paused guest on the source beside a running one on the target is the moment of the switch: unsettled. A source that says that its
    guest has left has sent all of its memory, also where the target's libvirt lost sight of it on the way.
    """
    has_left = source.reason is StateReason.MIGRATED and source.state in _HAS_NOTHING
    if not has_left and any(seen.reason is StateReason.POSTCOPY_FAILED and seen.state in _HAS_GUEST for seen in (source, target)):
        return Outcome.TORN
    if source.is_migrating or target.is_migrating or target.state is DomainState.INCOMING:
        return Outcome.UNSETTLED
    if target.state in _HAS_GUEST and source.state in _HAS_NOTHING:
        return Outcome.ON_TARGET
    if source.state in _HAS_GUEST and target.state in _HAS_NOTHING:
        return Outcome.ON_SOURCE
    if source.state in _HAS_NOTHING and target.state in _HAS_NOTHING:
        return Outcome.NOWHERE
    return Outcome.UNSETTLED


def refusals(
    domain: DomainSpec,
    *,
    source: Inventory,
    target: Inventory,
    source_seen: DomainObservation,
    target_seen: DomainObservation,
    guest_qemu: qemu_series.Series = (),
    is_flattened: bool = False,
) -> tuple[str, ...]:
    """Return every reason why this guest cannot be moved live from source to target; empty: it can.

    `guest_qemu`: what it runs on; `is_flattened`: its disks are copied whole, with what they lie over.
    """
    found = []
    if source_seen.state is not DomainState.RUNNING:
        found.append(f"the guest is {source_seen.state.value} on {source.hostname}; only a running one is migrated")
    if target_seen.state is not DomainState.ABSENT and target_seen.epoch > source_seen.epoch:
        found.append(f"{target.hostname} holds a newer domain of this vm")
    if target_seen.state in _HAS_GUEST:
        found.append(f"{target.hostname} already runs a domain of this vm")
    if domain.arch != target.arch:
        found.append(f"{target.hostname} is {target.arch}, the guest {domain.arch}")
    if source.accelerator != target.accelerator:
        found.append(f"{source.hostname} runs guests under {source.accelerator}, {target.hostname} under {target.accelerator}")
    if domain.cpu_model not in target.usable_cpu_models:
        found.append(f"{target.hostname} cannot run CPU model {domain.cpu_model}")
    missing = cpu_features.missing(cpu_features.of_running(domain.cpu_features, source.cpu_features), target.cpu_features)
    if missing:
        found.append(f"{target.hostname} lacks CPU features {', '.join(missing)}")
    if domain.machine not in target.machines:
        found.append(f"{target.hostname} has no machine type {domain.machine}; its QEMU is {target.qemu_version}")
    would_run = qemu_series.installed(target)
    if qemu_series.is_older(would_run, guest_qemu):
        older = (
            f"{target.hostname} has QEMU {qemu_series.as_text(would_run)}, the guest runs on {qemu_series.as_text(guest_qemu)}"
        )
        found.append(f"{older}; an older one may not take its state")
    if domain.firmware is Firmware.UEFI and not target.has_uefi:
        found.append(f"{target.hostname} has no UEFI firmware")
    if domain.has_tpm and "tpm" not in target.capabilities:
        found.append(f"{target.hostname} has no software TPM")
    if is_flattened and FLAT not in source.capabilities:
        found.append(f"the agent of {source.hostname} copies top layers only, and the guest's disks lie over others; update it")
    found.extend(_network_refusals(domain, target))
    return tuple(found)


def _network_refusals(domain: DomainSpec, target: Inventory) -> list[str]:
    bridges = {bridge.name: bridge for bridge in target.bridges}
    found = []
    for network in domain.networks:
        if network.kind is not NetworkKind.BRIDGE:
            continue
        bridge = bridges.get(network.bridge)
        if bridge is None:
            found.append(f"{target.hostname} has no bridge {network.bridge} for network {network.name}")
        elif bridge.mtu < network.mtu:
            found.append(
                f"bridge {network.bridge} on {target.hostname} has MTU {bridge.mtu}, network {network.name} needs {network.mtu}"
            )
    return found
