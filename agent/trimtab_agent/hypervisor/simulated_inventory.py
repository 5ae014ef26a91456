"""What a simulated host tells of itself."""

import uuid
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor import simulated_adoption
from trimtab_agent.hypervisor.simulation import CAPABILITIES
from trimtab_agent.version import agent_version
from trimtab_protos.messages import GuestQemu, Inventory, NumaCell

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor


def read(of: "SimulatedHypervisor", *, only_fitness: bool) -> Inventory:
    host, unmanaged = of.host, () if only_fitness else simulated_adoption.unmanaged(of)
    older_qemus = () if only_fitness else sorted(of.older_qemus.items())
    return Inventory(
        hostname=host.hostname or host.host_id,
        arch=host.arch,
        machine_id=uuid.uuid5(uuid.NAMESPACE_OID, host.host_id).hex,
        smbios_uuid=str(uuid.uuid5(uuid.NAMESPACE_DNS, host.host_id)),
        boot_id=of.boot_id,
        kernel="6.1.0-simulated",
        agent_version=agent_version(),
        libvirt_version="9.0.0",
        qemu_version=host.qemu_version,
        accelerator=host.accelerator,
        cpu_vendor="Intel",
        cpu_model=host.cpu_model,
        cpus=host.cpus,
        memory_mib=host.memory_mib,
        cpu_features=host.cpu_features,
        usable_cpu_models=host.usable_cpu_models,
        machines=host.machines,
        numa_cells=(NumaCell(index=0, memory_mib=host.memory_mib, cpus=tuple(range(host.cpus))),),
        bridges=of.look_at_bridges(host.bridges),
        capabilities=tuple(one for one in CAPABILITIES if one not in host.lacks),
        unmanaged_vcpus=sum(domain.vcpus for domain in unmanaged),
        unmanaged_memory_mib=sum(domain.memory_mib for domain in unmanaged),
        unmanaged_disk_bytes=sum(domain.disk_bytes for domain in unmanaged),
        unmanaged_macs=tuple(mac for domain in unmanaged for mac in domain.macs),
        has_uefi=host.has_uefi,
        migration_address=host.migration_address,
        overlay_chassis=host.overlay_chassis,
        qemu_build="" if only_fitness else host.qemu_version,
        guest_qemus=tuple(GuestQemu(vm_id=vm_id, build=build) for vm_id, build in older_qemus),
    )
