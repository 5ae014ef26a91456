"""Hosts that are silent, closed, crowded by what is not ours, or behind the others."""

from dataclasses import replace

from trimtab_controller.core.doctor.model import Finding, FleetFacts, HostFacts, Severity
from trimtab_controller.core.host_troubles import TroubleKind

_SILENT = {
    "suspect": (Severity.WARNING, "host-suspect", "is not heard from"),
    "lost": (Severity.CRITICAL, "host-lost", "is lost: its vms are restarted elsewhere only once it is fenced"),
    "fenced": (Severity.CRITICAL, "host-fenced", "is fenced and has not come back"),
    "new": (Severity.NOTICE, "host-never-connected", "has joined and never connected"),
}


def silent(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    for host in fleet.hosts:
        if host.connectivity not in _SILENT:
            continue
        severity, kind, words = _SILENT[host.connectivity]
        since = f"since {host.connectivity_at:%Y-%m-%d %H:%M} UTC"
        finding = _finding(host, severity, kind, f"{words} ({since})", f"trimtab host get {host.name}")
        found.append(replace(finding, since=host.connectivity_at))
    return tuple(found)


_NAMED = 5
_LACKS = {
    TroubleKind.NETWORK: (Severity.WARNING, "is network-degraded", "its guests run on, new ones that need it go elsewhere"),
    TroubleKind.STORAGE: (
        Severity.CRITICAL,
        "has lost its storage",
        "it answers another host; new guests that need it go elsewhere",
    ),
}


def troubled(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Hosts that live and lack what their guests need."""
    found = []
    for host in fleet.hosts:
        for one in host.troubles:
            severity, words, effect = _LACKS[one.kind]
            since = f" since {one.since:%Y-%m-%d %H:%M} UTC" if one.since else ""
            message = f"{words}: {one.message}{since}; {effect}"
            finding = _finding(host, severity, one.kind.value, message, f"trimtab host get {host.name}")
            found.append(replace(finding, since=one.since))
    return tuple(found)


def cordoned(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Maintenance is meant; a cordon alone is easily forgotten."""
    return tuple(
        _finding(host, Severity.NOTICE, "host-cordoned", "takes no vms: it is cordoned", f"trimtab host uncordon {host.name}")
        for host in fleet.hosts
        if host.is_cordoned and not host.is_in_maintenance
    )


def crowded(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Domains that are not ours take memory that was promised to vms."""
    found = []
    for host in fleet.hosts:
        over_mib = host.memory_claimed_mib + host.unmanaged_memory_mib - host.memory_limit_mib
        if host.unmanaged_memory_mib and over_mib > 0:
            words = (
                f"domains that are not Trimtab's use {host.unmanaged_memory_mib} MiB, {over_mib} MiB more than is left by its vms"
            )
            found.append(_finding(host, Severity.WARNING, "unmanaged-memory", words, f"trimtab host drain {host.name} --plan"))
    return tuple(found)


def shared(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Domains that are not ours have more than the reserve: not yet of what vms were promised, but of what they could be."""
    return tuple(
        _finding(
            host,
            Severity.NOTICE,
            "unmanaged-above-reserve",
            f"domains that are not Trimtab's use {host.unmanaged_memory_mib} MiB, more than the reserve of "
            f"{host.memory_reserve_mib} MiB: so much fewer vms fit",
            f"trimtab host get {host.name}",
        )
        for host in fleet.hosts
        if host.memory_reserve_mib is not None
        and host.unmanaged_memory_mib > host.memory_reserve_mib
        and host.memory_claimed_mib + host.unmanaged_memory_mib <= host.memory_limit_mib
    )


def older_qemu(fleet: FleetFacts) -> tuple[Finding, ...]:
    """A guest moves to a newer QEMU and not always back."""
    newest = max((_version(host.qemu_version) for host in fleet.hosts), default=())
    return tuple(
        _finding(
            host,
            Severity.NOTICE,
            "qemu-older",
            f"runs QEMU {host.qemu_version}, others {'.'.join(map(str, newest))}; its guests keep theirs until they move or stop",
            f"trimtab host drain {host.name} --plan",
        )
        for host in fleet.hosts
        if host.qemu_version and _version(host.qemu_version) < newest
    )


def guests_on_other_qemu(fleet: FleetFacts) -> tuple[Finding, ...]:
    """An upgrade of QEMU's package reaches a guest with its next move or stop: what it mended may not hold for those."""
    found = []
    for host in fleet.hosts:
        if not host.guest_qemus:
            continue
        told = [f"{name} ({build or 'unknown'})" for name, build in host.guest_qemus]
        listed = ", ".join(told[:_NAMED]) + (f" and {len(told) - _NAMED} more" if len(told) > _NAMED else "")
        words = (
            f"has QEMU {host.qemu_build} installed, and these guests run another: {listed}; they keep it until they move or stop"
        )
        found.append(_finding(host, Severity.NOTICE, "guest-qemu-other", words, f"trimtab host drain {host.name} --plan"))
    return tuple(found)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _finding(host: HostFacts, severity: Severity, kind: str, words: str, cure: str) -> Finding:
    return Finding(severity=severity, kind=kind, subject=f"host {host.name}", message=words, cure=cure)
