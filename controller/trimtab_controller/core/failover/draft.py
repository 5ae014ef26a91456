"""The next state while it is being made: copies of the records, and the effects in the order in which they were decided."""

from dataclasses import replace

from trimtab_controller.core.failover.effects import Alarm, Effect
from trimtab_controller.core.failover.records import Evidence, Holder, HostRecord, State, VmRecord


class Draft:
    """Belongs to one call of `step`; nothing outside sees it."""

    def __init__(self, state: State, now: float) -> None:
        self._state = state
        self.now = now
        self.settings = state.settings
        self.rules = state.rules
        self.hosts = dict(state.hosts)
        self.vms = dict(state.vms)
        self.judging_from_s = state.judging_from_s
        self.started_s = state.started_s
        self.ticked_s = state.ticked_s
        self.frozen = state.frozen
        self.is_paused = state.is_paused
        self.tombstones = state.tombstones
        self.effects: list[Effect] = []

    def finish(self) -> State:
        return replace(
            self._state,
            hosts=self.hosts,
            vms=self.vms,
            judging_from_s=self.judging_from_s,
            started_s=self.started_s,
            ticked_s=self.ticked_s,
            frozen=self.frozen,
            is_paused=self.is_paused,
            tombstones=self.tombstones,
        )

    def put(self, record: HostRecord) -> HostRecord:
        self.hosts[record.id] = record
        return record

    def put_vm(self, record: VmRecord) -> VmRecord:
        self.vms[record.id] = record
        return record

    def do(self, effect: Effect) -> None:
        self.effects.append(effect)

    def alarm(self, subject: str, code: str, message: str) -> None:
        self.do(Alarm(subject=subject, code=code, message=message))

    def note(self, host: HostRecord, what: str) -> HostRecord:
        """Add a line to the host's timeline."""
        return self.put(replace(host, evidence=(*host.evidence, Evidence(at_s=self.now, what=what))))

    def held_by(self, host: str) -> list[VmRecord]:
        """Return the vms that this host may hold, by id."""
        return [vm for _id, vm in sorted(self.vms.items()) if any(holder.host == host for holder in vm.holders)]

    def at_home_on(self, host: str) -> list[VmRecord]:
        """Return the vms that belong to this host, running there or not."""
        return [vm for _id, vm in sorted(self.vms.items()) if vm.host == host]

    def silent_s(self, host: HostRecord) -> float:
        """Return how long the host has been silent as far as that means anything."""
        return self.now - max(host.heard_s, self.judging_from_s)


def holder_on(vm: VmRecord, host: str) -> Holder | None:
    return next((holder for holder in vm.holders if holder.host == host), None)


def without_holder(vm: VmRecord, host: str) -> VmRecord:
    """Return the vm after it was proven that `host` no longer holds it."""
    return replace(vm, holders=tuple(holder for holder in vm.holders if holder.host != host))
