"""The part of vms that lists of many show (`view=basic`).

A page holds a thousand of them, and from one look at a fleet to the next few change but in how long ago they were seen. So the JSON of
each is kept with all that it is made of, up to that age, which stands last.
"""

import json
from collections.abc import Mapping
from datetime import datetime

from typing_extensions import TypedDict

from trimtab_controller.api.render import dump_as
from trimtab_controller.api.resources.operations import OperationResource, render
from trimtab_controller.api.resources.vms import age_s, last_seen
from trimtab_controller.core.model import Operation, VmSummary
from trimtab_controller.services.vm_views import VmSummaries

_AT_MOST = 50_000
"""Vms whose JSON is kept, half a KiB each: all are forgotten beyond that, and come back with the next lists."""
_UNSEEN = '"at":null,"age_s":null}}'


class SummaryDesired(TypedDict):
    power: str


class SummaryObserved(TypedDict):
    state: str
    addresses: tuple[str, ...]
    at: datetime | None
    age_s: float | None


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
    observed: SummaryObserved


class SummaryTexts:
    """JSON of vms as it was last made. For one thread."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, str]] = {}

    def dump(self, found: VmSummaries, *, project: str, now: datetime, heard: Mapping[str, datetime]) -> bytes:
        """Return the JSON list of a page of vms."""
        shown: list[str] = []
        seen: dict[datetime | None, str] = {None: _UNSEEN}  # those of one host all with its last heartbeat
        for vm in found.vms:
            at = last_seen(vm, heard)
            text = seen.get(at)
            if text is None:
                assert at is not None
                text = seen[at] = f'"at":"{at.isoformat().replace("+00:00", "Z")}","age_s":{age_s(at, now)}}}}}'
            shown.append(self._of(vm, found, project) + text)
        return f"[{','.join(shown)}]".encode()

    def _of(self, vm: VmSummary, found: VmSummaries, project: str) -> str:
        names, operation = found.names, found.live.get(vm.id)
        host, image = names.get(vm.host_id, ""), names.get(vm.image_id or "", "")
        declared = tuple(found.addresses.get(vm.id, ()))
        if operation is not None:
            return _text(vm, project=project, host=host, image=image, declared=declared, operation=operation)
        made_of = (project, host, image, declared, vm[:-2])
        kept = self._kept.get(vm.id)
        if kept is None or kept[0] != made_of:  # to compare costs less than to look it up by all of it
            if len(self._kept) >= _AT_MOST:
                self._kept.clear()
            text = _text(vm, project=project, host=host, image=image, declared=declared, operation=None)
            kept = self._kept[vm.id] = made_of, text
        return kept[1]


def _text(vm: VmSummary, *, project: str, host: str, image: str, declared: tuple[str, ...], operation: Operation | None) -> str:
    """Return the JSON of a vm, up to when it was seen."""
    resource: VmSummaryResource = {
        "id": vm.id,
        "name": vm.name,
        "project": project,
        "labels": json.loads(vm.labels),
        "desired": {"power": vm.desired_power},
        "host": host,
        "epoch": vm.epoch,
        "shape": {"vcpus": vm.vcpus, "memory_mib": vm.memory_mib, "arch": vm.arch},
        "nics": ({"addresses": declared},) if declared else (),
        "image": image,
        "problem": vm.problem,
        "hand_changes": tuple(json.loads(vm.hand_changes)),
        "operation": render(operation, project_name=project) if operation is not None else None,
        "deleted_at": vm.deleted_at,
        "created_at": vm.created_at,
        "observed": {
            "state": vm.observed_state,
            "addresses": tuple(json.loads(vm.observed_addresses)),
            "at": None,
            "age_s": None,
        },
    }
    return dump_as(VmSummaryResource, resource).decode().removesuffix(_UNSEEN)
