"""Which volumes still read from a backup: their own headers say so, whoever asks."""

from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from trimtab_agent.hypervisor.kvm import volumes
from trimtab_agent.hypervisor.kvm.domain_xml import Export
from trimtab_agent.hypervisor.kvm.pool_layout import VOLUMES, PoolLayout, regular_file, volume_name
from trimtab_protos.messages import DiskFormat, DomainSpec


def exports_of(domain: DomainSpec) -> Mapping[str, Export]:
    """Return volume → what it still reads from, of those of the vm's disks that do not stand alone."""
    layouts = PoolLayout.of_files(domain.pools)
    found = {}
    for disk in domain.disks:
        layout = layouts.get(disk.pool_id)
        export = export_of(disk.volume_id, layout) if layout is not None and not disk.layer_id else None
        if export is not None:
            found[disk.volume_id] = export
    return found


def export_of(volume_id: str, layout: PoolLayout) -> Export | None:
    """Return what the volume's header says that it still reads from; None where it stands alone."""
    name = volume_name(volume_id, DiskFormat.QCOW2)
    with layout.open(VOLUMES) as directory:
        if regular_file(directory, name) is None:
            return None
        return parse_export(volumes.backing_file(directory, name))


def parse_export(backing: str) -> Export | None:
    parts = urlsplit(backing)
    socket = parse_qs(parts.query).get("socket", [""])[0]
    return Export(name=parts.path.lstrip("/"), socket=socket) if parts.scheme == "nbd+unix" and socket else None
