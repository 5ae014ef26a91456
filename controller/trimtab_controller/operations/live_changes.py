"""How sagas change a vm that may run: they ask the guest through its agent, look at what it took, and ask again for a while."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trimtab_controller.operations.saga import Effect
from trimtab_controller.store import describe
from trimtab_protos.messages import ChangeLeft, DomainObservation, DomainSpec

# A guest that is awake follows within a second; one under load may take this long before it counts as refusing.
PATIENCE_S = 30.0
POLL_S = 2.0


PartsOf = Callable[[describe.VmParts], describe.VmParts]


def ask_guest(
    context: Effect[Any],
    *,
    host_id: str,
    epoch: int,
    part: str = "",
    parts_of: PartsOf = lambda parts: parts,
    spec_of: Callable[[DomainSpec], DomainSpec] = lambda spec: spec,
) -> tuple[DomainObservation, tuple[ChangeLeft, ...]]:
    """Make the vm's domain as SQL says it is, changed by `parts_of` and `spec_of`; return what is seen and what is left.

    `part` tells several askings of one step apart: a repeat of one must ask for the same.
    """
    vm_id = context.params.vm_id

    def read(session: Any) -> DomainSpec:
        return describe.domain_spec(session, parts_of(describe.read_vm(session, vm_id)), host_id)

    spec = spec_of(context.read(read))
    return context.agents.apply_domain(host_id, context.key(subject_id=vm_id, epoch=epoch, part=part), spec)


def may_follow(left: tuple[ChangeLeft, ...]) -> bool:
    """Tell whether the guest may still do what it was asked for without a stop."""
    return any(not each.needs_stop for each in left)


def with_medium(parts: describe.VmParts, image_id: str) -> describe.VmParts:
    """Return the vm with this image in its drive; '' is none."""
    return replace(parts, vm=replace(parts.vm, cdrom_image_id=image_id))
