"""Vms of a start group start in order: each once every kept vm of lower order runs, and its delay after that.

Who is not kept, was stopped by wish or is left to an operator holds nobody up: nothing would ever start it.
"""

from trimtab_controller.core.failover.draft import Draft
from trimtab_controller.core.failover.records import Desired, Phase, Seen, VmRecord
from trimtab_controller.core.lifecycle import HostConnectivity

_AT_HOME = frozenset({Phase.SETTLED, Phase.MOVING})


class StartGroups:
    """The groups of one instant; who starts meanwhile is looked at as it is by then."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._members: dict[tuple[str, str], list[str]] = {}
        for vm in sorted((one for one in draft.vms.values() if one.group), key=lambda one: (one.group_order, one.id)):
            self._members.setdefault((vm.project, vm.group), []).append(vm.id)

    def blocker(self, vm: VmRecord) -> str:
        """Return what the vm has to wait for in its group, '' for nothing."""
        if not vm.group:
            return ""
        draft = self._draft
        for other in (draft.vms[one] for one in self._members.get((vm.project, vm.group), ())):
            if other.group_order >= vm.group_order:
                break
            if other.desired is not Desired.RUNNING or other.phase is Phase.NEEDS_ATTENTION:
                continue
            if not _runs(draft, other):
                return f"waits for {other.called}, which starts earlier in group {vm.group}"
            if other.ran_s < draft.started_s and draft.now < draft.judging_from_s + draft.settings.suspect_after_s:
                # After the loss of all power the store calls it running, and its host up, until that was silent for long enough.
                return f"waits until it is known that {other.called}, which starts earlier in group {vm.group}, runs"
            if draft.now < other.ran_s + vm.start_delay_s:
                return f"waits {vm.start_delay_s:.0f} s after {other.called} in group {vm.group}"
        return ""


def _runs(draft: Draft, vm: VmRecord) -> bool:
    """Tell whether the vm was seen running on a host that is heard from; what a silent one ran may have ended with it."""
    host = draft.hosts.get(vm.host)
    is_heard = host is not None and host.standing is HostConnectivity.UP
    return is_heard and vm.seen is Seen.RUNNING and vm.phase in _AT_HOME and not vm.is_end_unknown
