"""The dataclasses of `messages.py` and the protobuf messages say the same thing."""

import dataclasses

import pytest

from trimtab_protos import (
    adoption_messages,
    backup_messages,
    device_messages,
    image_messages,
    messages,
    network_messages,
    pool_messages,
    volume_messages,
)
from trimtab_protos.agent.v1 import (
    adoption_service_pb2,
    agent_service_pb2,
    backup_pb2,
    command_pb2,
    domain_pb2,
    inventory_pb2,
    network_service_pb2,
    storage_pb2,
)
from trimtab_protos.codec import from_proto, to_proto
from trimtab_protos.controller.v1 import gateway_service_pb2
from trimtab_protos.errors import InvalidRequest

MODULES = (
    adoption_service_pb2,
    agent_service_pb2,
    backup_pb2,
    command_pb2,
    domain_pb2,
    inventory_pb2,
    network_service_pb2,
    storage_pb2,
    gateway_service_pb2,
)
MIRRORED = [
    value
    for module in (
        messages,
        adoption_messages,
        backup_messages,
        device_messages,
        image_messages,
        network_messages,
        pool_messages,
        volume_messages,
    )
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and value is not adoption_messages.Described
]


def message_class_of(mirrored: type) -> type:
    return next(getattr(module, mirrored.__name__) for module in MODULES if hasattr(module, mirrored.__name__))


@pytest.mark.parametrize("mirrored", MIRRORED, ids=lambda mirrored: mirrored.__name__)
def test_every_field_of_the_message_is_in_the_dataclass(mirrored: type) -> None:
    descriptor = message_class_of(mirrored).DESCRIPTOR
    assert {field.name for field in dataclasses.fields(mirrored)} == set(descriptor.fields_by_name)


def test_a_domain_spec_survives_the_wire() -> None:
    spec = messages.DomainSpec(
        vm_id="vm-1",
        uuid="u",
        name="web1",
        project="default",
        machine="pc-q35-7.2",
        cpu_model="qemu64",
        vcpus=1,
        vcpus_max=4,
        memory_mib=96,
        memory_max_mib=256,
        firmware=messages.Firmware.UEFI,
        disks=(messages.DiskSpec(volume_id="vol-1", pool_id="pool-1", format=messages.DiskFormat.QCOW2, index=0),),
        nics=(
            messages.NicSpec(nic_id="nic-1", network_id="net-1", mac="52:54:00:00:00:01", index=0, addresses=("10.0.0.2/24",)),
        ),
        seed=messages.SeedSpec(meta_yaml="instance-id: vm-1"),
        networks=(messages.NetworkSpec(network_id="net-1", kind=messages.NetworkKind.NAT, name="n"),),
    )
    wire = to_proto(spec, domain_pb2.DomainSpec).SerializeToString()
    assert from_proto(domain_pb2.DomainSpec.FromString(wire), messages.DomainSpec) == spec


def test_a_map_and_an_absent_optional_survive_the_wire() -> None:
    cell = messages.NumaCell(index=0, memory_mib=1, cpus=(0, 1), huge_pages={2048: 4})
    assert from_proto(to_proto(cell, inventory_pb2.NumaCell), messages.NumaCell) == cell
    volume = messages.VolumeSpec(volume_id="v", pool_id="p", format=messages.DiskFormat.RAW, size_bytes=1)
    assert from_proto(to_proto(volume, storage_pb2.VolumeSpec), messages.VolumeSpec) == volume


def test_an_enum_value_of_a_newer_peer_is_refused() -> None:
    message = storage_pb2.PoolSpec(pool_id="p", kind=77)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="does not know"):
        from_proto(message, messages.PoolSpec)
