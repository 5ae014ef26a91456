"""What a simulated host tells of itself."""

import uuid
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor import simulated_adoption
from trimtab_agent.hypervisor.simulation import CAPABILITIES
from trimtab_agent.version import agent_version
from trimtab_protos.messages import Inventory, NumaCell

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor


def read(of: "SimulatedHypervisor") -> Inventory:
    host, unmanaged = of.host, simulated_adoption.unmanaged(of)
    return Inventory(
        hostname=host.hostname or host.host_id,
        arch=host.arch,
        machine_id=uuid.uuid5(uuid.NAMESPACE_OID, host.host_id).hex,
        smbios_uuid=str(uuid.uuid5(uuid.NAMESPACE_DNS, host.host_id)),
        boot_id=of.boot_id,
        kernel="6.1.0-simulated",
        agent_version=agent_version(),
        libvirt_version="9.0.0",
        qemu_version="7.2.0",
        accelerator=host.accelerator,
        cpu_vendor="Intel",
        cpu_model=host.cpu_model,
        cpus=host.cpus,
        memory_mib=host.memory_mib,
        usable_cpu_models=host.usable_cpu_models,
        machines=host.machines,
        numa_cells=(NumaCell(index=0, memory_mib=host.memory_mib, cpus=tuple(range(host.cpus))),),
        bridges=host.bridges,
        capabilities=CAPABILITIES,
        unmanaged_vcpus=sum(domain.vcpus for domain in unmanaged),
        unmanaged_memory_mib=sum(domain.memory_mib for domain in unmanaged),
        unmanaged_disk_bytes=sum(domain.disk_bytes for domain in unmanaged),
        unmanaged_macs=tuple(mac for domain in unmanaged for mac in domain.macs),
        has_uefi=host.has_uefi,
        migration_address=host.migration_address,
        overlay_chassis=host.overlay_chassis,
    )
