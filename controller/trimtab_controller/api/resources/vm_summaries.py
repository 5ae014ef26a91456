"""The part of vms that lists of many show (`view=basic`).

Rendered as dicts: a page holds a thousand of them, and each dataclass in between would cost as much as reading its row.
"""

from collections.abc import Mapping
from datetime import datetime

from typing_extensions import TypedDict

from trimtab_controller.api.resources.operations import OperationResource, render
from trimtab_controller.api.resources.vms import confirmed
from trimtab_controller.services.vm_views import VmSummaries


class SummaryDesired(TypedDict):
    power: str


class SummaryObserved(TypedDict):
    state: str
    at: datetime | None
    age_s: float | None
    addresses: tuple[str, ...]


class SummaryShape(TypedDict):
    vcpus: int
    memory_mib: int
    arch: str


class SummaryNic(TypedDict):
    addresses: tuple[str, ...]


class VmSummaryResource(TypedDict):
    """The part of a vm that lists of many show: each field as in the whole."""

    id: str
    name: str
    project: str
    labels: dict[str, str]
    desired: SummaryDesired
    observed: SummaryObserved
    host: str
    epoch: int
    shape: SummaryShape
    # One with all declared addresses, where none was seen in the guest.
    nics: tuple[SummaryNic, ...]
    image: str
    problem: str
    hand_changes: tuple[str, ...]
    operation: OperationResource | None
    deleted_at: datetime | None
    created_at: datetime


def render_summaries(
    found: VmSummaries, *, project: str, now: datetime, heard: Mapping[str, datetime]
) -> list[VmSummaryResource]:
    names, live, declared = found.names, found.live, found.addresses
    rendered: list[VmSummaryResource] = []
    for vm in found.vms:
        at, age_s = confirmed(vm, now=now, heard=heard)
        rendered.append(
            {
                "id": vm.id,
                "name": vm.name,
                "project": project,
                "labels": dict(vm.labels),
                "desired": {"power": vm.desired_power},
                "observed": {
                    "state": vm.observed_state,
                    "at": at,
                    "age_s": age_s,
                    "addresses": tuple(vm.observed_addresses),
                },
                "host": names.get(vm.host_id, ""),
                "epoch": vm.epoch,
                "shape": {"vcpus": vm.vcpus, "memory_mib": vm.memory_mib, "arch": vm.arch},
                "nics": ({"addresses": tuple(declared[vm.id])},) if vm.id in declared else (),
                "image": names.get(vm.image_id or "", ""),
                "problem": vm.problem,
                "hand_changes": tuple(vm.hand_changes),
                "operation": render(live[vm.id], project_name=project) if vm.id in live else None,
                "deleted_at": vm.deleted_at,
                "created_at": vm.created_at,
            }
        )
    return rendered
