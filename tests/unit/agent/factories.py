"""Valid keys, specs and certificates for the agent's tests; show in a test only what it is about."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab_agent.certificates import new_agent_request
from trimtab_controller.pki import SigningAuthority, new_authority
from trimtab_protos.messages import (
    CommandKey,
    DiskFormat,
    DiskSpec,
    DomainSpec,
    NetworkKind,
    NetworkSpec,
    NicSpec,
    PoolSpec,
    VolumeSpec,
)
from trimtab_protos.tls import Credentials

SHARED = PoolSpec(pool_id="pool-shared", path="/srv/shared", name="shared", is_shared=True)
LOCAL = PoolSpec(pool_id="pool-local", path="/srv/local", name="local")
NETWORK = NetworkSpec(network_id="net-1", kind=NetworkKind.NAT, name="default", subnet="192.0.2.0/24", has_dhcp=True)

_count = itertools.count(1)


def command_key(**given: Any) -> CommandKey:
    """A key of a command on vm-1 that no other test used."""
    fields: dict[str, Any] = {
        "operation_id": f"op-{next(_count)}",
        "step": "define",
        "subject_id": "vm-1",
        "turn": 1,
        "epoch": 1,
        "lease_number": 1,
    }
    return CommandKey(**{**fields, **given})


def volume_spec(volume_id: str = "vol-1", **given: Any) -> VolumeSpec:
    spec = VolumeSpec(volume_id=volume_id, pool_id=SHARED.pool_id, format=DiskFormat.QCOW2, size_bytes=64 << 20)
    return replace(spec, **given)


def domain_spec(vm_id: str = "vm-1", *, pool: PoolSpec = SHARED, volume_id: str = "vol-1", **given: Any) -> DomainSpec:
    number = sum(vm_id.encode()) % 250
    spec = DomainSpec(
        vm_id=vm_id,
        uuid=f"00000000-0000-4000-8000-{number:012d}",
        name=vm_id,
        project="default",
        machine="pc-q35-7.2",
        cpu_model="qemu64",
        vcpus=1,
        vcpus_max=2,
        memory_mib=96,
        memory_max_mib=192,
        disks=(DiskSpec(volume_id=volume_id, pool_id=pool.pool_id, format=DiskFormat.QCOW2, index=0, boot_order=1),),
        nics=(NicSpec(nic_id="nic-1", network_id="net-1", mac=f"52:54:00:00:00:{number:02x}", index=0),),
        networks=(NETWORK,),
        pools=(pool,),
    )
    return replace(spec, **given)


def new_fleet_authority() -> SigningAuthority:
    return new_authority(now=datetime.now(UTC))


def host_credentials(authority: SigningAuthority, host_id: str, *, life: timedelta = timedelta(hours=1)) -> Credentials:
    """Credentials as a join gives them; `trimtab-controller` as the id gives the controller's."""
    request = new_agent_request()
    issued = authority.sign_agent(request.csr_pem, host_id, now=datetime.now(UTC), life=life)
    return Credentials(ca_pem(authority), issued.pem.encode(), request.key_pem)


def ca_pem(authority: SigningAuthority) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return authority.certificate.public_bytes(Encoding.PEM)
