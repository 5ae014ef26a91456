"""Hosts that are silent, closed, crowded by what is not ours, or behind the others."""

from dataclasses import replace

from trimtab_controller.core.doctor.model import Finding, FleetFacts, HostFacts, Severity

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


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _finding(host: HostFacts, severity: Severity, kind: str, words: str, cure: str) -> Finding:
    return Finding(severity=severity, kind=kind, subject=f"host {host.name}", message=words, cure=cure)
