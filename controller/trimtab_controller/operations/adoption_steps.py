"""What adopting and releasing have in common: the domain as SQL has it, and how SQL lets go of it while the files stay."""

from typing import Any

from trimtab_controller.core.ids import domain_uuid
from trimtab_controller.operations import vm_steps
from trimtab_controller.operations.saga import Effect, Transaction
from trimtab_controller.store import adoptions, claims, describe, vms
from trimtab_controller.store import volumes as volume_store
from trimtab_protos.messages import DomainSpec


def spec_at_home(context: Effect[Any], vm_id: str) -> tuple[str, int, DomainSpec]:
    """Return the vm's host, its epoch, and the vm as it is defined there."""

    def read(session: Any) -> tuple[str, int, DomainSpec]:
        parts = describe.read_vm(session, vm_id)
        return parts.vm.host_id, parts.vm.epoch, describe.domain_spec(session, parts, parts.vm.host_id)

    found: tuple[str, int, DomainSpec] = context.read(read)
    return found


def give_up(context: Transaction[Any], vm_id: str) -> None:
    """Leave tombstones of the vm and of all its volumes, and count the domain as a stranger's. Files are not touched. Once."""
    session = context.session
    parts = describe.read_vm(session, vm_id)
    if parts.vm.deleted_at is not None:
        return
    claimed = [claim for claim in claims.of_vm(session, vm_id) if claim.vcpus]
    for claim in claimed:
        adoptions.join_unmanaged(
            session,
            claim.host_id,
            vcpus=claim.vcpus,
            memory_mib=claim.memory_mib,
            macs=[nic.mac for nic in parts.nics],
        )
    # A volume that outlives its vm elsewhere would be free to attach while the plain domain writes to its file.
    volume_store.tie_to_vm(session, [volume.id for volume in parts.volumes])
    vm_steps.erase_vm(context)
    # A domain that is adopted again brings its UUID.
    vms.update(session, vm_id, uuid=domain_uuid(vm_id))
