"""Adoption as the API shows it."""

from dataclasses import dataclass

from trimtab_controller.api.resources.operations import OperationResource
from trimtab_controller.core.adoption import AdoptionPlan
from trimtab_controller.core.drift_fields import Difference
from trimtab_protos.adoption_messages import DomainDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedDiskResource:
    target: str
    path: str
    pool: str
    format: str
    bus: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedNicResource:
    mac: str
    model: str
    network: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalResource:
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptionResource:
    """What becomes of a domain; with refusals nothing does."""

    domain: str
    uuid: str
    host: str
    state: str
    vcpus: int
    memory_mib: int
    firmware: str
    machine: str
    cpu_model: str
    disks: tuple[AdoptedDiskResource, ...]
    nics: tuple[AdoptedNicResource, ...]
    # Parts of the definition that no field says: in force until the next stop, gone after it.
    kept: tuple[str, ...]
    # What else is otherwise after the next stop, in sentences.
    changes_at_next_stop: tuple[str, ...]
    refusals: tuple[RefusalResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptionAnswer:
    adoption: AdoptionResource
    # Absent in a dry run.
    operation: OperationResource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceResource:
    field: str
    desired: str
    # What runs, and what is stored for the next start.
    live: str
    stored: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResource:
    vm: str
    host: str
    is_drifted: bool
    differences: tuple[DifferenceResource, ...]
    # It keeps the definition that it was adopted with until its next stop.
    is_original_in_force: bool


def render_adoption(described: DomainDescription, planned: AdoptionPlan, *, host: str) -> AdoptionResource:
    return AdoptionResource(
        domain=described.name,
        uuid=described.uuid,
        host=host,
        state=described.state.value,
        vcpus=described.vcpus,
        memory_mib=described.memory_mib,
        firmware=described.firmware.value,
        machine=planned.machine,
        cpu_model=planned.cpu_model,
        disks=tuple(
            AdoptedDiskResource(
                target=disk.target,
                path=disk.path,
                pool=disk.pool.name,
                format=disk.format.value,
                bus=disk.bus.value,
                size_bytes=disk.size_bytes,
            )
            for disk in planned.disks
        ),
        nics=tuple(AdoptedNicResource(mac=nic.mac, model=nic.model, network=nic.network.name) for nic in planned.nics),
        kept=planned.kept,
        changes_at_next_stop=planned.changes,
        refusals=tuple(RefusalResource(code=one.code, message=one.message) for one in planned.refusals),
    )


def render_difference(one: Difference) -> DifferenceResource:
    return DifferenceResource(field=one.field, desired=one.desired, live=one.live, stored=one.stored)
