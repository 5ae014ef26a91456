"""How a host is shown to people."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trimtab_controller.cli import humanise, render
from trimtab_controller.cli.render import Column, Document

# Certificates renew at half life, by themselves. One that has only this part of its life left was not, however often it was tried.
_UNRENEWED_SHARE = 0.4


def _state(item: Document, _now: datetime) -> str:
    connectivity = str(item.get("connectivity") or "unknown")
    if item.get("maintenance"):
        return f"{connectivity}, in maintenance"
    return f"{connectivity}, cordoned" if item.get("is_cordoned") else connectivity


def _maintenance(item: Document, moment: datetime) -> str:
    """Return who holds it and since when; '' where nobody does."""
    held = item.get("maintenance") or {}
    tour = f", {held['plan']}" if held.get("plan") else ""
    return f"held by {held.get('by')} since {humanise.since(held.get('since'), moment)}{tour}" if held else ""


def _troubles(item: Document, now: datetime) -> str:
    return "; ".join(_trouble(one, now) for one in item.get("troubles") or [])


def _trouble(one: Mapping[str, Any], now: datetime) -> str:
    """Say `network-degraded: bridge br0 has lost its carrier since 14:02 UTC`; of another day with its date."""
    since = humanise.instant(one.get("since"))
    form = "" if since is None else " since %H:%M UTC" if since.date() == now.date() else " since %Y-%m-%d %H:%M UTC"
    kind = str(one.get("kind", "")).replace("storage-lost", "storage lost")
    return f"{kind}: {one.get('message', '')}" + (since.strftime(form) if since is not None else "")


def _heard(item: Document, now: datetime) -> str:
    age_s = item.get("heard_age_s")
    if age_s is not None:
        return humanise.ago(float(age_s))
    return humanise.since(item.get("heard_at"), now) or "unknown"


def _vms(item: Document, _now: datetime) -> str:
    return f"{item['vms_running']}/{item['vms']}" if item.get("vms_running") is not None else render.as_text(item.get("vms"))


def _vcpus(item: Document, _now: datetime) -> str:
    use = item.get("vcpus") or {}
    return f"{_taken(use)}/{use.get('limit', 0)}"


def _memory(item: Document, _now: datetime) -> str:
    use = item.get("memory_mib") or {}
    return f"{humanise.mib(_taken(use))} of {humanise.mib(use.get('limit', 0))}"


def _taken(use: Mapping[str, Any]) -> int:
    return int(use.get("claimed") or 0) + int(use.get("unmanaged") or 0)


COLUMNS = (
    Column("name", "name"),
    Column("state", "connectivity", _state),
    Column("heard", "heard_at", _heard),
    Column("class", "host_class"),
    Column("vms", "vms", _vms),
    Column("vcpus", "vcpus.claimed", _vcpus),
    Column("memory", "memory_mib.claimed", _memory),
    Column("accel", "inventory.accelerator"),
    Column("problem", "troubles", _troubles),
    Column("id", "id", is_wide=True),
    Column("address", "agent_address", is_wide=True),
    Column("cpu", "inventory.cpu_model", is_wide=True),
    Column("agent", "inventory.agent_version", is_wide=True),
    Column("libvirt", "inventory.libvirt_version", is_wide=True),
    Column("qemu", "inventory.qemu_version", is_wide=True),
    Column("labels", "labels"),
)


def describe(item: Document) -> None:
    """Print a host: what it is, how full, how well known, what it can do."""
    moment = render.now()
    inventory: Mapping[str, Any] = item.get("inventory") or {}
    render.pairs(
        [
            ("name", str(item.get("name", ""))),
            ("id", str(item.get("id", ""))),
            ("state", f"{_state(item, moment)} since {humanise.since(item.get('connectivity_at'), moment) or 'unknown'}"),
            ("maintenance", _maintenance(item, moment)),
            *(("problem", humanise.plain(_trouble(one, moment))) for one in item.get("troubles") or []),
            ("heard of", _heard(item, moment)),
            ("class", str(item.get("host_class", ""))),
            ("labels", render.as_text(item.get("labels"))),
            ("boot id", str(item.get("boot_id") or "")),
            ("agent", str(item.get("agent_address", ""))),
            ("migration", str(item.get("migration_address", ""))),
            ("vms", f"{item.get('vms', 0)} ({item.get('vms_running', 0)} running)"),
            ("version", f"{item.get('version', '')} (etag {item.get('etag', '')})"),
            ("joined", f"{item.get('created_at', '')} ({humanise.since(item.get('created_at'), moment)})"),
        ]
    )
    render.heading("capacity")
    uses = (("vcpus", item.get("vcpus") or {}, str), ("memory", item.get("memory_mib") or {}, humanise.mib))
    render.pairs([(title, _use(use, show)) for title, use, show in uses], indent="  ")
    _protection(item.get("protection") or {}, moment)
    _certificates(item.get("certificates") or [], moment)
    _pools(item.get("pools") or [], moment)
    _capabilities(inventory, item, moment)


def _use(use: Mapping[str, Any], show: Any) -> str:
    limit, taken = use.get("limit") or 0, _taken(use)
    unmanaged = use.get("unmanaged") or 0
    more = f", of it {show(unmanaged)} unmanaged" if unmanaged else ""
    return f"{humanise.bar(taken, limit)}  {show(taken)} of {show(limit)} used, {show(use.get('free') or 0)} free{more}"


def _protection(protection: Mapping[str, Any], moment: datetime) -> None:
    """Print what would prove the host off, should it fall silent, and whom its warden would end."""
    if not protection:
        return
    render.heading("protection")
    armed = "armed" if protection.get("is_warden_armed") else "NOT ARMED: only power off or an operator proves this host off"
    kill_s, rate_ppm = protection.get("kill_s"), protection.get("clock_rate_ppm")
    rate = f", its clock is {rate_ppm:+d} ppm off" if rate_ppm else ""
    victims = ", ".join(protection.get("would_kill") or []) or "no vm"
    missing = ", ".join(protection.get("warden_missing") or [])
    render.pairs(
        [
            ("lease", f"number {protection.get('lease_number', 0)}, renewed {humanise.ago(protection.get('lease_age_s'))}"),
            ("warden", armed + (f" ({missing})" if missing else "") + (f", kills within {kill_s:g} s{rate}" if kill_s else "")),
            ("would kill", victims),
            ("beacon", _beacon(protection)),
        ],
        indent="  ",
    )
    rows = [
        [
            str(one.get("order", "")),
            str(one.get("name", "")),
            str(one.get("agent", "")),
            str(one.get("power") or "unknown"),
            "ready" if one.get("is_ready") else "NOT READY",
            humanise.since(one.get("tested_at"), moment) or "never",
            humanise.plain(one.get("message") or ""),
        ]
        for one in protection.get("fence_paths") or []
    ]
    if rows:
        render.table(["ORDER", "DEVICE", "AGENT", "POWER", "STATE", "TESTED", "MESSAGE"], rows)


def _beacon(protection: Mapping[str, Any]) -> str:
    pool, problem = protection.get("beacon_pool"), humanise.plain(protection.get("beacon_problem") or "")
    if not pool:
        return (
            f"none: {problem}"
            if problem
            else "none: away for longer than a lease, the controllers end what the warden would kill"
        )
    age_s, intent = protection.get("beacon_age_s"), protection.get("fence_intent")
    said = f"in pool {pool}, " + ("not renewed yet" if age_s is None else f"renewed {humanise.ago(age_s)}")
    if intent:
        said += f"; leases up to {intent['lease_number']} are forbidden" + (
            "" if intent.get("written_at") else ", not durably yet"
        )
    return said + (f" ({problem})" if problem else "")


def _certificates(certificates: Sequence[Mapping[str, Any]], moment: datetime) -> None:
    if not certificates:
        return
    render.heading("certificates")
    rows = []
    for one in certificates:
        ends = humanise.instant(one.get("not_after"))
        left_s = (ends - moment).total_seconds() if ends else None
        if left_s is None:
            state = "unknown"
        elif left_s < 0:
            state = f"EXPIRED {humanise.ago(-left_s)}"
        else:
            state = f"expires in {humanise.duration(left_s)}" + (" (not renewed?)" if _is_overdue(one, left_s) else "")
        rows.append([str(one.get("purpose", "")), state, str(one.get("not_after", "")), str(one.get("serial", ""))])
    render.table(["PURPOSE", "STATE", "NOT AFTER", "SERIAL"], rows)


def _is_overdue(certificate: Mapping[str, Any], left_s: float) -> bool:
    issued, ends = humanise.instant(certificate.get("issued_at")), humanise.instant(certificate.get("not_after"))
    return issued is not None and ends is not None and left_s < _UNRENEWED_SHARE * (ends - issued).total_seconds()


def _pools(pools: Sequence[Mapping[str, Any]], moment: datetime) -> None:
    if not pools:
        return
    render.heading("pools")
    rows = [
        [
            str(one.get("pool", "")),
            str(one.get("state") or "unknown"),
            humanise.since(one.get("observed_at"), moment) or "never",
            humanise.plain(one.get("problem") or ""),
        ]
        for one in pools
    ]
    render.table(["POOL", "STATE", "OBSERVED", "PROBLEM"], rows)


def _capabilities(inventory: Mapping[str, Any], item: Document, moment: datetime) -> None:
    render.heading("capabilities")
    if not inventory:
        render.write_line("  unknown: the host has sent no inventory yet")
        return
    bridges = [
        f"{one.get('name')} (mtu {one.get('mtu')}{'' if one.get('has_carrier') else ', no carrier'}{', ours' if one.get('is_ours') else ''}"
        f"{', Open vSwitch' if one.get('is_open_vswitch') else ''})"
        for one in inventory.get("bridges") or []
    ]
    cells = inventory.get("numa_cells") or []
    entries = [
        ("acceleration", str(inventory.get("accelerator") or "unknown")),
        ("cpu", f"{inventory.get('cpus', '?')} × {inventory.get('cpu_vendor', '')} {inventory.get('cpu_model', '')}".rstrip()),
        ("memory", humanise.mib(inventory.get("memory_mib"))),
        ("numa", f"{len(cells)} cells" if len(cells) > 1 else ""),
        ("firmware", "bios, uefi" if inventory.get("has_uefi") else "bios"),
        ("machines", render.as_text(inventory.get("machines"))),
        ("cpu models", render.as_text(inventory.get("usable_cpu_models"))),
        ("capabilities", render.as_text(inventory.get("capabilities"))),
        ("bridges", ", ".join(bridges)),
        ("pci devices", str(len(inventory.get("pci_devices") or [])) if inventory.get("pci_devices") else ""),
        ("arch", str(inventory.get("arch") or "")),
        ("kernel", str(inventory.get("kernel") or "")),
        ("versions", _versions(inventory)),
        ("qemu", _qemus(inventory)),
        ("observed", humanise.since(item.get("inventory_at"), moment) or "unknown"),
    ]
    render.pairs([(key, humanise.plain(value)) for key, value in entries], indent="  ")


def _qemus(inventory: Mapping[str, Any]) -> str:
    """Say which QEMU is installed where guests run another; '' where none does."""
    others = inventory.get("guest_qemus") or {}
    if not others:
        return ""
    builds = ", ".join(sorted({str(one) or "unknown" for one in others.values()}))
    return f"{inventory.get('qemu_build')} is installed; guests with another until they move or stop: {len(others)} ({builds})"


def _versions(inventory: Mapping[str, Any]) -> str:
    names = ("agent", "libvirt", "qemu")
    return ", ".join(f"{name} {inventory[f'{name}_version']}" for name in names if inventory.get(f"{name}_version"))
