"""Books of a plan: where each vm would be after the steps so far, every move held against the same rules as a placement.

Two sets of books are kept. `books` is the state after every step so far. `crowded` holds the claims of all targets, but of the
releases only those that later moves were made to wait for: what fits there needs no other step, whatever of the plan is still under
way. Sound for every order that `after` allows: while both sides of a move are claimed, nothing is promised twice.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from trimtab_controller.core.placement import BEST_FIT, Books, Decision, PlacementRequest, Policy, decide
from trimtab_controller.core.planning.estate import Estate, VmSnapshot, copied_bytes
from trimtab_controller.core.planning.plan import Step, StepKind

# Only the chosen host and the closest refusal are read: no list of all hosts.
_SHORT_ANSWER = -1
_REQUEST_OF: dict[StepKind, Callable[[VmSnapshot], PlacementRequest]] = {
    StepKind.MIGRATE: VmSnapshot.migrate_request,
    StepKind.RESTART: VmSnapshot.restart_request,
    StepKind.RECOVER: VmSnapshot.restart_request,
}


def request_for(vm: VmSnapshot, kind: StepKind) -> PlacementRequest:
    """Return what this way of moving asks of the target."""
    return _REQUEST_OF[kind](vm)


@dataclass(frozen=True, slots=True)
class _Release:
    """Room that a step frees at its source."""

    position: int
    request: PlacementRequest
    host_id: str


class WhatIf:
    """Belongs to one plan; not thread-safe."""

    __slots__ = ("_crowded", "_last_of", "_uncredited", "_waits_at", "books", "estate", "host_of", "steps")

    def __init__(self, estate: Estate) -> None:
        self.estate = estate
        self.books = Books(estate.fleet)
        self.host_of = {vm_id: vm.host_id for vm_id, vm in estate.vms.items()}
        self.steps: list[Step] = []
        self._crowded = Books(estate.fleet)
        self._uncredited: list[_Release] = []
        # Steps whose releases at a host are counted on: every later move into it waits for them.
        self._waits_at: defaultdict[str, set[int]] = defaultdict(set)
        self._last_of: dict[str, int] = {}

    def decide(
        self,
        vm: VmSnapshot,
        kind: StepKind,
        *,
        excluded: Iterable[str] = (),
        target_host_id: str = "",
        policy: Policy = BEST_FIT,
    ) -> Decision:
        """Return where the scheduler would put this vm now, its present host and the excluded ones left out."""
        return decide(self.books, self._request(vm, kind, excluded, target_host_id), policy=policy, listed_hosts=_SHORT_ANSWER)

    def fits(self, vm: VmSnapshot, kind: StepKind, target_host_id: str) -> bool:
        return self.decide(vm, kind, target_host_id=target_host_id).chosen_host_id is not None

    def move(
        self,
        vm: VmSnapshot,
        kind: StepKind,
        target_host_id: str,
        *,
        after: Iterable[int] = (),
        is_fixed: bool = False,
        why: str = "",
    ) -> Step:
        """Add the step and book it. ValueError where the target has no room.

        `is_fixed`: the plan's worth lies in this target; else the scheduler picks again when the step's turn comes. A restart is
        booked like a migration: its room at the source is not counted on before the start has succeeded.
        """
        source = self.host_of[vm.vm_id]
        request = self._request(vm, kind, (), target_host_id)
        own = {self._last_of[vm.vm_id]} if vm.vm_id in self._last_of else set()
        waits = {*after, *own, *self._reserve(request, target_host_id)}
        self.books.claim(request, target_host_id)
        step = Step(
            position=len(self.steps),
            kind=kind,
            host_id=source,
            vm_id=vm.vm_id,
            vm_name=vm.name,
            target_host_id=target_host_id,
            after=tuple(sorted(waits)),
            is_target_fixed=is_fixed,
            copied_bytes=copied_bytes(vm, self.estate.fleet) if kind is StepKind.MIGRATE else 0,
            why=why,
        )
        if source in self.estate.fleet.row_of:
            self.books.release(request, source)
            self._uncredited.append(_Release(step.position, request, source))
        self.host_of[vm.vm_id] = target_host_id
        self._last_of[vm.vm_id] = step.position
        self.steps.append(step)
        return step

    def mark(self, kind: StepKind, host_id: str, *, after: Iterable[int] = (), why: str = "") -> Step:
        """Add a step that moves no vm."""
        step = Step(position=len(self.steps), kind=kind, host_id=host_id, after=tuple(sorted(set(after))), why=why)
        self.steps.append(step)
        return step

    def _reserve(self, request: PlacementRequest, target_host_id: str) -> set[int]:
        """Claim the target in the crowded books; return the steps that must be done before."""
        if not self._has_room(request):
            self._credit(lambda release: release.host_id == target_host_id)
            if not self._has_room(request):
                # What bars it is not at the target: a group's member that leaves another host of the same rack, say.
                self._credit(lambda _release: True)
                self._waits_at[target_host_id] |= {step.position for step in self.steps}
        self._crowded.claim(request, target_host_id)
        return set(self._waits_at[target_host_id])

    def _has_room(self, request: PlacementRequest) -> bool:
        return decide(self._crowded, request, policy=BEST_FIT, listed_hosts=_SHORT_ANSWER).chosen_host_id is not None

    def _credit(self, is_meant: Callable[[_Release], bool]) -> None:
        kept = []
        for release in self._uncredited:
            if is_meant(release):
                self._crowded.release(release.request, release.host_id)
                self._waits_at[release.host_id].add(release.position)
            else:
                kept.append(release)
        self._uncredited = kept

    def _request(self, vm: VmSnapshot, kind: StepKind, excluded: Iterable[str], target_host_id: str) -> PlacementRequest:
        left_out = tuple(dict.fromkeys([self.host_of[vm.vm_id], *excluded]))
        return replace(request_for(vm, kind), excluded_host_ids=left_out, required_host_id=target_host_id)


def shortened(what_if: WhatIf) -> WhatIf:
    """Return the same outcome with one move for each vm, where some move twice and the direct way has room; else as it is."""
    ends = {step.vm_id: step for step in what_if.steps if step.moves_vm}
    if len(ends) == sum(step.moves_vm for step in what_if.steps):
        return what_if
    short = WhatIf(what_if.estate)
    left = {vm_id: step for vm_id, step in ends.items() if short.host_of[vm_id] != step.target_host_id}
    while left:
        possible = next(
            (one for one in left if short.fits(short.estate.vms[one], left[one].kind, left[one].target_host_id)), None
        )
        if possible is None:
            return what_if
        step = left.pop(possible)
        vm = short.estate.vms[possible]
        short.move(vm, step.kind, step.target_host_id, is_fixed=step.is_target_fixed, why=step.why)
    return short
