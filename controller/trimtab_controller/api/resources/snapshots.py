"""Snapshots as the API shows them."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.services.snapshots import SnapshotView


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotResource:
    id: str
    name: str
    vm: str
    # The snapshot that it began from; '' at the root.
    parent: str
    # What the vm writes now began from this one.
    is_current: bool
    # making, ready or deleting.
    state: str
    has_memory: bool
    # crash, filesystem, memory or stopped; '' while it is made.
    consistency: str
    # Why the consistency is less than was wished.
    note: str
    is_temporary: bool
    disk_count: int
    size_bytes: int
    memory_bytes: int
    # Vms that are linked clones of it.
    clones: tuple[str, ...]
    created_at: datetime


def render_snapshot(view: SnapshotView, *, vm_name: str) -> SnapshotResource:
    one = view.snapshot
    return SnapshotResource(
        id=one.id,
        name=one.name,
        vm=vm_name,
        parent=view.parent_name,
        is_current=view.is_current,
        state=one.state,
        has_memory=one.has_memory,
        consistency=one.consistency,
        note=one.note,
        is_temporary=one.is_temporary,
        disk_count=len(one.volumes),
        size_bytes=sum(int(each["size_bytes"]) for each in one.volumes),
        memory_bytes=one.memory_bytes,
        clones=view.clones,
        created_at=one.created_at,
    )
